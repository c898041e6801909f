"Windows are slices of the sequences, found without copying them, and wrong data is named"
import tracemalloc
import numpy as np, pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.arrays import blocks, channel_stats
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.plot import plot_windows
from tbptt_fastai.sequences.windows import SequenceParts, Sequences, SequenceWindows


def ramp(n, channels=None): return np.arange(n*(channels or 1), dtype=np.float32).reshape(n, *([channels] if channels else []))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.data())
def test_every_window_is_a_slice_and_all_are_there(lengths, data):
    win_sz,stp_sz = data.draw(st.integers(1, max(lengths))),data.draw(st.integers(1, 70))
    lengths = [n for n in lengths if n>=win_sz] # shorter ones warn, which is tested below
    xs = [ramp(n, 2)+1000*i for i,n in enumerate(lengths)]
    ds = SequenceWindows(xs, [x[:,:1] for x in xs], win_sz=win_sz, stp_sz=stp_sz)
    expected = [x[s:s+win_sz] for x in xs for s in range(0, len(x)-win_sz+1, stp_sz)]
    assert len(ds)==len(expected)
    idxs = data.draw(st.lists(st.integers(0, len(ds)-1), min_size=1, max_size=9))
    x,y = ds.gather(idxs)
    np.testing.assert_array_equal(x, np.stack([expected[i] for i in idxs]))
    np.testing.assert_array_equal(y, x[...,:1])
    np.testing.assert_array_equal(ds[idxs[0]][0], expected[idxs[0]])
    for bad in (-1, len(ds)):
        with pytest.raises(IndexError): ds.gather([bad])


@pytest.mark.parametrize('to', [torch.from_numpy, lambda a: a, lambda a: a.astype(np.float64), lambda a: torch.from_numpy(a).double()])
def test_arrays_of_every_kind_become_float32(to):
    x,y = SequenceWindows(to(ramp(50)), to(ramp(50, 3)), win_sz=10)[2]
    assert x.dtype==y.dtype==torch.float32 and x.shape==(10,1) and y.shape==(10,3)
    np.testing.assert_array_equal(y, ramp(50, 3)[20:30])


def test_memory_is_shared_and_types_are_kept_where_asked():
    a,tokens,frames = np.zeros(100),np.arange(100),np.zeros((100,4,5), np.float32)
    ds = SequenceWindows([a], [tokens], win_sz=10, dtype=torch.float64)
    a[3],tokens[3] = 7,77
    x,y = ds[0]
    assert x[3,0]==7 and x.dtype==torch.float64 and y[3]==77 and y.dtype==torch.int64 and y.shape==(10,)
    assert SequenceWindows(frames, tokens, win_sz=10).gather([0,1])[0].shape==(2,10,4,5)


def test_a_read_only_memory_map_is_read_without_a_warning(tmp_path):
    ramp(1000, 2).tofile(tmp_path/'x.bin')
    x = np.memmap(tmp_path/'x.bin', dtype=np.float32, mode='r', shape=(1000,2))
    np.testing.assert_array_equal(SequenceWindows(x, x, win_sz=100, stp_sz=1)[900][0], ramp(1000, 2)[900:])


def test_a_batch_is_one_gather(monkeypatch):
    "... of each array, not an item call per window"
    calls = []
    gather = SequenceWindows.gather
    monkeypatch.setattr(SequenceWindows, 'gather', lambda self, idxs: calls.append(len(idxs)) or gather(self, idxs))
    dls = SequenceDataLoaders.from_arrays(ramp(1000), ramp(1000), win_sz=10, bs=16, sub_seq_len=5, shuffle=False)
    calls.clear()
    assert len([b for b in dls.train])==10 and calls==[16]*5
    calls.clear()
    items = dls.train.new(after_item=[lambda o: o+1]) # an item transform needs items
    calls.clear()
    batches = [b for b in items]
    assert set(calls)=={1} and batches[0][0][0,:,0].tolist()==list(range(1, 6))


def test_whole_sequences_are_windows_by_default():
    ds = SequenceWindows([ramp(30), ramp(30)], [ramp(30), ramp(30)])
    assert (len(ds),ds.win_sz)==(2,30)
    with pytest.raises(ValueError, match='20 to 30 steps: windows of one length need win_sz'): SequenceWindows([ramp(30), ramp(20)], [ramp(30), ramp(20)])


