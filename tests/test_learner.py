"What the factory reads from the data, and what it refuses"
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.callback.core import Callback
from fastai.interpret import Interpretation
from fastai.learner import Learner, load_learner
from fastai.callback.training import GradientClip
from fastai.metrics import mae
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import Adam
from torch import nn
from helpers import fit, fit_own_lr
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checks import resolve_truncation
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.speed.dispatch import LeanLearner
from tbptt_fastai.speed.optimizer import FusedAdam
from tbptt_fastai.learner import RNNLearner, SequenceLearner, TbpttLearner, scaling_from_data
from tbptt_fastai.sequences.arrays import channel_stats
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.models.sequence import SequenceRNN, Standardize


@pytest.fixture
def dls(signals): return SequenceDataLoaders.from_arrays(*signals, win_sz=100, sub_seq_len=40, bs=4, valid_pct=.25)

def model(): return nn.Sequential(StatefulRNN(nn.LSTM(2, 4, batch_first=True)), nn.Linear(4, 1))


def test_sizes_and_scaling_come_from_the_training_data(dls, signals):
    learn = TbpttLearner(dls, rnn_type='gru', hidden_size=7, num_layers=2, dropout=.1)
    gru,head = learn.model.rnn.rnn,learn.model.head
    assert isinstance(gru, nn.GRU) and (gru.input_size,gru.hidden_size,gru.num_layers,gru.dropout,head.out_features)==(2,7,2,.1,1)
    for scale,o in zip((learn.model.scale_x,learn.model.scale_y), signals):
        torch.testing.assert_close(scale.mean, torch.from_numpy(o[:900].mean(0)))
        torch.testing.assert_close(scale.std, torch.from_numpy(o[:900].std(0)))


def test_a_constant_channel_is_only_shifted():
    u = np.stack([np.full(900, 5.), np.random.default_rng(0).standard_normal(900)], 1)
    learn = RNNLearner(SequenceDataLoaders.from_arrays(u, u[:,1], win_sz=50, bs=4), hidden_size=4)
    assert learn.model.scale_x.std[0]==1
    almost = Standardize(*channel_stats([torch.full((999,1), .1, dtype=torch.float64)])) # rounding leaves a deviation of 1e-17
    assert almost.std==1
    fit_own_lr(learn, 1)
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_scaling_sees_what_the_model_sees(signals):
    "With batch transforms, or another kind of dataset, the statistics are those of a transformed batch"
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=100, bs=9, valid_pct=.25, after_batch=[lambda o: 2*o])
    torch.testing.assert_close(scaling_from_data(dls)[0].std, torch.from_numpy(2*signals[0][:900].std(0)))
    plain = DataLoaders(*[torch.utils.data.DataLoader(list(dls.train_ds), 9)]*2)
    torch.testing.assert_close(scaling_from_data(plain)[0].std, torch.from_numpy(signals[0][:900].std(0)))


def test_the_defaults_are_the_l1_loss_the_fused_adam_and_no_clipping(dls):
    learn = TbpttLearner(dls, model())
    assert isinstance(learn, LeanLearner) and type(learn) is SequenceLearner
    assert isinstance(learn.loss_func, nn.L1Loss) and learn.opt_func is FusedAdam and not learn._grab_cbs(GradientClip)
    assert learn._grab_cbs(TbpttResetCB)[0].order==12
    assert TbpttLearner(dls, model(), grad_clip=.5)._grab_cbs(GradientClip)[0].max_norm==.5
    assert TbpttLearner(dls, model(), loss_func=MSELossFlat(), lr=.02, wd=.1).lr==.02


def numbers(recorder): return [[float(x) for x in o] for o in (recorder.lrs, recorder.losses, recorder.iters)]+[[list(map(float, v)) for v in recorder.values]]

@pytest.mark.parametrize('evaluate', [
    lambda o: o.validate(), lambda o: o.validate(0), lambda o: o.get_preds(), lambda o: o.get_preds(ds_idx=0, with_loss=True), lambda o: o.show_results(),
    lambda o: Interpretation.from_learner(o)], ids=['validate', 'validate train', 'get_preds', 'get_preds with losses', 'show_results', 'Interpretation'])
