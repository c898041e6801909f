"Each truncation scheme against a loop by hand, step by step, in float64 to 1e-10; alone, and with washout, ragged tails, streams and callbacks"
import dataclasses
import warnings
from itertools import pairwise
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, fit_own_lr, sgd, untaught_on_purpose
from reference import scaled_gradients, stream_by_hand, stream_of_sizes, train_overlap, train_scheme_on_stream
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased
from tbptt_fastai.truncation.plan import Fixed, SubWindow, Truncation
from tbptt_fastai.sequences.windows import Sequences

f64 = dict(dtype=torch.float64)
WIN = 23

class Plain(nn.Module):
    "A layer and a head, called without a state"
    def __init__(self, rnn, head): super().__init__(); self.rnn,self.head = rnn,head
    def forward(self, x): return self.head(self.rnn(x)[0])

def parts(kind='lstm'):
    torch.manual_seed(0)
    rnn = {'lstm': lambda: nn.LSTM(2, 3, 2, batch_first=True), 'gru': lambda: nn.GRU(2, 3, batch_first=True), 'rnn': lambda: nn.RNN(2, 3, batch_first=True)}[kind]()
    return rnn.double(),nn.Linear(3, 1).double()

def data(n=9, steps=WIN):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((n, steps, 2))),torch.from_numpy(rng.standard_normal((n, steps, 1)))

def scheme_loaders(bs=4, steps=WIN, n=9):
    x,y = data(n, steps)
    dl = TbpttDL(Sequences(list(x), list(y), **f64), bs=bs, shuffle=False, num_workers=0, device='cpu')
    return DataLoaders(dl, dl)

def scheme_learner(dls, scheme, rnn, head, stateful=True, lr=.05, **kwargs):
    model = nn.Sequential(StatefulRNN(rnn), head) if stateful else Plain(rnn, head)
    kwargs = {**dict(loss_func=nn.MSELoss(), opt_func=sgd, lr=lr), **kwargs}
    return TbpttLearner(dls, model, truncation=scheme, **kwargs)

def same(model, *modules, tol=1e-10):
    mine,theirs = [p for p in model.parameters()],[p for m in modules for p in m.parameters()]
    for a,b in zip(mine, theirs, strict=True): assert (a-b).abs().max()<tol

def batches(bs=4, n=9): return [list(range(i, min(i+bs, n))) for i in range(0, n, bs)]


@untaught_on_purpose
@pytest.mark.parametrize('kind,stateful', [('lstm', True), ('lstm', False), ('gru', True), ('rnn', False)])
@pytest.mark.parametrize('k1,k2', [(5, 10), (5, 12), (4, 4), (7, WIN), (1, 6), (10, 30), (WIN, WIN)])
@pytest.mark.parametrize('losses,n_skip', [('last', 0), ('all', 0), ('last', 8), ('all', 8)])
def test_overlap_equals_the_loop_by_hand(kind, stateful, k1, k2, losses, n_skip):
    x,y = data()
    scheme = Overlap(k1, k2, losses)
    learn = fit_own_lr(scheme_learner(scheme_loaders(), scheme, *parts(kind), stateful, n_skip=n_skip), 2)
    rnn,head = parts(kind)
    train_overlap(rnn, head, x, y, [batches()]*2, k1, k2, torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05), nn.functional.mse_loss, losses, n_skip)
    same(learn.model, rnn, head)

def test_overlap_of_equal_lengths_is_the_fixed_scheme_bit_by_bit():
    a,b = (fit_own_lr(scheme_learner(scheme_loaders(steps=20), scheme, *parts()), 2)
           for scheme in (Overlap(5, 5), Fixed(5)))
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def recorded(scheme):
    "The scheme, a list that gets the plans of all windows it is trained on, and the callback that sees to it"
    plans = []
    class Recorded(type(scheme)):
        def sub_windows(self, win_sz, n_skip=0, rng=None):
            plan = super().sub_windows(win_sz, n_skip, rng)
            if rng is not None and rng is getattr(watch.learn.dl, 'rng', None): plans.append(plan)
            return plan
    class Watch(Callback): pass
    scheme.__class__,watch = Recorded,Watch()
    set_seed(3)
    return scheme,plans,watch

@pytest.mark.parametrize('kind,stateful', [('lstm', True), ('lstm', False), ('gru', False)])
@pytest.mark.parametrize('alpha,block,n_skip', [(6, 1, 0), (3, 4, 0), (None, 3, 0), (4, 2, 7)])
def test_unbiased_equals_the_loop_by_hand(kind, stateful, alpha, block, n_skip):
    x,y = data()
    mean = 6
    scheme,plans,on = recorded(RandomUnbiased(mean, alpha, block))
    learn = fit_own_lr(scheme_learner(scheme_loaders(), scheme, *parts(kind), stateful, n_skip=n_skip, cbs=on), 2)
    assert len(plans)==6 and any(o.cuts for p in plans for o in p) and any(len(p)>1 for p in plans)
    rnn,head = parts(kind)
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05)
    for idxs,plan in zip(batches()*2, plans):
        state = None
        def loss(pred, target, at): return nn.functional.mse_loss(pred, target)*(at>=n_skip)/mean
        for o in plan:
            t = iter(reversed(range(o.start, o.stop)))
            # each boundary that was no cut has a factor 1/(1-c), by the time since the last cut
            for step,factor in o.cuts:
                n = (step-o.start)//block
                c = 1/(mean/block) if alpha is None else min((alpha-1)/((alpha-2)*mean/block+n), 1)
                assert factor==pytest.approx(1/(1-c), rel=1e-12)
            assert [s for s,_ in o.cuts]==list(range(o.start+block, o.stop, block))
            grads,state = scaled_gradients(rnn, head, x[idxs][:,o.start:o.stop], y[idxs][:,o.start:o.stop], state,
                                           {s-o.start:f for s,f in o.cuts}, lambda p,q: loss(p, q, next(t)))
            if o.stop<=n_skip: continue
            for p,g in zip([*rnn.parameters(), *head.parameters()], grads): p.grad = g
            opt.step()
    same(learn.model, rnn, head)

