"A state that is estimated from the past: an independent loop, step by step, and every way that a model is run"
from copy import deepcopy
import warnings
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import LRFinder
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from tbptt_fastai.deploy.onnx import past_to_onnx, to_onnx
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.instruments import diagnose, find # noqa: with them come check_memory_grads and tbptt_find
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.layout import Layout
from tbptt_fastai.loaders.shared import BlockPart, Part
from tbptt_fastai.models.memories import LRU, WorkingMemory
from tbptt_fastai.models.sequence import SequenceRNN, Standardize
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.state.encoded import EncodedState, Past, n_past_of
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.training.finite import FiniteCB
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased
from helpers import adam, fit, sgd, untaught_on_purpose
from reference import stream_by_hand

pytestmark = untaught_on_purpose # some of an n_skip longer than the past and than a sub-window

TOL = dict(rtol=1e-10, atol=1e-10)


# The models, and how the numbers of an encoder are a state of theirs, written out

def lstm_state(n, carried): return tuple(o.view(len(n), 2, 3).transpose(0, 1).contiguous() for o in (n[:,:6], n[:,6:]))
def gru_state(n, carried): return n[None].contiguous()
def memory_state(n, carried): return dict(slots=n.view(-1, 3, 2), age=carried['age'])
def lru_state(n, carried): return torch.complex(n[:,0::2], n[:,1::2])
def cell_state(n, carried): return n[:,:3],n[:,3:]

class Wrapped(nn.Module):
    "A state of a user's: a list in a dict, batch in other dimensions, and a number"
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)
    def initial_state(self, bs, device, dtype):
        return dict(parts=[torch.zeros(bs, 3, device=device, dtype=dtype), 7], peak=torch.zeros(2, bs, device=device, dtype=dtype))
    def forward(self, x, state):
        out,h = self.rnn(x, state['parts'][0][None])
        peak = .9*state['peak']+out[:,-1,:2].T.tanh()
        return out+.1*peak.T.sum(1)[:,None,None],dict(parts=[h[0], 7], peak=peak)

def wrapped_state(n, carried): # `peak` is of a call, so it is not looked at where sub-windows are run in other pieces
    return dict(parts=[n[:,:3], 7], peak=n[:,3:].T)

KINDS = dict(
    lstm=(lambda: nn.LSTM(2, 3, 2, batch_first=True), None, lstm_state), gru=(lambda: nn.GRU(2, 3, batch_first=True), None, gru_state),
    memory=(lambda: WorkingMemory(2, 3, slots=3, n_mem=2), None, memory_state), lru=(lambda: LRU(2, 3, 4), None, lru_state),
    cell=(lambda: Unroll(nn.LSTMCell(2, 3)), None, cell_state))

