"What of the targets counts: training, weights, means and metrics go by it, and a sub-window without a target is no step"
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import lr_find # noqa: a method of Learner
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn
from torch.nn import functional as F
from helpers import adam, fit, sgd, untaught_on_purpose
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.counts import NotIgnored, TargetCounts
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.views import SubWindows
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.truncation.schemes import Overlap

WIN,SUB,BS,CLASSES = 60,20,4,3
nan = float('nan')


def finite(y): return ~y.isnan().all(-1)

class Net(nn.Module):
    def __init__(self, n_out=CLASSES, classes_second=False):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.lin = StatefulRNN(nn.LSTM(1, 5, batch_first=True)),nn.Linear(5, n_out)
        self.classes_second = classes_second
    def forward(self, x):
        out = self.lin(self.rnn(x))
        return out.movedim(-1, 1) if self.classes_second else out

class Last(Net):
    def forward(self, x): return self.lin(self.rnn(x)[:,-1])

def windows(n=8, steps=WIN, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(n, steps, 1, dtype=dtype),torch.randint(CLASSES, (n, steps))

def sparse_labels(n=8, steps=WIN):
    "None in the second sub-window, a few in the third, and in the second batch none but one in the first"
    x,y = windows(n, steps)
    y[:4,20:40],y[:4,43:] = -100,-100
    y[4:] = -100
    y[6,3] = 1
    return x,y

def sparse_numbers(n=8, dtype=torch.float32):
    x,labels = sparse_labels(n)
    y = labels[...,None].to(dtype)
    y[labels<0] = nan
    return x.to(dtype),y

def loaders(x, y, bs=BS, cls=TfmdDL, **kwargs):
    items = list(zip(x, y))
    return DataLoaders(*(cls(items, bs=bs, num_workers=0, **kwargs) for _ in range(2)))

def learner(dls, model, loss_func=None, sub=SUB, cls=Learner, opt=adam, metrics=(), cbs=(), **kwargs):
    if loss_func is None: loss_func = CrossEntropyLossFlat(ignore_index=-100)
    return cls(dls, model, loss_func=loss_func, opt_func=opt, metrics=list(metrics),
               cbs=[TbpttResetCB(sub, **kwargs), *cbs])

def by_hand(model, x, y, loss_func, opt, epochs=2, lr=1e-2, sub=SUB, bs=BS, n_skip=0, counts=lambda y: y>=0):
    "The loop that makes no step without a target, and weighs steps by their targets; its parameters and losses"
    opt,losses = opt(model.parameters(), lr=lr),[]
    for _ in range(epochs):
        for xb,yb in zip(x.split(bs), y.split(bs)):
            state,masks = None,counts(yb).clone()
            masks[:,:n_skip] = False
            ns = [int(o.sum()) for o in masks.split(sub, 1)]
            for xs,ys,mask,n in zip(xb.split(sub, 1), yb.split(sub, 1), masks.split(sub, 1), ns):
                out,state = model.rnn.rnn(xs, state)
                state = tuple(o.detach() for o in state)
                if not n: continue
                loss = loss_func(model.lin(out)[mask], ys[mask])
                losses.append(loss.item())
                opt.zero_grad()
                (loss*n/max(ns)).backward()
                opt.step()
    return list(model.parameters()),losses

class Steps(Callback):
    "The losses of the steps of a training, and where the schedule is in the end"
    order = 61
    def before_fit(self): self.losses = []
    def after_step(self): self.losses.append(self.learn.loss.item())
    def after_train(self): self.pct = self.learn.pct_train

def assert_same(model, params, tol=1e-6):
    for p,q in zip(model.parameters(), params): torch.testing.assert_close(p, q, rtol=0, atol=tol)


@pytest.mark.parametrize('opt,torch_opt', [(adam, torch.optim.Adam), (sgd, torch.optim.SGD)])
@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(ignore_index=-100), nn.CrossEntropyLoss(), F.cross_entropy,
                                       partial(F.cross_entropy, ignore_index=-100)])
