"Sequences in files train as those in memory do, are read sub-window by sub-window beside the computing, and fail with their name"
import copy
import gc
import pickle
import random
import threading
import weakref
from pathlib import Path
import h5py
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.metrics import mae
from fastai.torch_core import set_seed
from fastai.vision.augment import RandTransform
from fasttransform import Transform
from torch import Tensor, nn
from helpers import fit
from reference import train_tbptt, window_epochs, windows_by_hand
from tbptt_fastai.sequences.arrays import FileArray, HDF5Array, blocks, channel_stats
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences

SUB = 25


class Source:
    "What a zarr array or another store is to the library: shape, type and slices. It notes what is asked of it"
    def __init__(self, a): self.a,self.shape,self.dtype,self.asked = a,a.shape,a.dtype,[]
    def __getitem__(self, steps):
        self.asked.append((steps.start, steps.stop))
        return self.a[steps]
    @property
    def longest(self): return max(b-a for a,b in self.asked)


class Failing(Source):
    fails = False
    def __getitem__(self, steps):
        if self.fails and steps.start>=self.fails: raise OSError('the disk is gone')
        return super().__getitem__(steps)


class Endless:
    "A hundred million steps that are in no memory"
    shape,dtype,longest = (10**8,),np.dtype('f4'),0
    def __getitem__(self, steps):
        self.longest = max(self.longest, steps.stop-steps.start)
        return np.sin(np.arange(steps.start, steps.stop), dtype='f4')


class Net(nn.Module):
    def __init__(self, n_in=2, n_out=1):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.head = StatefulRNN(nn.LSTM(n_in, 5, batch_first=True)),nn.Linear(5, n_out)
    def forward(self, x): return self.head(self.rnn(x))


def memmap(a, path='a.bin', dtype=None, mode='r'):
    a = a.astype(dtype or a.dtype)
    a.tofile(path)
    return np.memmap(path, a.dtype, mode, shape=a.shape)

def hdf5(a, path, name='u', **kwargs):
    with h5py.File(path, 'a') as f: f.create_dataset(name, data=a, **kwargs)
    return HDF5Array(path, name)

def trained(train, valid, bs=2, shuffle=True, **kwargs):
    "Parameters, losses and predictions of a training on streams over two datasets"
    set_seed(3)
    train.split_idx,valid.split_idx = 0,1
    dl = StreamDL(train, bs=bs, sub_seq_len=SUB, shuffle=shuffle, **kwargs)
    learn = fit(RNNLearner(DataLoaders(dl, dl.new(valid, shuffle=False)), hidden_size=5, metrics=mae), 2)
    res = [*learn.model.parameters(), *learn.model.buffers(), torch.tensor(learn.recorder.values), torch.stack(learn.recorder.losses)]
    with learn.no_bar(): return [*res, *learn.get_preds()]

def same(a, b):
    assert len(a)==len(b)
    for o,p in zip(a, b): assert o.dtype==p.dtype and torch.equal(o, p)


@pytest.fixture
def parts(signals):
    "Three sequences of unequal length, none of them a whole number of sub-windows, and one to validate"
    u,y = signals
    cuts = [(0,410), (410,560), (560,893), (893,1200)]
    return [u[a:b] for a,b in cuts],[y[a:b] for a,b in cuts]

def to_file(kind, i, a):
    if kind=='source': return Source(a)
    if kind=='h5py': return h5py.File(f'{i}.h5', 'w').create_dataset('u', data=a)
    if kind=='hdf5': return hdf5(a, f'{i}.h5', chunks=(7, a.shape[1]), compression='gzip')
    if kind=='datasets': # one for each channel
        names = [f'c{c}' for c in range(a.shape[1])]
        for c,name in enumerate(names): hdf5(a[:,c], f'{i}.h5', name)
        return HDF5Array(f'{i}.h5', names)
    return memmap(a, f'{i}.bin', kind)


# as in memory

@pytest.mark.parametrize('form,kind', [(form,kind) for form in ('sequences', 'windows') for kind in ('>f4', '<f8', 'source', 'hdf5', 'datasets')]+
                         [('one window in a row',kind) for kind in ('<f4', '>f8', '>f2', 'h5py')])
