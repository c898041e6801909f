"Windows that take turns: each update on another one, each with a state of its own, as a loop by hand has them. Run as a script, this file is one of two processes"
import copy, sys
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, TfmdDL
from torch import nn
from torch.utils._pytree import tree_map
from functools import partial
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
    CancelTrainException)
from fastai.optimizer import OptimWrapper
from fastai.learner import Learner
from fastai.torch_core import set_seed
from tbptt_fastai.all import (Adaptive, EncodedState, Exact, Fixed, Interleaved, Jittered, Overlap, RandomUnbiased, Sequences, SequenceWindows, StatefulRNN, StreamDL, TbpttDL,
    RNNLearner, SequenceDataLoaders, SubWindows, TbpttLearner, fun_rmse)
from tbptt_fastai.state.stored import PassedState, StoredState
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.training.finite import FiniteCB
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.once import once_per_window
from test_distributed import launch

WIN,SUB,BS = 23,5,4

def data(n=18, win=WIN, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(n, win, 2, dtype=torch.float64)
    return x,(x.cumsum(1)/3).sin().sum(-1, keepdim=True)

class Net(nn.Module):
    def __init__(self, layer=nn.GRU):
        super().__init__()
        self.rnn,self.head = StatefulRNN(layer(2, 6, batch_first=True)),nn.Linear(6, 1)
    def forward(self, x): return self.head(self.rnn(x))

def net(layer=nn.GRU):
    torch.manual_seed(1)
    return Net(layer).double()

def made(x, y, scheme, model, cls=TbpttDL, valid=None, **kwargs):
    items = list(zip(x, y))
    train = cls(items, bs=BS, shuffle=False, num_workers=0)
    valid = TbpttDL(items if valid is None else list(zip(*valid)), bs=BS, num_workers=0)
    kwargs = dict(loss_func=nn.MSELoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), **kwargs)
    return TbpttLearner(DataLoaders(train, valid), model, truncation=scheme, **kwargs)

def fit(learn, n_epoch=1, lr=.1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, lr, **kwargs)
    return learn

def plans(win, scheme, skip):
    "Start, first step with a loss, stop, and where the next one starts, of each sub-window; written out for the schemes here"
    if isinstance(scheme, int): bounds = [(a, a, min(a+scheme, win), min(a+scheme, win)) for a in range(0, win, scheme)]
    else:
        k1,k2 = scheme
        stops = [*range(k1, win, k1), win]
        starts = [max(o-k2, 0) for o in stops]
        bounds = list(zip(starts, [0, *stops], stops, [*starts[1:], win]))
    return [(a, max(b, min(skip, c)), c, d) for a,b,c,d in bounds]

def by_hand(model, batches, scheme, in_flight, lr, n_epoch=1, skip=0):
    "A loop over windows in flight, each with a state of its own"
    rnn,head = model.rnn.rnn,model.head
    opt,order = torch.optim.SGD(model.parameters(), lr=lr),[]
    for _ in range(n_epoch):
        waiting,flying = list(enumerate(batches)),[]
        while waiting or flying:
            while waiting and len(flying)<in_flight:
                i,(x,y) = waiting.pop(0)
                plan = plans(x.shape[1], scheme, skip)
                flying.append(dict(i=i, x=x, y=y, plan=plan, state=None, most=max(c-b for _,b,c,_ in plan)))
            o = flying.pop(0)
            while True: # parts without a loss bring the state on
                start,first,stop,carry = o['plan'].pop(0)
                at = carry-start
                x = o['x'][:,start:stop]
                if first<stop or not o['plan']: break
                with torch.no_grad(): o['state'] = rnn(x[:,:at], o['state'])[1]
            if at<stop-start:
                a,mid = rnn(x[:,:at], o['state']) if at else (x.new_zeros(len(x), 0, rnn.hidden_size), o['state'])
                b,_ = rnn(x[:,at:], mid)
                out,end = torch.cat([a, b], 1),mid
            else: out,end = rnn(x, o['state'])
            o['state'] = tree_map(torch.detach, end) if end is not None else None
            order.append((o['i'], start, stop))
            loss = (head(out)[:,first-start:]-o['y'][:,first:stop]).square().mean()*(stop-first)/o['most']
            opt.zero_grad()
            loss.backward()
            opt.step()
            if o['plan']: flying.append(o)
    return order


