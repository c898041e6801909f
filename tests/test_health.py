"Gradient norms against those computed by hand, warnings once each"
import warnings
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit, fit_own_lr
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.instruments.health import GradientHealth
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences

class ByHand(Callback):
    "The norm before clipping (order 10.4) of all gradients in one vector, fetched at once"
    order,run_valid,norm_type = 10.4,False,2.
    def before_fit(self): self.norms = []
    def before_step(self): self.norms.append(float(torch.cat([p.grad.flatten() for p in self.learn.model.parameters() if p.grad is not None]).norm(self.norm_type)))

def health_learner(signals, *cbs, stream=False, **kwargs):
    set_seed(0)
    u,y = signals
    if stream:
        dl = StreamDL(Sequences([u[:300],u[300:350],u[350:]], [y[:300],y[300:350],y[350:]]), bs=2, sub_seq_len=40)
        dls = DataLoaders(dl, dl)
    else: dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, sub_seq_len=40, bs=4, valid_pct=.25)
    return RNNLearner(dls, hidden_size=4, loss_func=nn.MSELoss(), cbs=[*cbs, ByHand()], **kwargs)

@pytest.mark.parametrize('every', [1, 4, 1000])
@pytest.mark.parametrize('stream', [False, True])
def test_norms_are_those_before_clipping(signals, every, stream):
    clip = .05
    learn = health_learner(signals, health := GradientHealth(every=every), stream=stream, grad_clip=clip)
    fit(learn, 2)
    np.testing.assert_allclose(health.norms, learn.by_hand.norms, rtol=1e-5)
    assert len(health.norms)==len(learn.recorder.losses)
    assert health.clipped==np.mean(np.array(learn.by_hand.norms)>clip) and 0<health.clipped<1
    plain = health_learner(signals, stream=stream, grad_clip=clip)
    fit(plain, 2)
    for a,b in zip(plain.model.parameters(), learn.model.parameters()): assert torch.equal(a, b) # it changes nothing

def test_norms_are_taken_between_unscaling_and_clipping():
    assert MixedPrecision.order<GradientHealth.order<GradientClip.order

def test_accumulated_gradients_are_one_step(signals):
    learn = health_learner(signals, health := GradientHealth(), GradientAccumulation(8))
    fit_own_lr(learn, 1)
    assert 0<len(health.norms)<len(learn.recorder.losses) and health.clipped==0
    np.testing.assert_allclose(health.norms, learn.by_hand.norms, rtol=1e-5)
    fit_own_lr(learn, 2)
    assert len(health.norms)==len(learn.by_hand.norms) # those of the last fit

class Scale(Callback):
    order,run_valid = 5,False
    def __init__(self, by): self.by = by
    def after_loss(self): self.learn.loss_grad = self.loss_grad*self.by

@pytest.mark.parametrize('by,every,kind', [(1e-12, 1, 'vanishing'), (1e-12, 1000, 'vanishing'), (1e9, 2, 'exploding'), (float('nan'), 1, 'exploding'), (float('inf'), 1, 'exploding')])
def test_each_fit_gives_one_warning(signals, by, every, kind):
    learn = health_learner(signals, health := GradientHealth(every=every), Scale(by))
    for _ in range(2): # once in each fit
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            fit_own_lr(learn, 2)
        ours = [str(o.message) for o in seen if 'Gradients are' in str(o.message)]
        assert len(ours)==1 and kind in ours[0] and 'at step 0' in ours[0]

def test_thresholds_are_arguments(signals):
    with pytest.warns(UserWarning, match='above high=1e-05'):
        fit_own_lr(health_learner(signals, GradientHealth(high=1e-5, low=0.)), 1)
    with pytest.warns(UserWarning, match='below low=1e\\+06'):
        fit_own_lr(health_learner(signals, GradientHealth(low=1e6, high=1e9)), 1)
    fit_own_lr(health_learner(signals, GradientHealth()), 1) # no warning, which would be an error

