"Files that change while they are read, and files that would have others read: an error that names them, never wrong numbers"
import os, subprocess, sys
from pathlib import Path
import h5py
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from helpers import fit
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.sequences.arrays import FileArray, HDF5Array


def signal(n=20_000, seed=0): return np.random.default_rng(seed).standard_normal((n,1))

def recording(path='a.h5', n=20_000, **kwargs):
    with h5py.File(path, 'w') as f:
        for name,seed in (('u', 0), ('y', 1)): f.create_dataset(name, data=signal(n, seed), **kwargs)
    return path

def cut(path, share=.5):
    size = os.path.getsize(path)
    os.truncate(path, int(size*share))
    return size


layouts = dict(contiguous={}, chunked=dict(chunks=(100,1)), compressed=dict(chunks=(100,1), compression='gzip'))

@pytest.mark.parametrize('kind', layouts)
def test_an_hdf5_file_that_is_cut_while_open_is_refused_in_every_read_after_it(kind):
    a = FileArray(HDF5Array(recording(**layouts[kind]), 'u'))
    assert torch.equal(a[:10], torch.from_numpy(signal()[:10]))
    size = cut('a.h5')
    for start in (0, 10, 15_000, 19_990):
        with pytest.raises(OSError, match=f'^a.h5 has {size//2} bytes, and had {size} or more when it was opened'): a[start:start+10]

def test_a_training_ends_where_its_file_is_cut():
    recording()
    dls = SequenceDataLoaders.from_hdf5('a.h5', x='u', y='y', win_sz=1000, sub_seq_len=50, bs=4, check=False, device='cpu')
    learn = RNNLearner(dls, hidden_size=4)
    seen = []
    class Cuts(Callback):
        order,run_valid = 20,False
        def before_batch(self):
            assert self.x.any(), 'zeros that are not in the data'
            seen.append(1)
            if len(seen)==3: cut('a.h5')
    learn.add_cb(Cuts())
    with pytest.raises(OSError, match='^a.h5 has .* bytes'): fit(learn)
    assert 3<=len(seen)<=6

def test_a_file_that_grows_is_read_on():
    recording(chunks=(100,1))
    a = FileArray(HDF5Array('a.h5', 'u'))
    a[:10]
    with open('a.h5', 'ab') as f: f.write(b'more')
    assert torch.equal(a[-10:], torch.from_numpy(signal()[-10:]))

def test_a_file_that_is_put_in_the_place_of_an_open_one_changes_nothing():
    a = FileArray(HDF5Array(recording(), 'u'))
    a[:10]
    recording('b.h5', n=10)
    os.replace('b.h5', 'a.h5')
    assert torch.equal(a[-10:], torch.from_numpy(signal()[-10:]))

@pytest.mark.parametrize('other', [dict(n=500), dict(dtype='f4')])
def test_another_file_at_its_place_is_refused_when_it_is_opened(other):
    a = FileArray(HDF5Array(recording(), 'u'))
    recording(**other)
    with pytest.raises(ValueError, match=r"^The datasets \['u'\] of a.h5 have shapes and types .*: it is another file"): a[:10]

def test_a_damaged_chunk_is_said_of_the_file_by_name():
    recording(chunks=(1000,1), compression='gzip')
    with h5py.File('a.h5', 'r') as f: at = f['u'].id.get_chunk_info(3)
    with open('a.h5', 'r+b') as f:
        f.seek(at.byte_offset+20)
        f.write(b'\xff'*200)
    a = FileArray(HDF5Array('a.h5', 'u'))
    assert torch.equal(a[:3000], torch.from_numpy(signal()[:3000]))
    with pytest.raises(OSError, match='^a.h5: '): a[3000:3010]


@pytest.mark.parametrize('offset', [0, 8, 3*4096+8])
@pytest.mark.parametrize('view', ['a', 'a[5000:]', 'a[::2]'])
def test_a_mapped_file_that_is_cut_is_an_error_and_not_the_end_of_the_process(offset, view):
    code = f"""
import numpy as np, os, torch
from tbptt_fastai.sequences.arrays import FileArray
a = np.memmap('a.bin', dtype='f8', mode='w+', shape=(20_000,1), offset={offset})
a[:] = np.arange(20_000)[:,None]
a.flush()
a = np.memmap('a.bin', dtype='f8', mode='r', shape=(20_000,1), offset={offset})
a = FileArray({view})
assert len(a[:10])==10
size = os.path.getsize('a.bin')
os.truncate('a.bin', 8192)
for part in (a, a.narrow(0, 3000, 100)):
    try: part[-10:]
    except OSError as e: print(str(e))
"""
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.returncode==0,out.stderr
    assert out.stdout.count(f'a.bin has 8192 bytes, and had {160_000+offset} or more when it was opened')==2

