"Sequences of unequal length in the rows of a stream: every step once, no state from one sequence in another, padding counts nothing"
import copy, itertools, pickle, warnings
from functools import partial
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from fastai.callback.core import Callback, FetchPredsCallback, CancelBatchException, CancelEpochException, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder, load_learner
from fastai.metrics import accuracy, mae, rmse
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, sgd, untaught_on_purpose
from reference import OwnState, permutations, rows_by_hand, stream_by_hand, train_stream
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.state.stateful import InitialState, StatefulRNN, learned_state
from tbptt_fastai.loaders.layout import Layout, assign_rows
from tbptt_fastai.loaders.shared import Part
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences, SequenceWindows
from tbptt_fastai.truncation.plan import Fixed

SEED,N_EPOCH,LR = 3,2,1e-2
LENGTHS = [17,20,46,30,12,5,33]
unhurried = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow]) # a busy machine is no failure


def sequences(lengths, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(n, 2, generator=g, dtype=dtype) for n in lengths]
    return xs,[torch.cumsum(x[:,:1]*.3, 0).sin() for x in xs]

def stream_loaders(xs, ys, n_valid=None, dtype=torch.float32, **kwargs):
    set_seed(SEED)
    kw = {**dict(bs=3, sub_seq_len=7, shuffle=True), **kwargs}
    return DataLoaders(StreamDL(Sequences(xs, ys, dtype=dtype), **kw), StreamDL(Sequences(xs[:n_valid], ys[:n_valid], dtype=dtype), **{**kw, 'shuffle': False}))

def recurrent_and_head(rnn=partial(nn.LSTM, num_layers=2), dtype=torch.float32):
    torch.manual_seed(0)
    return rnn(2, 6, batch_first=True).to(dtype),nn.Linear(6, 1).to(dtype)

def stateful(rnn, head, **kwargs): return nn.Sequential(StatefulRNN(copy.deepcopy(rnn), **kwargs), copy.deepcopy(head))

def stream_learner(dls, model, **kwargs): return TbpttLearner(dls, model, **{**dict(opt_func=adam), **kwargs})

def alone(rnn, head, xs):
    with torch.no_grad(): return [head(rnn(x[None])[0])[0] for x in xs]

def assert_same(trained, *expected):
    params = [p for m in expected for p in m.parameters()]
    assert len(params)==len(list(trained.parameters()))
    for a,b in zip(trained.parameters(), params): assert torch.equal(a, b)

class Seen(Callback):
    "What the model has seen in training: (sequence, step) and the prediction there"
    order = 20 # after TbpttResetCB
    def __init__(self): self.steps,self.preds = [],[]
    def after_pred(self):
        if not self.training: return
        block = self.learn.dl.sub_window
        self.steps += [(s,a+i) for s,a,n in zip(block.seq, block.start, block.n) for i in range(n)]
        self.preds.append(self.learn.pred.detach())


# Where the steps go

@unhurried(max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 20), st.integers(0, 999), st.integers(0, 50))
def test_every_step_once_in_order_and_rows_as_by_hand(lengths, bs, sub_seq_len, seed, n_skip):
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    layout = Layout(np.array(lengths), bs, sub_seq_len, np.array(order), n_skip)
    blocks = list(layout)
    assert len(layout)==len(blocks)==len(Layout(np.array(lengths), bs, sub_seq_len)) # whatever the order
    by_hand = stream_by_hand(lengths, bs, min(sub_seq_len, max(lengths)), order)
    assert [[(s,a,a+n) if n else None for s,a,n in zip(b.seq, b.start, b.n)] for b in blocks]==by_hand
    steps = [(s,t) for b in blocks for s,a,n in zip(b.seq, b.start, b.n) for t in range(a, a+n)]
    assert sorted(steps)==[(s,t) for s,n in enumerate(lengths) for t in range(n)]
    counted = [b.real_at.size if b.real_at is not None else b.n.sum() for b in blocks]
    assert counted==[b.n.sum() for b in blocks]
    assert layout.n_counted()==sum(b.weight>0 for b in blocks)
    if n_skip<max(lengths): assert max(b.weight for b in blocks)<=1
    padding = 1-sum(lengths)/sum(b.steps*len(b.seq) for b in blocks)
    assert layout.waste==pytest.approx(padding) and (layout.uneven or padding==0)