class Order(Callback):
    "Which window, and which steps of it, each training step is on"
    order = 20
    def __init__(self, x): self.first = [o[0,0,0].item() for o in x.split(BS)]
    def before_fit(self): self.seen = []
    def before_batch(self):
        cb = self.learn.tbptt_reset_cb
        if not self.training: return
        i = self.first.index(cb.segment.window.batch[0][0,0,0].item())
        self.seen.append((i, cb.sub_window.start, cb.sub_window.stop))

def batches_of(x, y): return list(zip(x.split(BS), y.split(BS)))

def equal(a, b, tol=1e-10):
    return all(torch.allclose(p, q, rtol=0, atol=tol) for p,q in zip(a.parameters(), b.parameters()))

@pytest.mark.parametrize('layer', [nn.GRU, nn.LSTM])
@pytest.mark.parametrize('in_flight', [1, 2, 3, 16])
@pytest.mark.parametrize('scheme,k', [(Fixed(SUB), SUB), (Overlap(3, 8), (3, 8)), (Overlap(4, 4), (4, 4)), (Fixed(WIN), WIN)])
def test_a_training_equals_the_loop_by_hand(layer, in_flight, scheme, k):
    x,y = data()
    model,other = net(layer),net(layer)
    learn = fit(made(x, y, Interleaved(scheme, in_flight), model, cbs=Order(x)), n_epoch=2)
    order = by_hand(other, batches_of(x, y), k, in_flight, .1, n_epoch=2)
    assert learn.order.seen==order
    assert equal(model, other)

@pytest.mark.parametrize('skip', [2, 5, 7, 12])
def test_with_a_washout(skip, recwarn):
    x,y = data()
    model,other = net(),net()
    fit(made(x, y, Interleaved(SUB, 3), model, n_skip=skip), n_epoch=2)
    by_hand(other, batches_of(x, y), SUB, 3, .1, n_epoch=2, skip=skip)
    assert equal(model, other)

def test_windows_of_different_lengths():
    "Where one ends early, the next joins in"
    batches = [data(3, n, seed=n) for n in (7, 23, 4, 31, 12, 9)]
    model,other = net(),net()
    dls = DataLoaders(*[batches]*2, device='cpu')
    learn = TbpttLearner(dls, model, truncation=Interleaved(4, 3), loss_func=nn.MSELoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    fit(learn)
    by_hand(other, batches, 4, 3, .1)
    assert equal(model, other)

def test_one_window_at_a_time_is_the_scheme_alone_bit_by_bit():
    x,y = data()
    for scheme in (Fixed(SUB), Overlap(3, 8), Jittered(6, std=2., least=2), RandomUnbiased(6)):
        a,b = net(),net()
        for model,o in ((a, scheme), (b, Interleaved(scheme, 1))):
            set_seed(3)
            fit(made(x, y, o, model))
        assert all(torch.equal(*o) for o in zip(a.parameters(), b.parameters())), scheme

def test_in_an_epoch_each_step_is_seen_once_in_its_order():
    x,y = data()
    learn = fit(made(x, y, Interleaved(SUB, 3), net(), cbs=Order(x)))
    for i in range(5): assert [o[1:] for o in learn.order.seen if o[0]==i]==[(a, min(a+SUB, WIN)) for a in range(0, WIN, SUB)]
    assert learn.order.seen[:4]==[(0, 0, 5), (1, 0, 5), (2, 0, 5), (0, 5, 10)]

def test_an_evaluation_in_between_changes_nothing():
    class Between(Callback):
        "As a user's callback does it, who puts the learner back"
        order,run_valid = 70,False
        def after_batch(self):
            learn = self.learn
            kept = {k: vars(learn)[k] for k in ('dl','iter','n_iter','training','xb','yb','pred','loss') if k in vars(learn)}
            with learn.removed_cbs([self, learn.recorder]): learn.get_preds(dl=learn.dls.valid)
            for k,v in kept.items(): setattr(learn, k, v)
            learn.model.train()
    x,y = data()
    a,b = net(),net()
    fit(made(x, y, Interleaved(SUB, 3), a))
    fit(made(x, y, Interleaved(SUB, 3), b, cbs=Between()))
    assert all(torch.equal(*o) for o in zip(a.parameters(), b.parameters()))

def test_evaluation_is_that_of_whole_windows():
    x,y = data()
    model = net()
    learn = made(x, y, Interleaved(SUB, 3), model, metrics=[fun_rmse])
    fit(learn)
    with torch.no_grad(): pred = model.head(model.rnn.rnn(x)[0])
    loss,rmse = learn.validate()
    assert abs(loss-(pred-y).square().mean().item())<1e-6 and abs(rmse-(pred-y).square().mean().sqrt().item())<1e-6
    assert torch.allclose(learn.get_preds()[0], pred)

def test_a_second_fit_and_an_interrupted_one_begin_anew():
    class Stop(Callback):
        order = 30
        def after_batch(self):
            if self.learn.train_iter==7: raise KeyboardInterrupt('enough')
    x,y = data()
    model = net()
    learn = made(x, y, Interleaved(SUB, 3), model)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
    other = copy.deepcopy(model)
    fit(learn)
    by_hand(other, batches_of(x, y), SUB, 3, .1)
    assert equal(model, other)

def test_windows_that_have_ended_are_let_go():
    "States and windows that are held are those in flight"
    held = []
    class Held(Callback):
        order = 30
        def after_batch(self):
            if self.training: held.append(len(self.learn.tbptt_reset_cb.owner._aside))
    x,y = data(40)
    fit(made(x, y, Interleaved(SUB, 3), net(), cbs=Held()))
    assert max(held)==2
    nan = y.clone()
    nan[:,-8:] = float('nan') # the last part of a window has no loss
    held.clear()
    fit(made(x, nan, Interleaved(SUB, 3), net(), cbs=Held(), counts=lambda y: ~y[...,0].isnan()))
    assert max(held)==2

def test_steps_of_a_scheme_that_draws_cover_each_window():
    x,y = data()
    learn = fit(made(x, y, Interleaved(Jittered(6, std=2., least=2), 3), net(), cbs=Order(x)))
    for i in range(5):
        parts = [o[1:] for o in learn.order.seen if o[0]==i]
        assert parts[0][0]==0 and parts[-1][1]==WIN and all(a[1]==b[0] for a,b in zip(parts, parts[1:]))

def test_exact_recomputes_whole_windows():
    x,y = data()
    a,b = net(),net()
    fit(made(x, y, Exact(7), a))
    fit(made(x, y, Interleaved(Exact(7), 3), b))
    assert equal(a, b)

def test_lr_find_and_schedules_run():
    x,y = data(60)
    learn = made(x, y, Interleaved(SUB, 3), net().float())
    learn.dls = DataLoaders(*(TbpttDL(list(zip(x.float(), y.float())), bs=BS, num_workers=0) for _ in range(2)))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=30)
        learn.fit_flat_cos(1, 1e-2)

