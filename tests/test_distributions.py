"A model may predict distributions: a washout and the padding of a stream are cut from them as from targets"
import pytest
import torch
from fastai.data.core import DataLoaders
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from helpers import fit, learner, sgd, untaught_on_purpose
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.segment import map_predictions
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences

def normal(o): return Normal(o[...,:1], o[...,1:2].exp())
def independent(o): return Independent(normal(o), 1)
def mixture(o): return MixtureSameFamily(Categorical(logits=o[...,:2]), Normal(o[...,2:4], o[...,4:6].exp()))
def multivariate(o): return MultivariateNormal(o[...,:1], scale_tril=o[...,1:2,None].exp())

class Predicts(nn.Module):
    def __init__(self, of, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.out,self.of = nn.GRU(2, 4, batch_first=True, dtype=dtype),nn.Linear(4, 6, dtype=dtype),of
    def forward(self, x): return self.of(self.out(self.rnn(x)[0]))

def likelihood(dist, y): return -dist.log_prob(y).mean()
def of_mixture(dist, y): return -dist.log_prob(y[...,0]).mean()

def data(lengths):
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 2, generator=g, dtype=torch.float64) for n in lengths]
    return xs,[x.cumsum(0)[:,:1].sin() for x in xs]

kinds = pytest.mark.parametrize('of,loss', [(normal, likelihood), (independent, likelihood), (multivariate, likelihood), (mixture, of_mixture)],
                                ids=['normal', 'independent', 'multivariate', 'mixture'])

@untaught_on_purpose
@kinds
@pytest.mark.parametrize('n_skip', [0, 3, 12])
def test_a_washout_is_cut_from_distributions_of_windows(of, loss, n_skip):
    xs,ys = data((20, 20, 20))
    dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=20, bs=3, dtype=torch.float64, shuffle=False)
    trained,by_hand = Predicts(of),Predicts(of)
    learn = learner(dls, trained, 5, loss_func=loss, opt_func=sgd)
    learn.tbptt_reset_cb.n_skip = n_skip
    fit(learn, 2, .01)
    x,y = torch.stack(xs),torch.stack(ys)
    opt = torch.optim.SGD(by_hand.parameters(), .01)
    for _ in range(2):
        h = None
        for a in range(0, 20, 5):
            out,h = by_hand.rnn(x[:,a:a+5], h)
            h = h.detach()
            skip = min(max(n_skip-a, 0), 5)
            if skip==5: continue
            l = loss(of(by_hand.out(out[:,skip:])), y[:,a+skip:a+5])*(5-skip)/5
            l.backward()
            opt.step()
            opt.zero_grad()
    for a,b in zip(trained.parameters(), by_hand.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad(): whole = loss(of(by_hand.out(by_hand.rnn(x)[0])[:,n_skip:]), y[:,n_skip:])
    assert learn.recorder.values[-1][1]==pytest.approx(whole.item(), abs=1e-6)

@untaught_on_purpose
@kinds
@pytest.mark.parametrize('n_skip', [0, 4])
def test_padding_and_washout_are_cut_from_distributions_of_a_stream(of, loss, n_skip):
    xs,ys = data((17, 9, 12, 5))
    dl = StreamDL(Sequences(xs, ys, dtype=torch.float64), bs=2, sub_seq_len=4)
    learn = learner(DataLoaders(dl, dl), Predicts(of), 'dls', loss_func=loss, opt_func=sgd)
    learn.tbptt_reset_cb.n_skip = n_skip
    fit(learn, 1, 0.)
    m = Predicts(of)
    with torch.no_grad(): losses = [loss(of(m.out(m.rnn(x[None])[0])[:,n_skip:]), y[None,n_skip:])*(len(x)-n_skip) for x,y in zip(xs, ys)]
    assert learn.recorder.values[-1][1]==pytest.approx(sum(losses).item()/sum(len(x)-n_skip for x in xs), abs=1e-6)

@kinds
def test_a_cut_distribution_is_that_of_the_cut_numbers(of, loss):
    o = torch.randn(3, 8, 6, dtype=torch.float64)
    cut,expected = map_predictions(lambda t: t[:,5:], of(o)),of(o[:,5:])
    y = torch.randn(3, 3, 1, dtype=torch.float64)
    assert cut.batch_shape==expected.batch_shape and cut.event_shape==expected.event_shape
    assert torch.equal(loss(cut, y), loss(expected, y)) and cut.sample().shape==expected.sample().shape

@pytest.mark.parametrize('stream', [True, False])
def test_what_cannot_be_cut_is_refused(stream):
    class Wrapped:
        def __init__(self, o): self.o = o
    xs,ys = data((20, 20, 20))
    if stream: dl = StreamDL(Sequences(xs, ys, dtype=torch.float64), bs=2, sub_seq_len=4)
    else: dl = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=20, bs=3, dtype=torch.float64).train
    learn = learner(DataLoaders(dl, dl), Predicts(Wrapped), 4, loss_func=lambda o,y: o.o.mean(), opt_func=sgd)
    learn.tbptt_reset_cb.n_skip = 2
    with pytest.raises(TypeError, match='cannot be cut from a Wrapped'): fit(learn)