def test_training_is_bitwise_that_of_arrays_in_memory(parts, kind, form):
    "... with the same losses, metrics and predictions"
    native = {'<f8':'f8', '>f8':'f8', '>f2':'f2'}.get(kind, 'f4')
    memory = [[o.astype(native) for o in seqs] for seqs in parts]
    files = [[to_file(kind, f'{j}{i}', o) for i,o in enumerate(seqs)] for j,seqs in enumerate(parts)]
    def datasets(x, y):
        if form=='sequences': return Sequences(x[:3], y[:3], check=False),Sequences(x[3:], y[3:])
        win_sz,stp_sz = (70,30) if form=='windows' else (140,None)
        return SequenceWindows(x[:3], y[:3], win_sz, stp_sz),SequenceWindows(x[3:], y[3:], win_sz)
    bs = 7 if form=='one window in a row' else 2
    assert datasets(*files)[0].in_files and not datasets(*memory)[0].in_files
    same(trained(*datasets(*files), bs=bs), trained(*datasets(*memory), bs=bs))


def test_training_is_bitwise_that_of_a_loop_by_hand(signals):
    "... over windows of a memory map: several in a row, a ragged last sub-window, shuffled"
    u,y = (o[:700] for o in signals)
    x_map,y_map = memmap(u, 'u.bin', '>f8'),memmap(y, 'y.bin')
    set_seed(3)
    dls = SequenceDataLoaders.from_arrays(x_map, y_map, valid=(x_map, y_map), win_sz=70, stp_sz=90, sub_seq_len=SUB, bs=4)
    learn = fit(TbpttLearner(dls, Net(), opt_func=lambda params, lr: torch_adam(params, lr)), 2)
    other,x = Net(),windows_by_hand(torch.from_numpy(u), torch.from_numpy(y), 70, 90)
    train_tbptt(other.rnn.rnn, other.head, *x, window_epochs(8, 4, 2, 3), SUB, 1e-2, nn.functional.l1_loss)
    same(list(learn.model.parameters()), list(other.parameters()))

def torch_adam(params, lr):
    from fastai.optimizer import OptimWrapper
    return OptimWrapper(params, torch.optim.Adam, lr=lr)


@pytest.mark.parametrize('dtype,expected', [('u1',torch.uint8), ('?',torch.bool), ('>i2',torch.int16), ('>i4',torch.int32), ('>i8',torch.int64), ('>f2',torch.float32), ('>f8',torch.float32)])
def test_types_and_byte_orders_become_those_of_torch(dtype, expected):
    a = (np.arange(60)%2).astype(dtype)
    for kind in (memmap(a), Source(a), hdf5(a, 'a.h5')):
        x, = Sequences(kind).read([0, 0], [3, 50], [5, 10])
        assert x.dtype==expected and x.shape==((2,10,1) if a.dtype.kind=='f' else (2,10))
        assert (x[0,:5].flatten()==torch.from_numpy(a[3:8].astype(a.dtype.newbyteorder('='))).to(expected)).all() and not x[0,5:].any()


def test_integers_in_files_are_tokens_and_classes():
    "Training on big-endian integers equals that on native ones in memory"
    class Tagger(Net):
        def __init__(self):
            super().__init__(4, 3)
            self.embed = nn.Embedding(5, 4)
        def forward(self, x): return super().forward(self.embed(x))
    tokens = np.random.default_rng(0).integers(0, 5, 640)
    def params(x, y):
        set_seed(3)
        ds = Sequences([x[:333], x[333:]], [y[:333], y[333:]])
        dl = StreamDL(ds, bs=2, sub_seq_len=SUB, shuffle=True)
        learn = TbpttLearner(DataLoaders(dl, dl), Tagger(), loss_func=nn.CrossEntropyLoss())
        return list(fit(learn, 2).model.parameters())
    same(params(memmap(tokens, 'x.bin', '>i4'), memmap(tokens%3, 'y.bin', '>i8')), params(tokens.astype(np.int32), tokens%3))


