"What data is, is certain or refused: where time is, integers as targets, missing values, outputs of different units"
import copy
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import L1LossFlat, MSELossFlat
from fastai.metrics import mae
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F
from helpers import fit, fit_own_lr, item_loaders, sgd
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.learner import RNNLearner, ScaledL1Loss, TbpttLearner, default_loss, scaling_from_data
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders, split_by_time
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.sequences.arrays import blocks, channel_stats
from tbptt_fastai.sequences.windows import SequenceParts, Sequences, SequenceWindows
from tbptt_fastai.state.stateful import StatefulRNN

from_arrays,from_df,from_hdf5 = (getattr(SequenceDataLoaders, o) for o in ('from_arrays', 'from_df', 'from_hdf5'))
def noise(*shape): return np.random.default_rng(sum(shape)).standard_normal(shape)
def net(n_in=1, n_out=1): return nn.Sequential(StatefulRNN(nn.LSTM(n_in, 6, batch_first=True)), nn.Linear(6, n_out))


KINDS = [lambda o: o, lambda o: o.astype(np.float32), lambda o: (100*o).astype(np.int64), torch.from_numpy]

@pytest.mark.parametrize('to', KINDS, ids=['float64', 'float32', 'int64', 'tensor'])
@pytest.mark.parametrize('make', [
    lambda o: from_arrays(o, o), lambda o: Sequences(o), lambda o: SequenceWindows(o, o), lambda o: SequenceParts(o, o, win_sz=20),
    lambda o: from_arrays(o, o, win_sz=96), lambda o: from_arrays(o, list(o)), lambda o: split_by_time(o)],
    ids=['from_arrays', 'Sequences', 'SequenceWindows', 'SequenceParts', 'windows of all steps', 'x and y of different forms', 'split_by_time'])
def test_three_dimensions_are_refused_where_the_first_may_not_be_time(make, to):
    with pytest.raises(ValueError, match=r'has shape \(120, 96, 2\).*Pass list\((x|seqs)\) for 120 sequences of 96 steps, or \[(x|seqs)\] for one'): make(to(noise(120, 96, 2)))


def test_what_the_message_says_is_what_comes():
    X = noise(120, 96, 2)
    many = from_arrays(list(X), list(X[:,:,:1]), valid_pct=.25, bs=3)
    assert len(many.train_ds)==120 and many.train.one_batch()[0].shape==(3,72,2)
    one = from_arrays([X], [X[:,0]], win_sz=20, bs=2)
    assert one.train.one_batch()[0].shape==(2,20,96,2)
    valid = list(X),list(X[:,:,:1])
    for part in ((X, valid[1]), (valid[0], X[:,:,:1])):
        with pytest.raises(ValueError, match=r'valid_[xy] has shape \(120, 96, .\)'): from_arrays(*valid, valid=part)

def test_frames_are_one_sequence_where_windows_do_not_fit_into_the_second_axis():
    assert len(SequenceWindows(noise(100, 4, 5), np.arange(100), win_sz=10))==10
    assert len(from_arrays(noise(100, 4, 5), np.arange(100), win_sz=10).train_ds)==8
    with pytest.raises(ValueError, match='is it one sequence'): from_arrays(noise(100, 4, 5), np.arange(100), win_sz=4)


@pytest.mark.parametrize('make', [lambda o: from_arrays(o, o), lambda o: Sequences(o), lambda o: SequenceWindows(o, o, win_sz=20), lambda o: from_arrays(noise(120), o)])
@pytest.mark.parametrize('to', [*KINDS, pd.DataFrame])
def test_more_channels_than_steps_are_refused_unless_a_list_or_their_names_say_so(make, to):
    o = to(noise(120, 200))
    with pytest.raises(ValueError, match=r'has shape \(120, 200\).*Pass list\([xy](\.to_numpy\(\))?\) for 120 sequences of 200 steps'): make(o)

def test_few_channels_may_be_more_than_the_steps_as_well():
    for shape in ((5,20), (1,2)):
        with pytest.raises(ValueError, match=rf'has shape \({shape[0]}, {shape[1]}\): is it one sequence'): Sequences(noise(*shape))
    assert len(Sequences(noise(20, 20)))==1

