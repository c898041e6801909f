"The first steps of a window: burn-in, warm-up and washout, each against a loop by hand in float64 to 1e-10, and what cannot be is refused. Run as a script, this file is one of two processes"
import pickle, re, sys, warnings
from functools import partial
from random import Random
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import mae
from fastai.torch_core import set_seed
from torch import nn
from torch.utils._pytree import tree_map
from helpers import fit, fit_own_lr, sgd
from reference import OwnState, permutations, stream_by_hand, train_scheme_on_stream, train_stream
from test_schemes import Plain, batches, data, parts, same, scheme_learner, scheme_loaders, sequences
from test_schemes import WIN # 23 steps
from test_distributed import launch
from tbptt_fastai.all import (Adaptive, Exact, Fixed, Jittered, Overlap, RandomUnbiased, RNNLearner, SequenceDataLoaders, Sequences, StatefulRNN,
    StreamDL, SubWindow, SubWindowEvalCB, SubWindows, TbpttCheckpoint, TbpttDL, TbpttLearner, TbpttResetCB, Truncation, fun_rmse)
from tbptt_fastai.loaders.segment import Window
from tbptt_fastai.training.checkpoint import training_form
from tbptt_fastai.truncation.first_steps import FirstSteps, as_first_steps, gaps, joined

f64 = torch.float64


# Windows, by hand

def bounds_by_hand(n, sub, burn_in=0, warm_up=0):
    "Where the sub-windows of a training step are, as (start, first loss, stop)"
    stops = [*range(warm_up+sub, n, sub), n]
    first = next(i for i,stop in enumerate(stops) if stop>burn_in) # all before it are one with it
    starts = [warm_up, *stops[first:-1]]
    return [(a, max(a, burn_in), b) for a,b in zip(starts, stops[first:])]

def train_by_hand(rnn, head, x, y, epochs, sub, burn_in=0, warm_up=0, lr=.05):
    "Each batch is run over its warm-up without a gradient; the first sub-window with a loss begins where that ends"
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=lr)
    bounds = bounds_by_hand(x.shape[1], sub, burn_in, warm_up)
    most = max(stop-loss for _,loss,stop in bounds)
    for idxs in epochs:
        state = None
        if warm_up:
            with torch.no_grad(): _,state = rnn(x[idxs,:warm_up])
        for start,loss,stop in bounds:
            out,state = rnn(x[idxs,start:stop], state)
            state = tree_map(torch.detach, state)
            (nn.functional.mse_loss(head(out)[:,loss-start:], y[idxs,loss:stop])*((stop-loss)/most)).backward()
            opt.step()
            opt.zero_grad()

SUBS = [5, 8, WIN, None]

@pytest.mark.parametrize('kind,stateful', [('lstm', True), ('lstm', False), ('gru', True), ('rnn', False)])
@pytest.mark.parametrize('sub', SUBS)
@pytest.mark.parametrize('burn_in', [3, 5, 8, 13, 16, 20, 22]) # within the first sub-window, all of it, beyond; in the ragged last one
def test_gradients_go_through_a_burn_in_without_a_loss(kind, stateful, sub, burn_in):
    learn = scheme_learner(scheme_loaders(), None, *parts(kind), stateful, sub_seq_len=sub, burn_in=burn_in)
    fit_own_lr(learn, 2)
    rnn,head = parts(kind)
    train_by_hand(rnn, head, *data(), batches()*2, sub or WIN, burn_in)
    same(learn.model, rnn, head)

@pytest.mark.parametrize('kind,stateful', [('lstm', True), ('lstm', False), ('gru', True), ('rnn', False)])
@pytest.mark.parametrize('sub,warm_up', [(5, 3), (5, 5), (5, 13), (8, 15), (8, 10), (None, 1), (None, 9), (None, 22)])
def test_a_warm_up_has_no_gradient_and_the_scheme_begins_after_it(kind, stateful, sub, warm_up):
    learn = scheme_learner(scheme_loaders(), None, *parts(kind), stateful, sub_seq_len=sub, warm_up=warm_up)
    fit_own_lr(learn, 2)
    rnn,head = parts(kind)
    train_by_hand(rnn, head, *data(), batches()*2, sub or WIN, warm_up, warm_up)
    same(learn.model, rnn, head)

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('sub,settings', [
    (5, dict(warm_up=4, burn_in=11)), (5, dict(warm_up=11, burn_in=4)), (5, dict(n_skip=9, burn_in=3)), (5, dict(n_skip=3, burn_in=9)),
    (8, dict(n_skip=9, warm_up=6)), (8, dict(n_skip=2, warm_up=6, burn_in=7, washout=20)), (None, dict(warm_up=4, burn_in=11)),
    (None, dict(n_skip=9, warm_up=4))])
def test_the_longest_of_them_says_from_where_losses_count(stateful, sub, settings):
    learn = scheme_learner(scheme_loaders(), None, *parts(), stateful, sub_seq_len=sub, **settings)
    fit_own_lr(learn, 2)
    rnn,head = parts()
    warm_up,loss = settings.get('warm_up', 0),max(settings.get(k, 0) for k in ('n_skip', 'burn_in', 'warm_up'))
    train_by_hand(rnn, head, *data(), batches()*2, sub or WIN, loss, warm_up)
    same(learn.model, rnn, head)

@pytest.mark.parametrize('sub,scheme', [(5, None), (None, None), (None, Overlap(5, 10)), (None, RandomUnbiased(6)), (None, Jittered(7, std=2, least=2)), (None, Exact(4))])
def test_a_washout_changes_nothing_in_training(sub, scheme):
    def trained(**kwargs):
        set_seed(1)
        how = dict(sub_seq_len=sub) if scheme is None else {}
        return fit_own_lr(scheme_learner(scheme_loaders(), scheme, *parts(), **how, **kwargs), 2).model
    for a,b in zip(trained(washout=9).parameters(), trained().parameters(), strict=True): assert torch.equal(a, b)


# Other schemes