class Own(nn.Module):
    "Carries its state by itself"
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.h = nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1),None
    def forward(self, x):
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return self.head(out)
    def reset(self): self.h = None

def test_what_cannot_take_turns_is_refused_before_training():
    x,y = data()
    scheme = Interleaved(SUB, 3)
    with pytest.raises(ValueError, match='carries its state by itself'): made(x, y, scheme, Own().double())
    for cb in (FiniteCB('skip'), TbpttCheckpoint(), once_per_window(MixUp())):
        model = net()
        before = copy.deepcopy(model.state_dict())
        learn = made(x, y, scheme, model)
        with pytest.raises(ValueError, match=f'windows take turns, but {type(cb).__name__}'): fit(learn, cbs=cb)
        assert all(torch.equal(o, model.state_dict()[k]) for k,o in before.items())
        fit(learn)
    fit(made(x, y, scheme, net(), cbs=FiniteCB('stop')))
    rows = Sequences(list(x), list(y))
    with pytest.raises(ValueError, match='StreamDL go on through the whole run'):
        TbpttLearner(DataLoaders(*(StreamDL(rows, bs=4, sub_seq_len=SUB) for _ in range(2))), net(), truncation=scheme, loss_func=nn.MSELoss())
    batches = batches_of(x[:16], y[:16])
    with pytest.raises(ValueError, match='each batch continues the last'):
        TbpttLearner(DataLoaders(*[batches]*2), net(), truncation=scheme, loss_func=nn.MSELoss(), continuing=True)

@pytest.mark.parametrize('scheme', [None, Interleaved(5), 0, -1, 2.5, 'a', True])
def test_settings_that_cannot_be_are_refused(scheme):
    with pytest.raises((TypeError, ValueError)): Interleaved(scheme)

@pytest.mark.parametrize('in_flight', [0, -1, 1.5, None, 'a', True])
def test_numbers_in_flight_that_cannot_be_are_refused(in_flight):
    with pytest.raises((TypeError, ValueError), match='in_flight'): Interleaved(SUB, in_flight)

