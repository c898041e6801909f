"""A parameter whose short gradients have the wrong sign. It pushes ten units of a chain up and thirteen down, and the
first unit is seen; after Tallec and Ollivier 2017 (arXiv 1705.08209)"""
import statistics
import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit_own_lr, untaught_on_purpose
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.truncation.schemes import Exact, RandomUnbiased
from tbptt_fastai.truncation.plan import Fixed
from tbptt_fastai.sequences.windows import Sequences

UP,DOWN,BURN_IN = 10,13,200 # units; steps until the state is at rest

class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        n = UP+DOWN
        self.theta = nn.Parameter(torch.tensor(.5, dtype=torch.float64))
        self.register_buffer('A', (torch.eye(n)/2+torch.diag(torch.ones(n-1), 1)/2).double())
        self.register_buffer('push', torch.tensor([1.]*UP+[-1.]*DOWN, dtype=torch.float64))
    def forward(self, x, s):
        if s is None: s = x.new_zeros(len(x), UP+DOWN)
        out = []
        for _ in range(x.shape[1]):
            s = s@self.A.T+self.theta*self.push
            out.append(s[:,:1])
        return torch.stack(out, 1),s

class HalfSquares(nn.Module):
    reduction = 'sum'
    def forward(self, pred, target): return (pred-target).pow(2).sum()/2

class NotReweighted(RandomUnbiased):
    def plan(self, *args): return [o._replace(cuts=()) for o in super().plan(*args)]

class Sum(Callback):
    "Gradients of each window are added up, and no step is taken"
    order = 90
    def before_fit(self): self.windows = []
    def before_step(self):
        if self.dl.is_first: self.windows.append(0.)
        self.windows[-1] += self.learn.model.rnn.theta.grad.item()
        raise CancelStepException()

class InverseSquareRoot(Callback):
    "A learning rate of 1e-3/sqrt(1+t), t in time steps"
    def before_step(self): self.opt.set_hyper('lr', 1e-3/(1+self.dl.sub_window.stop)**.5)

def theta_after(scheme, steps, seed=0, n_windows=1, n_skip=0, cbs=None):
    "The parameter after training on the sum of losses"
    set_seed(seed)
    x,y = ([torch.full((steps, 1), o, dtype=torch.float64)]*n_windows for o in (0.,1.))
    train = TbpttDL(Sequences(x, y, dtype=torch.float64), bs=1, num_workers=0)
    valid = TbpttDL(Sequences([x[0][:n_skip+1]], [y[0][:n_skip+1]], dtype=torch.float64), bs=1, num_workers=0)
    learn = TbpttLearner(DataLoaders(train, valid), StatefulRNN(Chain()), truncation=scheme, n_skip=n_skip, loss_func=HalfSquares(), opt_func=SGD, cbs=cbs)
    fit_own_lr(learn, 1)
    return learn.model.rnn.theta.item()

def mean_gradient(scheme, n_windows=1, steps=400):
    "Of a step, at rest; for each window"
    seen = Sum()
    theta_after(scheme, BURN_IN+steps, n_windows=n_windows, n_skip=BURN_IN, cbs=seen)
    return [o/steps for o in seen.windows]


@untaught_on_purpose
def test_short_gradients_have_the_wrong_sign():
    "A step that comes j steps after a cut has the gradient of the last j+1 pushes, which are +1 for the first ten; the unit is at -3, its target is 1"
    full, = mean_gradient(Exact())
    assert full==pytest.approx((-3-1)*2*(UP-DOWN), rel=1e-9)
    cut, = mean_gradient(Fixed(10))
    assert cut==pytest.approx(-4*statistics.mean(range(1, 11)), rel=1e-9)

@untaught_on_purpose
def test_the_mean_gradient_at_rest_is_the_full_one():
    "An error within three times of what as many windows have; cuts at random do not do it alone"
    found = mean_gradient(RandomUnbiased(16, 6), 12, 700)
    error = statistics.stdev(found)/len(found)**.5
    assert 0<error<15 and abs(statistics.mean(found)-24)<3*error and statistics.mean(found)>0
    assert statistics.mean(mean_gradient(NotReweighted(16, 6), 3, 800))<-15

@pytest.mark.parametrize('seed', range(2))
def test_training_ends_where_the_full_gradient_vanishes(seed):
    assert theta_after(RandomUnbiased(16, 6), 4000, seed, cbs=InverseSquareRoot())==pytest.approx(-1/6, abs=.02)

@pytest.mark.parametrize('scheme', [Fixed(10), NotReweighted(16, 6)], ids=['fixed', 'random'])
def test_training_by_short_gradients_runs_away(scheme): assert theta_after(scheme, 4000, cbs=InverseSquareRoot())>5