def overlap_by_hand(rnn, head, x, y, epochs, k1, k2, burn_in=0, warm_up=0, lr=.05):
    "Step by step: the first update with a loss goes back to where the warm-up ends, others over `k2` steps"
    opt,win_sz = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=lr),x.shape[1]
    stops = [stop for stop in [*range(warm_up+k1, win_sz, k1), win_sz] if stop>max(burn_in, warm_up)]
    runs,last = [],max(burn_in, warm_up)
    for stop in stops:
        runs.append((max(stop-k2, warm_up) if runs else warm_up, last, stop))
        last = stop
    most = max(stop-loss for _,loss,stop in runs)
    for idxs in epochs:
        with torch.no_grad(): seen = {warm_up: rnn(x[idxs,:warm_up])[1] if warm_up else None} # states, the newest of each step
        for start,loss,stop in runs:
            state,out,new = seen[start],[],{}
            for t in range(start, stop):
                o,state = rnn(x[idxs,t:t+1], state)
                new[t+1] = tree_map(lambda s: s.detach().clone(), state)
                out.append(head(o))
            seen.update(new)
            (nn.functional.mse_loss(torch.cat(out, 1)[:,loss-start:], y[idxs,loss:stop])*((stop-loss)/most)).backward()
            opt.step()
            opt.zero_grad()

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('k1,k2', [(5, 10), (4, 11), (6, 6), (7, 30)])
@pytest.mark.parametrize('burn_in,warm_up', [(3, 0), (10, 0), (14, 0), (21, 0), (0, 3), (0, 13), (12, 5)])
def test_overlap_after_a_burn_in_or_a_warm_up(stateful, k1, k2, burn_in, warm_up):
    learn = scheme_learner(scheme_loaders(), Overlap(k1, k2), *parts(), stateful, burn_in=burn_in, warm_up=warm_up)
    fit_own_lr(learn, 2)
    rnn,head = parts()
    overlap_by_hand(rnn, head, *data(), batches()*2, k1, k2, burn_in, warm_up)
    same(learn.model, rnn, head)

@pytest.mark.parametrize('settings', [dict(burn_in=9), dict(burn_in=3), dict(warm_up=9), dict(warm_up=5, burn_in=9)])
@pytest.mark.parametrize('stateful', [True, False])
def test_exact_is_full_backpropagation_behind_any_of_them(settings, stateful):
    a,b = (fit_own_lr(scheme_learner(scheme_loaders(), scheme, *parts(), stateful, **how, **settings), 2)
           for scheme,how in ((Exact(4), {}), (None, dict(sub_seq_len=None))))
    same(a.model, b.model)

class Halves(Truncation):
    "One of a user: two parts; gradients fade within them"
    def __init__(self, fade=.5): self.fade = fade
    def plan(self, win_sz, rng):
        half = win_sz//2
        for start,stop in ((0, half), (half, win_sz)):
            yield SubWindow(start, stop, start, cuts=((start+3, self.fade), (start+7, self.fade)))

def test_a_scheme_of_ones_own_leaves_its_cuts_out_of_a_burn_in():
    first,*rest = Window((torch.zeros(2, 30, 1), torch.zeros(2, 30, 1))).plan(Halves(), FirstSteps(burn_in=20))
    assert not rest and first==SubWindow(0, 30, 20, 1., cuts=((22, .5),))
    warm,first,second = Window((torch.zeros(2, 40, 1), torch.zeros(2, 40, 1))).plan(Halves(), FirstSteps(burn_in=14, warm_up=10))
    assert warm==SubWindow(0, 10, 10, 0.)
    assert first==SubWindow(10, 25, 14, 11/15, cuts=((17, .5),)) and second==SubWindow(25, 40, 25, 1., cuts=((28, .5), (32, .5)))

@pytest.mark.parametrize('burn_in', [4, 9])
def test_the_mean_gradient_of_the_unbiased_scheme_behind_a_burn_in_is_the_full_one(burn_in):
    "Over all plans, by their probabilities, of what an earlier state has as a gradient: each boundary passes 1 in the mean, within the burn-in always"
    scheme,n,blocks = RandomUnbiased(4),12,range(1, 12)
    total = np.zeros(n) # of each boundary: the mean of the product of factors from there to the end
    draws = 4000
    for i in range(draws):
        plan = [o for o in Window((torch.zeros(1, n, 1), torch.zeros(1, n, 1))).plan(scheme, FirstSteps(burn_in=burn_in), Random(i))]
        first = plan[0]
        assert first.start==0 and first.stop>burn_in and all(step>burn_in for step,_ in first.cuts)
        factors = {step: f for o in plan for step,f in o.cuts}
        factors.update({o.start: 0. for o in plan[1:]})
        for step in blocks: total[step] += np.prod([factors.get(s, 1.) for s in range(step, n)])
    assert np.allclose(total[1:burn_in+1]/draws, total[burn_in+1]/draws) # nothing is lost in it
    assert abs(total[burn_in+1]/draws-1)<.15

@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_plan_keeps_its_losses_and_weights_behind_a_burn_in(data):
    scheme = data.draw(st.sampled_from([Fixed(3), Fixed(7), Overlap(3, 8), Overlap(4, 4, 'all'), Jittered(5, std=2, least=2), RandomUnbiased(4), Exact(3)]))
    win_sz = data.draw(st.integers(10, 40))
    burn_in,warm_up = data.draw(st.integers(0, win_sz-1)),data.draw(st.integers(0, win_sz-8))
    first = FirstSteps(burn_in=burn_in, warm_up=warm_up)
    before = first.plan(scheme, win_sz, Random(0))
    plan = joined(before, burn_in, warm_up)
    assert [(o.loss_start, o.stop, o.weight, o.carry, o.lr) for o in plan if o.weight]==[(o.loss_start, o.stop, o.weight, o.carry, o.lr) for o in before if o.weight]
    assert min(o.loss_start for o in plan if o.weight)==max(burn_in, warm_up)
    if burn_in>warm_up: assert next(o for o in plan if o.weight).start==warm_up
    if burn_in==warm_up==0: assert plan==scheme.sub_windows(win_sz, rng=Random(0))
    at = 0
    for o in plan: # each begins where the state is
        assert o.start==at
        at = o.next_start
    assert at==win_sz

