"Training with CudaGraphCB is training without it, bit for bit; here with a stand-in for CUDA's graph that records the operations on the CPU and replays them in the same memory"
import pickle
from contextlib import contextmanager
from functools import partial
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelFitException, CancelStepException, CancelTrainException, _events
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.metrics import mae
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from helpers import untaught_on_purpose
from reference import OwnState
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.speed.graphs import _known_code, CudaGraphCB, _ours
from tbptt_fastai.speed.known import is_known
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap
from tbptt_fastai.speed.static import CudaGraph
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences

WIN,SUB,BS = 60,25,5 # 12 windows: batches of 5, 5 and 2, in sub-windows of 25, 25 and 10 steps
FULL = 6 # full sub-windows of an epoch


def same_memory(o): return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, o) # with a shape of its own, as there are operations that change it in place

class Tape(TorchDispatchMode):
    "Records the operations that are run in it, those of the backward pass as well"
    def __init__(self):
        super().__init__()
        self.ops = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, 'a number is read, for which a GPU would have to be waited for'
        kwargs = kwargs or {}
        at = same_memory(args)
        out = func(*args, **kwargs)
        self.ops.append((func, at, kwargs, same_memory(out), torch.is_grad_enabled())) # which some operations on the CPU ask for
        return out

def memory(o): return {t.untyped_storage().data_ptr() for t in tree_leaves(o) if isinstance(t, Tensor)}

class TapeGraph:
    "As a CUDA graph: what is recorded are operations on tensors at fixed places, and no Python is run when they are replayed"
    device_type = 'cpu'
    def __init__(self, f, device): self._f,self._tape,self.calls = f,None,0
    def __call__(self):
        self.calls += 1
        if self._tape is None:
            with Tape() as tape: self._res = self._f()
            self._tape = [(*op, memory(op[1:3])) for op in tape.ops]
            return self._res
        with torch._C._AutoDispatchBelowAutograd():
            for func,args,kwargs,out,grad,read in self._tape:
                with torch.set_grad_enabled(grad): new = func(*args, **kwargs)
                for to,o in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(to, Tensor) and not memory(to)&read: to.copy_(o) # what lies in the memory of an argument is a view, or was changed in place
        return self._res

class Graphs(CudaGraphCB): graph = TapeGraph


class Plain(nn.Module):
    "Plain layers, which `Carry` looks after"
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
def test_every_kind_of_model_trains_as_without_graphs(make, model): same(make, model=model, replays=TWO_EPOCHS)

@pytest.mark.parametrize('kwargs', [dict(dtype=torch.float64), dict(grad_clip=.05), dict(opt_func=Adam), dict(opt_func=fused), dict(opt_func=fused, grad_clip=.05),
    dict(opt_func=partial(OptimWrapper, opt=torch.optim.SGD)), dict(loss_func=nn.MSELoss(reduction='sum'))])
def test_every_setting_trains_as_without_graphs(make, kwargs): same(make, replays=TWO_EPOCHS, **kwargs)

@untaught_on_purpose
@pytest.mark.parametrize('n_skip,replays', [(3, 1+3), (25, 1+2), (30, 0), (50, 1+2)]) # second sub-windows; if the first is all washout, they are the first to be trained; 50: the last is as good as a full one
def test_a_washout_trains_as_without_graphs(make, n_skip, replays): same(make, replays=replays, n_skip=n_skip)

@pytest.mark.parametrize('settings', [dict(burn_in=3), dict(burn_in=25), dict(burn_in=30), dict(warm_up=7), dict(warm_up=25), dict(warm_up=10, burn_in=30), dict(washout=9)])
def test_first_steps_of_every_kind_train_as_without_graphs(make, settings): same(make, **settings)

def test_washout_is_run_eagerly_and_all_else_replayed(make):
    learn = same(make, n_skip=10, sub=20) # of three sub-windows of 20 steps, the first has washout
    assert learn.graphs.n_replayed==4+6 # the first epoch runs one of either batch size by itself

def test_windows_of_one_sub_window_train_as_without_graphs(make):
    same(make, win=25, sub=25, replays=4+5) # 28 windows: five batches of 5, and one of 3

def test_windows_without_a_ragged_tail_train_as_without_graphs(make): same(make, win=50, sub=25)

def first_state(rnn): return learned_state(rnn)

def test_a_first_state_is_learned_as_without_graphs(make):
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

def test_a_module_of_ones_own_trains_as_without_graphs(make):
    same(make, model=lambda: nn.Sequential(StatefulRNN(Cell()), nn.Linear(3, 1)), replays=3+3)

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

def test_a_second_fit_after_an_evaluation_is_as_without_graphs(make): same(make, do=two_fits, replays=4+TWO_EPOCHS)