def test_a_mapped_file_is_read_while_it_is_whole_and_may_grow():
    a = np.memmap('a.bin', dtype='f8', mode='w+', shape=(1000,1))
    a[:] = 1
    f = FileArray(a)
    with open('a.bin', 'ab') as g: g.write(b'more')
    assert f[-5:].sum()==5


def outside(tmp_path):
    "A folder beside the one of the test, with a recording and a file of bytes"
    folder = tmp_path/'outside'
    folder.mkdir()
    recording(folder/'other.h5', n=100)
    np.arange(100.).tofile(folder/'secret.bin')
    return folder

def elsewhere(kind, folder):
    "A file in a folder of its own whose dataset has its values somewhere else"
    Path('in').mkdir()
    with h5py.File('in/a.h5', 'w') as f:
        if kind=='storage': f.create_dataset('u', (100,), 'f8', external=[(str(folder/'secret.bin'), 0, 800)])
        elif kind=='storage in the folder':
            np.arange(100.).tofile('in/raw.bin')
            f.create_dataset('u', (100,), 'f8', external=[(str(Path('in/raw.bin').resolve()), 0, 800)])
        elif kind=='link': f['u'] = h5py.ExternalLink(str(folder/'other.h5'), 'u')
        elif kind=='link to a folder': f['part'] = h5py.ExternalLink(str(folder/'other.h5'), '/')
        elif kind=='soft link': f['far'],f['u'] = h5py.ExternalLink(str(folder/'other.h5'), 'u'),h5py.SoftLink('/far')
        elif kind=='upwards': f['u'] = h5py.ExternalLink(os.path.relpath(folder/'other.h5', 'in'), 'u')
        elif kind=='virtual':
            layout = h5py.VirtualLayout((100,1), 'f8')
            layout[:] = h5py.VirtualSource(str(folder/'other.h5'), 'u', (100,1))
            f.create_virtual_dataset('u', layout)
    return 'part/u' if kind=='link to a folder' else 'u'

kinds = ['storage','storage in the folder','link','link to a folder','soft link','upwards','virtual']

@pytest.mark.parametrize('kind', kinds)
def test_values_from_somewhere_else_are_refused_unless_they_are_asked_for(kind, tmp_path):
    name = elsewhere(kind, outside(tmp_path))
    with pytest.raises(ValueError, match=f'^The dataset {name!r} of in/a.h5 has its values from somewhere else: .*external=True'):
        HDF5Array('in/a.h5', name)
    with pytest.raises(ValueError, match='somewhere else'): SequenceDataLoaders.from_hdf5('in/a.h5', x=name, y=name)
    a = HDF5Array('in/a.h5', name, external=True)
    assert len(FileArray(a)[3:5])==2
    dls = SequenceDataLoaders.from_hdf5('in/a.h5', x=name, y=name, external=True, sub_seq_len=10, bs=1, device='cpu')
    assert dls.train.one_batch()[0].any()

def test_a_link_that_was_put_there_later_is_refused_too(tmp_path):
    folder = outside(tmp_path)
    Path('in').mkdir()
    a = HDF5Array(recording('in/a.h5', n=100), 'u')
    with h5py.File('in/a.h5', 'w') as f: f['u'] = h5py.ExternalLink(str(folder/'other.h5'), 'u')
    with pytest.raises(ValueError, match='somewhere else'): FileArray(a)[:5]

def test_a_link_into_the_own_folder_and_below_is_followed():
    Path('in').mkdir()
    for path in ('b.h5', 'in/c.h5'): recording(path, n=100)
    with h5py.File('a.h5', 'w') as f: f['b'],f['c'] = h5py.ExternalLink('b.h5', 'u'),h5py.ExternalLink('in/c.h5', 'u')
    for name in 'bc': assert torch.equal(FileArray(HDF5Array('a.h5', name))[:], torch.from_numpy(signal(100)))

@pytest.mark.parametrize('names', [None, 5, [], [None], b'u', {}])
def test_names_of_datasets_are_strings(names):
    with pytest.raises(TypeError, match='^The datasets are .* expected the name of a dataset'): HDF5Array(recording(), names)
    with pytest.raises(TypeError, match='^The file is None'): HDF5Array(None, 'u')