def test_hdf5_files_by_a_pattern_train_as_the_arrays_in_them(parts):
    Path('runs').mkdir()
    for i,(u,y) in enumerate(zip(*parts)):
        hdf5(u[:,0], f'runs/{i}.h5', 'in/a')
        hdf5(u[:,1:], f'runs/{i}.h5', 'in/b')
        hdf5(y, f'runs/{i}.h5', 'y')
    kw = dict(sub_seq_len=SUB, bs=2)
    set_seed(3)
    dls = SequenceDataLoaders.from_hdf5('runs/*.h5', ['in/a','in/b'], 'y', **kw)
    assert dls.train_ds.groups==[f'runs/{i}.h5' for i in range(4)] and dls.train_ds.x_names==['in/a','in/b']
    a = fit(RNNLearner(dls, hidden_size=5), 2)
    set_seed(3)
    b = fit(RNNLearner(SequenceDataLoaders.from_arrays(*parts, groups=list('abcd'), **kw), hidden_size=5), 2)
    same(list(a.model.parameters()), list(b.model.parameters()))
    held_out = SequenceDataLoaders.from_hdf5([Path(f'runs/{i}.h5') for i in (0, 2)], ['in/a','in/b'], 'y', valid_files='runs/3.h5', **kw)
    assert held_out.train_ds.steps.tolist()==[410,333] and held_out.valid_ds.steps.tolist()==[307]


# read sub-window by sub-window

@pytest.fixture
def spied(signals):
    "Loaders over noting sources, and the sources"
    x,y = map(Source, signals)
    dls = SequenceDataLoaders.from_arrays(x, y, win_sz=235, stp_sz=60, sub_seq_len=SUB, bs=3, valid_pct=.3)
    return dls,x,y

def test_no_read_is_longer_than_a_sub_window(spied):
    "... in training, validation, prediction, `lr_find`, and for what is shown"
    dls,x,y = spied
    learn = TbpttLearner(dls, Net(), metrics=mae) # finding the scaling would read everything, in blocks
    x.asked.clear(), y.asked.clear()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=8, show_plot=False)
    dls.show_batch()
    learn.export('e.pkl')
    assert x.longest==y.longest==SUB


def test_training_on_a_hundred_million_steps_reads_sub_windows_only():
    "A window that is too long for memory: what is read are the sub-windows that are trained on, and one more"
    class Stop(Callback):
        def after_batch(self):
            if self.train_iter==9: raise CancelFitException()
    x,y = Endless(),Endless()
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x, y), check=False, win_sz=10**8-500, stp_sz=250, sub_seq_len=SUB, bs=3)
    fit(TbpttLearner(dls, Net(1), cbs=Stop()), 2)
    assert x.longest==y.longest==SUB


def test_one_sub_window_is_read_ahead_while_another_is_in_use(signals):
    "Each training and evaluation step finds its successor being read, and none after it"
    x,y = map(Source, signals)
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x, y), win_sz=1200, sub_seq_len=SUB, bs=1)
    class Look(Callback):
        order = 100
        def before_batch(self):
            self.i = int(self.learn.dl.sub_window.start[0])//SUB
            wanted = min(self.i+1, 47)*SUB
            for _ in range(1000): # the reading thread does it, though this one is still in its step
                if any(a==wanted for a,_ in y.asked): break
                ahead.wait(.01)
            assert y.asked[-1][0]==wanted
            readers.update(t.name for t in threading.enumerate())
        def after_batch(self):
            assert max(a for a,_ in x.asked)<=(self.i+1)*SUB
            steps.append(self.i)
    ahead,steps,readers = threading.Event(),[],set()
    learn = TbpttLearner(dls, Net(), cbs=Look())
    class Clear(Callback):
        def before_train(self): x.asked.clear(), y.asked.clear()
        before_validate = before_train
    learn.add_cb(Clear())
    fit(learn, 1)
    assert steps==[*range(48)]*2 and len(readers)>1


def test_few_sub_windows_are_alive(spied, monkeypatch):
    "The one in use, the one read ahead, and what the loop has not let go of yet"
    dls,alive,most = spied[0],[],[]
    read = StreamDL._read
    def noted(self, block):
        batch = read(self, block)
        alive.append(weakref.ref(batch[0]))
        most.append(sum(o() is not None for o in alive))
        return batch
    monkeypatch.setattr(StreamDL, '_read', noted)
    fit(TbpttLearner(dls, Net()), 1)
    assert len(most)>20 and max(most)<=4


def test_what_reads_everything_reads_blocks():
    "Checks and scaling hold a small part of a long array at a time"
    x = Source(np.random.default_rng(0).standard_normal((2_000_000,3)).astype('f4'))
    mean,std = channel_stats(Sequences(x).arrays[0])
    assert len(x.asked)>=6 and x.longest*3<=1<<18
    np.testing.assert_allclose(std, x.a.astype('f8').std(0), rtol=1e-6)
    assert torch.equal(torch.cat(list(blocks(FileArray(x), 3000))), torch.from_numpy(x.a))