def test_an_evaluation_leaves_the_records_of_the_training(dls, evaluate):
    learn = TbpttLearner(dls, model(), metrics=mae)
    with learn.no_bar(), learn.no_logging():
        learn.fit_flat_cos(3, 1e-2)
        before,hps = numbers(learn.recorder),dict(learn.recorder.hps)
        evaluate(learn)
    assert numbers(learn.recorder)==before and len(before[1])==3*len(dls.train) and len(before[3])==3 and learn.recorder.hps==hps
    fig,ax = plt.subplots()
    learn.recorder.plot_loss(skip_start=0, ax=ax)
    train,valid = ax.lines
    assert train.get_ydata()==pytest.approx(before[1]) and valid.get_ydata()==pytest.approx([v[1] for v in before[3]])

def test_an_evaluation_that_fails_leaves_them_as_well(dls):
    learn = TbpttLearner(dls, model())
    def stop(self):
        if not self.learn.training: raise KeyboardInterrupt
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        before = numbers(learn.recorder)
        with pytest.raises(KeyboardInterrupt): learn.validate(cbs=Callback(before_batch=stop))
    assert numbers(learn.recorder)==before

def test_an_evaluation_in_the_middle_of_a_training_does_not_interrupt_its_records(dls):
    class Look(Callback):
        order,seen = 5,False
        def before_epoch(self):
            if self.training or self.epoch!=1 or self.seen: return
            self.seen = True
            self.learn.get_preds()
    learn = TbpttLearner(dls, model(), cbs=(look := Look()))
    fit_own_lr(learn, 3)
    assert look.seen and len(learn.recorder.values)==3

def test_validate_still_returns_its_own_numbers_and_a_second_fit_its_own_records(dls):
    learn = TbpttLearner(dls, model(), metrics=mae)
    with learn.no_bar(), learn.no_logging():
        assert len(learn.validate())==2 # before any training
        learn.fit(2)
        loss,error = learn.validate()
        assert [loss,error]==pytest.approx(list(learn.recorder.values[-1])[1:])
        learn.fit(1)
    assert len(learn.recorder.values)==1 and len(learn.recorder.losses)==len(dls.train)


def test_classes_per_step_are_trained_with_a_loss_that_is_given(signals):
    u,y = signals
    dls = SequenceDataLoaders.from_arrays(u, (y[:,0]>0).astype(np.int64), win_sz=100, sub_seq_len=40, bs=4)
    with pytest.raises(ValueError, match='No default loss for targets of type torch.int64'): TbpttLearner(dls, model())
    with pytest.raises(ValueError, match='needs items'): RNNLearner(dls)
    two = nn.Sequential(StatefulRNN(nn.LSTM(2, 4, batch_first=True)), nn.Linear(4, 2))
    learn = TbpttLearner(dls, two, loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        preds,targs,dec = learn.get_preds(with_decoded=True)
    assert preds.shape==(2,100,2) and targs.shape==dec.shape==(2,100)


@pytest.mark.parametrize('make,exc,message', [
    (lambda dls: TbpttLearner(dls, model(), sub_seq_len=50), ValueError, '50 in the learner and 40 in its training loader'),
    (lambda dls: TbpttLearner(dls, model(), sub_seq_len=0), ValueError, 'sub_seq_len is 0'),
    (lambda dls: TbpttLearner(dls, model(), sub_seq_len=2.5), TypeError, 'sub_seq_len is 2.5'),
    (lambda dls: TbpttLearner(dls, model(), sub_seq_len='forty'), TypeError, "sub_seq_len is 'forty'"),
    (lambda dls: TbpttLearner(dls, model(), n_skip=100), ValueError, 'n_skip is 100, the window has 100 steps'),
    (lambda dls: TbpttLearner(dls, model(), n_skip=-1), ValueError, 'n_skip is -1'),
    (lambda dls: TbpttLearner(dls, nn.Linear(2, 1)), ValueError, 'Linear has no recurrent layer and no StatefulRNN'),
    (lambda dls: RNNLearner(dls, rnn_type='transformer'), ValueError, r"rnn_type is 'transformer'; expected one of \['rnn', 'gru', 'lstm'\]"),
    (lambda dls: TbpttLearner(dls, model(), rnn_type='gru'), TypeError, 'rnn_type'),
    (lambda dls: RNNLearner(dls, hidden=3), TypeError, 'hidden'),
    (lambda dls: TbpttLearner(dls, model(), grad_clip=0), ValueError, 'grad_clip is 0'),
    (lambda dls: TbpttLearner(dls, model(), grad_clip=-1.), ValueError, 'grad_clip is -1.0'),
])
def test_what_cannot_be_trained_is_refused_when_the_learner_is_made(dls, make, exc, message):
    with pytest.raises(exc, match=message): make(dls)


def test_a_callback_added_later_is_checked_before_the_first_step(signals):
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=100, bs=4)
    net = model()
    before = [p.clone() for p in net.parameters()]
    learn = Learner(dls, net, loss_func=nn.L1Loss())
    learn.add_cb(TbpttResetCB(sub_seq_len=101))
    with pytest.raises(ValueError, match='sub_seq_len is 101, but a window has 100 steps'), learn.no_bar(): learn.fit(1)
    assert all(torch.equal(a, b) for a,b in zip(before, net.parameters())) and learn.dls.train is dls.train


