"A training that is interrupted anywhere ends as one that never was"
from dataclasses import dataclass
from functools import partial
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
import random, re, warnings
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelBatchException, CancelTrainException
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.vision.augment import RandTransform
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat, L1LossFlat, MSELossFlat
from fastai.metrics import mae, mse
from fastai.optimizer import Adam, OptimWrapper, RMSProp
from fastai.torch_core import set_seed
from fastcore.basics import noop
from helpers import untaught_on_purpose
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.models.text import TextRNN
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.checkpoint import TbpttCheckpoint, _digest, left_out, warn_of_left_out
from tbptt_fastai.training.files import CheckpointFolder, read_checkpoint
from tbptt_fastai.training.once import once_per_window
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased
from tbptt_fastai.instruments.adaptive import Adaptive

class Killed(BaseException): "As if the process were gone"

class KillAt(Callback):
    "End everything in the n-th event of a kind, after all other callbacks"
    def __init__(self, event, n, order=2000):
        self.event,self.order,self.left = event,order,iter(range(n-1)) # which no checkpoint has
        setattr(self, event, self._count)
    def _count(self):
        if next(self.left, None) is None: raise Killed

SIGNAL = torch.Generator().manual_seed(0)
U = torch.randn(1500, 1, generator=SIGNAL)
Y = torch.cat([U.roll(1), U.roll(3)], 1).cumsum(0).mul(.1).sin()

class Noise(RandTransform):
    "Scales a window; drawn once for each"
    split_idx = 0
    def before_call(self, b, split_idx): self.scale = float(torch.rand(1))+random.random()+np.random.rand()
    def encodes(self, x:torch.Tensor): return x*self.scale

def windows(seed, **kwargs):
    set_seed(seed) # a new process has other random numbers
    return SequenceDataLoaders.from_arrays(U, Y, **{**dict(win_sz=60, stp_sz=40, sub_seq_len=20, bs=4), **kwargs})

def stream(seed, **kwargs):
    set_seed(seed)
    parts = [70, 230, 410, 55, 135]
    return SequenceDataLoaders.from_arrays(list(U[:900].split(parts)), list(Y[:900].split(parts)), **{**dict(sub_seq_len=20, bs=3), **kwargs})

class Dropping(nn.Module):
    def __init__(self, rnn, d=.3):
        super().__init__()
        self.rnn,self.drop,self.norm,self.head = StatefulRNN(rnn),nn.Dropout(d),nn.BatchNorm1d(5),nn.Linear(5, 2)
    def forward(self, x): return self.head(self.drop(self.norm(self.rnn(x).transpose(1, 2)).transpose(1, 2)))

def lstm(): return Dropping(nn.LSTM(1, 5, batch_first=True))
def gru(): return Dropping(nn.GRU(1, 5, batch_first=True))
def plain(): return nn.Sequential(SequenceRNN(1, 2, 'lstm', 4))

def learner(path, seed, data=windows, model=lstm, tfms=(), **kwargs):
    dls = data(seed, **(dict(after_batch=[Noise()]) if tfms else {}))
    return TbpttLearner(dls, model(), path=path, **{**dict(loss_func=MSELossFlat(), metrics=[mae, mse]), **kwargs})

def fit(learn, n_epoch=3, cbs=(), how='fit_flat_cos'):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, 1e-2, cbs=cbs)
    return learn

def results(learn):
    r = learn.recorder
    return dict(params=list(learn.model.state_dict().values()), losses=torch.stack(list(r.losses)), lrs=list(r.lrs), iters=list(r.iters),
        values=[list(o) for o in r.values], opt=[v for o in learn.opt.state_dict().get('state', []) if isinstance(o, dict) for v in o.values()])

def same(a, b):
    "Bit by bit"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b or a!=a and b!=b

def check_same(a, b):
    wrong = [k for k in a if not same(a[k], b[k])]
    assert not wrong

def killed_and_resumed(tmp_path, kill, make, n_epoch=3, every=7, cbs=list, how='fit_flat_cos'):
    "A training that is killed, each time in another way, and gone on with by a new learner"
    for i,(event,n) in enumerate(kill):
        learn = make(tmp_path, 10+i)
        try: fit(learn, n_epoch, [TbpttCheckpoint(every=every, resume=True), KillAt(event, n), *cbs()], how)
        except Killed: continue
        assert i, 'it was not killed once'
    learn = make(tmp_path, 99)
    return fit(learn, n_epoch, [TbpttCheckpoint(every=every, resume=True), KillAt('after_fit', 10**9), *cbs()], how)

def uninterrupted(tmp_path, make, n_epoch=3, cbs=list, how='fit_flat_cos', every=7):
    return fit(make(tmp_path/'whole', 10), n_epoch, [TbpttCheckpoint(every=every), *cbs()], how)

@pytest.mark.parametrize('event,n', [('after_batch', 3), ('before_batch', 16), ('after_batch', 40), ('after_pred', 61), ('after_backward', 20),
    ('before_train', 2), ('after_train', 1), ('before_validate', 2), ('after_validate', 1), ('after_epoch', 1), ('after_epoch', 3), ('before_epoch', 2)])
@pytest.mark.parametrize('data', [windows, stream])
def test_a_training_goes_on_wherever_it_was_killed(tmp_path, data, event, n):
    make = partial(learner, data=data)
    check_same(results(uninterrupted(tmp_path, make)), results(killed_and_resumed(tmp_path, [(event, n)], make)))

def test_without_a_checkpoint_it_is_the_same_training(tmp_path):
    check_same(results(uninterrupted(tmp_path, learner)), results(fit(learner(tmp_path, 10))))