class Within(Callback):
    "Evaluations in the middle of a training, and between its epochs"
    busy = False
    def before_epoch(self):
        if self.busy: return
        self.busy = True
        self.learn.marks = [self.learn.validate(), self.learn.get_preds()[0].numpy()]
        self.busy = False
    after_epoch = before_epoch
    def after_batch(self):
        if not self.training: return
        self.model.eval()
        with torch.no_grad(): self.model(*self.xb)
        self.model.train()

def test_evaluations_within_a_fit_change_nothing(make):
    same(make, cbs=[Within], replays=4+4) # an evaluation between epochs ends a fit

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
def test_an_interrupted_fit_leaves_what_it_leaves_without_graphs(make, event, at):
    same(make, do=interrupted, cbs=[partial(Stop, KeyboardInterrupt, event, at)])

@pytest.mark.parametrize('opt_func', [Adam, fused])
@pytest.mark.parametrize('exc,event', [(CancelBatchException,'after_pred'), (CancelBatchException,'after_loss'), (CancelBatchException,'before_step'), (CancelBackwardException,'before_backward'),
    (CancelStepException,'before_step'), (CancelTrainException,'after_batch'), (CancelTrainException,'after_pred'), (CancelFitException,'after_loss')])
def test_what_is_cancelled_is_cancelled_as_without_graphs(make, exc, event, opt_func):
    # a batch that is cancelled before the step leaves its gradient for the next one
    same(make, cbs=[partial(Stop, exc, event, 2, every=True)], opt_func=opt_func)

def test_callbacks_see_what_they_see_without_graphs(make):
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

def test_short_epochs_train_as_without_graphs(make): same(make, cbs=[partial(ShortEpochCallback, .5)])

class Moves(Callback):
    "Parameters in other memory, as a callback that averages weights may put there"
    def before_batch(self):
        if self.training and self.learn.iter==5:
            for p in self.model.parameters(): p.data = p.data.clone()*.9

def test_parameters_that_have_moved_are_trained(make): same(make, cbs=[Moves])

class Thaw(Callback):
    def before_epoch(self): self.model.head.requires_grad_(self.epoch>0)

def test_parameters_that_are_frozen_for_an_epoch_stay_and_are_trained_after_it(make): same(make, cbs=[Thaw])

class NewMode(Callback):
    order = 20
    def before_train(self):
        if self.epoch: self.model.norm.eval()

def test_another_mode_in_another_epoch_is_followed(make): same(make, model=Normed, cbs=[NewMode])

class NewLoss(Callback):
    def before_batch(self): self.learn.loss_func = nn.MSELoss() if self.learn.iter>3 else nn.L1Loss()

def test_another_loss_on_the_way_is_used(make): same(make, cbs=[NewLoss])

def test_no_more_shapes_are_recorded_than_asked_for(make):
    learn = make(graphed=False, cbs=[Graphs(n_shapes=1)])
    quietly(learn, cycle)
    assert learn.graphs.n_replayed==(3-0)+3 # full batches alone


# --- what is refused

class ChangesPred(Callback):
    def __init__(self, event, how): self.event,self.how = event,how
    def _do(self, event):
        if event==self.event and self.training: self.how(self.learn)
    def after_pred(self): self._do('after_pred')
    def after_loss(self): self._do('after_loss')
    def before_backward(self): self._do('before_backward')

def new_pred(learn): learn.pred = learn.pred*2
def pred_in_place(learn): learn.pred.data.mul_(1) if learn.pred.requires_grad else learn.pred.mul_(1)
def new_yb(learn): learn.yb = (learn.yb[0]*2,)
def no_yb(learn): learn.yb = ()
def yb_in_place(learn): learn.yb[0].mul_(1)
def new_loss(learn): learn.loss_grad = learn.loss_grad+1
def loss_in_place(learn): learn.loss_grad *= 2

@pytest.mark.parametrize('event,how,name', [('after_pred',new_pred,'pred'), ('after_pred',pred_in_place,'pred'), ('after_pred',new_yb,'yb'), ('after_pred',no_yb,'yb'), ('after_pred',yb_in_place,'yb'),
    ('after_loss',new_loss,'loss_grad'), ('after_loss',loss_in_place,'loss_grad'), ('before_backward',new_loss,'loss_grad'), ('before_backward',loss_in_place,'loss_grad')])
def test_what_would_have_no_effect_is_refused(make, event, how, name):
    learn = make(cbs=[ChangesPred(event, how)])
    with pytest.raises(RuntimeError, match=f'learn.{name} was changed in .*{event}.*ChangesPred.*Leave out'): quietly(learn, cycle)
    assert not vars(learn).keys()&{*_ours, 'all_batches'}