@pytest.mark.skipif(not Path('/proc/self/smaps').exists(), reason='only Linux says what is resident')
def test_pages_of_a_memory_map_do_not_stay():
    "What was read once is let go, so that resident memory does not grow with the file; but not the changes of a copy-on-write map"
    def resident():
        rows = Path('/proc/self/smaps').read_text().split('\n')
        i = next(i for i,row in enumerate(rows) if row.endswith('a.bin'))
        return next(int(row.split()[1]) for row in rows[i:] if row.startswith('Rss:'))
    u = memmap(np.ones(1<<20, 'f4'))
    x = Sequences(u)
    assert resident()<100 # KiB, of 4096
    for start in range(0, 1<<20, 1<<14): x.read([0], [start], [1<<14])
    assert resident()<100 and x.read([0], [77], [1])[0]==1
    del u,x
    u = memmap(np.ones(100, 'f4'), mode='c')
    u[7] = 5
    assert Sequences(u).read([0], [7], [1])[0]==5==u[7]
    u = memmap(np.ones(100, 'f4'), mode='r+')
    u[7] = 5
    assert Sequences(u).read([0], [7], [1])[0]==5==u[7]


# what goes wrong

def test_files_that_are_missing_or_wrong_are_named(signals):
    u,y = signals
    hdf5(u, 'a.h5')
    hdf5(y[:-1], 'a.h5', 'part/y')
    make = SequenceDataLoaders.from_hdf5
    with pytest.raises(FileNotFoundError, match=r"no file 'runs/\*\.h5'"): make('runs/*.h5', 'u', 'y')
    with pytest.raises(FileNotFoundError, match='b.h5'): make(['a.h5','b.h5'], 'u', 'u')
    with pytest.raises(KeyError, match=r"a.h5 has no dataset 'y'; it has \['part', 'part/y', 'u'\]|a.h5 has no dataset 'y'; it has \['part/y', 'u'\]"): make('*.h5', 'u', 'y')
    with pytest.raises(KeyError, match="no dataset 'part'"): make('*.h5', 'u', 'part')
    with pytest.raises(ValueError, match='1200 steps of x and 1199 of y'): make('*.h5', 'u', 'part/y')
    with pytest.raises(ValueError, match=r"datasets \['u', 'part/y'\] of a.h5 have shapes \[\(1200, 2\), \(1199, 1\)\]"): make('*.h5', ['u','part/y'], 'u')
    with h5py.File('a.h5', 'a') as f: f['none'],f['word'] = np.zeros((0,2), 'f4'),['a']*1200
    with pytest.raises(ValueError, match=r'x\[0\] has shape \(0, 2\): it has no steps'): make('*.h5', 'none', 'u')
    with pytest.raises(TypeError, match='x.0. is an array of object'): make('*.h5', 'word', 'u')
    with h5py.File('a.h5', 'a') as f: f['image'],f['number'] = np.zeros((4,3,2)),3.
    for name in ('image', 'number'):
        with pytest.raises(ValueError, match=r'expected \(time,\) or \(time, channels\)'): make('*.h5', name, name)
    with pytest.raises(TypeError, match='without a time axis'): Sequences(Source(np.array(3.)))


def test_a_file_that_is_no_hdf5_file_is_named():
    Path('a.h5').write_text('no signals')
    with pytest.raises(OSError, match='a.h5: .*signature not found'): HDF5Array('a.h5', 'u')
    hdf5(np.arange(9999.), 'b.h5')
    with open('b.h5', 'r+b') as f: f.truncate(1000)
    with pytest.raises(OSError, match='b.h5: .*truncated file'): HDF5Array('b.h5', 'u')
    with h5py.File('c.h5', 'w') as f: f['u'] = h5py.Empty('f4')
    with pytest.raises(ValueError, match=r"c.h5 have shapes \[None\]"): HDF5Array('c.h5', 'u')


def test_links_in_hdf5_files_are_followed():
    hdf5(np.arange(9.), 'a.h5')
    with h5py.File('a.h5', 'a') as f: f['soft'],f['hard'],f['broken'] = h5py.SoftLink('/u'),f['u'],h5py.SoftLink('/v')
    with h5py.File('b.h5', 'w') as f: f['out'] = h5py.ExternalLink('a.h5', '/u')
    for a in (HDF5Array('a.h5', ['soft','hard']), HDF5Array('b.h5', 'out')): assert a[3:4].max()==3
    with pytest.raises(KeyError, match="a.h5 has no dataset 'broken'"): HDF5Array('a.h5', 'broken')