KILLS = [('after_batch', 9), ('before_batch', 12), ('after_batch', 26)] # one after the other, each further on

class Own(nn.Module):
    "Carries a state by itself, in an attribute"
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.h = nn.GRU(1, 5, batch_first=True),nn.Linear(5, 2),None
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return self.head(out)

class OwnBuffer(Own):
    "... in a buffer that no state_dict has"
    def __init__(self):
        super().__init__()
        del self.h
        self.register_buffer('h', None, persistent=False)

class Looped(nn.Module):
    "A cell that carries a dict"
    def __init__(self):
        super().__init__()
        self.cell,self.head = nn.GRUCell(1, 4),nn.Linear(4, 2)
    def forward(self, x, state=None):
        h = x.new_zeros(len(x), 4) if state is None else state['h'][0]
        outs = []
        for o in x.unbind(1):
            h = self.cell(o, h)
            outs.append(self.head(h))
        return torch.stack(outs, 1),dict(h=[h], n=3)

def two_layers(): return nn.Sequential(StatefulRNN(nn.LSTM(1, 4, batch_first=True)), nn.Dropout(.2), StatefulRNN(nn.RNN(4, 3, batch_first=True)), nn.Linear(3, 2))
def looped(): return StatefulRNN(Looped())

@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.parametrize('model', [gru, plain, Own, OwnBuffer, two_layers, looped])
def test_whatever_a_model_carries(tmp_path, data, model):
    if data is stream and model in (Own, OwnBuffer, looped): data = partial(stream, bs=5)
    make = partial(learner, data=data, model=model)
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

SCHEMES = dict(overlap=lambda: Overlap(10, 20), unbiased=lambda: RandomUnbiased(15), jittered=lambda: Jittered(15),
    exact=lambda: Exact(20), adaptive=lambda: Adaptive(k_max=20, n_batches=1), adaptive_2=lambda: Adaptive(k_max=20, n_batches=1, every=2))

@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_every_scheme(tmp_path, data, scheme):
    if data is stream and scheme=='jittered': data = partial(stream, bs=2)
    def make(path, seed): return learner(path, seed, data, two_layers, truncation=SCHEMES[scheme]())
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

@pytest.mark.parametrize('kwargs', [dict(num_workers=2), dict(bs=7), dict(bs=5, drop_last=True), dict(sub_seq_len=7), dict(sub_seq_len=None)])
def test_workers_ragged_windows_and_partial_batches(tmp_path, kwargs):
    make = partial(learner, data=partial(windows, **kwargs))
    every = 3 if kwargs.get('sub_seq_len', 20) is None else 4
    check_same(results(uninterrupted(tmp_path, make, 2, every=every)), results(killed_and_resumed(tmp_path, KILLS[:1], make, 2, every=every)))

@pytest.mark.parametrize('data', [windows, stream])
def test_what_a_transform_has_drawn_for_a_window(tmp_path, data):
    if data is stream: data = partial(stream, bs=5) # of which all begin at once
    make = partial(learner, data=data, tfms=True)
    for kill in ([('after_batch', 12)], [('after_batch', 5)], KILLS):
        path = tmp_path/str(len(kill))/kill[0][0]/str(kill[0][1])
        check_same(results(uninterrupted(path, make, 2, every=1)), results(killed_and_resumed(path, kill, make, 2, every=1)))

@untaught_on_purpose
@pytest.mark.parametrize('n_skip', [5, 25])
@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.filterwarnings('ignore:(?s).*not longer than n_skip')
def test_a_washout(tmp_path, data, n_skip):
    make = partial(learner, data=data, n_skip=n_skip)
    check_same(results(uninterrupted(tmp_path, make, 2, every=3)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=3)))

OPTIMIZERS = dict(adam=Adam, rmsprop=RMSProp, torch_adam=partial(OptimWrapper, opt=torch.optim.Adam), sgd=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))

@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_every_optimizer(tmp_path, opt):
    make = partial(learner, opt_func=OPTIMIZERS[opt])
    check_same(results(uninterrupted(tmp_path, make, 2, how='fit')), results(killed_and_resumed(tmp_path, KILLS, make, 2, how='fit')))

@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fit_sgdr'])
def test_every_schedule(tmp_path, how):
    def run(learn, cbs):
        with learn.no_bar(), learn.no_logging():
            if how=='fit_sgdr': learn.fit_sgdr(2, 1, 1e-2, cbs=cbs)
            else: getattr(learn, how)(3, 1e-2, cbs=cbs)
        return results(learn)
    whole = run(learner(tmp_path/'whole', 10), [TbpttCheckpoint(every=7)])
    with pytest.raises(Killed): run(learner(tmp_path, 10), [TbpttCheckpoint(every=7), KillAt('after_batch', 30)])
    check_same(whole, run(learner(tmp_path, 99), [TbpttCheckpoint(every=7, resume=True), KillAt('after_fit', 10**9)]))

CALLBACKS = dict(accumulation=lambda: [GradientAccumulation(10)], early=lambda: [EarlyStoppingCallback(min_delta=10., patience=2)],
    best=lambda: [SaveModelCallback(monitor='mae')])

@pytest.mark.parametrize('cbs', CALLBACKS)
def test_what_other_callbacks_know(tmp_path, cbs):
    cbs = CALLBACKS[cbs]
    whole,resumed = (results(o) for o in (uninterrupted(tmp_path, learner, 5, cbs), killed_and_resumed(tmp_path, [*KILLS, ('after_batch', 50)], learner, 5, cbs=cbs)))
    check_same(whole, resumed)