class Harmless(Callback):
    "Another object that holds the same tensors; another loss to show; another batch before the forward pass"
    def before_batch(self):
        if self.training: self.learn.xb,self.learn.yb = tuple(o*2 for o in self.xb),tuple(o+1 for o in self.yb)
    def after_pred(self): self.learn.yb = (*self.learn.yb,)
    def after_loss(self): self.learn.loss = self.learn.loss*2
    def after_backward(self):
        for p in self.model.parameters():
            if p.grad is not None: p.grad *= 2

def test_what_has_an_effect_is_not_refused(make): same(make, cbs=[Harmless], replays=TWO_EPOCHS)

def test_mixup_of_signals_is_done_before_the_forward_pass(make): same(make, cbs=[MixUp], replays=TWO_EPOCHS)

def test_a_loss_of_a_callback_is_refused(make):
    class Loss(Callback):
        def before_train(self): self.learn.loss_func = self.scaled
        def scaled(self, pred, y): return (pred-y).abs().mean()*(self.learn.iter+1)
    with pytest.raises(ValueError, match='The loss is the scaled of Loss.*Leave out'): quietly(make(cbs=[Loss]), cycle)

class Own(OwnState):
    def __init__(self): super().__init__(nn.GRU(2, 4, batch_first=True), nn.Linear(4, 1))

@pytest.mark.parametrize('kwargs,match', [(dict(cbs=[MixedPrecision]), 'MixedPrecision scales the loss'), (dict(cbs=[partial(GradientAccumulation, 8)]), 'GradientAccumulation scales the loss'),
    (dict(model=Own), 'Own carries a state by itself.*StatefulRNN'), (dict(truncation=Exact(25)), 'Exact.*computes activations again'), (dict(sub=None), 'sub_seq_len is None')])
@pytest.mark.filterwarnings('ignore:(?s).*CUDA is not available')
def test_what_cannot_be_replayed_is_refused(make, kwargs, match):
    learn = make(**kwargs)
    with pytest.raises(ValueError, match=match): quietly(learn, cycle)

def test_a_processor_is_refused(make):
    learn = make(graphed=False, cbs=[CudaGraphCB])
    with pytest.raises(ValueError, match="The model is on cpu, the loaders on cpu; expected cuda"): quietly(learn, cycle)
    assert quietly(learn, lambda o: o.get_preds())[0].shape==(4,WIN,1) and quietly(learn, Learner.validate) # to evaluate is no matter of graphs
    assert not vars(learn).keys()&{*_ours, 'all_batches'}

def test_a_learner_without_reset_is_refused(make):
    dls = make().dls
    learn = Learner(dls, SequenceRNN(2, 1), nn.L1Loss(), cbs=Graphs())
    with pytest.raises(ValueError, match='no TbpttResetCB'): quietly(learn, cycle)
    assert not vars(learn).keys()&{*_ours, 'all_batches'}

def test_a_distributed_model_is_refused(make):
    learn = make()
    learn.model = nn.DataParallel(learn.model)
    with pytest.raises(ValueError, match='is in a DataParallel'): learn.graphs.check()

@pytest.mark.parametrize('hook', [lambda m: m.register_forward_pre_hook(lambda *args: None), lambda m: m.rnn.register_forward_hook(lambda *args: None),
    lambda m: m.register_full_backward_hook(lambda *args: None), lambda m: m.rnn.rnn.register_full_backward_pre_hook(lambda *args: None),
    lambda m: m.head.weight.register_hook(lambda grad: None), lambda m: m.head.weight.register_post_accumulate_grad_hook(lambda p: None)])
def test_hooks_are_refused(make, hook):
    learn = make()
    hook(learn.model)
    with pytest.raises(ValueError, match='hooks, which would not be called'): quietly(learn, cycle)
    assert not vars(learn).keys()&{*_ours, 'all_batches'}

@pytest.mark.filterwarnings('ignore:(?s).*You are shadowing')
def test_activation_statistics_are_refused(make):
    with pytest.raises(ValueError, match='forward hooks'): quietly(make(cbs=[ActivationStats]), cycle)


# --- what runs by itself

@pytest.mark.parametrize('truncation', [Overlap(10, 20), Jittered(20)])
def test_other_schemes_train_as_without_graphs(make, truncation): same(make, truncation=truncation)

def test_a_scheme_is_replayed_where_it_is_plain(make):
    assert same(make, truncation=Jittered(20)).graphs.n_replayed<=2*9 and same(make, truncation=Overlap(20, 20)).graphs.n_replayed>0

def stream(signals, graphed):
    set_seed(0)
    train,valid = (Sequences(*[[o[a:b] for a,b in bounds] for o in signals]) for bounds in ([(0,200), (200,450), (450,600)], [(600,700)]))
    dls = DataLoaders(StreamDL(train, bs=2, sub_seq_len=25, shuffle=True, num_workers=0, device='cpu'), StreamDL(valid, bs=2, sub_seq_len=25, num_workers=0, device='cpu'))
    return TbpttLearner(dls, SequenceRNN(2, 1, hidden_size=4), loss_func=nn.L1Loss(), metrics=mae, cbs=[Graphs()] if graphed else [])

