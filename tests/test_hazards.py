"""Where fastai and sub-windows collide, in loaders and in the training loop: a test for every known hazard.
fastai's own flaws are tested as they are today"""
import copy, inspect, io, os, random
import numpy as np
import pytest
import torch
from fasttransform import Transform
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.hook import summary # of a Learner
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import to_device
from fastai.vision.augment import RandTransform
from torch import nn
from helpers import adam, fit
from reference import train_any
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.segment import Window
from tbptt_fastai.loaders.views import SubWindows
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN
from small_windows import BS, SUB, WIN, Watch, items, noise, same, small_learner, small_loaders, whole


# --- where to split

@pytest.mark.parametrize('num_workers', [0,2,3])
def test_windows_come_in_order_whatever_the_workers(num_workers):
    "Splitting in `create_batches` would mix the sub-windows of several windows: torch takes turns between workers"
    view = SubWindows(TfmdDL(items(), bs=BS, num_workers=num_workers), SUB)
    assert [(x[0,0,0].item(),view.sub_window.start) for x,y in view]==[(100*w+s,s) for w in (0,4,8) for s in (0,12,24)]
    class InWorkers(TfmdDL):
        def create_batches(self, samps):
            for x,y in super().create_batches(samps): yield from [(x[:,s:s+SUB],y[:,s:s+SUB]) for s in range(0, WIN, SUB)]
    if num_workers==2: assert [x[0,0,0].item() for x,y in InWorkers(items(), bs=BS, num_workers=2)][:4]==[0,400,12,412]

class Draw(RandTransform):
    "Adds another number in every call"
    split_idx = 0
    def __init__(self): super().__init__(p=1.); self.calls = 0
    def encodes(self, o:torch.Tensor): self.calls += 1; return o+1000*self.calls

def datasets(): return Datasets(list(range(10)), [[lambda i: items()[i][0]], [lambda i: items()[i][1]]], splits=[list(range(8)),[8,9]])

@pytest.mark.parametrize('native', [False,True])
def test_a_train_only_transform_draws_once_per_window(native):
    "Drawn again for every sub-window, an augmentation would change in mid-window; without its Pipeline it would never run"
    draw = Draw()
    dl = (TbpttDL if native else TfmdDL)(datasets().train, bs=BS, num_workers=0, after_batch=[draw], **(dict(sub_seq_len=SUB) if native else {}))
    before = draw.calls
    xs = [x for x,y in (dl if native else SubWindows(dl, SUB))]
    assert draw.calls-before==2*2 # x and y of two windows
    assert torch.equal(torch.cat(xs[:3], 1)[0,:,0]-xs[0][0,0,0], torch.arange(WIN).float())
    valid = TbpttDL(datasets().valid, bs=BS, num_workers=0, after_batch=[draw], sub_seq_len=SUB)
    assert [x[0,0,0].item() for x,y in valid]==[800] # nor there, where it must not

def test_every_sub_window_is_a_batch_of_its_own():
    "With `_do_one_batch` overridden, events would fire per window, and a cancelled batch would take the rest of its window along"
    class Balance(Callback):
        depth = []
        def before_batch(self): self.depth.append(1)
        def after_loss(self): self.depth.pop()
    learn = fit(small_learner(cbs=[Watch(), GradientAccumulation(10_000), Balance()]))
    assert learn.watch.n==dict(before_batch=9, after_batch=9) and learn.watch.lens==[12,12,6]*3 and not Balance.depth

def test_there_are_as_many_events_as_steps_and_the_share_done_ends_at_one():
    "A callback that calls `one_batch` again and cancels the first one would count twice"
    learn = fit(small_learner(cbs=[Watch()]), 2)
    assert learn.watch.n['after_batch']==18 and learn.pct_train==pytest.approx(1) and learn.train_iter==18

