"A training that is interrupted anywhere ends as one that never was"
from functools import partial
import random
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.vision.augment import RandTransform
from fastai.losses import L1LossFlat, MSELossFlat
from fastai.metrics import mae, mse
from fastai.optimizer import Adam, OptimWrapper, RMSProp
from fastai.torch_core import set_seed
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased
from tbptt_fastai.instruments.adaptive import Adaptive

class Killed(BaseException): "As if the process were gone"

class KillAt(Callback):
    "End everything in the n-th event of a kind, after all other callbacks"
    def __init__(self, event, n, order=2000):
        self.event,self.order,self.left = event,order,iter(range(n-1)) # which no checkpoint has
        setattr(self, event, self._count)
    def _count(self):
        if next(self.left, None) is None: raise Killed

SIGNAL = torch.Generator().manual_seed(0)
U = torch.randn(1500, 1, generator=SIGNAL)
Y = torch.cat([U.roll(1), U.roll(3)], 1).cumsum(0).mul(.1).sin()

class Noise(RandTransform):
    "Scales a window; drawn once for each"
    split_idx = 0
    def before_call(self, b, split_idx): self.scale = float(torch.rand(1))+random.random()+np.random.rand()
    def encodes(self, x:torch.Tensor): return x*self.scale

def windows(seed, **kwargs):
    set_seed(seed) # a new process has other random numbers
    return SequenceDataLoaders.from_arrays(U, Y, **{**dict(win_sz=60, stp_sz=40, sub_seq_len=20, bs=4), **kwargs})

def stream(seed, **kwargs):
    set_seed(seed)
    parts = [70, 230, 410, 55, 135]
    return SequenceDataLoaders.from_arrays(list(U[:900].split(parts)), list(Y[:900].split(parts)), **{**dict(sub_seq_len=20, bs=3), **kwargs})

class Dropping(nn.Module):
    def __init__(self, rnn, d=.3):
        super().__init__()
        self.rnn,self.drop,self.norm,self.head = StatefulRNN(rnn),nn.Dropout(d),nn.BatchNorm1d(5),nn.Linear(5, 2)
    def forward(self, x): return self.head(self.drop(self.norm(self.rnn(x).transpose(1, 2)).transpose(1, 2)))

def lstm(): return Dropping(nn.LSTM(1, 5, batch_first=True))
def gru(): return Dropping(nn.GRU(1, 5, batch_first=True))
def plain(): return nn.Sequential(SequenceRNN(1, 2, 'lstm', 4))

def learner(path, seed, data=windows, model=lstm, tfms=(), **kwargs):
    dls = data(seed, **(dict(after_batch=[Noise()]) if tfms else {}))
    return TbpttLearner(dls, model(), path=path, **{**dict(loss_func=MSELossFlat(), metrics=[mae, mse]), **kwargs})

def fit(learn, n_epoch=3, cbs=(), how='fit_flat_cos'):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, 1e-2, cbs=cbs)
    return learn

def results(learn):
    r = learn.recorder
    return dict(params=list(learn.model.state_dict().values()), losses=torch.stack(list(r.losses)), lrs=list(r.lrs), iters=list(r.iters),
        values=[list(o) for o in r.values], opt=[v for o in learn.opt.state_dict().get('state', []) if isinstance(o, dict) for v in o.values()])

def same(a, b):
    "Bit by bit"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b or a!=a and b!=b

def check_same(a, b):
    wrong = [k for k in a if not same(a[k], b[k])]
    assert not wrong

def killed_and_resumed(tmp_path, kill, make, n_epoch=3, every=7, cbs=list, how='fit_flat_cos'):
    "A training that is killed, each time in another way, and gone on with by a new learner"
    for i,(event,n) in enumerate(kill):
        learn = make(tmp_path, 10+i)
        try: fit(learn, n_epoch, [TbpttCheckpoint(every=every, resume=True), KillAt(event, n), *cbs()], how)
        except Killed: continue
        assert i, 'it was not killed once'
    learn = make(tmp_path, 99)
    return fit(learn, n_epoch, [TbpttCheckpoint(every=every, resume=True), KillAt('after_fit', 10**9), *cbs()], how)

def uninterrupted(tmp_path, make, n_epoch=3, cbs=list, how='fit_flat_cos', every=7):
    return fit(make(tmp_path/'whole', 10), n_epoch, [TbpttCheckpoint(every=every), *cbs()], how)

@pytest.mark.parametrize('event,n', [('after_batch', 3), ('before_batch', 16), ('after_batch', 40), ('after_pred', 61), ('after_backward', 20),
    ('before_train', 2), ('after_train', 1), ('before_validate', 2), ('after_validate', 1), ('after_epoch', 1), ('after_epoch', 3), ('before_epoch', 2)])
@pytest.mark.parametrize('data', [windows, stream])
def test_a_training_goes_on_wherever_it_was_killed(tmp_path, data, event, n):
    make = partial(learner, data=data)
    check_same(results(uninterrupted(tmp_path, make)), results(killed_and_resumed(tmp_path, [(event, n)], make)))

def test_without_a_checkpoint_it_is_the_same_training(tmp_path):
    check_same(results(uninterrupted(tmp_path, learner)), results(fit(learner(tmp_path, 10))))

KILLS = [('after_batch', 9), ('before_batch', 12), ('after_batch', 26)] # one after the other, each further on

class Own(nn.Module):
    "Carries a state by itself, in an attribute"
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.h = nn.GRU(1, 5, batch_first=True),nn.Linear(5, 2),None
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return self.head(out)