def test_short_sequences_are_named_not_dropped_in_silence():
    with pytest.warns(UserWarning, match=r'1 of 3 sequences are shorter than win_sz=25 and give no window: \[1\]'):
        ds = SequenceWindows([ramp(30), ramp(20), ramp(60)], [ramp(30), ramp(20), ramp(60)], win_sz=25)
    assert len(ds)==3 and ds.locate([0,1,2])[0].tolist()==[0,2,2]


def bad(i, value, n=5000, channels=2):
    a = ramp(n, channels)
    a[i,1] = value
    return a

@pytest.mark.parametrize('make,exc,message', [
    (lambda: SequenceWindows([], [], win_sz=3), ValueError, 'x is empty'),
    (lambda: SequenceWindows(ramp(0), ramp(0), win_sz=3), ValueError, r'x\[0\] has shape \(0,\): it has no steps'),
    (lambda: SequenceWindows([1.,2.,3.], [1.,2.,3.], win_sz=3), TypeError, r'x\[0\] is a float without a time axis'),
    (lambda: SequenceWindows(ramp(9), ramp(8), win_sz=3), ValueError, 'Sequence 0 has 9 steps of x and 8 of y'),
    (lambda: SequenceWindows([ramp(9)], [ramp(9)]*2, win_sz=3), ValueError, 'x has 1 sequences, y has 2'),
    (lambda: SequenceWindows(ramp(9), ramp(9), win_sz=10), ValueError, 'win_sz is 10, but the longest sequence has 9 steps'),
    (lambda: SequenceWindows(ramp(9), ramp(9), win_sz=0), ValueError, 'win_sz is 0'),
    (lambda: SequenceWindows(ramp(9), ramp(9), win_sz=3, stp_sz=0), ValueError, 'stp_sz is 0'),
    (lambda: SequenceWindows(ramp(9), ramp(9), win_sz=2.5), TypeError, 'win_sz is 2.5'),
    (lambda: SequenceWindows([ramp(9,1), ramp(9,2)], [ramp(9)]*2, win_sz=3), ValueError, 'sequences of x differ in channels'),
    (lambda: SequenceWindows([ramp(50,2), bad(1234, np.nan)], [ramp(50), ramp(5000)], win_sz=3), ValueError, r'x of sequence 1 is \[2468.0, nan\] at step 1234'),
    (lambda: SequenceWindows(ramp(5000), bad(7, -np.inf), win_sz=3), ValueError, r'y of sequence 0 is \[14.0, -inf\] at step 7'),
    (lambda: SequenceWindows(ramp(50).astype(float)*1e300, ramp(50), win_sz=3), ValueError, 'x of sequence 0 is .* at step 1: values must be finite as torch.float32'),
    (lambda: SequenceWindows(ramp(9)[::-1], ramp(9), win_sz=3), TypeError, r'x\[0\] is an array of float32 that torch cannot share'),
    (lambda: SequenceWindows(ramp(9).astype('>f4'), ramp(9), win_sz=3), TypeError, r'x\[0\] is an array of >f4'),
    (lambda: SequenceWindows(ramp(9).astype(np.uint16), ramp(9), win_sz=3), TypeError, r'x\[0\] is of type torch.uint16'),
    (lambda: SequenceWindows(ramp(9)*1j, ramp(9), win_sz=3), TypeError, r'x\[0\] is of type torch.complex'),
    (lambda: SequenceWindows(ramp(9).astype(object), ramp(9), win_sz=3), TypeError, r'x\[0\] is an array of object'),
    (lambda: SequenceWindows(np.ma.masked_equal(ramp(9), 3), ramp(9), win_sz=3), TypeError, r'x\[0\] is a masked array'),
    (lambda: SequenceWindows(np.float32(3), np.float32(3), win_sz=1), TypeError, r'x\[0\] is a float32 without a time axis'),
    (lambda: SequenceWindows(ramp(9), ramp(9), win_sz=3, dtype=np.float32), TypeError, 'dtype is .*; expected a real torch.dtype'),
    (lambda: SequenceWindows(ramp(9), ramp(9), win_sz=3)[1.5], TypeError, 'float'),
    (lambda: plot_windows(torch.zeros(2,3,4,5)), ValueError, r'x has shape \(2, 3, 4, 5\)'),
    (lambda: SequenceDataLoaders.from_arrays([ramp(300,2), bad(299, np.nan, 300)], [ramp(300)]*2, win_sz=3), ValueError, r'x of sequence 1 is \[598.0, nan\] at step 299'), # of the whole sequence
    (lambda: SequenceDataLoaders.from_arrays(ramp(99), ramp(99), win_sz=3, valid_pct=.001), ValueError, 'of the 99 steps of sequence 0 none would be left for validation'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(99), ramp(99), valid=ramp(99), win_sz=3), ValueError, r'expected a pair \(x, y\)'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(99), ramp(99), valid=(ramp(99), ramp(99,2)), win_sz=3), ValueError, r'y is channels \(1,\) torch.float32 in training and channels \(2,\)'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(99), ramp(99), valid=(ramp(99), ramp(99).astype(int)), win_sz=3), ValueError, 'y is .* torch.float32 in training and .* torch.int64'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(999), ramp(999), win_sz=30, sub_seq_length=10, stride=3), TypeError, r"unexpected arguments \['stride', 'sub_seq_length'\]"),
    (lambda: SequenceDataLoaders.from_arrays(ramp(999), ramp(999), win_sz=30, bs=0), ValueError, 'bs is 0'),
    (lambda: TbpttDL(SequenceWindows(ramp(99), win_sz=30), sub_seq_len=31), ValueError, 'sub_seq_len is 31, but a window has 30 steps'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(99), ramp(99), win_sz=3, valid_pct=1.), ValueError, 'valid_pct is 1.0'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(99), ramp(99), win_sz=30), ValueError, 'win_sz is 30, but the longest sequence has 19'), # validation's
    (lambda: SequenceDataLoaders.from_arrays(ramp(999), ramp(999), win_sz=30, sub_seq_len=31), ValueError, 'sub_seq_len is 31, but a window has 30 steps'),
    (lambda: SequenceDataLoaders.from_arrays(ramp(999), ramp(999), win_sz=30, sub_seq_len=0), ValueError, 'sub_seq_len is 0'),
])
def test_wrong_data_is_refused_by_name_and_step(make, exc, message):
    with pytest.raises(exc, match=message): make()


