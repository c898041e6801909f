"A step of `lr_find` is held against what the untrained model has in the same steps."
import copy
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback # with it comes Learner.no_bar
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import AvgSmoothLoss
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from helpers import fit, fit_own_lr, learner, untaught_on_purpose
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.training import callback
from tbptt_fastai.training.lr_search import SearchLoss, without_hooks
from tbptt_fastai.training.metrics import StepSmoothLoss
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.state.carry import Carry
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
    return learner(dls, model or net(), sub_seq_len, cbs, loss_func=nn.MSELoss(), **kwargs)

def tbptt(dls, model=None, **kwargs): return TbpttLearner(dls, model or net(), loss_func=nn.MSELoss(), **kwargs)

def find(learn, **kwargs):
    with learn.no_bar(): return learn.lr_find(show_plot=False, **kwargs)

def fit_from_one_seed(learn):
    "One epoch, with the same numbers for every learner"
    set_seed(1)
    learn.dls.train.rng.seed(1)
    return fit(learn, 1, 1e-3)


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
    assert len(learn.recorder.losses)==100 and 1e-3<found.valley<=1


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

@untaught_on_purpose
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
    learn.add_cb(Callback(after_loss=lambda self: losses.append(self.learn.loss.item()) if self.learn.training else None))
    find(learn, suggest_funcs=None, stop_div=False)
    return losses

@pytest.mark.parametrize('make', [cases[o] for o in ('windows', 'a stream', 'two epochs', 'PyTorch loaders', 'worker processes', 'unbiased')])
@pytest.mark.parametrize('layers', [(), (nn.BatchNorm1d(8), nn.Dropout(.2))], ids=['plain', 'with buffers'])
def test_steps_are_those_of_a_search_without_the_untrained_model(make, layers, monkeypatch):
    "Parameters, running statistics, the order of the data and random numbers are as if nothing else had been run"
    def go():
        set_seed(0)
        learn = make()
        if layers: learn.model.insert(1, nn.Sequential(Transposed(*copy.deepcopy(layers)), Counting()))
        return steps_of(learn),[*learn.model.parameters(), *learn.model.buffers()],learn
    losses,state,learn = go()
    monkeypatch.setattr(callback, 'rate_search', lambda *args: None)
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

def test_the_curve_begins_at_one_and_falls_where_the_model_learns():
    set_seed(0)
    learn = tbptt(windows())
    find(learn, start_lr=1e-5, end_lr=.1, num_it=400)
    losses = torch.stack(learn.recorder.losses)
    assert losses[0]==1 and losses.min()<.97

def filtered(seed, n=100):
    "Sequences that are as hard at every place: a moving average of what comes in"
    rng = np.random.default_rng(seed)
    xs = [rng.standard_normal((200, 1)).astype(np.float32) for _ in range(n)]
    return xs,[np.convolve(x[:,0], [.5,.3,.2])[:200,None].astype(np.float32) for x in xs]

def test_suggestions_are_near_those_of_fastai_where_every_place_is_as_hard():
    "... for whole windows; in the median of five seeds, and by no more than a factor of four. The model learns with them"
    found = {20: [], None: []}
    for seed in range(5):
        xs,ys = filtered(seed)
        for steps in found:
            set_seed(seed)
            dls = SequenceDataLoaders.from_arrays(xs[20:], ys[20:], valid=(xs[:20], ys[:20]), win_sz=200, bs=8, sub_seq_len=20)
            learn = tbptt(dls, sub_seq_len=steps)
            found[steps].append(find(learn).valley)
            if steps is None: continue
            with learn.no_bar(), learn.no_logging():
                before = learn.validate()[0]
                learn.fit_flat_cos(3, found[steps][-1])
                assert learn.validate()[0]<.2*before
    ours,fastais = (np.median(o) for o in found.values())
    assert 1/4<ours/fastais<4

@pytest.mark.parametrize('make,smooth', [(windows, AvgSmoothLoss), (stream, StepSmoothLoss)])
def test_a_training_after_it_records_ordinary_losses(make, smooth):
    set_seed(0)
    learn = tbptt(make())
    set_seed(0)
    other = tbptt(make())
    find(learn)
    assert type(learn.recorder.smooth_loss) is smooth
    ours,theirs = (torch.stack(fit_from_one_seed(o).recorder.losses) for o in (learn, other))
    assert torch.equal(ours, theirs) and type(learn.recorder.smooth_loss) is smooth