class Net(nn.Module):
    def __init__(self, kind='lstm', n_past=5, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        make,batch_dim,self.as_state = KINDS[kind]
        self.rnn = StatefulRNN(make(), batch_dim, initial=EncodedState(n_past, 2, 1, hidden=4, **kwargs))
        self.head = nn.Linear(3, 1)
        self.double()
    def forward(self, x): return self.head(self.rnn(x))
    def encoded(self, x, y, carried):
        "By hand: the state after the past"
        flat,enc = torch.cat([x, y], 2).flatten(1),self.rnn.initial.encoder
        numbers = flat@enc.linear.weight.T+enc.linear.bias+enc.net[2](torch.tanh(enc.net[0](flat)))
        return self.as_state(numbers, carried)

def items(n=10, steps=30, seed=1):
    g = torch.Generator().manual_seed(seed)
    def draw(c): return torch.randn(n, steps, c, generator=g, dtype=torch.float64)
    return list(zip(draw(2), draw(1)))

def loaders(its=None, valid=None, bs=4):
    its = its or items()
    return DataLoaders(TfmdDL(its, bs=bs, num_workers=0), TfmdDL(valid or its[:7], bs=bs, num_workers=0))

def grads_of(model): return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

class Record(Callback):
    "Loss and gradients of each training step"
    order = 70
    def __init__(self): self.steps = []
    def before_step(self): self.steps.append((self.loss_grad.item(), grads_of(self.model)))

def learner(model, dls=None, sub=12, cbs=(), **kwargs):
    set_seed(0)
    truncation = None if sub is None or isinstance(sub, int) else sub
    sub = dict(truncation=truncation) if truncation else dict(sub_seq_len=sub)
    kwargs = {**dict(loss_func=nn.MSELoss(), opt_func=adam), **kwargs}
    return TbpttLearner(dls or loaders(), model, cbs=[Record(), *cbs] if not any(isinstance(o, Record) for o in cbs) else cbs, **sub, **kwargs)


# The loop by hand

def detached(state): return torch.utils._pytree.tree_map(lambda o: o.detach() if isinstance(o, torch.Tensor) else o, state)

def train_by_hand(model, batches, plan, n_past, n_skip=0, lr=1e-2, n_epoch=2):
    """Step by step; `plan` has `(start, stop, first step whose loss counts)` of each sub-window. A state is that which the model
    had when it was last at that step, and at `n_past` what the encoder makes of the steps before"""
    opt,res,washed = torch.optim.Adam(model.parameters(), lr=lr),[],max(n_skip, n_past)
    most = max(stop-max(first, min(washed, stop)) for _,stop,first in plan)
    for _ in range(n_epoch):
        for x,y in batches:
            seen = {0: None}
            for start,stop,first in plan:
                first,state,out,new = max(first, washed),seen[start],[],{}
                with torch.set_grad_enabled(first<stop):
                    for t in range(start, stop):
                        if t==n_past: state = model.encoded(x[:,:t], y[:,:t], state)
                        o,state = model.rnn.rnn(x[:,t:t+1], state)
                        new[t+1] = detached(state)
                        out.append(model.head(o))
                seen.update(new)
                if first>=stop: continue
                loss = F.mse_loss(torch.cat(out[first-start:], 1), y[:,first:stop])*((stop-first)/most)
                loss.backward()
                res.append((loss.item(), grads_of(model)))
                opt.step()
                opt.zero_grad()
    return res

def check_same(learn, model, steps):
    "Loss and every gradient of every step, and all parameters at the end"
    found = learn.record.steps
    assert len(found)==len(steps)>0
    for (loss,grads),(expected,others) in zip(found, steps):
        assert loss==pytest.approx(expected, rel=1e-10, abs=1e-10)
        for (name,p),a,b in zip(model.named_parameters(), grads, others, strict=True):
            a,b = (torch.zeros_like(p) if o is None else o for o in (a,b))
            torch.testing.assert_close(a, b, **TOL, msg=name)
    for (name,p),q in zip(learn.model.named_parameters(), model.parameters()): torch.testing.assert_close(p, q, **TOL, msg=name)

def batches(its=None, bs=4):
    its = its or items()
    return [tuple(torch.stack(o) for o in zip(*its[i:i+bs])) for i in range(0, len(its), bs)]

FIXED = [(0, 12, 0), (12, 24, 12), (24, 30, 24)]

def overlap(k1, k2, steps=30):
    stops = [*range(k1, steps, k1), steps]
    return [(max(b-k2, 0), b, a) for a,b in zip([0, *stops], stops)]


# Windows

@pytest.mark.parametrize('n_past', [1, 5, 11, 12, 13, 24, 29])
@pytest.mark.parametrize('kind', KINDS)
def test_sub_windows_are_the_loop_by_hand(kind, n_past):
    model = Net(kind, n_past)
    other = deepcopy(model)
    learn = fit(learner(model), 2)
    check_same(learn, other, train_by_hand(other, batches(), FIXED, n_past))

@pytest.mark.parametrize('n_past,n_skip', [(5,8), (5,12), (5,20), (12,20), (8,5), (13,27)])
def test_a_washout_beside_it_is_the_longer_of_both(n_past, n_skip):
    model = Net(n_past=n_past)
    other = deepcopy(model)
    learn = fit(learner(model, n_skip=n_skip), 2)
    check_same(learn, other, train_by_hand(other, batches(), FIXED, n_past, n_skip))

@pytest.mark.parametrize('n_past', [3, 7, 8, 16, 25])
@pytest.mark.parametrize('k1,k2', [(8,16), (8,20), (7,30), (4,4)])
def test_overlapping_sub_windows_are_the_loop_by_hand(k1, k2, n_past):
    model = Net(n_past=n_past)
    other = deepcopy(model)
    learn = fit(learner(model, sub=Overlap(k1, k2)), 2)
    check_same(learn, other, train_by_hand(other, batches(), overlap(k1, k2), n_past))

@pytest.mark.parametrize('n_past', [3, 6, 12, 25])
@pytest.mark.parametrize('sub', [Exact(6), Exact(), None])
@pytest.mark.parametrize('kind', ['lstm','memory'])
def test_whole_windows_are_the_loop_by_hand(kind, sub, n_past):
    model = Net(kind, n_past)
    other = deepcopy(model)
    learn = fit(learner(model, sub=sub), 2)
    check_same(learn, other, train_by_hand(other, batches(), [(0, 30, 0)], n_past))

def scaled(state, f): return torch.utils._pytree.tree_map(lambda o: o.detach()+f*(o-o.detach()), state)

@pytest.mark.parametrize('n_past', [1, 4, 10])
def test_random_cuts_are_the_loop_by_hand(n_past):
    plans = []
    class Plans(Callback):
        order = 60
        def before_step(self): plans.append((self.iter, self.learn.dl.sub_window))
    model = Net(n_past=n_past)
    other = deepcopy(model)
    learn = fit(learner(model, sub=RandomUnbiased(8, block=2), opt_func=sgd, cbs=[Plans()]), lr=.1)
    opt,steps,x,left = torch.optim.SGD(other.parameters(), lr=.1),[],None,iter(batches())
    for _,o in plans:
        if o.loss_start<=n_past: # a new window; sub-windows before it have no loss
            (x,y),state = next(left),None
        cuts,out = dict(o.cuts),[]
        for t in range(0 if o.loss_start<=n_past else o.start, o.stop):
            if t in cuts and t!=n_past: state = scaled(state, cuts[t])
            if t==n_past: state = other.encoded(x[:,:t], y[:,:t], state)
            out_t,state = other.rnn.rnn(x[:,t:t+1], state)
            if t>=max(o.loss_start, n_past): out.append(other.head(out_t))
        state = detached(state)
        loss = F.mse_loss(torch.cat(out, 1), y[:,o.stop-len(out):o.stop])*o.weight
        loss.backward()
        steps.append((loss.item(), grads_of(other)))
        opt.step()
        opt.zero_grad()
    assert next(left, None) is None
    check_same(learn, other, steps)

def test_the_gradient_goes_back_to_the_encoder():
    learn = fit(learner(Net()), 1)
    named = [name for name,_ in learn.model.named_parameters()]
    first,second = (dict(zip(named, grads)) for _,grads in learn.record.steps[:2])
    for name in named:
        if 'encoder' not in name: continue
        assert first[name].abs().max()>1e-6
        assert second[name] is None or not second[name].any() # the next sub-window starts from a state that is cut off

def test_a_gradient_goes_no_further_back_than_to_the_encoder():
    "The steps of the past are run for what is carried besides, and here for nothing"
    seen = []
    class Spy(Net):
        def forward(self, x):
            seen.append((x.shape[1], torch.is_grad_enabled()))
            return super().forward(x)
    learn = learner(Spy(), check=False)
    fit(learn, 1)
    assert seen[:4]==[(5,False), (7,True), (12,True), (6,True)]

class Two(nn.Module):
    "One state is estimated, the other carried"
    def __init__(self, n_past):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b = nn.GRU(2, 3, batch_first=True),nn.GRU(3, 3, batch_first=True)
        self.rnn = StatefulRNN(self.a, initial=EncodedState(n_past, 2, 1, hidden=4))
        self.head = nn.Linear(3, 1)
        self.double()
    def forward(self, x): return self.head(self.b(self.rnn(x))[0])

@pytest.mark.parametrize('n_past', [5, 12, 13])
def test_a_layer_beside_it_is_carried_over_the_past_with_its_gradient(n_past):
    model = Two(n_past)
    other = deepcopy(model)
    learn = fit(learner(model), 1)
    opt,enc = torch.optim.Adam(other.parameters(), lr=1e-2),other.rnn.initial.encoder
    for x,y in batches():
        h = g = None
        for start,stop,_ in FIXED:
            outs = []
            for t in range(start, stop):
                if t==n_past: h = enc(torch.cat([x, y], 2)[:,:t])[None]
                o,h = other.a(x[:,t:t+1], h)
                o,g = other.b(o, g)
                outs.append(other.head(o))
            h,g,first = h.detach(),g.detach(),max(start, n_past)
            if first>=stop: continue
            most = max(b-max(a, n_past) for a,b,_ in FIXED)
            (F.mse_loss(torch.cat(outs, 1)[:,first-start:], y[:,first:stop])*((stop-first)/most)).backward()
            opt.step()
            opt.zero_grad()
    for (name,p),q in zip(model.named_parameters(), other.named_parameters()): torch.testing.assert_close(p, q[1], **TOL, msg=name)


# Streams

LENGTHS = [31, 25, 45, 24, 22]

def sequences(lengths=LENGTHS, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, c, generator=g, dtype=torch.float64) for n in lengths] for c in (2, 1)]

def stream_loaders(xs, ys, sub, bs=2, **kwargs):
    set_seed(0)
    return SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), sub_seq_len=sub, bs=bs, shuffle=False, dtype=torch.float64, **kwargs)

def stream_learner(model, dls, **kwargs):
    return TbpttLearner(dls, model, loss_func=nn.MSELoss(), opt_func=sgd, cbs=Record(), **kwargs)