def test_as_a_list_or_with_names_they_are_channels():
    Z,names = noise(120, 200),[f'c{i}' for i in range(200)]
    assert len(Sequences(list(Z)))==120 and len(Sequences([Z]))==1 and len(Sequences(Z, x_names=names))==1
    dls = from_arrays(Z, noise(120), x_names=names, win_sz=20, bs=4)
    assert dls.train.one_batch()[0].shape==(4,20,200)
    assert len(dls.test_dl(noise(30, 200)).dataset)==1 # as many channels as in training
    with pytest.raises(ValueError, match=r'test_items has shape \(30, 50\)'): dls.test_dl(noise(30, 50))
    with pytest.raises(ValueError, match=r'test_items has shape \(30, 50, 200\)'): dls.test_dl(noise(30, 50, 200))
    assert len(dls.test_dl(list(noise(30, 50, 200))).dataset)==30

def test_many_channels_have_a_warning_few_have_none():
    with pytest.warns(UserWarning, match=r'x has shape \(1000, 96\) and is taken for one sequence with 96 channels.*list\(x\)'): from_arrays(noise(1000, 96), noise(1000), win_sz=10)
    from_arrays([noise(1000, 96)], noise(1000), win_sz=10)
    from_arrays(noise(1000, 31), noise(1000), win_sz=10)

def test_an_array_without_steps_or_channels_is_refused():
    for shape,what in (((0,3),'steps'), ((9,0),'channels'), ((0,),'steps'), ((0,96,1),'steps'), ((9,0,1),'channels')):
        with pytest.raises(ValueError, match=f'it has no {what}'): from_arrays(np.zeros(shape), np.zeros(shape))
    with pytest.raises(ValueError, match='x is empty'): from_arrays([], [])


def test_files_go_by_the_same_rules(tmp_path):
    np.save(tmp_path/'x.npy', noise(120, 96, 1))
    x = np.load(tmp_path/'x.npy', mmap_mode='r')
    with pytest.raises(ValueError, match=r'Pass list\(x\) for 120 sequences of 96 steps'): from_arrays(x, x)
    dls = from_arrays(list(x), list(x), valid_pct=.25, bs=4)
    assert len(dls.train_ds)==120 and dls.train_ds.in_files

def test_hdf5_datasets_go_by_the_same_rules(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path/'a.h5', 'w') as f: f['x'],f['wide'],f['cube'] = noise(120),noise(120, 200),noise(120, 96, 1)
    files = [tmp_path/'a.h5']
    with pytest.raises(ValueError, match='expected \\(time,\\) or \\(time, channels\\)'): from_hdf5(files, 'cube', 'x')
    with pytest.warns(UserWarning, match=r'x of .* has shape \(120, 200\): it is taken for 120 steps of 200 channels'): from_hdf5(files, 'wide', 'x', sub_seq_len=10)
    with pytest.warns(UserWarning, match=r'y of .* has shape \(120, 200\)'): from_hdf5(files, 'x', 'wide', sub_seq_len=10)
    from_hdf5(files, 'wide', 'x', sub_seq_len=10, x_names=[str(i) for i in range(200)])
    with h5py.File(files[0]) as f:
        with pytest.raises(ValueError, match='Pass list'): from_arrays(f['cube'], f['cube'])
        with pytest.raises(ValueError, match='Pass list'): from_arrays(f['wide'], f['x'])


def visits(kind='int64'):
    u = np.random.default_rng(0).integers(0, 9, 240)
    return pd.DataFrame(dict(u=u.astype(float), visits=(3*u+200).astype(kind)))

LOADERS = dict(
    from_df=lambda kind: from_df(visits(kind), 'u', 'visits', sub_seq_len=20),
    from_df_in_parts=lambda kind: from_df(visits(kind), 'u', 'visits', win_sz=30, sub_seq_len=15),
    from_arrays=lambda kind: from_arrays(visits().u.to_numpy(), visits(kind).visits.to_numpy(), y_names='visits', win_sz=40, bs=2),
    lists=lambda kind: from_arrays([visits().u.to_numpy()], [visits(kind).visits.to_numpy()], y_names=['visits'], groups=['a'], sub_seq_len=20))

