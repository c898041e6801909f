"Targets of another number of steps than the inputs: right in whole windows, and refused by name in sub-windows"
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.losses import CrossEntropyLossFlat, L1LossFlat, MSELossFlat
from torch import nn
from helpers import fit, learner, sgd
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN

BS = 4
def arrays(steps, rate, classes=False, n=8):
    x = torch.randn(n, steps, 1, generator=torch.Generator().manual_seed(0))
    y = x.cumsum(1).sin()[:,::rate][:,:steps//rate]
    return x,(y[...,0]>0).long() if classes else y

class Strided(nn.Module):
    "One prediction for so many steps; with 1, one for each"
    def __init__(self, stride=2, n_out=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv,self.rnn,self.out = nn.Conv1d(1, 4, stride, stride=stride),StatefulRNN(nn.LSTM(4, 4, batch_first=True)),nn.Linear(4, n_out)
    def forward(self, x): return self.out(self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2)))

LOADERS = dict(
    batches=lambda x, y, sub: list(zip(x.split(BS), y.split(BS))), torch=lambda x, y, sub: torch.utils.data.DataLoader(list(zip(x, y)), BS),
    fastai=lambda x, y, sub: TfmdDL(list(zip(x, y)), bs=BS, num_workers=0), tbptt=lambda x, y, sub: TbpttDL(list(zip(x, y)), BS, sub, num_workers=0),
    datasets=lambda x, y, sub: TfmdDL(Datasets(range(len(x)), [[x.__getitem__], [y.__getitem__]]), bs=BS, num_workers=0))
loaders = pytest.mark.parametrize('name', LOADERS)
LOSSES = [nn.L1Loss(), nn.MSELoss(), MSELossFlat(), L1LossFlat(), nn.HuberLoss(), lambda o, y: (o-y).abs().mean()]

def made(name, data, model, sub, loss, cls=learner, valid=None, **kwargs):
    dls = DataLoaders(LOADERS[name](*data, sub), LOADERS[name](*(valid or data), sub))
    return cls(dls, model, sub, loss_func=loss, opt_func=sgd, **kwargs)

def refused(learn, match='another number of steps'):
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=match): fit(learn)
    assert all(torch.equal(p, old) and p.grad is None for p,old in zip(learn.model.parameters(), before))

@loaders
@pytest.mark.parametrize('cls', [learner, TbpttLearner])
@pytest.mark.parametrize('steps,sub', [(60, 20), (60, 30), (60, 40), (61, 20), (62, 20), (63, 21), (62, 31)])
def test_a_strided_layer_is_for_whole_windows(steps, sub, cls, name):
    for loss in LOSSES[:3] if cls is learner else LOSSES: refused(made(name, arrays(steps, 2), Strided(), sub, loss, cls))
    data = arrays(steps, 2)
    learn = fit(made(name, data, Strided(), None, nn.MSELoss(), cls), 1, 0.)
    expected = nn.functional.mse_loss(Strided()(data[0]), data[1]).item()
    assert learn.recorder.values[-1][1]==pytest.approx(expected, rel=1e-5)

@loaders
@pytest.mark.parametrize('sub', [20, 30])
def test_classes_at_another_rate_have_the_remedy_of_rates(sub, name):
    refused(made(name, arrays(60, 2, True), Strided(n_out=2), sub, CrossEntropyLossFlat()))

@loaders
def test_classes_at_another_rate_of_which_some_are_ignored_are_refused_in_sub_windows(name):
    x,y = arrays(60, 2, True)
    y[:,3] = -100
    with pytest.raises(ValueError, match='some count and some do not.*60 steps.*another number of steps'):
        fit(made(name, (x, y), Strided(n_out=2), 20, CrossEntropyLossFlat()))
    learn = fit(made(name, (x, y), Strided(n_out=2), None, CrossEntropyLossFlat()), 1, 0.)
    assert learn.recorder.values[-1][1]==pytest.approx(CrossEntropyLossFlat()(Strided(n_out=2)(x), y).item(), rel=1e-5)

@loaders
@pytest.mark.parametrize('sub', [20, None])
def test_a_washout_of_classes_at_another_rate_is_refused(sub, name):
    learn = made(name, arrays(60, 2, True), Strided(n_out=2), sub, CrossEntropyLossFlat())
    learn.tbptt_reset_cb.n_skip = 10
    refused(learn, 'n_skip is 10 steps of a window of 60.*shape .[48], 30.')

@loaders
def test_classes_of_a_window_that_are_as_many_as_a_sub_window_has_steps_are_right(name):
    class Ahead(Strided):
        def forward(self, x): return super().forward(x)[:,-1:].expand(-1, 20, -1)
    learn = fit(made(name, arrays(60, 3, True), Ahead(1, 2), 20, CrossEntropyLossFlat()), 1, 0.)
    x,y = arrays(60, 3, True)
    assert learn.recorder.values[-1][1]==pytest.approx(CrossEntropyLossFlat()(Ahead(1, 2)(x), y).item(), rel=1e-5)

@loaders
@pytest.mark.parametrize('loss', LOSSES, ids=range(len(LOSSES)))
def test_as_many_targets_as_a_sub_window_has_steps_are_not_those_of_its_steps(loss, name):
    "Every third of 60 steps: as many as a sub-window of 20, or the last of 40"
    for sub in (20, 40): refused(made(name, arrays(60, 3), Strided(1), sub, loss), 'not for the same steps')

@loaders
def test_as_many_predictions_of_a_window_as_a_sub_window_has_steps_are_right(name):
    class Ahead(Strided):
        def forward(self, x): return super().forward(x)[:,-1:].expand(-1, 20, -1)
    fit(made(name, arrays(60, 3), Ahead(1), 20, nn.MSELoss()))

@loaders
@pytest.mark.parametrize('sub', [20, None])
def test_a_washout_of_targets_at_another_rate_is_refused(sub, name):
    for loss in LOSSES:
        learn = made(name, arrays(60, 2), Strided(), sub, loss)
        learn.tbptt_reset_cb.n_skip = 10
        refused(learn, 'n_skip is 10 steps of a window of 60.*shape .[48], 30, 1')
        with learn.no_bar(), pytest.raises(ValueError, match='n_skip is 10'): learn.validate()
    learn.tbptt_reset_cb.timed = (True,False)
    if sub is None: fit(learn) # it was said

@loaders
def test_what_is_said_to_have_a_time_axis_has_its_steps(name):
    for steps in (60, 62):
        learn = made(name, arrays(steps, 2), Strided(), 20, nn.MSELoss())
        learn.tbptt_reset_cb.timed = (True,True)
        refused(learn, rf'timed is \(True, True\), but an element has shape \([14], {steps//2}, 1\): expected \(batch, {steps}')
    data = arrays(60, 1)
    learn = made(name, (data[0], torch.arange(8)%3), Strided(), 20, nn.MSELoss())
    learn.tbptt_reset_cb.timed = (True,True)
    refused(learn, r'timed is \(True, True\), but an element has shape')

@loaders
def test_a_validation_at_another_rate_is_refused(name):
    learn = made(name, arrays(60, 1), Strided(1), 20, nn.MSELoss(), valid=arrays(60, 2))
    with pytest.raises(ValueError, match='another number of steps'): fit(learn)