def train_stream_by_hand(model, xs, ys, bs, size, runs, weigh, n_past, n_skip=0):
    "Each row alone, step by step. `runs`: first block, one past the last, first block whose losses count, block that the next starts from"
    opt,res,washed = torch.optim.SGD(model.parameters(), lr=.1),[],max(n_past, n_skip)
    steps = stream_by_hand([len(x) for x in xs], bs, size, range(len(xs)))
    state = [None]*len(steps[0])
    for lo,hi,first,carry in runs(len(steps)):
        counted = sum(max(b-max(a, washed), 0) for k in range(first, hi) for _,a,b in filter(None, steps[k]))
        preds,targets,kept = [],[],list(state)
        for row,s in enumerate(state):
            for k in range(lo, hi):
                if k==carry: kept[row] = detached(s)
                if steps[k][row] is None: continue
                i,a,b = steps[k][row]
                if a==0: s = None
                for t in range(a, b):
                    with torch.set_grad_enabled(counted>0):
                        if t==n_past: s = model.encoded(xs[i][None,:t], ys[i][None,:t], s)
                        o,s = model.rnn.rnn(xs[i][None,t:t+1], s)
                        if k>=first and t>=washed: preds.append(model.head(o)[0]); targets.append(ys[i][t:t+1])
            if carry==hi: kept[row] = detached(s)
        state = kept
        if not counted: continue
        loss = F.mse_loss(torch.cat(preds), torch.cat(targets))*weigh(counted, len(state), washed)
        loss.backward()
        res.append((loss.item(), grads_of(model)))
        opt.step()
        opt.zero_grad()
    return res

def one_by_one(n): return [(k, k+1, k, k+1) for k in range(n)]

def by_most(size):
    def weigh(counted, rows, washed):
        most = max(min(a+size, n)-max(a, min(washed, n)) for n in LENGTHS for a in range(0, n, size))
        return counted/(rows*most)
    return weigh

@pytest.mark.parametrize('n_past,n_skip', [(3,0), (7,0), (3,6), (3,8), (3,12), (7,9)])
@pytest.mark.parametrize('bs', [1, 2, 3, 5])
def test_streams_are_the_loop_by_hand(bs, n_past, n_skip):
    xs,ys = sequences()
    model = Net(n_past=n_past)
    other = deepcopy(model)
    learn = fit(stream_learner(model, stream_loaders(xs, ys, 8, bs), n_skip=n_skip), lr=.1)
    steps = train_stream_by_hand(other, xs, ys, bs, 8, one_by_one, by_most(8), n_past, n_skip)
    check_same(learn, other, steps)

@pytest.mark.parametrize('kind', KINDS)
def test_streams_of_any_state_are_the_loop_by_hand(kind):
    xs,ys = sequences()
    model = Net(kind, 4)
    other = deepcopy(model)
    learn = fit(stream_learner(model, stream_loaders(xs, ys, 8)), lr=.1)
    check_same(learn, other, train_stream_by_hand(other, xs, ys, 2, 8, one_by_one, by_most(8), 4))

@pytest.mark.parametrize('n_past,n_skip', [(3,0), (7,0), (3,10), (3,20)])
@pytest.mark.parametrize('bs', [1, 2, 3])
def test_overlap_on_streams_is_the_loop_by_hand(bs, n_past, n_skip):
    xs,ys = sequences()
    model = Net(n_past=n_past)
    other = deepcopy(model)
    learn = fit(stream_learner(model, stream_loaders(xs, ys, 8, bs), truncation=Overlap(8, 24), n_skip=n_skip), lr=.1)
    def runs(n): return [(max(k-2, 0), k+1, k, max(k-1, 0) if k<n-1 else n) for k in range(n)]
    def weigh(counted, rows, washed): return counted/(8*rows)
    check_same(learn, other, train_stream_by_hand(other, xs, ys, bs, 8, runs, weigh, n_past, n_skip))

def test_whole_sequences_and_exact_schemes_on_streams():
    xs,ys = sequences()
    models = [Net(n_past=6) for _ in range(3)]
    learn = fit(stream_learner(models[0], stream_loaders(xs, ys, None)), lr=.1)
    steps = train_stream_by_hand(models[1], xs, ys, 2, 45, one_by_one, by_most(45), 6)
    check_same(learn, models[1], steps)
    learn = fit(stream_learner(models[2], stream_loaders(xs, ys, None), truncation=Exact(5)), lr=.1)
    check_same(learn, models[1], steps)


def test_processes_run_a_block_in_as_many_pieces():
    "... though a sequence begins in a row of one of them alone"
    layout = Layout(np.array([31, 25, 45, 24, 30]), 4, 8)
    parts = [[BlockPart(o, Part(rank, 2, 'cpu')) for o in layout] for rank in (0, 1)]
    for o in sum(parts, []): o.n_past = 4
    pieces = [[o.pieces(last) for o,last in zip(blocks, [None, *blocks])] for blocks in parts]
    counts = [[len(o) for o in blocks] for blocks in pieces]
    assert counts[0]==counts[1]==[2,1,1,1,2,1,1]
    assert not pieces[0][4][1].past.rows.any() and pieces[1][4][1].past.rows.tolist()==[True,False]


# Evaluation

def predictions(model, x, y, n_past, own=False):
    "Of one window `(time, ...)`"
    with torch.no_grad():
        state,out = None,[]
        for t in range(len(x)):
            if t==n_past and not own: state = model.encoded(x[None,:t], y[None,:t], state)
            o,state = model.rnn.rnn(x[None,t:t+1], state)
            out.append(model.head(o)[0])
    return torch.cat(out)

def mean_absolute(pred, targ): return (pred-targ).abs().mean()

@pytest.mark.parametrize('evaluation', ['past','own'])
@pytest.mark.parametrize('n_skip', [0, 3, 9])
@pytest.mark.parametrize('kind', ['lstm','memory','lru'])
def test_the_numbers_of_an_evaluation_count_from_the_end_of_the_past(kind, n_skip, evaluation):
    model,its = Net(kind, 5, evaluation=evaluation).eval(),items()
    learn = learner(model, loaders(its), n_skip=n_skip, metrics=mean_absolute)
    preds,targets = learn.get_preds()
    own = evaluation=='own'
    expected = torch.stack([predictions(model, x, y, 5, own) for x,y in its[:7]])
    torch.testing.assert_close(preds, expected, **TOL)
    with learn.no_bar(): loss,metric = learn.validate()
    first = n_skip if own else max(n_skip, 5)
    error = expected.numpy()[:,first:]-np.stack([y.numpy() for _,y in its[:7]])[:,first:]
    assert loss==pytest.approx((error**2).mean(), rel=1e-6)
    assert metric==pytest.approx(abs(error).mean(), rel=1e-6)

