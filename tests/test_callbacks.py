"Every callback of fastai keeps its promise when windows are trained in sub-windows; where fastai itself breaks one, the test says so"
import copy
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.rnn import ModelResetter
from fastai.callback.schedule import SchedCos, SchedExp, combine_scheds, combined_cos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.metrics import mae
from fastai.torch_core import set_seed
from fastprogress.fastprogress import ConsoleMasterBar
from torch import nn
from torch._dynamo.testing import CompileCounter # counts graphs, and needs no compiler
from helpers import adam, fit, untaught_on_purpose
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.training.metrics import StreamingRMSE
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.loaders.windows import SubWindows
from tbptt_fastai.truncation.schemes import Jittered

WIN,SUB,BS,LR = 60,25,5,1e-2
BATCHES,STEPS = 3,9 # in an epoch: batches of 5, 5 and 2 windows, three sub-windows of each, the last of 10 steps


class Watch(Callback):
    "What a training step looked like"
    order = 61
    def __init__(self): self.pct,self.xs,self.starts,self.weights = [],[],[],[]
    def before_batch(self):
        if not self.training: return
        self.pct.append(self.pct_train)
        self.xs.append(self.x.clone())
        self.starts.append(self.learn.tbptt_reset_cb.sub_window.start)
    def after_train(self): self.weights.append(copy.deepcopy(self.model.state_dict()))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.drop,self.norm,self.head = StatefulRNN(nn.LSTM(2, 5, batch_first=True)),nn.Dropout(.5),nn.BatchNorm1d(5),nn.Linear(5, 1)
        self.norm.requires_grad_(False)
    def forward(self, x): return self.head(self.drop(self.norm(self.rnn(x).transpose(1, 2)).transpose(1, 2)))

def plain(): return nn.Sequential(StatefulRNN(nn.LSTM(2, 5, batch_first=True)), nn.Linear(5, 1))

@pytest.fixture
def make(signals):
    def _make(cbs=None, model=plain, shuffle=True, **kwargs):
        set_seed(0)
        dls = SequenceDataLoaders.from_arrays(*[o[:720] for o in signals], valid=[o[720:960] for o in signals], win_sz=WIN, bs=BS, shuffle=shuffle)
        return TbpttLearner(dls, model(), SUB, cbs=[*(cbs or []), Watch()], **kwargs)
    return _make

def params(learn): return [p.detach().clone() for p in learn.model.parameters()]
def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b))
def n_steps(learn): return len(learn.watch.xs)


# --- trackers

def saves_the_best(make):
    "... and loads it in the end; here the best is the greatest loss, which is the first"
    learn = fit(make([SaveModelCallback(comp=np.greater)]), 3)
    losses = [v[1] for v in learn.recorder.values]
    assert losses[0]==max(losses)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, learn.watch.weights[0][k])
    learn.remove_cb(SaveModelCallback) # fastai's own: a tracker looks for a training loss that `validate` has not
    with learn.no_bar(): assert learn.validate()[0]==pytest.approx(losses[0], abs=1e-7)

def stops_early(make):
    "... after `patience` epochs, and no state is left"
    learn = fit(make([EarlyStoppingCallback(comp=np.greater, patience=2)]), 6)
    assert n_steps(learn)==3*STEPS and learn.model[0].state is None

def reduces_lr_on_plateau(make):
    learn = fit(make([ReduceLROnPlateau(comp=np.greater, factor=4.)]), 3)
    assert np.allclose(learn.recorder.lrs, np.repeat([LR,LR,LR/4], STEPS))

def reduces_no_lr_of_a_torch_optimizer(make):
    "fastai's own: it writes to `opt.hypers`, which an OptimWrapper makes anew on every reading"
    learn = fit(make([ReduceLROnPlateau(comp=np.greater, factor=4.)], opt_func=adam), 3)
    assert set(learn.recorder.lrs)=={LR}