@pytest.mark.parametrize('alpha,block', [(6, 1), (4, 5), (None, 1), (None, 4)])
def test_lengths_have_the_mean_that_was_asked_for(alpha, block):
    lengths = [o.steps for o in RandomUnbiased(20, alpha, block).sub_windows(200_000)]
    assert np.mean(lengths)==pytest.approx(20, rel=.05)

def test_the_mean_gradient_is_the_full_one():
    "An error within three times of what as many draws have; far more without the factors, and for a fixed length"
    rng = np.random.default_rng(0)
    x,y = torch.from_numpy(rng.standard_normal((1, 40, 2))),torch.from_numpy(rng.standard_normal((1, 40, 1)))
    torch.manual_seed(0)
    rnn,head = nn.LSTM(2, 6, batch_first=True).double(),nn.Linear(6, 1).double()
    nn.init.constant_(rnn.bias_ih_l0[6:12], 2.5)
    model = nn.Sequential(StatefulRNN(rnn), head)
    class Sum(Callback):
        "Gradients are added up, and no step is taken"
        order = 90
        def before_fit(self): self.total,self.squares,self.window = 0,0,0
        def before_step(self):
            self.window = self.window+torch.cat([p.grad.flatten() for p in rnn.parameters()])
            for p in self.learn.model.parameters(): p.grad = None
            if self.learn.dl.sub_window.stop in (None, 40):
                self.total,self.squares,self.window = self.total+self.window,self.squares+self.window**2,0
    def mean_gradient(scheme, n=400):
        dl = TbpttDL(Sequences([x[0]]*n, [y[0]]*n, **f64), bs=1, shuffle=False, num_workers=0)
        summed = Sum()
        set_seed(1)
        fit_own_lr(TbpttLearner(DataLoaders(dl, dl), model, truncation=scheme, loss_func=nn.MSELoss(), opt_func=sgd,
                                lr=0., cbs=summed))
        return summed.total/n,((summed.squares/n-(summed.total/n)**2).sum()/n)**.5
    full,_ = mean_gradient(None, 1)
    full = full*40/10 # a mean over 40 steps there, a sum over 10 here
    for alpha in (6, 4):
        found,error = mean_gradient(RandomUnbiased(10, alpha))
        assert (found-full).norm()<3*error and error<.2*full.norm()
    class Biased(RandomUnbiased):
        def plan(self, *args): return [o._replace(cuts=()) for o in super().plan(*args)]
    found,error = mean_gradient(Biased(10, 6))
    assert (found-full).norm()>5*error
    found,_ = mean_gradient(Fixed(10), 1)
    assert (found-full).norm()>.2*full.norm()


@untaught_on_purpose
@pytest.mark.parametrize('kind,stateful', [('lstm', True), ('lstm', False)])
@pytest.mark.parametrize('n_skip', [0, 9])
@pytest.mark.parametrize('rescale', ['loss', 'lr'])
def test_jittered_equals_the_loop_by_hand(kind, stateful, n_skip, rescale):
    x,y = data()
    scheme,plans,on = recorded(Jittered(7, half=.3, std=2, least=2, longest=9, rescale=rescale))
    learn = fit_own_lr(scheme_learner(scheme_loaders(), scheme, *parts(kind), stateful, n_skip=n_skip, cbs=on), 2)
    assert len(plans)==6 and len({tuple(o.start for o in p) for p in plans})>3
    assert learn.opt.hypers[0]['lr']==.05
    rnn,head = parts(kind)
    params = [*rnn.parameters(), *head.parameters()]
    for idxs,plan in zip(batches()*2, plans):
        state = None
        for start,stop in pairwise([0, *(o.stop for o in plan)]):
            assert stop-start<=9
            out,state = rnn(x[idxs][:,start:stop], state)
            state = tuple(s.detach() for s in state)
            skip = max(n_skip-start, 0)
            if stop-start<=skip: continue
            loss = nn.functional.mse_loss(head(out)[:,skip:], y[idxs][:,start+skip:stop])
            grads = torch.autograd.grad(loss, params)
            scale = (stop-start-skip)/7
            with torch.no_grad():
                for p,g in zip(params, grads): p -= .05*scale*g
    same(learn.model, rnn, head)