def test_transforms_may_iterate_the_loader_while_it_is_made():
    "Setting up the transforms happens within `TfmdDL.__init__`"
    seen = []
    class Looks(Transform):
        def setups(self, dl): seen.extend(x.shape for x,y in dl)
    TbpttDL(items(), bs=BS, sub_seq_len=SUB, num_workers=0, after_batch=[Looks()])
    assert [s[1] for s in seen]==[12,12,6]*3

def test_one_batch_is_a_whole_window():
    dl = TbpttDL(items(), bs=BS, sub_seq_len=SUB, num_workers=0)
    assert dl.one_batch()[0].shape==(BS,WIN,1)
    dls = small_loaders(cls=TbpttDL, sub_seq_len=SUB)
    assert f'{BS} x {WIN} x 1' in small_learner(dls, sub='dls').summary()

def test_looking_at_the_length_draws_nothing():
    "`one_batch` would change the order of the windows"
    dl = TbpttDL(items(), bs=BS, sub_seq_len=SUB, shuffle=True, num_workers=0)
    states = dl.rng.getstate(),random.getstate(),torch.get_rng_state()
    assert len(dl)==9 and SubWindows(dl, SUB).first_window.steps==WIN
    assert dl.rng.getstate()==states[0] and random.getstate()==states[1] and torch.equal(torch.get_rng_state(), states[2])
    order = lambda dl: [x[0,0,0].item() for x,y in dl]
    a,b = copy.deepcopy(dl),copy.deepcopy(dl)
    len(b), SubWindows(b).first_window
    assert order(a)==order(b)

def test_the_length_is_that_of_the_present_dataset():
    "... and with bs=None an item is a batch"
    dl = TbpttDL(items(), bs=BS, sub_seq_len=SUB, num_workers=0)
    assert (len(dl),len(dl.new(items(10, 60))))==(9,15)
    ready = TbpttDL([tuple(torch.stack(o) for o in zip(*items()))]*2, bs=None, sub_seq_len=SUB, num_workers=0)
    assert len(ready)==6 and [x.shape[:2] for x,y in ready]==[(10,12),(10,12),(10,6)]*2

def test_a_copy_keeps_sub_seq_len():
    "`get_preds` copies its loader"
    dl = TbpttDL(items(), bs=BS, sub_seq_len=SUB, num_workers=0)
    assert dl.new().sub_seq_len==dl.new(shuffle=True).new().sub_seq_len==SUB

class Static(nn.Module):
    "A signal, and features of the window before or after it"
    def __init__(self, n, first=False):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.head,self.first = StatefulRNN(nn.GRU(1, 4, batch_first=True)),nn.Linear(4+n, 1),first
    def forward(self, *xb): return self.by_hand(xb, None, self.rnn)[0]
    def by_hand(self, xb, state, rnn=None):
        s,x = xb if self.first else xb[::-1]
        out,state = (rnn(x),None) if rnn else self.rnn.rnn(x, state)
        return self.head(torch.cat([out, s[:,None].expand(-1, x.shape[1], -1)], -1)),state

@pytest.mark.parametrize('n,first,timed', [(5,False,None), (15,True,(False,True,True)), (WIN,False,(True,False,True))])
def test_inputs_without_time_pass_whole(n, first, timed):
    "... by their size, or because the user says so: features before the signal, or as many as its steps, cannot be told from a signal"
    torch.manual_seed(2)
    its = [((s,x,y) if first else (x,s,y)) for (x,y),s in zip(noise(), torch.randn(10, n))]
    dls = small_loaders(its)
    for dl in dls.loaders: dl._n_inp = 2
    model = Static(n, first)
    hand = copy.deepcopy(model)
    fit(Learner(dls, model, loss_func=nn.functional.l1_loss, opt_func=adam, cbs=TbpttResetCB(SUB, timed=timed)))
    batches = [[torch.stack(o) for o in zip(*its[i:i+BS])] for i in range(0, 10, BS)]
    train_any(hand.by_hand, hand.parameters(), [batches], SUB, 1e-2, nn.functional.l1_loss, (not first,first,True), n_inp=2)
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), hand.parameters()))