@pytest.mark.parametrize('steps', [3, -1, slice(2, 5), slice(None), slice(None, None, 4), slice(4, 4), [1, 2]], ids=str)
def test_datasets_of_a_file_are_read_as_the_array_that_they_make(steps):
    "One step of several datasets is one of all their channels, too"
    a,b = np.arange(10.),np.arange(20.).reshape(10, 2)
    hdf5(a, 'a.h5', 'a'), hdf5(b, 'a.h5', 'b')
    for names,expected in (('a', a), ('b', b), (['a','b'], np.column_stack([a, b])), (['b','a','a'], np.column_stack([b, a, a]))):
        np.testing.assert_array_equal(HDF5Array('a.h5', names)[steps], expected[steps], strict=True)


def test_not_all_files_are_open_at_once(parts, monkeypatch):
    monkeypatch.setattr('tbptt_fastai.sequences.arrays._MAX_OPEN', 3)
    xs,ys = ([hdf5(o, f'{i}.h5', name) for i,o in enumerate(seqs)] for name,seqs in zip('xy', parts))
    train = lambda x, y: trained(Sequences(x[:3], y[:3]), Sequences(x[3:], y[3:]))
    same(train(xs, ys), train(*parts))
    assert 0<sum(o._data is not None for o in xs+ys)<=3


def test_not_a_number_in_a_file_is_named_with_file_and_step(signals):
    u,y = signals
    for i in range(3): hdf5(u, f'{i}.h5')
    with h5py.File('1.h5', 'a') as f: f['u'][712,1] = np.nan
    with pytest.raises(ValueError, match=r'x of sequence 1.h5 is \[.*nan\] at step 712'): SequenceDataLoaders.from_hdf5('*.h5', 'u', 'u')
    SequenceDataLoaders.from_hdf5('*.h5', 'u', 'u', check=False)
    a = memmap(np.where(np.arange(900_001)==900_000, np.inf, 0).astype('>f4'))
    with pytest.raises(ValueError, match='x of sequence north is .inf. at step 900000'): Sequences(a, groups=['north'])


def readers(): return [t for t in threading.enumerate() if t is not threading.main_thread() and 'ThreadPoolExecutor' in t.name]