@pytest.mark.parametrize('loss', [nn.L1Loss(), nn.MSELoss(), nn.SmoothL1Loss(), nn.HuberLoss(), F.l1_loss, F.mse_loss])
@pytest.mark.parametrize('name', LOADERS)
def test_a_distance_to_integers_is_refused_with_their_column(name, loss):
    for make in (lambda dls: TbpttLearner(dls, net(), loss_func=loss), lambda dls: RNNLearner(dls, loss_func=loss)):
        with pytest.raises(TypeError, match=r"torch.int(64|32).*column 'visits' real by .astype\(float\)"): make(LOADERS[name]('int64'))
    with pytest.raises(TypeError, match=r"column 'visits' real"): TbpttLearner(LOADERS[name]('int32'), net(), loss_func=loss)
    TbpttLearner(LOADERS[name](float), net(), loss_func=loss)

def test_integers_in_files_are_named_by_their_dataset(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path/'a.h5', 'w') as f: f['u'],f['visits'] = visits().u.to_numpy(),visits().visits.to_numpy()
    dls = from_hdf5([tmp_path/'a.h5'], 'u', 'visits', sub_seq_len=20)
    for make in (lambda: TbpttLearner(dls, net(), loss_func=nn.L1Loss()), lambda: RNNLearner(dls, loss_func=nn.MSELoss())):
        with pytest.raises(TypeError, match="make column 'visits' real by .astype"): make()

def test_without_a_loss_the_message_says_both_ways():
    for dls in (LOADERS['from_df']('int64'), LOADERS['from_arrays']('uint8')):
        with pytest.raises(ValueError, match=r"CrossEntropyLossFlat\(\). For a regression make column 'visits' real by .astype\(float\)"): TbpttLearner(dls, net())
        with pytest.raises(ValueError, match=r"needs items.*column 'visits' real by .astype\(float\)"): RNNLearner(dls)
    unnamed = from_arrays(noise(200), np.arange(200), win_sz=20)
    with pytest.raises(TypeError, match='make the targets real'): TbpttLearner(unnamed, net(), loss_func=nn.L1Loss())

@pytest.mark.parametrize('loss', [MSELossFlat(), L1LossFlat()])
def test_losses_that_flatten_give_the_numbers_of_real_targets(loss):
    def numbers(kind):
        set_seed(0)
        learn = TbpttLearner(LOADERS['from_df'](kind), net(), loss_func=loss, metrics=mae)
        fit(learn)
        with learn.no_bar(): return list(learn.validate())
    assert numbers('int64')==pytest.approx(numbers(float), rel=1e-6)


def holey(n=400, seed=0, where=.2):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n,2))
    y = np.stack([5+u.sum(1), 100*u[:,0]], 1)
    y[rng.random(y.shape)<where] = np.nan
    return u,y

@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('size', [1, 7, 1<<18])
def test_statistics_are_those_of_numpy_over_what_is_finite(dtype, size, monkeypatch):
    monkeypatch.setattr('tbptt_fastai.sequences.arrays.blocks', lambda seq: blocks(seq, size=size))
    ys = [holey(n, n)[1].astype(dtype) for n in (50, 300)]
    ys[0][3,0],ys[1][0,1] = np.inf,-np.inf
    mean,std = channel_stats([torch.from_numpy(o) for o in ys])
    y = np.where(np.isfinite(all_ := np.concatenate(ys).astype(float)), all_, np.nan)
    np.testing.assert_allclose(mean, np.nanmean(y, 0), rtol=1e-12)
    np.testing.assert_allclose(std, np.nanstd(y, 0), rtol=1e-12)

def test_what_is_infinite_as_the_type_of_a_batch_does_not_count():
    o = torch.tensor([[1.],[3.],[1e300]], dtype=torch.float64)
    assert channel_stats([o], dtype=torch.float32)[0]==2 and channel_stats([o[:2].long()])[0]==2

class Masked(nn.Module):
    def forward(self, pred, targ):
        ok = targ.isfinite()
        return (pred-targ.where(ok, pred)).abs().sum()/ok.sum().clamp(min=1)

