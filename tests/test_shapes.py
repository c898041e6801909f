"Predictions and targets that only broadcasting makes fit are refused, whatever the loss is and whichever loader they come from"
import warnings
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import TensorBase
from torch import nn
from torch.distributions import Independent, Laplace, Normal, TransformedDistribution
from torch.distributions.transforms import ExpTransform
from torch.nn import functional as F
from helpers import fit, learner, sgd, untaught_on_purpose
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.checks import check_shapes

STEPS,SUB = 20,20 # bs too: any two axes may be taken for each other

def data(change=lambda y: y, n=STEPS, k=3):
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, STEPS, 1, generator=g) for _ in range(k)]
    return [(x, change(x.cumsum(1).sigmoid())) for x in xs]

def net(n_out=1, of=lambda o: o):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn,self.out = StatefulRNN(nn.GRU(1, 4, batch_first=True)),nn.Linear(4, n_out)
        def forward(self, x): return of(self.out(self.rnn(x)))
    return Net()

def without_channel(y): return y[...,0]
def two(y): return torch.cat([y, y], -1)

class Own(nn.Module):
    def forward(self, pred, y): return (pred-y).pow(2).mean()

LOSSES = dict(l1=nn.L1Loss(), mse=nn.MSELoss(), huber=nn.HuberLoss(), smooth=nn.SmoothL1Loss(), functional=F.mse_loss, module=Own(),
    bce=nn.BCEWithLogitsLoss(), gaussian=lambda o, y: F.gaussian_nll_loss(o, y, torch.ones_like(o)), poisson=F.poisson_nll_loss,
    soft_margin=lambda o, y: F.soft_margin_loss(o, y), kl=lambda o, y: F.kl_div(F.logsigmoid(o), y, reduction='batchmean'),
    minus=lambda o, y: (o-y).abs().mean(), reversed=lambda o, y: (y-o).abs().mean(), subtract=lambda o, y: torch.subtract(o, y).square().mean(),
    negative=lambda o, y: (-y+o).abs().mean(), in_place=lambda o, y: o.clone().sub_(y).abs().mean(),
    ratio=lambda o, y: (o/y-1).abs().mean(), ratio_of_other=lambda o, y: (torch.div(y, o.exp())-1).abs().mean(), distance=lambda o, y: torch.dist(o, y),
    by_hand=lambda o, y: -(y*F.logsigmoid(o)+(1-y)*F.logsigmoid(-o)).mean(), masked=lambda o, y: torch.where(y>.5, y, o).mean(),
    cosine=lambda o, y: 1-F.cosine_similarity(o, y, -1).mean(), maximum=lambda o, y: torch.maximum(o, y).mean(), added=lambda o, y: (o.neg()+y).square().mean())

def warns(o, y):
    if o.shape!=y.shape: warnings.warn('Using a target size that is different to the input size')
    return (o-y).square().mean()
LOSSES['warns'] = warns

refuse = pytest.mark.parametrize('name', LOSSES)
def refused(dls, model, loss, match=r'targets \(20, 20\)', sub=SUB):
    before = [p.clone() for p in model.parameters()]
    learn = learner(dls, model, sub, loss_func=loss, opt_func=sgd)
    with pytest.raises(ValueError, match=match): fit(learn)
    assert all(torch.equal(p, old) and p.grad is None for p,old in zip(model.parameters(), before))
    return learn

@refuse
@pytest.mark.parametrize('typed', [False, True])
def test_a_target_without_a_channel(name, typed):
    batches = data(without_channel)
    if typed: batches = [(x, TensorBase(y)) for x,y in batches]
    refused(DataLoaders(batches, batches), net(), LOSSES[name])

@refuse
@pytest.mark.parametrize('kind', [torch.float32, torch.int64])
def test_numbers_of_a_stream(name, kind):
    class Flat(StreamDL):
        def _read(self, block):
            x,y = super()._read(block)
            return x,y[...,0].to(kind)
    (x,y), = data(k=1)
    dl = Flat(Sequences(list(x[:4]), list(y[:4])), bs=4, sub_seq_len=10)
    refused(DataLoaders(dl, dl), net(), LOSSES[name], r'targets \(40,\)' if kind==torch.float32 else r'targets \(40,\).*astype\(float\)|targets \(40,\).*cannot take', 'dls')