def test_a_model_that_resets_itself_is_told_when():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out,self.h,self.resets = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1),None,0
        def forward(self, x):
            out,h = self.rnn(x, self.h)
            self.h = h.detach()
            return self.out(out)
        def reset(self): self.h,self.resets = None,self.resets+1
    rng = np.random.default_rng(0)
    dls = SequenceDataLoaders.from_arrays(rng.standard_normal((600,2)), rng.standard_normal(600), win_sz=50, bs=4, sub_seq_len=20)
    learn = TbpttLearner(dls, Own())
    fit_own_lr(learn, 1)
    assert learn.model.resets>=3+1+1 # three training batches, one for validation, and when it ends


def test_standardize_inverts():
    scale = Standardize(torch.tensor([1.,2.]), torch.tensor([3.,0.]))
    x = torch.randn(2, 5, 2)
    torch.testing.assert_close(scale.inverse(scale(x)), x)
    assert SequenceRNN(2, 2, hidden_size=3, scale_x=scale).state_dict()['scale_x.mean'].tolist()==[1,2]


def test_two_callbacks_would_weigh_twice(dls):
    with pytest.raises(ValueError, match='two TbpttResetCB'): TbpttLearner(dls, model(), cbs=TbpttResetCB())


def test_a_wrapped_loader_is_still_cut(dls):
    "fastai's DistributedDL, which is not a TbpttDL, keeps the one that it wraps as `dl`"
    class Wrapper:
        def __init__(self, dl): self.dl = dl
    assert resolve_truncation('dls', Wrapper(Wrapper(dls.train))).sub_seq_len==40
    with pytest.raises(ValueError, match='neither to the learner nor to its list'): resolve_truncation('dls', [dls.one_batch()])


def test_a_single_batch_outside_of_a_loader_is_a_new_window(dls):
    learn = TbpttLearner(dls, model())
    learn.create_opt()
    learn.opt.set_hypers(lr=0., wd=0.)
    learn.dl,learn.training,learn.n_iter = dls.train,True,1
    x,y = dls.one_batch()
    learn.model.train()(x[:,:40])
    with learn.removed_cbs([o for o in learn.cbs if not isinstance(o, TbpttResetCB)]): learn.one_batch(0, (x,y))
    torch.testing.assert_close(learn.pred, learn.model.eval()(x))


