"Two pipelines that mean the same thing give the same losses, metrics, predictions and parameters, whatever they are made of"
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch import nn
from helpers import adam, fit, sgd, untaught_on_purpose
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.callback import TbpttResetCB

LAYERS = dict(rnn=(nn.RNN, nn.RNNCell), gru=(nn.GRU, nn.GRUCell), lstm=(nn.LSTM, nn.LSTMCell))
TOL = {torch.float32: 1e-6, torch.float64: 1e-12}


# ---- the task: what both pipelines are about

tasks = st.builds(SimpleNamespace,
    n=st.integers(2, 7), steps=st.integers(6, 30), channels=st.integers(1, 3), outputs=st.integers(1, 2), sub=st.integers(3, 12),
    bs=st.integers(1, 4), n_skip=st.sampled_from([0, 0, 1, 4]), dtype=st.sampled_from([torch.float32, torch.float64]),
    layer=st.sampled_from(list(LAYERS)), missing=st.sampled_from(['none', 'none', 'some', 'most', 'ends']), seed=st.integers(0, 99))

def data(task):
    "Inputs, targets, and which of these count"
    g = torch.Generator().manual_seed(task.seed)
    def noise(k): return torch.randn(task.n, task.steps, k, generator=g, dtype=task.dtype)
    x,y = noise(task.channels),noise(task.outputs)
    drawn = torch.rand(task.n, task.steps, generator=g)
    mask = torch.ones(task.n, task.steps, dtype=torch.bool)
    if task.missing=='some': mask = drawn>.3
    if task.missing=='most': mask = drawn>.93
    if task.missing=='ends': # sequences of unequal length, that were padded
        least = min(max(task.sub, task.n_skip+1), task.steps)
        mask = torch.arange(task.steps)<torch.randint(least, task.steps+1, (task.n,), generator=g)[:,None]
    mask[:,-1] |= task.missing!='ends' # every window has a target
    if task.missing=='ends': mask[torch.arange(0, task.n, task.bs)] = True # each batch has a window that is full
    return x,y,mask


# ---- the pipelines: how they are made

ways = st.builds(SimpleNamespace,
    time_dim=st.sampled_from([1, 0, -1]), module=st.sampled_from(['bare', 'stateful', 'unrolled']),
    loader=st.sampled_from(['list', 'torch', 'fastai', 'tbptt', 'of sequences', 'stream']), told=st.sampled_from(['counts', 'mask']),
    workers=st.sampled_from([0]*15+[2]), check=st.booleans())

def to_layout(o, time_dim): return {1: lambda: o, 0: lambda: o.transpose(0, 1), -1: lambda: o.movedim(1, -1)}[time_dim]()
def to_rows(o, time_dim): return {1: lambda: o, 0: lambda: o.transpose(0, 1), -1: lambda: o.movedim(-1, 1)}[time_dim]()

class Net(nn.Module):
    "A recurrent layer, bare, in a StatefulRNN, or as a loop over its cell, and an output; in any layout"
    def __init__(self, task, way):
        super().__init__()
        layer,cell = LAYERS[task.layer]
        self.first = way.time_dim==0 and way.module!='unrolled'
        torch.manual_seed(task.seed)
        rnn = layer(task.channels, 5, batch_first=not self.first).to(task.dtype)
        self.lin,self.time_dim = nn.Linear(5, task.outputs).to(task.dtype),way.time_dim
        if way.module=='unrolled':
            one = cell(task.channels, 5).to(task.dtype)
            one.load_state_dict({k.removesuffix('_l0'):o for k,o in rnn.state_dict().items()})
            rnn = Unroll(one)
        self.rnn = rnn if way.module=='bare' else StatefulRNN(rnn)

    def forward(self, x):
        if not self.first: x = to_rows(x, self.time_dim)
        out = self.rnn(x)
        out = self.lin(out[0] if isinstance(out, tuple) else out)
        return out if self.first else to_layout(out, self.time_dim)

def collate(time_dim):
    def f(items): return tuple(to_layout(torch.stack(o), time_dim) for o in zip(*items))
    return f

