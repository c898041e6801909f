"Sub-windows change the gradient, nothing else: every number that is read is that of whole windows"
import copy
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.hook import summary # with it comes Learner.summary
from fastai.callback.schedule import combined_cos
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from fastai.metrics import mae, rmse
from fastai.torch_core import set_seed
from helpers import fit, fit_own_lr, split_loaders
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.sequences.windows import SequenceWindows

WIN = 500


@pytest.fixture(scope='module')
def data():
    rng = np.random.default_rng(0)
    u = rng.standard_normal((9000,2))
    return u,1e-2*np.convolve(u[:,0], np.exp(-np.arange(60)/20)/5)[:len(u)]

def evaluated_learner(data, sub_seq_len=100, bs=4, **kwargs):
    dls = split_loaders(data, 5000, win_sz=WIN, stp_sz=250, valid_stp_sz=400, bs=bs)
    return RNNLearner(dls, hidden_size=8, sub_seq_len=sub_seq_len, metrics=[fun_rmse, rmse, mae], **kwargs)

def by_numpy(learn, ds, n_skip=0):
    "Predictions of whole windows in the order of the data, and loss, RMSE, MAE by numpy"
    with torch.no_grad(): pred = torch.cat([learn.model.eval()(x[None]) for x,y in ds]).numpy()
    e = (pred-np.stack([y.numpy() for x,y in ds]))[:,n_skip:].astype(np.float64)
    return pred,[np.abs(e).mean(), np.sqrt((e**2).mean()), np.sqrt((e**2).mean()), np.abs(e).mean()]


@pytest.fixture(scope='module')
def fitted(data):
    learn = evaluated_learner(data)
    fit(learn)
    return learn