def test_random_places(tmp_path):
    rng = random.Random(1)
    make = partial(learner, data=stream)
    whole = results(uninterrupted(tmp_path, make, 2, every=5))
    for i in range(6):
        kills = [(rng.choice(['after_batch', 'before_batch', 'after_pred', 'after_loss', 'after_step']), rng.randint(1, 40))]
        check_same(whole, results(killed_and_resumed(tmp_path/str(i), kills, make, 2, every=5)))


# What cannot be gone on with

def interrupted(path, seed=10, n=12, make=learner, **kwargs):
    with pytest.raises(Killed): fit(make(path, seed, **kwargs), 3, [TbpttCheckpoint(every=7), KillAt('after_batch', n)])
    return path/'checkpoint'

def resumed(path, make=learner, n_epoch=3, cbs=(), **kwargs):
    return fit(make(path, 99, **kwargs), n_epoch, [TbpttCheckpoint(every=7, resume=True), KillAt('after_fit', 10**9), *cbs])

def names(folder): return sorted(o.name for o in folder.iterdir())

@pytest.mark.parametrize('kwargs,message', [
    (dict(model=gru), r'tensors.rnn.rnn.weight_ih_l0 was float32 \(20, 1\) and is float32 \(15, 1\)'),
    (dict(data=partial(windows, bs=5)), 'data.0.bs was 4 and is 5'), (dict(data=partial(windows, sub_seq_len=30)), 'data.0.sub_seq_len was 20 and is 30'), (dict(truncation=Overlap(10, 20)), "truncation was 'dls' and is Overlap"),
    (dict(data=stream), 'data.0.loader was TbpttDL and is StreamDL'), (dict(n_skip=3), 'n_skip was 0 and is 3'),
    (dict(loss_func=L1LossFlat()), 'loss was .*MSELoss.* and is .*L1Loss'), (dict(metrics=mae), 'metrics.1 was mse and is -'),
    (dict(opt_func=Adam), 'optimizer was FusedAdam and is Optimizer'), (dict(wd=.3), r'hypers.0.wd was 0.01 and is 0.3'),
    (dict(grad_clip=1.), 'callbacks.GradientClip.max_norm was - and is 1.0'), (dict(n_epoch=4), 'epochs was 3 and is 4'),
    (dict(cbs=[SaveModelCallback()]), 'callbacks.SaveModelCallback')])
def test_another_training_is_refused_with_what_differs(tmp_path, kwargs, message):
    folder = interrupted(tmp_path)
    before = names(folder)
    learn = learner(tmp_path, 99, **{k:v for k,v in kwargs.items() if k not in ('n_epoch', 'cbs')})
    weights = [o.clone() for o in learn.model.state_dict().values()]
    with pytest.raises(ValueError, match=message):
        fit(learn, kwargs.get('n_epoch', 3), [TbpttCheckpoint(every=7, resume=True), KillAt('after_fit', 10**9), *kwargs.get('cbs', [])])
    assert same(weights, list(learn.model.state_dict().values())) and names(folder)==before

def test_other_data_is_refused(tmp_path):
    interrupted(tmp_path)
    def other(seed):
        set_seed(seed)
        return SequenceDataLoaders.from_arrays(U+1e-3, Y, win_sz=60, stp_sz=40, sub_seq_len=20, bs=4)
    with pytest.raises(ValueError, match='data.0.first_item.0 was'): resumed(tmp_path, data=other)

def test_an_interrupted_training_is_not_written_over(tmp_path):
    folder = interrupted(tmp_path)
    before = {o.name:o.read_bytes() for o in folder.iterdir()}
    with pytest.raises(FileExistsError, match='interrupted in epoch 0 at step 7.*resume=True'): fit(learner(tmp_path, 1), 3, [TbpttCheckpoint()])
    assert before=={o.name:o.read_bytes() for o in folder.iterdir()}

def test_a_training_that_has_ended_is_written_over_or_left_as_it_is(tmp_path):
    whole = fit(learner(tmp_path, 10), 2, [TbpttCheckpoint(every=7)])
    again = fit(learner(tmp_path, 99), 2, [TbpttCheckpoint(every=7, resume=True)])
    check_same(results(whole), results(again))
    other = fit(learner(tmp_path, 11), 2, [TbpttCheckpoint(every=7)])
    assert not same(results(whole)['params'], results(other)['params'])

def test_the_last_two_are_kept(tmp_path):
    folder = interrupted(tmp_path, n=25)
    assert names(folder)==['epoch0-step14.pt', 'epoch0-step21.pt']
    fit(learner(tmp_path/'b', 1), 3, [TbpttCheckpoint(every=7, keep=3)])
    assert len(names(tmp_path/'b'/'checkpoint'))==3

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b[:-20], lambda b: b'', lambda b: bytes(100)])
def test_a_damaged_file_is_named_and_the_one_before_it_taken(tmp_path, damage):
    folder = interrupted(tmp_path, n=25)
    newest = folder/'epoch0-step21.pt'
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match='(?s)epoch0-step21.pt cannot be read: it is cut short.*An older checkpoint is taken.*epoch0-step14.pt'):
        learn = resumed(tmp_path)
    check_same(results(uninterrupted(tmp_path, learner)), results(learn))

def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    folder = interrupted(tmp_path, n=25)
    for o in folder.iterdir(): torch.save(dict(weights=torch.ones(2)), o)
    with pytest.raises(ValueError, match='is a file of PyTorch, but no checkpoint'): resumed(tmp_path)
    for o in folder.iterdir(): torch.save(dict(format='tbptt_fastai checkpoint', version=7), o)
    with pytest.raises(ValueError, match='version 7'): resumed(tmp_path)