@refuse
@pytest.mark.parametrize('loader', [lambda o: o, lambda o: torch.utils.data.DataLoader([(a, b) for x,y in o for a,b in zip(x, y)], STEPS)], ids=['list', 'torch'])
def test_a_validation_loader_is_held_as_well(name, loader):
    "... of a training that is right, in which the targets of one epoch are those of another"
    loss = LOSSES[name]
    def make(): return learner(DataLoaders(loader(data()), loader(data(without_channel))), net(), SUB, loss_func=loss)
    with pytest.raises(ValueError, match=r'shape \(20, 20, 1\), targets \(20, 20\)'): fit(make())
    learn = make()
    learn.dls = DataLoaders(loader(data()), loader(data()))
    fit(learn)
    for ask in (learn.validate, lambda dl: learn.get_preds(dl=dl, with_loss=False)):
        with learn.no_bar(), pytest.raises(ValueError, match=r'targets \(20, 20\)'): ask(dl=loader(data(without_channel)))

@untaught_on_purpose
def test_a_stream_whose_first_blocks_are_washout():
    class Flat(StreamDL):
        def _read(self, block):
            x,y = super()._read(block)
            return x,y[...,0]
    (x,y), = data(k=1)
    good,bad = (cls(Sequences(list(x[:4]), list(y[:4])), bs=4, sub_seq_len=5) for cls in (StreamDL, Flat))
    learn = learner(DataLoaders(good, good), net(), 'dls', loss_func=nn.L1Loss())
    learn.tbptt_reset_cb.n_skip = 10
    fit(learn)
    with learn.no_bar(), pytest.raises(ValueError, match=r'targets \(20,\)'): learn.validate(dl=bad)

DISTS = dict(normal=lambda o: Normal(o, 1.), laplace=lambda o: Laplace(o, 1.), independent=lambda o: Independent(Normal(o, 1.), 1),
             transformed=lambda o: TransformedDistribution(Normal(o, 1.), [ExpTransform()]))
def likelihood(dist, y): return -dist.log_prob(y).mean()

@pytest.mark.parametrize('name', DISTS)
@pytest.mark.parametrize('change', [without_channel, two])
def test_a_target_that_a_distribution_would_be_repeated_for(name, change):
    batches = data(change)
    dls = DataLoaders(batches, batches)
    refused(dls, net(1, DISTS[name]), likelihood, r'shape \(20, 20, 1\), targets \(20, 20(, 2)?\)')
    batches = data()
    fit(learner(DataLoaders(batches, batches), net(1, DISTS[name]), SUB, loss_func=likelihood))

def test_a_mixture_by_hand_repeats_the_target():
    batches = data()
    def mixture(dist, y): return -dist.log_prob(y).logsumexp(-1).mean()
    fit(learner(DataLoaders(batches, batches), net(3, lambda o: Normal(o, 1.)), SUB, loss_func=mixture))

@pytest.mark.parametrize('form', [tuple, list])
@pytest.mark.parametrize('which', [0, 1])
def test_each_of_several_targets(form, which):
    def pair(y): return [(two(y), y), (y, without_channel(y))][which]
    batches = [(x, *pair(y)) for x,y in data()]
    dls = DataLoaders(batches, batches)
    dls.n_inp = 1
    def loss(o, a, b): return (o[0]-a).abs().mean()+(b-o[1]).abs().mean()
    model = net(1, lambda o: form((o, 2*o)))
    refused(dls, model, loss, r'shapes \(20, 20, 1\), \(20, 20, 1\), targets shapes \(20, 20')
    right = [(x, y, y) for x,y in data()]
    dls = DataLoaders(right, right)
    dls.n_inp = 1
    fit(learner(dls, model, SUB, loss_func=loss))