def test_a_sub_window_without_a_label_is_no_step(loss_func, opt, torch_opt):
    x,y = sparse_labels()
    second = not isinstance(loss_func, CrossEntropyLossFlat) # has classes in the second axis
    steps = Steps()
    learn = learner(loaders(x, y), Net(classes_second=second), loss_func, opt=opt, cbs=[steps, TerminateOnNaNCallback()])
    fit(learn, 2)
    params,losses = by_hand(Net(), x, y, F.cross_entropy, torch_opt)
    assert len(losses)==2*(2+1)
    np.testing.assert_allclose(steps.losses[-3:], losses[-3:], atol=1e-6)
    assert_same(learn.model, params)

@untaught_on_purpose
@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize('n_skip', [0, 2, 30])
def test_missing_numbers_are_left_out_of_any_loss(n_skip, dtype, tol):
    x,y = sparse_numbers(dtype=dtype)
    def of_channels(y): return ~y.isnan()
    if n_skip==30: y[4:,40] = 1.
    learn = learner(loaders(x, y), Net(1).to(dtype), nn.L1Loss(), n_skip=n_skip, counts=of_channels)
    fit(learn, 2)
    params,_ = by_hand(Net(1).to(dtype), x, y, nn.L1Loss(), torch.optim.Adam, n_skip=n_skip, counts=finite)
    assert_same(learn.model, params, tol)

def test_targets_that_count_are_a_target_themselves():
    x,y = sparse_numbers()
    mask = finite(y)
    def loss_func(pred, y, mask): return (pred-y).abs()[mask].mean()
    dls = DataLoaders(*(TfmdDL(list(zip(x, y.nan_to_num(), mask)), bs=BS, num_workers=0) for _ in range(2)))
    dls.n_inp = 1
    learn = fit(learner(dls, Net(1), loss_func, counts=lambda y,mask: mask), 2)
    params,_ = by_hand(Net(1), x, y, nn.L1Loss(), torch.optim.Adam, counts=finite)
    assert_same(learn.model, params)

@pytest.mark.parametrize('kind', ['fastai', 'torch', 'list', 'tbptt'])
def test_every_loader(kind):
    x,y = sparse_labels()
    dls = loaders(x, y, cls=TbpttDL) if kind=='tbptt' else loaders(x, y)
    if kind=='torch': dls = DataLoaders(*(torch.utils.data.DataLoader(list(zip(x, y)), BS) for _ in range(2)))
    if kind=='list': dls = DataLoaders(*(list(zip(x.split(BS), y.split(BS))) for _ in range(2)))
    learn = fit(learner(dls, Net()), 2)
    params,_ = by_hand(Net(), x, y, F.cross_entropy, torch.optim.Adam)
    assert_same(learn.model, params)

def test_one_label_for_each_window():
    x,_ = windows()
    y = torch.tensor([0,-100,2,1, -100,-100,-100,-100])
    learn = learner(loaders(x, y), Last())
    steps = Steps()
    learn.add_cb(steps)
    fit(learn, 1)
    model = Last()
    loss = F.cross_entropy(model(x[:4]), y[:4])
    assert steps.losses==[pytest.approx(loss.item(), abs=1e-6)] and steps.pct>.4
    assert learn.recorder.values[-1][1]==pytest.approx(F.cross_entropy(learn.model(x[:4]), y[:4]).item(), abs=1e-6)

@pytest.mark.parametrize('sub', [SUB, None])
def test_one_number_for_each_window(sub):
    x,_ = windows()
    y = torch.tensor([0.,nan,2.,1., nan,nan,nan,nan])[:,None]
    class OneNumber(Last):
        def __init__(self): super().__init__(1)
    learn = fit(learner(loaders(x, y), OneNumber(), nn.L1Loss(), sub=sub, counts=lambda y: ~y.isnan()))
    assert len(learn.recorder.losses)==1
    assert learn.validate()[0]==pytest.approx((learn.model(x)-y).abs().nanmean().item(), abs=1e-6)

def test_whole_windows():
    x,y = sparse_labels()
    y[4:] = -100
    learn = fit(learner(loaders(x, y), Net(), sub=None), 2)
    params,losses = by_hand(Net(), x, y, F.cross_entropy, torch.optim.Adam, sub=WIN)
    assert len(losses)==2
    assert_same(learn.model, params)

def test_a_schedule_of_whole_windows_comes_to_its_end():
    x,y = windows(16)
    y[:4] = -100
    steps = Steps()
    learn = fit(learner(loaders(x, y), Net(), sub=None, cbs=[steps]), 2)
    assert steps.pct==pytest.approx(1.) and len(learn.recorder.losses)==2*3