def test_the_host_waits_once_in_many_steps(signals, monkeypatch):
    learn,looks = health_learner(signals, health := GradientHealth(every=4)),[]
    look = health._look
    monkeypatch.setattr(health, '_look', lambda: (looks.append(len(health._waiting)), look()))
    fit_own_lr(learn, 1)
    assert max(looks)==4 and sum(looks)==len(health.norms)

def test_the_plot_shows_the_norms_and_impossible_settings_are_refused(signals):
    learn = health_learner(signals, health := GradientHealth(), grad_clip=.05)
    assert np.isnan(health.clipped) and len(health.norms)==0
    fit_own_lr(learn, 1)
    ax = health.plot()
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), health.norms)
    assert f'{health.clipped:.0%}' in ax.lines[1].get_label()
    ax.figure.canvas.draw()
    assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent()) # above the curves, not on them
    plt.close('all')
    with pytest.raises(ValueError, match='low is 1, high is 0.5'): GradientHealth(1, .5)
    with pytest.raises(ValueError, match='every is 0'): GradientHealth(every=0)

class Evaluate(Callback):
    "Evaluations in the middle of a training, and before it"
    busy = False
    def before_epoch(self):
        if self.busy: return
        self.busy = True
        self.learn.validate()
        self.learn.get_preds()
        self.busy = False
    after_epoch = before_epoch

def test_evaluations_leave_the_norms_as_they_are(signals):
    learn = health_learner(signals, health := GradientHealth(every=4, low=1e6, high=1e9), grad_clip=.05)
    for _ in range(2):
        with pytest.warns(UserWarning, match='vanishing') as seen: fit(learn, 3, cbs=Evaluate())
        assert len([o for o in seen if 'Gradients are' in str(o.message)])==1 # in each fit
        norms,clipped = health.norms,health.clipped
        assert len(norms)==3*len(learn.dls.train) and 0<clipped<1
        with learn.no_bar(), learn.no_logging():
            learn.validate()
            learn.get_preds()
        np.testing.assert_array_equal(health.norms, norms)
        assert health.clipped==clipped

def test_a_fit_that_starts_in_a_later_epoch_starts_anew(signals):
    learn = health_learner(signals, health := GradientHealth())
    for _ in range(2):
        fit_own_lr(learn, 2, start_epoch=1)
        assert len(health.norms)==len(learn.by_hand.norms)

class StopAt(Callback):
    def after_batch(self):
        if self.train_iter==3: raise CancelFitException

def test_a_fit_that_was_stopped_warns_at_its_end(signals):
    with pytest.warns(UserWarning, match='vanishing'):
        fit_own_lr(health_learner(signals, GradientHealth(), Scale(1e-12), StopAt()), 1)

def test_warnings_wait_no_longer_than_an_epoch(signals):
    learn = health_learner(signals, GradientHealth(every=1000), Scale(1e-12))
    with pytest.raises(UserWarning, match='vanishing'): fit_own_lr(learn, 2)
    assert learn.epoch==0 and learn.training # it is an error here

@pytest.mark.parametrize('norm_type', [1., float('inf')])
def test_the_norm_is_that_of_the_clip(signals, norm_type):
    learn = health_learner(signals, health := GradientHealth(), GradientClip(.05, norm_type))
    learn.by_hand.norm_type = norm_type
    fit_own_lr(learn, 1)
    np.testing.assert_allclose(health.norms, learn.by_hand.norms, rtol=1e-5)

def test_norms_that_are_not_a_number_are_neither_clipped_nor_not(signals):
    learn = health_learner(signals, health := GradientHealth(), Scale(float('nan')), grad_clip=.05)
    with pytest.warns(UserWarning, match='exploding'): fit_own_lr(learn, 1)
    assert np.isnan(health.norms).all() and np.isnan(health.clipped)
    health._norms[:2] = [.01, .1]
    assert health.clipped==.5
