"LeanLearner does what fastai's Learner does: the same events in the same order, the same parameters and records, bit for bit"
import copy
import pickle
from functools import partial
import numpy as np
import pytest
import torch
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
                                  CancelTrainException, CancelValidException, FetchPredsCallback, _events)
from fastai.callback.data import CollectDataCallback
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import ModelResetter, RNNRegularizer
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import AvgSmoothLoss, Learner, Recorder, load_learner
from fastai.losses import MSELossFlat
from fastai.metrics import mae
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import TensorBase, defaults, set_seed
from torch import nn
from helpers import fit_own_lr
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.speed.dispatch import LeanLearner, _known_code, fastai_code
from tbptt_fastai.speed.known import is_known
from tbptt_fastai.learner import SequenceLearner, TbpttLearner
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.truncation.schemes import Overlap

WIN,SUB,BS = 60,25,5

def data(signals): return SequenceDataLoaders.from_arrays(*[o[:720] for o in signals], valid=[o[720:960] for o in signals], win_sz=WIN, bs=BS)

def build(cls, signals, cbs=(), log=None, **kwargs):
    set_seed(0)
    dls,model = data(signals),SequenceRNN(2, 1, hidden_size=4)
    learn = cls.__new__(cls)
    if log is not None: learn.add_cb = partial(traced_add, learn, log)
    learn.__init__(dls, model, nn.L1Loss(), cbs=[TbpttResetCB(SUB), *cbs], metrics=mae, **kwargs)
    return learn

def traced_add(learn, log, cb):
    "Add a callback whose events are logged"
    if isinstance(cb, type): cb = cb()
    for e in _events:
        if not hasattr(cb, e): continue
        def run(f=getattr(cb, e), e=e):
            log.append((type(cb).__name__, e, getattr(learn, 'training', None), getattr(learn, 'train_iter', None)))
            return f()
        vars(cb)[e] = run
    return type(learn).add_cb(learn, cb)

def records(learn):
    r = learn.recorder
    return [p.detach().numpy().copy() for p in learn.model.parameters()],[list(v[:3]) for v in r.values],r.lrs,[float(o) for o in r.losses],r.iters,getattr(r, 'hps', None)

def assert_same(a, b):
    np.testing.assert_equal(a, b) # bitwise, NaN included

def train(learn, how='fit_one_cycle', n=2):
    with learn.no_bar(), learn.no_logging():
        getattr(learn, how)(n, 1e-2)
        return [*records(learn), learn.validate(), learn.get_preds()[0].numpy()]

class Everywhere(Callback):
    "Has every event"
    order = 30
    def __init__(self):
        for e in _events: vars(self)[e] = lambda: None
class TrainOnly(Callback):
    run_valid = False
    def after_batch(self): assert self.training
class ValidOnly(Callback):
    run_train = False
    def after_batch(self): assert not self.training
class Off(Callback):
    def before_fit(self): self.run = False
    def after_pred(self): raise AssertionError('called')
class OwnCall(Callback):
    "Sees all events, whether it has them or not"
    def __init__(self): self.seen = []
    def __call__(self, event_name):
        self.seen.append(event_name)
        if event_name=='after_loss' and self.training: self.learn.loss_grad = self.loss_grad*.5
class OwnGetattr(Callback):
    "Has an event that is not found on its class"
    def __getattr__(self, k):
        if k=='after_pred' and 'learn' in vars(self): return self.scale
        return super().__getattr__(k)
    def scale(self): self.learn.pred = self.pred*1.5
class OwnTraining(Callback):
    "Takes itself to be in evaluation, always"
    run_train,training = False,False
    def after_pred(self): self.learn.pred = self.pred+.1
class SetsTraining(Callback):
    "The same, for one object"
    run_train = False
    def __init__(self): vars(self)['training'] = False
    def after_pred(self): self.learn.pred = self.pred+.1
class NoTargets(Callback):
    "Some batches have none, and so no loss"
    def before_batch(self):
        if self.training and self.iter%3==1: self.learn.yb = ()
class Doubles(Callback):
    def after_loss(self): self.learn.loss_grad = self.loss_grad*2