RAN = []

def note(o): RAN.append(o)

def test_a_file_with_something_missing_is_refused(tmp_path):
    folder = interrupted(tmp_path, n=25)
    for o in folder.iterdir():
        content = torch.load(o, weights_only=True)
        del content['trained'],content['window']
        torch.save(content, o)
    with pytest.raises(ValueError, match=r"lack \['window', 'trained'\]"): resumed(tmp_path)

class Counts(Callback):
    "Events that it has seen"
    def __init__(self, order): self.order,self.seen = order,[]
    def before_fit(self): self.seen.append('fit')
    def before_epoch(self): self.seen.append(f'before {self.epoch}')
    def after_epoch(self): self.seen.append(f'after {self.epoch}')
    def state_dict(self): return {}
    def load_state_dict(self, _): pass

@pytest.mark.parametrize('order', [-5, 5, 1000, 1005])
def test_other_callbacks_see_the_epochs_that_are_run(tmp_path, order):
    with pytest.raises(Killed): fit(learner(tmp_path, 10), 4, [TbpttCheckpoint(every=7), Counts(order), KillAt('before_train', 3)])
    counts = Counts(order)
    resumed(tmp_path, n_epoch=4, cbs=[counts])
    assert counts.seen==['fit', 'before 2', 'after 2', 'before 3', 'after 3'] and counts.run

class Runs:
    "Runs code when it is read"
    def __reduce__(self): return note,(1,)

def test_a_file_that_would_run_code_does_not(tmp_path):
    folder = interrupted(tmp_path, n=25)
    for o in folder.iterdir(): torch.save(dict(format='tbptt_fastai checkpoint', version=1, code=Runs()), o)
    with pytest.raises(ValueError, match='cannot be read'): resumed(tmp_path)
    assert RAN==[]
    torch.load(o, weights_only=False)
    assert RAN==[1] # it would have

def test_a_file_has_tensors_and_numbers_alone(tmp_path):
    folder = interrupted(tmp_path)
    for o in folder.iterdir(): assert torch.load(o, weights_only=True)['form']['epochs']==3

def test_a_full_disk_costs_the_checkpoint_and_not_the_training(tmp_path, monkeypatch):
    import os
    def full(_): raise OSError(28, 'No space left on device')
    whole = results(uninterrupted(tmp_path, learner))
    learn = learner(tmp_path, 10)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.warns(UserWarning, match='(?s)No checkpoint could be written.*No space left'): fit(learn, 3, [TbpttCheckpoint(every=7)])
    check_same(whole, results(learn))
    assert names(tmp_path/'checkpoint')==[]

def test_a_kill_while_a_file_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    import os
    whole,learn = results(uninterrupted(tmp_path, learner)),learner(tmp_path, 10)
    replace,left = os.replace,iter(range(3))
    def killed(*args):
        if next(left, None) is None: raise Killed
        return replace(*args)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', killed)
        with pytest.raises(Killed): fit(learn, 3, [TbpttCheckpoint(every=7), KillAt('after_fit', 10**9)])
    assert names(tmp_path/'checkpoint')==['epoch0-step14.pt', 'epoch0-step7.pt']
    check_same(whole, results(resumed(tmp_path)))

def test_a_learner_that_was_interrupted_goes_on_itself(tmp_path):
    learn = learner(tmp_path, 10)
    with pytest.raises(Killed): fit(learn, 3, [TbpttCheckpoint(every=7), KillAt('after_batch', 30)])
    fit(learn, 3, [TbpttCheckpoint(every=7, resume=True), KillAt('after_fit', 10**9)])
    check_same(results(uninterrupted(tmp_path, learner)), results(learn))

def test_an_evaluation_writes_nothing(tmp_path):
    learn = learner(tmp_path, 10)
    learn.add_cb(TbpttCheckpoint(every=1))
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=())
    assert not (tmp_path/'checkpoint').exists()

def test_a_learner_without_a_reset_is_refused(tmp_path):
    from fastai.learner import Learner
    learn = Learner(windows(1), plain(), loss_func=MSELossFlat(), path=tmp_path)
    with pytest.raises(ValueError, match='this learner has none'): fit(learn, 1, [TbpttCheckpoint()])

@pytest.mark.parametrize('kwargs', [dict(every=0), dict(every='10'), dict(keep=0), dict(every=1.5)])
def test_settings_that_cannot_be_are_refused(kwargs):
    with pytest.raises((ValueError,TypeError), match=next(iter(kwargs))): TbpttCheckpoint(**kwargs)


# Other loaders

def text(seed):
    set_seed(seed)
    return SequenceDataLoaders.from_text('all the world is a stage, and all the men and women merely players. '*20, bs=4, sub_seq_len=15)

def language(seed):
    from fastai.text.data import LMDataLoader
    set_seed(seed)
    docs = torch.randint(0, 20, (12, 90), generator=torch.Generator().manual_seed(1)).unbind()
    return DataLoaders(LMDataLoader(docs[:9], bs=3, seq_len=15, shuffle=True), LMDataLoader(docs[9:], bs=3, seq_len=15))

def pytorch(seed):
    set_seed(seed)
    data = torch.utils.data.TensorDataset(U[:1200].view(20, 60, 1), Y[:1200].view(20, 60, 2))
    return DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=4, shuffle=o) for o in (True, False)))

def pytorch_generator(seed):
    dls = pytorch(seed)
    data = dls.train.dataset
    train = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return DataLoaders(train, dls.valid)