def test_an_interrupted_search_leaves_nothing_behind():
    class Interrupt(Callback):
        def before_step(self):
            if self.train_iter==5: raise KeyboardInterrupt
    set_seed(0)
    learn = tbptt(windows())
    finder = LRFinder()
    with pytest.raises(KeyboardInterrupt): fit_own_lr(learn, 1, cbs=[finder, Interrupt()])
    finder.tmp_d.cleanup() # fastai does so where a search ends
    assert type(learn.recorder.smooth_loss) is AvgSmoothLoss and not Carry.entered
    fit(learn, 1, 1e-3)
    assert type(learn.recorder.smooth_loss) is AvgSmoothLoss and len(learn.recorder.losses)==100 and not Carry.entered

def test_a_loss_that_passes_through_zero_is_compared_by_its_difference():
    set_seed(0)
    learn = TbpttLearner(windows(), net(), loss_func=lambda pred, y: nn.functional.mse_loss(pred, y)-50.)
    find(learn, start_lr=1e-2, end_lr=1e-2, suggest_funcs=None, stop_div=False)
    losses = torch.stack(learn.recorder.losses)
    assert len(losses)==100 and (losses-1).abs().max()<.5

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
    set_seed(0)
    learn = TbpttLearner(windows(), net(), loss_func=loss_func)
    with pytest.raises(RuntimeError, match='cannot be had'), learn.no_bar(): learn.fit(1, cbs=(finder := LRFinder()))
    finder.tmp_d.cleanup()
    set_seed(0)
    other = TbpttLearner(windows(), net(), loss_func=loss_func)
    ours,theirs = (list(fit_from_one_seed(o).model.parameters()) for o in (learn, other))
    assert all(torch.equal(a, b) for a,b in zip(ours, theirs))
    assert learn.model[0].state is None # reset after a fit

@pytest.mark.parametrize('how', [dict(sub_seq_len=None), dict(truncation=Exact())])
def test_a_search_has_all_its_steps_where_the_loader_has_more_than_the_learner(how):
    "fastai makes as many epochs as the sub-windows of the loader would need; every step has a whole window"
    set_seed(0)
    learn = tbptt(windows(), **how)
    find(learn)
    assert len(learn.recorder.losses)==100

def test_a_loss_that_is_not_a_number_is_shown_as_such():
    set_seed(0)
    learn = tbptt(windows(), opt_func=SGD)
    find(learn, end_lr=1e30, stop_div=False, suggest_funcs=None)
    losses = torch.stack(learn.recorder.losses)
    assert losses[:20].isfinite().all() and losses[-1].isnan()

def test_losses_one_by_one_are_averaged():
    search = SearchLoss(AvgSmoothLoss())
    search.reset()
    search.compare_with(torch.tensor([1., 3.]))
    search.accumulate(SimpleNamespace(loss=torch.tensor(2.), yb=(torch.zeros(2),), dl=None))
    assert search.value==1

def test_where_both_models_have_nearly_no_loss_neither_is_better():
    search = SearchLoss(AvgSmoothLoss(beta=0.))
    search.reset()
    for untrained,own in [(1., 1.), (1e-9, 1e-6)]:
        search.compare_with(torch.tensor(untrained))
        search.accumulate(SimpleNamespace(loss=torch.tensor(own), yb=(torch.zeros(2),), dl=None))
    assert search.value==1

def test_a_search_after_an_evaluation_begins_in_training_mode():
    set_seed(0)
    learn = tbptt(windows())
    with learn.no_bar(): learn.validate()
    find(learn, start_lr=1e-30, end_lr=1e-29)
    assert set(map(float, learn.recorder.losses))=={1.}

def test_whole_windows_are_compared_with_nothing(monkeypatch):
    monkeypatch.setattr(callback, 'rate_search', None)
    set_seed(0)
    find(learn := tbptt(windows(), sub_seq_len=None))
    assert learn.recorder.losses[0]>2