@unhurried(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_rows_are_balanced(n_blocks, bs):
    "Never longer than 4/3 of the best of all assignments, as the rule promises"
    rows = assign_rows(np.array(n_blocks), bs, np.arange(len(n_blocks)))
    longest = max(sum(n_blocks[i] for i in row) for row in rows)
    best = min(max(sum(n for n,r in zip(n_blocks, to) if r==row) for row in range(bs)) for to in itertools.product(range(bs), repeat=len(n_blocks)))
    assert best<=longest<=4/3*best


def test_order_is_that_of_the_seed_and_shuffles_sequences():
    def order(seed, shuffle=True):
        set_seed(seed)
        dl = StreamDL(Sequences(sequences(LENGTHS)[0]), bs=3, sub_seq_len=7, shuffle=shuffle)
        return [[repr(b) for b in dl.layout(7)] for _ in range(2)]
    assert order(0)==order(0)!=order(1)
    first,second = order(0)
    assert first!=second
    assert order(0, shuffle=False)[0]==order(1, shuffle=False)[1]


# The state of one never reaches another

@unhurried(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 45), st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(['lstm', 'gru', 'plain']))
def test_predictions_are_those_of_each_sequence_alone(lengths, bs, sub_seq_len, shuffle, dtype, kind):
    xs,ys = sequences(lengths, dtype)
    rnn,head = recurrent_and_head(nn.GRU if kind=='gru' else nn.LSTM, dtype)
    dls = stream_loaders(xs, ys, dtype=dtype, bs=bs, sub_seq_len=min(sub_seq_len, max(lengths)), shuffle=shuffle)
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.head = copy.deepcopy(rnn),copy.deepcopy(head)
        def forward(self, x): return self.head(self.rnn(x)[0])
    seen = Seen()
    learn = stream_learner(dls, Plain() if kind=='plain' else stateful(rnn, head), cbs=seen, metrics=[fun_rmse, mae])
    tol = 1e-12 if dtype==torch.float64 else 1e-6
    expected = alone(rnn, head, xs)
    with learn.no_bar():
        for preds,targs in (learn.get_preds(), learn.get_preds(ds_idx=0), learn.get_preds(dl=dls.train)):
            assert torch.equal(targs, torch.cat(ys))
            torch.testing.assert_close(preds, torch.cat(expected), rtol=0, atol=tol)
        for p,e in zip(dls.valid.by_sequence(preds), expected, strict=True): torch.testing.assert_close(p, e, rtol=0, atol=tol)
        loss,by_rmse,by_mae = learn.validate()
    error = (torch.cat(expected)-torch.cat(ys)).double()
    assert loss==pytest.approx(error.abs().mean().item(), abs=1e-6)==by_mae and by_rmse==pytest.approx(error.square().mean().sqrt().item(), abs=1e-6)
    fit(learn, 1, 0.) # a rate of 0: the model stays as it is
    assert sorted(seen.steps)==[(s,t) for s,n in enumerate(lengths) for t in range(n)]
    torch.testing.assert_close(torch.cat(seen.preds), torch.stack([expected[s][t] for s,t in seen.steps]), rtol=0, atol=tol)


# Training equals the loop by hand

@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize('bs,sub_seq_len', [(3,7), (2,10), (7,46), (1,5), (64,9)])
@pytest.mark.parametrize('rnn', [partial(nn.LSTM, num_layers=2), nn.GRU, nn.RNN])
def test_equals_the_loop_by_hand(rnn, bs, sub_seq_len, shuffle):
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head(rnn)
    learn = stream_learner(stream_loaders(xs, ys, bs=bs, sub_seq_len=sub_seq_len, shuffle=shuffle), stateful(rnn, head))
    fit(learn, N_EPOCH)
    orders = permutations(len(xs), N_EPOCH, SEED) if shuffle else [range(len(xs))]*N_EPOCH
    train_stream(rnn, head, xs, ys, orders, bs, sub_seq_len, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)


@untaught_on_purpose
@pytest.mark.parametrize('lengths,n_skip', [(LENGTHS,3), (LENGTHS,7), (LENGTHS,10), (LENGTHS,18), (LENGTHS,40), ([21]*7,8), ([21]*7,16)]) # of one length: all rows begin in steps without a loss
def test_washout_equals_the_loop_by_hand(lengths, n_skip):
    xs,ys = sequences(lengths)
    rnn,head = recurrent_and_head()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*not longer than n_skip')
        learn = stream_learner(stream_loaders(xs, ys), stateful(rnn, head), n_skip=n_skip, metrics=[fun_rmse, mae])
        fit(learn, N_EPOCH)
        assert learn.pct_train==pytest.approx(1)
        train_stream(rnn, head, xs, ys, permutations(len(xs), N_EPOCH, SEED), 3, 7, LR, nn.functional.l1_loss, n_skip)
        assert_same(learn.model, rnn, head)
        with learn.no_bar():
            values = learn.validate()
            preds,targs,losses = learn.get_preds(with_loss=True)
    expected = alone(rnn, head, xs)
    error = torch.cat([(p-y)[n_skip:] for p,y in zip(expected, ys)]).double()
    np.testing.assert_allclose(values, [error.abs().mean(), error.square().mean().sqrt(), error.abs().mean()], atol=1e-6)
    torch.testing.assert_close(preds, torch.cat(expected), rtol=0, atol=1e-6) # for all steps
    for loss,p,y in zip(learn.dls.valid.by_sequence(losses), expected, ys):
        assert loss[:n_skip].isnan().all()
        torch.testing.assert_close(loss[n_skip:], (p-y).abs()[n_skip:,0], rtol=0, atol=1e-6)


def test_plain_layers_of_an_existing_learner_equal_the_loop_by_hand():
    class Plain(nn.Module):
        def __init__(self, rnn, head):
            super().__init__()
            self.rnn,self.head = rnn,head
        def forward(self, x): return self.head(self.rnn(x)[0])
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head()
    learn = Learner(stream_loaders(xs, ys), Plain(copy.deepcopy(rnn), copy.deepcopy(head)), loss_func=nn.L1Loss(),
                    opt_func=adam)
    learn.add_cb(TbpttResetCB())
    fit(learn, N_EPOCH)
    train_stream(rnn, head, xs, ys, permutations(len(xs), N_EPOCH, SEED), 3, 7, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)