SETS = dict(none=list, clip=lambda: [GradientClip(.05)], accumulate=lambda: [GradientAccumulation(BS*3)], mixup=lambda: [MixUp(.4)], regularize=lambda: [RNNRegularizer(alpha=0.)],
            freeze=lambda: [BnFreeze()], nan=lambda: [TerminateOnNaNCallback()], save=lambda: [SaveModelCallback(comp=np.greater)], stop=lambda: [EarlyStoppingCallback(comp=np.greater)],
            plateau=lambda: [ReduceLROnPlateau(comp=np.greater, factor=4.)], log=lambda: [CSVLogger()], short=lambda: [ShortEpochCallback(.4, short_valid=False)],
            collect=lambda: [CollectDataCallback()], activations=lambda: [ActivationStats(with_hist=True)], resets=lambda: [ModelResetter()],
            everywhere=lambda: [Everywhere()], train_only=lambda: [TrainOnly(), ValidOnly()], off=lambda: [Off()], own_call=lambda: [OwnCall()], own_getattr=lambda: [OwnGetattr()],
            own_training=lambda: [OwnTraining()], sets_training=lambda: [SetsTraining()], function=lambda: [Callback(after_pred=lambda self: setattr(self.learn, 'pred', self.pred*.9))], double=lambda: [Doubles()], no_targets=lambda: [NoTargets()])

@pytest.mark.filterwarnings("ignore:You are shadowing an attribute .modules.:UserWarning") # ActivationStats does, whatever the learner
@pytest.mark.parametrize('how', ['fit_one_cycle','fit_flat_cos'])
@pytest.mark.parametrize('cbs', SETS.values(), ids=SETS)
def test_a_training_is_that_of_fastai_event_for_event(signals, cbs, how):
    logs = [],[]
    fastais,ours = (train(build(cls, signals, cbs(), log), how) for cls,log in zip((Learner,LeanLearner), logs))
    assert logs[0]==logs[1] and len(logs[0])>100
    assert_same(fastais, ours)
    assert_same(fastais, train(build(LeanLearner, signals, cbs()), how)) # without a log, which shortcuts do not show up in

@pytest.mark.parametrize('exc', [CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException, CancelValidException])
@pytest.mark.parametrize('where', ['before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch'])
def test_a_cancelled_training_ends_in_the_same_place(signals, exc, where):
    def cancel(self):
        if self.train_iter==4 and self.training: raise exc('enough')
    def run(cls, log):
        learn = build(cls, signals, [Callback(**{where: cancel})], log)
        try: return train(learn)
        except exc as e: return [repr(e), *records(learn)[:1]] # nobody catches it there
    logs = [],[]
    assert_same(run(Learner, logs[0]), run(LeanLearner, logs[1]))
    assert logs[0]==logs[1]

def test_lr_find_and_fetched_predictions_are_those_of_fastai(signals):
    def run(cls):
        learn = build(cls, signals, [FetchPredsCallback()])
        with learn.no_bar(), learn.no_logging():
            found = learn.lr_find(num_it=12, show_plot=False)
            learn.fit(1)
        return [found.valley, *records(learn), learn.fetch_preds.preds[0].numpy()]
    assert_same(run(Learner), run(LeanLearner))


# --- callbacks that come and go

class Late(Callback):
    order = 40
    def before_batch(self): pass
    def after_pred(self): self.learn.pred = self.pred*.9
    def after_loss(self): self.learn.loss_grad = self.loss_grad*.9

class Given(Callback):
    "Was given a method"
    def __init__(self): vars(self)['after_loss'] = lambda: setattr(self.learn, 'loss_grad', self.learn.loss_grad*.7)

def adds_one(self):
    if self.train_iter==3: self.learn.add_cb(Late())
def adds_an_earlier_one(self):
    if self.train_iter==3:
        late = Late()
        late.order = -50
        self.learn.add_cb(late)
def removes_itself(self):
    if self.train_iter==3: self.learn.remove_cb(self)
def removes_the_next(self):
    if self.train_iter==3: self.learn.remove_cb(GradientClip)
def adds_and_removes(self):
    (self.learn.add_cb(Late()) if self.train_iter%2 else self.learn.remove_cb(Late)) if self.training else None
def reorders(self): self.order = 100 if self.epoch==1 else -100
def switches_off(self):
    for cb in self.learn.cbs:
        if isinstance(cb, GradientClip): cb.run = self.train_iter%3!=0