@pytest.mark.parametrize('kind,stateful', [('lstm', True), ('lstm', False), ('gru', True)])
@pytest.mark.parametrize('segment,n_skip', [(None, 0), (5, 0), (1, 0), (WIN, 0), (50, 0), (5, 8)])
def test_exact_is_full_backpropagation(kind, stateful, segment, n_skip):
    a,b = (fit_own_lr(scheme_learner(scheme_loaders(), scheme, *parts(kind), stateful, n_skip=n_skip, **kwargs), 2)
           for scheme,kwargs in ((Exact(segment), {}), (None, dict(sub_seq_len=None))))
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert (p-q).abs().max()<1e-12

def test_exact_draws_the_same_dropout_again():
    "What is computed again in the backward pass is what was computed before"
    class Dropping(nn.Module):
        def __init__(self): super().__init__(); self.cell = nn.GRUCell(2, 3)
        def forward(self, x, h=None):
            out = []
            for xt in x.unbind(1):
                h = nn.functional.dropout(self.cell(xt, h), .5, self.training)
                out.append(h)
            return torch.stack(out, 1),h
    def trained(scheme, **kwargs):
        torch.manual_seed(0)
        model = nn.Sequential(StatefulRNN(Dropping()), nn.Linear(3, 1)).double()
        set_seed(5)
        learn = TbpttLearner(scheme_loaders(), model, truncation=scheme, loss_func=nn.MSELoss(), opt_func=sgd, lr=.05,
                             **kwargs)
        learn.tbptt_reset_cb.check = False
        return fit_own_lr(learn)
    for p,q in zip(trained(Exact(5)).model.parameters(), trained(None, sub_seq_len=None).model.parameters()): assert (p-q).abs().max()<1e-12

def test_exact_needs_a_tenth_of_the_memory():
    "Saved tensors of a window of 10,000 steps, with gradients that are equal"
    torch.manual_seed(0)
    x,y = torch.randn(1, 10_000, 2, dtype=torch.float64),torch.randn(1, 10_000, 1, dtype=torch.float64)
    dl = TbpttDL(Sequences(list(x), list(y), **f64), bs=1, num_workers=0)
    saved,grads = {},{}
    class Watch(Callback):
        order = 99
        def before_step(self): grads[self.name_of] = [p.grad.clone() for p in self.learn.model.parameters()]
    for name,scheme in (('plain', None), ('exact', Exact())):
        rnn,head = parts()
        live = peak = 0
        def pack(t):
            nonlocal live, peak
            storage = t.untyped_storage()
            if storage.data_ptr() not in sizes and t.data_ptr() not in held: live += storage.nbytes()
            sizes[storage.data_ptr()] = sizes.get(storage.data_ptr(), 0)+1
            peak = max(peak, live)
            return Held(t)
        class Held:
            def __init__(self, t): self.t,self.key,self.n = t,t.untyped_storage().data_ptr(),t.untyped_storage().nbytes()
            def __del__(self):
                nonlocal live
                sizes[self.key] -= 1
                if not sizes[self.key]:
                    del sizes[self.key]
                    if self.key not in held: live -= self.n
        sizes,watch = {},Watch()
        learn = scheme_learner(DataLoaders(dl, dl), scheme, rnn, head, cbs=watch,
                               **({} if scheme else dict(sub_seq_len=None)))
        watch.name_of,held = name,{p.untyped_storage().data_ptr() for p in learn.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda o: o.t): fit_own_lr(learn)
        saved[name] = peak
    assert saved['exact']<.1*saved['plain']
    for a,b in zip(grads['exact'], grads['plain'], strict=True): assert (a-b).abs().max()<1e-10*max(b.abs().max(), 1)


def sequences(lengths=(23, 9, 31, 14, 5, 12)):
    rng = np.random.default_rng(1)
    return [[rng.standard_normal((n, c)) for n in lengths] for c in (2, 1)]

def stream(scheme, bs, size, rnn, head, stateful, n_skip=0, n_epoch=2, cbs=None):
    xs,ys = sequences()
    dl = StreamDL(Sequences(xs, ys, **f64), bs=bs, sub_seq_len=size, device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning) # some sequences may be all washout
        learn = scheme_learner(DataLoaders(dl, dl), scheme, rnn, head, stateful, n_skip=n_skip, cbs=cbs)
        return fit_own_lr(learn, n_epoch)

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('bs', [1, 2, 4])
@pytest.mark.parametrize('k1,k2,losses,n_skip', [(5, 15, 'last', 0), (5, 15, 'all', 0), (4, 8, 'last', 7), (6, 6, 'last', 0)])
def test_overlap_on_streams_equals_each_row_alone(stateful, bs, k1, k2, losses, n_skip):
    "Rows begin their sequences in the middle of what gradients go back over"
    xs,ys = ([torch.from_numpy(o) for o in seqs] for seqs in sequences())
    learn = stream(Overlap(k1, k2, losses), bs, k1, *parts(), stateful, n_skip)
    rnn,head = parts()
    opt,m = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05),k2//k1
    n = len(stream_by_hand([len(x) for x in xs], bs, k1, range(6)))
    runs = [(max(k+1-m, 0), k+1, k if losses=='last' else max(k+1-m, 0), max(k+2-m, 0) if k+1<n else k+1, {}) for k in range(n)]
    most = max(hi-first for _,hi,first,*_ in runs)*k1
    for _ in range(2): train_scheme_on_stream(rnn, head, xs, ys, bs, k1, runs, opt, nn.functional.mse_loss, lambda run,steps,rows: steps/(most*rows), n_skip)
    same(learn.model, rnn, head)
    assert float(learn.pct_train)==pytest.approx(1)

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('bs,n_skip', [(1, 0), (3, 0), (3, 7)])
def test_unbiased_on_streams_equals_each_row_alone(stateful, bs, n_skip):
    xs,ys = ([torch.from_numpy(o) for o in seqs] for seqs in sequences())
    plans = []
    class Watch(Callback):
        order = 13
        def before_train(self): plans.append(self.learn.dl.runs)
    set_seed(2)
    learn = stream(RandomUnbiased(12, 6, block=4), bs, 4, *parts(), stateful, n_skip, cbs=Watch())
    assert len(plans)==2 and plans[0]!=plans[1] and any(o.cuts for o in plans[0]) and len(plans[0])>1
    rnn,head = parts()
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05)
    assert float(learn.pct_train)==pytest.approx(1)
    for plan in plans:
        runs = [(o.start, o.stop, o.loss_start, o.stop, dict(o.cuts)) for o in plan]
        train_scheme_on_stream(rnn, head, xs, ys, bs, 4, runs, opt, nn.functional.mse_loss, lambda run,steps,rows: steps/(12*rows), n_skip)
    same(learn.model, rnn, head)