def hdf5(folder, seed):
    import h5py
    for i,n in enumerate((230, 410, 300)):
        if not (folder/f'{i}.h5').exists():
            with h5py.File(folder/f'{i}.h5', 'w') as f: f['u'],f['y'] = U[:n].numpy(),Y[:n].numpy()
    set_seed(seed)
    return SequenceDataLoaders.from_hdf5(f'{folder}/*.h5', 'u', 'y', sub_seq_len=20, bs=2)

@pytest.mark.parametrize('data', [text, language])
def test_texts(tmp_path, data):
    def make(path, seed):
        dls = data(seed)
        return TbpttLearner(dls, TextRNN(30, 8, 'lstm', 8, 1, 0.), path=path, sub_seq_len=15, loss_func=CrossEntropyLossFlat())
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

@pytest.mark.parametrize('data', [pytorch, pytorch_generator])
def test_loaders_of_pytorch(tmp_path, data):
    def make(path, seed): return learner(path, seed, data, two_layers, sub_seq_len=20)
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

def test_files_that_are_read_ahead(tmp_path):
    pytest.importorskip('h5py')
    make = partial(learner, data=partial(hdf5, tmp_path), model=two_layers)
    check_same(results(uninterrupted(tmp_path, make, 2, every=4)), results(killed_and_resumed(tmp_path, KILLS, make, 2, every=4)))

@pytest.mark.parametrize('loss', [nn.L1Loss(), nn.HuberLoss(), nn.MSELoss()])
@pytest.mark.parametrize('kill', [('after_batch', 30), ('after_train', 1), ('after_epoch', 1)]) # the newest is that of the beginning of an epoch
@pytest.mark.parametrize('data', [windows, stream])
def test_a_loss_that_is_a_module(tmp_path, loss, kill, data):
    make = partial(learner, data=data, loss_func=loss)
    whole = uninterrupted(tmp_path, make, 2, every=1000)
    check_same(results(whole), results(killed_and_resumed(tmp_path, [kill], make, 2, every=1000)))
    check_same(results(whole), results(fit(make(tmp_path/'whole', 99), 2, [TbpttCheckpoint(every=1000, resume=True)]))) # it has ended


# What is random, cut short or out of sight

class RandomLengths(torch.utils.data.Dataset):
    "Windows whose batches are put together at a random length"
    def __len__(self): return 24
    def __getitem__(self, i): return U[i*50:i*50+60],Y[i*50:i*50+60]

def _cut_at_random(items):
    n = 40+int(torch.randint(0, 21, ()))
    return tuple(torch.stack([o[:n] for o in element]) for element in zip(*items))

def random_lengths(seed):
    set_seed(seed)
    make = partial(torch.utils.data.DataLoader, RandomLengths(), batch_size=4, collate_fn=_cut_at_random)
    return DataLoaders(make(shuffle=True), make())

def check_goes_on(tmp_path, make, cbs=list, kills=KILLS, every=4):
    check_same(results(uninterrupted(tmp_path, make, 2, cbs, every=every)), results(killed_and_resumed(tmp_path, kills, make, 2, every, cbs)))

def _some(y): return (y[...,0]>.9)&(y[...,1]>.5)

@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('kwargs', [dict(sub_seq_len=15), dict(truncation=Jittered(12)), dict(truncation=RandomUnbiased(12)),
    dict(sub_seq_len=15, counts=_some)])
def test_windows_that_have_another_length_when_they_are_read_again(tmp_path, kwargs, every):
    check_goes_on(tmp_path, partial(learner, data=random_lengths, **kwargs), every=every)

class LeaveOut(Callback):
    "Each third batch is cancelled, before or after it was run"
    n_seen = 0
    def __init__(self, event, order):
        self.order = order
        setattr(self, event, self._leave_out)
    def _leave_out(self):
        if not self.training: return
        self.n_seen += 1
        if self.n_seen%3==0: raise CancelBatchException

@pytest.mark.parametrize('event,order', [('before_batch', -5), ('before_batch', 5), ('before_batch', 30), ('after_loss', 0)])
@pytest.mark.parametrize('data', [windows, stream])
def test_batches_that_are_left_out(tmp_path, event, order, data):
    check_goes_on(tmp_path, partial(learner, data=data, model=two_layers), lambda: [LeaveOut(event, order)])

class EndAt(Callback):
    "Each epoch ends after so many batches, by their number"
    order = -20
    def before_batch(self):
        if self.training and self.iter==13: raise CancelTrainException

def test_every_callback_sees_the_number_of_the_batch(tmp_path): check_goes_on(tmp_path, learner, lambda: [EndAt()])

class Mix(Callback):
    order = 60
    def before_batch(self):
        if not self.training: return
        share,rows = torch.rand(()),torch.randperm(len(self.x))
        self.learn.xb = tuple(share*o+(1-share)*o[rows] for o in self.xb)

@pytest.mark.parametrize('every', [1, 4])
def test_what_a_callback_has_drawn_once_for_a_window(tmp_path, every):
    check_goes_on(tmp_path, learner, lambda: [once_per_window(Mix())], every=every)

class Scaled(nn.Module):
    "A running scale that no state_dict has, and a number of calls"
    def __init__(self, in_place):
        super().__init__()
        self.rnn,self.head,self.in_place,self.n_calls = StatefulRNN(nn.GRU(1, 4, batch_first=True)),nn.Linear(4, 2),in_place,0
        self.register_buffer('scale', torch.ones(()), persistent=False)
    def forward(self, x):
        if self.training:
            scale = .9*self.scale+.1*x.detach().abs().mean()
            if self.in_place: self.scale.copy_(scale)
            else: self.scale = scale
            self.n_calls += 1
        return self.head(self.rnn(x/self.scale*(1+self.n_calls/1000)))