def test_weights_beside_a_target_are_none_of_its_kind():
    for weights in (lambda y: y[:1,:1,0], lambda y: y, lambda y: y[...,:1]):
        batches = [(x, y, weights(y)) for x,y in data(two)]
        dls = DataLoaders(batches, batches)
        dls.n_inp = 1
        def loss(o, y, w): return ((o-y).abs()*w).mean()
        learn = learner(dls, net(2), SUB, loss_func=loss)
        learn.tbptt_reset_cb.timed = (True,True,False)
        fit(learn)
    batches = [(x, y, y[...,0]) for x,y in data()]
    dls = DataLoaders(batches, batches)
    dls.n_inp = 1
    refused(dls, net(), loss, r'targets shapes \(20, 20, 1\), \(20, 20\)')

@pytest.mark.parametrize('loss', [lambda o, y: torch.maximum(.9*(y.expand_as(o)-o), .1*(o-y.expand_as(o))).mean(), lambda o, y: (o.mean(-1, keepdim=True)-y).abs().mean(),
                                  lambda o, y: F.gaussian_nll_loss(o[...,:1], y, o[...,1:2].exp()), lambda o, y: MSELossFlat()(o[...,0], y)])
def test_losses_that_mean_it_are_left_alone(loss):
    batches = data()
    fit(learner(DataLoaders(batches, batches), net(3), SUB, loss_func=loss))

def test_classes_are_left_alone():
    batches = data(lambda y: (y[...,0]>.5).long())
    def by_channel(o, y): return F.cross_entropy(o.transpose(1, 2), y)
    for loss in (CrossEntropyLossFlat(), by_channel, lambda o, y: F.nll_loss(o.log_softmax(-1).flatten(0, 1), y.flatten())):
        fit(learner(DataLoaders(batches, batches), net(20), SUB, loss_func=loss))

def test_a_loss_is_not_run_more_than_once_for_a_trial():
    calls = []
    def loss(o, y):
        calls.append(torch.is_grad_enabled())
        return (o[...,0]-y[...,0]).abs().mean()
    batches = data(two)
    fit(learner(DataLoaders(batches, batches[:1]), net(3), SUB, loss_func=loss))
    assert calls==[False, True, True, True, False, False]

def test_a_third_may_be_repeated_for_a_prediction_that_is_not_its_like():
    "... such as the level that predictions and targets are counted from"
    batches = [(x, y, y[...,:1]) for x,y in data(two)]
    dls = DataLoaders(batches, batches)
    dls.n_inp = 1
    def loss(o, y, level): return ((o-level)-(y-level)).abs().mean()
    fit(learner(dls, net(2), SUB, loss_func=loss))

def test_a_distribution_that_was_listened_to_is_as_it_was():
    dist = Normal(torch.zeros(20, 1), 1.)
    def loss(o, y): return -o.log_prob(y).mean()
    check_shapes(loss, dist, (torch.zeros(20, 1),))
    with pytest.raises(ValueError, match='compare each'): check_shapes(loss, dist, (torch.zeros(20),))
    assert 'log_prob' not in vars(dist)

def flat(o, y): return (o[...,0]-y[...,0]).abs().mean()

def test_a_trial_shows_no_warning_and_draws_no_random_number():
    def loss(o, y):
        warnings.warn('of the loss')
        return flat(o, y)+0*torch.rand(1).sum()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_shapes(loss, torch.zeros(20, 3), (torch.zeros(20, 1),))
    assert torch.equal(torch.rand(3), expected)

def test_a_tuple_is_tried_but_not_refused_if_checks_are_left_out():
    batches = data(without_channel)
    learn = learner(DataLoaders(batches, batches), net(1, lambda o: (o, o)), SUB, loss_func=lambda o, y: (o[0]-y).abs().mean())
    learn.tbptt_reset_cb.check = False
    fit(learn)
    learn.tbptt_reset_cb.check = True
    with pytest.raises(ValueError, match='compare each with every other'): fit(learn)