@pytest.mark.parametrize('n_skip', [0,40,75])
def test_a_training_loader_without_targets_makes_no_step(dls, n_skip):
    "... as in fastai: whoever computes a loss of their own does so in a callback"
    learn = TbpttLearner(SequenceDataLoaders.from_arrays(torch.randn(600, 2), torch.randn(600), win_sz=100, sub_seq_len=40, bs=4), model(), n_skip=n_skip)
    learn.dls.train.dataset.arrays.pop()
    before = [p.clone() for p in learn.model.parameters()]
    fit_own_lr(learn, 1)
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))


def test_a_sum_over_steps_needs_no_weight(signals):
    "A short sub-window already has a smaller sum"
    seen = []
    class Weights(Callback):
        order = 13
        def after_loss(self):
            if self.training: seen.append((self.loss_grad/self.loss).item())
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=100, sub_seq_len=40, bs=4, valid_pct=.25)
    for reduction,expected in (('mean',[1,1,.5]), ('sum',[1,1,1])):
        seen.clear()
        learn = TbpttLearner(dls, model(), loss_func=nn.L1Loss(reduction=reduction), cbs=Weights())
        fit(learn, 1, 0.)
        assert seen[:3]==expected


@pytest.mark.parametrize('wrapped', [True,False])
def test_a_layer_that_takes_time_for_the_batch_is_refused(dls, wrapped):
    "batch_first=False is torch's default, and trains on anything"
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out = nn.LSTM(2, 4),nn.Linear(4, 1)
        def forward(self, x): return self.out(self.rnn(x)[0])
    net = nn.Sequential(StatefulRNN(nn.LSTM(2, 4)), nn.Linear(4, 1)) if wrapped else Plain()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match='took the 40 steps for a batch, and the 4 windows for steps'):
        learn = TbpttLearner(dls, net)
        fit_own_lr(learn, 1)
    assert all(torch.equal(a, b) for a,b in zip(before, net.parameters()))


def test_predictions_of_new_sequences_are_those_of_the_whole_model(dls, signals, tmp_path):
    learn = TbpttLearner(dls, model())
    x = torch.from_numpy(signals[0])
    def check(learn):
        with torch.no_grad(): expected = learn.model.eval()(x[None])[0]
        with learn.no_bar():
            for item in (signals[0], x, (x,)): torch.testing.assert_close(learn.predict(item)[0], expected)
            for items,n in ((signals[0],1), ([x,x,x],3)): torch.testing.assert_close(learn.get_preds(dl=learn.dls.test_dl(items))[0], expected.expand(n, *expected.shape))
            preds,targs = learn.get_preds(dl=learn.dls.test_dl([(x, torch.from_numpy(signals[1]))], with_labels=True))
        torch.testing.assert_close(targs[0], torch.from_numpy(signals[1]))
    check(learn)
    learn.export(tmp_path/'learn.pkl')
    with learn.no_bar(): check(load_learner(tmp_path/'learn.pkl'))


def test_interpretation_shows_windows(dls):
    learn = TbpttLearner(dls, model())
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        interp.show_results([1,0])
    assert len(plt.gcf().axes)==4
    np.testing.assert_array_equal(plt.gcf().axes[0].lines[0].get_ydata(), dls.valid_ds[1][1][:,0])


def test_a_float64_learner_is_built_and_trained_in_float64(signals):
    learn = RNNLearner(SequenceDataLoaders.from_arrays(*signals, win_sz=100, sub_seq_len=40, bs=4, dtype=torch.float64), hidden_size=3)
    assert {p.dtype for p in learn.model.state_dict().values()}=={torch.float64}
    fit_own_lr(learn, 1)


def test_the_loss_that_the_dataset_names_is_used(dls):
    dls.train_ds.loss_func = MSELossFlat()
    assert TbpttLearner(dls, model()).loss_func is dls.train_ds.loss_func


def test_an_empty_training_loader_is_refused_not_skipped(signals):
    learn = TbpttLearner(SequenceDataLoaders.from_arrays(*signals, win_sz=100, bs=64, drop_last=True), model())
    with pytest.raises(ValueError, match='no batches: 9 windows, bs=64, drop_last=True'): fit_own_lr(learn, 1)