@pytest.mark.parametrize('bs', [1, 3])
def test_exact_on_streams_is_full_backpropagation(bs):
    a,b = (stream(scheme, bs, 10, *parts(), True) for scheme in (Exact(4), Exact(100)))
    same(a.model, b.model, tol=1e-12)
    xs,ys = sequences()
    dl = StreamDL(Sequences(xs, ys, **f64), bs=bs, device='cpu')
    c = fit_own_lr(scheme_learner(DataLoaders(dl, dl), None, *parts(), sub_seq_len=None), 2)
    same(a.model, c.model, tol=1e-12)

def test_schemes_that_fit_no_stream_are_refused():
    with pytest.raises(ValueError, match='does not cut in blocks of one length'): stream(Overlap(5, 12), 2, 5, *parts(), True)
    with pytest.raises(ValueError, match="Use rescale='loss'"): stream(Jittered(7, rescale='lr'), 2, 5, *parts(), True)
    with pytest.raises(ValueError, match='sequences of 50 steps or more, but the longest has 31'): stream(Jittered(50), 2, 5, *parts(), True)

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('bs,n_skip', [(1, 0), (3, 0), (3, 6), (9, 0)])
def test_jittered_on_streams_equals_each_row_alone(stateful, bs, n_skip):
    xs,ys = ([torch.from_numpy(o) for o in seqs] for seqs in sequences())
    sizes = []
    class Watch(Callback):
        order = 13
        def before_train(self): sizes.append([o.steps for o in self.learn.dl.layout])
    set_seed(2)
    learn = stream(Jittered(7, half=.3, std=2, least=2), bs, 5, *parts(), stateful, n_skip, cbs=Watch())
    assert len(sizes)==2 and sizes[0]!=sizes[1] and len(set(sizes[0]))>2 and float(learn.pct_train)==pytest.approx(1)
    rnn,head = parts()
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05)
    for some in sizes:
        steps = stream_of_sizes([len(x) for x in xs], bs, 7, some)
        runs = [(k, k+1, k, k+1, {}) for k in range(len(steps))]
        train_scheme_on_stream(rnn, head, xs, ys, bs, 7, runs, opt, nn.functional.mse_loss, lambda run,n,rows: n/(7*rows), n_skip, steps)
    same(learn.model, rnn, head)

def test_jittered_on_text_reads_every_token_in_pieces_of_several_lengths():
    "Where AWD-LSTM uses it"
    dls = SequenceDataLoaders.from_text('the quick brown fox jumps over the lazy dog '*40, bs=4, sub_seq_len=20)
    seen = []
    class Watch(Callback):
        order = 13
        def before_batch(self):
            if self.training: seen.append(self.xb[0].shape[1])
    learn = TbpttLearner(dls, rnn_type='lstm', hidden_size=8, truncation=Jittered(20), cbs=Watch())
    fit_own_lr(learn)
    n = dls.train.dataset.lengths.max()
    assert sum(seen)==n and len(set(seen))>3

SCHEMES = [Fixed(6), Overlap(4, 10), Overlap(4, 10, 'all'), Jittered(7, std=2, least=2), RandomUnbiased(8, 6), RandomUnbiased(8, block=2), Exact(), Exact(5)]

@untaught_on_purpose
@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
@pytest.mark.parametrize('n_skip', [0, 9])
def test_every_number_a_user_reads_is_that_of_whole_windows(scheme, n_skip):
    "Validation, predictions, and after training the state; the schedule ends where it should"
    rnn,head = parts()
    learn = scheme_learner(scheme_loaders(), scheme, rnn, head, n_skip=n_skip, lr=1e-3, opt_func=adam)
    fit(learn, 2, 1e-3, 'fit_flat_cos')
    assert float(learn.pct_train)==pytest.approx(1) and learn.recorder.lrs[-1]<learn.recorder.lrs[0]
    x,y = data()
    learn.model.eval()
    with torch.no_grad(): whole = learn.model(x)
    preds,targets = learn.get_preds()
    assert torch.allclose(preds, whole[:,n_skip:] if preds.shape[1]!=WIN else whole, atol=1e-6)
    assert learn.validate()[0]==pytest.approx(nn.functional.mse_loss(whole[:,n_skip:], y[:,n_skip:]).item(), rel=1e-6)
    assert learn.model[0].state is None

