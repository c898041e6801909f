"""Where fastai and sub-windows collide, in evaluation, other callbacks and text: a test for every known hazard.
fastai's own flaws are tested as they are today"""
import ast, copy, inspect
from pathlib import Path
import numpy as np
import pytest
import torch
from fastai.callback.all import ActivationStats, CollectDataCallback, CSVLogger, FetchPredsCallback, GradientAccumulation, GradientClip, RNNCallback, RNNRegularizer, TerminateOnNaNCallback
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.hook import summary # of a Learner
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.interpret import Interpretation
from fastai.learner import AvgLoss, Learner, load_learner
from fastai.losses import MSELossFlat
from fastai.metrics import AccumMetric, mae, rmse
from fastai.text.data import LMDataLoader
from fastai.text.learner import language_model_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.torch_core import set_seed
from torch import nn
from helpers import fit, untaught_on_purpose
import tbptt_fastai
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.models.sequence import SequenceRNN
from small_windows import BS, SUB, WIN, Watch, items, net, noise, same, small_learner, small_loaders, whole


# --- losses and metrics

@pytest.fixture
def fitted(): return fit(small_learner(metrics=[rmse, mae]), 2)

def test_every_number_is_that_of_whole_windows(fitted):
    "A mean of the losses of sub-windows, or of their RMSE, is another number; a metric of all predictions is the same either way"
    for accum in (False,True):
        fitted.metrics = [AccumMetric(lambda p,t: (p-t).square().mean().sqrt(), flatten=False)] if accum else [rmse, mae]
        with fitted.no_bar(): values = list(fitted.validate(0))
        e = whole(fitted)-torch.stack([y for _,y in fitted.dls.train_ds])
        expected = [e.square().mean(), e.square().mean().sqrt()]+([] if accum else [e.abs().mean()])
        np.testing.assert_allclose(values, [o.item() for o in expected], rtol=1e-5)
    parts = [e[:,s:s+SUB] for s in range(0, WIN, SUB)]
    assert np.mean([p.square().mean().item() for p in parts])!=pytest.approx(expected[0].item(), rel=1e-4)

def test_fastai_weighs_a_batch_by_its_rows():
    "fastai's own: `AvgLoss` counts a short sub-window in full, which is why evaluation is never cut"
    class Fake: yb,loss = (),0
    met = AvgLoss()
    met.reset()
    for n,loss in ((100,1.), (50,4.)):
        fake = Fake()
        fake.yb,fake.loss,fake.to_detach = (torch.zeros(BS, n),),torch.tensor(loss),lambda o: o
        met.accumulate(fake)
    assert met.value==2.5 # per step it is 2

def test_evaluation_in_pieces_by_choice_is_exact(fitted):
    "Pieces of a window, put together, are the window"
    x = torch.stack([x for x,_ in fitted.dls.train_ds])
    fitted.model.eval()
    with torch.no_grad(), Carry(fitted.model, evaluation=True): pieces = torch.cat([fitted.model(o) for o in x.split(SUB, 1)], 1)
    assert (pieces-fitted.model(x)).abs().max()<1e-6

def test_a_short_last_sub_window_weighs_less():
    "... as much as its steps: with a constant prediction, all sub-windows pull together as the whole window does"
    class Const(nn.Module):
        def __init__(self): super().__init__(); self.w,self.rnn = nn.Parameter(torch.zeros(1)),StatefulRNN(nn.GRU(1, 1, batch_first=True))
        def forward(self, x): return self.w+0*self.rnn(x)
    grads = []
    class Keep(Callback):
        def after_backward(self): grads.append(self.model.w.grad.item())
    learn = fit(small_learner(model=Const(), cbs=[Keep()]), 1, 0.)
    for i,batch in enumerate(torch.stack([y for _,y in learn.dls.train_ds]).split(BS)):
        assert SUB/WIN*sum(grads[3*i:3*i+3])==pytest.approx(-2*batch.mean().item(), abs=1e-6)


# --- get_preds, show_results, Interpretation

def test_a_loader_that_cuts_loses_rows_without_the_callback():
    "fastai's own: it reorders as many rows as there are windows and says nothing. With TbpttResetCB all are there"
    dls = small_loaders(items(8), TbpttDL, sub_seq_len=15)
    bare = Learner(dls, nn.Sequential(nn.Linear(1, 1)), loss_func=MSELossFlat())
    with bare.no_bar(): assert bare.get_preds(ds_idx=0)[0].shape==(8,15,1) # of 16 halves
    learn = small_learner(dls, sub='dls')
    with learn.no_bar(): assert learn.get_preds(ds_idx=0)[0].shape==(8,WIN,1)