@pytest.mark.parametrize('sub', [SUB, None])
def test_a_window_with_labels_in_its_washout_alone_is_no_step(sub):
    x,y = windows()
    y[4:,10:] = -100
    learn = fit(learner(loaders(x, y), Net(), sub=sub, n_skip=10), 2)
    n = 2 if sub is None else 2*3
    assert len(learn.recorder.losses)==n and np.isfinite(learn.recorder.losses).all()

def test_labels_that_all_count_change_no_number():
    x,y = windows()
    dls = loaders(x, y)
    class Plain(Net):
        def forward(self, x): return self.lin(self.rnn.rnn(x)[0])
    ours,fastais = learner(dls, Plain(), sub=None),Learner(dls, Plain(), loss_func=CrossEntropyLossFlat(), opt_func=adam)
    for o in (ours, fastais): fit(o, 2)
    assert ours.recorder.values[-1][0]==fastais.recorder.values[-1][0]
    assert_same(ours.model, list(fastais.model.parameters()), 0)

def test_a_loss_along_another_axis_is_given_whole_batches():
    x,y = windows()
    loss_func = CrossEntropyLossFlat(axis=2)
    learn = fit(learner(loaders(x, y[...,None]), Net(), loss_func))
    assert learn.validate()[0]==pytest.approx(true_mean(learn.model, x, y)[0], abs=1e-6)

def test_what_a_model_gives_beside_predictions_of_steps_is_left_as_it_is():
    class Two(Net):
        def forward(self, x): return super().forward(x),x.mean()
    def loss_func(preds, y, ignore_index=-100): return F.cross_entropy(preds[0], y, ignore_index=ignore_index)+0*preds[1]
    x,y = sparse_labels()
    learn = fit(learner(loaders(x, y), Two(), loss_func), 2)
    assert_same(learn.model, by_hand(Net(), x, y, F.cross_entropy, torch.optim.Adam)[0])

def test_targets_at_another_rate_are_refused():
    x,y = windows()
    with pytest.raises(ValueError, match='60 steps'): fit(learner(loaders(x, y[:,::2]), Net(), counts=lambda y: y>0))

def test_an_overlap_weighs_by_labels():
    x,y = sparse_labels()
    steps = Steps()
    learn = learner(loaders(x, y), Net(), sub='dls', truncation=Overlap(k1=10, k2=20), cbs=[steps])
    fit(learn, 1)
    y_parts = [y[:4,a:a+10] for a in range(0, WIN, 10)]
    assert len(steps.losses)==sum(bool((o>=0).any()) for o in y_parts)+1


def true_mean(model, x, y):
    with torch.no_grad(): pred = model.eval()(x)
    return F.cross_entropy(pred[y>=0], y[y>=0]).item(),(pred.argmax(-1)==y)[y>=0].float().mean().item()

@pytest.mark.parametrize('bs', [1, 3, 4, 8])
@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('n_skip', [0, 7])
def test_means_of_an_evaluation_are_over_the_labels(n_skip, full, bs):
    x,y = sparse_labels()
    if full: y[:4] = windows()[1][:4]
    learn = learner(loaders(x, y, bs), Net(), metrics=[accuracy], n_skip=n_skip)
    y[:,:n_skip] = -100
    assert list(learn.validate())==pytest.approx(true_mean(Net(), x, y), abs=1e-6)

@pytest.mark.parametrize('bs,sub', [(1, 20), (3, 7), (8, None), (2, 50)])
@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(ignore_index=-100), CrossEntropyLossFlat()])
def test_means_of_a_stream_are_over_the_labels(bs, sub, loss_func):
    x,y = sparse_labels()
    lengths = [60, 33, 47, 60, 12, 60, 21, 5]
    xs,ys = ([o[:n].numpy() for o,n in zip(seqs, lengths)] for seqs in (x, y))
    dl = StreamDL(Sequences(xs, ys), bs=bs, sub_seq_len=sub)
    learn = learner(DataLoaders(dl, dl), Net(), loss_func, sub='dls', metrics=[accuracy])
    with torch.no_grad(): pred = torch.cat([Net()(torch.tensor(o)[None])[0] for o in xs])
    y = torch.cat([torch.tensor(o) for o in ys])
    expected = F.cross_entropy(pred[y>=0], y[y>=0]).item(),(pred.argmax(-1)==y)[y>=0].float().mean().item()
    assert list(learn.validate())==pytest.approx(expected, abs=1e-6)