def terminates_on_nan(make):
    "... at the sub-window that has it, not at the end of its window"
    class Poison(Callback):
        def before_batch(self):
            if self.training and n_steps(self.learn)==4: self.learn.xb = (self.x*float('nan'),)
    learn = fit(make([TerminateOnNaNCallback(), Poison()]), 2)
    assert n_steps(learn)==5 and learn.watch.starts[-1]==SUB and learn.model[0].state is None

def skips_to_epoch(make):
    "`start_epoch` trains what is left, at the place in the schedule where it belongs"
    learn = fit(make(), 3, how='fit_one_cycle', start_epoch=1)
    sched = combined_cos(.25, LR/25, LR, LR/1e5)
    np.testing.assert_allclose(learn.recorder.lrs, [sched(p) for p in np.arange(STEPS, 3*STEPS)/(3*STEPS)])

def stops_a_short_epoch(make):
    "... after that share of its sub-windows, in the middle of a window; the next epoch starts a window"
    learn = fit(make([ShortEpochCallback(.4, short_valid=False)]), 2)
    assert learn.watch.starts==[0,25,50,0,25]*2 # numbers 0 to 4, and 4/9 > .4


# --- logs and graphs

def logs_csv(make):
    learn = fit(make([CSVLogger()], metrics=[mae]), 2)
    log = learn.csv_logger.read_log()
    np.testing.assert_allclose(log[['train_loss','valid_loss','mae']], np.array(learn.recorder.values, dtype=float), rtol=1e-5)
    assert list(log.epoch)==[0,1]

def shows_graph(make, monkeypatch):
    "A point of the training curve for every step; one of the validation curve where each epoch ends"
    drawn = []
    monkeypatch.setattr(ConsoleMasterBar, 'update_graph', lambda self,graphs,x_bounds,y_bounds: drawn.append((copy.deepcopy(graphs), x_bounds)), raising=False)
    learn = make([ShowGraphCallback()])
    with learn.no_logging(): learn.fit(2)
    ((train_x,losses),(valid_x,valid)),bounds = drawn[-1]
    assert len(train_x)==len(losses)==2*STEPS and valid_x==[STEPS,2*STEPS] and valid==[v[1] for v in learn.recorder.values] and bounds==(0,2*STEPS)

def logs_to_tensorboard(make):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = fit(make([TensorBoardCallback('tb', trace_model=False, log_preds=False)]), 2)
    losses = {e.step: e.value for e in EventAccumulator('tb').Reload().Scalars('train_loss')} # fastai writes the last one again in validation
    assert list(losses)==list(range(1, 2*STEPS+1))
    np.testing.assert_allclose(list(losses.values()), learn.recorder.losses, rtol=1e-6)

def bar_counts_sub_windows(make):
    "... and makes no difference: `no_bar` gives the same parameters"
    totals = []
    class Total(Callback):
        order = 70
        def after_batch(self): totals.append((self.learn.progress.pbar.total, self.iter+1))
    learn = make([Total()])
    with learn.no_logging(): learn.fit(2, LR)
    assert totals==([(STEPS,i+1) for i in range(STEPS)]+[(1,1)])*2
    assert same(params(learn), params(fit(make(), 2)))

def collects_data(make):
    "Every sub-window that was trained, with its prediction and loss, and every window that was validated"
    learn = fit(make([CollectDataCallback()], shuffle=False), 1)
    data = learn.collect_data.data
    assert [xb[0].shape[1] for xb,*_ in data]==[25,25,10]*BATCHES+[WIN]
    xs = torch.cat([torch.cat([xb[0] for xb,*_ in data[i:i+3]], 1) for i in range(0, STEPS, 3)])
    assert torch.equal(xs, torch.stack([x for x,_ in learn.dls.train_ds]))
    for _,(y,),pred,loss in data: torch.testing.assert_close(loss, (pred-y).abs().mean())

def fetches_preds(make):
    "The predictions of the epoch, of whole windows, and the training goes on as if nobody had looked"
    fetch = FetchPredsCallback()
    learn = fit(make([fetch]), 2)
    learn.remove_cb(fetch) # fastai's own: `get_preds` with it attached waits for its own lock for ever
    with learn.no_bar(): assert torch.equal(fetch.preds[0], learn.get_preds()[0])
    assert fetch.preds[0].shape==(4,WIN,1) and same(params(learn), params(fit(make(), 2)))