def test_float64_equals_the_loop_by_hand():
    xs,ys = sequences(LENGTHS, torch.float64)
    rnn,head = recurrent_and_head(dtype=torch.float64)
    learn = stream_learner(stream_loaders(xs, ys, dtype=torch.float64), stateful(rnn, head))
    fit(learn, N_EPOCH)
    train_stream(rnn, head, xs, ys, permutations(len(xs), N_EPOCH, SEED), 3, 7, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)


def test_windows_in_a_stream_equal_windows_in_a_loader(signals):
    "Windows of one length, as many as fill all rows: the same batches, the same model"
    u,y = (torch.from_numpy(o[:960]) for o in signals)
    rnn,head = recurrent_and_head()
    def trained(dl_type):
        set_seed(SEED)
        ds = SequenceWindows(u, y, win_sz=120)
        dls = DataLoaders(dl_type(ds, bs=4, sub_seq_len=50, shuffle=True, num_workers=0), dl_type(ds, bs=4, sub_seq_len=50, num_workers=0))
        learn = stream_learner(dls, stateful(rnn, head), metrics=fun_rmse)
        fit(learn, N_EPOCH)
        with learn.no_bar(): return learn.model,learn.validate()
    (a,values_a),(b,values_b) = trained(TbpttDL),trained(StreamDL)
    assert_same(a, b)
    np.testing.assert_allclose(values_a, values_b, rtol=1e-6)


def test_whole_sequences_are_full_backpropagation():
    "sub_seq_len=None: full backpropagation through padded sequences"
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head()
    learn = stream_learner(stream_loaders(xs, ys, sub_seq_len=None), stateful(rnn, head), sub_seq_len=None)
    fit(learn, N_EPOCH)
    train_stream(rnn, head, xs, ys, permutations(len(xs), N_EPOCH, SEED), 3, 46, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0], torch.cat(alone(rnn, head, xs)), rtol=0, atol=1e-6)


# Where a sequence begins

@pytest.mark.parametrize('rnn', [partial(nn.LSTM, num_layers=2), nn.GRU])
@pytest.mark.parametrize('per_group', [False, True])
def test_learned_first_state_equals_the_loop_by_hand(rnn, per_group):
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head(rnn)
    names = list('abcdefg') if per_group else None
    model = nn.Sequential(StatefulRNN(copy.deepcopy(rnn), initial=learned_state(rnn, names)), copy.deepcopy(head))
    set_seed(SEED)
    ds = Sequences(xs, ys, groups=list('abcdefg'))
    dls = DataLoaders(StreamDL(ds, bs=3, sub_seq_len=7, shuffle=True), StreamDL(ds, bs=3, sub_seq_len=7))
    learn = stream_learner(dls, model)
    by_hand = copy.deepcopy(learned_state(rnn, names))
    tensors = list(by_hand.tensors)
    def first_state(seq):
        h = [t[:,seq:seq+1] if per_group else t for t in tensors]
        return tuple(h) if isinstance(rnn, nn.LSTM) else h[0]
    fit(learn, N_EPOCH)
    train_stream(rnn, head, xs, ys, permutations(len(xs), N_EPOCH, SEED), 3, 7, LR, nn.functional.l1_loss, first_state=first_state, params=[*rnn.parameters(), *tensors, *head.parameters()])
    assert all(t.abs().max()>0 for t in tensors) # they have learned something
    for a,b in zip(learn.model.parameters(), [*rnn.parameters(), *tensors, *head.parameters()], strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    expected = []
    for i,x in enumerate(xs):
        with torch.no_grad(): expected.append(head(rnn(x[None], first_state(i))[0])[0])
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0], torch.cat(expected), rtol=0, atol=1e-5)
    if not per_group:
        with learn.no_bar(): torch.testing.assert_close(learn.get_preds(dl=TbpttDL(SequenceWindows([x[:5] for x in xs], [y[:5] for y in ys]), bs=7, num_workers=0))[0][3], expected[3][:5], rtol=0, atol=1e-5)
    else:
        with pytest.raises(ValueError, match='no first state for group None'), learn.no_bar(): learn.get_preds(dl=TbpttDL(SequenceWindows([x[:5] for x in xs], [y[:5] for y in ys]), bs=7, num_workers=0))


@pytest.mark.parametrize('sub_seq_len', [7, None])
def test_first_state_is_a_function_of_the_group(sub_seq_len):
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head(nn.GRU)
    asked = []
    def initial(groups):
        asked.append(groups)
        return torch.stack([torch.full((6,), float(o)/10) for o in groups])[None]
    learn = stream_learner(stream_loaders(xs, ys, sub_seq_len=sub_seq_len), stateful(rnn, head, initial=initial), lr=0.)
    with learn.no_bar(): preds = learn.get_preds()[0]
    for i,(p,x) in enumerate(zip(learn.dls.valid.by_sequence(preds), xs)):
        with torch.no_grad(): torch.testing.assert_close(p, head(rnn(x[None], torch.full((1,1,6), i/10))[0])[0], rtol=0, atol=1e-6)
    assert all(len(o)==3 for o in asked)


class Leaky(nn.Module):
    "A module with a state of its own, that begins with ones"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor(.5))
    def forward(self, x, state=None):
        h,n = (torch.ones(len(x), 2),0) if state is None else state
        out = []
        for t in range(x.shape[1]):
            h = self.w*h+x[:,t]
            out.append(h)
        return torch.stack(out, 1),(h,n+1)