def test_interpretation_has_a_loss_for_every_window(fitted):
    fitted.dls = small_loaders(cls=TbpttDL, sub_seq_len=15)
    fitted.tbptt_reset_cb.sub_seq_len = 15
    with fitted.no_bar(): losses,idxs = Interpretation.from_learner(fitted, ds_idx=0).top_losses()
    expected = (whole(fitted)-torch.stack([y for _,y in fitted.dls.train_ds])).square().mean((1,2))
    torch.testing.assert_close(losses, expected.sort(descending=True)[0])

def test_predictions_from_a_shuffled_loader_come_in_the_order_of_the_data(fitted):
    fitted.dls = small_loaders(shuffle=True)
    with fitted.no_bar(): x,preds,y,dec,losses = fitted.get_preds(ds_idx=0, with_input=True, with_decoded=True, with_loss=True)
    expected,(xs,ys) = whole(fitted),(torch.stack(o) for o in zip(*fitted.dls.train_ds))
    assert torch.equal(x, xs) and torch.equal(y, ys)
    torch.testing.assert_close([preds, dec, losses], [expected, expected, (expected-ys).square().mean((1,2))])

@pytest.mark.parametrize('native', [False,True])
def test_a_data_block_predicts_saves_exports_and_loads(native):
    "`test_dl`, `predict`, `save`, `load`, `export` and `load_learner` of a pipeline with transforms"
    data = noise()
    kwargs = dict(dl_type=TbpttDL, sub_seq_len=SUB) if native else {}
    dls = DataBlock((TransformBlock, TransformBlock), get_x=lambda i: data[i][0], get_y=lambda i: data[i][1], splitter=IndexSplitter([7,8,9])).dataloaders(list(range(10)), bs=BS, num_workers=0, **kwargs)
    learn = fit(small_learner(dls, sub='dls' if native else SUB))
    expected = whole(learn, data)
    with learn.no_bar():
        test = dls.test_dl(list(range(10)))
        torch.testing.assert_close(learn.get_preds(dl=test)[0], expected)
        torch.testing.assert_close(learn.predict(3)[2], expected[3])
        learn.save('saved')
        learn.export('export.pkl')
        fit(learn)
        assert not torch.equal(whole(learn, data), expected)
        learn.load('saved')
    torch.testing.assert_close(whole(learn, data), expected)
    loaded = load_learner('export.pkl')
    with loaded.no_bar(): torch.testing.assert_close(loaded.predict(3)[2], expected[3])

@pytest.mark.parametrize('item', [lambda x: (x,), lambda x: x], ids=['tuple', 'tensor'])
def test_predict_takes_a_window(item, signals):
    learn = fit(RNNLearner(SequenceDataLoaders.from_arrays(*signals, win_sz=WIN, sub_seq_len=SUB, bs=BS), hidden_size=3))
    x = learn.dls.valid_ds[1][0]
    with learn.no_bar(): pred = learn.predict(item(x))[2]
    torch.testing.assert_close(pred, learn.model.eval()(x[None])[0].detach())


# --- other callbacks: what each promises is in test_callbacks

def test_callbacks_that_only_watch_change_nothing():
    model = net()
    cbs = [ActivationStats(modules=[model[0].rnn]), CollectDataCallback(), CSVLogger(), FetchPredsCallback(), GradientClip(1e6), TerminateOnNaNCallback()]
    assert same(fit(small_learner(model=model, cbs=cbs), 2), fit(small_learner(), 2))

@untaught_on_purpose
@pytest.mark.parametrize('kind', ['GradientAccumulation', 'RNNRegularizer'])
@pytest.mark.parametrize('n_skip', [SUB,SUB+3])
def test_callbacks_that_change_the_loss_meet_no_step_without_one(kind, n_skip):
    "... for a sub-window that is all washout is no step; it only brings the state to the next"
    class Three(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): o = self.net(x); return o,o,o
    accumulate = kind=='GradientAccumulation'
    cbs = [GradientAccumulation(8), Watch()] if accumulate else [RNNCallback(), RNNRegularizer(1., 1.), Watch()]
    learn = small_learner(model=None if accumulate else Three(), cbs=cbs)
    learn.tbptt_reset_cb.n_skip = n_skip
    fit(learn)
    assert learn.watch.lens==[12,6]*3 and len(learn.recorder.losses)==6

