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
    for k in a: assert same(a[k], b[k]), f'{k}: {a[k]} {b[k]}'

def killed_and_resumed(tmp_path, kill, make, n_epoch=3, every=7, cbs=list, how='fit_flat_cos'):
    "A training that is killed, each time in another way, and gone on with by a new learner"
    for i,(event,n) in enumerate(kill):
        learn = make(tmp_path, 10+i)
        with pytest.raises(Killed): fit(learn, n_epoch, [TbpttCheckpoint(every=every, resume=True), KillAt(event, n), *cbs()], how)
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
