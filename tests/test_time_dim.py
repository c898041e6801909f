"Time may be any axis of a batch: time first, channels first and batch first train, measure and predict the same"
from functools import partial
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import mae, mse
from fastai.torch_core import set_seed
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from helpers import fit, sgd
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, ScaledL1Loss, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.segment import Window
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.views import SubWindows, view_of
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.axis import from_rows, to_rows
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.truncation.schemes import Overlap

WIN,SUB,BS = 30,12,4 # sub-windows of 12, 12 and 6 steps; batches of 4, 4 and 2 windows
dims = pytest.mark.parametrize('dim', [0, -1], ids=['time first', 'channels first'])
sources = pytest.mark.parametrize('source', ['list', 'pytorch', 'fastai', 'windows', 'tbptt', 'stream'])

def signals(n=10, steps=WIN, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, steps, 2, generator=g, dtype=dtype)
    return x,torch.stack([x.sum(2).cumsum(1).sin(), x[...,0]], 2)

class Net(nn.Module):
    "A convolution 1 wide, a recurrent layer in its own layout, and a head"
    def __init__(self, dim=1, kind=nn.LSTM, stateful=False, n_out=2, last=False):
        super().__init__()
        rnn = kind(3, 5, batch_first=dim!=0)
        self.mix,self.out = nn.Conv1d(2, 3, 1),nn.Linear(5, n_out)
        self.rnn = StatefulRNN(rnn) if stateful else rnn
        self.dim,self.last = dim,last
    def forward(self, x):
        x = self.mix(x.permute({0: (1, 2, 0), 1: (0, 2, 1), -1: (0, 1, 2)}[self.dim]))
        o = self.rnn(x.permute(2, 0, 1) if self.dim==0 else x.transpose(1, 2))
        o = o[0] if isinstance(o, tuple) else o
        if self.last: return self.out(o[-1] if self.dim==0 else o[:,-1])
        return self.out(o).transpose(1, 2) if self.dim==-1 else self.out(o)