@pytest.mark.parametrize('mode', ['train', 'validate'])
def test_a_read_that_fails_is_reported_and_can_be_tried_again(signals, mode):
    x,y = Failing(signals[0]),Source(signals[1])
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x, y), win_sz=400, sub_seq_len=SUB, bs=1, shuffle=False)
    learn = TbpttLearner(dls, Net())
    x.fails = 200
    with pytest.raises(OSError, match='the disk is gone'):
        fit(learn, 2) if mode=='train' else learn.validate()
    gc.collect()
    assert readers()==[]
    x.fails = False
    hooks = [h for m in learn.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks==[] and learn.model.rnn.state is None
    fresh = TbpttLearner(dls, copy.deepcopy(learn.model))
    learn.opt = None # with the moments of the steps before
    fit(learn, 2), fit(fresh, 2)
    same(list(learn.model.parameters()), list(fresh.model.parameters()))


@pytest.mark.parametrize('event,error', [('before_batch',RuntimeError), ('after_pred',KeyboardInterrupt), ('after_batch',CancelFitException), ('after_batch',RuntimeError), ('after_train',RuntimeError)])
def test_an_interrupted_fit_leaves_no_thread(spied, event, error):
    class Boom(Callback):
        def __call__(self, name):
            if name==event and (name=='after_train' or self.training and self.learn.train_iter==3): raise error('stop')
    learn = TbpttLearner(spied[0], Net(), cbs=Boom())
    if error is CancelFitException: fit(learn, 2)
    else:
        with pytest.raises(error, match='stop'): fit(learn, 2)
    gc.collect()
    assert readers()==[]
    learn.remove_cb(Boom)
    fit(learn, 1)
    assert readers()==[]


def test_a_loop_that_is_left_early_leaves_no_thread(spied):
    for batch in spied[0].train.sub_windows(): break
    gc.collect()
    assert readers()==[]


# batch transforms

class Double(Transform):
    def encodes(self, x:Tensor): return 2*x+1
    def decodes(self, x:Tensor): return (x-1)/2

class Gain(RandTransform):
    "Every window times a number of its own"
    def __init__(self, p=1.):
        super().__init__(p=p)
        self.drawn,self.used = [],[]
    def before_call(self, b, split_idx):
        super().before_call(b, split_idx)
        self.gain = torch.rand(len(b[0]), 1, 1)+.5
        self.drawn.append(self.gain if self.do else None)
    def encodes(self, x:Tensor):
        self.used.append(self.gain)
        return x*self.gain

def windows(signals, cls=StreamDL, bs=3, stp_sz=100, **kwargs):
    x,y = [memmap(o, f'{i}.bin') for i,o in enumerate(signals)] if cls is StreamDL else signals
    ds,valid = SequenceWindows(x, y, 110, stp_sz),SequenceWindows(x, y, 110)
    ds.split_idx,valid.split_idx = 0,1
    dl = cls(ds, bs=bs, sub_seq_len=SUB, **kwargs)
    return DataLoaders(dl, dl.new(valid, shuffle=False))


@pytest.mark.parametrize('shuffle', [False, True])
def test_a_deterministic_transform_gives_what_it_gives_for_whole_windows(signals, shuffle):
    def params(cls):
        set_seed(3)
        dls = windows(signals, cls, bs=4, stp_sz=150, shuffle=shuffle, after_batch=[Double()], num_workers=0)
        learn = fit(TbpttLearner(dls, Net()), 2)
        return [*learn.model.parameters()]
    dls = windows(signals, bs=4, stp_sz=150, after_batch=[Double()])
    whole = windows(signals, TbpttDL, bs=4, stp_sz=150, after_batch=[Double()], num_workers=0).train.one_batch()
    for k,part in zip(range(5), dls.train.sub_windows()):
        for o,w in zip(part, whole): assert torch.equal(o, w[:,k*SUB:(k+1)*SUB])
    same(params(StreamDL), params(TbpttDL))


@pytest.mark.parametrize('p', [1., .5])
def test_a_random_transform_draws_once_for_each_window(signals, p):
    gain,seen = Gain(p),[]
    dls = windows(signals, bs=4, shuffle=False, after_batch=[gain])
    class Note(Callback):
        def before_batch(self):
            if self.training: seen.append((self.learn.dl.sub_window, self.xb[0].clone()))
    learn = TbpttLearner(dls, Net(), cbs=Note())
    torch.manual_seed(0)
    random.seed(1)
    gain.drawn.clear()
    gain.used.clear()
    fit(learn, 2)
    plain,n_sub = torch.from_numpy(signals[0]),5
    assert len(dls.train_ds)==11 and len(seen)==2*3*n_sub # the last batch has three windows and an empty row
    gains = []
    for i,(block,xb) in enumerate(seen):
        if i%n_sub==0:
            g = torch.stack([(row[0]/plain[s*100])[0] for row,s,n in zip(xb, block.seq, block.n) if n])
            gains.append(g)
        for row,s,a,n,one in zip(xb, block.seq, block.start, block.n, g):
            if n: torch.testing.assert_close(row[:n], plain[s*100+a:s*100+a+n]*one)
    left_out = sum(bool((g==1).all()) for g in gains)
    assert left_out==0 if p==1 else 0<left_out<6
    if p==1: assert len({round(g[0].item(), 6) for g in gains})==6
    assert len(gain.used)==2*n_sub*(6-left_out) # for x and for y; none in validation


def test_random_transforms_are_left_out_of_validation(signals):
    x,y = map(Source, signals)
    learn,plain = (TbpttLearner(SequenceDataLoaders.from_arrays(x, y, win_sz=110, stp_sz=110, valid_stp_sz=110, sub_seq_len=SUB, bs=3, after_batch=tfms), Net()) for tfms in ([Gain()], []))
    with learn.no_bar(), learn.no_logging(), plain.no_bar(), plain.no_logging():
        assert learn.validate()==plain.validate()
        same(learn.get_preds(), plain.get_preds())
        gain, = learn.dls.train.after_batch.fs
        gain.used.clear()
        learn.fit(1, 1e-2)
        assert len(gain.used)==2*len(learn.dls.train)


@pytest.mark.parametrize('base', [Transform, RandTransform])
def test_a_transform_that_draws_where_it_encodes_is_refused(signals, base):
    class Noise(base):
        split_idx,name = 0,'Noise' # without a name, fasttransform 0.0.2 cannot print it
        def encodes(self, x:Tensor): return x+torch.randn_like(x)
    learn = TbpttLearner(windows(signals, after_batch=[Noise()]), Net())
    with pytest.raises(ValueError, match='batch transform Noise draws random numbers'): fit(learn, 1)


def test_a_draw_outlives_an_evaluation_within_the_window(signals):
    gain = Gain()
    dls = windows(signals, shuffle=False, after_batch=[gain])
    class Validate(Callback):
        def after_batch(self):
            if self.training:
                for _ in dls.valid.sub_windows(): break
    learn = TbpttLearner(dls, Net(), cbs=Validate())
    gain.used.clear()
    fit(learn, 1)
    assert all(o is gain.used[i//10*10] for i,o in enumerate(gain.used))


def test_a_random_transform_needs_rows_that_begin_together(parts):
    ds = Sequences(*parts)
    ds.split_idx = 0
    dl = StreamDL(ds, bs=2, sub_seq_len=SUB, after_batch=[Gain()])
    with pytest.raises(ValueError, match='begin their sequences at different times'): fit(TbpttLearner(DataLoaders(dl, dl), Net()), 1)


# what else learners do

def test_a_sub_window_that_only_the_learner_knows_is_refused(signals):
    "... as windows would be read whole for validation; and nothing is read whole before that is said"
    x,y = map(Source, signals)
    dls = SequenceDataLoaders.from_arrays(x, y, win_sz=235, check=False)
    with pytest.raises(ValueError, match='sub_seq_len is 25 in the learner, but None in a loader of sequences in files'): TbpttLearner(dls, Net(), sub_seq_len=SUB)
    TbpttLearner(dls, Net(), sub_seq_len=None), TbpttLearner(dls, Net(), sub_seq_len=235)
    x,y = Endless(),Endless()
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x, y), win_sz=10**8, check=False)
    with pytest.raises(ValueError, match='read whole'): TbpttLearner(dls, Net(), sub_seq_len=SUB)
    assert x.longest==y.longest==1000


@pytest.mark.parametrize('n', [1, 2])
def test_new_data_in_files_is_read_by_sub_windows(learn, signals, n):
    "... of any source: one or two sequences of one length"
    new = [Source(signals[0][:500]) for _ in range(n)]
    dl = learn.dls.test_dl(new)
    for o in new: o.asked.clear() # what looked for values that are not finite
    with learn.no_bar(): preds,_ = learn.get_preds(dl=dl)
    assert max(o.longest for o in new)==SUB
    for p in dl.by_sequence(preds): torch.testing.assert_close(p, by_hand(learn, signals[0][:500]))
    short = learn.dls.test_dl([hdf5(signals[0][:9], 'short.h5')])
    with learn.no_bar(): assert len(learn.get_preds(dl=short)[0])==9

@pytest.fixture
def learn(parts):
    x,y = ([memmap(o, f'{name}{i}.bin') for i,o in enumerate(seqs)] for name,seqs in zip('xy', parts))
    set_seed(3)
    return fit(TbpttLearner(SequenceDataLoaders.from_arrays(x, y, sub_seq_len=SUB, bs=3), Net(), metrics=mae), 2)

def by_hand(learn, x):
    net = copy.deepcopy(learn.model).eval()
    with torch.no_grad(): return net.head(net.rnn.rnn(torch.tensor(x)[None])[0])[0]


def test_predictions_are_in_the_order_of_the_data(learn, parts):
    with learn.no_bar(): preds,targs = learn.get_preds()
    cuts = [len(o)-int(len(o)*.2) for o in parts[0]]
    for p,t,x,y,n in zip(learn.dls.valid.by_sequence(preds), learn.dls.valid.by_sequence(targs), *parts, cuts):
        assert torch.equal(t, torch.tensor(y[n:]))
        torch.testing.assert_close(p, by_hand(learn, x[n:]))
    with learn.no_bar(), learn.no_logging(): loss,metric = learn.validate()
    assert loss==pytest.approx((preds-targs).abs().mean().item(), rel=1e-6) and metric==pytest.approx(loss, rel=1e-6)


def test_copies_share_the_files(learn):
    other = copy.deepcopy(learn)
    for a,b in zip(other.dls.train_ds.arrays[0], learn.dls.train_ds.arrays[0]): assert a.source is b.source
    with learn.no_bar(), learn.no_logging(), other.no_bar(), other.no_logging():
        assert learn.validate()==other.validate()
        rng = learn.dls.train.rng.getstate()
        other.dls.train.rng.setstate(rng)
    same(list(fit(learn, 2).model.parameters()), list(fit(other, 2).model.parameters()))


def test_an_export_leaves_the_data_out_and_predicts(learn, parts):
    learn.export('e.pkl')
    loaded = load_learner('e.pkl')
    assert all(len(o)==0 for ds in (loaded.dls.train_ds, loaded.dls.valid_ds) for seqs in ds.arrays for o in seqs) # the data is left out
    new = [memmap(o, f'new{i}.bin') for i,o in enumerate(parts[0][1:3])]
    dl = loaded.dls.test_dl(new)
    with loaded.no_bar(): preds,_ = loaded.get_preds(dl=dl)
    for p,x in zip(dl.by_sequence(preds), parts[0][1:3]): torch.testing.assert_close(p, by_hand(learn, x))


def test_hdf5_data_can_be_pickled_while_open(signals):
    ds = Sequences(hdf5(signals[0], 'a.h5'))
    x = ds.read([0], [30], [5])
    data = pickle.dumps(ds)
    assert len(data)<10_000 and torch.equal(pickle.loads(data).read([0], [30], [5])[0], x[0])


def test_two_learners_read_the_same_file_at_once(signals):
    "... in two threads, each as if alone"
    u,y = hdf5(signals[0], 'a.h5'),hdf5(signals[1], 'a.h5', 'y')
    def new():
        set_seed(3)
        dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, sub_seq_len=SUB, bs=3)
        return TbpttLearner(dls, Net())
    alone,*both = (new() for _ in range(3))
    fit(alone, 2)
    threads = [threading.Thread(target=fit, args=(o, 2)) for o in both]
    for t in threads: t.start()
    for t in threads: t.join()
    for o in both: same(list(alone.model.parameters()), list(o.model.parameters()))


