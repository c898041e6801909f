"A learner runs on as many threads as it is told, and tells where one is several times as fast."
import warnings
from time import sleep
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # with it comes Learner.no_bar
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.threads import ThreadHintCB, on_threads, pass_seconds

pytestmark = pytest.mark.filterwarnings('ignore:On 2 threads a pass:UserWarning') # the machine that tests run on may be busy


@pytest.fixture(autouse=True)
def two_threads():
    "Tests begin on two threads, as a user's notebook on a machine of two cores"
    with on_threads(2): yield

@pytest.fixture
def dls(signals): return SequenceDataLoaders.from_arrays(*signals, win_sz=100, sub_seq_len=40, bs=4, valid_pct=.25)

class Waits(nn.Linear):
    "Waits a hundredth of a second for each thread but the first, and has no kernel that runs on more than one"
    def __init__(self, ms=10.):
        super().__init__(2, 1)
        self.ms = ms
    def forward(self, x):
        ms = self.ms() if callable(self.ms) else self.ms
        sleep(1e-3*ms*(torch.get_num_threads()-1))
        return super().forward(x)

def waiting(dls, *args, **kwargs): return TbpttLearner(dls, Waits(*args), sub_seq_len=None, loss_func=nn.L1Loss(), **kwargs)

class Threads(Callback):
    "On how many threads each part of the loop ran"
    order = 20
    def __init__(self): self.seen = []
    def _note(self): self.seen.append((self.training, torch.get_num_threads()))
    after_pred = after_backward = after_epoch = _note

def hints(f):
    "The hints that a call gives"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in told if 'num_threads' in str(o.message)]


# --- as many as it is told

@pytest.mark.parametrize('factory', [TbpttLearner, RNNLearner])
def test_fit_and_evaluation_run_on_that_many_threads(dls, factory):
    learn = factory(dls, num_threads=1, cbs=(threads := Threads()))
    with learn.no_bar(), learn.no_logging():
        for run in (lambda: learn.fit(2), learn.validate, learn.get_preds, learn.show_results, lambda: learn.fit_flat_cos(1), lambda: learn.lr_find(num_it=6, show_plot=False)):
            threads.seen.clear()
            run()
            assert threads.seen and {n for _,n in threads.seen}=={1} and torch.get_num_threads()==2

def test_without_a_number_nothing_is_changed(dls):
    fit(TbpttLearner(dls, cbs=(threads := Threads())))
    assert {n for _,n in threads.seen}=={2} and torch.get_num_threads()==2

@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize('evaluating', [False, True])
def test_an_interrupted_run_gives_the_threads_back(dls, error, evaluating):
    def stop(self):
        if self.learn.training!=evaluating: raise error('stop')
    learn = TbpttLearner(dls, num_threads=1, cbs=Callback(after_pred=stop))
    with learn.no_bar(), learn.no_logging(), pytest.raises(error): learn.validate() if evaluating else learn.fit(1)
    assert torch.get_num_threads()==2

def test_a_saved_learner_keeps_its_number(dls, tmp_path):
    learn = TbpttLearner(dls, num_threads=1, path=tmp_path)
    learn.export()
    with pytest.warns(UserWarning, match='pickle'): assert load_learner(tmp_path/'export.pkl').num_threads==1

@pytest.mark.parametrize('n', [0, -1, 1.5, 'two'])
def test_what_is_no_number_of_threads_is_refused(dls, n):
    with pytest.raises((TypeError, ValueError), match=f'num_threads is {n!r}'): TbpttLearner(dls, num_threads=n)


# --- the hint

def test_a_fit_says_once_that_one_thread_is_faster(dls):
    learn = waiting(dls)
    hint, = hints(lambda: (fit(learn, 2), fit(learn), learn.validate()))
    assert hint.startswith('On 2 threads a pass of 50 steps takes ') and 'num_threads=1' in hint and 'torch.set_num_threads(1)' in hint
    assert torch.get_num_threads()==2 and not learn._grab_cbs(ThreadHintCB)

def test_a_search_of_the_learning_rate_says_so_as_well(dls):
    learn = waiting(dls)
    def search():
        with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert len(hints(search))==1

def test_a_learner_that_exists_is_told_by_the_callback(dls):
    learn = Learner(dls, Waits(), nn.L1Loss(), cbs=[TbpttResetCB(None), ThreadHintCB()])
    assert len(hints(lambda: fit(learn)))==1

@pytest.mark.parametrize('why', ['one thread', 'num_threads', 'as fast', 'only at first'])
def test_nothing_is_said_where_nothing_is_gained(dls, why):
    calls = iter(range(10**6))
    def at_first(): return 30. if next(calls)<5 else 0. # as long as the first measurement takes
    waits = {'as fast': 0., 'only at first': lambda: at_first() if torch.get_num_threads()==2 else 0.}.get(why, 10.)
    learn = waiting(dls, waits, num_threads=2 if why=='num_threads' else None)
    if why=='as fast': learn._grab_cbs(ThreadHintCB)[0].times = 1000. # the machine may be busy
    with on_threads(1 if why=='one thread' else 2): assert not hints(lambda: fit(learn))