@pytest.mark.parametrize('n_skip', [0,130])
@pytest.mark.parametrize('sub_seq_len', [None,7,100,500])
def test_validate_is_the_numpy_sum(fitted, sub_seq_len, n_skip):
    learn = copy.deepcopy(fitted)
    learn.tbptt_reset_cb.sub_seq_len,learn.tbptt_reset_cb.n_skip = sub_seq_len,n_skip
    assert len(learn.dls.valid_ds)%4 # the last batch is a partial one
    with learn.no_bar():
        for ds_idx,ds in enumerate((learn.dls.train_ds, learn.dls.valid_ds)):
            np.testing.assert_allclose(learn.validate(ds_idx), by_numpy(learn, ds, n_skip)[1], atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(learn.validate(dl=learn.dls.train), by_numpy(learn, learn.dls.train_ds, n_skip)[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('sub_seq_len', [None,7,100,500])
def test_predictions_are_whole_windows_in_the_order_of_the_data(fitted, sub_seq_len):
    learn = copy.deepcopy(fitted)
    learn.tbptt_reset_cb.sub_seq_len,learn.tbptt_reset_cb.n_skip = sub_seq_len,130
    for ds_idx,ds in enumerate((learn.dls.train_ds, learn.dls.valid_ds)): # the training loader shuffles
        with learn.no_bar(): x,pred,targ,dec,loss = learn.get_preds(ds_idx, with_input=True, with_decoded=True, with_loss=True)
        expected = by_numpy(learn, ds)[0]
        np.testing.assert_allclose(pred, expected, atol=1e-6)
        assert torch.equal(targ, torch.stack([y for _,y in ds])) and torch.equal(x, torch.stack([x for x,_ in ds]))
        np.testing.assert_allclose(loss, np.abs(expected-targ.numpy())[:,130:].mean((1,2)), atol=1e-6) # one per window, washout left out


def test_predictions_with_a_loader_that_is_cut_are_of_whole_windows(data):
    "`get_preds` copies the loader, with its sub_seq_len; the callback gives it whole windows all the same"
    set_seed(0)
    u,y = data
    dls = SequenceDataLoaders.from_arrays(u, y, win_sz=WIN, sub_seq_len=100, bs=4, valid_pct=.3)
    learn = RNNLearner(dls, hidden_size=4)
    with learn.no_bar(): preds,targs = learn.get_preds(ds_idx=0)
    assert preds.shape==(len(dls.train_ds), WIN, 1)
    np.testing.assert_allclose(preds, by_numpy(learn, dls.train_ds)[0], atol=1e-6)


def test_new_data_without_targets_is_predicted(fitted, data):
    u,_ = data
    dl = fitted.dls.test_dl(SequenceWindows(u[:2000], win_sz=1000))
    with fitted.no_bar(): preds,targs = fitted.get_preds(dl=dl)
    with torch.no_grad(): expected = fitted.model.eval()(torch.from_numpy(u[:2000]).float().view(2, 1000, 2))
    assert targs is None or len(targs)==0
    torch.testing.assert_close(preds, expected)


def test_interpretation_sees_windows(fitted):
    with fitted.no_bar():
        interp = Interpretation.from_learner(fitted)
        losses,idxs = interp.top_losses(3)
    pred,_ = by_numpy(fitted, fitted.dls.valid_ds)
    expected = np.abs(pred-np.stack([y.numpy() for _,y in fitted.dls.valid_ds])).mean((1,2))
    np.testing.assert_allclose(losses, np.sort(expected)[::-1][:3], atol=1e-6)


def test_training_counts_sub_windows_and_schedules_end_at_one(data):
    class Watch(Callback):
        def __init__(self): self.seen = []
        def before_batch(self):
            if self.training: self.seen.append((self.pct_train, self.n_iter, self.iter))
    learn,watch = evaluated_learner(data, sub_seq_len=150),Watch()
    learn.add_cb(watch)
    fit(learn, 2, 1e-2, 'fit_flat_cos')
    n_batches = len(learn.dls.train)
    pct,n_iter,_ = zip(*watch.seen)
    assert set(n_iter)=={4*n_batches} and len(pct)==2*4*n_batches
    np.testing.assert_allclose(pct, np.arange(len(pct))/len(pct), atol=1e-9)
    np.testing.assert_allclose(learn.recorder.lrs, [combined_cos(.75, 1e-2, 1e-2, 1e-2/1e5)(p) for p in pct]) # fit_flat_cos, to its end
    assert len(learn.recorder.losses)==len(pct)


def test_nothing_in_the_loaders_changes(data):
    learn = evaluated_learner(data)
    before = [(dl,dl.sub_seq_len,len(dl),dl.bs,dl.shuffle) for dl in learn.dls.loaders]
    fit(learn)
    assert before==[(dl,dl.sub_seq_len,len(dl),dl.bs,dl.shuffle) for dl in learn.dls.loaders]


class Stop(Callback):
    order = 45
    def __init__(self, at, exc): self.at,self.exc,self.n = at,exc,0
    def after_pred(self):
        self.n += 1
        if self.n==self.at: raise self.exc


@pytest.mark.parametrize('exc', [KeyboardInterrupt('stop'), RuntimeError('in the middle of a window')])
def test_an_interrupted_fit_leaves_nothing_behind(data, exc):
    fresh,stopped = evaluated_learner(data),evaluated_learner(data)
    weights = copy.deepcopy(fresh.model.state_dict())
    stopped.add_cb(Stop(7, exc)) # the second sub-window of the second batch
    with pytest.raises(type(exc)): fit(stopped, 1, 0.)
    stopped.remove_cb(Stop)
    assert stopped.model.rnn.state is None and not stopped.model._forward_pre_hooks and 'all_batches' not in vars(stopped)
    for learn in (fresh, stopped): learn.model.load_state_dict(weights)
    with fresh.no_bar(), stopped.no_bar(): assert list(stopped.validate())==list(fresh.validate())
    copy.deepcopy(stopped.model)
    set_seed(1)
    fresh.dls,fresh.opt = evaluated_learner(data).dls,None
    set_seed(1)
    stopped.dls,stopped.opt = evaluated_learner(data).dls,None
    fit(fresh, 2)
    fit(stopped, 2)
    for a,b in zip(fresh.model.parameters(), stopped.model.parameters()): assert torch.equal(a, b)


@pytest.mark.parametrize('sub_seq_len', [100,None])
def test_a_cancelled_fit_keeps_no_state(data, sub_seq_len):
    learn = evaluated_learner(data, sub_seq_len)
    fit_own_lr(learn, 1, cbs=Stop(7, CancelFitException()))
    assert learn.model.rnn.state is None


def test_what_others_do_to_predictions_is_kept(fitted):
    "A callback after TbpttResetCB changes predictions in evaluation; nothing of it is undone"
    class Twice(Callback):
        order = 20
        def after_pred(self): self.learn.pred = 2*self.pred
    learn = copy.deepcopy(fitted)
    with learn.no_bar():
        preds,_ = learn.get_preds()
        learn.add_cb(Twice())
        doubled,targs = learn.get_preds()
        values = learn.validate()
    torch.testing.assert_close(doubled, 2*preds)
    np.testing.assert_allclose(values[0], (doubled-targs).abs().mean(), atol=1e-6)
    np.testing.assert_allclose(values[1], (doubled-targs).square().mean().sqrt(), atol=1e-6)


def test_a_loss_that_fails_in_validation_leaves_no_predictions_behind(fitted):
    learn = copy.deepcopy(fitted)
    learn.tbptt_reset_cb.n_skip = 20
    def fail(pred, targ): raise RuntimeError('in the loss')
    learn.loss_func = fail
    with pytest.raises(RuntimeError, match='in the loss'), learn.no_bar(): learn.validate()
    assert learn.tbptt_reset_cb._whole is None


def test_evaluation_between_epochs_changes_nothing(data):
    class Evaluate(Callback):
        order = 80
        def after_epoch(self):
            rnn = self.model.rnn
            self.learn.model.eval()
            with torch.no_grad(): self.model(torch.zeros(3, 50, 2))
            assert rnn.state is None
    a,b = evaluated_learner(data),evaluated_learner(data)
    fit(a, 2)
    b.add_cb(Evaluate())
    fit(b, 2)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def test_lr_find_show_results_summary_and_export_leave_the_model_as_it_was(fitted, tmp_path):
    learn = copy.deepcopy(fitted)
    learn.tbptt_reset_cb.n_skip = 20
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar():
        learn.lr_find(num_it=20, show_plot=False)
        learn.show_results(max_n=2)
        learn.summary()
        learn.export(tmp_path/'model.pkl')
        loaded = load_learner(tmp_path/'model.pkl')
        dl = learn.dls.valid.new(learn.dls.valid_ds)
        with loaded.no_bar(): preds,_ = loaded.get_preds(dl=dl)
        expected,_ = learn.get_preds()
    assert torch.equal(preds, expected)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert (tmp_path/'model.pkl').stat().st_size < 100_000 and learn.tbptt_reset_cb._whole is None


def test_a_partial_batch_and_a_second_fit_meet_no_state(data):
    "The state of a full batch never meets a partial one; a second fit goes on like the first"
    learn = evaluated_learner(data, bs=7)
    assert len(learn.dls.train_ds)%7
    fit(learn, 2)
    fit(learn, 1)
    assert learn.model.rnn.state is None


@pytest.mark.parametrize('kwargs', [dict(shuffle=False), dict(num_workers=2), dict(drop_last=True)])
def test_loader_options_reach_the_loader(data, kwargs):
    u,y = data
    dls = SequenceDataLoaders.from_arrays(u, y, win_sz=WIN, sub_seq_len=200, bs=4, **kwargs)
    batches = [x[:,0] for x,y in dls.train.sub_windows()]
    assert len(batches)==len(dls.train)
    if 'drop_last' in kwargs: assert {len(b) for b in batches}=={4}
    if 'shuffle' in kwargs: torch.testing.assert_close(batches[1][0], torch.from_numpy(u[200]).float())