class OwnBuffer(Own):
    "... in a buffer that no state_dict has"
    def __init__(self):
        super().__init__()
        del self.h
        self.register_buffer('h', None, persistent=False)

class Looped(nn.Module):
    "A cell that carries a dict"
    def __init__(self):
        super().__init__()
        self.cell,self.head = nn.GRUCell(1, 4),nn.Linear(4, 2)
    def forward(self, x, state=None):
        h = x.new_zeros(len(x), 4) if state is None else state['h'][0]
        outs = []
        for o in x.unbind(1):
            h = self.cell(o, h)
            outs.append(self.head(h))
        return torch.stack(outs, 1),dict(h=[h], n=3)

def two_layers(): return nn.Sequential(StatefulRNN(nn.LSTM(1, 4, batch_first=True)), nn.Dropout(.2), StatefulRNN(nn.RNN(4, 3, batch_first=True)), nn.Linear(3, 2))
def looped(): return StatefulRNN(Looped())

@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.parametrize('model', [gru, plain, Own, OwnBuffer, two_layers, looped])
def test_whatever_a_model_carries(tmp_path, data, model):
    if data is stream and model in (Own, OwnBuffer, looped): data = partial(stream, bs=5)
    make = partial(learner, data=data, model=model)
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

SCHEMES = dict(overlap=lambda: Overlap(10, 20), unbiased=lambda: RandomUnbiased(15), jittered=lambda: Jittered(15),
    exact=lambda: Exact(20), adaptive=lambda: Adaptive(k_max=20, n_batches=1), adaptive_2=lambda: Adaptive(k_max=20, n_batches=1, every=2))

@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_every_scheme(tmp_path, data, scheme):
    if data is stream and scheme=='jittered': data = partial(stream, bs=2)
    def make(path, seed): return learner(path, seed, data, two_layers, truncation=SCHEMES[scheme]())
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

@pytest.mark.parametrize('kwargs', [dict(num_workers=2), dict(bs=7), dict(bs=5, drop_last=True), dict(sub_seq_len=7), dict(sub_seq_len=None)])
def test_workers_ragged_windows_and_partial_batches(tmp_path, kwargs):
    make = partial(learner, data=partial(windows, **kwargs))
    every = 3 if kwargs.get('sub_seq_len', 20) is None else 4
    check_same(results(uninterrupted(tmp_path, make, 2, every=every)), results(killed_and_resumed(tmp_path, KILLS[:1], make, 2, every=every)))

@pytest.mark.parametrize('data', [windows, stream])
def test_what_a_transform_has_drawn_for_a_window(tmp_path, data):
    if data is stream: data = partial(stream, bs=5) # of which all begin at once
    make = partial(learner, data=data, tfms=True)
    for kill in ([('after_batch', 12)], [('after_batch', 5)], KILLS):
        path = tmp_path/str(len(kill))/kill[0][0]/str(kill[0][1])
        check_same(results(uninterrupted(path, make, 2, every=1)), results(killed_and_resumed(path, kill, make, 2, every=1)))

@pytest.mark.parametrize('n_skip', [5, 25])
@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.filterwarnings('ignore:(?s).*not longer than n_skip')
def test_a_washout(tmp_path, data, n_skip):
    make = partial(learner, data=data, n_skip=n_skip)
    check_same(results(uninterrupted(tmp_path, make, 2, every=3)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=3)))

OPTIMIZERS = dict(adam=Adam, rmsprop=RMSProp, torch_adam=partial(OptimWrapper, opt=torch.optim.Adam), sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_every_optimizer(tmp_path, opt):
    make = partial(learner, opt_func=OPTIMIZERS[opt])
    check_same(results(uninterrupted(tmp_path, make, 2, how='fit')), results(killed_and_resumed(tmp_path, KILLS, make, 2, how='fit')))

@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fit_sgdr'])
def test_every_schedule(tmp_path, how):
    def run(learn, cbs):
        with learn.no_bar(), learn.no_logging():
            if how=='fit_sgdr': learn.fit_sgdr(2, 1, 1e-2, cbs=cbs)
            else: getattr(learn, how)(3, 1e-2, cbs=cbs)
        return results(learn)
    whole = run(learner(tmp_path/'whole', 10), [TbpttCheckpoint(every=7)])
    with pytest.raises(Killed): run(learner(tmp_path, 10), [TbpttCheckpoint(every=7), KillAt('after_batch', 30)])
    check_same(whole, run(learner(tmp_path, 99), [TbpttCheckpoint(every=7, resume=True), KillAt('after_fit', 10**9)]))

CALLBACKS = dict(accumulation=lambda: [GradientAccumulation(10)], early=lambda: [EarlyStoppingCallback(min_delta=10., patience=2)],
    best=lambda: [SaveModelCallback(monitor='mae')])

@pytest.mark.parametrize('cbs', CALLBACKS)
def test_what_other_callbacks_know(tmp_path, cbs):
    cbs = CALLBACKS[cbs]
    whole,resumed = (results(o) for o in (uninterrupted(tmp_path, learner, 5, cbs), killed_and_resumed(tmp_path, [*KILLS, ('after_batch', 50)], learner, 5, cbs=cbs)))
    check_same(whole, resumed)

def test_random_places(tmp_path):
    rng = random.Random(1)
    make = partial(learner, data=stream)
    whole = results(uninterrupted(tmp_path, make, 2, every=5))
    for i in range(6):
        kills = [(rng.choice(['after_batch', 'before_batch', 'after_pred', 'after_loss', 'after_step']), rng.randint(1, 40))]
        check_same(whole, results(killed_and_resumed(tmp_path/str(i), kills, make, 2, every=5)))