def changes_a_method(self):
    for cb in self.learn.cbs:
        if isinstance(cb, GradientClip): cb.before_step = lambda: None
def loses_a_method(self):
    for cb in self.learn._grab_cbs(Given):
        if self.train_iter==3: vars(cb).pop('after_loss', None)
def swaps_the_last(self):
    if self.train_iter==3 and not isinstance(self.learn.cbs[-1], Late):
        clip = self.learn._grab_cbs(GradientClip)[0]
        late = Late()
        late.order = clip.order
        self.learn.cbs.items[self.learn.cbs.items.index(clip)] = late
        late.learn = self.learn
def replaces_the_list(self):
    if self.train_iter==3: self.learn.cbs = self.learn.cbs.filter(lambda cb: not isinstance(cb, GradientClip))

CHANGES = [adds_one, adds_an_earlier_one, removes_itself, removes_the_next, adds_and_removes, switches_off, changes_a_method, loses_a_method, swaps_the_last, replaces_the_list]

@pytest.mark.parametrize('change,where', [(o, where) for o in CHANGES for where in ('before_batch','after_pred','after_batch','before_step','before_validate','before_epoch')]
                         +[(reorders, where) for where in ('before_validate','before_epoch','before_train','after_train')]) # an order counts from the next epoch on
def test_callbacks_come_and_go(signals, change, where):
    def run(cls, log):
        learn = build(cls, signals, [GradientClip(.05), Given()], log)
        cb = Callback(**{where: change})
        cb.order = 10.5 # before GradientClip, 11
        learn.add_cb(cb)
        try: return train(learn)
        except AttributeError as e: return [e.args] # a callback that was removed while it was to be called
    logs = [],[]
    assert_same(run(Learner, logs[0]), run(LeanLearner, logs[1]))
    assert logs[0]==logs[1]

def test_a_callback_of_two_learners_is_called_as_fastai_calls_it(signals):
    "It belongs to the one it was added to last; the other one calls it as fastai would"
    def run(cls):
        shared = TrainOnly()
        shared.after_batch = lambda: seen.append(1)
        seen,(a,b) = [],(build(cls, signals, [shared]) for _ in range(2))
        b.training = True
        return [*train(a), len(seen)]
    assert_same(run(Learner), run(LeanLearner))