def measures_activations(make):
    "Mean and deviation of every sub-window's activations, of the LSTM's output, of its state, and of the head"
    model = plain()
    stats = ActivationStats(modules=[model[0].rnn, model[1]])
    learn = fit(make([stats], model=lambda: model), 1, 0.)
    rnn,head,state,got = model[0].rnn,model[1],None,iter(stats.stats)
    for x,start in zip(learn.watch.xs, learn.watch.starts):
        out,state = rnn(x, state if start else None)
        of_rnn,of_head = next(got)
        for o,s in zip((out,*state,head(out)), (*of_rnn,of_head)): assert s['mean']==pytest.approx(o.mean().item(), abs=1e-6) and s['std']==pytest.approx(o.std().item(), abs=1e-6)
    assert len(stats.stats)==STEPS


# --- the optimizer's step

def clips_gradients(make):
    "Every step's gradient, of a short last sub-window too"
    norms = []
    class Norm(Callback):
        order = 12
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    fit(make([GradientClip(.05), Norm()]), 2)
    assert len(norms)==2*STEPS and max(norms)<=.05*(1+1e-5) and np.median(norms)==pytest.approx(.05, rel=1e-4)
    norms.clear()
    fit(make([Norm()]), 2)
    assert np.median(norms)>.05 # there was something to clip

def accumulates_gradients(make):
    "`n_acc` rows, counted anew for every sub-window: `bs*n_sub` is one step per window, and what a partial batch leaves over goes into the next epoch"
    steps = []
    class Steps(Callback):
        def after_step(self): steps.append(n_steps(self.learn))
    fit(make([GradientAccumulation(BS*3), Steps()]), 3)
    assert steps==[3,6,11,14,19,22,27]

def accumulates_without_washed_out(make):
    "A sub-window that is all washout is no step and counts no row"
    steps = []
    class Steps(Callback):
        def after_step(self): steps.append((n_steps(self.learn), self.learn.watch.starts[-1]))
    fit(make([GradientAccumulation(BS*2), Steps()], n_skip=SUB), 1)
    assert steps==[(2,50),(4,50)]

def mixes_precision_nowhere_but_on_cuda(make):
    "fastai's own: `autocast('cuda')` is a no-op on the CPU. The CPU's autocast is in test_pipelines and test_hazards_evaluation"
    if torch.cuda.is_available(): pytest.skip('a GPU is there: it does mix')
    learn = make([MixedPrecision(amp_mode='bf16')])
    with pytest.warns(UserWarning, match='CUDA is not available'): fit(learn, 2)
    assert same(params(learn), params(fit(make(), 2)))

def freezes_batchnorm(make):
    learn,free = fit(make([BnFreeze()], Net), 2),fit(make(model=Net), 2)
    assert learn.model.norm.running_mean.abs().max()==0 and free.model.norm.running_mean.abs().max()>0

def draws_dropout_in_prediction(make):
    "Monte Carlo dropout draws for every prediction; the recurrent layer starts from zero all the same"
    learn = fit(make(model=Net), 1)
    with learn.no_bar(): a,b,c,d = (learn.get_preds(cbs=cbs)[0] for cbs in ([MCDropoutCallback()],[MCDropoutCallback()],None,None))
    assert not torch.equal(a, b) and torch.equal(c, d) and learn.model.rnn.state is None

def resets_by_its_own_protocol(make):
    "ModelResetter calls `model.reset`, so the model on top needs one; with ours it changes nothing"
    model = lambda: SequenceRNN(2, 1, hidden_size=4)
    assert same(params(fit(make([ModelResetter()], model), 2)), params(fit(make(model=model), 2)))
    with pytest.raises(AttributeError): fit(make([ModelResetter()]), 2)


