"What could not begin, or was broken off, leaves nothing behind: no lock, no hook, no memory, no sums of another learner"
import gc, linecache, sys, threading
from pathlib import Path
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, mk_metric
from fastai.losses import MSELossFlat
from fastcore.imports import noop
from torch import nn
from helpers import fit, sgd
from tbptt_fastai.instruments.activation import activation_memory
from tbptt_fastai.instruments.lags import unchanged
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.models.memories import LRU, CachedAttention, CausalConv, FastWeights, WorkingMemory
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.metrics import StreamingRMSE, fun_rmse
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased
import tbptt_fastai.instruments.diagnose, tbptt_fastai.instruments.find # noqa: they add methods to Learner


def loaders(scale=1., seed=0, **kwargs):
    x = np.random.default_rng(seed).standard_normal((600,1)).astype(np.float32)
    kw = dict(win_sz=50, sub_seq_len=10, bs=4, shuffle=False, device='cpu')
    return SequenceDataLoaders.from_arrays(x, (x.cumsum(0)*.1*scale).astype(np.float32), **{**kw, **kwargs})

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def library_learner(**kwargs):
    torch.manual_seed(0)
    return quiet(RNNLearner(loaders(), hidden_size=4, **kwargs))

def fastai_learner(**kwargs):
    torch.manual_seed(0)
    return quiet(Learner(loaders(), SequenceRNN(1, 1, hidden_size=4), loss_func=MSELossFlat(), cbs=TbpttResetCB(), **kwargs))

makers = pytest.mark.parametrize('make', [library_learner, fastai_learner])

def ends(f, seconds=30):
    "The result of a call that must not hang"
    out = []
    thread = threading.Thread(target=lambda: out.append(f()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert out, 'it hangs, or has failed'
    return out[0]

class Raises(Callback):
    def __init__(self, event, error): setattr(self, event, lambda: self.fail(error))
    def fail(self, error): raise error

evaluations = dict(validate=lambda learn: learn.validate(), get_preds=lambda learn: learn.get_preds()[0].shape)

@makers
@pytest.mark.parametrize('how', evaluations)
def test_an_evaluation_that_the_library_refuses_gives_its_lock_back(make, how):
    learn,evaluate = make(),evaluations[how]
    expected = evaluate(learn)
    logger,cbs = learn.logger,[*learn.cbs]
    learn.add_cb(TbpttResetCB())
    with pytest.raises(ValueError, match='two TbpttResetCB'): evaluate(learn)
    assert not learn.lock.locked() and learn.logger is logger
    learn.remove_cb(learn.cbs[-1])
    assert [*learn.cbs]==cbs and ends(lambda: evaluate(learn))==expected

@pytest.mark.parametrize('how', evaluations)
@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_validate', 'before_batch', 'after_epoch', 'after_fit'])
@pytest.mark.parametrize('error', [ValueError('no'), ValueError(), KeyboardInterrupt('stop'), KeyboardInterrupt()])
def test_an_evaluation_that_is_broken_off_anywhere_gives_its_lock_back(how, event, error):
    learn,evaluate = library_learner(),evaluations[how]
    expected = evaluate(learn)
    cb = Raises(event, error)
    logger,cbs = learn.logger,[*learn.cbs]
    learn.add_cb(cb)
    with pytest.raises(type(error)): evaluate(learn)
    learn.remove_cb(cb)
    assert not learn.lock.locked() and learn.logger is logger and [*learn.cbs]==cbs
    assert ends(lambda: evaluate(learn))==expected

@makers
def test_a_ctrl_c_in_the_checks_of_an_evaluation_gives_its_lock_back(make, monkeypatch):
    learn = make()
    expected = learn.validate()
    def stop(self): raise KeyboardInterrupt('stop')
    with monkeypatch.context() as m:
        m.setattr(TbpttResetCB, 'check_settings', stop)
        with pytest.raises(KeyboardInterrupt): learn.validate()
    assert ends(learn.validate)==expected


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'after_batch',
                                   'after_train', 'after_epoch', 'after_fit'])
@pytest.mark.parametrize('error', [KeyError, ZeroDivisionError, RuntimeError])
def test_an_exception_without_a_message_stays_what_it_is(event, error):
    learn = library_learner()
    learn.add_cb(Raises(event, error()))
    with pytest.raises(error, match=rf'(?s){error.__name__}.*{event}|{event}.*{error.__name__}'): fit(learn)

def test_an_index_error_of_a_callback_stays_one():
    learn = library_learner()
    class Indexes(Callback):
        def before_epoch(self): return [][1]
    learn.add_cb(Indexes())
    with pytest.raises(IndexError, match='Exception occured in `Indexes`.*\n.*list index out of range'): fit(learn)

def test_a_model_that_fails_without_a_message_is_named():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(1, 1, batch_first=True)
        def forward(self, x): raise RuntimeError
    with pytest.raises(ValueError, match='Fails cannot be run on 10 steps: RuntimeError'): fit(quiet(TbpttLearner(loaders(), Fails())))