def test_recomputed_parts_stay_parts_in_a_burn_in():
    "Or its activations would all be kept at once"
    class Recomputed(Fixed): recompute = True
    first,second = Window((torch.zeros(1, 40, 1), torch.zeros(1, 40, 1))).plan(Recomputed(10), FirstSteps(burn_in=25))
    assert first==SubWindow(0, 30, 25, .5, cuts=((10, 1.), (20, 1.))) and second==SubWindow(30, 40, 30, 1.)


def test_cuts_of_parts_that_are_run_several_times_are_taken_once():
    "Sub-windows that overlap have factors in common; what counts is the one that the state has been through"
    class Fading(Overlap):
        def plan(self, win_sz, rng):
            for o in super().plan(win_sz, rng): yield o._replace(cuts=tuple((s, 1/s) for s in range(o.start+1, o.stop)))
    first,second,_ = Window((torch.zeros(1, 30, 1), torch.zeros(1, 30, 1))).plan(Fading(5, 10), FirstSteps(burn_in=17))
    assert first[:5]==(0, 20, 17, .6, 15) and first.cuts==((1, 1.), *((s, 1/s) for s in (18, 19)))
    assert second==SubWindow(15, 25, 20, 1., 20, tuple((s, 1/s) for s in range(16, 25)))
    class FromTheStart(Overlap):
        def plan(self, win_sz, rng):
            for o in super().plan(win_sz, rng): yield o._replace(cuts=tuple((s, 1/(1+s-o.start)) for s in range(o.start+1, o.stop)))
    first,*_ = Window((torch.zeros(1, 30, 1), torch.zeros(1, 30, 1))).plan(FromTheStart(5, 10), FirstSteps(n_skip=17, burn_in=3))
    began = [(4, 0), *((s, 5) for s in range(6, 10)), *((s, 10) for s in range(11, 20))]
    assert first==SubWindow(0, 20, 17, .6, 15, tuple((s, 1/(1+s-start)) for s,start in began))


# What the numbers are of

def numpy_numbers(model, x, y, washout):
    with torch.no_grad(): pred = model.eval()(x)
    e = (pred-y)[:,washout:].double().numpy()
    return pred,[np.mean(e**2), np.sqrt(np.mean(e**2)), np.mean(np.abs(e))]

COUNTED = [(dict(burn_in=9), 0), (dict(warm_up=9), 0), (dict(washout=9), 9), (dict(n_skip=4, washout=9), 9), (dict(n_skip=9, washout=4, burn_in=12), 9), (dict(), 0)]

@pytest.mark.parametrize('settings,left_out', COUNTED)
@pytest.mark.parametrize('how', [dict(sub_seq_len=5), dict(sub_seq_len=None), dict(truncation=Overlap(5, 10))])
def test_an_evaluation_leaves_out_what_it_is_asked_to(settings, left_out, how):
    scheme = how.get('truncation')
    learn = scheme_learner(scheme_loaders(), scheme, *parts(), metrics=[fun_rmse, mae], **settings, **({} if scheme else how))
    fit_own_lr(learn, 2)
    pred,numbers = numpy_numbers(learn.model, *data(), left_out)
    for cbs in (None, SubWindowEvalCB(7)):
        with learn.no_bar(): np.testing.assert_allclose(learn.validate(cbs=cbs), numbers, rtol=1e-6)
    assert list(learn.recorder.values[-1][1:])==pytest.approx(numbers, rel=1e-6)
    with learn.no_bar(): found,y,losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(found, pred, rtol=0, atol=1e-12)
    assert torch.equal(y, data()[1])
    torch.testing.assert_close(losses, (pred-y)[:,left_out:].square().mean((1, 2)), rtol=1e-6, atol=0)

@pytest.mark.parametrize('scheme', [None, Fixed(5), Overlap(5, 10), Jittered(7, std=2, least=2), RandomUnbiased(6), Exact(4)])
def test_none_of_them_is_bit_by_bit_what_was(scheme):
    def trained(**kwargs):
        set_seed(1)
        learn = scheme_learner(scheme_loaders(), scheme, *parts(), **kwargs, **(dict(sub_seq_len=5) if scheme is None else {}))
        fit_own_lr(learn, 2)
        return learn.recorder.losses,learn.recorder.values,*learn.model.parameters()
    (losses,values,*a),(losses_b,values_b,*b) = trained(),trained(burn_in=0, warm_up=0, washout=0)
    assert losses==losses_b and [o[:2] for o in values]==[o[:2] for o in values_b]
    for p,q in zip(a, b, strict=True): assert torch.equal(p, q)

@pytest.mark.parametrize('settings', [dict(burn_in=9), dict(warm_up=9), dict(warm_up=4, burn_in=9)])
def test_a_second_fit_and_evaluations_in_between_change_nothing(settings):
    learn = scheme_learner(scheme_loaders(), Fixed(5), *parts(), **settings)
    for _ in range(2):
        fit_own_lr(learn, 2) # with a validation after each epoch
        assert float(learn.pct_train)==pytest.approx(1)
        with learn.no_bar(): learn.validate(),learn.get_preds(0),learn.validate(dl=learn.dls.train)
    rnn,head = parts()
    loss = max(settings.values())
    train_by_hand(rnn, head, *data(), batches()*4, 5, loss, settings.get('warm_up', 0))
    same(learn.model, rnn, head)