def test_stats_are_those_of_every_step_once(monkeypatch):
    monkeypatch.setattr('tbptt_fastai.sequences.arrays.blocks', lambda seq: blocks(seq, size=64))
    rng = np.random.default_rng(0)
    xs = [1e6+rng.standard_normal((n,2)) for n in (70,300)]
    assert [len(o) for o in blocks(torch.zeros(70, 2), size=64)]==[32,32,6] and [len(o) for o in blocks(torch.zeros(3, 200), size=64)]==[1,1,1]
    mean,std = channel_stats([torch.from_numpy(x) for x in xs])
    np.testing.assert_allclose(mean, np.concatenate(xs).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, np.concatenate(xs).std(0), rtol=1e-9)
    xs[1][250,1] = np.nan
    with pytest.raises(ValueError, match='x of sequence 1 .* at step 250'): SequenceWindows(xs, win_sz=5)


@pytest.mark.parametrize('dt,label', [(None,'step'), (.01,'time [s]')])
def test_plots_show_what_they_are_given(dt, label):
    x,y,pred = torch.randn(5, 30, 2),torch.randn(5, 30, 1),torch.randn(5, 30, 1)
    axs = plot_windows(x, y, pred, max_n=3, x_names=['u [V]'], y_names=['y [V]'], dt=dt)
    assert axs.shape==(2,3) and axs[1,0].get_xlabel()==label and axs[0,0].get_ylabel()=='y [V]' and axs[1,0].get_ylabel()=='u [V]'
    target,prediction = axs[0,2].lines
    np.testing.assert_array_equal(target.get_ydata(), y[2,:,0])
    np.testing.assert_array_equal(prediction.get_ydata(), pred[2,:,0])
    np.testing.assert_allclose(prediction.get_xdata(), np.arange(30)*(dt or 1))
    assert len(axs[1,2].lines)==2


def test_a_single_name_is_one_label():
    axs = plot_windows(torch.randn(2, 30, 1), torch.randn(2, 30, 1), x_names='force [N]', y_names='position [mm]')
    assert [ax.get_ylabel() for ax in axs[:,0]]==['position [mm]', 'force [N]']


