"Training with CudaGraphCB is training without it, bit for bit; here with a stand-in for CUDA's graph that runs the recorded function again"
import pickle
from functools import partial
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelFitException, CancelStepException, CancelTrainException, _events
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import mae
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tbptt_fastai.data import SequenceDataLoaders
from tbptt_fastai.graphs import DIGEST, CudaGraphCB, _ours
from tbptt_fastai.known import is_known
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.rnn import SequenceRNN, StatefulRNN, learned_state
from tbptt_fastai.schemes import Exact, Jittered, Overlap
from tbptt_fastai.streams import StreamDL

WIN,SUB,BS = 60,25,5 # 12 windows: batches of 5, 5 and 2, in sub-windows of 25, 25 and 10 steps
FULL = 6 # full sub-windows of an epoch


class RerunGraph:
    "Where a CUDA graph would be replayed, the function runs again; its results lie where they lay before"
    device_type = 'cpu'
    def __init__(self, f, device): self._f,self._res,self.calls = f,None,0
    def __call__(self):
        self.calls += 1
        new = self._f()
        if self._res is None: self._res = tree_map(lambda o: o.clone() if isinstance(o, Tensor) else o, new)
        tree_map(lambda to,o: to.copy_(o) if isinstance(o, Tensor) else None, self._res, new)
        return self._res

class Graphs(CudaGraphCB): graph = RerunGraph


class Plain(nn.Module):
    "Plain layers, which `carry_state` looks after"
    def __init__(self, layer=nn.LSTM):
        super().__init__()
        self.rnn,self.head,self.unused = layer(2, 4, batch_first=True),nn.Linear(4, 1),nn.Linear(3, 3)
    def forward(self, x): return self.head(self.rnn(x)[0])

def stateful(layer=nn.GRU, **kwargs):
    rnn = layer(2, 4, batch_first=True)
    return nn.Sequential(StatefulRNN(rnn, **{k:f(rnn) for k,f in kwargs.items()}), nn.Linear(4, 1))

class Normed(nn.Module):
    "Running statistics, and random numbers"
    def __init__(self):
        super().__init__()
        self.rnn,self.norm,self.drop,self.head = StatefulRNN(nn.LSTM(2, 4, batch_first=True)),nn.BatchNorm1d(4),nn.Dropout(.3),nn.Linear(4, 1)
    def forward(self, x): return self.head(self.drop(self.norm(self.rnn(x).transpose(1, 2)).transpose(1, 2)))

class Seen(Callback):
    "What a callback sees in each event of a step"
    order = 70
    def __init__(self):
        self.seen = []
        for e in ('before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch'): vars(self)[e] = partial(self.look, e)
    def look(self, e):
        learn = self.learn
        grads = [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
        self.seen.append((e, learn.training, learn.iter, [o.clone() for o in (learn.pred, learn.loss) if isinstance(o, Tensor)] if e!='before_batch' else [],
            [o.clone() for o in (*learn.xb, *learn.yb)], grads if learn.training and e!='before_batch' else []))

def fused(*args, **kwargs): return OptimWrapper(*args, opt=partial(torch.optim.Adam, fused=True), **kwargs)

@pytest.fixture
def make(signals):
    def _make(cbs=(), model=SequenceRNN, dtype=torch.float32, sub=SUB, win=WIN, graphed=True, how=None, **kwargs):
        set_seed(0)
        u,y = (torch.from_numpy(o).to(dtype) for o in signals)
        dls = SequenceDataLoaders.from_arrays(u[:720], y[:720], valid=(u[720:960], y[720:960]), win_sz=win, bs=BS, device='cpu', dtype=dtype)
        model = SequenceRNN(2, 1, hidden_size=4) if model is SequenceRNN else model()
        cbs = [o() if isinstance(o, (type, partial)) else o for o in cbs]
        learn = TbpttLearner(dls, model.to(dtype), **{**(dict(sub_seq_len=sub) if 'truncation' not in kwargs else {}), **dict(metrics=mae, cbs=[*cbs, *([Graphs()] if graphed else [])]), **kwargs})
        return learn
    return _make

def quietly(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)

def cycle(learn): learn.fit_one_cycle(2, 1e-2)

def result(learn, do=cycle):
    quietly(learn, do)
    r = learn.recorder
    return ([p.detach().numpy().copy() for p in (*learn.model.parameters(), *learn.model.buffers())], [None if p.grad is None else p.grad.numpy().copy() for p in learn.model.parameters()],
        [v[:3] for v in r.values], r.lrs, [float(o) for o in r.losses], r.iters, getattr(r, 'hps', None), getattr(learn, 'marks', None), torch.get_rng_state().tolist())

def same(make, do=cycle, replays=None, **kwargs):
    "Train with and without graphs; the learner with them"
    want = result(make(graphed=False, **kwargs), do)
    learn = make(**kwargs)
    np.testing.assert_equal(result(learn, do), want) # bitwise
    assert not vars(learn).keys()&{*_ours, 'all_batches'} and not learn.graphs._steps
    if replays is not None: assert learn.graphs.n_replayed==replays
    return learn

# In each epoch the first sub-window runs by itself, and in the first epoch the first one of the last batch, of another shape
TWO_EPOCHS = (FULL-1-1)+(FULL-1)

@pytest.mark.parametrize('model', [SequenceRNN, Plain, partial(Plain, nn.GRU), partial(Plain, nn.RNN), stateful, partial(stateful, nn.LSTM), Normed])
def test_models(make, model): same(make, model=model, replays=TWO_EPOCHS)

@pytest.mark.parametrize('kwargs', [dict(dtype=torch.float64), dict(grad_clip=.05), dict(opt_func=Adam), dict(opt_func=fused), dict(opt_func=fused, grad_clip=.05),
    dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), dict(loss_func=nn.MSELoss(reduction='sum'))])