@pytest.mark.parametrize('settings', [dict(burn_in=9), dict(warm_up=9)])
def test_targets_that_are_missing_are_left_out_too(settings):
    x,y = data()
    missing = torch.rand(y.shape, generator=torch.Generator().manual_seed(0))<.4
    missing[:4,:14] = True # of the first batch, all of the first sub-window with a loss
    def loaders():
        dl = TbpttDL(Sequences(list(x), list(y.masked_fill(missing, 99.)), dtype=f64), bs=4, num_workers=0, device='cpu')
        return DataLoaders(dl, dl)
    learn = scheme_learner(loaders(), Fixed(5), *parts(), counts=lambda y: (y!=99).all(-1), **settings)
    fit_own_lr(learn, 1)
    rnn,head = parts()
    opt,warm = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05),settings.get('warm_up', 0)
    for i,idxs in enumerate(batches()):
        bounds = bounds_by_hand(WIN, 5, 9, warm)
        if i==0 and not warm: bounds = [(0, 10, 15), *[o for o in bounds if o[0]>=15]] # one that has no target is joined as well
        with torch.no_grad(): state = rnn(x[idxs,:warm])[1] if warm else None
        counts = [(~missing[idxs,loss:stop]).sum().item() for _,loss,stop in bounds]
        for (start,loss,stop),n in zip(bounds, counts):
            out,state = rnn(x[idxs,start:stop], state)
            state,keep = tree_map(torch.detach, state),~missing[idxs,loss:stop]
            if not n: continue
            (nn.functional.mse_loss(head(out)[:,loss-start:][keep], y[idxs,loss:stop][keep])*(n/max(counts))).backward()
            opt.step()
            opt.zero_grad()
    same(learn.model, rnn, head)

@pytest.mark.parametrize('dim', [0, -1])
@pytest.mark.parametrize('settings', [dict(burn_in=9), dict(warm_up=9), dict(washout=9)])
def test_time_may_be_another_axis(dim, settings):
    class Moved(nn.Module):
        def __init__(self, dim): super().__init__(); self.dim,(self.rnn,self.head) = dim,parts()
        def forward(self, x): return self.head(self.rnn(x.movedim(self.dim, 1))[0]).movedim(1, self.dim)
    def numbers(dim):
        x,y = data()
        dl = TbpttDL(Sequences(list(x), list(y), dtype=f64), bs=4, num_workers=0, device='cpu', time_dim=dim)
        learn = TbpttLearner(DataLoaders(dl, dl), Moved(dim), 5, loss_func=nn.MSELoss(), opt_func=sgd, lr=.05, check=False, **settings)
        fit_own_lr(learn, 2)
        with learn.no_bar(): return list(learn.model.parameters()),list(learn.validate())
    (a,value),(b,value_b) = numbers(1),numbers(dim)
    for p,q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
    assert value==pytest.approx(value_b, rel=1e-7)

def test_windows_of_other_lengths_and_loaders_of_torch():
    "A loader that cannot be indexed; the second window is shorter"
    x,y = data(2, 23)
    items = [(x[:1], y[:1]), (x[1:,:17], y[1:,:17])]
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(items)
        def __len__(self): return 2
    dl = torch.utils.data.DataLoader(Stream(), batch_size=None)
    learn = Learner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(parts()[0]), parts()[1]), nn.MSELoss(), opt_func=sgd, lr=.05, cbs=TbpttResetCB(5, burn_in=8))
    fit_own_lr(learn, 1)
    rnn,head = parts()
    for a,b in items: train_by_hand(rnn, head, a, b, [[0]], 5, 8)
    same(learn.model, rnn, head)


# Streams

def stream_loaders(size, bs=3, lengths=(23, 9, 31, 14, 5, 12), **kwargs):
    xs,ys = sequences(lengths)
    dl = StreamDL(Sequences(xs, ys, dtype=f64), bs=bs, sub_seq_len=size, device='cpu', **kwargs)
    return DataLoaders(dl, dl)

def tensors(lengths=(23, 9, 31, 14, 5, 12)): return [[torch.from_numpy(o) for o in seqs] for seqs in sequences(lengths)]

def stream_learner(scheme=None, size=7, bs=3, stateful=True, lengths=(23, 9, 31, 14, 5, 12), **settings):
    learn = scheme_learner(stream_loaders(size, bs, lengths), scheme, *parts(), stateful, metrics=[fun_rmse], **settings)
    return learn

def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '(?s).*not longer than')
        return f(*args, **kwargs)

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('bs', [1, 3])
@pytest.mark.parametrize('size,settings', [(7, dict(burn_in=3)), (7, dict(burn_in=6)), (7, dict(warm_up=7)), (7, dict(warm_up=14)), (7, dict(warm_up=7, burn_in=10)),
    (None, dict(burn_in=8)), (7, dict(washout=9)), (7, dict(n_skip=5, washout=9)), (7, dict(n_skip=2, burn_in=5))])
def test_a_stream_equals_the_loop_by_hand(stateful, bs, size, settings):
    learn = quiet(stream_learner, size=size, bs=bs, stateful=stateful, **settings)
    quiet(fit_own_lr, learn, 2)
    xs,ys = tensors()
    rnn,head = parts()
    longest = max(map(len, xs))
    train_stream_sgd(rnn, head, xs, ys, bs, size or longest, max(settings.get(k, 0) for k in ('n_skip', 'burn_in', 'warm_up')))
    same(learn.model, rnn, head)
    washout = max(settings.get('n_skip', 0), settings.get('washout', 0))
    with torch.no_grad(): preds = [head(rnn(x[None])[0])[0] for x in xs]
    errors = torch.cat([(p-y)[washout:] for p,y in zip(preds, ys)]).numpy()
    with learn.no_bar():
        values,(found,_,losses) = list(quiet(learn.validate)),quiet(learn.get_preds, with_loss=True)
    assert values==pytest.approx([np.mean(errors**2), np.sqrt(np.mean(errors**2))], rel=1e-6)
    torch.testing.assert_close(found, torch.cat(preds), rtol=0, atol=1e-8)
    assert losses.isnan().sum()==sum(min(washout, len(x)) for x in xs)

def train_stream_sgd(rnn, head, xs, ys, bs, size, n_skip):
    "Each row alone, block by block; two epochs"
    opt,lengths = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05),list(map(len, xs))
    n_blocks = len(stream_by_hand(lengths, bs, size, range(len(xs))))
    runs = [(k, k+1, k, k+1, {}) for k in range(n_blocks)]
    most = max(min(a+size, n)-max(a, min(n_skip, n)) for n in lengths for a in range(0, n, size))
    for _ in range(2): train_scheme_on_stream(rnn, head, xs, ys, bs, size, runs, opt, nn.functional.mse_loss, lambda run,n,rows: n/(most*rows), n_skip)

