"Threads that run one model: right, or refused"
import copy, pickle, sys, threading
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from torch import nn
from fastcore.imports import noop
from helpers import fit, sgd
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.state.turns import taking_turns, training_turn
from tbptt_fastai.state.stateful import StatefulRNN


class Model(nn.Module):
    def __init__(self, stateful):
        super().__init__()
        torch.manual_seed(0)
        rnn = nn.GRU(1, 8, batch_first=True)
        self.rnn,self.head,self.stateful = StatefulRNN(rnn) if stateful else rnn,nn.Linear(8, 1),stateful
    def forward(self, x): return self.head(self.rnn(x) if self.stateful else self.rnn(x)[0])

@pytest.fixture
def often():
    "Threads take turns as often as they can"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)

def in_thread(f, *args):
    "The result of a call in another thread, or its exception"
    out = []
    def run():
        try: out.append(f(*args))
        except BaseException as e: out.append(e)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), 'it hangs'
    return out[0]

def at_once(*fs):
    "All in threads that start together; what they return"
    outs,begin = [None]*len(fs),threading.Barrier(len(fs))
    def run(i):
        begin.wait()
        outs[i] = fs[i]()
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(fs))]
    for o in threads: o.start()
    for o in threads: o.join(120)
    assert not any(o.is_alive() for o in threads), 'it hangs'
    return outs


@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('on_nan', ['raise', 'skip'])
def test_predictors_of_one_model_in_threads_each_keep_their_own_state(stateful, on_nan, often):
    model,xs = Model(stateful),torch.randn(4, 150, 3, 1)
    alone = [StreamPredictor(copy.deepcopy(model), on_nan=on_nan)(x.flatten(0, 1)) for x in xs]
    def over(x):
        stream = StreamPredictor(model, on_nan=on_nan)
        return lambda: torch.cat([stream(o) for o in x])
    for found,expected in zip(at_once(*map(over, xs)), alone): assert torch.allclose(found, expected, atol=1e-6)
    assert model.training # as before

def test_one_predictor_in_two_threads_runs_chunk_by_chunk(often):
    model = Model(True)
    stream,x = StreamPredictor(model),torch.ones(3, 1)
    both = at_once(*[lambda: [stream(x) for _ in range(100)]]*2)
    one = StreamPredictor(model)
    expected = [one(x) for _ in range(200)]
    found = sorted((tuple(o.flatten().tolist()) for out in both for o in out))
    assert found==sorted(tuple(o.flatten().tolist()) for o in expected) # each is one of them, none twice or not at all

def signals():
    x = np.random.default_rng(0).standard_normal((1200,1)).astype(np.float32)
    return x,x.cumsum(0)*.1

def learners(kind, cbs=()):
    x,y = signals()
    if kind=='stream': dls = SequenceDataLoaders.from_arrays([x[:500],x[500:]], [y[:500],y[500:]], sub_seq_len=10, bs=2, device='cpu')
    else: dls = SequenceDataLoaders.from_arrays(x, y, win_sz=100, sub_seq_len=10, bs=4, shuffle=False, device='cpu')
    return TbpttLearner(dls, Model(kind!='plain'), opt_func=sgd, cbs=list(cbs))

def quiet(learn):
    "Without a bar, which has one place in a terminal"
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

class FromThread(Callback):
    "Asks for a chunk in another thread, at each batch"
    order,run_valid = 20,False
    def __init__(self, f): self.f,self.out = f,[]
    def before_batch(self): self.out.append(in_thread(self.f))
    def after_batch(self): self.out.append(in_thread(self.f))

@pytest.mark.parametrize('kind', ['plain', 'stateful', 'stream'])
def test_a_chunk_in_a_thread_beside_a_training_is_refused_and_changes_nothing(kind):
    expected = fit(learners(kind)).model.state_dict()
    learn = learners(kind)
    stream = StreamPredictor(learn.model)
    x = torch.randn(5, 1)
    stream(x)
    before = stream.state_dict()
    cb = FromThread(lambda: stream(x))
    learn.add_cb(cb)
    fit(learn)
    assert cb.out and all(isinstance(o, RuntimeError) and 'in another thread' in str(o) for o in cb.out)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, expected[k])
    assert torch.equal(stream.state_dict()['states']['rnn'], before['states']['rnn'])
    assert isinstance(in_thread(lambda: stream(x)), torch.Tensor) # as soon as it is over