def test_windows_too_short_for_the_scheme_are_refused():
    x,y = data()
    with pytest.raises(ValueError, match='steps'): made(x, y, Interleaved(WIN+1, 3), net())

class Estimated(nn.Module):
    "Its state is estimated from the first seven steps"
    def __init__(self, initial):
        super().__init__()
        self.rnn,self.head = StatefulRNN(nn.GRU(2, 6, batch_first=True), initial=initial),nn.Linear(6, 1)
    def forward(self, x): return self.head(self.rnn(x))

class Gradients(Callback):
    "That of each part of each window; no step is taken"
    order = 90
    def before_fit(self): self.seen = {}
    def before_step(self):
        cb = self.learn.tbptt_reset_cb
        at = cb.segment.window.batch[0][0,0,0].item(),cb.sub_window.start
        self.seen[at] = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        raise CancelStepException('looked at')
    def after_cancel_step(self): self.learn.opt.zero_grad()

@pytest.mark.parametrize('scheme', [Fixed(SUB), Overlap(3, 8), Fixed(WIN)])
def test_with_estimated_states_each_part_has_the_gradient_that_it_has_alone(scheme):
    x,y = data()
    def gradients(scheme):
        torch.manual_seed(1)
        model = Estimated(EncodedState(n_past=7, n_in=2, n_out=1)).double()
        return fit(made(x, y, scheme, model, cbs=Gradients())).gradients.seen
    alone,in_turn = gradients(scheme),gradients(Interleaved(scheme, 3))
    assert alone.keys()==in_turn.keys() and len(alone)>=5
    for at,grads in alone.items(): assert all(torch.equal(*o) for o in zip(grads, in_turn[at], strict=True)), at

@pytest.mark.parametrize('initial', [StoredState, PassedState])
def test_states_from_elsewhere_cannot_take_turns(initial):
    signals = [torch.randn(60, 2) for _ in range(3)]
    windows = SequenceWindows(signals, [o[:,:1] for o in signals], win_sz=20, stp_sz=5)
    dls = DataLoaders(*(TbpttDL(windows, bs=4, num_workers=0) for _ in range(2)))
    with pytest.raises(ValueError, match=f'take turns, but {initial.__name__}'):
        TbpttLearner(dls, Estimated(initial()), truncation=Interleaved(SUB, 3), loss_func=nn.MSELoss())


# One at a time is the scheme alone, in all that a learner does

def test_one_window_at_a_time_has_the_records_of_the_scheme_alone():
    x,y = data()
    for scheme in (Fixed(SUB), Overlap(3, 8)):
        a,b = (fit(made(x, y, o, net()), 2) for o in (scheme, Interleaved(scheme, 1)))
        assert a.recorder.values==b.recorder.values and a.recorder.losses==b.recorder.losses

@pytest.mark.parametrize('scheme', [Fixed(SUB), Jittered(6, std=2., least=2), Overlap(5, 10), Exact(4)])
def test_one_window_at_a_time_trains_on_streams_and_with_states_from_elsewhere(scheme):
    x,y = data()
    rows = Sequences(list(x), list(y), dtype=torch.float64)
    def trained(scheme):
        set_seed(1)
        dls = DataLoaders(*(StreamDL(rows, bs=4, sub_seq_len=SUB) for _ in range(2)))
        return fit(TbpttLearner(dls, net(), truncation=scheme, loss_func=nn.MSELoss())).model
    assert all(torch.equal(*o) for o in zip(trained(scheme).parameters(), trained(Interleaved(scheme, 1)).parameters()))
    windows = SequenceWindows(list(x), list(y), win_sz=12, stp_sz=5, dtype=torch.float64)
    dls = DataLoaders(*(TbpttDL(windows, bs=4, num_workers=0) for _ in range(2)))
    fit(TbpttLearner(dls, Estimated(StoredState()).double(), truncation=Interleaved(Fixed(SUB), 1), loss_func=nn.MSELoss()))

def test_losses_of_equal_parts_are_smoothed_as_those_of_the_scheme():
    x,y = data(win=20)
    learn = fit(made(x, y, Interleaved(SUB, 3), net()))
    assert type(learn.recorder.smooth_loss) is type(fit(made(x, y, Fixed(SUB), net())).recorder.smooth_loss)


# Schemes that hold each other