def test_settings(make, kwargs): same(make, replays=TWO_EPOCHS, **kwargs)

@pytest.mark.parametrize('n_skip,replays', [(3, 1+3), (25, 1+2), (30, 0), (50, 1+2)]) # second sub-windows; if the first is all washout, they are the first to be trained; 50: the last is as good as a full one
def test_washout(make, n_skip, replays): same(make, replays=replays, n_skip=n_skip)

def test_washout_is_run_eagerly_and_all_else_replayed(make):
    learn = same(make, n_skip=10, sub=20) # of three sub-windows of 20 steps, the first has washout
    assert learn.graphs.n_replayed==4+6 # the first epoch runs one of either batch size by itself

def test_a_window_of_one_sub_window(make): same(make, win=25, sub=25, replays=4+5) # 28 windows: five batches of 5, and one of 3

def test_no_ragged_tail(make): same(make, win=50, sub=25)

def first_state(rnn): return learned_state(rnn)

def test_a_first_state_that_is_learned(make):
    same(make, model=partial(stateful, nn.LSTM, initial=first_state), replays=3+3) # the second sub-window of each window

class Cell(nn.Module):
    "A recurrent module that is none of torch.nn's"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 3)
    def forward(self, x, state):
        state,outs = {'h': x.new_zeros(x.shape[0], 3)} if state is None else state,[]
        for o in x.unbind(1):
            state = {'h': torch.tanh(self.lin(torch.cat([o, state['h']], 1)))}
            outs.append(state['h'])
        return torch.stack(outs, 1),state

def test_a_module_of_ones_own(make): same(make, model=lambda: nn.Sequential(StatefulRNN(Cell()), nn.Linear(3, 1)), replays=3+3)

class Counting(Cell):
    def forward(self, x, state):
        out,new = super().forward(x, state)
        return out,{**new, 'n': (state or {}).get('n', 0)+1}

def test_a_state_with_a_number_is_refused(make):
    with pytest.raises(ValueError, match="holds 1, a int"): quietly(make(model=lambda: nn.Sequential(StatefulRNN(Counting()), nn.Linear(3, 1))), cycle)


def two_fits(learn):
    learn.fit_one_cycle(1, 1e-2)
    learn.marks = [learn.validate(), learn.get_preds()[0].numpy()]
    learn.fit(2, 1e-2)

def test_two_fits_and_an_evaluation_between(make): same(make, do=two_fits, replays=TWO_EPOCHS)

class Within(Callback):
    "An evaluation in the middle of a training"
    def after_batch(self):
        if self.learn.iter!=3 or not self.training: return
        dl = self.learn.dl
        self.learn.get_preds(dl=self.dls.valid, inner=True)
        self.learn.dl,self.learn.training = dl,True
        self.model.train()