@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_an_interrupted_fit_leaves_nothing_behind(scheme):
    def trained(interrupt):
        rnn,head = parts()
        learn = scheme_learner(scheme_loaders(), scheme, rnn, head)
        if interrupt:
            class Stop(Callback):
                order = 80
                def after_pred(self):
                    if self.train_iter==1: raise RuntimeError('stop')
            before = {k:v.clone() for k,v in learn.model.state_dict().items()}
            with pytest.raises(RuntimeError, match='stop'): fit_own_lr(learn, 1, cbs=Stop())
            learn.model.load_state_dict(before)
            learn.create_opt()
        set_seed(0)
        return list(fit_own_lr(learn).model.parameters())
    for a,b in zip(trained(True), trained(False), strict=True): assert torch.equal(a, b)

@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_other_callbacks_do_not_change_what_a_scheme_is(scheme):
    "Clipping, accumulation and an evaluation in the middle do not change what a scheme is"
    def trained(cbs):
        rnn,head = parts()
        set_seed(4)
        learn = scheme_learner(scheme_loaders(), scheme, rnn, head, cbs=cbs)
        return list(fit_own_lr(learn).model.parameters())
    class Evaluate(Callback):
        def after_batch(self):
            if not self.training or getattr(self, 'busy', False): return
            self.busy = True
            was = self.learn.model.training
            state = torch.get_rng_state()
            self.learn.model.eval()
            with torch.no_grad(): self.learn.model(torch.zeros(3, 7, 2, dtype=torch.float64))
            self.learn.model.train(was)
            torch.set_rng_state(state)
            self.busy = False
    plain = trained([])
    for a,b in zip(plain, trained([Evaluate(), GradientClip(1e9)]), strict=True): assert torch.allclose(a, b, atol=1e-14)
    assert any((a-b).abs().max()>1e-6 for a,b in zip(plain, trained([GradientClip(1e-3)])))
    trained([GradientAccumulation(8)])

def test_a_scheme_of_ones_own_equals_the_loop_by_hand():
    "Sub-windows of 3, 6, 12, ... steps, in a few lines"
    class Doubling(Truncation):
        def __init__(self, first): self.first = first
        def plan(self, win_sz, rng):
            start,n = 0,self.first
            while start<win_sz:
                yield start,min(start+n, win_sz)
                start,n = start+n,2*n
    x,y = data()
    learn = fit_own_lr(scheme_learner(scheme_loaders(), Doubling(3), *parts()))
    rnn,head = parts()
    for idxs in batches():
        state = None
        for a,b in ((0, 3), (3, 9), (9, 21), (21, 23)):
            out,state = rnn(x[idxs][:,a:b], state)
            state = tuple(s.detach() for s in state)
            loss = nn.functional.mse_loss(head(out), y[idxs][:,a:b])*((b-a)/12)
            params = [*rnn.parameters(), *head.parameters()]
            with torch.no_grad():
                for p,g in zip(params, torch.autograd.grad(loss, params)): p -= .05*g
    same(learn.model, rnn, head)

class OwnState(nn.Module):
    def __init__(self): super().__init__(); self.rnn,self.head,self.h = nn.GRU(2, 3, batch_first=True),nn.Linear(3, 1),None
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, torch.zeros(1, len(x), 3, dtype=x.dtype) if self.h is None else self.h)
        self.h = h.detach()
        return self.head(out)

def test_schemes_and_settings_that_do_not_go_together_are_refused():
    rnn,head = parts()
    with pytest.raises(ValueError, match='Two schemes'):
        scheme_learner(scheme_loaders(), Overlap(5, 10), rnn, head, sub_seq_len=5)
    with pytest.raises(TypeError, match='truncation is 5; expected a scheme'):
        scheme_learner(scheme_loaders(), 5, rnn, head)
    for scheme in (Overlap(5, 10), RandomUnbiased(6), Exact(4)):
        with pytest.raises(ValueError, match='OwnState carries a state by itself'):
            fit_own_lr(TbpttLearner(scheme_loaders(), OwnState().double(), truncation=scheme, loss_func=nn.MSELoss()))
    fit_own_lr(TbpttLearner(scheme_loaders(), OwnState().double(), truncation=Jittered(7), loss_func=nn.MSELoss()))
    for make in (lambda: Overlap(0, 4), lambda: Overlap(5, 4), lambda: Overlap(4, 5, 'some'), lambda: Jittered(7, half=2), lambda: RandomUnbiased(1), lambda: RandomUnbiased(9, alpha=2), lambda: Exact(-1), lambda: Jittered(7, rescale='x')):
        with pytest.raises(ValueError, match='; expected|is needed|Use'): make()