def test_a_scheme_of_ones_own_leaves_its_cuts_out_of_the_burn_in_of_whole_sequences():
    class Faded(Truncation):
        "Each sequence at once, in pieces that pass nothing on"
        def plan(self, win_sz, rng): yield SubWindow(0, win_sz, 0, cuts=tuple((s, 0.) for s in range(3, win_sz, 3)))
    for burn_in in (0, 8):
        learn = quiet(stream_learner, Faded(), None, 3, burn_in=burn_in)
        view = learn.tbptt_reset_cb.training_view(learn.dls.train)
        assert [min(s for s,_ in view.segment.plan.cuts) for _ in view][0]==(9 if burn_in else 3)

@pytest.mark.parametrize('bs', [1, 2, 4])
@pytest.mark.parametrize('k1,k2,burn_in', [(5, 15, 3), (5, 15, 9), (4, 8, 3), (4, 12, 7)])
def test_overlap_on_a_stream_reaches_back_through_a_burn_in(bs, k1, k2, burn_in):
    learn = quiet(stream_learner, Overlap(k1, k2), k1, bs, burn_in=burn_in)
    quiet(fit_own_lr, learn, 2)
    xs,ys = tensors()
    rnn,head = parts()
    opt,m = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05),k2//k1
    n = len(stream_by_hand([len(x) for x in xs], bs, k1, range(6)))
    runs = [(max(k+1-m, 0), k+1, k, max(k+2-m, 0) if k+1<n else k+1, {}) for k in range(n)]
    for _ in range(2): train_scheme_on_stream(rnn, head, xs, ys, bs, k1, runs, opt, nn.functional.mse_loss, lambda run,steps,rows: steps/(k1*rows), burn_in)
    same(learn.model, rnn, head)

def reached(scheme, burn_in, lengths):
    "The sequences whose first input has a gradient in some training step, as autograd says"
    found = set()
    class Look(Callback):
        order = 61
        def before_batch(self):
            if self.training: self.learn.xb = (self.learn.xb[0].requires_grad_(),)
        def after_backward(self):
            grad,segment = self.learn.xb[0].grad,self.learn.dl.segment
            at = 0
            for block in getattr(segment, 'blocks', [segment]):
                found.update(int(block.seq[row]) for row in range(len(grad)) if block.n[row] and block.start[row]==0 and grad[row,at].any())
                at += block.steps
    learn = quiet(stream_learner, scheme, scheme.block, 2, lengths=lengths, burn_in=burn_in, cbs=Look())
    quiet(fit_own_lr, learn, 1)
    return found

@pytest.mark.parametrize('scheme,burn_in', [(Fixed(6), 5), (Overlap(4, 12), 7), (Overlap(4, 12), 11), (Fixed(12, block=4), 3)])
def test_the_first_input_of_each_sequence_has_a_gradient(scheme, burn_in):
    lengths = (23, 19, 31, 14, 12, 18)
    assert reached(scheme, burn_in, lengths)==set(range(6))

REFUSED_BURN_INS = [(None, 7, 7), (Fixed(12, block=4), 4, 4), (Overlap(4, 12), 4, 12), (Overlap(4, 8, 'all'), 4, 8), (RandomUnbiased(12, block=4), 4, 4), (Jittered(7, least=3), 5, 3)]

@pytest.mark.parametrize('scheme,size,burn_in', REFUSED_BURN_INS)
def test_a_stream_refuses_a_burn_in_that_it_would_cut(scheme, size, burn_in):
    "And takes one that is a step shorter"
    with pytest.raises(ValueError, match=f'(?s)burn_in is {burn_in}, but in the rows of a stream.*Use a burn_in that is shorter'):
        quiet(stream_learner, scheme, size, burn_in=burn_in)
    if burn_in-1: quiet(fit_own_lr, quiet(stream_learner, scheme, size, burn_in=burn_in-1))

@pytest.mark.parametrize('scheme,size,warm_up', [(None, 7, 6), (None, 7, 10), (Fixed(12, block=4), 4, 12), (Overlap(4, 12), 4, 12), (Jittered(7, least=3), 5, 7), (Exact(), 7, 7), (RandomUnbiased(12, block=4), 4, 4)])
def test_a_stream_refuses_a_warm_up_that_is_no_number_of_its_sub_windows(scheme, size, warm_up):
    with pytest.raises(ValueError, match=f'(?s)warm_up is {warm_up}, but the rows of a stream are cut by.*Use a multiple of sub_seq_len'):
        quiet(stream_learner, scheme, size, warm_up=warm_up)

def test_whole_sequences_of_a_stream_cannot_be_warmed_up_but_have_a_burn_in():
    with pytest.raises(ValueError, match='warm_up is 7, but the rows of a stream'): quiet(stream_learner, size=None, warm_up=7)
    quiet(stream_learner, size=None, burn_in=8)
    quiet(stream_learner, Exact(4), burn_in=8)

def test_a_burn_in_is_looked_at_again_where_a_scheme_has_changed_its_lengths():
    scheme = Adaptive(k_max=12, n_batches=1, scheme=lambda k: Overlap(k, 2*k))
    learn = quiet(stream_learner, scheme, 12, burn_in=11)
    scheme._measure = lambda learn: (scheme._use(4), setattr(scheme, '_found', dict(beta=.5, reached=True)))
    with pytest.raises(ValueError, match=r'(?s)burn_in is 11.*Overlap\(4, 8\)|burn_in is 11'): quiet(fit_own_lr, learn, 1)


# What cannot be is refused

