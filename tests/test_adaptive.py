"Adaptive measures, and leaves no trace but the length; what it then does is what Overlap does with that length"
from random import Random
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit_own_lr, sgd
from reference import train_overlap
from tbptt_fastai.instruments.adaptive import Adaptive
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.truncation.schemes import Exact, Jittered, RandomUnbiased
from tbptt_fastai.truncation.plan import Fixed
from tbptt_fastai.sequences.windows import Sequences


class Leaky(nn.Module):
    "h = rho h + w x: gradients fall by rho per step, exactly"
    def __init__(self, rho): super().__init__(); self.rho,self.w = rho,nn.Parameter(torch.ones(1, dtype=torch.float64))
    def initial_state(self, bs, device, dtype): return torch.zeros(bs, 1, device=device, dtype=dtype)
    def forward(self, x, h):
        out = []
        for u in x.unbind(1):
            h = self.rho*h+self.w*u
            out.append(h)
        return torch.stack(out, 1),h

def data(n=6, steps=60):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((n, steps, 1))),torch.from_numpy(rng.standard_normal((n, steps, 1)))

def adaptive_loaders(stream=False):
    x,y = data()
    kw = dict(bs=3, shuffle=False, device='cpu')
    seqs = Sequences(list(x), list(y), dtype=torch.float64)
    dl = StreamDL(seqs, sub_seq_len=10, **kw) if stream else TbpttDL(seqs, num_workers=0, **kw)
    return DataLoaders(dl, dl)

def adaptive_learner(scheme, core=None, stream=False, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(StatefulRNN(core or nn.GRU(1, 3, batch_first=True).double()), nn.Linear(1 if core else 3, 1).double())
    return TbpttLearner(adaptive_loaders(stream), model, truncation=scheme, loss_func=nn.MSELoss(), opt_func=sgd, lr=.1,
                        **kwargs)

@pytest.mark.parametrize('stream', [False, True])
def test_it_is_overlap_with_the_length_of_each_epoch(stream):
    scheme = Adaptive(delta=.3, k_max=20)
    learn = fit_own_lr(adaptive_learner(scheme, stream=stream), 3)
    ks = [o['k'] for o in scheme.trace]
    assert len(ks)==3 and all(1<=k<=20 for k in ks) and learn.recorder.truncation is scheme.trace
    if stream: return
    torch.manual_seed(0)
    rnn,head = nn.GRU(1, 3, batch_first=True).double(),nn.Linear(3, 1).double()
    x,y = data()
    for k in ks: train_overlap(rnn, head, x, y, [[[0, 1, 2], [3, 4, 5]]], k, 2*k, torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=.1), nn.functional.mse_loss)
    for a,b in zip(learn.model.parameters(), [*rnn.parameters(), *head.parameters()], strict=True): assert (a-b).abs().max()<1e-10

@pytest.mark.parametrize('rho', [.3, .5, .7])
def test_the_length_is_the_smallest_that_is_good_enough(rho):
    "Gradients that fall by rho leave out a share of rho^K / (1 - 2 rho^K) at K steps, by the estimate; those of a batch all have one sign here"
    scheme = Adaptive(delta=.1, k_max=25)
    learn = adaptive_learner(scheme, Leaky(rho))
    learn.lr = 0.
    found = learn.tbptt_find(bias=.1, max_lag=25, show=False)
    fit_own_lr(learn, 1)
    k = scheme.trace[0]['k']
    assert scheme.trace[0]['reached'] and scheme.trace[0]['beta']==pytest.approx(rho, rel=1e-6)
    assert found.delta[k-1]<.1 and (k==1 or found.delta[k-2]>=.1) and k==found.suggestion

@pytest.mark.parametrize('stream', [False, True])
def test_a_measurement_changes_nothing(stream):
    def trained(scheme):
        set_seed(1)
        return list(fit_own_lr(adaptive_learner(scheme, stream=stream), 3).model.parameters())
    for a,b in zip(trained(Adaptive(k_max=20, scheme=lambda k: Fixed(10))), trained(Fixed(10)), strict=True): assert torch.equal(a, b)

def test_without_a_decay_the_longest_length_is_used():
    scheme = Adaptive(delta=.1, k_max=12)
    with pytest.warns(UserWarning, match='the weights are not finite'): fit_own_lr(adaptive_learner(scheme, Leaky(1.05), cbs=[]), 2)
    assert [(o['k'], o['reached']) for o in scheme.trace]==[(12, False)]*2
    ax = scheme.plot()
    assert ax.get_legend_handles_labels()[1]==['longest, as none was']
    plt.close('all')

def test_it_measures_every_few_epochs_and_anew_in_a_second_fit():
    scheme = Adaptive(delta=.3, k_max=20, every=2)
    calls = []
    learn = adaptive_learner(scheme)
    find = learn.tbptt_find
    learn.tbptt_find = lambda **kwargs: calls.append(learn.epoch) or find(**kwargs)
    fit_own_lr(learn, 5)
    assert calls==[0, 2, 4] and [o['epoch'] for o in scheme.trace]==[0, 1, 2, 3, 4] and scheme.trace[0]['k']==scheme.trace[1]['k']
    fit_own_lr(learn, 1)
    assert len(scheme.trace)==1

def test_settings_that_make_no_sense_are_refused():
    for kwargs in (dict(delta=0), dict(k_max=0), dict(k_min=5, k_max=4), dict(every=0)):
        with pytest.raises(ValueError, match='; expected'): Adaptive(**kwargs)
    with pytest.raises(ValueError, match='too short to see gradients fall'):
        fit_own_lr(adaptive_learner(Adaptive(k_max=400, step=20)), 3)

def test_it_plans_draws_and_recomputes_as_its_scheme_does():
    scheme = Adaptive(k_max=10, scheme=lambda k: RandomUnbiased(5, 6))
    own = RandomUnbiased(5, 6)
    assert scheme.random and scheme.sub_windows(30, rng=Random(1))==own.sub_windows(30, rng=Random(1)) and not scheme.recompute
    assert Adaptive(scheme=Exact).recompute and Adaptive(k_max=10, scheme=lambda k: Jittered(7)).sub_windows(30, rng=Random(2))==Jittered(7).sub_windows(30, rng=Random(2))

def test_a_fit_that_begins_at_a_later_epoch_measures_all_the_same():
    scheme = Adaptive(delta=.3, k_max=20, every=2)
    learn = adaptive_learner(scheme)
    fit_own_lr(learn, 4, start_epoch=1)
    assert [o['epoch'] for o in scheme.trace][-1]==3 and all('beta' in o for o in scheme.trace)

def test_a_scheme_that_changes_the_learning_rate_does_so_here_too():
    scheme = Jittered(7, std=3, least=2, rescale='lr')
    adaptive = Adaptive(k_max=10, scheme=lambda k: scheme)
    for i in range(3): assert adaptive.sub_windows(50, rng=Random(i))==scheme.sub_windows(50, rng=Random(i))
    assert any(o.lr!=1 for o in adaptive.sub_windows(50, rng=Random(0)))