@pytest.mark.parametrize('kills', [KILLS, [('after_train', 1)], [('after_epoch', 1)]])
@pytest.mark.parametrize('in_place', [True, False])
def test_what_a_module_keeps_outside_its_state_dict(tmp_path, in_place, kills):
    check_goes_on(tmp_path, partial(learner, model=partial(Scaled, in_place)), kills=kills)

class Louder(Callback):
    "Counts as long as it lives"
    n_seen = 0
    def after_pred(self):
        if not self.training: return
        self.n_seen += 1
        self.learn.pred = self.pred*(1+self.n_seen/1000)

@pytest.mark.parametrize('every', [4, 100]) # 100: the only checkpoint is that of the beginning
@pytest.mark.parametrize('model', [lstm, partial(Scaled, False)])
def test_a_learner_that_goes_on_itself_forgets_the_steps_after_the_checkpoint(tmp_path, every, model):
    def make(path, seed): return learner(path, seed, model=model, cbs=[Louder()])
    whole,learn = results(uninterrupted(tmp_path, make, 2, every=every)),make(tmp_path, 10)
    for n in (6, 7):
        with pytest.raises(Killed): fit(learn, 2, [TbpttCheckpoint(every=every, resume=True), KillAt('after_batch', n)])
    check_same(whole, results(fit(learn, 2, [TbpttCheckpoint(every=every, resume=True), KillAt('after_fit', 10**9)])))

def test_an_error_while_epochs_are_passed_over_leaves_no_callback_out(tmp_path):
    interrupted(tmp_path, n=50)
    learn = learner(tmp_path, 10)
    class Broken(TbpttCheckpoint):
        def before_epoch(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, [Broken(every=7, resume=True), KillAt('after_fit', 10**9)])
    assert all(cb.run for cb in learn.cbs)

def test_learning_rates_of_each_group_are_compared(tmp_path):
    def make(path, seed): return learner(path, seed, splitter=lambda m: [list(o.parameters()) for o in (m.rnn, nn.ModuleList([m.norm, m.head]))])
    def run(lr, *cbs):
        learn = make(tmp_path, 1)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, slice(lr, 1e-2), cbs=cbs)
    with pytest.raises(Killed): run(1e-5, TbpttCheckpoint(every=4), KillAt('after_batch', 9))
    with pytest.raises(ValueError, match='schedules.lr.0 was'): run(1e-3, TbpttCheckpoint(every=4, resume=True), KillAt('after_fit', 10**9))

def test_a_second_training_in_the_folder_of_a_first_is_refused(tmp_path):
    learn = fit(learner(tmp_path, 1), 1, [TbpttCheckpoint(resume=True)])
    with pytest.raises(ValueError, match='trained to the end.*path of its own'): fit(learn, 1, [TbpttCheckpoint(resume=True)])
    fit(learn, 1, [TbpttCheckpoint('second', resume=True)])

def test_a_model_that_has_no_shapes_yet_is_refused(tmp_path):
    def lazy(): return nn.Sequential(StatefulRNN(nn.GRU(1, 4, batch_first=True)), nn.LazyLinear(2))
    learn = learner(tmp_path, 1, model=lazy)
    with pytest.raises(ValueError, match='1.weight, 1.bias have no shape'): fit(learn, 1, [TbpttCheckpoint()])
    learn.model(learn.dls.one_batch()[0])
    fit(learn, 1, [TbpttCheckpoint()])

class Pair(NamedTuple):
    h: torch.Tensor

class Named(Looped):
    def initial_state(self, bs, device, dtype): return Pair(torch.zeros(bs, 4))
    def forward(self, x, state=None):
        pred,after = super().forward(x, None if state is None else dict(h=[state.h]))
        return pred,Pair(after['h'][0])

class Opaque(Looped):
    "Names what no file can hold, in a place that is not detached"
    def forward(self, x, state=None):
        pred,after = super().forward(x, state)
        return pred,{**after, 'name':Text('a')}

class Text(str): "A string of another class"

def test_a_state_that_cannot_be_stored_is_refused_in_the_first_step(tmp_path):
    learn = learner(tmp_path, 1, model=lambda: StatefulRNN(Opaque()))
    with pytest.raises(TypeError, match='A Text is not made of tensors.*Carry tensors and numbers in tuples'): fit(learn, 1, [TbpttCheckpoint(every=1000)])
    assert learn.train_iter==1

@dataclass
class Kept:
    h: torch.Tensor
    pair: Pair
    n: int = 0

class Counted(Looped):
    "A dataclass with a named tuple in it, an integer tensor and a number"
    def forward(self, x, state=None):
        h,pair,n = (None,None,0) if state is None else (state.h,state.pair,state.n)
        pred,after = super().forward(x, None if h is None else dict(h=[h-pair.h]))
        return pred,Kept(after['h'][0]*2, Pair(after['h'][0]), n+1)
    def initial_state(self, bs, device, dtype): return Kept(torch.zeros(bs, 4), Pair(torch.zeros(bs, 4)))

@pytest.mark.parametrize('cell', [Named, Counted])
@pytest.mark.parametrize('data', [windows, stream])
def test_states_with_classes_of_their_own(tmp_path, cell, data):
    check_goes_on(tmp_path, partial(learner, data=data, model=lambda: nn.Sequential(StatefulRNN(cell()), nn.Dropout(.2))))