def test_settings_that_cannot_be_are_refused_by_name():
    dls = scheme_loaders()
    for name in ('burn_in', 'warm_up', 'washout'):
        def make(n, cls=scheme_learner, how=None): return cls(dls, None, *parts(), sub_seq_len=5, **{name: n})
        with pytest.raises(ValueError, match=f'{name} is -1; expected at least 0'): make(-1)
        for wrong in (True, 2.5, '3', None):
            with pytest.raises(TypeError, match=f'{name} is {re.escape(repr(wrong))}'): make(wrong)
        for n in (WIN, WIN+7):
            with pytest.raises(ValueError, match=f'{name} is {n}, the window has {WIN} steps: no step would count.*Use a smaller {name}'): make(n)
        make(WIN-1) if name!='warm_up' else make(WIN-5)
        assert getattr(TbpttResetCB(5, **{name: np.int64(3)}), name)==3
    with pytest.raises(ValueError, match='sub_seq_len is 5, but a window has 4 steps after its warm-up'): scheme_learner(dls, None, *parts(), sub_seq_len=5, warm_up=WIN-4)
    with pytest.raises(ValueError, match='burn_in is 31, the longest sequence has 31'): quiet(stream_learner, size=None, burn_in=31)
    with pytest.raises(ValueError, match='washout is 31, the longest sequence has 31'): quiet(stream_learner, washout=31)
    with pytest.warns(UserWarning, match='5 of 6 sequences are not longer than washout=23'): stream_learner(washout=23)

def test_a_shorter_window_that_is_all_burn_in_is_refused_when_it_comes():
    items = [(torch.randn(20, 2).double(), torch.randn(20, 1).double()), (torch.randn(8, 2).double(), torch.randn(8, 1).double())]
    dl = TfmdDL(items, bs=1, num_workers=0)
    for name in ('burn_in', 'warm_up'):
        learn = Learner(DataLoaders(dl, dl), Plain(*parts()), nn.MSELoss(), opt_func=sgd, cbs=TbpttResetCB(5, **{name: 8}))
        with pytest.raises(ValueError, match=f'{name} is 8, the window has 8 steps'): fit(learn)

def test_one_label_for_a_window_has_no_steps_to_leave_out():
    x = data()[0]
    items = [(o, o.mean()[None]) for o in x]
    class Last(Plain):
        def forward(self, x): return super().forward(x)[:,-1]
    def make(**kwargs):
        dl = TfmdDL(items, bs=4, num_workers=0)
        return Learner(DataLoaders(dl, dl), Last(*parts()), nn.MSELoss(), opt_func=sgd, lr=.05, cbs=TbpttResetCB(5, **kwargs))
    for name in ('burn_in', 'washout'):
        with pytest.raises(ValueError, match=f'{name} is 3, but no target has the time axis of a window of 23 steps'): make(**{name: 3})
    learn = fit_own_lr(make(warm_up=9)) # the state that the last sub-window starts from is another
    rnn,head = parts()
    opt = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.05)
    for idxs in batches():
        with torch.no_grad(): state = rnn(x[idxs,:19])[1]
        nn.functional.mse_loss(head(rnn(x[idxs,19:], state)[0])[:,-1], x[idxs].mean((1, 2))[:,None]).backward()
        opt.step()
        opt.zero_grad()
    same(learn.model, rnn, head)

def test_batches_that_continue_each_other_have_no_start_to_leave_out():
    x,y = data(4, 40)
    dl = [(x[:,i:i+10], y[:,i:i+10]) for i in range(0, 40, 10)]
    for name in ('burn_in', 'warm_up', 'washout', 'n_skip'):
        with pytest.raises(ValueError, match=f'{name} is 3, but each batch continues the last'):
            Learner(DataLoaders(dl, dl), Plain(*parts()), nn.MSELoss(), cbs=TbpttResetCB(5, continuing=True, **{name: 3}))

def test_a_model_that_carries_its_own_state_is_trained_as_well():
    "Its state is its own, so windows may be joined and warmed up, as they are run in one piece"
    for how,settings in ((5, dict(burn_in=9)), (5, dict(warm_up=9)), (None, dict(warm_up=9))):
        rnn,head = parts('gru')
        learn = TbpttLearner(scheme_loaders(), OwnState(rnn, head), how, loss_func=nn.MSELoss(), opt_func=sgd, lr=.05, **settings)
        fit_own_lr(learn, 2)
        rnn,head = parts('gru')
        train_by_hand(rnn, head, *data(), batches()*2, how or WIN, 9, settings.get('warm_up', 0))
        same(learn.model, rnn, head)


# Steps that nobody teaches

def warned(learn):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        fit_own_lr(learn, 1)
    return [str(o.message) for o in found if 'without any gradient' in str(o.message)]

UNTAUGHT = [(Fixed(5), 5, 5), (Fixed(5), 9, 5), (Fixed(5), 10, 10), (Overlap(5, 10), 10, 5), (Overlap(5, 10), 14, 5), (Jittered(5, half=0, std=0), 5, 5), (Halves(), 11, 11)]
TAUGHT = [(Fixed(5), 0), (Fixed(5), 4), (Overlap(5, 10), 9), (Overlap(5, 10), 5), (Overlap(5, 30), 20), (Exact(4), 20), (Jittered(5, half=0, std=2, least=2), 5),
    (RandomUnbiased(6), 6), (Halves(), 10), (Fixed(WIN), 20)]

@pytest.mark.parametrize('scheme,n_skip,n', UNTAUGHT)
def test_steps_that_no_gradient_reaches_are_said_once_before_the_training(scheme, n_skip, n):
    learn = scheme_learner(scheme_loaders(), scheme, *parts(), n_skip=n_skip)
    before = [p.clone() for p in learn.model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning, match=f'(?s)n_skip={n_skip} leaves the first {n} steps of each window without any gradient.*Use burn_in={n_skip}.*washout={n_skip}.*Overlap.*warm_up={n}'): fit_own_lr(learn)
    for p,q in zip(before, learn.model.parameters(), strict=True): assert torch.equal(p, q)
    learn = scheme_learner(scheme_loaders(), scheme, *parts(), n_skip=n_skip)
    with learn.no_bar(): learn.validate()
    assert len(warned(learn))==1 and warned(learn)==[] # once