def test_features_before_the_signal_are_not_taken_for_it_in_silence():
    with pytest.raises(ValueError, match='timed'): Window((torch.randn(BS, 15),torch.randn(BS, WIN, 1),torch.randn(BS, WIN, 1)), 2)

def test_saving_a_sub_window_saves_its_window():
    "torch's own: a view is saved with all its storage. `clone` saves what is seen"
    def size(t): buffer = io.BytesIO(); torch.save(t, buffer); return buffer.tell()
    x,_ = next(iter(TbpttDL(items(64, 1000), bs=64, sub_seq_len=10, num_workers=0)))
    assert size(x)>256_000 and size(x.clone())<5_000

def test_weights_get_lost_in_a_copy_and_not_in_a_view():
    "fastai's own: `new` forgets `wgts` and `partial_n`"
    weighted,partial = WeightedDL(items(), bs=BS, wgts=[1]+[0]*9, shuffle=True, num_workers=0),PartialDL(items(), bs=BS, partial_n=4, num_workers=0)
    assert weighted.new().wgts.tolist()==[.1]*10 and partial.new().partial_n is None
    assert {x[0,0,0].item()//100 for x,y in SubWindows(weighted, SUB)}=={0} and len(SubWindows(partial, SUB))==3==sum(1 for _ in SubWindows(partial, SUB))

class Pids:
    def __getitem__(self, i): return torch.zeros(WIN),torch.tensor(os.getpid())
    def __len__(self): return 2

def test_workers_do_not_persist():
    "fastai's own: every epoch starts its workers anew, so windows in memory want num_workers=0, which is our default"
    dl = TfmdDL(Pids(), bs=2, num_workers=1, persistent_workers=True)
    assert len({pid.item() for _ in range(2) for _,b in dl for pid in b})==2
    assert inspect.signature(SequenceDataLoaders.from_arrays).parameters['num_workers'].default==0


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, its): self.its = its
    def __iter__(self): return iter(self.its)
    def __len__(self): return len(self.its)

@pytest.mark.parametrize('sub', [None, SUB])
def test_no_window_of_an_iterable_dataset_is_lost(sub):
    its,seen = items(),[]
    class See(Callback):
        def before_batch(self): seen.extend((self.x[:,0,0]/100).tolist()) if self.training else None
    dls = DataLoaders(*[TfmdDL(Stream(its), BS, num_workers=0) for _ in 'tv'])
    fit(small_learner(dls, sub=sub, cbs=[See()]), 1, 0.)
    assert set(range(10))<=set(seen)


# --- knowing where a window starts

def test_the_loader_at_work_is_asked_not_a_flag():
    "`get_preds` works on a copy, `validate(dl=dls.train)` on the other loader"
    learn = fit(small_learner(small_loaders(cls=TbpttDL, sub_seq_len=SUB), sub='dls'))
    expected = whole(learn)
    with learn.no_bar(): preds,loss = learn.get_preds(ds_idx=0)[0],learn.validate(dl=learn.dls.train)[0]
    torch.testing.assert_close(preds, expected)
    assert loss==pytest.approx(nn.functional.mse_loss(expected, torch.stack([y for _,y in learn.dls.train_ds])).item(), abs=1e-6)

def test_what_is_written_on_a_batch_gets_lost():
    "fastai's own: `to_device` makes a plain tuple of one that knew its place; `SubWindows.sub_window` is asked instead"
    class Batch(tuple): pass
    b = Batch((torch.zeros(2),))
    b.start = 12
    assert not hasattr(to_device(b, 'cpu'), 'start')
    view = SubWindows(TfmdDL(items(), bs=BS, num_workers=0, device='cpu'), SUB)
    assert [view.sub_window.start for _ in view][:3]==[0,12,24]