def test_validation_windows_do_not_overlap_and_none_is_dropped():
    dls = SequenceDataLoaders.from_arrays(ramp(1000), ramp(1000), win_sz=30, stp_sz=5, sub_seq_len=10, bs=4, val_bs=5, drop_last=True)
    assert dls.valid_ds.stp_sz==30 and len(dls.valid_ds)==6 and dls.valid.bs==5 and not dls.valid.shuffle
    assert [x.shape[:2] for x,y in dls.valid]==[(5,30),(1,30)]
    assert dls.train.drop_last


def test_a_tensor_with_a_graph_is_data_all_the_same():
    x = torch.randn(100, requires_grad=True)*2
    assert not SequenceWindows(x, win_sz=10)[0][0].requires_grad


def test_a_list_of_windows_is_taken_in_its_order():
    ds = SequenceWindows(ramp(100), ramp(100), win_sz=10)
    for got,i in zip(ds.items.iloc[[3,1]], (3,1)): np.testing.assert_array_equal(got[0], ds[i][0])
    assert SequenceWindows(ramp(100), win_sz=10, stp_sz=10**30).stp_sz==100


@pytest.mark.parametrize('dl_type', [TbpttDL, StreamDL])
def test_millions_of_windows_take_one_array_of_indices(dl_type):
    n = 1_000_000
    u = np.zeros(n+99, np.float32)
    tracemalloc.start()
    try:
        dl = dl_type(SequenceWindows(u, u, win_sz=100, stp_sz=1), bs=16, sub_seq_len=50, shuffle=True, num_workers=0)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        it = iter(dl)
        for _ in range(5): next(it)
        rise = tracemalloc.get_traced_memory()[1]-before
    finally: tracemalloc.stop()
    assert len(dl.dataset)==n and rise<1.1*8*n # bytes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 40), st.data())
def test_parts_are_all_steps_in_order(lengths, win_sz, data):
    xs = [ramp(n, 2)+1000*i for i,n in enumerate(lengths)]
    parts = SequenceParts(xs, win_sz=win_sz, groups=[f'g{i}' for i in range(len(xs))])
    expected = [x[s:s+win_sz] for x in xs for s in range(0, len(x), win_sz)]
    assert len(parts)==len(expected) and parts.lengths.tolist()==list(map(len, expected))
    for (part,),e in zip(parts, expected, strict=True): np.testing.assert_array_equal(part, e)
    idxs = data.draw(st.lists(st.integers(0, len(parts)-1), min_size=1, max_size=4))
    start = [data.draw(st.integers(0, len(expected[i])-1)) for i in idxs]
    n = [data.draw(st.integers(0, len(expected[i])-a)) for i,a in zip(idxs, start)]
    batch, = parts.read(idxs, start, n)
    for row,i,a,k in zip(batch, idxs, start, n):
        np.testing.assert_array_equal(row[:k], expected[i][a:a+k])
        assert (row[k:]==0).all()
    assert parts.groups_of(idxs)==[f'g{int(expected[i][0,0]//1000)}' for i in idxs]


def test_sequences_have_names():
    xs = [ramp(5), ramp(3)]
    assert Sequences(xs).groups==[0,1] and Sequences(xs, groups=['a','b']).groups_of([1,0,1])==['b','a','b']
    with pytest.raises(ValueError, match='x of sequence b is \\[nan\\] at step 2'): Sequences([ramp(5), np.array([0.,1,np.nan], np.float32)], groups=['a','b'])
    with pytest.raises(IndexError): Sequences(xs)[2]
    assert len(Sequences(xs).new_empty())==0 and len(SequenceParts(xs, win_sz=2).new_empty())==0