def test_predictions_are_those_of_all_steps():
    x,y = sparse_labels()
    learn = learner(loaders(x, y, 3), Net())
    preds,targs,losses = learn.get_preds(with_loss=True)
    assert preds.shape==(8, WIN, CLASSES) and torch.equal(targs, y)
    with torch.no_grad(): each = F.cross_entropy(Net()(x).movedim(-1, 1), y, reduction='none')
    each[y<0] = nan
    torch.testing.assert_close(losses, each.nanmean(1), equal_nan=True)
    assert losses.isnan().tolist()==[False]*4+[True,True,False,True]

def test_a_learning_rate_is_found():
    x,y = sparse_labels(16)
    y[8:] = y[:8]
    learn = learner(loaders(x, y), Net())
    with learn.no_bar(), learn.no_logging(): res = learn.lr_find(num_it=40, show_plot=False)
    assert np.isfinite(res.valley) and np.isfinite(learn.recorder.losses).all()

@pytest.mark.parametrize('empty', [[], [0], [1], [0,1], [1,2]])
def test_a_schedule_comes_to_its_end_though_windows_have_no_label(empty):
    x,y = windows(16)
    for i in empty: y[4*i:4*i+4] = -100
    steps = Steps()
    learn = fit(learner(loaders(x, y), Net(), cbs=[steps]), 2)
    left = 0 if 3 not in empty else 1
    assert steps.pct==pytest.approx(1-left/8) and len(learn.recorder.losses)==2*3*(4-len(empty))

def test_the_training_loss_is_a_mean_over_labels():
    x,y = sparse_labels()
    learn = learner(loaders(x, y), Net(), opt=sgd)
    fit(learn, 1, 0.)
    with torch.no_grad(): pred = Net()(x)
    parts = [(slice(0, 4),slice(0, 20),1.), (slice(0, 4),slice(40, 60),12/80), (slice(4, 8),slice(0, 20),1.)]
    val = weight = 0
    for rows,at,w in parts:
        loss = F.cross_entropy(pred[rows,at].flatten(0, 1), y[rows,at].flatten()).item()
        val,weight = .98*val+.02*loss*w,.98*weight+.02*w
    assert learn.recorder.values[-1][0]==pytest.approx(val/weight, abs=1e-5)

@pytest.mark.parametrize('full', [False, True])
def test_accumulated_gradients_are_those_of_all_labels(full):
    x,y = sparse_labels()
    if full: y[:4] = windows()[1][:4] # a window all of whose labels count, and one in which few do
    n = int((y>=0).sum())
    learn = learner(loaders(x, y), Net(), opt=sgd, cbs=[GradientAccumulation(n)])
    fit(learn, 1, .1)
    model = Net()
    state,loss = None,0.
    for xb,yb in zip(x.split(BS), y.split(BS)):
        state = None
        for xs,ys in zip(xb.split(SUB, 1), yb.split(SUB, 1)):
            out,state = model.rnn.rnn(xs, state)
            state = tuple(o.detach() for o in state)
            loss = loss+F.cross_entropy(model.lin(out)[ys>=0], ys[ys>=0], reduction='sum')/n
    loss.backward()
    with torch.no_grad():
        for p in model.parameters(): p -= .1*p.grad
    assert_same(learn.model, list(model.parameters()))


def ends_labelled(n=6, seed=0):
    "Sequences of unequal length, each with one label at its end"
    rng = np.random.default_rng(seed)
    xs = [rng.normal(size=(k, 1)).astype(np.float32) for k in rng.integers(15, 70, n)]
    ys = [np.full(len(o), -100) for o in xs]
    for i,o in enumerate(ys): o[-1] = i%CLASSES
    return xs,ys