@pytest.mark.parametrize('evaluation', ['past','own'])
@pytest.mark.parametrize('sub', [8, None])
def test_the_numbers_of_streams(sub, evaluation):
    xs,ys = sequences()
    model = Net(n_past=4, evaluation=evaluation).eval()
    learn = stream_learner(model, stream_loaders(xs, ys, sub), metrics=mean_absolute)
    own = evaluation=='own'
    expected = [predictions(model, x, y, 4, own) for x,y in zip(xs, ys)]
    torch.testing.assert_close(learn.get_preds()[0], torch.cat(expected), **TOL)
    error = np.concatenate([(p-y).numpy()[0 if own else 4:] for p,y in zip(expected, ys)])
    with learn.no_bar(): loss,metric = learn.validate()
    assert loss==pytest.approx((error**2).mean(), rel=1e-6)
    assert metric==pytest.approx(abs(error).mean(), rel=1e-6)

class Evaluate(Callback):
    "In the middle of a training"
    order = 80
    def after_batch(self):
        learn = self.learn
        if not (self.training and self.train_iter in (2, 4)): return
        kept = {k:getattr(learn, k) for k in ('dl','xb','yb','pred','loss','iter','n_iter','training')}
        learn._do_epoch_validate(1)
        for k,v in kept.items(): setattr(learn, k, v)
        learn.model.train()

@pytest.mark.parametrize('evaluation', ['past','own'])
def test_an_evaluation_in_the_middle_leaves_the_training_as_it_is(evaluation):
    models = [fit(learner(Net(evaluation=evaluation), cbs=cbs)).model for cbs in ([], [Evaluate()])]
    for p,q in zip(*(m.parameters() for m in models)): assert torch.equal(p, q)

def test_predictions_fetched_within_a_fit_are_those_of_the_known_past():
    fetch = FetchPredsCallback(ds_idx=1)
    learn = fit(learner(Net(), cbs=[fetch]), lr=0.)
    expected = torch.stack([predictions(learn.model, x, y, 5) for x,y in items()[:7]])
    torch.testing.assert_close(fetch.preds[0], expected, **TOL)

def test_the_steps_that_warm_a_validation_sequence_up_are_its_past():
    xs,ys = sequences([60, 50])
    set_seed(0)
    dls = SequenceDataLoaders.from_arrays(xs, ys, valid_pct=.4, valid_warm_up=10, sub_seq_len=8, bs=2, dtype=torch.float64)
    model = Net(n_past=4).eval()
    preds,_ = stream_learner(model, dls).get_preds()
    expected = [predictions(model, x[-n-10:], y[-n-10:], 4)[10:] for x,y,n in zip(xs, ys, (24, 20))]
    torch.testing.assert_close(preds, torch.cat(expected), **TOL)


# The default model

def signals(n=2000, dtype=np.float32):
    rng = np.random.default_rng(0)
    u = 3+2*rng.standard_normal((n, 2))
    return u.astype(dtype),(10+np.convolve(u[:,0]-3, .9**np.arange(50))[:n,None]).astype(dtype)

def signal_loaders(u, y, **kwargs):
    set_seed(0)
    return SequenceDataLoaders.from_arrays(u, y, **{**dict(win_sz=100, bs=4, sub_seq_len=40, valid_pct=.3), **kwargs})

def test_the_default_model_gives_its_channels_and_scalings_to_the_encoder():
    learn = RNNLearner(signal_loaders(*signals()), 'gru', hidden_size=6, initial=EncodedState(20, hidden=7))
    state = learn.model.rnn.initial
    assert (state.n_in,state.n_out,state.n_state)==(2, 1, 6)
    assert state.scale_x is learn.model.scale_x and state.scale_y is learn.model.scale_y
    x,y = torch.randn(3, 20, 2)*2+3,torch.randn(3, 20, 1)+10
    m,s = learn.model.scale_x,learn.model.scale_y
    flat = torch.cat([(x-m.mean)/m.std, (y-s.mean)/s.std], 2).flatten(1)
    torch.testing.assert_close(state((x,), (y,)), state.encoder.linear(flat)+state.encoder.net(flat))

@pytest.mark.parametrize('time_dim', [0, -1])
def test_where_time_is_in_a_batch_does_not_matter(time_dim):
    def trained(time_dim):
        learn = RNNLearner(signal_loaders(*signals(), time_dim=time_dim), hidden_size=4, initial=EncodedState(13), opt_func=sgd)
        return fit(learn, lr=1e-2)
    a,b = trained(1),trained(time_dim)
    for p,q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert list(a.recorder.values[0])==pytest.approx(list(b.recorder.values[0]), rel=1e-4)

def test_classes_come_as_ones_among_zeros():
    u,_ = signals(1200)
    y = np.array(list('abc'))[(u[:,0]>3).astype(int)+(u[:,1]>3)]
    dls = signal_loaders(u, y, vocab=list('abc'))
    learn = fit(RNNLearner(dls, hidden_size=4, initial=EncodedState(10)))
    state = learn.model.rnn.initial
    assert (state.n_in,state.n_out,state.scale_y)==(2, 3, None)
    x,y = next(iter(learn.tbptt_reset_cb.evaluation_view(dls.valid)))
    flat = torch.cat([learn.model.scale_x(x[:,:10]), torch.eye(3)[y[:,:10].view(len(y), 10)]], 2).flatten(1)
    torch.testing.assert_close(state((x[:,:10],), (y[:,:10],)), state.encoder.linear(flat)+state.encoder.net(flat))
    with pytest.raises(ValueError, match='is class 3; expected one of 3 classes'): state((x[:,:10],), (torch.where(y[:,:10]==2, 3, y[:,:10]),))

def test_an_encoder_of_ones_own_gets_inputs_and_targets():
    class Mean(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.out = nn.Linear(3, n)
        def forward(self, x, y):
            self.seen = x.shape,y.shape
            return self.out(torch.cat([x, y], 2).mean(1))
    mine = Mean(8)
    learn = fit(RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20, encoder=mine)))
    assert mine.seen==((4,20,2), (4,20,1)) or mine.seen[0][1:]==(20,2)
    assert all(p.grad is not None for p in mine.parameters()) and learn.model.rnn.initial.encoder is mine
    with pytest.raises(ValueError, match=r'Mean gives shape .4, 7. for 4 rows; expected .4, 8.*state of a LSTM'):
        fit(RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20, encoder=Mean(7))))

def test_several_inputs_and_one_without_time():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = StatefulRNN(nn.GRU(3, 4, batch_first=True), initial=EncodedState(6, encoder=Encoder())),nn.Linear(4, 1)
        def forward(self, u, v, c): return self.head(self.rnn(torch.cat([u, v, c[:,None].expand(-1, u.shape[1], -1)], 2)))
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6*3+1, 4)
        def forward(self, u, v, c, y):
            assert u.shape==v.shape==y.shape==(len(c), 6, 1)
            return self.out(torch.cat([u.flatten(1), v.flatten(1), y.flatten(1), c], 1))
    torch.manual_seed(0)
    its = [(torch.randn(30, 1), torch.randn(30, 1), torch.randn(1), torch.randn(30, 1)) for _ in range(6)]
    dls = DataLoaders(*[TfmdDL(its, bs=4, num_workers=0, n_inp=3)]*2)
    learn = fit(TbpttLearner(dls, Model(), 10, loss_func=nn.MSELoss()))
    p,_ = learn.get_preds(dl=learn.dls.valid)
    m,(u,v,c,y) = learn.model.eval(),map(torch.stack, zip(*its))
    with torch.no_grad():
        h = m.rnn.initial.encoder(u[:,:6], v[:,:6], c, y[:,:6])[None]
        out,_ = m.rnn.rnn(torch.cat([u, v, c[:,None].expand(-1, 30, -1)], 2)[:,6:], h)
        torch.testing.assert_close(p[:,6:], m.head(out))