def test_one_label_per_window_has_the_loss_of_the_last_sub_window():
    "One label per window: the loss is that of the last sub-window"
    x,_ = data()
    label = torch.randn(9, 1, dtype=torch.float64)
    class Last(Plain):
        def forward(self, x): return super().forward(x)[:,-1]
    for scheme in (Overlap(5, 12), Exact(4), Jittered(7)):
        dl = torch.utils.data.DataLoader(list(zip(x, label)), 4)
        rnn,head = parts()
        learn = fit_own_lr(TbpttLearner(DataLoaders(dl, dl), Last(rnn, head), truncation=scheme, loss_func=nn.MSELoss(),
                                        opt_func=sgd, lr=.05))
        if isinstance(scheme, Jittered): continue
        rnn2,head2 = parts()
        params = [*rnn2.parameters(), *head2.parameters()]
        begin = WIN-12 if isinstance(scheme, Overlap) else 0
        for idxs in batches():
            with torch.no_grad(): state = rnn2(x[idxs][:,:begin])[1] if begin else None
            out,_ = rnn2(x[idxs][:,begin:], state)
            loss = nn.functional.mse_loss(head2(out[:,-1]), label[idxs])
            with torch.no_grad():
                for p,g in zip(params, torch.autograd.grad(loss, params)): p -= .05*g
        same(learn.model, rnn2, head2)

def test_what_is_as_long_as_a_piece_is_not_cut():
    "What has a time axis is that of the window"
    class Two(Plain):
        def forward(self, x, scale): return super().forward(x)*scale.mean(1)[:,None,None]
    x,y = data(8, 20)
    torch.manual_seed(1)
    dl = torch.utils.data.DataLoader(list(zip(x, torch.rand(8, 10, dtype=torch.float64), y)), 4)
    def trained(scheme, **kwargs):
        dls = DataLoaders(dl, dl)
        dls.n_inp = 2
        rnn,head = parts()
        model = Two(rnn, head)
        fit_own_lr(TbpttLearner(dls, model, truncation=scheme, loss_func=nn.MSELoss(), opt_func=sgd, lr=.05, **kwargs))
        return list(model.parameters())
    for a,b in zip(trained(Exact(10)), trained(None, sub_seq_len=None), strict=True): assert (a-b).abs().max()<1e-12


class Own(Truncation):
    "A plan as it is given"
    def __init__(self, *plan, **attrs):
        self._plan = plan
        vars(self).update(attrs)
    def plan(self, win_sz, rng): return [o._replace(stop=o.stop or win_sz) for o in self._plan]

def test_one_prediction_per_window_is_not_joined():
    "As many steps in a piece as there are classes, or one"
    x,_ = data(9, 20)
    class Last(Plain):
        def forward(self, x): return super().forward(x)[:,-1]
    for label,n_out,loss in ((torch.arange(9)%5, 5, nn.CrossEntropyLoss()), (torch.randn(9, 1, dtype=torch.float64), 1, nn.MSELoss())):
        def trained(scheme, **kwargs):
            dl = torch.utils.data.DataLoader(list(zip(x, label)), 4)
            rnn,_ = parts()
            torch.manual_seed(1)
            model = Last(rnn, nn.Linear(3, n_out).double())
            fit_own_lr(TbpttLearner(DataLoaders(dl, dl), model, truncation=scheme, loss_func=loss, opt_func=sgd, lr=.05,
                                    **kwargs))
            return list(model.parameters())
        for a,b in zip(trained(Exact(n_out)), trained(None, sub_seq_len=None), strict=True): assert (a-b).abs().max()<1e-12
        trained(RandomUnbiased(8, 6))

def test_a_sub_window_without_a_loss_is_run_in_its_turn():
    x,y = data()
    learn = fit_own_lr(scheme_learner(scheme_loaders(),
                                      Own(SubWindow(0, 8, 0), SubWindow(8, 16, 16), SubWindow(16, 0, 16)), *parts()))
    rnn,head = parts()
    params = [*rnn.parameters(), *head.parameters()]
    for idxs in batches():
        out,state = rnn(x[idxs][:,:8])
        for a,b in ((0, 8), (16, 23)):
            if a:
                with torch.no_grad(): _,state = rnn(x[idxs][:,8:16], tuple(s.detach() for s in state))
                out,state = rnn(x[idxs][:,a:b], state)
            loss = nn.functional.mse_loss(head(out), y[idxs][:,a:b])*((b-a)/8)
            with torch.no_grad():
                for p,g in zip(params, torch.autograd.grad(loss, params)): p -= .05*g
    same(learn.model, rnn, head)

@pytest.mark.parametrize('stateful', [True, False])
def test_what_is_computed_again_is_part_of_any_plan(stateful):
    "Several sub-windows, with states kept in the middle and gradients scaled: the same with and without"
    plan = SubWindow(0, 9, 0, carry=4, cuts=((2, 1.), (6, .5))),SubWindow(4, 15, 7, cuts=((10, 2.), (12, 1.))),SubWindow(15, 0, 15, cuts=((20, .3),))
    a,b = (fit_own_lr(scheme_learner(scheme_loaders(), Own(*plan, recompute=o), *parts(), stateful), 2)
           for o in (True, False))
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True): assert (p-q).abs().max()<1e-13

def test_exact_on_streams_needs_less_memory():
    "Calls of the layer: one for each segment, and again for all but the last"
    seen = []
    rnn,head = parts()
    rnn.register_forward_pre_hook(lambda m,args: seen.append(args[0].shape[1]) if torch.is_grad_enabled() else None)
    x,y = data(2, 30)
    dl = StreamDL(Sequences(list(x), list(y), **f64), bs=2)
    fit_own_lr(scheme_learner(DataLoaders(dl, dl), Exact(10), rnn, head))
    assert seen==[10]*5