def test_single_rows_of_a_module_of_ones_own_need_a_first_state():
    xs,ys = sequences(LENGTHS)
    learn = stream_learner(stream_loaders(xs, ys), nn.Sequential(StatefulRNN(Leaky()), nn.Linear(2, 1)))
    with pytest.raises(ValueError, match='first state of a Leaky is not known'): fit(learn, N_EPOCH)
    leaky,head = Leaky(),nn.Linear(2, 1)
    rnn = StatefulRNN(leaky, initial=lambda groups: (torch.ones(len(groups), 2),0))
    learn = stream_learner(stream_loaders(xs, ys), nn.Sequential(rnn, head))
    with learn.no_bar(), torch.no_grad():
        for p,x in zip(learn.dls.valid.by_sequence(learn.get_preds()[0]), xs): torch.testing.assert_close(p, head(leaky(x[None])[0])[0], rtol=0, atol=1e-6)


# What runs in between

@pytest.mark.parametrize('event', ['before_batch', 'after_batch']) # before_batch: rows have been told to begin anew, and have not yet
def test_evaluation_in_the_middle_changes_nothing(event):
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head()
    class Evaluate(Callback):
        order = 70
        def before_train(self): self.done = set()
        def __getattr__(self, k): return self.evaluate if k==event else super().__getattr__(k)
        def evaluate(self):
            if not self.training or self.iter in self.done: return
            self.done.add(self.iter)
            learn = self.learn
            kept = {k:v for k,v in vars(learn).items() if k in ('dl','pred','yb','xb','loss','loss_grad','iter','n_iter','pct_train','train_iter','epoch','n_epoch','training')}
            with learn.no_logging(): evaluated.append((learn.get_preds()[0], torch.cat(alone(learn.model[0].rnn, learn.model[1], xs))))
            vars(learn).update(kept)
            learn.model.train()
    evaluated = []
    plain = stream_learner(stream_loaders(xs, ys), stateful(rnn, head))
    fit(plain, N_EPOCH)
    learn = stream_learner(stream_loaders(xs, ys), stateful(rnn, head), cbs=Evaluate())
    fit(learn, N_EPOCH)
    assert len(evaluated)==N_EPOCH*9 # in every step
    for preds,expected in evaluated: torch.testing.assert_close(preds, expected, rtol=0, atol=1e-6)
    assert_same(learn.model, plain.model)


def test_second_fit_and_interrupted_fit_begin_anew():
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head()
    class Stop(Callback):
        order = 70
        def __init__(self, e): self.e = e
        def after_batch(self):
            if self.training and self.iter==3: raise self.e
    learn = stream_learner(stream_loaders(xs, ys), stateful(rnn, head))
    for e in (CancelEpochException, CancelFitException, KeyboardInterrupt('stop')):
        stop = Stop(e)
        learn.add_cb(stop)
        try: fit(learn, 1, 0.)
        except KeyboardInterrupt: pass
        learn.remove_cb(stop)
        with learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0], torch.cat(alone(rnn, head, xs)), rtol=0, atol=1e-6)
        seen = Seen()
        learn.add_cb(seen)
        fit(learn, 1, 0.)
        learn.remove_cb(seen)
        expected = alone(rnn, head, xs)
        torch.testing.assert_close(torch.cat(seen.preds), torch.stack([expected[s][t] for s,t in seen.steps]), rtol=0, atol=1e-6)
    assert learn.model[0].state is None and not learn.model[0].rnn._forward_hooks


def test_a_cancelled_batch_resets_no_row_too_many_and_none_too_few():
    "A sequence that begins in a batch that another callback drops begins anew with its next sub-window; the others go on"
    xs,ys = sequences([14, 28, 14, 28])
    rnn,head = recurrent_and_head(nn.GRU)
    class Drop(Callback):
        order = 5
        def before_batch(self):
            if self.training and self.iter==2: raise CancelBatchException()
    seen = Seen()
    learn = stream_learner(stream_loaders(xs, ys, bs=3, shuffle=False), stateful(rnn, head), cbs=[Drop(), seen])
    blocks = list(learn.dls.train.layout(7))
    fit(learn, 1, 0.)
    state,expected = {},[]
    for k,b in enumerate(blocks):
        if k==2: continue
        for s,a,n in zip(b.seq, b.start, b.n):
            if n:
                with torch.no_grad(): out,state[s] = rnn(xs[s][None,a:a+n], state.get(s))
                expected.append(head(out)[0])
    torch.testing.assert_close(torch.cat(seen.preds), torch.cat(expected).detach(), rtol=0, atol=1e-6)


# Numbers of an epoch

def test_losses_and_metrics_are_means_over_real_steps():
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head()
    learn = stream_learner(stream_loaders(xs, ys, n_valid=4), stateful(rnn, head), metrics=[fun_rmse, rmse, mae],
                           loss_func=nn.MSELoss())
    learn.recorder.train_metrics = True
    fit(learn, 1, 0.)
    names,values = list(learn.recorder.metric_names)[1:-1],list(learn.recorder.log)[1:-1]
    train,valid = (torch.cat([(p-y) for p,y in zip(alone(rnn, head, xs[:n]), ys[:n])]).double().numpy() for n in (None,4))
    by_name = dict(zip(names, values))
    for split,e in (('train',train), ('valid',valid)):
        expected = {'loss': (e**2).mean(), 'fun_rmse': (e**2).mean()**.5, '_rmse': (e**2).mean()**.5, 'mae': abs(e).mean()}
        for k,v in expected.items():
            if (split,k)!=('train','loss'): assert by_name[f'{split}_{k}']==pytest.approx(v, abs=1e-6), (split,k) # the training loss is smoothed
    assert len(learn.dls.train)==len(learn.recorder.losses)


