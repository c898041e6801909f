"A step of `lr_find` is held against what the untrained model has in the same steps."
import copy
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback # with it comes Learner.no_bar
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import AvgSmoothLoss, Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.training.lr_search import RateSearch, SearchLoss
from tbptt_fastai.training.metrics import StepSmoothLoss
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased


def sums(seed, n=100, lengths=None):
    "Sequences that start at zero and go on like a random walk, so that a loss grows with the place in the window"
    rng = np.random.default_rng(seed)
    xs = [rng.standard_normal((o, 1)).astype(np.float32) for o in (lengths if lengths is not None else [200]*n)]
    return xs,[x.cumsum(0) for x in xs]

def windows(seed=0, n=100, n_valid=20, **kwargs):
    xs,ys = sums(seed, n)
    return SequenceDataLoaders.from_arrays(xs[n_valid:], ys[n_valid:], valid=(xs[:n_valid], ys[:n_valid]), win_sz=200, **{'bs': 8, 'sub_seq_len': 20, **kwargs})

def stream(seed=0, **kwargs):
    xs,ys = sums(seed, lengths=np.random.default_rng(seed).integers(50, 201, 100))
    return SequenceDataLoaders.from_arrays(xs, ys, **{'bs': 8, 'sub_seq_len': 20, **kwargs})

def pairs(seed=0, n=100): return [(torch.tensor(x), torch.tensor(y)) for x,y in zip(*sums(seed, n))]

def of_torch(seed=0, **kwargs):
    return DataLoaders(DataLoader(pairs(seed), batch_size=8, shuffle=True, **kwargs), DataLoader(pairs(seed+1), batch_size=8))

def net(*layers): return nn.Sequential(StatefulRNN(nn.LSTM(1, 8, batch_first=True)), *layers, nn.Linear(8, 1))

def plain(dls, model=None, cbs=(), sub_seq_len=20, **kwargs):
    return Learner(dls, model or net(), loss_func=nn.MSELoss(), cbs=[TbpttResetCB(sub_seq_len), *cbs], **kwargs)

def tbptt(dls, model=None, **kwargs): return TbpttLearner(dls, model or net(), loss_func=nn.MSELoss(), **kwargs)

def find(learn, **kwargs):
    with learn.no_bar(): return learn.lr_find(show_plot=False, **kwargs)


makers = {
    'a Learner with fastai loaders': lambda seed: plain(DataLoaders.from_dsets(pairs(seed), pairs(seed+100, 20), bs=8)),
    'a Learner with PyTorch loaders': lambda seed: plain(of_torch(seed)),
    'windows': lambda seed: tbptt(windows(seed)),
    'a stream': lambda seed: tbptt(stream(seed)),
}

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('make', makers.values(), ids=makers)
def test_a_rate_is_found_where_the_loss_depends_on_the_place_in_the_window(make, seed):
    set_seed(seed)
    learn = make(seed)
    found = find(learn)
    assert len(learn.recorder.losses)==100 and 1e-4<found.valley<1


class Doubled(IterableDataset):
    "Windows that can be read again, but not looked up"
    def __iter__(self): return iter(pairs())
    def __len__(self): return 100

cases = {
    'windows': lambda: tbptt(windows()),
    'a stream': lambda: tbptt(stream()),
    'a stream of whole sequences': lambda: tbptt(stream(sub_seq_len=None)),
    'PyTorch loaders': lambda: plain(of_torch()),
    'worker processes': lambda: plain(of_torch(num_workers=2)),
    'an iterable dataset': lambda: plain(DataLoaders(DataLoader(Doubled(), batch_size=8), DataLoader(pairs(), batch_size=8))),
    'two epochs': lambda: tbptt(windows(n=44, n_valid=4)),
    'two epochs of PyTorch loaders': lambda: plain(DataLoaders(DataLoader(pairs(0, 40), batch_size=8, shuffle=True), DataLoader(pairs(1, 8), batch_size=8))),
    'a plain layer': lambda: plain(windows(), nn.Sequential(Plain(), nn.Linear(8, 1))),
    'washout': lambda: tbptt(windows(), n_skip=50),
    'washout of a stream': lambda: tbptt(stream(), n_skip=8),
    'a ragged tail': lambda: tbptt(windows(sub_seq_len=30)),
    'dropout': lambda: tbptt(windows(), net(nn.Dropout(.3))),
    'overlap': lambda: tbptt(windows(), truncation=Overlap(10, 20)),
    'overlap on a stream': lambda: tbptt(stream(), truncation=Overlap(10, 20)),
    'jittered': lambda: tbptt(windows(), truncation=Jittered(20)),
    'unbiased': lambda: tbptt(windows(), truncation=RandomUnbiased(mean=16, alpha=6)),
    'unbiased on a stream': lambda: tbptt(stream(), truncation=RandomUnbiased(mean=16, alpha=6)),
    'gradient accumulation': lambda: plain(of_torch(), cbs=[GradientAccumulation(16)]),
    'float64': lambda: tbptt(windows(dtype=torch.float64), net().double()),
}

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, 8, batch_first=True)
    def forward(self, x): return self.rnn(x)[0]