@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU])
def test_a_state_of_another_type_is_refused_and_a_nan_ends_with_its_window(kind):
    "An LSTM's state takes the type of the CPU's autocast, a GRU's does not; left in mid-window, such a state is refused by name. A NaN poisons the rest of its window, not the next"
    rnn,x = StatefulRNN(kind(1, 3, batch_first=True)),torch.randn(2, 5, 1)
    with torch.autocast('cpu', torch.bfloat16): rnn(x)
    if kind is nn.LSTM:
        with pytest.raises(ValueError, match='bfloat16, the input torch.float32'): rnn(x)
    else: assert rnn.state.dtype==torch.float32 and rnn(x).isfinite().all()
    rnn.reset()
    assert rnn(x*float('nan')).isnan().all() and rnn(x).isnan().all()
    rnn.reset()
    assert rnn(x).isfinite().all()

def test_models_with_a_state_can_be_copied():
    "A state that was not detached would break `deepcopy`"
    rnn = StatefulRNN(nn.LSTM(1, 3, batch_first=True))
    rnn(torch.randn(2, 5, 1, requires_grad=True))
    assert all(not o.requires_grad for o in rnn.state) and copy.deepcopy(rnn).state is None
    class Loose(nn.Module):
        def forward(self, x): self.h = x*2; return x
    loose = Loose()
    loose(torch.ones(1, requires_grad=True))
    with pytest.raises(RuntimeError, match='deepcopy'): copy.deepcopy(loose)

def test_the_model_on_top_has_a_reset():
    "fastai's callbacks call `model.reset` and look no deeper"
    model = SequenceRNN(1, 1, hidden_size=3)
    model(torch.randn(2, 5, 1))
    learn = Learner(small_loaders(), model, loss_func=MSELossFlat())
    assert model.rnn.state is not None
    learn._grab_cbs(TrainEvalCallback)[0].before_fit()
    assert model.rnn.state is None

def test_compile_in_place_keeps_the_names():
    "`torch.compile(model)` would save other keys than the model has"
    model,keys = net(),list(net().state_dict())
    assert list(torch.compile(model, backend='eager').state_dict())==['_orig_mod.'+k for k in keys]
    model.compile(backend='eager')
    assert list(model.state_dict())==keys

def test_every_exception_we_raise_has_a_message():
    "fastai's own: in a callback, one without becomes an IndexError"
    class Mute(Callback):
        def before_fit(self): raise ValueError()
    with pytest.raises(IndexError): fit(small_learner(cbs=[Mute()]))
    package = Path(inspect.getfile(tbptt_fastai)).parent
    raised = [n.exc for f in package.rglob('*.py') for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Raise) and n.exc]
    assert len(raised)>100 and all(isinstance(o, ast.Call) and o.args for o in raised)

def test_fit_flat_cos_ignores_start_epoch():
    "fastai's own: `fit_flat_cos` ignores `start_epoch`"
    learn = small_learner(cbs=[Watch()])
    with learn.no_bar(), learn.no_logging():
        learn.fit_flat_cos(2, start_epoch=1)
        assert len(learn.recorder.losses)==18
        learn.fit_one_cycle(2, start_epoch=1)
        assert len(learn.recorder.losses)==9

def test_export_wants_a_dataset_that_can_be_emptied():
    "fastai's own; SequenceWindows can"
    with pytest.raises(AttributeError, match='new_empty'): fit(small_learner()).export('a.pkl')
    x = np.zeros(300, np.float32)
    small_learner(SequenceDataLoaders.from_arrays(x, x, win_sz=WIN, bs=BS)).export('b.pkl')

def test_only_the_word_callback_is_cut_off_a_name():
    "fastai's own: only the word Callback is cut off a name"
    assert small_learner().tbptt_reset_cb.name=='tbptt_reset_cb' and TrainEvalCallback().name=='train_eval'


# --- text

def lm(cbs, **config):
    set_seed(0)
    text = [torch.randint(2, 20, (n,)) for n in (70,50,90,60,80,66)]
    dls = DataLoaders(LMDataLoader(text, bs=4, seq_len=20), LMDataLoader(text[:4], bs=4, seq_len=20))
    dls.vocab = [str(i) for i in range(20)]
    return language_model_learner(dls, AWD_LSTM, {**awd_lstm_lm_config, **dict(emb_sz=6, n_hid=8, n_layers=2), **config}, pretrained=False, drop_mult=.1, cbs=cbs)