def test_a_scheme_that_measures_may_have_windows_take_turns():
    x,y = data()
    def trained(scheme): return fit(made(x, y, scheme, net()), 2).model
    def adaptive(f): return Adaptive(k_max=6, n_batches=1, scheme=f)
    inside,outside = trained(adaptive(lambda k: Interleaved(k, 3))),trained(Interleaved(adaptive(Fixed), 3))
    assert equal(inside, outside, 0) and not equal(inside, trained(adaptive(Fixed)))
    with pytest.raises(ValueError, match='scheme is'): Interleaved(adaptive(lambda k: Interleaved(k, 3)), 2)
    rows = Sequences(list(x), list(y))
    dls = DataLoaders(*(StreamDL(rows, bs=4, sub_seq_len=SUB) for _ in range(2)))
    with pytest.raises(ValueError, match='StreamDL go on through the whole run'):
        TbpttLearner(dls, net(), truncation=adaptive(lambda k: Interleaved(k, 3)), loss_func=nn.MSELoss())

@pytest.mark.parametrize('scheme', ['a', [1], 2.5, Fixed])
def test_a_scheme_that_is_none_is_named(scheme):
    with pytest.raises(TypeError, match='^scheme is'): Interleaved(scheme)

def test_a_window_that_is_too_short_is_said_of_the_scheme_that_cuts_it():
    x,y = data()
    with pytest.raises(ValueError, match=f'sub_seq_len is {WIN+1}, but a window has {WIN} steps'): made(x, y, Interleaved(WIN+1, 3), net())


# States that are kept elsewhere

class Beside(Net):
    "Has another state, by itself"
    def __init__(self):
        super().__init__()
        self.cell,self.head,self.h = nn.GRUCell(2, 6),nn.Linear(12, 1),None
    def reset(self): self.h = None
    def forward(self, x):
        outs = []
        for o in x.unbind(1):
            self.h = self.cell(o, self.h)
            outs.append(self.h)
        self.h = self.h.detach()
        return self.head(torch.cat([self.rnn(x), torch.stack(outs, 1)], -1))

class Tidy(Net):
    "Resets nothing else"
    def reset(self): self.rnn.reset()

def test_a_state_beside_those_that_can_be_put_aside_is_refused_before_training():
    x,y = data()
    model = Beside().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='Beside carries h by itself'): fit(made(x, y, Interleaved(SUB, 3), model))
    assert all(torch.equal(o, model.state_dict()[k]) for k,o in before.items())
    fit(made(x, y, Fixed(SUB), model))
    torch.manual_seed(1)
    tidy,other = Tidy().double(),net()
    fit(made(x, y, Interleaved(SUB, 3), tidy))
    by_hand(other, batches_of(x, y), SUB, 3, .1)
    assert equal(tidy, other)

def test_a_reset_by_a_callback_is_that_of_all_windows_in_flight():
    class Reset(Callback):
        order = 30
        def after_batch(self):
            if self.training: self.learn.tbptt_reset_cb.reset()
    x,y = data()
    a,b = net(),net()
    fit(made(x, y, Interleaved(SUB, 3), a, cbs=Reset()))
    parts = [(x[i:i+BS,s:s+SUB], y[i:i+BS,s:s+SUB]) for i,s in in_turn_by_hand(len(x), 3)]
    opt = torch.optim.SGD(b.parameters(), lr=.1)
    for xb,yb in parts:
        opt.zero_grad()
        ((b.head(b.rnn.rnn(xb)[0])-yb).square().mean()*(xb.shape[1]/SUB)).backward()
        opt.step()
    assert equal(a, b)

def in_turn_by_hand(n, in_flight):
    "First row and first step of each part"
    waiting,flying,order = list(range(0, n, BS)),[],[]
    while waiting or flying:
        while waiting and len(flying)<in_flight: flying.append([(waiting[0], s) for s in range(0, WIN, SUB)]) or waiting.pop(0)
        parts = flying.pop(0)
        order.append(parts.pop(0))
        if parts: flying.append(parts)
    return order


# What is broken off

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step'])
@pytest.mark.parametrize('error', [CancelFitException, CancelEpochException, CancelTrainException, CancelBatchException])
@pytest.mark.parametrize('scheme', [Fixed(SUB), Interleaved(SUB, 2)])
def test_a_fit_begins_without_the_gradients_of_a_step_that_was_cancelled(scheme, error, event):
    def stop(self):
        if self.training and self.learn.train_iter==6: raise error('enough')
    x,y = data()
    model = net()
    learn = made(x, y, scheme, model)
    fit(learn, cbs=type('Stop', (Callback,), {event: stop, 'order': 30})())
    if error is CancelBatchException: model.zero_grad() # the next step would have them
    other = copy.deepcopy(model)
    fit(learn)
    by_hand(other, batches_of(x, y), SUB, scheme.in_flight, .1)
    assert equal(model, other)

