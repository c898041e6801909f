"Sub-windows come in order, as views, from any loader; the loader itself stays what it was"
import random
from collections import namedtuple
import numpy as np
import pytest
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.data.load import DataLoader as FastaiLoader
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.torch_core import TensorBase, set_seed
from fastai.vision.augment import RandTransform
from fasttransform import Transform
from torch.utils.data import DataLoader
from tbptt_fastai.truncation.plan import SubWindow
from tbptt_fastai.loaders.segment import Window, WindowPart
from tbptt_fastai.loaders.windows import SubWindows, TbpttDL
from tbptt_fastai.sequences.windows import SequenceWindows


def items(n=10, win_sz=25): return [(torch.arange(win_sz).float()[:,None]+100*i, torch.tensor([i,i]), torch.full((win_sz,1), -float(i))) for i in range(n)]

def check_order(loader, n=10, win_sz=25, sub_seq_len=10, n_inp=2):
    "Every window once, its sub-windows one after the other"
    seen = []
    view = loader if isinstance(loader, SubWindows) else loader.sub_windows()
    for b in view:
        x,i,start = b[0],b[1][:,0],view.sub_window.start
        assert torch.equal(x[:,:,0], 100.*i[:,None]+torch.arange(start, view.sub_window.stop))
        assert torch.equal(b[2], -i[:,None,None].float().expand_as(b[2])) and b[2].shape[:2]==x.shape[:2]
        assert view.is_first==(start==0)
        if start==0: window = i.tolist()
        assert i.tolist()==window
        seen += [(o,start) for o in window]
    assert sorted(seen)==[(i,s) for i in range(n) for s in range(0, win_sz, sub_seq_len)]


@pytest.mark.parametrize('num_workers', [0,2])
@pytest.mark.parametrize('shuffle', [False,True])
@pytest.mark.parametrize('kind', ['TbpttDL', 'TfmdDL', 'DataLoader'])
def test_sub_windows_come_in_order_with_and_without_workers(kind, shuffle, num_workers):
    if kind=='TbpttDL': dl = TbpttDL(items(), bs=4, sub_seq_len=10, shuffle=shuffle, num_workers=num_workers)
    else: dl = SubWindows(dict(TfmdDL=TfmdDL, DataLoader=DataLoader)[kind](items(), 4, shuffle=shuffle, num_workers=num_workers), 10)
    check_order(dl)
    assert len(dl)==9 and sum(1 for _ in dl)==9
    check_order(dl) # a second epoch


def test_sub_windows_are_views_of_one_window():
    ds = SequenceWindows(np.arange(100.), np.arange(100.), win_sz=25)
    for a,b in zip(*[iter(x for x,y in TbpttDL(ds, bs=4, sub_seq_len=10, num_workers=0))]*2): assert a.untyped_storage().data_ptr()==b.untyped_storage().data_ptr(); break


def test_each_window_is_transformed_once():
    class Jitter(RandTransform):
        split_idx,order = 0,0
        def __init__(self): super().__init__(p=1.); self.calls = 0
        def encodes(self, o:torch.Tensor):
            self.calls += 1
            return o+self.calls if o.is_floating_point() else o
    dsets = Datasets(list(range(10)), [[lambda i: items()[i][0]], [lambda i: items()[i][2]]], splits=[list(range(8)),[8,9]])
    jitter = Jitter()
    dl = TbpttDL(dsets.train, bs=4, sub_seq_len=10, num_workers=0, after_batch=[jitter])
    before,sub_windows = jitter.calls,[x for x,y in dl]
    assert jitter.calls-before==4 # two batches of x and y, not six sub-windows
    assert torch.equal(sub_windows[1][0,:,0]-sub_windows[0][0,:,0], torch.full((10,), 10.)) # one draw per window


def test_one_batch_new_and_statistics_are_of_whole_windows():
    dl = TbpttDL(SequenceWindows(np.arange(1000.), np.arange(1000.), win_sz=25), bs=40, sub_seq_len=10, num_workers=0, after_batch=[Normalize(axes=(0,1))])
    whole = dl.new(shuffle=True)
    assert whole.sub_seq_len==10 and dl.one_batch()[0].shape==(40,25,1)
    assert len(dl)==3 and len(dl.new(sub_seq_len=None))==1 and len(dl.new(sub_seq_len=7))==4
    assert type(dl.new(cls=TfmdDL)) is TfmdDL
    rng = dl.rng.getstate()
    len(dl), dl.win_sz
    assert dl.rng.getstate()==rng # looking at the length draws nothing