@pytest.mark.filterwarnings('ignore:.*worker processes.*:UserWarning')
@pytest.mark.parametrize('make', cases.values(), ids=cases)
def test_a_rate_too_small_to_change_anything_gives_a_flat_curve(make):
    set_seed(0)
    learn = make()
    find(learn, start_lr=1e-30, end_lr=1e-29)
    losses = torch.stack(learn.recorder.losses)
    assert len(losses)==100 and (losses/losses.mean()-1).abs().max()<1e-5


def steps_of(learn):
    "The loss of each step, as it is"
    losses = []
    learn.add_cb(Callback(after_loss=lambda self: losses.append(self.learn.loss.item()) if self.learn.training and torch.is_grad_enabled() else None))
    find(learn, suggest_funcs=None, stop_div=False)
    return losses

@pytest.mark.parametrize('make', [cases[o] for o in ('windows', 'a stream', 'two epochs', 'dropout', 'PyTorch loaders', 'worker processes', 'unbiased')])
@pytest.mark.parametrize('layers', [(), (nn.BatchNorm1d(8), nn.Dropout(.2))], ids=['plain', 'with buffers'])
def test_steps_are_those_of_a_search_without_the_untrained_model(make, layers, monkeypatch):
    "Parameters, running statistics, the order of the data and random numbers are as if nothing else had been run"
    def go():
        set_seed(0)
        learn = make()
        if layers: learn.model.insert(1, nn.Sequential(Transposed(*copy.deepcopy(layers)), Counting()))
        return steps_of(learn),[*learn.model.parameters(), *learn.model.buffers()],learn
    losses,state,learn = go()
    monkeypatch.setattr(RateSearch, 'run', lambda self: self.loss.compare_with([torch.tensor(1.)]*100))
    without,state_without,learn_without = go()
    assert len(losses)==100 and losses==without
    assert all(torch.equal(a, b) for a,b in zip(state, state_without))

class Counting(nn.Module):
    "A layer whose output depends on how often it was called"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        self.n += self.training # the check before a fit runs it in evaluation
        return x*(1+self.n/100)

class Transposed(nn.Sequential):
    "Layers over channels that come last"
    def forward(self, x): return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_callbacks_act_on_the_untrained_model_as_well():
    "MixUp changes inputs and loss; the noise of its partners is the same in both runs"
    set_seed(0)
    learn = plain(DataLoaders.from_dsets(pairs(), pairs(1, 20), bs=8), cbs=[once_per_window(MixUp(.4))])
    find(learn, start_lr=1e-30, end_lr=1e-29)
    losses = torch.stack(learn.recorder.losses)
    assert (losses/losses.mean()-1).abs().max()<1e-5

def test_the_search_stops_where_the_loss_explodes():
    set_seed(0)
    learn = tbptt(windows(), opt_func=SGD)
    find(learn, end_lr=1e4)
    losses = torch.stack(learn.recorder.losses)
    assert 20<len(losses)<100 and losses[-1]>4*losses.min()

def test_the_curve_is_in_the_units_of_the_loss_and_falls_where_the_model_learns():
    set_seed(0)
    learn = tbptt(windows())
    with torch.no_grad(): untrained = np.mean([nn.functional.mse_loss(net()(x), y).item() for x,y in learn.dls.valid])
    find(learn, start_lr=1e-3, end_lr=.1, num_it=400)
    losses = torch.stack(learn.recorder.losses)
    assert losses[0].item()==pytest.approx(untrained, rel=.3) and losses.min()<.97*losses[0]