@pytest.mark.parametrize('where', ['before_batch','after_pred','after_batch','before_fit','after_epoch'])
@pytest.mark.parametrize('exc', [ValueError('wrong', 3), KeyError('k'), ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_errors_read_the_same(signals, exc, where):
    "But for one without a message, of which fastai makes an IndexError"
    def fail(self): raise type(exc)(*exc.args)
    def run(cls):
        with pytest.raises(Exception) as e: train(build(cls, signals, [Callback(**{where: fail})]))
        return type(e.value),e.value.args
    if exc.args: assert run(Learner)==run(LeanLearner)
    else:
        assert run(Learner)==(IndexError,('tuple index out of range',))
        kind,(words,) = run(LeanLearner)
        assert kind is type(exc) and kind.__name__ in words and where in words

def test_a_model_with_a_method_named_like_an_event_is_called_as_often(signals):
    "fastai finds it for every callback that has no such event, and so calls it as many times"
    class Net(SequenceRNN):
        calls = 0
        def before_backward(self): self.calls += 1
    def run(cls):
        learn = build(cls, signals)
        learn.model.__class__ = Net
        train(learn)
        return learn.model.calls
    assert run(Learner)==run(LeanLearner)>0


# --- what it is for, and when it is not taken

def test_callbacks_without_an_event_are_not_asked(signals):
    "... but once; in fastai each of them looks for it in the model, in every step"
    asked = []
    class Net(SequenceRNN):
        def __getattr__(self, k):
            asked.append(k)
            return super().__getattr__(k)
    def times(cls, n):
        asked.clear()
        learn = build(cls, signals)
        learn.model.__class__ = Net
        fit_own_lr(learn, n)
        return sum(o in ('before_backward','after_backward','before_step') for o in asked)
    n_cbs = 5 # TrainEval, Recorder, CastToTensor, ProgressCallback, TbpttResetCB
    assert times(Learner, 1)>=9*2*(n_cbs-1) and times(LeanLearner, 1)<=3*n_cbs # 9 steps
    assert times(LeanLearner, 4)==4*times(LeanLearner, 1) # once an epoch

def test_fastai_is_what_it_was():
    "If this fails, fastai has changed what LeanLearner does itself: compare, then change the digest"
    assert is_known(_known_code, *fastai_code()) and is_known(_known_code, *fastai_code(LeanLearner))

def plain_path(learn):
    learn('before_fit')
    return not learn._lean

def test_a_changed_fastai_takes_the_plain_path(signals, monkeypatch):
    learn = build(LeanLearner, signals)
    assert not plain_path(learn)
    seen,call = [],Callback.__call__
    def other(self, event_name):
        seen.append(event_name)
        return call(self, event_name)
    monkeypatch.setattr(Callback, '__call__', other)
    train(learn)
    assert plain_path(learn) and seen.count('before_backward')==18*len(learn.cbs) # 2 epochs of 9 steps; ParamScheduler was one more
    
def test_a_subclass_that_dispatches_itself_is_left_alone(signals):
    seen = []
    class Own(LeanLearner):
        def _call_one(self, event_name):
            seen.append(event_name)
            super()._call_one(event_name)
    train(build(Own, signals))
    assert 'before_backward' in seen

def test_TbpttLearner_is_lean_and_survives_copies(signals, tmp_path):
    learn = TbpttLearner(data(signals), SequenceRNN(2, 1, hidden_size=4), SUB, path=tmp_path)
    assert type(learn) is SequenceLearner and isinstance(learn, LeanLearner)
    class Copies(Callback):
        "In the middle of an epoch"
        def after_batch(self): pickle.dumps({k: v for k,v in learn.__getstate__().items() if k=='_having'})
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Copies())
        copied = copy.deepcopy(learn)
        learn.export()
        with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(tmp_path/'export.pkl')
        for o in (learn,copied): set_seed(1); o.fit(1)
    assert type(loaded) is type(copied) is SequenceLearner and all(map(torch.equal, learn.model.parameters(), copied.model.parameters()))


# --- shortcuts

def run_with(signals, cbs=(), loss_func=None, y=None, **kwargs):
    def run(cls):
        learn = build(cls, signals, [o() for o in cbs], **kwargs)
        if loss_func is not None: learn.loss_func = loss_func
        return train(learn)
    return run(Learner),run(LeanLearner)

def test_train_metrics_are_those_of_fastai(signals):
    def run(cls):
        learn = build(cls, signals)
        learn.remove_cb(Recorder)
        learn.add_cb(Recorder(train_metrics=True))
        return train(learn)
    assert_same(run(Learner), run(LeanLearner))

def test_losses_that_are_no_scalars_are_recorded_as_by_fastai(signals):
    class Rows(Callback):
        def after_loss(self):
            if self.training: self.learn.loss = self.loss.expand(3)
    assert_same(*run_with(signals, [Rows], MSELossFlat()))

def test_losses_are_smoothed_by_steps_as_by_fastai(signals):
    "... as those of schemes with sub-windows of several lengths are"
    def run(cls):
        learn = build(cls, signals)
        learn.remove_cb(TbpttResetCB)
        learn.add_cb(TbpttResetCB(truncation=Overlap(10, 20)))
        return train(learn)
    assert_same(run(Learner), run(LeanLearner))

@pytest.mark.parametrize('typed', ['x','y'])
def test_typed_batches_are_cast(signals, typed):
    "Every forward pass and every loss sees plain tensors, whichever element had a type"
    class Typed(Callback):
        order = -5 # before CastToTensor
        def before_batch(self):
            if typed=='x': self.learn.xb = tuple(TensorBase(o) for o in self.xb)
            else: self.learn.yb = tuple(TensorBase(o) for o in self.yb)
    seen = []
    class Look(Callback):
        def after_loss(self): seen.append({type(o) for o in (*self.xb, *self.yb, self.pred, self.loss)})
    assert_same(*run_with(signals, [Typed, Look]))
    assert seen and all(o=={torch.Tensor} for o in seen)

def test_a_recorder_of_ones_own_is_called(signals):
    "It overrides the event: no shortcut is taken"
    class Half(Recorder):
        name = 'recorder'
        def after_batch(self):
            super().after_batch()
            if self.training: self.losses[-1] = self.losses[-1]/2
    def run(cls):
        learn = build(cls, signals)
        learn.remove_cb(Recorder)
        learn.add_cb(Half())
        return train(learn)
    assert_same(run(Learner), run(LeanLearner))

def test_a_scheduler_of_ones_own_is_called(signals):
    "What it inherits calls what it has overridden"
    class Slow(ParamScheduler):
        name = 'param_scheduler'
        def _update_val(self, pct): super()._update_val(pct/2)
    assert_same(*run_with(signals, [partial(Slow, dict(lr=combined_cos(.25, 1e-4, 1e-2, 1e-6)))]))

@pytest.mark.parametrize('clip', [dict(max_norm=.05), dict(max_norm=.01, norm_type=float('inf')), dict(max_norm=1, norm_type=1), dict(max_norm=.1, norm_type=3.)], ids=str)
@pytest.mark.parametrize('kind', ['plain','float64','two kinds','frozen','sparse'])
def test_gradients_are_clipped_as_by_fastai(signals, clip, kind):
    def run(cls):
        learn = build(cls, signals, [GradientClip(**clip)])
        if kind=='float64': learn.model,learn.dls = learn.model.double(),SequenceDataLoaders.from_arrays(*[o[:720] for o in signals], valid=[o[720:960] for o in signals], win_sz=WIN, bs=BS, dtype=torch.float64)
        if kind=='frozen': learn.model.head.requires_grad_(False)
        if kind=='two kinds': learn.model.rnn.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        if kind=='sparse': learn.model.table = nn.Embedding(3, 1, sparse=True)
        if kind in ('two kinds','sparse'):
            extra = learn.model.rnn.extra.sum if kind=='two kinds' else lambda: learn.model.table(torch.tensor([1])).sum()
            learn.loss_func = lambda pred,targ: (pred-targ).abs().mean()+extra().float()
            learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
        try: return train(learn, 'fit')
        except NotImplementedError as e: return [e.args[0].splitlines()[0]] # older versions of torch cannot clip sparse gradients
    assert_same(*map(run, (Learner, LeanLearner)))

def test_parameters_that_come_with_a_new_optimizer_are_clipped(signals):
    class Grow(Callback):
        order = -5
        def before_batch(self):
            if self.train_iter!=4 or not self.training: return
            self.model.extra = nn.Parameter(torch.ones(2))
            self.learn.create_opt()
        def after_pred(self):
            if hasattr(self.model, 'extra'): self.learn.pred = self.pred*self.model.extra.mean()
    assert_same(*run_with(signals, [Grow, partial(GradientClip, .05)]))

def test_cancelled_training_is_not_recorded_twice(signals):
    class Stop(Callback):
        order = 45
        def before_batch(self):
            if self.training and self.epoch==0 and self.iter==4: raise CancelTrainException()
    assert_same(*run_with(signals, [Stop]))

@pytest.mark.parametrize('how', ['fit_one_cycle','fit_flat_cos','fit_sgdr'])
def test_groups_have_the_schedules_that_fastai_gives_them(signals, how):
    def run(cls):
        learn = build(cls, signals, splitter=lambda m: [list(m.rnn.parameters()), list(m.head.parameters())])
        with learn.no_bar(), learn.no_logging():
            if how=='fit_sgdr': learn.fit_sgdr(2, 1, slice(1e-3, 1e-2))
            else: getattr(learn, how)(2, slice(1e-3, 1e-2))
        return records(learn)
    assert_same(run(Learner), run(LeanLearner))

def test_a_schedule_that_is_changed_on_the_way_is_followed(signals):
    class Change(Callback):
        def before_batch(self):
            if self.train_iter==5: self.learn.param_scheduler.scheds['lr'] = combined_cos(.5, 1e-3, 1e-1, 1e-3)
    assert_same(*run_with(signals, [partial(ParamScheduler, dict(lr=combined_cos(.25, 1e-4, 1e-2, 1e-6))), Change]))

def test_the_bar_shows_the_same(signals, capsys):
    def run(cls):
        learn,shown = build(cls, signals),[]
        class Look(Callback):
            order = 61
            def after_batch(self): shown.append((f'{self.learn.progress.pbar.comment}', self.learn.progress.pbar.last_v, self.learn.progress.pbar.total))
        with learn.no_logging():
            learn.validate(cbs=Look()) # there is no smoothed loss to show yet
            learn.fit(2, cbs=Look())
            learn.validate(cbs=Look())
        return shown
    fastais,ours = run(Learner),run(LeanLearner)
    assert fastais==ours and len(set(ours))>10


def test_curves_may_be_anything_afterwards(signals):
    "fastai never looks at them again"
    for change in (lambda o: [float(l) for l in o], np.array, tuple, lambda o: []):
        learn = build(LeanLearner, signals)
        train(learn)
        learn.recorder.losses = change(learn.recorder.losses)
        with learn.no_bar(): learn.validate()
    class Floats(AvgSmoothLoss):
        @property
        def value(self): return float(super().value)
    learn = build(LeanLearner, signals)
    learn.recorder.smooth_loss = Floats()
    fit_own_lr(learn, 1)
    assert all(type(o) is float for o in learn.recorder.losses)

@pytest.mark.parametrize('name', ['_update_val','_train_mets'])
def test_without_a_name_of_fastai_the_plain_path_is_taken(signals, monkeypatch, name):
    owner = ParamScheduler if name=='_update_val' else Recorder
    monkeypatch.setattr(owner, '_other', vars(owner)[name], raising=False)
    monkeypatch.delattr(owner, name)
    learn = build(LeanLearner, signals)
    assert plain_path(learn)

def test_what_others_put_in_the_place_of_pytorchs_clipping_is_called(signals, monkeypatch):
    norms,clip = [],nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, 'clip_grad_norm_', lambda *args, **kwargs: norms.append(clip(*args, **kwargs)))
    train(build(LeanLearner, signals, [GradientClip(.05)]))
    assert len(norms)==18