def test_pieces_of_a_cancelled_batch_are_not_those_of_the_next():
    class Skip(Callback):
        order = 20
        def before_batch(self):
            if self.training and self.train_iter%2==0: raise CancelBatchException()
    scheme,steps = Own(SubWindow(0, 10, 0, cuts=((5, 2.),)), SubWindow(10, 0, 10)),[]
    learn = scheme_learner(scheme_loaders(), scheme, *parts(), cbs=Skip())
    learn.model.register_forward_pre_hook(lambda m,x: steps.append(x[0].shape[1]) if m.training else None)
    fit_own_lr(learn)
    assert set(steps)=={WIN-10}
    fit_own_lr(scheme_learner(scheme_loaders(), RandomUnbiased(4, 6), *parts(), cbs=Skip()))

def test_an_interrupted_step_leaves_the_learning_rate_as_it_was():
    class Stop(Callback):
        order = 90
        def before_step(self):
            if self.train_iter==1: raise RuntimeError('stop')
    learn = scheme_learner(scheme_loaders(), Jittered(7, std=3, least=2, rescale='lr'), *parts())
    with pytest.raises(RuntimeError, match='stop'): fit_own_lr(learn, 1, cbs=Stop())
    assert learn.opt.hypers[0]['lr']==.05
    seen = []
    class Watch(Callback):
        order = 90
        def before_step(self): seen.append(self.opt.hypers[0]['lr']/self.dl.sub_window.lr)
    fit(learn, 1, .001, cbs=Watch())
    assert seen==pytest.approx([.001]*len(seen))

@pytest.mark.parametrize('scheme', [Overlap(10, 20), RandomUnbiased(10, 6, block=5)], ids=repr)
def test_plans_of_long_windows_are_made_in_time(scheme):
    # a hundred times as long took ten thousand times as long before
    assert len(scheme.sub_windows(400_000))>20_000

def test_a_layer_with_statistics_is_warned_about():
    rnn,head = parts()
    model = nn.Sequential(StatefulRNN(rnn), nn.BatchNorm1d(WIN).double(), head)
    with pytest.warns(UserWarning, match=r'BatchNorm1d \(1\) takes the statistics of a segment'):
        TbpttLearner(scheme_loaders(), model, truncation=Exact(5), loss_func=nn.MSELoss())

def test_the_smoothed_loss_weighs_sub_windows_by_their_steps():
    x,y = data()
    learn = scheme_learner(scheme_loaders(bs=9), Own(SubWindow(0, 20, 0), SubWindow(20, 0, 20)), *parts(), lr=0.)
    fit_own_lr(learn)
    with torch.no_grad(): errors = (learn.model(x)-y).square() if not learn.model.train(False).training else None
    beta = learn.recorder.smooth_loss.beta
    a,b = errors[:,:20].mean(),errors[:,20:].mean()
    expected = (beta*(1-beta)*a+(1-beta)*b*(3/20))/(beta*(1-beta)+(1-beta)*(3/20))
    assert learn.recorder.losses[-1].item()==pytest.approx(expected.item(), rel=1e-5)