def test_a_state_of_any_form_is_made_of_the_numbers():
    module = StatefulRNN(Wrapped(), dict(parts=[0, None], peak=1), initial=EncodedState(4, 2, 1))
    assert module.initial.n_state==5
    past = Past((torch.randn(3, 4, 2),), (torch.randn(3, 4, 1),))
    with Carry(module) as carry:
        module(past.inputs[0])
        before = module.state
        carry.estimate(past._replace(rows=np.array([False,True,False]), inputs=(past.inputs[0][1:2],), targets=(past.targets[0][1:2],)))
        numbers = module.initial(past.inputs, past.targets)
        expected = wrapped_state(numbers, None)
        torch.testing.assert_close(module.slot.state['parts'][0][1], expected['parts'][0][1])
        torch.testing.assert_close(module.slot.state['peak'][:,1], expected['peak'][:,1])
        assert torch.equal(module.slot.state['parts'][0][::2], before['parts'][0][::2]) and module.slot.state['parts'][1]==7
        carry.estimate(past)
        torch.testing.assert_close(module.slot.state['peak'], expected['peak'])
    with Carry(module) as carry: # nothing was run before it
        carry.estimate(past._replace(rows=np.array([False,True,True,False,True])))
        assert module.slot.state['peak'].shape==(2,5) and not module.slot.state['peak'][:,0].any()
        torch.testing.assert_close(module.slot.state['peak'][:,[1,2,4]], expected['peak'])
    with Carry(module) as carry:
        carry.estimate(past)
        torch.testing.assert_close(module.slot.state['parts'][0], expected['parts'][0])

def test_rows_that_were_to_start_over_do_not_where_their_state_is_estimated():
    module,x = StatefulRNN(nn.GRU(2, 3, batch_first=True), initial=EncodedState(4, 2, 1)),torch.randn(3, 6, 2)
    past = Past((torch.randn(3, 4, 2),), (torch.randn(3, 4, 1),))
    expected = module.rnn(x, module.initial(*past[:2])[None])[0]
    zero = module.rnn(x)[0]
    with Carry(module) as carry:
        module(x)
        carry.reset([True,True,False])
        carry.estimate(past)
        torch.testing.assert_close(module(x), expected)
        carry.reset([True,True,False])
        carry.estimate(Past((past.inputs[0][1:],), (past.targets[0][1:],), np.array([False,True,True])))
        out = module(x)
        torch.testing.assert_close(out[1:], expected[1:])
        torch.testing.assert_close(out[0], zero[0])

def test_what_is_said_of_the_channels_goes_before_what_the_model_knows():
    mine = Standardize(5., 7.)
    state = SequenceRNN(2, 1, hidden_size=3, scale_y=Standardize(1., 2.), initial=EncodedState(5, scale_y=mine)).rnn.initial
    assert state.scale_y is mine and (state.n_in,state.n_out)==(2,1)

class Turned(nn.Module):
    "A state that comes back with its parts in another order"
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 3, batch_first=True)
    def initial_state(self, bs, device, dtype): return dict(h=torch.zeros(bs, 3, device=device, dtype=dtype), c=torch.zeros(bs, 3, device=device, dtype=dtype))
    def forward(self, x, state):
        out,(h,c) = self.rnn(x, (state['h'][None], state['c'][None]))
        return out,dict(c=c[0], h=h[0])

def test_the_numbers_have_the_order_of_the_first_state():
    module = StatefulRNN(Turned(), initial=EncodedState(4, 2, 1))
    past = Past((torch.randn(3, 4, 2),), (torch.randn(3, 4, 1),))
    numbers = module.initial(*past[:2])
    for runs_before in (False, True):
        with Carry(module) as carry:
            if runs_before: module(past.inputs[0])
            carry.estimate(past)
            assert torch.equal(module.slot.state['h'], numbers[:,:3]) and torch.equal(module.slot.state['c'], numbers[:,3:])


# The rest of a project

def test_a_training_is_resumed_bit_by_bit(tmp_path):
    class Stop(Callback):
        def __init__(self, at): self.at,self.n = at,0
        def after_batch(self):
            self.n += self.training
            if self.n==self.at: raise KeyboardInterrupt
    def trained(folder, at=()):
        for n in (*at, None):
            learn = RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20), path=folder, model_dir='.')
            cbs = [TbpttCheckpoint(every=1, resume=True), Stop(n or 10**9)]
            try: fit(learn, 2, cbs=cbs)
            except KeyboardInterrupt: pass
        return learn
    a,b = trained(tmp_path/'a'),trained(tmp_path/'b', (1, 3, 14))
    for (name,p),q in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.equal(p, q), name
    assert a.recorder.values==b.recorder.values

def test_it_is_exported_and_loaded(tmp_path):
    learn = fit(RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20), path=tmp_path))
    learn.export('m.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(tmp_path/'m.pkl')
    dl = learn.dls.valid
    torch.testing.assert_close(other.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])
    assert other.model.rnn.initial.n_state==8 and n_past_of(other.model)==20
    learn.save('w')
    again = RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20), path=tmp_path).load('w')
    torch.testing.assert_close(again.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])

def test_instruments_and_the_search_of_a_learning_rate_work(tmp_path):
    learn = RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20), path=tmp_path)
    with learn.no_bar(): assert learn.lr_find(show_plot=False).valley>0
    assert learn.tbptt_find(show=False, n_batches=1, max_lag=20).lags[-1]==20
    learn.check_sub_windows()
    table = learn.check_memory_grads()
    assert table.attrs['verdict'].startswith('healthy')
    assert {v for k,v in table.verdict.items() if '.initial.' in k}=={'not run here'}

def test_a_learning_rate_of_zero_finds_both_models_alike():
    "The model that goes along with a search is begun with the same states"
    seen = []
    class Keep(Callback):
        order = 90
        def after_loss(self):
            if self.training: seen.append((self.loss.item(), self.tbptt_reset_cb._search.loss.next.item()))
    learn = RNNLearner(signal_loaders(*signals()), hidden_size=4, initial=EncodedState(20))
    fit(learn, cbs=[LRFinder(1e-30, 1e-29, 9), Keep()])
    assert len(seen)>5 and all(a==pytest.approx(b, rel=1e-6) for a,b in seen)