@pytest.mark.parametrize('name', ['from_arrays', 'stream', 'memory map', 'plain loader', 'batch transform'])
def test_missing_targets_leave_scaling_and_outputs_finite(name, tmp_path):
    u,y = holey()
    kw = dict(check=False, bs=4, valid_pct=.25, sub_seq_len=25)
    if name=='memory map':
        for k,o in (('u',u), ('y',y)): np.save(tmp_path/f'{k}.npy', o)
        u,y = (np.load(tmp_path/f'{k}.npy', mmap_mode='r') for k in 'uy')
    if name in ('from_arrays', 'plain loader'): dls = from_arrays(u, y, win_sz=50, **kw)
    elif name=='batch transform': dls = from_arrays(u, y, win_sz=50, after_batch=[lambda o: 2*o], **{**kw, 'bs': 6})
    else: dls = from_arrays([u], [y], groups=[0], **kw)
    if name=='plain loader': dls = item_loaders(list(dls.train_ds), bs=6, shuffle=False)
    factor = 2 if name=='batch transform' else 1
    scale_x,scale_y = scaling_from_data(dls)
    np.testing.assert_allclose(scale_y.mean, factor*np.nanmean(y[:300], 0), rtol=1e-4)
    np.testing.assert_allclose(scale_y.std, factor*np.nanstd(y[:300], 0), rtol=1e-5)
    np.testing.assert_allclose(scale_x.std, factor*u[:300].std(0), rtol=1e-5)
    learn = fit(RNNLearner(dls, hidden_size=4, loss_func=Masked(), sub_seq_len=25), 2)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    with learn.no_bar(): assert learn.get_preds()[0].isfinite().all()
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_missing_inputs_count_no_more_than_missing_targets():
    u,y = holey(where=0)
    u[::7,1] = np.nan
    scale_x,_ = scaling_from_data(from_arrays(u, y, check=False, win_sz=50, bs=4, valid_pct=.25))
    np.testing.assert_allclose(scale_x.std, np.nanstd(u[:300], 0), rtol=1e-5)

def test_a_channel_without_a_finite_value_is_refused_by_name():
    u,y = holey()
    y[:,1] = np.nan
    for names,channel in ((['t','p'], "'p'"), (None, '1')):
        dls = from_arrays(u, y, check=False, win_sz=50, bs=4, y_names=names)
        for make in (lambda: RNNLearner(dls, loss_func=Masked()), lambda: TbpttLearner(dls, net(2, 2))):
            with pytest.raises(ValueError, match=f'Channel {channel} of y has no finite value in 320 steps'): make()


def two_units(n=3000, seed=0):
    "A slow and a fast filter of one input, in units of 1 and of 1000"
    u = np.random.default_rng(seed).standard_normal(n)
    def low(a): return np.convolve(u, a**np.arange(60))[:n]
    slow,fast = low(.9),low(.5)
    return u,np.stack([slow/slow.std(), 1000*fast/fast.std()], 1)

def r2(learn):
    with learn.no_bar(): preds,targs = learn.get_preds()
    preds,targs = preds.flatten(0, -2),targs.flatten(0, -2)
    return 1-(preds-targs).square().mean(0)/targs.var(0)

def test_two_outputs_of_different_units_are_both_learned():
    u,y = two_units()
    set_seed(0)
    learn = fit(RNNLearner(from_arrays(u, y, win_sz=100, sub_seq_len=50, bs=8), hidden_size=16, metrics=mae), 15, 1e-2)
    assert r2(learn).min()>.8
    with learn.no_bar():
        loss,error = learn.validate()
        preds,targs = learn.get_preds()
    std = y[:2400].std(0)
    assert loss==pytest.approx(((preds-targs).abs()/torch.from_numpy(std)).mean().item(), rel=1e-5)
    assert error==pytest.approx((preds-targs).abs().mean().item(), rel=1e-5) # a metric stays in units

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', ['windows', 'stream', 'own model', 'plain loader'])
def test_the_default_loss_of_several_outputs_is_in_units_of_their_deviations(name, dtype):
    u,y = two_units(600)
    kw = dict(bs=8, valid_pct=.25, dtype=dtype, sub_seq_len=45)
    dls = from_arrays([u], [y], groups=[0], **kw) if name=='stream' else from_arrays(u, y, win_sz=90, **kw)
    if name=='plain loader': dls = item_loaders(list(dls.train_ds), bs=8, shuffle=False)
    learn = TbpttLearner(dls, net(1, 2).to(dtype), sub_seq_len=45) if name=='own model' else RNNLearner(dls, hidden_size=3, sub_seq_len=45)
    assert type(learn.loss_func) is ScaledL1Loss and learn.loss_func.std.dtype==dtype
    np.testing.assert_allclose(learn.loss_func.std, y[:450].std(0), rtol=1e-5)
    learn = fit_own_lr(learn)
    with learn.no_bar(): preds,targs,losses = learn.get_preds(with_loss=True)
    by_hand = ((preds-targs).abs()/learn.loss_func.std)
    torch.testing.assert_close(losses.flatten(), by_hand.flatten(1).mean(1).to(losses.dtype), rtol=1e-5, atol=1e-6)