@untaught_on_purpose
@pytest.mark.parametrize('n_skip', [0, 9])
def test_gradient_accumulation_counts_steps(n_skip):
    "The gradient of a step is the sum over all real steps since the last one, divided by `n_acc`"
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head(nn.GRU)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*not longer than n_skip')
        learn = stream_learner(stream_loaders(xs, ys, shuffle=False), stateful(rnn, head), cbs=GradientAccumulation(40),
                               n_skip=n_skip, opt_func=sgd)
        fit(learn, 1, .1)
    params = [*rnn.parameters(), *head.parameters()]
    opt,count,states = torch.optim.SGD(params, lr=.1),0,{}
    for step in stream_by_hand(LENGTHS, 3, 7, range(len(xs))):
        losses = []
        for i,a,b in filter(None, step):
            out,h = rnn(xs[i][None,a:b], states.get(i))
            states[i] = h.detach()
            losses.append((head(out)[0]-ys[i][a:b]).abs()[max(n_skip-a, 0):])
        losses = torch.cat(losses)
        if not len(losses): continue
        (losses.sum()/40).backward()
        count += len(losses)
        if count>=40:
            opt.step()
            opt.zero_grad()
            count = 0
    for a,b in zip(learn.model.parameters(), params, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_smoothed_training_loss_counts_steps():
    "... and is what fastai smooths, if all blocks are full"
    xs,ys = sequences([7, 7, 30, 2, 40, 3])
    rnn,head = recurrent_and_head()
    learn = stream_learner(stream_loaders(xs, ys, bs=2), stateful(rnn, head), cbs=(seen := Seen()))
    fit(learn, 1, 0.)
    losses,weights = [],[]
    for preds in seen.preds:
        n = len(preds)
        targets = torch.stack([ys[s][t] for s,t in seen.steps[:n]])
        del seen.steps[:n]
        losses.append((preds-targets).abs().mean().item()); weights.append(n)
    beta = learn.recorder.beta if hasattr(learn.recorder, 'beta') else .98
    w = [k*beta**(len(weights)-1-i) for i,k in enumerate(weights)]
    expected = sum(a*b for a,b in zip(w, losses))/sum(w)
    assert learn.recorder.values[-1][0]==pytest.approx(expected, abs=1e-6)
    full = [stream_loaders(*sequences([28]*4), bs=2) for _ in range(2)]
    by_steps,plain = stream_learner(full[0], stateful(rnn, head)),stream_learner(full[1], stateful(rnn, head))
    fit(by_steps, 1)
    plain.dls = DataLoaders(*(TbpttDL(SequenceWindows(*sequences([28]*4)), bs=2, sub_seq_len=7, num_workers=0) for _ in range(2)))
    fit(plain, 1)
    assert type(by_steps.recorder.smooth_loss).__name__=='StepSmoothLoss' and type(plain.recorder.smooth_loss).__name__=='AvgSmoothLoss'


def test_a_row_that_has_ended_cannot_spoil_the_gradient():
    "Its state would grow on padding beyond all bounds"
    torch.manual_seed(0)
    rnn,head = nn.RNN(2, 2, nonlinearity='relu', batch_first=True),nn.Linear(2, 1)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(2))
        rnn.weight_hh_l0.copy_(torch.eye(2)*1.3)
        rnn.bias_hh_l0.fill_(.1)
    xs,ys = sequences([5, 600])
    xs[1] = xs[1]-3 # keeps this one small
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.head = copy.deepcopy(rnn),copy.deepcopy(head)
        def forward(self, x): return self.head(self.rnn(x)[0])
    for model in (stateful(rnn, head), Plain()):
        learn = stream_learner(stream_loaders(xs, ys, bs=2, sub_seq_len=100, shuffle=False), model)
        fit(learn, 1, 1e-6)
        assert all(p.isfinite().all() for p in learn.model.parameters())


def test_the_layout_is_made_once_for_a_run(monkeypatch):
    xs,ys = sequences([30]*20)
    made = []
    class Counted(Layout):
        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, **kwargs)
    monkeypatch.setattr('tbptt_fastai.loaders.streams.Layout', Counted)
    few,many = [],[]
    for n,count in ((4, few), (20, many)):
        learn = stream_learner(stream_loaders(xs[:n], ys[:n]), stateful(*recurrent_and_head(nn.GRU)))
        made.clear()
        fit(learn, 1)
        count.append(len(made))
    assert few==many


def test_predictions_fetched_within_a_fit_are_those_of_each_sequence_alone():
    xs,ys = sequences(LENGTHS)
    rnn,head = recurrent_and_head()
    fetch = FetchPredsCallback(ds_idx=1)
    learn = stream_learner(stream_loaders(xs, ys), stateful(rnn, head), cbs=fetch)
    fit(learn, 1, 0.)
    torch.testing.assert_close(fetch.preds[0], torch.cat(alone(rnn, head, xs)), rtol=0, atol=1e-6)
    assert 'all_batches' not in vars(learn)


# What is shown, saved, copied