promises = [saves_the_best, stops_early, reduces_lr_on_plateau, reduces_no_lr_of_a_torch_optimizer, terminates_on_nan, skips_to_epoch, stops_a_short_epoch,
            logs_csv, shows_graph, logs_to_tensorboard, bar_counts_sub_windows, collects_data, fetches_preds, measures_activations,
            clips_gradients, accumulates_gradients, accumulates_without_washed_out, mixes_precision_nowhere_but_on_cuda, freezes_batchnorm,
            draws_dropout_in_prediction, resets_by_its_own_protocol]

@untaught_on_purpose
@pytest.mark.parametrize('promise', promises, ids=lambda o: o.__name__)
def test_a_callback_keeps_its_promise(promise, make, request):
    promise(make, *[request.getfixturevalue(o) for o in promise.__code__.co_varnames[1:promise.__code__.co_argcount]])


# --- schedules

@pytest.mark.parametrize('how,n,sched', [
    ('fit_one_cycle', 2, combined_cos(.25, LR/25, LR, LR/1e5)), ('fit_flat_cos', 2, combined_cos(.75, LR, LR, LR/1e5)),
    ('fit_sgdr', 2, combine_scheds([1/3,2/3], [SchedCos(LR, 0)]*2))])
def test_schedules_run_evenly_to_their_end(make, how, n, sched):
    learn,total = make(),STEPS*(3 if how=='fit_sgdr' else n) # cycles of one epoch and of two
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n, *([1] if how=='fit_sgdr' else []), LR)
    np.testing.assert_allclose(learn.watch.pct, np.arange(total)/total, atol=1e-9)
    assert learn.pct_train==pytest.approx(1)
    np.testing.assert_allclose(learn.recorder.hps['lr'], [sched(p) for p in learn.watch.pct], rtol=1e-6)


@untaught_on_purpose
@pytest.mark.parametrize('n_skip', [0,SUB])
def test_lr_find_leaves_the_model_as_it_was(make, n_skip):
    "`num_it` steps of rising learning rate, a suggestion, and the model as it was"
    learn = make(n_skip=n_skip)
    before = params(learn)
    with learn.no_bar(): found = learn.lr_find(num_it=21, end_lr=1., show_plot=False)
    assert n_steps(learn)==21 and 1e-7<=found.valley<=1 and same(params(learn), before) and learn.model[0].state is None
    np.testing.assert_allclose(learn.recorder.lrs, [SchedExp(1e-7, 1.)(i/21) for i in range(21)], rtol=1e-5)
    fit(learn, 1)


@untaught_on_purpose
def test_train_metrics_weigh_a_ragged_tail_in_full_unless_they_sum_over_steps(make):
    """fastai's own, documented: with `train_metrics=True` an average metric weighs each step by its rows, so the 10 steps of the last sub-window count as
    much as the 25 of the others. A metric that sums over steps, such as StreamingRMSE, is exact. The washout is not counted"""
    for n_skip in (0,30):
        learn = make(metrics=[mae, StreamingRMSE()], n_skip=n_skip, shuffle=False)
        learn.recorder.train_metrics = True
        collect = CollectDataCallback()
        learn.add_cb(collect)
        fit(learn, 1, 0.)
        errors = [(p-yb[0]).flatten(1) for _,yb,p,_ in collect.data[:n_steps(learn)]]
        values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
        assert values['train_mae']==pytest.approx(np.average([e.abs().mean() for e in errors], weights=[len(e) for e in errors]), abs=1e-6)
        flat = torch.cat([e.flatten() for e in errors])
        assert values['train_fun_rmse']==pytest.approx(flat.square().mean().sqrt().item(), abs=1e-6)
        assert flat.numel()==12*(WIN-n_skip) and values['train_mae']!=pytest.approx(flat.abs().mean().item(), abs=1e-6)


# --- one draw per window