def test_a_state_may_be_infinite():
    class LogSum(nn.Module):
        "The logarithm of a sum that nothing is added to, beside a running mean"
        def __init__(self): super().__init__(); self.lift = nn.Linear(2, 3)
        def initial_state(self, bs, device, dtype): return torch.zeros(bs, 3, device=device, dtype=dtype),torch.full((bs, 3), -torch.inf, device=device, dtype=dtype)
        def forward(self, x, state):
            mean,log_sum,out = *state,[]
            for z in self.lift(x).unbind(1):
                mean,log_sum = .9*mean+.1*z,log_sum+0*z
                out.append(mean+log_sum.exp())
            return torch.stack(out, 1),(mean, log_sum)
    torch.manual_seed(0)
    model = nn.Sequential(StatefulRNN(LogSum()), nn.Linear(3, 1)).double()
    fit_own_lr(TbpttLearner(scheme_loaders(), model, truncation=RandomUnbiased(8, block=2), loss_func=nn.MSELoss(),
                            opt_func=sgd, lr=.05))
    assert all(p.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('plan,error', [
    ([(0, 10, 3)], 'expected a SubWindow, or a pair'), ([SubWindow(0, 10, 0, cuts=((5, .5), (5, .5)))], 'each cut once'), ([SubWindow(0, 10, 0, cuts=((5, float('nan')),))], 'finite factors'),
    ([SubWindow(0, 10, 0, lr=-1.)], 'finite factors'), ([SubWindow(0, 10, 0, cuts=(5,))], 'cuts are pairs'), ([SubWindow(0, None, 0)], 'of whole steps'), ([(0., 10.)], 'of whole steps'), (None, 'The plan of Bad for 10 steps is a NoneType'),
    ([(0, 5)], 'ends at 5'), ([(0, 5), (6, 10)], 'expected start=5'), ([], 'ends at 0'), ([SubWindow(0, 10, 10)], 'no step counts'), ([(0, 11)], 'expected start=0'), ([(0, 0), (0, 10)], 'start < stop'), ([SubWindow(0, 10, 0, carry=11)], 'expected start=0')])
def test_plans_that_cannot_be_are_refused(plan, error):
    class Bad(Truncation):
        def plan(self, win_sz, rng): return plan
    with pytest.raises((ValueError, TypeError), match=error): Bad().sub_windows(10)

def test_a_scheme_that_draws_has_to_say_so():
    class Draws(Truncation):
        def plan(self, win_sz, rng): return [(0, rng.randint(1, 5)), (5, win_sz)]
    with pytest.raises(ValueError, match='say so by `random = True`'): Draws().sub_windows(10)

def test_a_plan_with_bounds_off_its_blocks_is_refused():
    class Wrong(Truncation):
        block = 5
        def plan(self, win_sz, rng): return [(0, 7), (7, win_sz)]
    with pytest.raises(ValueError, match='blocks have 5 steps, but it has a bound at step 7'): stream(Wrong(), 2, 5, *parts(), True)

@pytest.mark.parametrize('scheme', [Overlap(50, 100), Jittered(500), RandomUnbiased(500)], ids=repr)
def test_windows_that_are_too_short_are_refused(scheme):
    with pytest.raises(ValueError, match='is for windows of (50|500) steps or more, but a window has 23'):
        scheme_learner(scheme_loaders(), scheme, *parts())

def test_the_lengths_of_jittered_are_those_of_awd_lstm():
    "b = k with probability .95, else k/2; max(5, int(N(b, 5)))"
    n = np.array([o.steps for o in Jittered(70).sub_windows(1_000_000)][:-1])
    short = n<52
    assert short.mean()==pytest.approx(.05, abs=.006) and n[short].mean()==pytest.approx(34.5, abs=.5) and n[~short].mean()==pytest.approx(69.5, abs=.2)
    assert n[~short].std()==pytest.approx(5, abs=.15) and min(o.steps for o in Jittered(6).sub_windows(10_000)[:-1])==5 and max(o.steps for o in Jittered(70, longest=75).sub_windows(10_000))==75

@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_an_evaluation_in_the_middle_of_training_changes_nothing(scheme):
    def trained(evaluate):
        class Evaluate(Callback):
            order = 70
            def after_batch(self):
                if self.training and self.train_iter in (2, 5) and evaluate:
                    learn = self.learn
                    kept = {k:getattr(learn, k) for k in ('dl','xb','yb','pred','loss','iter','n_iter','training')}
                    with learn.no_bar(), learn.no_logging(), learn.no_mbar() if hasattr(learn, 'no_mbar') else learn.no_bar(): learn._do_epoch_validate(1)
                    for k,v in kept.items(): setattr(learn, k, v)
                    learn.model.train()
        set_seed(4)
        rnn,head = parts()
        return list(fit_own_lr(scheme_learner(scheme_loaders(), scheme, rnn, head, cbs=Evaluate())).model.parameters())
    for a,b in zip(trained(True), trained(False), strict=True): assert torch.equal(a, b)

def test_first_states_of_the_groups_of_a_stream_are_learned():
    xs,ys = sequences()
    names = list('abcdef')
    rnn,head = parts()
    dl = StreamDL(Sequences(xs, ys, groups=names, **f64), bs=2, sub_seq_len=5)
    first = learned_state(rnn, names)
    learn = TbpttLearner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(rnn, initial=first), head), truncation=Overlap(5, 15), n_skip=2, loss_func=nn.MSELoss(), opt_func=sgd, lr=.05)
    fit_own_lr(learn)
    assert all((p!=0).any() for p in first.parameters()) and float(learn.pct_train)==pytest.approx(1)
    assert 'keep_graph' not in vars(learn.model[0])


@pytest.mark.parametrize('scheme', [Own(SubWindow(0, 10, 0, cuts=((5, 3.),)), SubWindow(10, 0, 10)), Exact(5), Overlap(4, 10)], ids=['scaled', 'again', 'kept'])
def test_states_in_a_dataclass_that_was_not_met_before_train_as_in_a_dict(scheme):
    "The same as in a dict"
    def trained(as_state, of_state):
        class Core(nn.Module):
            def __init__(self): super().__init__(); self.cell = nn.GRUCell(2, 3)
            def initial_state(self, bs, device, dtype): return as_state(torch.zeros(bs, 3, device=device, dtype=dtype))
            def forward(self, x, state):
                h,out = of_state(state),[]
                for u in x.unbind(1): out.append(h := self.cell(u, h))
                return torch.stack(out, 1),as_state(h)
        torch.manual_seed(0)
        model = nn.Sequential(StatefulRNN(Core()), nn.Linear(3, 1)).double()
        set_seed(1)
        learn = TbpttLearner(scheme_loaders(), model, truncation=scheme, loss_func=nn.MSELoss(), opt_func=sgd, lr=.05)
        learn.tbptt_reset_cb.check = False # which would meet it
        return list(fit_own_lr(learn).model.parameters())
    State = dataclasses.make_dataclass('State', ['h'])
    for a,b in zip(trained(State, lambda o: o.h), trained(lambda h: {'h': h}, lambda o: o['h']), strict=True): assert torch.equal(a, b)

def test_random_callbacks_are_refused_where_rows_begin_within_a_run():
    "Rows begin in the middle of a run, where no callback is asked"
    class Noisy(Callback):
        def before_batch(self): torch.rand(1)
    with pytest.raises(ValueError, match='or in the middle of a sub-window'): stream(Overlap(5, 10), 2, 5, *parts(), True, cbs=once_per_window(Noisy()))