@pytest.mark.parametrize('in_files', [False, True])
@pytest.mark.parametrize('opt,torch_opt', [(adam, torch.optim.Adam), (sgd, torch.optim.SGD)])
def test_one_label_at_the_end_of_unequal_sequences(opt, torch_opt, in_files, tmp_path):
    xs,ys = ends_labelled()
    if in_files:
        for i,(x,y) in enumerate(zip(xs, ys)):
            np.save(tmp_path/f'x{i}.npy', x)
            np.save(tmp_path/f'y{i}.npy', y)
        data = Sequences(*([np.load(tmp_path/f'{k}{i}.npy', mmap_mode='r') for i in range(len(xs))] for k in 'xy'))
        assert data.in_files
    else: data = Sequences(xs, ys)
    dl = StreamDL(data, bs=2, sub_seq_len=SUB)
    steps = Steps()
    learn = fit(learner(DataLoaders(dl, dl), Net(), sub='dls', opt=opt, cbs=[steps]), 2)
    model = Net()
    o = torch_opt(model.parameters(), lr=1e-2)
    blocks = list(dl.layout(SUB))
    most = max(sum(int((ys[s][a:a+n]>=0).sum()) for s,a,n in zip(b.seq, b.start, b.n) if n) for b in blocks)
    n_steps = 0
    for _ in range(2):
        states = [None,None]
        for b in blocks:
            loss,n_labels = 0.,0
            for row,(s,a,n) in enumerate(zip(b.seq, b.start, b.n)):
                if not n: continue
                if a==0: states[row] = None
                out,state = model.rnn.rnn(torch.tensor(xs[s][a:a+n])[None], states[row])
                states[row] = tuple(o.detach() for o in state)
                y = torch.tensor(ys[s][a:a+n])
                if (y>=0).any():
                    loss = loss+F.cross_entropy(model.lin(out)[0][y>=0], y[y>=0], reduction='sum')
                    n_labels += int((y>=0).sum())
            if not n_labels: continue
            o.zero_grad()
            (loss/most).backward()
            o.step()
            n_steps += 1
    assert len(steps.losses)*2==n_steps or len(steps.losses)==n_steps
    assert steps.pct==pytest.approx(1.)
    assert_same(learn.model, list(model.parameters()), 2e-6)

def test_a_stream_in_overlapping_blocks_goes_by_its_labels():
    xs,ys = ends_labelled()
    dl = StreamDL(Sequences(xs, ys), bs=2, sub_seq_len=SUB)
    steps = Steps()
    learn = fit(learner(DataLoaders(dl, dl), Net(), sub='dls', truncation=Overlap(k1=10, k2=20), cbs=[steps]), 1)
    assert np.isfinite(steps.losses).all() and steps.pct==pytest.approx(1.)
    assert len(steps.losses)==len(learn.recorder.losses)<len(dl.layout(10))

def test_sub_windows_that_do_not_overlap_train_as_those_of_one_length():
    xs,ys = ends_labelled()
    dl = StreamDL(Sequences(xs, ys), bs=2, sub_seq_len=10)
    dls = DataLoaders(dl, dl)
    plain = fit(learner(dls, Net(), sub=10, opt=sgd), 2)
    runs = fit(learner(dls, Net(), sub='dls', opt=sgd, truncation=Overlap(k1=10, k2=10)), 2)
    assert_same(plain.model, list(runs.model.parameters()))

def test_the_factory_takes_it():
    xs,ys = ends_labelled()
    numbers = [np.where(o<0, nan, o).astype(np.float32)[:,None] for o in ys]
    dl = StreamDL(Sequences(xs, numbers, check=False), bs=2, sub_seq_len=SUB)
    learn = TbpttLearner(DataLoaders(dl, dl), Net(1), loss_func=nn.L1Loss(), counts=finite)
    fit(learn, 1)
    with torch.no_grad(): preds = torch.cat([learn.model.eval()(torch.tensor(o)[None])[0] for o in xs])
    y = torch.tensor(np.concatenate(numbers))
    assert learn.validate()[0]==pytest.approx((preds-y).abs().nanmean().item(), abs=1e-6)


@pytest.mark.parametrize('stream', [False, True])
def test_a_training_without_any_label_is_refused(stream):
    x,y = windows()
    y[:] = -100
    dl = StreamDL(Sequences(list(x.numpy()), list(y.numpy())), bs=2, sub_seq_len=SUB)
    dls = DataLoaders(dl, dl) if stream else loaders(x, y)
    with pytest.raises(ValueError, match='ignore_index'): fit(learner(dls, Net(), sub='dls' if stream else SUB))

@pytest.mark.parametrize('counts,error,said', [
    (lambda y: y.abs(), TypeError, 'float32'), (lambda y: ~y.isnan().expand(-1, -1, 2), ValueError, r'all\(-1\)'),
    (lambda y: ~y.isnan().any(1).any(1)[:2], ValueError, 'batch'), (lambda y: True, TypeError, 'bool')])