def test_a_loader_is_known_by_its_type():
    "A fastai loader answers with the attributes of its dataset, a callback with those of the learner and the model"
    class Named(list): sub_idx,sub_window,sub_seq_len,dl = 3,3,3,3
    its = Named(noise())
    dls = small_loaders(its)
    assert dls.train.sub_seq_len==3 # it does answer
    with pytest.raises(ValueError, match='neither to the learner nor to its TfmdDL'): small_learner(dls, sub='dls')
    learn = fit(small_learner(dls, sub=None, cbs=[Watch()]))
    assert learn.watch.lens==[WIN]*3

class Cancel(Callback):
    order = 45
    def __init__(self, exc, at): self.exc,self.at = exc,at
    def after_pred(self):
        if self.training and self.train_iter==self.at: raise self.exc

@pytest.mark.parametrize('exc', [CancelFitException, CancelTrainException, CancelEpochException, KeyboardInterrupt])
def test_a_cancelled_window_leaves_no_state(exc):
    "KeyboardInterrupt skips `after_fit`, so what comes next must not count on it"
    learn,fresh = small_learner(),small_learner()
    try: fit(learn, 1, 0., cbs=Cancel(exc('stop'), 4))
    except KeyboardInterrupt: pass
    learn.remove_cb(Cancel)
    assert learn.model[0].state is None
    with learn.no_bar(), fresh.no_bar(): assert list(learn.validate())==list(fresh.validate())
    for o in (learn, fresh): o.dls,o.opt = small_loaders(),None
    assert same(fit(learn), fit(fresh))

def test_a_skipped_last_epoch_leaves_nothing_on_the_learner():
    learn = fit(small_learner(), 2, start_epoch=2)
    assert 'all_batches' not in vars(learn)

def test_the_view_is_there_before_anyone_counts():
    "... so steps, the bar and the schedule agree, and nothing in `dls` was changed"
    seen = []
    class Count(Callback):
        order = 70
        def before_batch(self): seen.append((self.training, self.n_iter, self.learn.progress.pbar.total))
    learn = small_learner(cbs=[Count()])
    before = list(learn.dls.loaders),[len(dl) for dl in learn.dls.loaders],[{**vars(dl)}.keys() for dl in learn.dls.loaders]
    with learn.no_logging(): learn.fit(1)
    assert seen==[(True,9,9)]*9+[(False,2,2)]*2
    assert learn.dls.loaders==before[0] and [len(dl) for dl in learn.dls.loaders]==before[1]

@pytest.mark.parametrize('lengths', [(30,)*4, (30,12,50,7), (12,50,7,30)])
def test_the_learning_rate_ends_low(lengths):
    "A loader that counted too few steps would let the cosine climb again"
    batches = [tuple(torch.randn(2, n, 1) for _ in 'xy') for n in lengths]
    learn = small_learner(DataLoaders(*[TfmdDL(batches, bs=None, num_workers=0)]*2), cbs=[Watch()])
    fit(learn, 2, 1e-2, 'fit_one_cycle')
    lrs,n = learn.recorder.lrs,[-(-o//SUB) for o in lengths]*2
    assert len(lrs)==sum(n) and learn.pct_train==pytest.approx(1) and lrs[-1]<lrs[-2]<lrs[-3]<1e-2 and lrs[-1]<1e-3
    np.testing.assert_allclose(learn.watch.pct, [(w+k/m)/8 for w,m in enumerate(n) for k in range(m)], atol=1e-9)

def test_predictions_in_mid_epoch_end_its_training():
    "fastai's own: `get_preds(inner=True)` leaves evaluation mode and another loader behind for the rest of the epoch; the next one is whole again"
    class Peek(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.train_iter==4: self.learn.get_preds(inner=True)
    learn = fit(small_learner(cbs=[Watch(), Peek()]), 2)
    assert learn.watch.lens==[12,12,6,12] + [12,12,6]*3 and learn.model[0].state is None