def test_a_learner_on_streams_shows_exports_and_predicts_the_same(tmp_path):
    xs,ys = sequences(LENGTHS)
    learn = stream_learner(stream_loaders(xs, ys), stateful(*recurrent_and_head()))
    fit(learn, 1)
    x,y = learn.dls.one_batch()
    assert x.shape==(3,7,2) and y.shape==(3,7,1)
    learn.dls.show_batch(max_n=2)
    with learn.no_bar():
        learn.show_results(max_n=2)
        expected = learn.get_preds()[0]
    learn.export(tmp_path/'learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    with loaded.no_bar():
        test = loaded.dls.test_dl(Sequences(xs))
        torch.testing.assert_close(loaded.get_preds(dl=test)[0], expected)
    dl = pickle.loads(pickle.dumps(learn.dls.valid))
    assert len(dl)==len(learn.dls.valid)
    assert learn.dls.train.new(bs=2).bs==2 and learn.dls.train.new().sub_seq_len==7


def test_one_batch_has_no_padding():
    xs,ys = sequences([20, 3, 30, 7])
    x,y = stream_loaders(xs, ys, bs=4, shuffle=False).one_batch()
    assert x.shape==(3,7,2) and not (x==0).any()


def test_new_data_of_one_length_is_predicted_whole():
    xs,ys = sequences(LENGTHS)
    dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), bs=3, sub_seq_len=7)
    assert isinstance(dls.train, StreamDL)
    assert len(dls.train)==len(dls.valid)==len(list(dls.valid.sub_windows())) and next(iter(dls.valid.sub_windows()))[0].shape==(3,7,2)
    learn = stream_learner(dls, stateful(*recurrent_and_head()))
    with learn.no_bar():
        expected = learn.get_preds()[0]
        pred,*_ = learn.predict(xs[2])
        torch.testing.assert_close(pred, dls.valid.by_sequence(expected)[2], rtol=0, atol=1e-6)
        many = learn.get_preds(dl=dls.test_dl(xs))[0] # of unequal length
        torch.testing.assert_close(many, expected, rtol=0, atol=1e-6)


# What is refused

def test_what_makes_no_stream_is_refused_by_name():
    xs,ys = sequences(LENGTHS)
    ds = Sequences(xs, ys)
    for match,make in {
        'reads Sequences or SequenceWindows, not a list': lambda: StreamDL([(1,2)], bs=2),
        'num_workers is 2': lambda: StreamDL(ds, num_workers=2),
        'drop_last is True': lambda: StreamDL(ds, drop_last=True),
        'sub_seq_len is 47, but the longest sequence has 46': lambda: StreamDL(ds, sub_seq_len=47),
        'bs is 0': lambda: StreamDL(ds, bs=0),
        'reads sub-windows, not items': lambda: StreamDL(ds, after_item=lambda o: o),
        'n_skip is 46, the longest': lambda: stream_learner(stream_loaders(xs, ys), stateful(*recurrent_and_head()),
                                                            n_skip=46),
        '2 sequences and 3 groups': lambda: Sequences(xs[:2], groups=list('abc')),
        'n is given, but a StreamDL reads all': lambda: StreamDL(ds, n=3),
        'get_idxs is given': lambda: StreamDL(ds, get_idxs=lambda: [0]),
        'y is None': lambda: SequenceDataLoaders.from_arrays(xs, None),
        'give win_sz as well': lambda: SequenceDataLoaders.from_arrays(xs, ys, stp_sz=3),
        'bidirectional': lambda: stream_learner(stream_loaders(xs, ys),
                                                nn.LSTM(2, 1, bidirectional=True, batch_first=True)),
    }.items():
        with pytest.raises((ValueError,TypeError), match=match): make()
    with pytest.warns(UserWarning, match=r'2 of 7 sequences are not longer than n_skip=12.*\[4, 5\]'):
        stream_learner(stream_loaders(xs, ys), stateful(*recurrent_and_head()), n_skip=12)


def test_a_model_that_resets_all_rows_only_needs_as_many_rows_as_sequences():
    xs,ys = sequences(LENGTHS)
    with pytest.raises(ValueError, match=r'reset\(\) of OwnState resets all rows'):
        stream_learner(stream_loaders(xs, ys), OwnState(*recurrent_and_head(nn.GRU)))
    with pytest.raises(ValueError, match=r'reset\(\) of OwnState resets all rows'):
        # validation goes by sub-windows
        stream_learner(stream_loaders(xs, ys), OwnState(*recurrent_and_head(nn.GRU)), sub_seq_len=None)
    learn = stream_learner(stream_loaders(xs, ys, bs=7), OwnState(*recurrent_and_head(nn.GRU)))
    with pytest.raises(ValueError, match=r'reset\(\) of OwnState resets all rows'), learn.no_bar(): learn.get_preds(dl=learn.dls.valid.new(bs=3))
    # as many rows as sequences
    learn = stream_learner(stream_loaders(xs, ys, bs=7), OwnState(*recurrent_and_head(nn.GRU)))
    rnn,head = recurrent_and_head(nn.GRU)
    fit(learn, N_EPOCH)
    train_stream(rnn, head, xs, ys, permutations(len(xs), N_EPOCH, SEED), 7, 7, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)
    with learn.no_bar(): torch.testing.assert_close(learn.get_preds()[0], torch.cat(alone(rnn, head, xs)), rtol=0, atol=1e-6)