def test_an_answer_that_is_none_is_refused(counts, error, said):
    x,y = sparse_numbers()
    model = Net(1)
    with pytest.raises(error, match=said): fit(learner(loaders(x, y), model, nn.L1Loss(), counts=counts))
    assert_same(model, list(Net(1).parameters()), 0)

def test_predictions_that_do_not_fit_the_targets_are_refused():
    x,y = sparse_labels()
    with pytest.raises(ValueError, match='one for each'): fit(learner(loaders(x, y), Last(), counts=lambda y: y>=0))

def test_windows_without_a_loss_are_not_ranked():
    from fastai.interpret import Interpretation
    x,y = sparse_labels()
    learn = learner(loaders(x, y), Net())
    with pytest.raises(ValueError, match='no target that counts'), learn.no_bar(): Interpretation.from_learner(learn)
    y[:,0] = 1
    with learn.no_bar(): Interpretation.from_learner(learner(loaders(x, y), Net()))

@pytest.mark.parametrize('sub', [CLASSES, 2*CLASSES, 20])
def test_as_many_classes_as_steps(sub):
    x,y = sparse_labels()
    y[:,1::3] = -100
    second = fit(learner(loaders(x, y), Net(classes_second=True), nn.CrossEntropyLoss(), sub=sub))
    last = fit(learner(loaders(x, y), Net(), sub=sub))
    assert_same(second.model, list(last.model.parameters()))

def test_classes_and_steps_that_cannot_be_told_apart_are_refused():
    def loss_func(pred, y, ignore_index=-100): return F.cross_entropy(pred.movedim(-1, 1) if pred.ndim>2 else pred, y)
    x,y = sparse_labels()
    y[:,1::3] = -100
    fit(learner(loaders(x, y), Net(), loss_func))
    with pytest.raises(ValueError, match='as many classes as steps'):
        fit(learner(loaders(x, y), Net(), loss_func, sub=CLASSES))

# targets that count are one after the other, and are held against their predictions as all others

@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('loss', [nn.MSELoss(), lambda o, y: (o-y).abs().mean(), nn.HuberLoss()])
def test_what_only_broadcasting_makes_fit_is_refused_of_those_that_count(loss, stream):
    x,y = sparse_numbers()
    def made(y):
        if not stream: return loaders(x, y)
        dl = StreamDL(Sequences(list(x.numpy()), list(y.numpy()), check=False), bs=BS, sub_seq_len=SUB, num_workers=0)
        return DataLoaders(dl, dl)
    def counts(y): return ~y.isnan() if y.ndim<3 else finite(y)
    for targets,n_out in ((y if stream else y[...,0], 2 if stream else 1), (y.expand(-1, -1, 2), 1)):
        model = Net(n_out)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match='would compare each with every other') as error:
            fit(learner(made(targets), model, loss, 'dls' if stream else SUB, opt=sgd, counts=counts))
        assert 'number of steps' not in str(error.value)
        assert all(torch.equal(p, o) and p.grad is None for p,o in zip(model.parameters(), before))
    fit(learner(made(y), Net(1), loss, 'dls' if stream else SUB, opt=sgd, counts=counts))

def test_the_loss_is_tried_on_the_first_targets_that_count():
    "In the first sub-windows none does, then one"
    x,y = sparse_numbers()
    y[:4] = nan
    for loss in (nn.MSELoss(), lambda o, y: (o-y).abs().mean()):
        model = Net(1)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match='would compare each with every other'):
            fit(learner(loaders(x, y[...,0]), model, loss, opt=sgd, counts=lambda y: ~y.isnan()))
        assert all(map(torch.equal, model.parameters(), before))

def test_windows_that_processes_share_are_not_weighed_by_those_of_one():
    class Shared(list): world_size = 2
    batches = Shared([(torch.zeros(2, 60, 1), torch.zeros(2, 60, 1))])
    batches.world_size = 2
    with pytest.raises(NotImplementedError, match='StreamDL'): SubWindows(batches, 20, counts=TargetCounts(finite))
    assert SubWindows(batches, 20, counts=NotIgnored(-100)).counts is None and SubWindows(list(batches), 20, counts=NotIgnored(-100)).counts is not None