@pytest.mark.parametrize('n_seqs', [1, 3])
@pytest.mark.parametrize('make', [lambda a: a, np.asfortranarray, lambda a: torch.from_numpy(a).T.contiguous().T, lambda a: a[::2], lambda a: a[:,:1], lambda a: a.astype(np.float64), lambda a: np.round(a*9).astype(np.int64), lambda a: a[...,None]], ids=range(8))
def test_a_batch_is_contiguous_and_its_own(make, n_seqs):
    "... whatever the layout of the sequences is; a transform that works in place does not reach them"
    seqs = [make(np.random.default_rng(i).standard_normal((120, 3)).astype(np.float32)) for i in range(n_seqs)]
    ds = SequenceWindows(seqs, win_sz=20, stp_sz=7)
    kept,(batch,) = [o.clone() for o in ds.arrays[0]],ds.gather(range(len(ds)))
    plain = [o[a:a+20] for o in kept for a in range(0, len(o)-19, 7)]
    assert batch.is_contiguous() and torch.equal(batch, torch.stack(plain).to(batch.dtype)) and batch.dtype==(torch.int64 if plain[0].dtype==torch.int64 else torch.float32)
    batch += 1
    assert all(map(torch.equal, ds.arrays[0], kept))

@pytest.mark.parametrize('seqs', [[np.arange(250.)], [np.arange(250.), np.arange(100.)]], ids=len)
@pytest.mark.parametrize('kind', ['u1','i1','i2','u2','i4','u4','u8','i8'])
def test_numbers_of_windows_may_be_of_any_type(seqs, kind):
    "... and narrow ones neither overflow nor are taken for a mask"
    ds = SequenceWindows(seqs, win_sz=1, stp_sz=1)
    assert ds.gather(np.array([1]*120, kind))[0].unique().tolist()==[1.]
    assert SequenceWindows(seqs, win_sz=5, stp_sz=10).locate(np.array([9], kind))[1].tolist()==[90]
    assert SequenceParts(seqs, win_sz=10).locate(np.array([9], kind))[1].tolist()==[90]

@pytest.mark.parametrize('seqs', [[np.arange(50.)], [np.arange(50.), np.arange(40.)]], ids=len)
def test_a_batch_of_no_windows_is_empty(seqs):
    ds = SequenceWindows(seqs, win_sz=10)
    for none in ([], np.array([], int), torch.tensor([], dtype=torch.int64)): assert ds.gather(none)[0].shape==(0, 10, 1)


# what is said of a frame, and of a window that is too long for what is held back

@pytest.mark.parametrize('win_sz', [30, 80, 99, 500])
@pytest.mark.parametrize('many', [False, True])
def test_a_window_too_long_for_the_end_that_is_held_back_says_so(win_sz, many):
    x = [ramp(40), ramp(99)] if many else ramp(99)
    with pytest.raises(ValueError, match=rf'win_sz is {win_sz}, but the longest sequence has 19 steps that are held back for validation, of 99.*valid_pct.*valid='):
        SequenceDataLoaders.from_arrays(x, x, win_sz=win_sz)

@pytest.mark.parametrize('make', [lambda f: f.astype('Float64'), lambda f: f.convert_dtypes(), lambda f: f.astype({'a': 'Float32'}), lambda f: f.assign(a=(f.a>0), b=f.b.astype('Int64')),
                                  lambda f: f.assign(a=f.a>0)], ids=['Float64', 'convert_dtypes', 'one', 'bool and Int64', 'bool'])
def test_a_frame_of_numbers_that_may_be_missing_is_as_its_values(make):
    f = make(pd.DataFrame(dict(a=np.arange(60)-30., b=np.arange(60.))))
    dls = SequenceDataLoaders.from_arrays(f, f, win_sz=6, shuffle=False)
    np.testing.assert_array_equal(torch.cat([x for x,_ in dls.train]).flatten(0, 1).numpy(), f.to_numpy(float)[:48].astype('f4'))
    assert list(dls.train_ds.x_names)==['a', 'b']

def test_a_missing_number_of_a_frame_is_refused_with_its_place():
    f = pd.DataFrame(dict(a=np.arange(60.), b=np.arange(60.))).astype('Float64')
    f.iloc[7,1] = pd.NA
    with pytest.raises(ValueError, match='nan.* at step 7'): SequenceDataLoaders.from_arrays(f, f, win_sz=6)

def test_a_frame_with_text_is_refused_without_talk_of_labels():
    f = pd.DataFrame(dict(a=np.arange(60.), b=['x']*60))
    with pytest.raises(TypeError, match=r'x\[0\] is an array of .*torch cannot share') as e: SequenceDataLoaders.from_arrays(f, np.arange(60.), win_sz=6)
    assert 'Labels' not in str(e.value) and 'np.float32' in str(e.value)