@pytest.mark.parametrize('sub', [12, Overlap(8, 16), Exact(6)])
def test_a_compiled_model_trains_as_the_eager_one(sub):
    from torch._dynamo.testing import CompileCounter
    models = []
    for how in ('eager','compiled'):
        model = Net('cell')
        learn = learner(model if how=='eager' else torch.compile(model, backend=CompileCounter(), dynamic=True), sub=sub)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'The .grad attribute of a Tensor that is not a leaf')
            models.append(fit(learn).model)
        assert len(learn.record.steps)>=3
    for (name,p),q in zip(models[0].named_parameters(), models[1].parameters()): torch.testing.assert_close(p, q, **TOL, msg=name)

def test_mixed_precision_leaves_the_state_in_the_type_that_it_is_carried_in():
    class OnCpu(Callback):
        order = 10
        def before_batch(self): self.context = torch.autocast('cpu', torch.bfloat16); self.context.__enter__()
        def after_loss(self): self.context.__exit__(None, None, None)
    learn = RNNLearner(signal_loaders(*signals()), 'gru', hidden_size=4, initial=EncodedState(20), cbs=OnCpu())
    fit(learn)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert learn.recorder.values[0][1]<5

def test_a_window_that_is_skipped_by_finite_cb_is_no_past_of_the_next():
    its = items()
    its[5][0][20] = float('inf') # in the second batch, after the past
    models = []
    for left in (its, its[:4]+its[8:]):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn = fit(learner(Net(), loaders(left, items()[:4]), opt_func=sgd, sub=None, cbs=[FiniteCB('skip')]), lr=.1)
        models.append(learn.model)
    for p,q in zip(*(m.parameters() for m in models)): torch.testing.assert_close(p, q, **TOL)

def test_classes_among_the_inputs_are_embedded_for_the_encoder_too():
    model = SequenceRNN(2, 1, hidden_size=3, n_classes={1:4}, scale_x=Standardize(torch.tensor([2.,0]), torch.tensor([3.,1])),
        scale_y=Standardize(1., 2.), initial=EncodedState(5))
    state = model.rnn.initial
    assert state.n_in==model.embed.n_out
    x,y = torch.stack([torch.randn(3, 5), torch.randint(4, (3, 5)).float()], 2),torch.randn(3, 5, 1)
    flat = torch.cat([model.embed(model.scale_x(x)), (y-1)/2], 2).flatten(1)
    torch.testing.assert_close(state((x,), (y,)), state.encoder.linear(flat)+state.encoder.net(flat))
    assert len({id(p) for p in model.parameters()})==len(list(model.parameters()))

def test_a_cuda_graph_stands_for_no_step_in_which_a_state_is_estimated():
    from test_graphs import Graphs
    models = []
    for n_past in (20, 40): # within the second sub-window, and at its start
        for cbs in ([], [Graphs()]):
            dls = signal_loaders(*signals(), win_sz=140)
            learn = RNNLearner(dls, 'gru', hidden_size=4, initial=EncodedState(n_past), cbs=cbs, loss_func=nn.L1Loss())
            models.append(fit(learn, 2, lr=1e-2).model)
            if cbs: assert cbs[0].n_replayed>0
        for (name,p),q in zip(models[-1].named_parameters(), models[-2].parameters()): assert torch.equal(p, q), name

def test_a_stream_is_begun_with_the_known_past():
    u,y = signals()
    learn = fit(RNNLearner(signal_loaders(u, y), hidden_size=4, initial=EncodedState(20)))
    x,t = torch.tensor(u[:300]).view(3, 100, 2),torch.tensor(y[:300]).view(3, 100, 1)
    dl = DataLoaders(*[TfmdDL(list(zip(x, t)), bs=3, num_workers=0)]*2).valid
    expected = learn.get_preds(dl=dl)[0][:,20:]
    stream = StreamPredictor(learn)
    stream(x[:,50:60]) # something else before
    stream.begin(x[:,:20], t[:,:20])
    torch.testing.assert_close(torch.cat([stream(o) for o in x[:,20:].split(33, 1)], 1), expected)
    more = StreamPredictor(learn)
    more.begin(u[:20], y[:20]) # one stream
    np.testing.assert_allclose(more(u[20:100]), expected[0].numpy(), rtol=1e-5, atol=1e-5)
    more.begin(np.concatenate([u[50:60], u[:20]]), np.concatenate([y[50:60], y[:20]])) # the end of it counts
    np.testing.assert_allclose(more(u[20:100]), expected[0].numpy(), rtol=1e-5, atol=1e-5)
    saved = more.state_dict()
    again = StreamPredictor(learn)
    again.load_state_dict(saved)
    np.testing.assert_array_equal(again(u[:9]), more(u[:9]))
    more.reset()
    with torch.no_grad(): own = learn.model.eval()(torch.tensor(u[None,:30]))
    np.testing.assert_allclose(more(u[:30]), own[0].numpy(), rtol=1e-5, atol=1e-5) # without a past, as the module begins by itself

def test_a_past_that_cannot_be_is_refused_and_nothing_has_changed():
    u,y = signals()
    learn = RNNLearner(signal_loaders(u, y), hidden_size=4, initial=EncodedState(20))
    stream = StreamPredictor(learn, on_nan='hold')
    stream(u[:10])
    before = stream.state_dict()
    bad = y[:20].copy()
    bad[3] = np.nan
    for args,message in (((u[:19], y[:19]), r'\(1, 19, 2\).*at least 20 steps'), ((u[:20], y[:19]), 'as many streams and steps'),
            ((u[:20], bad), 'outputs of the past are not all finite'), ((u[:20], y[:20,0]), 'have shapes|statistics')):
        with pytest.raises(ValueError, match=message): stream.begin(*args)
    assert str(stream.state_dict())==str(before)
    with pytest.raises(TypeError, match='has no EncodedState'): StreamPredictor(SequenceRNN(2, 1)).begin(u[:20], y[:20])

def test_a_stream_is_begun_beside_a_layer_that_is_carried():
    torch.manual_seed(0)
    model = Two(6).eval()
    x,y = (torch.stack(o) for o in zip(*items(3)))
    stream = StreamPredictor(model)
    stream.begin(x[:,:6], y[:,:6])
    with torch.no_grad():
        before,_ = model.a(x[:,:6])
        _,g = model.b(before)
        out,_ = model.a(x[:,6:], model.rnn.initial((x[:,:6],), (y[:,:6],))[None])
        expected = model.head(model.b(out, g)[0])
    torch.testing.assert_close(stream(x[:,6:]), expected, **TOL)

@pytest.mark.parametrize('kind', ['lstm','gru'])
def test_the_encoder_is_an_onnx_file_of_its_own(kind):
    ort = pytest.importorskip('onnxruntime')
    u,y = signals()
    learn = fit(RNNLearner(signal_loaders(u, y), kind, hidden_size=4, num_layers=2, initial=EncodedState(20)))
    state = to_onnx(learn, 'm.onnx', u[None,:10])
    names = past_to_onnx(learn, 'past.onnx', u[None,:20], y[None,:20])
    assert names==list(state)
    sessions = [ort.InferenceSession(o, providers=['CPUExecutionProvider']) for o in ('past.onnx','m.onnx')]
    x,t = u[:300].reshape(3, 100, 2),y[:300].reshape(3, 100, 1)
    begun = dict(zip(names, sessions[0].run(None, dict(x_past=x[:,:20], y_past=t[:,:20]))))
    stream = StreamPredictor(learn)
    stream.begin(x[:,:20], t[:,:20])
    np.testing.assert_allclose(sessions[1].run(None, {'x':x[:,20:], **begun})[0], stream(x[:,20:]), rtol=1e-4, atol=1e-4)