@pytest.mark.parametrize('make,smooth', [(windows, AvgSmoothLoss), (stream, StepSmoothLoss)])
def test_a_training_after_it_records_ordinary_losses(make, smooth):
    def fit(learn):
        set_seed(1)
        learn.dls.train.rng.seed(1)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return torch.stack(learn.recorder.losses)
    set_seed(0)
    learn = tbptt(make())
    set_seed(0)
    other = tbptt(make())
    find(learn)
    assert type(learn.recorder.smooth_loss) is smooth
    assert torch.equal(fit(learn), fit(other)) and type(learn.recorder.smooth_loss) is smooth

def test_an_interrupted_search_leaves_nothing_behind():
    class Interrupt(Callback):
        def before_step(self):
            if self.train_iter==5: raise KeyboardInterrupt
    set_seed(0)
    learn = tbptt(windows())
    finder = LRFinder()
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[finder, Interrupt()])
    finder.tmp_d.cleanup() # fastai does so where a search ends
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert type(learn.recorder.smooth_loss) is AvgSmoothLoss and len(learn.recorder.losses)==100

def test_a_loss_that_passes_through_zero_is_compared_by_its_difference():
    set_seed(0)
    learn = TbpttLearner(windows(), net(), loss_func=lambda pred, y: nn.functional.mse_loss(pred, y)-50.)
    find(learn, start_lr=1e-2, end_lr=1e-2, suggest_funcs=None, stop_div=False)
    losses = torch.stack(learn.recorder.losses)
    assert len(losses)==100 and (losses-losses.mean()).abs().max()<20

def test_windows_that_begin_with_no_loss_at_all_can_be_searched():
    set_seed(0)
    xs,ys = sums(0, 20)
    for y in ys: y[:60] = 0
    model = net()
    for p in model[1].parameters(): nn.init.zeros_(p)
    find(learn := tbptt(SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), win_sz=200, bs=8, sub_seq_len=20), model))
    assert len(learn.recorder.losses)==100 and torch.stack(learn.recorder.losses).isfinite().all()

def test_a_batch_that_a_callback_cancels_is_cancelled_in_both_runs():
    def cancel(self):
        if self.learn.training and self.learn.iter%7==3: raise CancelBatchException
    set_seed(0)
    find(learn := tbptt(windows(), cbs=Callback(before_batch=cancel)), start_lr=1e-30, end_lr=1e-29)
    losses = torch.stack(learn.recorder.losses)
    assert len(losses)>=100-100//7 and (losses/losses.mean()-1).abs().max()<1e-5

def test_a_training_works_after_a_search_that_failed_before_its_first_step():
    "... in the same way as one without it"
    failing = [True]
    def loss_func(pred, y):
        if failing: raise RuntimeError(f'the loss cannot be had, {failing.pop()}')
        return nn.functional.mse_loss(pred, y)
    def fit(learn):
        set_seed(1)
        learn.dls.train.rng.seed(1)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return list(learn.model.parameters())
    set_seed(0)
    learn = TbpttLearner(windows(), net(), loss_func=loss_func)
    with pytest.raises(RuntimeError, match='cannot be had'), learn.no_bar(): learn.fit(1, cbs=(finder := LRFinder()))
    finder.tmp_d.cleanup()
    set_seed(0)
    other = TbpttLearner(windows(), net(), loss_func=loss_func)
    assert all(torch.equal(a, b) for a,b in zip(fit(learn), fit(other)))
    assert learn.model[0].state is None # reset after a fit

def test_whole_windows_are_searched_as_fastai_does():
    "Every step has a whole window, so nothing is compared"
    set_seed(0)
    learn = tbptt(windows(), sub_seq_len=None)
    find(learn)
    assert type(learn.recorder.smooth_loss) is AvgSmoothLoss

def test_later_epochs_are_compared_with_the_same_untrained_model(monkeypatch):
    set_seed(0)
    learn,seen = tbptt(windows(n=44, n_valid=4, shuffle=False)),[]
    compare = SearchLoss.compare_with
    monkeypatch.setattr(SearchLoss, 'compare_with', lambda self, losses: (seen.append(torch.stack(losses)), compare(self, losses)))
    find(learn, start_lr=1e-2, end_lr=1e-1)
    first,second,*_ = seen
    assert len(first)==len(second)==50 and torch.equal(first, second)