def test_steps_by_hand_with_the_scaled_loss():
    u,y = two_units(400)
    dls = from_arrays(u, y, win_sz=80, sub_seq_len=40, bs=4, shuffle=False, dtype=torch.float64)
    model = net(1, 2).double()
    by_hand = copy.deepcopy(model)
    learn = TbpttLearner(dls, model, opt_func=sgd)
    fit(learn, 1, 1e-2)
    opt,std = torch.optim.SGD(by_hand.parameters(), 1e-2),torch.from_numpy(y[:320].std(0))
    x,t = (torch.from_numpy(o).reshape(5, 80, -1)[:4] for o in (u,y))
    state,(rnn,head) = None,(by_hand[0].rnn,by_hand[1])
    for a in (0, 40):
        out,state = rnn(x[:,a:a+40], state)
        ((head(out)-t[:,a:a+40])/std).abs().mean().backward()
        opt.step()
        opt.zero_grad()
        state = tuple(o.detach() for o in state)
    for p,q in zip(model.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)

def test_one_output_or_outputs_of_one_deviation_have_the_plain_loss():
    u,y = two_units(600)
    same = np.stack([y[:,0], -y[:,0]], 1)
    for o in (y[:,1], same): assert type(default_loss(from_arrays(u, o, win_sz=50, bs=4))) is nn.L1Loss
    items = [(torch.randn(20, 1), torch.randn(20)) for _ in range(8)] # predictions without channels
    assert type(default_loss(DataLoaders(*[torch.utils.data.DataLoader(items, 4)]*2))) is nn.L1Loss

def test_several_values_for_each_window_are_scaled_too():
    items = [(torch.randn(20, 1), torch.tensor([1.,1000.])*torch.randn(2)) for _ in range(8)]
    loss = default_loss(DataLoaders(*[torch.utils.data.DataLoader(items, 8)]*2))
    torch.testing.assert_close(loss.std, torch.stack([y for _,y in items]).std(0, correction=0))

def test_the_default_loss_draws_no_random_numbers():
    items = [(torch.randn(20, 1), torch.randn(20, 2)) for _ in range(8)]
    dls = DataLoaders(*[torch.utils.data.DataLoader(items, 4, shuffle=True)]*2)
    set_seed(3)
    expected = torch.rand(3)
    set_seed(3)
    default_loss(dls)
    assert torch.equal(torch.rand(3), expected)

def test_a_dataset_that_cannot_be_indexed_needs_a_loss():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): yield from ((torch.randn(20, 1), torch.randn(20, 1)) for _ in range(8))
    dls = DataLoaders(*[torch.utils.data.DataLoader(Endless(), 4)]*2)
    with pytest.raises(ValueError, match='No default loss'): TbpttLearner(dls, net())
    with pytest.raises(ValueError, match='needs items'): RNNLearner(dls)
    assert isinstance(TbpttLearner(dls, net(), loss_func=nn.L1Loss(), sub_seq_len=None), Learner)

@pytest.mark.parametrize('loss', [lambda o, y: (o-y).abs().mean(), lambda o, y: torch.dist(o, y), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize('name', LOADERS)
def test_any_loss_in_a_plain_learner_names_the_column_of_integers(name, loss):
    dls = LOADERS[name]('int64')
    learn = Learner(dls, net(), loss, cbs=TbpttResetCB())
    with pytest.raises(ValueError, match=r"give column 'visits' by .astype\(float\)"): fit(learn)

@pytest.mark.parametrize('sub_seq_len', [None, 5])
@pytest.mark.parametrize('stream', [True, False])
def test_one_output_is_not_compared_with_each_of_several_targets(sub_seq_len, stream):
    "... by the default loss, which scales both before they meet"
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((n, 2)).astype(np.float32) for n in ((40, 31) if stream else (40, 40))]
    dls = SequenceDataLoaders.from_arrays(xs, [o*[1, 10] for o in xs], sub_seq_len=sub_seq_len, bs=2)
    learn = TbpttLearner(dls, SequenceRNN(2, 1, 'gru', 4))
    assert type(learn.loss_func) is ScaledL1Loss
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match='which ScaledL1Loss cannot take.*Give the model as many outputs as there are targets'): fit(learn)
    assert all(map(torch.equal, before, learn.model.parameters()))