def test_a_learner_without_the_callback_is_warned():
    xs,ys = sequences(LENGTHS)
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.rnn = nn.GRU(2, 1, batch_first=True)
        def forward(self, x): return self.rnn(x)[0]
    with pytest.warns(UserWarning, match='A Learner needs a TbpttResetCB'):
        fit(Learner(stream_loaders(xs, ys), Plain(), loss_func=nn.L1Loss()), 1)


def test_validation_sequences_have_names_of_their_own():
    xs,ys = sequences([20, 30, 12])
    dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), groups=list('abc'), sub_seq_len=7)
    assert dls.train_ds.groups==list('abc') and dls.valid_ds.groups==[0,1,2]
    dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs[:2], ys[:2]), groups=list('abc'), valid_groups=list('cb'), sub_seq_len=7)
    assert dls.valid_ds.groups==list('cb')
    assert SequenceDataLoaders.from_arrays(xs, ys, groups=list('abc'), sub_seq_len=7).valid_ds.groups==list('abc')
    ds = Sequences(xs, ys)
    dls = SequenceDataLoaders.from_sequences(ds, ds, sub_seq_len=7)
    assert (dls.train_ds.split_idx,dls.valid_ds.split_idx,ds.split_idx)==(0,1,None)


def test_saved_first_states_are_those_of_their_groups():
    a,b = (learned_state(nn.GRU(2, 3), groups) for groups in (['x','y'], ['y','x']))
    a.load_state_dict(learned_state(nn.GRU(2, 3), ['x','y']).state_dict())
    with pytest.raises(ValueError, match=r"groups \['x', 'y'\], not of \['y', 'x'\]"): b.load_state_dict(a.state_dict())


@untaught_on_purpose
def test_mixup_draws_once_for_windows_of_a_stream():
    "... also if their first sub-windows have no loss"
    u = torch.randn(120, 2)
    ds = SequenceWindows(u, u[:,:1], win_sz=30)
    drawn = []
    for n_skip in (0, 16):
        dl = StreamDL(ds, bs=2, sub_seq_len=8)
        note = Callback(after_pred=lambda self: drawn.append(self.learn.mix_up.lam[:1].tolist()) if self.training else None)
        learn = stream_learner(DataLoaders(dl, dl), stateful(*recurrent_and_head(nn.GRU)), n_skip=n_skip,
                               cbs=[once_per_window(MixUp()), note])
        fit(learn, 1)
    first,second,third,fourth = drawn[:4],drawn[4:8],drawn[8:10],drawn[10:]
    for window in (first, second, third, fourth): assert all(o==window[0] for o in window)
    assert first[0]!=second[0] and third[0]!=fourth[0] and len(fourth)==2


def test_what_a_stream_cannot_do_is_refused_in_use():
    xs,ys = sequences(LENGTHS)
    learn = stream_learner(stream_loaders(xs, ys), stateful(*recurrent_and_head()))
    with learn.no_bar():
        with pytest.raises(ValueError, match='leave out with_input'): learn.get_preds(with_input=True)
        with pytest.raises(ValueError, match='evaluated in sub-windows by itself'): learn.validate(cbs=SubWindowEvalCB(3))
        with (pytest.raises(ValueError, match='begin their sequences at different times'),
              learn.added_cbs(once_per_window(MixUp()))): fit(learn, N_EPOCH)
    class LastOnly(nn.Module):
        def __init__(self): super().__init__(); self.rnn = nn.GRU(2, 1, batch_first=True)
        def forward(self, x): return self.rnn(x)[0][:,-1]
    error = r'predictions and targets for every step, \(3, 7, ...\), not of shape \(3, 1\)'
    with pytest.raises(TypeError, match=error):
        fit(stream_learner(stream_loaders(xs, ys), LastOnly()), N_EPOCH)