def test_a_copy_runs_beside_a_training():
    learn = learners('stateful')
    stream,x = StreamPredictor(copy.deepcopy(learn.model)),torch.randn(5, 1)
    expected = StreamPredictor(Model(True))(torch.cat([x]*10))
    cb = FromThread(lambda: stream(x))
    learn.add_cb(cb)
    fit(learn)
    assert torch.allclose(torch.cat(cb.out[:10]), expected, atol=1e-6)

def test_in_the_thread_of_a_training_a_predictor_runs_as_ever():
    expected = fit(learners('stateful')).model.state_dict()
    class Predicts(Callback):
        def before_batch(self): stream(torch.randn(2, 1, generator=torch.Generator().manual_seed(0)))
    learn = learners('stateful', [Predicts()])
    stream = StreamPredictor(learn.model)
    fit(learn)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, expected[k])

@pytest.mark.parametrize('of_fastai', [False, True])
def test_an_evaluation_in_a_thread_beside_a_training_of_the_same_model_is_refused(of_fastai):
    learn,other = learners('stateful'),learners('stateful')
    if of_fastai: other = Learner(other.dls, other.model, loss_func=other.loss_func, cbs=TbpttResetCB())
    other.model = learn.model
    for o in (learn, other): quiet(o)
    cb = FromThread(lambda: other.get_preds())
    learn.add_cb(cb)
    if of_fastai: # which has the model in evaluation mode by then, and the training says so
        with pytest.raises(RuntimeError): fit(learn)
    else: fit(learn)
    assert cb.out and all(isinstance(o, RuntimeError) and 'in another thread' in str(o) for o in cb.out)
    if not of_fastai:
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, fit(quiet(learners('stateful'))).model.state_dict()[k])
    assert isinstance(in_thread(other.validate)[0], float) # it can begin

def test_two_trainings_of_one_model_at_once_are_refused():
    learn,other = (quiet(learners('stateful')) for _ in range(2))
    other.model = learn.model
    cb = FromThread(lambda: other.fit(1))
    learn.add_cb(cb)
    fit(learn)
    assert cb.out and all(isinstance(o, RuntimeError) and 'in another thread' in str(o) for o in cb.out)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, fit(quiet(learners('stateful'))).model.state_dict()[k])

def test_evaluations_of_one_learner_in_threads_wait_for_each_other(often):
    learn = quiet(learners('stateful'))
    expected = learn.get_preds()[0]
    stream,x = StreamPredictor(learn.model),torch.randn(40, 2, 1)
    alone = StreamPredictor(copy.deepcopy(learn.model))(x.flatten(0, 1))
    a,b,c = at_once(lambda: learn.get_preds()[0], lambda: learn.get_preds()[0], lambda: torch.cat([stream(o) for o in x]))
    assert torch.equal(a, expected) and torch.equal(b, expected) and torch.allclose(c, alone, atol=1e-6)

def test_two_learners_in_two_threads_train_as_one_after_the_other(often):
    expected = [fit(learners(kind)).model.state_dict() for kind in ('plain','stateful')]
    two = [learners(kind) for kind in ('plain','stateful')]
    for o in two: quiet(o)
    at_once(*[lambda o=o: fit(o) for o in two])
    for learn,states in zip(two, expected):
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, states[k])


def test_who_waits_gets_its_turn_and_an_exception_gives_it_back():
    model = nn.GRU(1, 1)
    for context in (taking_turns, training_turn):
        with pytest.raises(KeyboardInterrupt):
            with context(model): raise KeyboardInterrupt('stop')
        def take():
            with training_turn(model): return 'taken'
        assert in_thread(take)=='taken'

def test_the_lock_is_neither_copied_nor_saved_with_a_model():
    model = Model(True)
    with training_turn(model):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(in_thread(StreamPredictor(other), torch.ones(2, 1)), torch.Tensor)
    stream = copy.deepcopy(StreamPredictor(model))
    assert stream(torch.ones(2, 1)).shape==(2,1)

def test_a_learner_is_saved_in_the_middle_of_a_run(tmp_path):
    learn = RNNLearner(SequenceDataLoaders.from_arrays(*signals(), win_sz=100, sub_seq_len=10, bs=4, device='cpu'), hidden_size=4)
    class Saves(Callback):
        def after_batch(self): copy.deepcopy(self.learn.model)
    learn.add_cb(Saves())
    fit(learn)