class Odd(nn.Module):
    "A model for one number of steps"
    def __init__(self):
        super().__init__()
        self.rnn,self.head = nn.LSTM(2, 4, batch_first=True),nn.Linear(400, 1)
    def forward(self, x): return self.head(self.rnn(x)[0].flatten(1))[:,None].expand(-1, x.shape[1], -1)

@pytest.mark.parametrize('model', [Odd, lambda: nn.Sequential(Both(), nn.Linear(8, 1))])
def test_a_model_that_cannot_be_measured_is_trained(dls, model):
    learn = TbpttLearner(dls, model(), sub_seq_len=None, loss_func=nn.L1Loss())
    fit(learn)
    assert len(learn.recorder.losses)>0

class Both(nn.LSTM):
    def __init__(self): super().__init__(2, 4, batch_first=True, bidirectional=True)
    def forward(self, x): return super().forward(x)[0]

class Own(nn.Module):
    "A model that carries its state by itself"
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.state = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1),None
    def reset(self): self.state = None
    def forward(self, x):
        out,state = self.rnn(x, self.state)
        self.state = state.detach()
        return self.head(out)

models = {
    'StatefulRNN': lambda: nn.Sequential(StatefulRNN(nn.LSTM(2, 4, batch_first=True)), nn.Dropout(.2), nn.Linear(4, 1)),
    'statistics': lambda: nn.Sequential(StatefulRNN(nn.GRU(2, 4, batch_first=True)), Channels(nn.BatchNorm1d(4)), nn.Linear(4, 1)),
    'own reset': Own,
}
class Channels(nn.Sequential):
    def forward(self, x): return super().forward(x.transpose(1, 2)).transpose(1, 2)

@pytest.mark.parametrize('kind', ['windows', 'stream'])
@pytest.mark.parametrize('model', models.values(), ids=models)
def test_the_measurement_changes_no_bit_of_the_training(signals, model, kind):
    u,y = signals
    def go(with_hint):
        set_seed(0)
        if kind=='windows': dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, sub_seq_len=40, bs=4)
        else: dls = SequenceDataLoaders.from_arrays([u[:400], u[400:800]], [y[:400], y[400:800]], groups=['a','b'], sub_seq_len=40, bs=4)
        learn = TbpttLearner(dls, model(), loss_func=nn.L1Loss())
        if not with_hint: learn.remove_cb(ThreadHintCB)
        with on_threads(2): hints(lambda: fit(learn, 2))
        return [*learn.model.parameters(), *learn.model.buffers(), torch.stack(learn.recorder.losses), torch.rand(1)]
    assert all(torch.equal(a, b) for a,b in zip(go(True), go(False)))

class Counted(torch.autograd.Function):
    "Notes when its gradient is asked for"
    seen = []
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad):
        Counted.seen.append(torch.get_num_threads())
        return grad

def test_a_pass_is_forward_and_backward_on_that_many_threads():
    class Model(nn.Linear):
        def forward(self, x): return Counted.apply(super().forward(x))
    Counted.seen.clear()
    assert pass_seconds(Model(2, 1), (torch.randn(3, 10, 2),), 1, seconds=.01)>0
    assert len(Counted.seen)>1 and set(Counted.seen)=={1}

def test_a_large_model_is_not_measured_for_long():
    model = Waits(40.)
    assert pass_seconds(model, (torch.randn(3, 10, 2),), 2, most=.02) is None
    calls = iter(range(10**6))
    dls = SequenceDataLoaders.from_arrays(torch.randn(400, 2), torch.randn(400, 1), win_sz=50, bs=2)
    assert not hints(lambda: fit(waiting(dls, lambda: 700. if next(calls)==0 else 0.)))
    assert next(calls)<20 # one pass was measured; all others are those of the training

class Generated(nn.Module):
    "Dropout by a random generator of its own, which nobody can put back"
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.calls = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1),0
    def forward(self, x):
        self.calls += 1
        keep = torch.rand(4, generator=torch.Generator().manual_seed(self.calls))>.3
        return self.head(self.rnn(x)[0]*keep)

def test_a_model_that_counts_its_calls_trains_as_without_the_measurement(dls):
    def go(with_hint):
        set_seed(0)
        dls.train.rng.seed(0)
        learn = TbpttLearner(dls, Generated(), loss_func=nn.L1Loss())
        learn.tbptt_reset_cb.check = False
        if not with_hint: learn.remove_cb(ThreadHintCB)
        hints(lambda: fit(learn))
        return [*learn.model.parameters(), torch.tensor(learn.model.calls)]
    assert all(map(torch.equal, go(True), go(False)))

def test_a_pass_leaves_no_gradient_and_no_state():
    model = Own()
    seconds = pass_seconds(model, (torch.randn(3, 10, 2),), 1)
    assert seconds>0 and model.state is None and all(p.grad is None for p in model.parameters()) and torch.get_num_threads()==2