def test_a_sequence_may_begin_inside_a_sub_window():
    "A row: 35 steps of a, 90 of b; sub-windows of 60 in blocks of 20, so that b begins in the middle of the first, after a padding of 5"
    rng = np.random.default_rng(0)
    a,b = (rng.normal(size=(n, 2)).astype(np.float32) for n in (35, 90))
    data = Sequences([a, b], [o[:,:1]**2 for o in (a, b)])
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict(dict(rnn=StatefulRNN(nn.GRU(2, 4, batch_first=True)), lin=nn.Linear(4, 1)))
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = net()
        def forward(self, x): return self.parts.lin(self.parts.rnn(x))
    dl = StreamDL(data, bs=1, sub_seq_len=60)
    learn = Learner(DataLoaders(dl, dl), Net(), nn.L1Loss(), opt_func=sgd, cbs=TbpttResetCB('dls', truncation=Fixed(60, block=20)))
    fit(learn, 1, .1)
    first,second = ('b','a') if str(dl.layout(20).rows[0][0])=='1' else ('a','b')
    assert first=='a' # rows keep the order of the sequences
    parts,opt = net(),None
    opt = torch.optim.SGD(parts.parameters(), lr=.1)
    steps,state = [[(a, 0, 35), (b, 0, 20)], [(b, 20, 80)], [(b, 80, 90)]],None
    for segments in steps:
        errors = []
        for seq,start,stop in segments:
            x = torch.tensor(seq[start:stop])[None]
            out,state = parts.rnn.rnn(x, None if start==0 else state.detach())
            errors.append((parts.lin(out)-x[...,:1]**2).abs())
        opt.zero_grad()
        (torch.cat(errors, 1).sum()/60).backward()
        opt.step()
    for p,q in zip(learn.model.parameters(), parts.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

@pytest.mark.parametrize('block,said', [(25, 'a half or a quarter'), (0, 'block is 0'), (120, 'a part of it')])
def test_blocks_are_parts_of_a_sub_window(block, said):
    with pytest.raises(ValueError, match=said): Fixed(60, block=block)

def reads_of(dl, monkeypatch):
    "Numbers of each read of the data from here on"
    sizes,read = [],dl.dataset.read
    def noted(*args):
        batch = read(*args)
        sizes.append(sum(o.numel() for o in batch))
        return batch
    monkeypatch.setattr(dl.dataset, 'read', noted, raising=False)
    return sizes

@pytest.mark.parametrize('kind', ['real','classes'])
@pytest.mark.parametrize('bs,part', [(1,None), (3,None), (7,None), (2,(0,3)), (2,(2,3)), (4,(1,2))])
def test_small_blocks_that_are_read_together_have_the_steps_of_each(monkeypatch, kind, bs, part):
    "... and zeros where a row has none, also up to the width of the rows of other processes"
    xs,ys = sequences(LENGTHS)
    if kind=='classes': ys = [(10*y[:,0]).long() for y in ys]
    dl = StreamDL(Sequences(xs, ys), bs=bs, sub_seq_len=7, device='cpu')
    sizes,n_blocks = reads_of(dl, monkeypatch),0
    for block,batch in dl.read_blocks(dl.layout(7, part=part and Part(*part))):
        expected = [o[0].new_zeros(len(block.seq), block.steps, *o[0].shape[1:]) for o in (xs, ys)]
        for row,(i,a,n) in enumerate(zip(block.seq, block.start, block.n)):
            for out,seqs in zip(expected, (xs, ys)): out[row,:n] = seqs[i][a:a+n]
        for o,e in zip(batch, expected, strict=True): assert torch.equal(o, e) and o.dtype==e.dtype
        n_blocks += 1
    assert n_blocks==len(dl.layout(7, part=part and Part(*part)))>=7 and len(sizes)<n_blocks/2

def test_a_process_that_has_nothing_left_reads_padding():
    "... also where all that it reads together is padding"
    x = torch.ones(700, 100)
    dl = StreamDL(Sequences([x, x[:10]]), bs=1, sub_seq_len=7, device='cpu')
    batches = [x for _,(x,) in dl.read_blocks(dl.layout(7, part=Part(1, 2)))]
    assert [tuple(o.shape) for o in batches]==[(1, 7, 100)]*100
    assert [int(o.sum()) for o in batches]==[700,300]+[0]*98

def test_blocks_that_are_read_together_are_in_memory_of_their_own(monkeypatch):
    "A model may change its input in place, and a block that is kept keeps no others"
    xs,ys = sequences(LENGTHS)
    dl,bias = StreamDL(Sequences(xs, ys), bs=3, sub_seq_len=7, device='cpu'),nn.Parameter(torch.ones(2))
    sizes,losses = reads_of(dl, monkeypatch),[]
    for block,(x,_) in dl.read_blocks(dl.layout(7)):
        seq,start,n = block.seq[1],block.start[1],block.n[1]
        assert torch.equal(x[1,:n], xs[seq][start:start+n]) and not x.requires_grad
        assert x.untyped_storage().nbytes()==4*x.numel()
        x += bias
        losses.append((x**2).sum())
    sum(losses).backward()
    assert len(sizes)<len(losses) and bias.grad is not None

@pytest.mark.parametrize('channels,together', [(1, 16), (10, 3), (100, 1), (5000, 1)])
def test_what_is_read_together_is_bounded(monkeypatch, channels, together):
    x = np.zeros((320, channels), np.float32)
    dl = StreamDL(Sequences([x]*100), bs=100, sub_seq_len=10)
    sizes = reads_of(dl, monkeypatch)
    blocks = list(dl.read_blocks(dl.layout(10)))
    of_one = 100*10*channels
    assert len(blocks)==32 and sum(sizes)==32*of_one
    assert together*of_one<=max(sizes)<=2**15+of_one

def test_a_transform_sees_each_block_by_itself():
    seen = []
    def noted(x):
        seen.append(tuple(x.shape))
        return x
    xs,_ = sequences(LENGTHS)
    dl = StreamDL(Sequences(xs), bs=3, sub_seq_len=7, after_batch=noted)
    blocks = [block for block,_ in dl.read_blocks(dl.layout(7))]
    assert seen==[(3, block.steps, 2) for block in blocks]

def test_each_block_of_those_read_together_is_pinned(monkeypatch):
    "... by itself, so that it is copied to the device while the next one is in use"
    pinned,pin = [],lambda o: pinned.append(o.clone()) or pinned[-1]
    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin)
    xs,ys = sequences(LENGTHS)
    dl = StreamDL(Sequences(xs, ys), bs=3, sub_seq_len=7, pin_memory=True)
    sizes = reads_of(dl, monkeypatch)
    batches = [batch for _,batch in dl.read_blocks(dl.layout(7))]
    assert len(sizes)<len(batches) and len(pinned)==2*len(batches)
    for o,p in zip([o for batch in batches for o in batch], pinned): assert o is p