def test_the_next_epoch_begins_without_the_gradients_of_a_step_that_was_cancelled():
    class Stop(Callback):
        order = 30
        def after_backward(self):
            if self.learn.epoch==0 and self.learn.iter==6: raise CancelTrainException('enough')
            if self.learn.iter==0: self.seen = [p.grad.clone() for p in self.model.parameters()]
    x,y = data()
    stop,model = Stop(),net()
    fit(made(x, y, Interleaved(SUB, 2), model, cbs=stop), 2, lr=0.)
    first = [o.clone() for o in stop.seen]
    fit(made(x, y, Interleaved(SUB, 2), net(), cbs=stop), 1, lr=0.)
    assert all(torch.equal(*o) for o in zip(first, stop.seen))

def test_processes_agree_that_no_window_is_left_before_the_rest_of_those_in_flight():
    "... as they wait for each other in every step"
    class Agreeing(SubWindows):
        def _agree(self, steps, n_sub): events.append((steps, n_sub))
    events,x = [],torch.zeros(2, 6, 1)
    for _ in Agreeing([(x, x)]*3, Interleaved(2, 2)): events.append('step')
    assert events==[(6, 3), (6, 3)]+['step']*5+[(6, 3)]+['step']+[(0, 0)]+['step']*3

def test_a_model_with_another_state_is_evaluated_window_by_window():
    x,y = data()
    torch.manual_seed(1)
    model = Beside().double()
    learn = fit(made(x, y, Fixed(SUB), model), 0)
    preds = learn.get_preds()[0]
    for i in range(0, len(x), BS):
        model.eval()
        model.reset()
        with torch.no_grad(): assert torch.allclose(preds[i:i+BS], model(x[i:i+BS]))

def test_windows_of_a_frame_are_rows_of_a_stream_and_the_remedy_says_where_they_are_not():
    frame = pd.DataFrame(dict(group=np.repeat(range(4), 50), u=np.random.default_rng(0).standard_normal(200)))
    dls = SequenceDataLoaders.from_df(frame.assign(y=frame.u), 'u', 'y', group='group', win_sz=20, bs=2)
    for how in (dict(truncation=Interleaved(SUB, 3)), dict(sub_seq_len=SUB, initial=StoredState())):
        with pytest.raises(ValueError, match=r'windows in memory \(win_sz= in from_arrays\)'): RNNLearner(dls, hidden_size=4, **how)


# Two processes

SHARED = [(Interleaved(SUB, 2), SUB, {}), (Interleaved(Overlap(3, 8), 2), (3, 8), {}), (Interleaved(SUB, 5), SUB, dict(n_skip=4))]

def shared_learner(scheme, settings):
    x,y = data(12)
    dl = TbpttDL(Sequences(list(x), list(y), dtype=torch.float64), bs=2, num_workers=0, device='cpu')
    opt = partial(OptimWrapper, opt=torch.optim.SGD)
    return Learner(DataLoaders(dl, dl, device='cpu'), net(), nn.MSELoss(), opt_func=opt, lr=.1, cbs=TbpttResetCB(truncation=scheme, **settings))

def main(folder):
    from fastai.distributed import rank_distrib
    res = []
    for scheme,_,settings in SHARED:
        learn = shared_learner(scheme, settings)
        with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit(2)
        res.append([*learn.model.state_dict().values()])
    torch.save(res, f'{folder}/{rank_distrib()}.pt')

def test_two_processes_have_their_windows_take_turns_as_one(tmp_path):
    pytest.importorskip('accelerate')
    launch('test_interleaved.py', tmp_path, cwd=tmp_path)
    results = [torch.load(tmp_path/f'{rank}.pt', weights_only=False) for rank in range(2)]
    x,y = data(12)
    batches = [(x[o], y[o]) for o in ([0,1,6,7], [2,3,8,9], [4,5,10,11])] # each process has half of the windows
    for (scheme,k,settings),a,b in zip(SHARED, *results, strict=True):
        other = net()
        by_hand(other, batches, k, scheme.in_flight, .1, 2, settings.get('n_skip', 0))
        for p,q,r in zip(other.state_dict().values(), a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
            assert torch.equal(q, r)

if __name__=='__main__': main(*sys.argv[1:])