def test_windows_of_a_file_in_a_plain_loader_train_as_in_memory(signals):
    "A `TbpttDL` over a memory map cuts windows that it has read whole, as it does in memory"
    def params(x, y):
        set_seed(3)
        ds = SequenceWindows(x, y, 110, 60)
        dl = TbpttDL(ds, bs=4, sub_seq_len=SUB, shuffle=True, num_workers=0)
        return list(fit(TbpttLearner(DataLoaders(dl, dl.new(shuffle=False)), Net()), 2).model.parameters())
    same(params(memmap(signals[0], 'u.bin', '>f4'), memmap(signals[1], 'y.bin')), params(*signals))


@pytest.mark.parametrize('n_valid', [10, 25, 40])
def test_windows_of_one_sub_window_train_and_shorter_validation_is_predicted_whole(signals, n_valid):
    x,y = map(Source, signals)
    valid = [memmap(o[:n_valid], f'{i}.bin') for i,o in enumerate(signals)]
    dls = SequenceDataLoaders.from_arrays(x, y, valid=tuple(valid), groups=['a'], sub_seq_len=1200, bs=2)
    learn = fit(TbpttLearner(dls, Net()), 2)
    with learn.no_bar(): assert len(learn.get_preds()[0])==n_valid
    dls = SequenceDataLoaders.from_arrays(x, y, win_sz=SUB, sub_seq_len=SUB, bs=5)
    fit(TbpttLearner(dls, Net()), 2)


@pytest.mark.parametrize('changed', [lambda u: u.copy(), lambda u: u.astype('f8'), lambda u: u[::2], lambda u: u[::-1], lambda u: u[10:90], lambda u: u*2])
def test_what_numpy_makes_of_a_memory_map_is_read_as_it_is(signals, changed):
    "A copy of a memory map calls itself one, but is in memory"
    a = np.arange(100, dtype='f4')
    x, = Sequences(changed(memmap(a))).read([0], [3], [7])
    assert x[0,:,0].tolist()==changed(a)[3:10].tolist()

@pytest.mark.parametrize('steps', [5, -1, [1, 3], None, (slice(2), 0), torch.tensor([0])])
def test_what_is_no_slice_of_a_file_is_refused_by_name(tmp_path, steps):
    path = tmp_path/'u.npy'
    np.save(path, np.zeros((10, 2), 'f4'))
    with pytest.raises(TypeError, match=r'in slices of steps, such as \[5:6\]; got'): FileArray(np.load(path, mmap_mode='r'))[steps]
