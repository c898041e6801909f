"What counts in a loss, together with the loss's own weights, its reduction, distributions, a washout, and time on another axis"
import warnings
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.interpret import Interpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F
from helpers import fit, sgd, untaught_on_purpose
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.counts import NotIgnored, has_classes_second, ignore_index_of
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.segment import only
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.training.callback import TbpttResetCB

N,T,C,K,SUB,BS = 6,24,2,3,7,4
WEIGHT = torch.tensor([1.,3.,.5])

def to_layout(o, dim): return {1: o, 0: o.transpose(0, 1), -1: o.movedim(1, -1)}[dim]
def to_rows(o, dim): return {1: o, 0: o.transpose(0, 1), -1: o.movedim(-1, 1)}[dim]

class Net(nn.Module):
    def __init__(self, n_out=K, dim=1, classes_second=False):
        super().__init__()
        torch.manual_seed(1)
        self.rnn,self.lin = nn.GRU(C, 5, batch_first=True),nn.Linear(5, n_out)
        self.dim,self.classes_second = dim,classes_second

    def forward(self, x):
        out = self.lin(self.rnn(to_rows(x, self.dim))[0])
        return out.movedim(-1, 1) if self.classes_second else to_layout(out, self.dim)

def classes(n=N, share=.5):
    "Inputs, and labels of some steps"
    g = torch.Generator().manual_seed(3)
    y = torch.randint(0, K, (n, T), generator=g)
    return torch.randn(n, T, C, generator=g),torch.where(torch.rand(n, T, generator=g)<share, y, -100)

def window_loaders(x, y, dim=1):
    def collate(items): return tuple(to_layout(torch.stack(o), dim) if o[0].ndim else torch.stack(o) for o in zip(*items))
    return DataLoaders(*(TfmdDL(list(zip(x, y)), bs=BS, num_workers=0, create_batch=collate) for _ in range(2)))

def params(model): return torch.cat([o.detach().flatten() for o in model.parameters()])

# ---- the validation loss of a stream

lengths = [24, 5, 13, 1, 9, 20]