def test_a_stream_runs_by_itself(signals):
    want,learn = result(stream(signals, False)),stream(signals, True)
    np.testing.assert_equal(result(learn), want)
    assert learn.graphs.n_replayed==0

def test_a_changed_fastai_runs_by_itself(make, monkeypatch):
    plain = Learner._do_grad_opt
    def other(self): plain(self)
    monkeypatch.setattr(Learner, '_do_grad_opt', other)
    same(make, replays=0)

def test_fastai_is_what_it_was():
    "If this fails, fastai has changed what a training step is: compare with `GraphedRun`, then change the digest"
    assert is_known(_known_code, *(getattr(Learner, o) for o in _ours))

def test_a_callback_that_is_taken_out_on_the_way_leaves_nothing_behind(make):
    class TakesOut(Callback):
        def after_batch(self):
            if self.learn.iter==4 and self.training and hasattr(self.learn, 'graphs'): self.learn.remove_cb(self.learn.graphs)
    want,learn = result(make(graphed=False, cbs=[TakesOut])),make(cbs=[TakesOut])
    np.testing.assert_equal(result(learn), want)
    assert not vars(learn).keys()&{*_ours, 'all_batches'}


# --- what is left afterwards

def test_a_learner_that_was_saved_and_loaded_predicts_the_same(make, tmp_path):
    learn = make(path=tmp_path)
    quietly(learn, cycle)
    pickle.loads(pickle.dumps(learn))
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path/'export.pkl')
    x = torch.randn(1, 40, 2)
    assert torch.equal(learn.model.eval()(x), loaded.model.eval()(x))

class Saves(Callback):
    def after_batch(self): pickle.dumps(self.learn)

def test_a_learner_can_be_saved_in_the_middle_of_a_fit(make):
    quietly(make(cbs=[Saves]), lambda learn: learn.fit(1))

class Watched(TapeGraph):
    made = []
    def __init__(self, f, device):
        super().__init__(f, device)
        self.made.append(self)

def test_graphs_last_for_a_fit(make):
    class Watching(CudaGraphCB): graph = Watched
    learn = make(graphed=False, cbs=[Watching])
    quietly(learn, cycle)
    assert len(Watched.made)==2 and sum(o.calls for o in Watched.made)==TWO_EPOCHS

def test_a_state_is_not_that_of_a_graph_after_a_fit(make):
    learn = make()
    quietly(learn, cycle)
    assert learn.model.rnn.state is None and not learn.model._forward_pre_hooks


# --- the order of calls to CUDA

class FakeStream:
    def __init__(self, log, name): self.log,self.name = log,name
    def wait_stream(self, other): self.log.append(f'{self.name} waits for {other.name}')

@pytest.fixture
def cuda(monkeypatch):
    "A record of what `CudaGraph` asks of torch.cuda"
    log = []
    @contextmanager
    def within(what):
        log.append(f'enter {what}')
        yield
        log.append(f'leave {what}')
    class Graph:
        def replay(self): log.append('replay')
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: FakeStream(log, 'side'))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: FakeStream(log, 'current'))
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: within(stream.name))
    monkeypatch.setattr(torch.cuda, 'device', lambda device: within(device))
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph, stream, capture_error_mode: within('capture'))
    monkeypatch.setattr(Tensor, 'record_stream', lambda o, stream: log.append(f'{int(o)} is used on {stream.name}'))
    return log

def test_three_calls_run_aside_then_one_is_captured_then_all_are_replayed(cuda):
    calls = []
    def f():
        cuda.append('run')
        calls.append(1)
        return torch.tensor(len(calls)),None
    graph = CudaGraph(f, 'device')
    aside = lambda i: ['side waits for current', 'enter side', 'run', 'leave side', 'current waits for side', f'{i} is used on current']
    for i in range(1, 4):
        assert graph()[0]==i and cuda==aside(i)
        cuda.clear()
    first = graph()
    assert cuda==['enter device', 'enter capture', 'run', 'leave capture', 'leave device', 'replay']
    cuda.clear()
    assert graph() is first and cuda==['replay'] and len(calls)==4

def test_what_cannot_be_recorded_is_said(cuda):
    def f():
        if 'enter capture' in cuda: raise RuntimeError('operation not permitted')
    graph = CudaGraph(f, 'device')
    for _ in range(3): graph()
    with pytest.raises(RuntimeError, match='(?s)cannot be recorded as a CUDA graph: operation not permitted.*leave out CudaGraphCB'): graph()