def test_own_ways_set_on_a_learner_or_a_scheduler_are_taken(signals):
    "... that are set on the object"
    seen = []
    learn = build(LeanLearner, signals)
    learn._call_one = lambda e: seen.append(e) or Learner._call_one(learn, e)
    train(learn)
    assert seen.count('before_backward')==18
    class Slow(Callback):
        def before_fit(self):
            for sched in self.learn._grab_cbs(ParamScheduler)[:1]: sched._update_val = lambda pct: ParamScheduler._update_val(sched, pct/2)
    assert_same(*run_with(signals, [partial(ParamScheduler, dict(lr=combined_cos(.25, 1e-4, 1e-2, 1e-6))), Slow]))

def test_a_model_that_grows_within_an_epoch_is_clipped(signals):
    class Grow(Callback):
        order = -5
        def before_batch(self):
            if self.train_iter==3 and self.training: self.model.rnn.register_parameter('more', nn.Parameter(torch.ones(2)))
        def after_pred(self):
            if hasattr(self.model.rnn, 'more'): self.learn.pred = self.pred*self.model.rnn.more.mean()
    norms = []
    class Norm(Callback):
        order = 12
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters() if p.grad is not None]).norm().item())
    train(build(LeanLearner, signals, [Grow(), GradientClip(.01), Norm()], opt_func=SGD), 'fit')
    assert max(norms)<=.01*(1+1e-4)


# --- batches that are where they should be

def test_batches_that_are_on_the_device_are_left_alone(signals, monkeypatch):
    learn = build(LeanLearner, signals)
    learn('before_fit')
    x,y = torch.zeros(2, 3, 2),torch.zeros(2, 3, 1)
    b = x,y
    assert learn._set_device(b) is b
    for other in ((x, dict(a=y), 'label'), [x, dict(a=y), 'label']):
        moved = learn._set_device(other)
        assert type(moved) is type(other) and moved[0] is x and moved[1]['a'] is y and moved[2]=='label'
    both = [x, y]
    assert learn._set_device(both) is not both # as everywhere in fastai, a list is made anew
    learn.model.to('meta')
    learn('before_epoch') # it may not move within the batches of an epoch
    on_meta = learn._set_device(b)
    assert {o.device.type for o in on_meta}=={'meta'}
    monkeypatch.setattr(defaults, 'use_cuda', False) # fastai then puts batches on the CPU, wherever the model is
    with pytest.raises(NotImplementedError, match='meta'): learn._set_device(on_meta)