class Crops(torch.utils.data.Dataset):
    "Windows that begin anywhere, drawn by a generator that nobody can put back"
    def __init__(self, n=10): self.rng,self.data,self.n = np.random.default_rng(0),pairs(n=4),n
    def __len__(self): return self.n
    def __getitem__(self, i):
        start,steps = self.rng.integers(0, 100),self.rng.integers(40, 100)
        return tuple(o[start:start+steps] for o in self.data[i%4])

class Once(IterableDataset):
    "Windows that can be read once"
    def __init__(self): self.windows = iter(pairs(n=2000))
    def __iter__(self): return self.windows
    def __len__(self): return 2000

datasets = {'crops': lambda: DataLoader(Crops(), batch_size=1), 'once': lambda: DataLoader(Once(), batch_size=8)}

@pytest.mark.parametrize('make', datasets.values(), ids=datasets)
def test_data_that_are_others_each_time_are_compared_with_themselves(make):
    set_seed(0)
    find(learn := plain(DataLoaders(make(), DataLoader(pairs(), batch_size=8))), start_lr=1e-30, end_lr=1e-29)
    assert len(learn.recorder.losses)==100 and set(map(float, learn.recorder.losses))=={1.}

class Counts(Callback):
    "What callbacks rely on: `before_train` comes first, `n_iter` is known, and each event comes once a step"
    order = 20
    def before_train(self): self.seen = dict.fromkeys(['before_batch', 'after_loss', 'after_batch'], 0)
    def before_batch(self):
        assert self.n_iter==100
        self.seen['before_batch'] += 1
    def after_loss(self): self.seen['after_loss'] += 1
    def after_batch(self): self.seen['after_batch'] += 1

@pytest.mark.filterwarnings('ignore:You are shadowing an attribute .modules.:UserWarning') # ActivationStats, by itself
def test_callbacks_meet_each_step_once():
    set_seed(0)
    counts,learn = Counts(),tbptt(windows())
    with learn.added_cbs([counts, ActivationStats(every=1)]): find(learn, suggest_funcs=None, stop_div=False)
    assert set(counts.seen.values())<={99, 100} # the last step ends the fit in its `after_batch`
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_a_loss_that_takes_gradients_itself_is_searched():
    def loss_func(pred, y): return nn.functional.mse_loss(pred, y)+1e-3*torch.autograd.grad(pred.sum(), pred, create_graph=True)[0].square().mean()
    set_seed(0)
    find(learn := TbpttLearner(windows(), net(), loss_func=loss_func))
    assert len(learn.recorder.losses)==100

class Reassigned(Counting):
    "A buffer that is another tensor after each call"
    def forward(self, x):
        self.n = self.n+self.training
        return x*(1+self.n/100)

def test_buffers_that_are_replaced_are_those_of_the_model(monkeypatch):
    def go():
        set_seed(0)
        learn = tbptt(windows(), net(Reassigned()))
        return steps_of(learn)
    with_copy = go()
    monkeypatch.setattr(callback, 'rate_search', lambda *args: None)
    assert with_copy==go()

class Uncopied(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.head = nn.LSTM(1, 8, batch_first=True),nn.Linear(8, 1)
    def forward(self, x): return self.head(self.rnn(x)[0])
    def __deepcopy__(self, memo): raise TypeError('there can be only one')

@pytest.mark.filterwarnings('ignore:numpy.core is deprecated:DeprecationWarning') # as in pyproject.toml, but warnings are recorded here
def test_a_model_that_cannot_be_copied_is_searched_as_it_is_and_says_so():
    set_seed(0)
    with pytest.warns(UserWarning, match=r'Uncopied cannot be copied \(there can be only one\)'):
        find(learn := tbptt(windows(), Uncopied()), suggest_funcs=None)
    assert learn.recorder.losses[0]>2

def test_a_copy_calls_no_hook():
    model,called = net(),[]
    for m in model.modules(): m.register_forward_hook(lambda *args: called.append(1))
    without_hooks(model)(torch.randn(2, 5, 1))
    assert not called
    model(torch.randn(2, 5, 1))
    assert called