# What is refused, before the first step

def refused(model, dls=None, match='', error=ValueError, **kwargs):
    before,record = [p.clone() for p in model.parameters()],Record()
    with pytest.raises(error, match=match): fit(learner(model, dls, cbs=[record, *kwargs.pop('cbs', [])], **kwargs))
    assert not record.steps and all(torch.equal(p, q) for p,q in zip(before, model.parameters()))

def test_windows_that_are_too_short():
    for n_past in (30, 31): refused(Net(n_past=n_past), match=f'n_past is {n_past}, but a window has 30 steps')
    short = [(x[:n], y[:n]) for (x,y),n in zip(items(), [30]*4+[5]*4)]
    learn = learner(Net(n_past=5), loaders(short, items()))
    with pytest.raises(ValueError, match='n_past is 5, but a window has 5 steps'): fit(learn)
    learn = learner(Net(n_past=5), loaders(items(), short))
    with pytest.raises(ValueError, match='n_past is 5, but a window has 5 steps'): learn.validate()

def test_streams_whose_past_does_not_end_in_the_first_block():
    xs,ys = sequences()
    for n_past,sub,match in ((8, 8, 'n_past is 8, but the first block of a sequence may have 8 steps'),
            (22, 24, 'n_past is 22, the shortest sequence has 22 steps'), (12, 8, 'first block')):
        with pytest.raises(ValueError, match=match): stream_learner(Net(n_past=n_past), stream_loaders(xs, ys, sub))
    with pytest.raises(ValueError, match='may have 5 steps'):
        stream_learner(Net(n_past=5), stream_loaders(xs, ys, 12), truncation=Jittered(12))
    fit(stream_learner(Net(n_past=5), stream_loaders(xs, ys, 12), truncation=Jittered(12, least=6)))

@pytest.mark.parametrize('what', ['x','y'])
@pytest.mark.parametrize('step', [0, 4])
def test_a_number_that_is_missing_in_the_past(what, step):
    its = items()
    its[1]['xy'.index(what)][step,0] = float('nan')
    kind = dict(x='inputs', y='targets')[what]
    match = f'{kind} that are not finite among the first n_past=5 steps'
    refused(Net(), loaders(its), match)
    learn = learner(Net(), loaders(items(), its))
    with pytest.raises(ValueError, match=match): learn.validate()

def test_targets_that_do_not_count_in_the_past():
    its = items()
    its[1][1][5] = 0.
    def counts(y): return (y!=0)[...,0]
    refused(Net(n_past=6), loaders(its), 'targets that do not count', counts=counts)
    fit(learner(Net(n_past=5), loaders(its), counts=counts))

def test_targets_of_a_stream_that_do_not_count_in_the_past():
    xs,ys = sequences()
    ys[2][3] = 0.
    def counts(y): return (y!=0)[...,0]
    def trained(n_past): return fit(stream_learner(Net(n_past=n_past), stream_loaders(xs, ys, 8, 5), counts=counts), lr=.1)
    trained(3)
    with pytest.raises(ValueError, match='targets that do not count among the first n_past=4'): trained(4)

def test_another_loader_than_those_of_the_learner_is_looked_at():
    xs,ys = sequences()
    learn = stream_learner(Net(n_past=7), stream_loaders(xs, ys, 8))
    with pytest.raises(ValueError, match='n_past is 7, the shortest sequence has 6 steps'):
        learn.get_preds(dl=stream_loaders(*sequences([6, 20]), 8).valid)

def test_targets_that_are_ignored_in_the_past_and_after_it():
    u,_ = signals(1000)
    xs,ys = [torch.tensor(o) for o in np.split(u, 10)],[torch.tensor((o[:,0]>3).astype(int)) for o in np.split(u, 10)]
    def trained(step):
        own = [y.clone() for y in ys]
        own[3][step] = -100
        dls = DataLoaders(*[TfmdDL(list(zip(xs, own)), bs=5, num_workers=0)]*2)
        model = SequenceRNN(2, 2, hidden_size=4, initial=EncodedState(10))
        return fit(TbpttLearner(dls, model, 20, loss_func=CrossEntropyLossFlat()))
    trained(10)
    with pytest.raises(ValueError, match='targets that do not count among the first n_past=10'): trained(9)

def test_targets_without_steps():
    its = [(x, y[0]) for x,y in items()]
    refused(Net(), loaders(its), 'a batch has targets of shape')
    with pytest.raises(ValueError, match='last=True'): SequenceRNN(1, 1, last=True, initial=EncodedState(5))

def test_predictions_where_no_outputs_are_known():
    u,y = signals()
    learn = RNNLearner(signal_loaders(u, y), hidden_size=4, initial=EncodedState(20))
    dl = TfmdDL([(torch.tensor(u[:100]),)]*3, bs=2, num_workers=0, n_inp=1)
    with pytest.raises(ValueError, match="a batch has no targets.*evaluation = 'own'"): learn.get_preds(dl=dl)
    learn.model.rnn.initial.evaluation = 'own'
    preds = learn.get_preds(dl=dl)[0]
    with torch.no_grad(): torch.testing.assert_close(preds[:1], learn.model.eval()(torch.tensor(u[None,:100])))

def test_predictions_of_sequences_whose_outputs_are_not_known():
    xs,ys = sequences()
    learn = stream_learner(Net(n_past=7), stream_loaders(xs, ys, 8))
    dl = learn.dls.test_dl(xs)
    with pytest.raises(ValueError, match="a batch has no targets.*evaluation = 'own'"): learn.get_preds(dl=dl)
    learn.model.rnn.initial.evaluation = 'own'
    expected = torch.cat([predictions(learn.model, x, y, 7, own=True) for x,y in zip(xs, ys)])
    torch.testing.assert_close(learn.get_preds(dl=dl)[0], expected, **TOL)

def test_batches_that_continue_each_other():
    refused(Net(), match='each batch continues the last: only the first has a past', continuing=True)

@pytest.mark.parametrize('step', [0, 3])
def test_callbacks_that_change_a_batch(step):
    class Scale(Callback):
        def __init__(self, what): self.what = what
        def before_batch(self):
            x,y = self.xb[0].clone(),self.yb[0].clone()
            dict(x=x, y=y)[self.what][:,step] *= 2
            self.learn.xb,self.learn.yb = (x,),(y,)
    for what in 'xy': refused(Net(), match='A callback has changed the inputs or targets', cbs=[Scale(what)])
    refused(Net(), match='MixUp mixes windows', cbs=[MixUp()])
    class Copy(Callback):
        def before_batch(self): self.learn.xb,self.learn.yb = tuple(o.clone() for o in self.xb),tuple(o.clone() for o in self.yb)
    fit(learner(Net(), cbs=[Copy()]))