@untaught_on_purpose
@pytest.mark.filterwarnings('ignore:(?s).*not longer than n_skip')
def test_states_with_classes_of_their_own_and_a_washout(tmp_path):
    check_goes_on(tmp_path, partial(learner, data=stream, model=lambda: StatefulRNN(Counted()), n_skip=25))

def test_a_state_of_another_form_is_refused(tmp_path):
    def make(cell): return partial(learner, model=lambda: StatefulRNN(cell()))
    with pytest.raises(Killed): fit(make(Counted)(tmp_path, 1), 3, [TbpttCheckpoint(every=7), KillAt('after_batch', 9)])
    class Other(Counted):
        def forward(self, x, state=None):
            pred,after = Looped.forward(self, x, None if state is None else dict(h=[state.h]))
            return pred,Pair(after['h'][0])
        def initial_state(self, bs, device, dtype): return Pair(torch.zeros(bs, 4))
    with pytest.raises(ValueError, match='has 3 parts in the checkpoint, and 1 in this model'):
        fit(make(Other)(tmp_path, 1), 3, [TbpttCheckpoint(every=7, resume=True), KillAt('after_batch', 99)])

def test_the_newest_is_kept_beside_one_that_was_further_on(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    for place in ((0, 21), (0, 15)): folder.write(place, {})
    assert names(tmp_path)==['epoch0-step15.pt']

@pytest.mark.filterwarnings('error:.*not writable')
def test_arrays_that_cannot_be_written_to_are_compared_without_a_warning():
    a = np.arange(6.)
    digest = _digest(a)
    a.flags.writeable = False
    assert _digest(a)==digest

def test_a_file_without_a_version_is_refused(tmp_path):
    torch.save(dict(format='tbptt_fastai checkpoint'), tmp_path/'a.pt')
    with pytest.raises(ValueError, match='version None'): read_checkpoint(tmp_path/'a.pt')

@pytest.mark.parametrize('one,other,message', [
    (dict(loss_func=nn.HuberLoss(delta=1.)), dict(loss_func=nn.HuberLoss(delta=2.)), 'loss_settings.delta was 1.0 and is 2.0'),
    (dict(loss_func=MSELossFlat()), dict(loss_func=MSELossFlat(reduction='sum')), 'loss_settings.reduction was mean and is sum'),
    (dict(loss_func=nn.BCEWithLogitsLoss(pos_weight=torch.ones(2))), dict(loss_func=nn.BCEWithLogitsLoss(pos_weight=torch.full((2,), 3.))),
        'loss_settings.pos_weight was'),
    (dict(counts=_some), dict(), 'counts was _some and is None')])
def test_settings_of_the_loss_are_compared(tmp_path, one, other, message):
    interrupted(tmp_path, **one)
    with pytest.raises(ValueError, match=message): resumed(tmp_path, **other)

def test_what_a_killed_process_has_half_written_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path/'epoch0-step7.new').write_bytes(b'half')
    CheckpointFolder(tmp_path).write((0, 14), {})
    assert names(tmp_path)==['epoch0-step14.pt']

def test_a_learner_that_was_interrupted_is_not_kept(tmp_path):
    "What is remembered of the beginning of its fit does not hold it"
    import gc, weakref
    learn = learner(tmp_path, 10)
    with pytest.raises(Killed): fit(learn, 3, [TbpttCheckpoint(every=7), KillAt('after_batch', 9)])
    gone = weakref.ref(learn)
    del learn
    gc.collect()
    assert gone() is None


# ---- two fits with one callback, and evaluations in between

def fine_tuned(path, seed, *cbs, **kwargs):
    "A training of the head, and of the whole model"
    learn = learner(path, seed, data=kwargs.pop('data', windows), splitter=lambda m: [list(o.parameters()) for o in (m.rnn, nn.ModuleList([m.norm, m.head]))])
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=[TbpttCheckpoint(every=5, **kwargs), *cbs])
    return learn

@pytest.mark.parametrize('data', [windows, stream])
@pytest.mark.parametrize('ns', [(3,), (20,), (47,), (7, 8, 30, 12)], ids=str)
def test_a_fine_tuning_goes_on_in_either_of_its_fits(tmp_path, ns, data):
    whole = fine_tuned(tmp_path/'whole', 10, data=data)
    class KillAfter(Callback):
        "That many batches of both fits"
        order,left = 2000,0
        def after_batch(self):
            KillAfter.left -= self.training
            if KillAfter.left==0: raise Killed
    for i,n in enumerate(ns):
        KillAfter.left = n
        with pytest.raises(Killed): fine_tuned(tmp_path, 10+i, KillAfter(), resume=True, data=data)
    KillAfter.left = 10**9
    check_same(results(whole), results(fine_tuned(tmp_path, 99, KillAfter(), resume=True, data=data)))
    again = fine_tuned(tmp_path, 98, KillAfter(), resume=True, data=data) # nothing is left to do
    check_same(dict(p=results(whole)['params']), dict(p=results(again)['params']))

def test_a_fine_tuning_that_was_interrupted_in_its_second_fit_is_not_written_over(tmp_path):
    def run(seed, **kwargs): return fine_tuned(tmp_path, seed, KillAt('after_batch', 40), **kwargs)
    with pytest.raises(Killed): run(1)
    before = {o:o.read_bytes() for o in sorted(tmp_path.rglob('*.pt'))}
    assert any('fit2' in str(o) for o in before)
    with pytest.raises(FileExistsError, match='fit2 has checkpoints of a training that was interrupted'): fine_tuned(tmp_path, 2)
    assert before=={o:o.read_bytes() for o in sorted(tmp_path.rglob('*.pt'))}
    fine_tuned(tmp_path, 3, KillAt('after_fit', 10**9), resume=True)
    fine_tuned(tmp_path, 4) # all has ended: it is written over