def net(*args, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return Net(*args, **kwargs).to(dtype)

class Collate:
    "Items, one after the other in a batch that has its time axis there; targets may have none"
    def __init__(self, dim): self.dim = dim
    def __call__(self, items):
        rows = [torch.stack([torch.as_tensor(o) for o in os]) for os in zip(*items)]
        return tuple(from_rows(o, self.dim) if o.ndim>2 else o for o in rows)

def lengths(n=10): return [WIN+3*(i%4)-5 for i in range(n)]

def source_loaders(source, dim, arrays=None, bs=BS, workers=0, shuffle=False, sub=SUB):
    arrays = signals() if arrays is None else arrays
    items,put = list(zip(*arrays)),Collate(dim)
    if source=='list': return DataLoaders(*[[put(items[i:i+bs]) for i in range(0, len(items), bs)]]*2)
    if source in ('pytorch', 'fastai', 'windows'):
        kw = dict(num_workers=workers)
        def make(shuffle):
            if source=='pytorch': return torch.utils.data.DataLoader(items, bs, shuffle=shuffle, collate_fn=put, **kw)
            cls = DataLoader if source=='fastai' else TbpttDL
            own = {} if source=='fastai' else dict(time_dim=dim, sub_seq_len=sub if shuffle is not None else None)
            return cls(items, bs=bs, shuffle=bool(shuffle), create_batch=put, **own, **kw)
        return DataLoaders(make(shuffle), make(None if source=='windows' else False))
    kw = dict(bs=bs, sub_seq_len=sub, num_workers=0, time_dim=dim, shuffle=shuffle)
    dtype = arrays[0].dtype
    if source=='tbptt':
        ds = SequenceWindows(*map(list, arrays), dtype=dtype)
        return DataLoaders(TbpttDL(ds, **{**kw, 'num_workers': workers}), TbpttDL(ds, **{**kw, 'shuffle': False}))
    cut = [[o[:n] for o,n in zip(a, lengths())] for a in (torch.cat([o, o], 1) for o in arrays)]
    return DataLoaders(StreamDL(Sequences(*cut, dtype=dtype), **kw), StreamDL(Sequences(*cut, dtype=dtype), **{**kw, 'shuffle': False}))

class Steps(Callback):
    "The loss of every step"
    order = 49
    def __init__(self): self.seen = []
    def after_loss(self):
        if self.training: self.seen.append(self.learn.loss_grad.item())

def trained(source, dim, model=None, n_epoch=2, cb=None, cbs=(), loss_func=None, loaders=None, how=Learner, metrics=True, opt=sgd, **kwargs):
    set_seed(0)
    dls = loaders(dim) if loaders else source_loaders(source, dim)
    sub = 'dls' if isinstance(dls.train, TbpttDL) else SUB
    cb = cb(dim) if cb else TbpttResetCB(sub, time_dim=None if isinstance(dls.train, TbpttDL) else dim, **kwargs)
    steps = Steps()
    learn = how(dls, model(dim) if model else net(dim), loss_func or nn.MSELoss(), opt_func=opt, cbs=[cb, steps, *cbs],
                metrics=[mse, mae, fun_rmse] if metrics else [])
    fit(learn, n_epoch, .05)
    learn.steps = steps.seen
    return learn

def numbers(learn, **kwargs):
    "What a fit, a validation and a prediction give"
    with learn.no_bar(), learn.no_logging():
        dl = learn.dls.valid
        if not isinstance(dl, DataLoader): kwargs['dl'] = dl # fastai makes a new one of its own
        values,(preds,targs) = list(learn.validate()),learn.get_preds(**kwargs)
    return dict(steps=torch.tensor(learn.steps), params=nn.utils.parameters_to_vector(learn.model.parameters()).detach(),
                values=torch.tensor(values), preds=preds, targs=targs)

def in_rows(name, o, dim): return to_rows(o, -1) if dim==-1 and name in ('preds', 'targs') and o.ndim>2 else o

def assert_same(a, b, dim, tol=1e-12):
    for name,o in a.items():
        other = in_rows(name, b[name], dim)
        # metrics and losses of a validation are kept in single precision by fastai
        assert o.shape==other.shape and torch.allclose(o, other, rtol=0, atol=max(tol, 1e-7) if name=='values' else tol), (name, o.shape, other.shape)
    assert len(a['steps'])>2

@dims
@sources
def test_losses_parameters_metrics_and_predictions_are_those_of_batch_first(source, dim):
    known,other = (numbers(trained(source, d)) for d in (1, dim))
    assert_same(known, other, dim)
    if source!='stream': assert known['preds'].shape==(10, WIN, 2)

@dims
@sources
def test_in_single_precision_too(source, dim):
    def arrays(d): return source_loaders(source, d, signals(dtype=torch.float32))
    known,other = (numbers(trained(source, d, partial(net, dtype=torch.float32), loaders=arrays)) for d in (1, dim))
    assert_same(known, other, dim, 1e-6)

@dims
@pytest.mark.parametrize('stateful', [False, True], ids=['plain', 'StatefulRNN'])
@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_layers(kind, stateful, dim):
    for source in ('list', 'stream'):
        assert_same(*(numbers(trained(source, d, partial(net, kind=kind, stateful=stateful))) for d in (1, dim)), dim)

@dims
@pytest.mark.parametrize('source', ['list', 'tbptt', 'stream'])
@pytest.mark.parametrize('n_skip', [5, 14])
def test_a_washout(source, n_skip, dim):
    a,b = (numbers(trained(source, d, n_skip=n_skip)) for d in (1, dim))
    assert_same(a, b, dim)

@dims
@pytest.mark.parametrize('source', ['list', 'tbptt', 'stream'])
def test_sub_windows_that_overlap(source, dim):
    def overlapping(d): return TbpttResetCB(truncation=Overlap(6, 12), time_dim=None if source!='list' else d)
    loaders = partial(source_loaders, source, sub=6)
    assert_same(*(numbers(trained(source, d, cb=overlapping, loaders=loaders)) for d in (1, dim)), dim)

@dims
def test_evaluation_in_sub_windows(dim):
    learn = trained('list', dim)
    whole = numbers(learn)
    learn.add_cb(SubWindowEvalCB(SUB))
    assert_same(whole, numbers(learn), 1)
    learn = trained('list', dim, n_skip=3)
    whole = numbers(learn)
    learn.add_cb(SubWindowEvalCB(SUB))
    assert_same(whole, numbers(learn), 1)

@dims
@pytest.mark.parametrize('source', ['list', 'pytorch', 'windows', 'tbptt'])
def test_one_label_for_each_window(source, dim):
    x,_ = signals()
    y = (x[:,-1,0]>0).long()
    def loaders(d):
        if source!='tbptt': return source_loaders(source, d, (x, y))
        ds = SequenceWindows(list(x), [o.expand(WIN, 1).double() for o in y], dtype=torch.float64)
        ds.one_label = True
        return DataLoaders(*[TbpttDL(ds, bs=BS, sub_seq_len=SUB, num_workers=0, time_dim=d)]*2)
    loss = nn.CrossEntropyLoss() if source!='tbptt' else lambda o, y: (o[:,:1]-y).square().mean()
    kw = dict(model=partial(net, last=True), loss_func=loss, loaders=loaders, metrics=False)
    a,b = (numbers(trained(source, d, **kw)) for d in (1, dim))
    assert_same(a, b, 1)
    assert a['preds'].shape==(10, 2) and len(a['steps'])==6

@dims
@pytest.mark.parametrize('source', ['pytorch', 'fastai', 'windows', 'tbptt'])
def test_two_workers_and_shuffled(source, dim):
    for workers in (0, 2):
        loaders = partial(source_loaders, source, workers=workers, shuffle=True)
        assert_same(*(numbers(trained(source, d, loaders=loaders)) for d in (1, dim)), dim)

@dims
def test_a_second_fit_and_a_run_that_is_broken_off(dim):
    class Stop(Callback):
        order = 60
        def after_batch(self):
            if self.training and self.iter==4 and self.n_epoch==1: raise KeyboardInterrupt
    def again(d):
        learn = trained('list', d, cbs=[Stop()])
        with pytest.raises(KeyboardInterrupt): fit(learn, 1, .05)
        return numbers(fit(learn, 2, .05))
    assert_same(*map(again, (1, dim)), dim)

@pytest.mark.parametrize('how', ['callback', 'factory', 'loader'])
def test_a_loop_by_hand_that_has_time_first(how):
    x,y = (o.transpose(0, 1) for o in signals())
    by_hand,seen = net(0),[]
    opt = torch.optim.SGD(by_hand.parameters(), .05)
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
            state = None
            for a in range(0, WIN, SUB):
                xs,ys = x[a:a+SUB,rows],y[a:a+SUB,rows]
                o,state = by_hand.rnn(by_hand.mix(xs.permute(1, 2, 0)).permute(2, 0, 1), state)
                state = tuple(s.detach() for s in state)
                loss = (by_hand.out(o)-ys).square().mean()
                # the ragged tail weighs by its steps
                opt.zero_grad()
                (loss*len(xs)/SUB).backward()
                opt.step()
                seen.append(loss.item()*len(xs)/SUB)
    if how=='factory':
        def make(dls, model, loss, opt_func, cbs, metrics):
            return TbpttLearner(dls, model, SUB, loss_func=loss, opt_func=opt_func, cbs=cbs[1:], time_dim=0)
        learn = trained('list', 0, how=make)
    else: learn = trained('list' if how=='callback' else 'tbptt', 0)
    assert torch.allclose(torch.tensor(seen), torch.tensor(learn.steps), rtol=0, atol=1e-12)
    for p,q in zip(by_hand.parameters(), learn.model.parameters()): assert torch.allclose(p, q, rtol=0, atol=1e-12)