def test_an_evaluation_in_the_middle(make): same(make, cbs=[Within], replays=TWO_EPOCHS)

class Stop(Callback):
    order = 65
    def __init__(self, exc, event, at, every=False): self.exc,self.event,self.at,self.n,self.every = exc,event,at,0,every
    def _stop(self, event):
        if event!=self.event or not self.training: return
        self.n += 1
        if self.n==self.at or self.every and self.n%self.at==0: raise self.exc
    def after_pred(self): self._stop('after_pred')
    def after_loss(self): self._stop('after_loss')
    def before_backward(self): self._stop('before_backward')
    def before_step(self): self._stop('before_step')
    def after_batch(self): self._stop('after_batch')

def interrupted(learn):
    with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2)
    assert not vars(learn).keys()&{*_ours, 'all_batches'}
    pickle.dumps(learn)
    if hasattr(learn, 'graphs'): assert not learn.graphs._steps
    learn.fit(1, 1e-2)

@pytest.mark.parametrize('event', ['after_pred','after_loss','before_backward','before_step','after_batch'])
@pytest.mark.parametrize('at', [2, 5, 13])
def test_an_interrupted_fit(make, event, at): same(make, do=interrupted, cbs=[partial(Stop, KeyboardInterrupt, event, at)])

@pytest.mark.parametrize('opt_func', [Adam, fused])
@pytest.mark.parametrize('exc,event', [(CancelBatchException,'after_pred'), (CancelBatchException,'after_loss'), (CancelBatchException,'before_step'), (CancelBackwardException,'before_backward'),
    (CancelStepException,'before_step'), (CancelTrainException,'after_batch'), (CancelTrainException,'after_pred'), (CancelFitException,'after_loss')])
def test_what_is_cancelled(make, exc, event, opt_func): # a batch that is cancelled before the step leaves its gradient for the next one
    same(make, cbs=[partial(Stop, exc, event, 2, every=True)], opt_func=opt_func)

def test_what_callbacks_see(make):
    seen = []
    for graphed in (False, True):
        cb = Seen()
        quietly(make(cbs=[cb], graphed=graphed), cycle)
        seen.append([[o.detach().numpy() if isinstance(o, Tensor) else o for part in step for o in (part if isinstance(part, list) else [part])] for step in cb.seen])
    np.testing.assert_equal(*seen)

class Keeps(Callback):
    "Keeps predictions and losses of a whole epoch"
    def __init__(self): self.kept = []
    def after_loss(self): self.kept.append((self.learn.pred, self.learn.loss))

def test_what_a_callback_keeps_stays(make):
    kept = []
    for graphed in (False, True):
        cb = Keeps()
        quietly(make(cbs=[cb], graphed=graphed), cycle)
        kept.append([[o.detach().numpy() for o in step] for step in cb.kept])
    np.testing.assert_equal(*kept)

def test_short_epochs(make): same(make, cbs=[partial(ShortEpochCallback, .5)])

class Moves(Callback):
    "Parameters in other memory, as a callback that averages weights may put there"
    def before_batch(self):
        if self.training and self.learn.iter==5:
            for p in self.model.parameters(): p.data = p.data.clone()*.9

def test_parameters_that_have_moved(make): same(make, cbs=[Moves])

class Thaw(Callback):
    def before_epoch(self): self.model.head.requires_grad_(self.epoch>0)

def test_parameters_that_are_frozen_for_an_epoch(make): same(make, cbs=[Thaw])

class NewMode(Callback):
    order = 20
    def before_train(self):
        if self.epoch: self.model.norm.eval()

def test_another_mode_in_another_epoch(make): same(make, model=Normed, cbs=[NewMode])

class NewLoss(Callback):
    def before_batch(self): self.learn.loss_func = nn.MSELoss() if self.learn.iter>3 else nn.L1Loss()

def test_another_loss_on_the_way(make): same(make, cbs=[NewLoss])

def test_no_more_shapes_than_asked_for(make):
    learn = make(graphed=False, cbs=[Graphs(n_shapes=1)])
    quietly(learn, cycle)
    assert learn.graphs.n_replayed==(3-0)+3 # full batches alone