def test_mixup_mixes_whole_windows_if_told(make):
    "The sub-windows of a window, put together, are one mixture of two windows"
    learn = make([once_per_window(MixUp())], shuffle=False)
    lams = []
    class Shares(Callback):
        order = 1 # after MixUp
        def before_batch(self):
            if self.training: lams.append(self.learn._grab_cbs(MixUp)[0].lam)
    learn.add_cb(Shares())
    fit(learn, 1)
    whole = torch.stack([x for x,_ in learn.dls.train_ds])
    for w,rows in enumerate(whole.split(BS)):
        mixed,lam = torch.cat(learn.watch.xs[3*w:3*w+3], 1),lams[3*w]
        of_two = [torch.stack([torch.lerp(rows[j], rows[i], lam[i]) for j in range(len(rows))]) for i in range(len(rows))]
        for i,candidates in enumerate(of_two): assert torch.isclose(candidates, mixed[i], atol=1e-6).all(-1).all(-1).any()
    assert torch.equal(lams[0], lams[1]) and torch.equal(lams[0], lams[2]) and not torch.equal(lams[0], lams[3]) # another window, another draw
    learn.remove_cb(MixUp)
    learn.add_cb(MixUp()) # not told: another partner and another share for every sub-window
    lams.clear()
    fit(learn, 1)
    assert not torch.equal(lams[0], lams[1])


# --- what a view says

@pytest.mark.parametrize('given,training', [('dls', 40), (None, None), (40, 40)])
def test_a_view_tells_its_own_sub_windows_not_those_of_its_loader(signals, given, training):
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=100, sub_seq_len=40, bs=4)
    said = set()
    note = Callback(after_pred=lambda self: said.add((self.learn.training, self.learn.dl.sub_seq_len)))
    fit(TbpttLearner(dls, plain(), given, cbs=note), 1)
    assert said=={(True, training), (False, None)} and dls.train.sub_seq_len==40

def test_a_view_of_a_scheme_tells_the_length_of_the_scheme_not_that_of_the_loader(signals):
    dls = SequenceDataLoaders.from_arrays(*signals, win_sz=100, sub_seq_len=40, bs=4)
    assert SubWindows(dls.train, Jittered(20)).sub_seq_len==Jittered(20).sub_seq_len


# --- torch.compile

class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.head = nn.LSTM(2, 5, batch_first=True),nn.Linear(5, 1)
    def forward(self, x): return self.head(self.rnn(x)[0])

@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning') # torch's own, while it traces
@pytest.mark.parametrize('model', [plain, PlainNet])
def test_compiled_models_have_a_bounded_number_of_graphs(make, model):
    "... and the same parameters. Sub-windows of two lengths, batches of two sizes, training and evaluation make graphs; more epochs make none"
    torch._dynamo.reset()
    counter,learn = CompileCounter(),make(model=model)
    keys = list(learn.model.state_dict())
    learn.model.compile(backend=counter)
    graphs = []
    class Count(Callback):
        def after_epoch(self): graphs.append(counter.frame_count)
    learn.add_cb(Count())
    fit(fit(learn, 4), 2)
    assert 0<graphs[1]<=12 and set(graphs[1:])=={graphs[1]} and list(learn.model.state_dict())==keys
    expected = fit(fit(make(model=model), 4), 2)
    for a,b in zip(params(learn), params(expected)): torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_callback_hides_nothing_of_a_learner_and_does_not_mind_a_model_with_its_names(make):
    "fastai warns of a name that learner, loaders or model have, and asks for it with each value; none of ours is one of fastai's"
    class Named(nn.Sequential): counts,check,carry,view,_states = 3,4,5,6,7
    def named(): return Named(*plain())
    learn = fit(make(model=named), 2)
    own = learn.tbptt_reset_cb
    assert len(vars(own))>15
    plainly = make()
    for cb in list(plainly.cbs): plainly.remove_cb(cb)
    assert [o for o in vars(own) if o!='learn' and hasattr(plainly, o)]==[]
    assert [getattr(learn.model, o) for o in ('counts','check','carry','view','_states')]==[3, 4, 5, 6, 7]
    other = fit(make(), 2)
    for a,b in zip(learn.model.parameters(), other.model.parameters()): assert torch.equal(a, b)