@pytest.mark.parametrize('scheme,n_skip', TAUGHT)
def test_nothing_is_said_where_a_gradient_reaches_all_steps(scheme, n_skip):
    assert warned(scheme_learner(scheme_loaders(), scheme, *parts(), n_skip=n_skip))==[]

@pytest.mark.parametrize('settings', [dict(burn_in=9), dict(warm_up=9), dict(washout=9), dict(n_skip=9, burn_in=9), dict(n_skip=9, burn_in=1), dict(n_skip=5, warm_up=5), dict(n_skip=8, warm_up=5)])
def test_nothing_is_said_about_what_was_asked_for(settings):
    assert warned(scheme_learner(scheme_loaders(), Fixed(5), *parts(), **settings))==[]

def test_what_comes_after_a_warm_up_may_be_untaught_too():
    message, = warned(scheme_learner(scheme_loaders(), Fixed(5), *parts(), n_skip=11, warm_up=3))
    assert 'the first 5 steps after the warm-up of each window' in message and 'warm_up=8' in message

def test_whole_windows_and_labels_have_no_such_steps():
    assert warned(scheme_learner(scheme_loaders(), None, *parts(), sub_seq_len=None, n_skip=15))==[]
    items = [(o, o.mean()[None]) for o in data()[0]]
    class Last(Plain):
        def forward(self, x): return super().forward(x)[:,-1]
    dl = TfmdDL(items, bs=4, num_workers=0)
    assert warned(Learner(DataLoaders(dl, dl), Last(*parts()), nn.MSELoss(), opt_func=sgd, lr=.05, cbs=TbpttResetCB(5, 10)))==[]

def test_the_remedies_are_what_the_warning_says():
    "A warm-up with a washout is the same training and the same numbers, bit by bit"
    def numbers(**kwargs):
        learn = scheme_learner(scheme_loaders(), Fixed(5), *parts(), **kwargs)
        warned(learn)
        with learn.no_bar(): return [*learn.model.parameters()],list(learn.validate())
    (a,values),(b,values_b) = numbers(n_skip=10),numbers(warm_up=10, washout=10)
    for p,q in zip(a, b, strict=True): assert torch.equal(p, q)
    assert values==values_b

@pytest.mark.parametrize('scheme,size,n_skip,n', [(None, 7, 7, 7), (None, 7, 20, 14), (Overlap(4, 8), 4, 8, 4), (Fixed(12, block=4), 4, 12, 4), (Jittered(5, half=0, std=0), 5, 11, 10)])
def test_the_same_is_said_of_a_stream(scheme, size, n_skip, n):
    message, = warned(quiet(stream_learner, scheme, size, n_skip=n_skip))
    assert f'n_skip={n_skip} leaves the first {n} steps of each sequence without any gradient' in message

@pytest.mark.parametrize('scheme,size,n_skip', [(None, 7, 6), (None, None, 20), (Overlap(4, 8), 4, 7), (Fixed(12, block=4), 4, 7), (Jittered(5, half=0, std=2), 5, 5), (Exact(4), None, 9), (RandomUnbiased(12, block=4), 4, 7)])
def test_nothing_is_said_of_a_stream_whose_gradients_reach(scheme, size, n_skip):
    assert warned(quiet(stream_learner, scheme, size, n_skip=n_skip))==[]

@pytest.mark.parametrize('n_skip', [5, 10])
def test_steps_that_are_said_to_have_no_gradient_have_none(n_skip):
    "Asked of autograd: the inputs of the sub-windows that are trained on, and no others"
    seen = []
    class Look(Callback):
        order = 61
        def before_batch(self):
            if self.training: seen.append(self.learn.dl.sub_window.start)
    learn = scheme_learner(scheme_loaders(), Fixed(5), *parts(), n_skip=n_skip, cbs=Look())
    assert f'the first {min(seen, default=n_skip)} steps' in warned(learn)[0] and min(seen)==n_skip


# What remembers settings

def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    "And one from before there were any is gone on with"
    class Kill(Exception): pass
    class KillAt(Callback):
        def after_step(self):
            if self.train_iter==3: raise Kill('here')
    def learner(**kwargs): return TbpttLearner(scheme_loaders(), nn.Sequential(StatefulRNN(parts()[0]), parts()[1]), 5, loss_func=MSELossFlat(), path=tmp_path, **kwargs)
    with pytest.raises(Kill): fit(learner(burn_in=9), cbs=[TbpttCheckpoint(every=1), KillAt()])
    for settings,was in ((dict(burn_in=8), 'burn_in was 9 and is 8'), (dict(), 'burn_in was 9 and is -'), (dict(burn_in=9, washout=2), 'washout was - and is 2')):
        with pytest.raises(ValueError, match=was): fit(learner(**settings), cbs=TbpttCheckpoint(resume=True))
    assert not any('warm_up' in k or 'washout' in k or 'burn_in' in k for k in training_form_of(learner())['callbacks']['TbpttResetCB'])

def training_form_of(learn):
    found = []
    class Take(Callback):
        order = 2000
        def before_fit(self): found.append(training_form(self.learn))
    fit(learn, cbs=Take())
    return found[0]

@pytest.mark.parametrize('settings', [dict(burn_in=9), dict(warm_up=9), dict(washout=9)])
@pytest.mark.parametrize('at', [2, 5, 8])
def test_a_training_goes_on_with_them(tmp_path, settings, at):
    class Kill(Exception): pass
    class KillAt(Callback):
        order = 2000
        def __init__(self, n): self.left = iter(range(n-1))
        def after_batch(self):
            if self.training and next(self.left, None) is None: raise Kill('here')
    def learner(name):
        return TbpttLearner(scheme_loaders(), nn.Sequential(StatefulRNN(parts()[0]), parts()[1]), 5, loss_func=MSELossFlat(), path=tmp_path/name, **settings)
    whole = fit(learner('a'), 2)
    with pytest.raises(Kill): fit(learner('b'), 2, cbs=[TbpttCheckpoint(every=1), KillAt(at)])
    resumed = fit(learner('b'), 2, cbs=[TbpttCheckpoint(every=1, resume=True), KillAt(10**6)])
    for p,q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True): assert torch.equal(p, q)
    assert whole.recorder.values[-1][:2]==resumed.recorder.values[-1][:2]