@pytest.mark.parametrize('n,bs,drop_last', [(10,4,True), (10,4,False), (3,4,False), (1,1,False)])
def test_len_is_the_number_of_steps(n, bs, drop_last):
    for sub_seq_len in (None,1,10,24,25):
        dl = TbpttDL(items(n), bs=bs, sub_seq_len=sub_seq_len, num_workers=0, drop_last=drop_last)
        assert len(dl)==sum(1 for _ in dl)==(n//bs if drop_last else -(-n//bs))*(1 if sub_seq_len is None else -(-25//sub_seq_len))


def test_a_data_block_is_cut_in_training_only():
    block = DataBlock((TransformBlock, TransformBlock), get_x=lambda i: items()[i][0], get_y=lambda i: items()[i][2], splitter=IndexSplitter([7,8,9]))
    dls = block.dataloaders(list(range(10)), bs=3, dl_type=TbpttDL, sub_seq_len=10, num_workers=0)
    assert [x.shape[1] for x,y in dls.train]==[10,10,5]*2 and [x.shape[1] for x,y in dls.valid]==[25]


def test_batches_of_any_form_are_cut_along_time():
    x,static,typed = torch.zeros(2,6,3),torch.zeros(2,4),TensorBase(torch.zeros(2,6))
    window = Window((dict(x=(x,static)), [typed,None,5]), n_inp=1)
    inputs,targets = window.cut(2, 4)
    assert inputs['x'][0].shape==(2,2,3) and inputs['x'][1] is static and targets[0].shape==(2,2) and type(targets[0]) is TensorBase and targets[1:]==[None,5]
    assert window.steps==6 and window.targets_timed==[True,False,False] and window.cut(0, 6) is window.batch
    for batch,message in (((torch.zeros(2),), r'first array has shape \(2,\)'), (('a',), 'first array is missing')):
        with pytest.raises(ValueError, match=message): Window(batch)


def test_elements_that_are_as_long_by_coincidence_are_told_apart():
    "A static input of 6 features beside windows of 6 steps, or in front of windows of another length, is told apart by `timed`"
    x,static,y = torch.zeros(2,6,3),torch.zeros(2,6),torch.zeros(2,6)
    assert [o.shape[1] for o in Window((x, static, y), n_inp=2).cut(0, 2)]==[2,2,2]
    assert [o.shape[1] for o in Window((x, static, y), n_inp=2, timed=(True,False,True)).cut(0, 2)]==[2,6,2]
    window = Window((torch.zeros(2,60), x, y), n_inp=2, timed=(False,True,True))
    assert window.steps==6 and [o.shape[1] for o in window.cut(0, 2)]==[60,2,2]
    with pytest.raises(ValueError, match='timed has 2 entries, a batch 3 elements'): Window((x, static, y), timed=(True,True))
    view = SubWindows([(x, static, y)], truncation=4, timed=(True,False,True))
    assert [[o.shape[1] for o in b] for b in view]==[[4,6,4],[2,6,2]] and len(view)==2


def test_what_has_no_loss_is_not_a_step():
    "The washout's sub-windows, and those before a label for the window, only warm the state up"
    x,y = torch.arange(50.).view(2,25,1),torch.zeros(2,25,1)
    view = SubWindows([(x, y)], truncation=10, n_skip=12)
    parts = [(b[0].shape[1], view.is_first, [w[0].shape[1] for _,w in view.warm_up]) for b in view]
    assert parts==[(10,True,[10]), (5,False,[])] and len(view)==2
    view = SubWindows([(x, torch.tensor([1,2]))], truncation=10)
    (b,), = [[b for b in view]]
    assert torch.equal(b[0], x[:,20:]) and torch.equal(b[1], torch.tensor([1,2])) and torch.equal(torch.cat([w for _,(w,) in view.warm_up], 1), x[:,:20]) and len(view)==1


def test_a_view_keeps_the_device_and_a_view_of_a_view_is_one_of_the_loader():
    dl = TbpttDL(items(), bs=4, sub_seq_len=10, num_workers=0, device=torch.device('meta'))
    view = dl.sub_windows()
    assert next(iter(view))[0].device.type=='meta' and view.device==dl.device and view.bs==4
    assert SubWindows(view).dl is dl and len(SubWindows(view))==3


def test_looking_at_the_first_item_draws_nothing():
    class Noisy:
        def __len__(self): return 6
        def __getitem__(self, i): return torch.randn(25, 1),torch.zeros(25, 1)
    dl = TbpttDL(Noisy(), bs=3, sub_seq_len=10, num_workers=0)
    state = torch.get_rng_state()
    assert len(dl)==6 and torch.equal(torch.get_rng_state(), state)


def test_empty_loaders_say_so():
    with pytest.raises(ValueError, match='no batches: 3 windows, bs=4, drop_last=True'): TbpttDL(items(3), bs=4, drop_last=True, num_workers=0).one_batch()


@pytest.mark.parametrize('kwargs', [dict(shuffle=True), dict(shuffle=True, drop_last=True), {}, dict(shuffle=True, bs=None), dict(num_workers=2, shuffle=True)], ids=str)
def test_windows_are_those_of_TfmdDL(signals, kwargs):
    "... in the same order, and random generators are left as it would leave them"
    class Noise(Transform):
        def encodes(self, o:torch.Tensor): return o+torch.randn_like(o)
    class Counted(TbpttDL):
        n_ended = 0
        def after_iter(self): self.n_ended += 1
    def run(f):
        set_seed(3)
        dl = Counted(SequenceWindows(*signals, win_sz=50, stp_sz=7), **{**dict(bs=6, after_batch=Noise(), num_workers=0), **kwargs})
        epochs = [list(f(dl)) for _ in range(2)]
        assert dl.n_ended==2
        return epochs,torch.get_rng_state().tolist(),random.getstate(),np.random.get_state()[1],vars(dl).keys()
    (a,*states_a),(b,*states_b) = run(TfmdDL.__iter__),run(TbpttDL.__iter__)
    assert [[[t.tolist() for t in o] for o in epoch] for epoch in a]==[[[t.tolist() for t in o] for o in epoch] for epoch in b]
    np.testing.assert_equal(states_a, states_b)

@pytest.mark.parametrize('owner', [FastaiLoader, TfmdDL], ids=lambda o: o.__name__)
def test_a_loader_replaced_anywhere_is_asked(signals, monkeypatch, owner):
    seen,plain = [],TfmdDL.__iter__
    monkeypatch.setattr(owner, '__iter__', lambda self: seen.append(1) or plain(self), raising=False)
    list(TbpttDL(SequenceWindows(*signals, win_sz=50), bs=6, num_workers=0))
    assert seen

Batch = namedtuple('Batch', 'x y')

@pytest.mark.parametrize('make', [lambda x,y: (x,y), lambda x,y: [x,y], lambda x,y: ((x,),y), lambda x,y: Batch(x, y), lambda x,y: (dict(x=x),y), lambda x,y: (TensorBase(x),y), lambda x,y: (x,(),y)], ids=range(7))
def test_a_sub_window_has_the_form_of_its_window(make):
    x,y = torch.arange(60.).view(2, 30, 1),torch.arange(60).view(2, 30)
    cut = Window(make(x, y)).cut(10, 20)
    assert repr(cut)==repr(make(x[:,10:20], y[:,10:20])) and type(cut) is type(make(x, y))

def test_a_loader_that_grows_is_counted_anew():
    batches = [(torch.zeros(2, 10, 1), torch.zeros(2, 10, 1))]*3
    view = SubWindows(batches, 5)
    assert len(view)==len(list(view))==6
    batches.append(batches[0])
    assert len(view)==len(list(view))==8

def test_a_washout_leaves_targets_without_a_time_axis_whole():
    x,labels,pred = torch.zeros(4, 10, 1),torch.arange(4),torch.zeros(4, 3)
    segment = WindowPart(Window((x, labels)), SubWindow(0, 10, 4))
    res,(targets,) = segment.counted(pred, (labels,))
    assert res is pred and targets is labels
    segment = WindowPart(Window((x, x, labels)), SubWindow(0, 10, 4))
    _,(steps,targets) = segment.counted(pred, (x, labels))
    assert steps.shape[1]==6 and targets is labels