class Laid(torch.utils.data.Dataset):
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

def can_stream(task):
    "Rows of a stream begin together, and are as many in each step, as windows do and are"
    return task.n<=task.bs or task.missing=='none' and task.n%task.bs==0

def stream(task, way, x, y, mask):
    seqs = [list(o.numpy()) for o in (x, y)]
    if task.missing=='ends': seqs = [[o[:n] for o,n in zip(each, mask.sum(1))] for each in seqs]
    return StreamDL(Sequences(*seqs, dtype=task.dtype, check=False), bs=task.bs, sub_seq_len=min(task.sub, task.steps), time_dim=way.time_dim)

def loader(task, way, x, y, mask):
    if way.loader=='stream': return stream(task, way, x, y, mask)
    elements = [x, y, mask] if way.told=='mask' else [x, y]
    if way.loader=='list': return list(zip(*([to_layout(o, way.time_dim) for o in e.split(task.bs)] for e in elements)))
    if way.loader=='of sequences' and way.told!='mask':
        windows = SequenceWindows(list(x.numpy()), list(y.numpy()), dtype=task.dtype, check=False)
        return TbpttDL(windows, bs=task.bs, num_workers=0, time_dim=way.time_dim)
    items = Laid(list(zip(*elements)))
    if way.loader=='torch': return torch.utils.data.DataLoader(items, task.bs, collate_fn=collate(way.time_dim))
    cls = TbpttDL if way.loader=='tbptt' else TfmdDL
    kwargs = dict(time_dim=way.time_dim) if cls is TbpttDL else {}
    return cls(items, bs=task.bs, num_workers=way.workers, create_batch=collate(way.time_dim), **kwargs)

class Steps(Callback):
    order = 61
    def before_fit(self): self.losses = []
    def after_step(self): self.losses.append(self.learn.loss.item())

def run(task, way):
    "Two epochs; what came out of them"
    x,y,mask = data(task)
    if way.loader=='stream': way = SimpleNamespace(**{**vars(way), **(dict(told='counts') if can_stream(task) else dict(loader='list'))})
    counts = None
    if way.told=='mask': counts = lambda y,mask: mask if mask.ndim==2 else mask.any(1) # noqa
    elif task.missing!='none':
        y = torch.where(mask[...,None], y, torch.nan)
        axis = 1 if way.time_dim==-1 else -1
        counts = lambda y: ~y.isnan().any(axis) # noqa
    dls = DataLoaders(*(loader(task, way, x, y, mask) for _ in range(2)))
    dls.n_inp = 1
    loss_func = nn.MSELoss() if way.told!='mask' else lambda pred,y,mask: nn.functional.mse_loss(pred, y)
    def largest(pred, *yb): return (pred-yb[0]).abs().double().sum(-1).mean()
    steps = Steps()
    cb = TbpttResetCB(min(task.sub, task.steps), n_skip=min(task.n_skip, task.steps-1), time_dim=way.time_dim, counts=counts, check=way.check)
    learn = fit(Learner(dls, Net(task, way), loss_func=loss_func, opt_func=adam if task.dtype==torch.float64 else sgd, cbs=[cb, steps]), 2)
    losses = torch.tensor(steps.losses)
    with learn.no_bar(): preds = learn.get_preds(dl=dls.valid)[0]
    if way.loader!='stream':
        preds = (preds if way.time_dim>=0 else preds.movedim(-1, 1))
        preds = preds[mask] if task.missing=='ends' else preds.flatten(0, 1)
    return dict(losses=losses, values=torch.tensor(list(learn.recorder.values[-1])), preds=preds,
                params=torch.cat([learn.model.lin.weight.flatten(), *(o.flatten() for o in learn.model.rnn.parameters())]).detach())

@untaught_on_purpose
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
          phases=[Phase.explicit, Phase.generate])
@given(tasks, ways, ways)
def test_pipelines_that_mean_the_same_give_the_same(task, one, other):
    a,b = run(task, one),run(task, other)
    for name in a: torch.testing.assert_close(b[name], a[name], rtol=0, atol=TOL[task.dtype], msg=lambda m: f'{name}: {m}')