def hooks(model):
    return {(name,key):dict(o) for name,m in model.named_modules() for key,o in vars(m).items() if 'hooks' in key and isinstance(o, dict)}

def cleans_up(frame):
    "Is it called by a context that is left, or about to be? What is interrupted there stays undone"
    if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith('with '): return True
    while frame is not None:
        if frame.f_code.co_name=='__exit__': return True
        frame = frame.f_back

class StopAt:
    "In it, the n-th line that is run in the library raises a KeyboardInterrupt"
    def __init__(self, n): self.n,self.seen = n,0
    def trace(self, frame, event, arg):
        if 'tbptt_fastai' not in frame.f_code.co_filename: return None
        if event=='line' and not cleans_up(frame):
            self.seen += 1
            if self.seen==self.n:
                sys.settrace(None)
                raise KeyboardInterrupt(f'line {frame.f_lineno} of {frame.f_code.co_name}')
        return self.trace
    def __enter__(self): sys.settrace(self.trace); return self
    def __exit__(self, *exc): sys.settrace(None)

def find(learn): return learn.tbptt_find(show=False, n_batches=1, max_lag=6, n_losses=1, bias=.5)
def check(learn): return learn.check_memory_grads()

@pytest.mark.parametrize('ask', [find, check])
def test_an_instrument_that_is_interrupted_anywhere_leaves_no_hook_and_no_owner(ask):
    learn = library_learner()
    before,states = hooks(learn.model),{k:v.clone() for k,v in learn.model.state_dict().items()}
    with StopAt(-1) as counted: ask(learn)
    assert hooks(learn.model)==before
    for n in np.random.default_rng(0).integers(1, counted.seen, 60):
        with pytest.raises(KeyboardInterrupt), StopAt(int(n)): ask(learn)
        assert hooks(learn.model)==before, n
        assert not Carry.entered and all(m.slot.owner is None for m in learn.model.modules() if isinstance(m, StatefulRNN)), n
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, states[k])
    expected = fit(library_learner(opt_func=sgd)).model.state_dict()
    again = library_learner(opt_func=sgd)
    with pytest.raises(KeyboardInterrupt), StopAt(counted.seen//2): ask(again)
    for k,v in fit(again).model.state_dict().items(): assert torch.equal(v, expected[k])

def test_a_carry_that_cannot_be_entered_leaves_nothing(monkeypatch):
    model = SequenceRNN(1, 1, hidden_size=4)
    model.other = nn.GRU(1, 2)
    before = hooks(model)
    def stop(self, *args): raise KeyboardInterrupt('stop')
    for name in ('_begin_pass', 'active'):
        with monkeypatch.context() as m:
            m.setattr(Carry, name, property(stop) if name=='active' else stop)
            with pytest.raises(KeyboardInterrupt):
                with Carry(model): pass
        assert hooks(model)==before and not Carry.entered and model.rnn.slot.owner is None
    register,calls = nn.Module.register_forward_hook,[]
    def second(self, *args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt('stop')
    with monkeypatch.context() as m:
        m.setattr(nn.Module, 'register_forward_hook', second)
        with pytest.raises(KeyboardInterrupt):
            with Carry(model): pass
    assert calls and hooks(model)==before and not Carry.entered

def test_many_losses_are_as_many_as_there_are_blocks():
    learn = library_learner()
    few = find(learn)
    many = ends(lambda: learn.tbptt_find(show=False, n_batches=1, max_lag=6, n_losses=10**9, bias=.5))
    assert many.phi.shape==few.phi.shape
    all_of_them = learn.tbptt_find(show=False, n_batches=1, max_lag=6, n_losses=44, bias=.5)
    assert np.array_equal(many.phi, all_of_them.phi)


def test_activation_memory_frees_what_it_has_counted():
    model,x = SequenceRNN(1, 1, hidden_size=64),torch.randn(16, 200, 1)
    def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*4096
    for _ in range(3): size = activation_memory(model, x)
    before = resident()
    for _ in range(40): assert activation_memory(model, x)==size
    gc.collect()
    assert resident()-before<10*size # it was more than that of 40 calls

def test_what_is_hooked_while_a_learner_is_measured_is_gone_afterwards():
    learn = library_learner()
    before = hooks(learn.model)
    with pytest.raises(KeyboardInterrupt), unchanged(learn):
        for m in learn.model.modules():
            m.register_forward_hook(lambda *_: None)
            m.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
        raise KeyboardInterrupt('stop')
    assert hooks(learn.model)==before

def test_activation_memory_of_a_model_that_takes_a_gradient_inside():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.head = nn.GRU(1, 4, batch_first=True),nn.Linear(4, 1)
        def forward(self, x):
            x = x.requires_grad_()
            y = self.head(self.rnn(x)[0])
            return torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    assert activation_memory(Slope(), torch.randn(2, 5, 1))>0


def test_an_evaluation_in_the_middle_of_another_has_sums_of_its_own():
    torch.manual_seed(0)
    a,b = (quiet(RNNLearner(loaders(scale), hidden_size=4, metrics=fun_rmse)) for scale in (1, 100))
    expected,of_b = a.validate(),b.validate()
    class Inner(Callback):
        order = 70
        def after_batch(self): found.append(b.validate())
    found = []
    a.add_cb(Inner())
    assert a.validate()==expected and found and all(o==of_b for o in found)

def test_the_metric_is_a_function_of_a_batch_and_one_for_each_learner():
    pred,targ = torch.randn(3, 5, 2),torch.randn(3, 5, 2)
    assert fun_rmse(pred, targ)==(pred-targ).square().mean().sqrt()
    with pytest.raises(ValueError, match='expected the same'): fun_rmse(pred, targ[:,:,:1])
    one,two = mk_metric(fun_rmse),mk_metric(fun_rmse)
    assert isinstance(one, StreamingRMSE) and one is not two and one.name=='fun_rmse'


@pytest.mark.parametrize('memory', [LRU, WorkingMemory, FastWeights, CachedAttention, CausalConv])
@pytest.mark.parametrize('n_in', [1, 2, 3])
@pytest.mark.parametrize('rows', [1, 2])
@pytest.mark.parametrize('steps', [1, 2])
def test_a_memory_takes_gradients_of_any_number_of_inputs_rows_and_steps(memory, n_in, rows, steps):
    torch.manual_seed(0)
    layer = memory(n_in, 2).double()
    x = torch.randn(rows, 3+steps, n_in, dtype=torch.float64)
    whole = layer(x)[0]
    out,state = layer(x[:,:3])
    part = layer(x[:,3:], state)[0]
    assert torch.allclose(torch.cat([out, part], 1), whole, atol=1e-10)
    params = [*layer.parameters()]
    in_parts = torch.autograd.grad(out.square().sum()+part.square().sum(), params, allow_unused=True)
    for a,b in zip(in_parts, torch.autograd.grad(whole.square().sum(), params, allow_unused=True)): assert torch.allclose(a, b, atol=1e-8)

@pytest.mark.parametrize('n_in', [1, 3])
def test_an_lru_trains_to_a_last_sub_window_of_one_step(n_in):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lru = StatefulRNN(LRU(n_in, 1))
        def forward(self, x): return self.lru(x)
    x = np.random.default_rng(0).standard_normal((600,n_in)).astype(np.float32)
    y = x.sum(1, keepdims=True)
    dls = SequenceDataLoaders.from_arrays(x, y, win_sz=21, sub_seq_len=10, bs=1, device='cpu')
    assert torch.stack(fit(quiet(TbpttLearner(dls, Model()))).recorder.losses).isfinite().all()
    dls = SequenceDataLoaders.from_arrays([x[:201],x[201:402],x[402:]], [y[:201],y[201:402],y[402:]], sub_seq_len=10, bs=1, device='cpu')
    learn = fit(quiet(TbpttLearner(dls, Model())))
    assert learn.check_memory_grads() is not None


kinds = dict(fixed=dict(sub_seq_len=10), ragged=dict(sub_seq_len=7), whole=dict(sub_seq_len=None), overlap=dict(truncation=Overlap(7, 14)),
             jittered=dict(truncation=Jittered(9, std=2.)), random=dict(truncation=RandomUnbiased(8)), exact=dict(truncation=Exact(9)))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', kinds)
def test_models_of_any_precision_train_and_are_evaluated(dtype, kind):
    given = dict(kinds[kind])
    dls = loaders(dtype=dtype, sub_seq_len=None, bs=4)
    if 'truncation' in given: given['sub_seq_len'] = 'dls'
    learn = quiet(RNNLearner(dls, hidden_size=4, metrics=fun_rmse, **given))
    fit(learn, 2)
    assert all(p.dtype==dtype and p.isfinite().all() for p in learn.model.parameters())
    assert np.isfinite(learn.validate()).all() and learn.get_preds()[0].dtype==dtype
    assert len(learn.recorder.losses) and all(np.isfinite(float(o)) for o in learn.recorder.losses)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('lengths', [(200,400), (133,467)])
def test_streams_of_half_precision_train_and_are_evaluated(dtype, lengths):
    x = np.random.default_rng(0).standard_normal((600,1)).astype(np.float32)
    parts = [x[:lengths[0]], x[lengths[0]:]]
    dls = SequenceDataLoaders.from_arrays(parts, parts, sub_seq_len=10, bs=2, dtype=dtype, device='cpu')
    learn = fit(quiet(RNNLearner(dls, hidden_size=4, n_skip=3, metrics=fun_rmse)), 2)
    assert all(p.dtype==dtype for p in learn.model.parameters()) and np.isfinite(learn.validate()).all()