def test_a_learner_that_was_exported_before_there_were_any_evaluates():
    cb = TbpttResetCB(5, n_skip=3)
    assert not vars(cb).keys()&{'burn_in','warm_up','washout'}
    assert pickle.loads(pickle.dumps(TbpttResetCB(5, burn_in=4))).first_steps==FirstSteps(burn_in=4)
    assert cb.first_steps==FirstSteps(3)

def test_all_learners_and_the_view_take_them():
    asked = dict(burn_in=4, warm_up=2, washout=3)
    dls = SequenceDataLoaders.from_arrays(torch.randn(200, 1), torch.randn(200, 1), win_sz=20, sub_seq_len=5)
    for learn in (RNNLearner(dls, hidden_size=2, **asked), TbpttLearner(dls, **asked), TbpttLearner(dls, nn.Sequential(StatefulRNN(nn.GRU(1, 2, batch_first=True)), nn.Linear(2, 1)), **asked)):
        assert learn.tbptt_reset_cb.first_steps==FirstSteps(0, 4, 2, 3)
    x = torch.zeros(2, 20, 1)
    view = SubWindows([(x, x)], 5, FirstSteps(burn_in=7))
    assert [len(a[0]) for a,_ in view]==[10, 5, 5] and len(view)==3
    assert [o.sub_window.loss_start for o in segments(view)]==[7, 10, 15]
    view = SubWindows([(x, x)], 5, FirstSteps(warm_up=7))
    assert [len(a[0]) for a,_ in view]==[5, 5, 3]
    view = SubWindows([(x, x)], None, FirstSteps(warm_up=7))
    assert [len(a[0]) for a,_ in view]==[13] and [x.shape[1] for o in views_warm_up(view) for x in o]==[7]

def test_a_view_knows_its_number_of_steps():
    x = torch.zeros(2, 23, 1)
    for first in (FirstSteps(warm_up=4), FirstSteps(burn_in=11), FirstSteps(4)):
        view = SubWindows([(x, x)], 5, first)
        assert len(view)==len(list(view))==dict(warm_up=4, burn_in=3, n_skip=5)[first.name()]

def segments(view):
    found = []
    for _ in view: found.append(view.segment)
    return found

def views_warm_up(view):
    for _ in view: yield [xb[0] for _,xb in view.warm_up]

def test_how_far_gradients_reach_is_measured_at_losses_that_are_trained():
    x,y = data(4, 60)
    dl = TbpttDL(Sequences(list(x), list(y), dtype=f64), bs=4, num_workers=0, device='cpu')
    a,b = (scheme_learner(DataLoaders(dl, dl), None, *parts(), sub_seq_len=5, **o).tbptt_find(max_lag=10, bias=1e6, show=False) for o in (dict(n_skip=30), dict(burn_in=30)))
    assert np.array_equal(a.phi, b.phi)


# Two processes

SHARED = [dict(burn_in=9), dict(warm_up=8), dict(washout=4)]

class Fresh(nn.Module):
    def __init__(self): super().__init__(); self.rnn,self.head = nn.LSTM(2, 3, batch_first=True),nn.Linear(3, 1)
    def forward(self, x): return self.head(self.rnn(x)[0])

def shared_learner(kind, settings):
    torch.manual_seed(0)
    x,y = data(8)
    if kind=='windows': dl = TbpttDL(Sequences(list(x), list(y), dtype=f64), bs=2, sub_seq_len=5, num_workers=0, device='cpu')
    else:
        settings = {k: dict(burn_in=4, warm_up=5, washout=4)[k] for k in settings}
        dl = StreamDL(Sequences(*tensors((23, 19, 31, 14)), dtype=f64), bs=4, sub_seq_len=5, device='cpu')
    return Learner(DataLoaders(dl, dl, device='cpu'), Fresh().double(), nn.MSELoss(), opt_func=sgd, lr=.05, cbs=TbpttResetCB(5, **settings)),settings

def main(folder):
    from fastai.distributed import rank_distrib
    res = []
    for kind in ('windows', 'stream'):
        for settings in SHARED:
            learn,_ = shared_learner(kind, settings)
            with learn.no_bar(), learn.no_logging():
                with learn.distrib_ctx(): learn.fit(2)
                res.append(([*learn.model.state_dict().values()], learn.validate()[0]))
    torch.save(res, f'{folder}/{rank_distrib()}.pt')

def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip('accelerate')
    launch('test_burn_in.py', tmp_path, cwd=tmp_path)
    results = [torch.load(tmp_path/f'{rank}.pt', weights_only=False) for rank in range(2)]
    cases = [(kind, o) for kind in ('windows', 'stream') for o in SHARED]
    for (kind,asked),a,b in zip(cases, *results, strict=True):
        learn,asked = shared_learner(kind, asked)
        rnn,head = learn.model.rnn,learn.model.head
        loss,warm_up,washout = max(asked.get('burn_in', 0), asked.get('warm_up', 0)),asked.get('warm_up', 0),asked.get('washout', 0)
        if kind=='windows': # each process has half of the windows, and both have as many steps
            train_by_hand(rnn, head, *data(8), [[0,1,4,5],[2,3,6,7]]*2, 5, loss, warm_up)
            xs,ys = data(8)
        else:
            xs,ys = tensors((23, 19, 31, 14))
            train_stream_sgd(rnn, head, xs, ys, 4, 5, loss)
        for p,q,r in zip(learn.model.state_dict().values(), a[0], b[0], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
            assert torch.equal(q, r)
        with torch.no_grad(): errors = torch.cat([(head(rnn(x[None])[0])[0]-y)[washout:] for x,y in zip(xs, ys)])
        assert a[1]==pytest.approx(errors.square().mean().item(), rel=1e-6)==b[1]

if __name__=='__main__': main(*sys.argv[1:])