def test_a_first_fit_that_begins_anew_takes_the_second_one_with_it(tmp_path):
    fine_tuned(tmp_path, 1)
    with pytest.raises(Killed): fine_tuned(tmp_path, 2, KillAt('after_batch', 8))
    whole = fine_tuned(tmp_path/'whole', 2, KillAt('after_fit', 10**9))
    check_same(results(whole), results(fine_tuned(tmp_path, 3, KillAt('after_fit', 10**9), resume=True)))

def test_the_same_learner_goes_on_with_its_fine_tuning(tmp_path):
    whole,learn = fine_tuned(tmp_path/'whole', 10, KillAt('after_fit', 10**9)),None
    learn = learner(tmp_path, 10, splitter=lambda m: [list(o.parameters()) for o in (m.rnn, nn.ModuleList([m.norm, m.head]))])
    def run(*cbs):
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, 1e-2, freeze_epochs=1, cbs=cbs)
    one = TbpttCheckpoint(every=5, resume=True)
    for cb in (one, one, TbpttCheckpoint(every=5, resume=True)):
        with pytest.raises(Killed): run(cb, KillAt('after_batch', 25))
    run(TbpttCheckpoint(every=5, resume=True), KillAt('after_fit', 10**9))
    check_same(results(whole), results(learn))

@pytest.mark.parametrize('event', ['after_train', 'after_validate', 'after_epoch'])
def test_checkpoints_go_on_after_an_evaluation_in_the_middle_of_a_training(tmp_path, event):
    class Evaluates(Callback):
        order = 70
        def __call__(self, name):
            if name==event and not self.learn.lock.locked(): self.learn.validate()
    learn,times = learner(tmp_path, 1),[]
    class Looks(Callback):
        order = 2000
        def after_epoch(self):
            if not self.learn.lock.locked(): times.append(CheckpointFolder(tmp_path/'checkpoint').places()[-1])
    fit(learn, 3, [TbpttCheckpoint(every=7), Evaluates(), Looks()])
    assert times[:2]==[(1, 0), (2, 0)] and times[2][0]==2 and times[2][1]>0
    assert names(tmp_path/'checkpoint')[-1]=='epoch3-step0.pt'


# ---- what a checkpoint does not hold

class Holds(Callback):
    "An object that changes with each batch, or does not"
    def __init__(self, make, use): self.held,self.use = make(),use
    def after_batch(self):
        if self.training: self.use(self)

class Box:
    def __init__(self): self.n,self.inner = 0,dict(values=[])

def count(cb): cb.held.n += 1
def deep(cb): cb.held.inner['values'].append(1)
def draw(cb): cb.held.random()
def replace(cb): cb.held = object()
CHANGES = dict(attribute=(Box, count), inside=(Box, deep), in_a_list=(lambda: [Box()], lambda cb: count(type(cb)(lambda: cb.held[0], noop))),
    numpy=(lambda: np.random.default_rng(0), draw), old_numpy=(lambda: np.random.RandomState(0), draw),
    torch=(torch.Generator, lambda cb: torch.rand(1, generator=cb.held)), replaced=(object, replace),
    deque=(lambda: deque([Box()]), lambda cb: cb.held.append(Box())), set=(set, lambda cb: cb.held.add(len(cb.held))))

@pytest.mark.parametrize('kind', CHANGES)
def test_an_object_that_changes_and_is_not_held_is_named_once(tmp_path, kind):
    cb = Holds(*CHANGES[kind])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        fit(learner(tmp_path, 1), 2, [TbpttCheckpoint(every=3), cb])
    told = [str(o.message) for o in seen if 'Holds.' in str(o.message)]
    assert len(told)==1 and told[0].startswith(f'Holds.held is a {type(cb.held).__name__}, ') and 'state_dict' in told[0]

class Remembers(Box):
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state['n']

@pytest.mark.parametrize('make,use', [(Box, noop), (object, noop), (Remembers, count), (lambda: np.random.default_rng(0), noop), (lambda: [len, Box, Path('a'), re.compile('a')], noop),
    (lambda: [1, {2: 'a'}], lambda cb: cb.held.append(3)), (lambda: random.Random(0), draw), (lambda: {Box()}, noop), (lambda: nn.GRU(1, 2), noop)])
def test_what_does_not_change_or_is_held_is_no_matter(tmp_path, make, use):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learner(tmp_path, 1), 2, [TbpttCheckpoint(every=3), Holds(make, use)])

def test_an_object_that_holds_itself_and_one_without_end_are_looked_at():
    box = Box()
    box.inner['me'],box.chain = box,[]
    o = box.chain
    for _ in range(900): o.append(o := [])
    cb = Holds(lambda: box, count)
    learn = SimpleNamespace(cbs=[cb], metrics=[])
    before,told = left_out(learn),set()
    warn_of_left_out(left_out(learn), before, told)
    assert not told
    count(cb)
    with pytest.warns(UserWarning, match='Holds.held is a Box'): warn_of_left_out(left_out(learn), before, told)

def test_a_list_that_holds_itself_is_named(tmp_path):
    def itself():
        o = []
        o.append(o)
        return o
    with pytest.warns(UserWarning, match='Holds.held is a list, which has changed'):
        fit(learner(tmp_path, 1), 1, [TbpttCheckpoint(every=3), Holds(itself, lambda cb: cb.held.append(1))])