def test_language_models_are_reset_by_their_own_protocol():
    "If every batch is a window: its sub-windows go on from each other, and a window, in training or evaluation, from zero"
    class Hidden(Callback):
        order,seen = 13,[]
        def before_batch(self): self.seen.append((self.training, self.learn.tbptt_reset_cb.sub_window.start, self.model[0].hidden[0][0].abs().sum().item()))
    learn = fit(lm([TbpttResetCB(7, continuing=False), Hidden()]))
    n_win = len(learn.dls.train)
    assert learn.dls.train.last_len<7 and [s for t,s,_ in Hidden.seen if t]==[0,7,14]*(n_win-1)+[0] and len(learn.recorder.losses)==3*(n_win-1)+1
    assert all((h==0)==(s==0) for t,s,h in Hidden.seen) and not all(t for t,*_ in Hidden.seen)
    with learn.no_bar(): preds,targs = learn.get_preds(reorder=False)
    x = torch.cat([x for x,y in learn.dls.valid], 1)
    assert preds.shape==(*x.shape,20) and targs.shape==x.shape
    learn.model.reset()
    torch.testing.assert_close(preds[:,:20], learn.model.eval()(x[:,:20])[0].softmax(-1).detach())

def test_without_dropout_AWD_LSTM_cannot_be_reset():
    "fastai's own: a dropout of 0 gives back the parameter itself, which `reset` then cannot replace"
    with pytest.raises(TypeError, match='cannot assign'): fit(lm([], weight_p=0.))


# ---- an evaluation in an event of the training

class EvaluatesIn(Callback):
    "Once, in the second batch"
    def __init__(self, event, how, order): self.event,self.how,self.order,self.is_done = event,how,order,False
    def __call__(self, event):
        if event!=self.event or self.is_done or event!='before_train' and self.learn.iter!=1: return
        self.is_done = True
        self.how(self.learn)

class Steps(Callback):
    order = -99
    def before_fit(self):
        if not self.learn.lock.locked(): self.n = 0
    def after_step(self): self.n += 1

def streams():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((60+10*i, 1)).astype(np.float32) for i in range(6)]
    return SequenceDataLoaders.from_arrays(arrays, arrays, win_sz=None, sub_seq_len=10, bs=2)

def windows():
    x = np.random.default_rng(0).standard_normal((600, 1)).astype(np.float32)
    return SequenceDataLoaders.from_arrays(x, x, win_sz=60, sub_seq_len=10, bs=2)

LEARNERS = [lambda cbs: RNNLearner(streams(), hidden_size=3, num_threads=1, cbs=cbs),
    lambda cbs: RNNLearner(windows(), hidden_size=3, num_threads=1, cbs=cbs),
    lambda cbs: Learner(streams(), SequenceRNN(1, 1), loss_func=MSELossFlat(), cbs=[TbpttResetCB(), *cbs]),
    lambda cbs: small_learner(cbs=cbs)]

@pytest.mark.parametrize('how', [lambda o: o.validate(), lambda o: o.get_preds(), lambda o: o.get_preds(inner=True)], ids=['validate','preds','inner'])
@pytest.mark.parametrize('order', [0, 100])
@pytest.mark.parametrize('event', ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step', 'after_batch'])
def test_steps_that_an_evaluation_in_a_batch_would_leave_untrained_are_refused(event, order, how):
    "fastai goes on with a learner that evaluates: the rest of the epoch is not trained on"
    for make in LEARNERS[:3]:
        learn = make([steps := Steps()])
        if event=='before_train' and order==0: # fastai's own loader is not yet ours: it trains
            continue
        with pytest.raises(RuntimeError, match='(?s)would not be trained on.*after_epoch|No state would be carried'):
            fit(learn, 2, cbs=EvaluatesIn(event, how, order))
        assert steps.n<=2 and not learn.lock.locked()
        fit(learn, 1)
        assert steps.n>8

@pytest.mark.parametrize('event', ['after_train', 'after_validate', 'after_epoch'])
def test_an_evaluation_between_the_parts_of_an_epoch_leaves_all_steps(event):
    for make in LEARNERS:
        a,b = make([one := Steps()]),make([two := Steps()])
        class Evaluates(Callback):
            order = 5
            def __call__(self, name):
                if name==event and self.learn.training and event=='after_train': self.learn.validate()
                elif name==event and event!='after_train' and not self.learn.lock.locked(): self.learn.validate()
        set_seed(1); fit(a, 2)
        set_seed(1); fit(b, 2, cbs=Evaluates())
        assert one.n==two.n