def validated(loss_func, y, n_out, bs, sub, n_skip=0, **kwargs):
    x = classes()[0]
    seqs = [[o[:n].numpy() for o,n in zip(each, lengths)] for each in (x, y)]
    dl = StreamDL(Sequences(*seqs, check=False), bs=bs, sub_seq_len=sub)
    cb = TbpttResetCB(sub, n_skip=n_skip, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*not longer than n_skip')
        learn = Learner(DataLoaders(dl, dl), Net(n_out), loss_func=loss_func, opt_func=sgd, cbs=cb)
        with learn.no_bar(), learn.no_logging(): return learn.validate()[0]

def of_all(loss, y, n_out, n_skip):
    "A loss of all that counts, of sequences that are run whole"
    x,net = classes()[0],Net(n_out)
    preds,targs = zip(*((net(x[i:i+1,:n])[0,n_skip:], y[i,n_skip:n]) for i,n in enumerate(lengths)))
    preds,targs = torch.cat(preds),torch.cat(targs)
    at = targs!=-100 if n_out==K else torch.ones(len(targs), dtype=torch.bool)
    return loss(preds[at], targs[at]).item()

@pytest.mark.parametrize('bs,sub', [(1, 4), (2, 7), (6, 24), (3, 1)])
@pytest.mark.parametrize('n_skip', [0, 3])
@pytest.mark.parametrize('loss_func', [
    CrossEntropyLossFlat(weight=WEIGHT), nn.CrossEntropyLoss(weight=WEIGHT), CrossEntropyLossFlat(reduction='sum'),
    CrossEntropyLossFlat(reduction='none')], ids=['flat', 'torch', 'sum', 'none'])
def test_a_loss_with_weights_or_another_reduction_is_the_same_however_a_stream_is_cut(loss_func, n_skip, bs, sub):
    weight = WEIGHT if loss_func.reduction=='mean' else None
    right = of_all(lambda p,y: F.cross_entropy(p, y, weight=weight), classes()[1], K, n_skip)
    assert validated(loss_func, classes()[1], K, bs, sub, n_skip)==pytest.approx(right, abs=1e-6)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('bs,sub', [(1, 4), (2, 7), (6, 24)])
def test_the_loss_of_numbers_is_the_same_however_a_stream_is_cut(bs, sub, reduction):
    y = torch.randn(N, T, 1, generator=torch.Generator().manual_seed(5))
    right = of_all(F.mse_loss, y, 1, 3)
    assert validated(nn.MSELoss(reduction=reduction), y, 1, bs, sub, 3)==pytest.approx(right, abs=1e-6)

def test_targets_that_a_loss_leaves_out_beside_those_that_do_not_count_have_no_weight():
    y = classes()[1]
    right = of_all(F.cross_entropy, y, K, 0)
    def counts(y): return torch.ones_like(y, dtype=torch.bool)
    assert validated(CrossEntropyLossFlat(), y, K, 6, 24, counts=counts)==pytest.approx(right, abs=1e-6)

def rmse(pred, y): return (pred-y).square().mean().sqrt()

def test_a_loss_that_is_no_mean_over_steps_is_named_on_a_stream():
    y = torch.randn(N, T, 1, generator=torch.Generator().manual_seed(5))
    with pytest.warns(UserWarning, match='rmse is no mean over steps'): validated(rmse, y, 1, 2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        validated(rmse, y, 1, 2, 7, check=False)
        for loss_func in (nn.HuberLoss(), nn.MSELoss(), nn.L1Loss()): validated(loss_func, y, 1, 2, 7)

class Seen(nn.MSELoss):
    "A loss that keeps what it has seen, and one that draws"
    n,noise = 0,0.
    def forward(self, pred, y):
        self.n += 1
        return super().forward(pred, y)*(1+self.noise*torch.rand(()))

def test_a_loss_is_asked_without_a_trace():
    y = torch.randn(N, T, 1, generator=torch.Generator().manual_seed(5))
    quiet,asked = Seen(),Seen()
    a,b = (validated(f, y, 1, 2, 7, check=f is asked) for f in (quiet, asked))
    assert a==b and asked.n==quiet.n
    drawn = Seen()
    drawn.noise = 10.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        torch.manual_seed(0)
        a = validated(drawn, y, 1, 2, 7)
    torch.manual_seed(0)
    assert a==validated(drawn, y, 1, 2, 7, check=False)

def test_windows_after_a_stream_are_averaged_as_by_fastai():
    x,y = classes()
    loss_func,loaders = CrossEntropyLossFlat(weight=WEIGHT),window_loaders(x, y.clamp(min=0))
    learn = Learner(loaders, Net(), loss_func=loss_func, opt_func=sgd)
    with learn.no_bar(): expected = learn.validate()
    stream = StreamDL(Sequences(list(x.numpy()), list(y.numpy())), bs=2, sub_seq_len=7)
    learn.add_cb(TbpttResetCB(7))
    with learn.no_bar(): of_stream,again = learn.validate(dl=stream),learn.validate()
    assert of_stream[0]!=pytest.approx(expected[0], abs=1e-3)
    assert again[0]==pytest.approx(expected[0], abs=1e-6)

# ---- losses of each step or window

@pytest.mark.parametrize('dim', [1, 0, -1])
def test_steps_without_a_label_in_any_window_leave_every_window_its_rank(dim):
    x,y = classes(share=1.)
    y[:,7:14] = -100
    learn = Learner(window_loaders(x, y, dim), Net(dim=dim), loss_func=CrossEntropyLossFlat(axis=1 if dim==-1 else -1), opt_func=sgd,
                    cbs=TbpttResetCB(SUB, time_dim=dim))
    with learn.no_bar(): found = Interpretation.from_learner(learn).top_losses(3)[0]
    losses = F.cross_entropy(Net()(x).movedim(-1, 1), y, reduction='none')
    losses[y==-100] = torch.nan
    torch.testing.assert_close(found, losses.nanmean(1).topk(3)[0])

@pytest.mark.parametrize('dim', [1, 0, -1])
def test_a_window_without_a_label_is_not_ranked_though_each_step_has_one(dim):
    x,y = classes(share=1.)
    y[1] = -100
    learn = Learner(window_loaders(x, y, dim), Net(dim=dim), loss_func=CrossEntropyLossFlat(axis=1 if dim==-1 else -1), opt_func=sgd,
                    cbs=TbpttResetCB(SUB, time_dim=dim))
    with learn.no_bar(), pytest.raises(ValueError, match='no target that counts'):
        Interpretation.from_learner(learn)

class OfWindow(Net):
    def forward(self, x): return to_rows(super().forward(x), self.dim)[:,-1]

@pytest.mark.parametrize('dim', [1, 0, -1])
def test_losses_of_windows_some_of_which_have_no_label(dim):
    x,y = classes()[0],torch.tensor([0,2,-100,1,-100,-100])
    cb = TbpttResetCB(SUB, time_dim=dim, timed=(True,False), check=False)
    learn = Learner(window_loaders(x, y, dim), OfWindow(dim=dim), loss_func=CrossEntropyLossFlat(), opt_func=sgd, cbs=cb)
    with learn.no_bar(): losses = learn.get_preds(with_loss=True)[-1]
    right = F.cross_entropy(OfWindow()(x), y, reduction='none')
    torch.testing.assert_close(losses, torch.where(y==-100, torch.nan, right), equal_nan=True)

class Autocast(Callback):
    "As mixed precision on a GPU, whose loss is in single precision"
    order = 9
    def before_batch(self):
        self.context = torch.autocast('cpu', dtype=torch.bfloat16)
        self.context.__enter__()
    def after_loss(self): self.context.__exit__(None, None, None)
    def after_cancel_batch(self): self.context.__exit__(None, None, None)

def test_losses_of_a_stream_keep_their_precision():
    x,y = classes()
    dl = StreamDL(Sequences(list(x.numpy()), list(y.numpy())), bs=2, sub_seq_len=7)
    learn = Learner(DataLoaders(dl, dl), Net(), loss_func=CrossEntropyLossFlat(), opt_func=sgd, cbs=[TbpttResetCB(7), Autocast()])
    with learn.no_bar(): preds,_,losses = learn.get_preds(with_loss=True, act=lambda o: o)
    assert preds.dtype is torch.bfloat16 and losses.dtype is torch.float32
    right = F.cross_entropy(preds.float(), y.flatten(), reduction='none')
    torch.testing.assert_close(losses, torch.where(y.flatten()==-100, torch.nan, right), equal_nan=True)

# ---- classes before time

def by_hand(x, y, n_skip, loss=F.cross_entropy):
    net = Net()
    opt = torch.optim.SGD(net.parameters(), .1)
    counts = (y!=-100)&(torch.arange(T)>=n_skip)
    for i in range(0, len(x), BS):
        state,labels = None,[counts[i:i+BS,a:a+SUB].sum().item() for a in range(0, T, SUB)]
        for a,n in zip(range(0, T, SUB), labels):
            out,state = net.rnn(x[i:i+BS,a:a+SUB], state)
            state,at = state.detach(),counts[i:i+BS,a:a+SUB]
            if n==0: continue
            opt.zero_grad()
            (loss(net.lin(out)[at], y[i:i+BS,a:a+SUB][at])*n/max(labels)).backward()
            opt.step()
    return params(net)

@untaught_on_purpose
@pytest.mark.parametrize('share', [1., .5])
@pytest.mark.parametrize('n_skip', [3, 4, 8]) # of a sub-window of 7 steps, 4 leave as many steps as there are classes
def test_a_washout_is_cut_from_predictions_with_classes_before_time(n_skip, share):
    x,y = classes(share=share)
    learn = Learner(window_loaders(x, y), Net(classes_second=True), loss_func=nn.CrossEntropyLoss(), opt_func=sgd,
                    cbs=TbpttResetCB(SUB, n_skip=n_skip))
    fit(learn, lr=.1)
    torch.testing.assert_close(params(learn.model), by_hand(x, y, n_skip))

def test_classes_and_steps_as_many_are_told_apart_by_the_loss_and_the_layout():
    "Three steps, three classes: only a loss of torch.nn has its classes second"
    mask,pred,y = torch.tensor([[True,False,True]]*2),torch.randn(2, 3, 3),torch.zeros(2, 3, dtype=torch.long)
    second,last = pred.movedim(1, -1)[mask],pred[mask]
    for dim,classes_second,right in ((1, True, second), (-1, None, second), (1, False, last), (-1, True, second)):
        assert torch.equal(only(mask, pred, (y,), dim, classes_second)[0], right)
    numbers = torch.randn(2, 3, 3) # targets with channels: of classes nothing is known
    assert torch.equal(only(mask, pred, (numbers,), 1, True)[0], last)

# ---- distributions

class Chosen(Net):
    "The batch shape of its distribution is (rows, steps) in any layout of the inputs, or (steps, rows)"
    def forward(self, x):
        out = self.lin(self.rnn(to_rows(x, self.dim))[0])
        return Categorical(logits=out.transpose(0, 1) if self.dim==0 else out)

@pytest.mark.parametrize('dim', [1, 0, -1])
@pytest.mark.parametrize('n_skip', [0, 4]) # 4 leave as many steps as there are classes
def test_axes_of_a_distribution_are_told_from_its_classes(dim, n_skip):
    x,y = classes()
    def loss_func(dist, y): return -dist.log_prob(y).mean()
    cb = TbpttResetCB(SUB, n_skip=n_skip, time_dim=dim, counts=lambda y: y!=-100)
    learn = fit(Learner(window_loaders(x, y, dim), Chosen(dim=dim), loss_func=loss_func, opt_func=sgd, cbs=cb), lr=.1)
    torch.testing.assert_close(params(learn.model), by_hand(x, y, n_skip))

# ---- who is asked

def test_a_function_of_targets_is_given_those_of_a_stream_in_their_layout():
    x,y = classes()
    y = torch.stack([torch.where(y==-100, torch.nan, y.float()), y.float()], -1)
    def trained(dim):
        dl = StreamDL(Sequences(list(x.numpy()), list(y.numpy()), check=False), bs=2, sub_seq_len=7, time_dim=dim)
        cb = TbpttResetCB(7, time_dim=dim, counts=lambda y: ~y.isnan().any(1 if dim==-1 else 2))
        return params(fit(Learner(DataLoaders(dl, dl), Net(2, dim), loss_func=nn.MSELoss(), opt_func=sgd, cbs=cb)).model)
    for dim in (0, -1): torch.testing.assert_close(trained(dim), trained(1), rtol=0, atol=1e-6)

def test_an_answer_for_each_sequence_of_a_stream_is_that_of_all_its_steps():
    x,y = classes(share=1.)
    def trained(counts):
        dl = StreamDL(Sequences(list(x.numpy()), list(y.numpy())), bs=2, sub_seq_len=7)
        cb = TbpttResetCB(7, counts=counts)
        return params(fit(Learner(DataLoaders(dl, dl), Net(), loss_func=CrossEntropyLossFlat(), opt_func=sgd, cbs=cb)).model)
    def of_steps(y): return (y[:,:1]>0).expand_as(y)
    torch.testing.assert_close(trained(lambda y: y[:,0]>0), trained(of_steps))

@pytest.mark.parametrize('dim', [1, 0, -1])
def test_inputs_without_targets_are_predicted(dim):
    x,y = classes()
    cb = TbpttResetCB(SUB, time_dim=dim, counts=lambda y: y!=-100)
    learn = Learner(window_loaders(x, y, dim), Net(dim=dim), loss_func=nn.MSELoss(), opt_func=sgd, cbs=cb)
    def collate(items): return (to_layout(torch.stack([o for o, in items]), dim),)
    dl = TfmdDL([(o,) for o in x], bs=BS, num_workers=0, create_batch=collate, n_inp=1)
    learn.dls.n_inp = 1
    with learn.no_bar(): preds = learn.get_preds(dl=dl)[0]
    torch.testing.assert_close(to_rows(preds, -1) if dim==-1 else preds, Net()(x))

def test_what_a_loss_leaves_out_is_asked_of_classes_alone():
    assert NotIgnored(-100).mask((torch.full((2,3), -100.),)) is None
    assert NotIgnored(-100).mask((torch.full((2,3,4), -100),)) is None
    assert NotIgnored(-100).mask((torch.full((2,3,1), -100),)).tolist()==[[False]*3]*2
    class Inside:
        def __init__(self, func): self.func = func
    assert ignore_index_of(Inside(nn.CrossEntropyLoss(ignore_index=7)))==7
    assert ignore_index_of(partial(F.cross_entropy, ignore_index=5))==5
    own = Inside(nn.CrossEntropyLoss(ignore_index=7))
    own.ignore_index = 'none'
    assert ignore_index_of(own)==7
    for loss_func in (F.cross_entropy, F.nll_loss, partial(F.cross_entropy, ignore_index=5), nn.NLLLoss()):
        assert has_classes_second(loss_func) is True
    assert has_classes_second(nn.MSELoss()) is None

@pytest.mark.parametrize('dim', [0, -1])
def test_one_label_for_each_sequence_in_any_layout(dim):
    x = classes()[0].numpy()
    def trained(dim):
        dls = SequenceDataLoaders.from_arrays(list(x[:4]), list('abcb'), valid=(list(x[4:]), list('ac')), bs=2, sub_seq_len=SUB,
                                              time_dim=dim, shuffle=False)
        torch.manual_seed(0)
        learn = fit(RNNLearner(dls, rnn_type='gru', hidden_size=5, opt_func=sgd), lr=.1)
        return learn,params(learn.model)
    (learn,found),(_,expected) = trained(dim),trained(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with learn.no_bar(): assert learn.get_preds(with_decoded=True)[2].shape==(2,)

# ---- refusals

@pytest.mark.parametrize('counts', [True, -100, np.ones(3)], ids=['bool', 'int', 'array'])
def test_what_is_no_function_of_targets_is_refused(counts):
    with pytest.raises(TypeError, match='counts is .*expected a function of the targets'): TbpttResetCB(7, counts=counts)