def test_evaluation_by_sub_windows():
    learn = learner(Net(), cbs=[SubWindowEvalCB(10)])
    with pytest.raises(ValueError, match='SubWindowEvalCB cuts by itself'): learn.validate()
    learn.model.rnn.initial.evaluation = 'own'
    learn.validate()

def test_layers_that_look_back_over_different_steps():
    model = nn.Sequential(StatefulRNN(nn.GRU(2, 3, batch_first=True), initial=EncodedState(4, 2, 1)),
        StatefulRNN(nn.GRU(3, 3, batch_first=True), initial=EncodedState(5, 2, 1)), nn.Linear(3, 1)).double()
    refused(model, match='look back over different steps')

def test_settings_that_cannot_be():
    for kwargs,error,match in ((dict(n_past=0), ValueError, 'n_past is 0'), (dict(n_past=2.5), TypeError, 'n_past is 2.5'),
            (dict(n_past=5, hidden=0), ValueError, 'hidden is 0'), (dict(n_past=5, n_in=-1), ValueError, 'n_in is -1'),
            (dict(n_past=5, encoder=nn.Linear), TypeError, 'EncodedState got the class Linear'),
            (dict(n_past=5, evaluation='zero'), ValueError, "evaluation is 'zero'; expected 'past', or 'own'")):
        with pytest.raises(error, match=match): EncodedState(**kwargs)
    with pytest.raises(ValueError, match=r"evaluation is 1"): EncodedState(5).evaluation = 1
    with pytest.raises(ValueError, match=r'n_in is None.*EncodedState\(5, n_in=1, n_out=1\)'): StatefulRNN(nn.GRU(1, 2), initial=EncodedState(5))
    state = EncodedState(5, 1, 1)
    StatefulRNN(nn.GRU(1, 2), initial=state)
    with pytest.raises(ValueError, match='that of another module already, GRU'): StatefulRNN(nn.GRU(1, 2), initial=state)

def test_states_that_are_not_known_or_grow():
    class NoFirst(nn.Module):
        def forward(self, x, state): return x,x[:,-1]
    with pytest.raises(TypeError, match='first state of NoFirst is not known'): StatefulRNN(NoFirst(), initial=EncodedState(5, 1, 1))
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(2, 3)
        def initial_state(self, bs, device, dtype): return torch.zeros(bs, 1, 2, device=device, dtype=dtype)
        def forward(self, x, state):
            state = torch.cat([state, x], 1)
            return self.w(state.mean(1, keepdim=True).expand(-1, x.shape[1], -1)),state
    model = nn.Sequential(StatefulRNN(Grows(), initial=EncodedState(5, 2, 1)), nn.Linear(3, 1)).double()
    refused(model, match='12 numbers in each row, its first state 2', check=False)
    with pytest.raises(ValueError, match='no real numbers'):
        StatefulRNN(Wrapped(), dict(parts=[None, None], peak=None), initial=EncodedState(5, 1, 1))

def test_other_channels_than_were_said():
    model = nn.Sequential(StatefulRNN(nn.GRU(2, 3, batch_first=True), initial=EncodedState(5, 3, 1)), nn.Linear(3, 1)).double()
    refused(model, match=r'inputs of the past have shapes \[\(4, 5, 2\)\]; expected 5 steps of 3 channels')
    model = nn.Sequential(nn.Embedding(9, 2), StatefulRNN(nn.GRU(2, 3, batch_first=True), initial=EncodedState(5, 1, 1)), nn.Linear(3, 1)).double()
    its = [(torch.arange(30)%9, y) for _,y in items()]
    refused(model, loaders(its), 'type torch.int64', TypeError)
    state = StatefulRNN(nn.GRU(1, 2), initial=EncodedState(5, 2, 1)).initial
    u,v,y = torch.randn(3, 5, 1, 3).unbind(-1)
    assert torch.equal(state((dict(u=u, v=v),), (y,)), state((u, v), (y,)))
    with pytest.raises(TypeError, match='An input of the past is a str'): state((dict(u=u, v='v'),), (y,))

def test_a_text_has_no_such_state():
    dls = SequenceDataLoaders.from_text('abcd '*100, sub_seq_len=10, bs=2)
    with pytest.raises(ValueError, match='a TextRNN begins with zero'): RNNLearner(dls, initial=EncodedState(5))

def test_a_training_that_knows_of_no_past_warns():
    model = Net().train()
    with pytest.warns(UserWarning, match='encoder learns nothing'): model(torch.randn(2, 9, 2).double())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.eval()(torch.randn(2, 9, 2).double())
        with Carry(model.train()): model(torch.randn(2, 9, 2).double())

def test_a_warm_up_may_not_go_over_the_end_of_the_past():
    "There the encoder would have no gradient, in windows and in streams"
    for warm_up in (6, 12):
        with pytest.raises(ValueError, match=f'warm_up is {warm_up}, but a state is estimated after the first n_past=5 steps'):
            learner(Net(n_past=5), warm_up=warm_up)
    rows = SequenceDataLoaders.from_arrays(*map(list, zip(*items())), valid_pct=.4, sub_seq_len=6, bs=2, dtype=torch.float64)
    with pytest.raises(ValueError, match='warm_up is 12, but a state is estimated after the first n_past=5 steps'):
        learner(Net(n_past=5), dls=rows, sub=6, warm_up=12)
    for warm_up in (3, 5):
        model = Net(n_past=5)
        before = deepcopy(model.rnn.initial.encoder.state_dict())
        fit(learner(model, warm_up=warm_up), 1)
        assert not any(torch.equal(o, before[k]) for k,o in model.rnn.initial.encoder.state_dict().items())

def test_a_washout_that_leaves_the_encoder_without_a_gradient_is_said():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        fit(learner(Net(n_past=5), n_skip=20), 1)
    said = [str(o.message) for o in found if 'n_skip=20' in str(o.message)]
    assert len(said)==1 and 'nor its encoder' in said[0] and 'burn_in=20' in said[0] and 'warm_up=' not in said[0]

def test_a_loader_of_pytorch_may_put_other_elements_together():
    "Two inputs out of one"
    class Split(Net):
        def forward(self, a, b): return super().forward(torch.cat([a, b], -1))
    def collate(its):
        x,y = (torch.stack(o) for o in zip(*its))
        return x[...,:1],x[...,1:],y
    model,other = Split(),Net()
    dl = torch.utils.data.DataLoader(items(), batch_size=4, collate_fn=collate)
    dls = DataLoaders(dl, dl, device='cpu')
    dls.n_inp = 2
    learn = fit(learner(model, dls), 2)
    check_same(learn, other, train_by_hand(other, batches(), FIXED, 5))
