"Time may be any axis of a batch: time first, channels first and batch first train, measure and predict the same"
from functools import partial
import matplotlib.pyplot as plt
import numpy as np
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
from helpers import fit, sgd, untaught_on_purpose
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, ScaledL1Loss, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.segment import Window
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.views import view_of
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.axis import from_rows, to_rows
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.training.parts import check_remembers
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
        assert o.shape==other.shape and torch.allclose(o, other, rtol=0, atol=max(tol, 1e-6) if name=='values' else tol), (name, o.shape, other.shape)
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

@untaught_on_purpose
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

@dims
@pytest.mark.parametrize('source', ['list', 'tbptt'])
@pytest.mark.parametrize('loss', [nn.MSELoss(), MSELossFlat()], ids=['of torch', 'flat'])
@pytest.mark.parametrize('n_skip', [0, 4])
def test_a_loss_for_each_window_and_the_inputs(source, loss, n_skip, dim):
    def asked(d):
        learn = trained(source, d, loss_func=loss, n_skip=n_skip)
        with learn.no_bar(): return learn.get_preds(dl=learn.dls.valid, with_loss=True, with_input=True, reorder=False)
    for i,(a,b) in enumerate(zip(asked(1), asked(dim))):
        b = to_rows(b, -1) if dim==-1 and i<3 else b
        # fastai brings targets to single precision
        assert a.shape==b.shape and torch.allclose(a, b, rtol=0, atol=1e-12 if type(loss) is nn.MSELoss else 1e-6)
        assert len(a)==10

@dims
@pytest.mark.parametrize('source', ['list', 'tbptt', 'stream'])
def test_gradient_accumulation(source, dim):
    known,other = (numbers(trained(source, d, cbs=[GradientAccumulation(8)])) for d in (1, dim))
    assert_same(known, other, dim)

@pytest.mark.parametrize('dim', [0, 1, -1])
@pytest.mark.parametrize('flat', [True, False])
def test_classes_at_every_step(flat, dim):
    x,y = signals()
    classes = (y[...,:1]>0).long()
    def loaders(d):
        if flat: return DataLoaders(*[StreamDL(Sequences([o[:n] for o,n in zip(x, [*range(20, 30)])], list(classes[i,:20+i,0] for i in range(10))),
                                               bs=BS, sub_seq_len=SUB, time_dim=d)]*2)
        put = lambda a, b: (from_rows(a, d), b[...,0] if d!=0 else b[...,0].t())
        return DataLoaders(*[[put(x[i:i+BS], classes[i:i+BS]) for i in range(0, 10, BS)]]*2)
    def loss(d): return CrossEntropyLossFlat() if flat or d!=-1 else nn.CrossEntropyLoss() # (batch, classes, time)
    def run(d): return trained('stream' if flat else 'list', d, partial(net, dtype=torch.float32 if flat else torch.float64),
                               loss_func=loss(d), loaders=loaders, metrics=False) # losses of fastai are in single precision
    a,b = run(1),run(dim)
    assert torch.allclose(torch.tensor(a.steps), torch.tensor(b.steps), rtol=0, atol=1e-6)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, rtol=0, atol=1e-6)

def test_a_ctc_loss_has_its_own_layout():
    class Ctc(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out = nn.LSTM(2, 5),nn.Linear(5, 4)
        def forward(self, x): return self.out(self.rnn(x)[0]).log_softmax(2)
    x,_ = signals(dtype=torch.float32)
    labels = torch.randint(1, 4, (10, 3), generator=torch.Generator().manual_seed(0))
    def loss(o, y): return nn.functional.ctc_loss(o, y, torch.full((len(y),), len(o)), torch.full((len(y),), 3))
    batches = [(x[i:i+BS].transpose(0, 1), labels[i:i+BS]) for i in range(0, 10, BS)]
    learn = Learner(DataLoaders(batches, batches), Ctc(), loss, cbs=TbpttResetCB(None, time_dim=0))
    fit(learn)
    with learn.no_bar(): preds,targs = learn.get_preds(dl=batches)
    assert preds.shape==(10, WIN, 4) and torch.equal(targs, labels)

class Dist(nn.Module):
    def __init__(self, dim, kind):
        super().__init__()
        self.net,self.kind = net(dim),kind
    def forward(self, x):
        o = self.net(x)
        if self.kind=='normal': return Normal(o, 1.)
        rows = to_rows(o, self.net.dim)
        # classes, or channels, are those of an event, and come last
        if self.kind=='independent': return Independent(Normal(rows.transpose(0, 1) if self.net.dim==0 else rows, 1.), 1)
        return Categorical(logits=rows.transpose(0, 1) if self.net.dim==0 else rows)

@dims
@pytest.mark.parametrize('kind', ['normal', 'independent', 'categorical'])
def test_a_washout_is_cut_from_distributions(kind, dim):
    x,y = signals()
    t = y if kind!='categorical' else (y[...,0]>0).double()
    def loaders(d):
        def at(o): return from_rows(o, d) if o.ndim>2 or d==0 else o
        return DataLoaders(*[[(at(x[i:i+BS]), at(t[i:i+BS])) for i in range(0, 10, BS)]]*2)
    def loss(o, y): return -o.log_prob(y).mean()
    def run(d):
        if kind=='independent' and d==-1: # an event has its channels last
            return trained('list', d, partial(Dist, kind='normal'), loss_func=lambda o, y: -2*o.log_prob(y).mean(), loaders=loaders, metrics=False, n_skip=4)
        return trained('list', d, partial(Dist, kind=kind), loss_func=loss, loaders=loaders, metrics=False, n_skip=4)
    a,b = run(1),run(dim)
    assert torch.allclose(torch.tensor(a.steps), torch.tensor(b.steps), rtol=0, atol=1e-12)

def arrays_loaders(d, n=1, **kwargs):
    set_seed(0)
    u = torch.randn(600, 2, dtype=torch.float64)
    y = torch.stack([u[:,0].cumsum(0).sin(), 30*u[:,1]], 1)[:,:n]
    return SequenceDataLoaders.from_arrays(u, y, win_sz=60, bs=3, sub_seq_len=20, dtype=torch.float64, time_dim=d, **kwargs)

@dims
@pytest.mark.parametrize('n', [1, 2])
def test_a_learner_that_makes_its_model(n, dim):
    def run(d):
        dls = arrays_loaders(d, n)
        set_seed(0)
        learn = RNNLearner(dls, hidden_size=4, metrics=fun_rmse)
        learn.add_cb(steps := Steps())
        learn.steps = steps.seen
        fit(learn, 2)
        assert isinstance(learn.loss_func, ScaledL1Loss if n==2 else nn.L1Loss)
        return learn
    a,b = run(1),run(dim)
    assert_same(numbers(a), numbers(b), dim)
    for learn in (a, b): # of one sequence, of many of unequal lengths
        x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with learn.no_bar():
            one = learn.get_preds(dl=learn.dls.test_dl(x))[0]
            many = learn.get_preds(dl=learn.dls.test_dl([x, x[:30]], as_stream=True))[0]
        one = to_rows(one, -1) if learn is b and dim==-1 else one
        assert one.shape==(1, 50, n) and many.shape==(80, n)
        if learn is a: first = one,many
        else: assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p,q in zip(first, (one,many)))

@dims
@pytest.mark.parametrize('equal', [True, False], ids=['windows', 'stream'])
def test_a_classifier_that_makes_its_model(equal, dim):
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(60 if equal else 50+i, 1, generator=g) for i in range(6)]
    ys = [(o.cumsum(0)[:,0]>0).numpy() for o in xs]
    ys = [['down','up'][int(v)] for o in ys for v in o]
    it = iter(ys)
    ys = [[next(it) for _ in o] for o in xs]
    ys = [np.array(o) for o in ys]
    def run(d):
        set_seed(0)
        dls = SequenceDataLoaders.from_arrays(xs, ys, valid=(xs, ys), bs=3, sub_seq_len=20, time_dim=d, **(dict(win_sz=60) if equal else {}))
        set_seed(0)
        learn = fit(RNNLearner(dls, hidden_size=4), 2)
        with learn.no_bar():
            preds,targs,decoded = learn.get_preds(with_decoded=True)
            one = learn.get_preds(dl=dls.test_dl(xs[0]))[0]
        if d==-1 and equal: preds,one = (to_rows(o, -1) for o in (preds, one))
        with learn.no_bar(): learn.show_results(max_n=1)
        plt.close('all')
        return preds,targs,decoded,one
    for a,b in zip(run(1), run(dim)): assert a.shape==b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)

@dims
@pytest.mark.parametrize('source', ['tbptt', 'stream'])
def test_pictures_show_the_same_curves(source, dim, monkeypatch):
    seen = []
    own = Sequences.plot
    def plot(self, x, y=None, pred=None, **kwargs):
        seen.append([None if o is None else torch.as_tensor(o).clone() for o in (x, y, pred)])
        return own(self, x, y, pred=pred, **kwargs)
    monkeypatch.setattr(Sequences, 'plot', plot)
    for d in (1, dim):
        learn = trained(source, d)
        learn.dls.valid.show_batch(max_n=2)
        with learn.no_bar(): learn.show_results(max_n=2)
    plt.close('all')
    assert len(seen)==4
    for a,b in zip(seen[:2], seen[2:]):
        for p,q in zip(a, b): assert p is None and q is None or p.shape==q.shape and torch.allclose(p, q, rtol=0, atol=1e-6)

@dims
def test_a_batch_that_is_shown_by_a_loader_of_items_has_its_rows(dim):
    a,b = (source_loaders('windows', d).train.show_batch(show=False, max_n=3) for d in (1, dim))
    for p,q in zip(a[2] if len(a)>2 else a, b[2] if len(b)>2 else b):
        for o,other in zip(p, q): # items are as they come
            assert torch.equal(torch.as_tensor(o), torch.as_tensor(other).t() if dim==-1 else torch.as_tensor(other))

def test_loaders_give_views_where_time_is_asked_for():
    for source in ('tbptt', 'stream'):
        a,b,c = (source_loaders(source, d).train for d in (1, 0, -1))
        for x,y,z in zip(a.sub_windows(), b.sub_windows(), c.sub_windows()):
            for o,p,q in zip(x, y, z):
                assert torch.equal(o, p.transpose(0, 1)) and torch.equal(o, q.transpose(1, 2))
                assert p._base is not None and q._base is not None
        assert torch.equal(a.one_batch()[0], b.one_batch()[0].transpose(0, 1))
        assert b.new().time_dim==0

def test_batch_transforms_see_rows_first():
    shapes = []
    def seen(b):
        shapes.append(b.shape[1]) # inputs and targets in turn
        return b
    dls = arrays_loaders(0, after_batch=seen)
    assert dls.train.one_batch()[0].shape==(60, 3, 2) and set(shapes)=={60}

@dims
def test_a_prediction_for_one_sequence(dim):
    "Also through a transform of batches, which is undone in what is returned"
    from fastai.data.transforms import Normalize
    def run(d):
        set_seed(0)
        norm = Normalize.from_stats(torch.tensor([1., 2.]), torch.tensor([3., 4.]), dim=2, ndim=3, cuda=False)
        learn = RNNLearner(arrays_loaders(d, 2, after_batch=[norm]), hidden_size=4)
        x = torch.randn(50, 2, dtype=torch.float64)
        with learn.no_bar(): return [x, *learn.predict(x, with_input=True)]
    a,b = run(1),run(dim)
    x = a[0].clone()
    for name,o,p in zip(('x', 'input', 'target', 'decoded', 'pred'), a, b):
        if name=='x': continue
        o,p = (torch.as_tensor(t) for t in (o, p))
        if dim==-1: p = p.t()
        assert o.shape==p.shape==(50, 2) and torch.allclose(o.double(), p.double(), rtol=0, atol=1e-6), name
        if name=='input': assert torch.allclose(o.double(), x, atol=1e-6)

def test_a_learner_makes_its_model_for_channels_first_items():
    def run(d):
        items = [(x.t().contiguous(), y.t().contiguous()) if d==-1 else (x, y) for x,y in zip(*signals())]
        dls = DataLoaders(*[torch.utils.data.DataLoader(items, 4, num_workers=0)]*2)
        set_seed(0)
        learn = RNNLearner(dls, hidden_size=4, sub_seq_len=SUB, time_dim=d, cbs=(steps := Steps()))
        return fit(learn),steps.seen
    (a,seen),(b,other) = run(1),run(-1)
    assert isinstance(a.loss_func, ScaledL1Loss)
    assert torch.allclose(torch.tensor(seen), torch.tensor(other), rtol=0, atol=1e-12)
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, rtol=0, atol=1e-12)

@dims
def test_instruments_measure_the_same(dim):
    from tbptt_fastai.instruments.adaptive import Adaptive
    from tbptt_fastai.instruments import diagnose, find # noqa
    def run(d, source):
        learn = trained(source, d)
        found = learn.tbptt_find(show=False, max_lag=6)
        learn.check_sub_windows()
        return torch.as_tensor(found.phi),torch.as_tensor(learn.check_memory_grads(steps=10)[['norm','share']].to_numpy().copy()),found.memory
    for source in ('list', 'tbptt', 'stream'):
        a,b = run(1, source),run(dim, source)
        for p,q in zip(a[:2], b[:2]): assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
        assert abs(a[2]/b[2]-1)<.5 # a copy more or less
    def adaptive(d): return TbpttResetCB(truncation=Adaptive(k_max=10, n_batches=2), time_dim=d)
    a,b = (trained('list', d, cb=adaptive) for d in (1, dim))
    assert_same(numbers(a), numbers(b), dim)

@dims
def test_a_search_of_the_learning_rate(dim):
    def run(d):
        learn = trained('list', d)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())
        return torch.tensor([float(o) for o in learn.recorder.losses])
    assert torch.allclose(run(1), run(dim), atol=1e-6)

@dims
@pytest.mark.parametrize('how', ['scale', 'recompute'])
@pytest.mark.parametrize('source', ['list', 'stream'])
def test_sub_windows_in_pieces(source, how, dim):
    from tbptt_fastai.truncation import schemes
    make = {'recompute': lambda: schemes.Exact(6), 'scale': lambda: schemes.Overlap(6, 18)}[how]
    def cb(d): return TbpttResetCB(truncation=make(), time_dim=None if source!='list' else d)
    loaders = partial(source_loaders, source, sub=None if how=='recompute' else 6)
    assert_same(*(numbers(trained(source, d, cb=cb, loaders=loaders)) for d in (1, dim)), dim)

@dims
def test_streams_of_chunks(dim):
    a,b = (StreamPredictor(trained('tbptt', d)) for d in (1, dim))
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    for chunk in (x[:,:3], x[:,3:9], x[:,9:]): assert torch.allclose(a(chunk), b(chunk), rtol=0, atol=1e-12)
    assert b(x[:,:3]).shape==(3, 3, 2)

@dims
def test_a_model_of_another_layout_is_not_written_to_onnx(dim):
    pytest.importorskip('onnx')
    from tbptt_fastai.deploy.onnx import to_onnx
    learn = RNNLearner(arrays_loaders(dim), hidden_size=4)
    for model in (learn, learn.model):
        with pytest.raises(NotImplementedError, match='time_dim='): to_onnx(model, '/dev/null', torch.zeros(1, 5, 2))

# ---- what is refused

def refused(match, dls, model, cb=None, error=ValueError, cbs=(), loss_func=None, **kwargs):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=match):
        fit(Learner(dls, model, loss_func or nn.MSELoss(), opt_func=sgd, cbs=[cb or TbpttResetCB(SUB, **kwargs), *cbs]))
    assert all(torch.equal(p, o) for p,o in zip(model.parameters(), before))

@pytest.mark.parametrize('value', [2, '0', 1.5, True])
def test_another_number_is_no_axis(value):
    for make in (lambda: TbpttResetCB(SUB, time_dim=value), lambda: arrays_loaders(value), lambda: view_of([], time_dim=value),
                 lambda: Window((torch.zeros(2, 3, 1),), 1, None, value)):
        with pytest.raises(ValueError, match='time_dim is .*expected 0 for'): make()

def test_loader_and_learner_say_the_same():
    refused('time_dim is 0 in the learner.*and -1 in a loader', source_loaders('tbptt', -1), net(0), time_dim=0)
    # sequences of ours are batch first, if nothing is said
    refused('time_dim is 0 in the learner.*and 1 in a loader', source_loaders('tbptt', None), net(0), time_dim=0)
    mixed = DataLoaders(source_loaders('tbptt', 0).train, source_loaders('tbptt', 1).valid)
    refused('time_dim is 0 in the learner.*and 1 in a loader', mixed, net(0), TbpttResetCB())
    learn = trained('tbptt', 0)
    with pytest.raises(ValueError, match='time_dim is 0 in the learner'), learn.no_bar(): learn.validate(dl=source_loaders('tbptt', 1).valid)

@pytest.mark.parametrize('cls', [TfmdDL, TbpttDL, partial(torch.utils.data.DataLoader)])
def test_items_that_are_put_together_in_front_are_no_time_first(cls):
    items = list(zip(*signals()))
    kw = dict(bs=4) if cls in (TfmdDL, TbpttDL) else dict(batch_size=4)
    refused("time_dim is 0.*items of shape .30, 2. are put together in front", DataLoaders(*[cls(items, num_workers=0, **kw)]*2), net(0), time_dim=0)

def test_what_may_or_may_not_have_a_time_axis_is_asked_for():
    x = torch.zeros(20, 20, 2)
    for dim,static in ((0, torch.zeros(20, 20)), (-1, torch.zeros(20, 2))):
        batch = x if dim==0 else torch.zeros(20, 3, 2)
        with pytest.raises(ValueError, match='Which elements have a time axis.*Say so by timed='): Window((batch, static, x), 2, None, dim)
        assert Window((batch, static, batch), 2, (True,False,True), dim).timed==[True,False,True]
    # rows of another number
    with pytest.raises(ValueError, match='Which elements have a time axis'): Window((torch.zeros(20, 4, 2), torch.zeros(20, 5)), 1, None, 0)
    # features of a batch that has as many rows as steps
    assert Window((x, torch.zeros(20, 3), x), 2, None, 0).timed==[True,False,True]
    # targets that are classes at every step
    assert Window((torch.zeros(4, 3, 20), torch.zeros(4, 20)), 1, None, -1).targets_timed==[True]
    assert Window((torch.zeros(20, 4, 3), torch.zeros(20, 4)), 1, None, 0).targets_timed==[True]

@pytest.mark.parametrize('bs', [4, 12, 30])
def test_time_first_data_without_a_word_has_its_remedy(bs):
    x,y = (o[:bs].transpose(0, 1) for o in signals(30))
    batches = [(x, y)]
    refused('time_dim=0', DataLoaders(batches, batches), net(0))

def test_channels_first_data_without_a_word_has_its_remedy():
    x,y = (o.transpose(1, 2) for o in signals())
    refused('time_dim=-1 for .batch, ..., time.', DataLoaders([(x, y)], [(x, y)]), net(-1))

@pytest.mark.parametrize('n', [4, 12, 30])
@pytest.mark.parametrize('stateful', [True, False])
def test_a_layer_that_takes_the_steps_for_the_batch_has_the_right_remedy(n, stateful):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            rnn = nn.LSTM(2, 4, batch_first=True)
            self.rnn,self.out = StatefulRNN(rnn) if stateful else rnn,nn.Linear(4, 2)
        def forward(self, x):
            o = self.rnn(x)
            return self.out(o if stateful else o[0])
    x,y = (o[:n].transpose(0, 1) for o in signals(30))
    refused('Use batch_first=False', DataLoaders([(x, y)], [(x, y)]), Wrong().double(), time_dim=0)

@dims
def test_a_layer_that_looks_ahead_and_a_model_without_memory_are_found(dim):
    class Ahead(Net):
        def forward(self, x): return super().forward(x+x.mean({0: 0, -1: -1}[self.dim], keepdim=True))
    class Forgets(Net):
        def forward(self, x): return super().forward(x)*0+(x if self.dim==0 else x)
    for cls,match in ((Ahead, 'gives other predictions'), (Forgets, 'remembers nothing')):
        refused(match, source_loaders('list', dim), cls(dim, stateful=True).double(), time_dim=dim)

@dims
def test_targets_at_another_rate_are_named(dim):
    x,y = signals()
    batches = [(from_rows(x, dim), from_rows(y[:,::2], dim))]
    refused('another number of steps', DataLoaders(batches, batches), net(dim), time_dim=dim)

@dims
def test_too_long_a_sub_window_is_refused(dim):
    for source in ('list', 'pytorch', 'windows', 'tbptt'):
        dls = source_loaders(source, dim, sub=None)
        refused('sub_seq_len is 31, but a window has 30 steps', dls, net(dim), TbpttResetCB(31, time_dim=dim))

def test_what_mixes_rows_would_mix_steps():
    refused('MixUp mixes along the first axis', source_loaders('list', 0), net(0), time_dim=0, cbs=[MixUp()])
    refused('MixUp mixes along the first axis', source_loaders('tbptt', 0), net(0), TbpttResetCB(), cbs=[MixUp()])

def test_text_is_batch_first():
    from tbptt_fastai.sequences.text import TextRows
    dl = StreamDL(TextRows('abcabcabcabc'*20, list('abc'), 4), bs=4, sub_seq_len=10, time_dim=0)
    dls = SequenceDataLoaders(dl, dl)
    with pytest.raises(ValueError, match='TextRNN reads'): RNNLearner(dls)

def test_a_stream_needs_predictions_for_every_step():
    with pytest.raises(TypeError, match=r'\(12, 4, ...\), not of shape'): trained('stream', 0, partial(net, last=True), check=False)

@pytest.mark.parametrize('dim,match', [(0, 'Use batch_first=False'), (1, 'Use batch_first=True, or .*time_dim=0'), (-1, 'move the time axis')])
def test_without_the_check_the_state_tells_that_a_layer_has_another_layout(dim, match):
    class Wrong(Net):
        def forward(self, x): # a layer that takes the steps for the batch
            o = self.rnn(to_rows(x, dim).transpose(0, 1) if self.rnn.batch_first else to_rows(x, dim))[0]
            o = self.out(o)
            return from_rows(o.transpose(0, 1) if self.rnn.batch_first else o, dim)
    model = Wrong(1 if dim==0 else 0).double()
    model.rnn = nn.LSTM(2, 5, batch_first=dim==0).double()
    refused(match, source_loaders('list', dim), model, TbpttResetCB(SUB, time_dim=dim, check=False))

@dims
def test_a_washout_of_windows_for_a_model_of_a_stream(dim):
    def run(d):
        learn = trained('stream', d, n_skip=5)
        x,y = signals()
        windows = TbpttDL(SequenceWindows(list(x), list(y), dtype=torch.float64), bs=BS, num_workers=0, time_dim=d)
        with learn.no_bar(), learn.no_logging(): return torch.tensor(list(learn.validate(dl=windows))),learn.get_preds(dl=windows)[0]
    (a,p),(b,q) = run(1),run(dim)
    assert p.shape==q.shape==(10, WIN, 2) and torch.allclose(p, q, rtol=0, atol=1e-12) and torch.allclose(a, b, atol=1e-6)

# what is checked of predictions, targets and channels, along the other axes

lists = pytest.mark.parametrize('source', ['list', 'pytorch', 'fastai'])
LOSSES = [nn.MSELoss(), MSELossFlat(), nn.HuberLoss(), lambda o, y: (o-y).abs().mean()]

class Strided(Net):
    "One prediction for so many steps"
    def __init__(self, dim, stride=2, **kwargs):
        super().__init__(dim, **kwargs)
        self.mix = nn.Conv1d(2, 3, stride, stride=stride)

def strided(dim, *args, **kwargs):
    torch.manual_seed(0)
    return Strided(dim, *args, **kwargs).double()

def rated(source, dim, rate, steps=WIN):
    x,y = (torch.cat([o, o], 1)[:,:steps] for o in signals())
    return source_loaders(source, dim, (x, y[:,::rate][:,:steps//rate].contiguous()))

@lists
@dims
@pytest.mark.parametrize('steps,sub', [(30, 12), (30, 10), (31, 10), (32, 8), (40, 20)])
def test_targets_of_a_layer_with_a_stride_are_for_whole_windows(steps, sub, dim, source):
    def data(d): return rated(source, d, 2, steps)
    for loss in LOSSES:
        refused('another number of steps', data(dim), strided(dim), TbpttResetCB(sub, time_dim=dim), loss_func=loss)
    def whole(d): return trained(None, d, strided, 1, lambda d: TbpttResetCB(None, time_dim=d), loaders=data)
    assert torch.allclose(torch.tensor(whole(dim).steps), torch.tensor(whole(1).steps), rtol=0, atol=1e-12)

@lists
@dims
def test_as_many_targets_as_a_sub_window_has_steps_are_not_those_of_its_steps(dim, source):
    "Every third of 30 steps: as many as a sub-window of 10, or the last of 20"
    for sub in (10, 20):
        for loss in LOSSES:
            cb = TbpttResetCB(sub, time_dim=dim)
            refused('10 steps of the last sub-window.*not for the same steps', rated(source, dim, 3), net(dim), cb, loss_func=loss)

@lists
@dims
def test_a_washout_of_targets_at_another_rate_is_refused(dim, source):
    for sub in (SUB, None):
        cb = TbpttResetCB(sub, n_skip=5, time_dim=dim)
        refused('n_skip is 5 steps of a window of 30', rated(source, dim, 2), strided(dim), cb)

@pytest.mark.parametrize('dim,right,wrong', [(0, [(1, 4, 2), (4, 5, 2), (5, 4)], [(15, 4, 1), (2, 4, 1)]),
                                             (-1, [(4, 2, 1), (4, 5)], [(4, 1, 15), (4, 2, 2)])])
def test_a_washout_leaves_targets_of_a_window_alone(dim, right, wrong):
    x = from_rows(torch.zeros(4, WIN, 2), dim)
    for shape in right: Window((x, torch.zeros(shape)), 1, None, dim).check_washout(5)
    for shape in wrong:
        with pytest.raises(ValueError, match='n_skip is 5'): Window((x, torch.zeros(shape)), 1, None, dim).check_washout(5)
        Window((x, torch.zeros(shape)), 1, (True,False), dim).check_washout(5)

@lists
@dims
def test_classes_at_another_rate(dim, source):
    def loaders(d, ignored=False):
        x,y = signals()
        y = (y[:,::2]>0).long().sum(2)
        if ignored: y[:,3] = -100
        return source_loaders(source, d, (x, y)) if d!=0 else DataLoaders(*[[(from_rows(x, 0), y.T)]]*2)
    axis = 1 if dim==-1 else -1
    for match,ignored in (('another number of steps', False), ('some count and some do not.*another number of steps', True)):
        cb = TbpttResetCB(SUB, time_dim=dim)
        refused(match, loaders(dim, ignored), strided(dim, n_out=3), cb, loss_func=CrossEntropyLossFlat(axis=axis))
    cb = TbpttResetCB(None, n_skip=5, time_dim=dim)
    refused('n_skip is 5 steps', loaders(dim), strided(dim, n_out=3), cb, loss_func=CrossEntropyLossFlat(axis=axis))

@dims
def test_what_is_said_to_have_a_time_axis_has_its_steps(dim):
    cb = TbpttResetCB(SUB, timed=(True,True), time_dim=dim)
    expected = {0: r'\(30, batch, ...\)', -1: r'\(batch, ..., 30\)'}[dim]
    refused(f'timed is .True, True., but an element has shape .*: expected {expected}', rated('list', dim, 2), strided(dim), cb)

@lists
@dims
def test_what_only_broadcasting_makes_fit_is_refused(dim, source):
    for n_out,columns in ((1, 2), (2, 1)):
        x,y = signals()
        dls = source_loaders(source, dim, (x, y[...,:columns]))
        for loss in (nn.MSELoss(), lambda o, y: (o-y).abs().mean()):
            refused('would compare each with every other', dls, net(dim, n_out=n_out), time_dim=dim, loss_func=loss)

class Pooled(Net):
    "What a head makes of all steps of a sub-window"
    def __init__(self, dim, pool, forgets=False, **kwargs):
        super().__init__(dim, stateful=True, **kwargs)
        self.pool,self.forgets = pool,forgets
    def forward(self, x):
        if self.forgets: self.rnn.reset()
        return self.pool(to_rows(super().forward(x), self.dim))

def pooled(*args, **kwargs):
    torch.manual_seed(0)
    return Pooled(*args, **kwargs).double()

def labelled(dim, bs=BS): return source_loaders('list', dim, (signals()[0], torch.arange(10)%2), bs)
LAST = lambda o: o[:,-1]

@dims
@pytest.mark.parametrize('pool', [lambda o: o.mean(1), lambda o: o.amax(1), lambda o: (o.softmax(1)*o).sum(1), lambda o: o[:,0]],
                         ids=['mean', 'maximum', 'attention', 'first'])
def test_a_head_along_time_is_refused(pool, dim):
    how = dict(time_dim=dim, loss_func=CrossEntropyLossFlat())
    refused('gives other predictions than in one piece', labelled(dim), pooled(dim, pool), **how)
    assert trained(None, dim, partial(pooled, pool=LAST), loaders=labelled, loss_func=CrossEntropyLossFlat(), metrics=False).steps

@dims
@pytest.mark.parametrize('n', [4, 12, 30])
def test_a_model_of_tokens_that_forgets_is_refused(n, dim):
    class Tokens(nn.Module):
        def __init__(self, forgets):
            super().__init__()
            self.embed,self.rnn = nn.Embedding(9, 2),Pooled(dim, LAST, forgets)
        def forward(self, x): return self.rnn(self.embed(x) if dim==0 else self.embed(x).transpose(1, 2))
    x = torch.randint(9, (n, WIN), generator=torch.Generator().manual_seed(0))
    x,y = (x.T if dim==0 else x),torch.arange(n)%2
    batches,timed = [(x, y)],(True,False)
    how = dict(loss_func=CrossEntropyLossFlat())
    refused('gives other predictions', DataLoaders(batches, batches), Tokens(True), TbpttResetCB(SUB, timed=timed, time_dim=dim), **how)
    for steps in (2, 12, WIN):
        window = Window(Window((x, y), 1, timed, dim).cut(0, steps)[:1], 1, None, dim)
        check_remembers(Tokens(False), window)
        with pytest.raises(ValueError, match='remembers nothing'): check_remembers(Tokens(True), window)
    set_seed(0)
    fit(Learner(DataLoaders(batches, batches), Tokens(False), opt_func=sgd, cbs=TbpttResetCB(SUB, timed=timed, time_dim=dim), **how), 1)

@dims
def test_other_outputs_beside_the_predictions_are_held_to_account(dim):
    class Two(Net):
        def forward(self, x): return (o:=super().forward(x)),o.mean(0 if dim==0 else -1)
    def loss(o, y): return nn.functional.mse_loss(o[0], y)
    refused('gives other predictions than in one piece', source_loaders('list', dim), Two(dim).double(), time_dim=dim, loss_func=loss)

@lists
@dims
def test_other_channels_are_refused_by_name(dim, source):
    "One is repeated by a model that scales by hand; more are an error of its layer"
    class Scales(Net):
        def forward(self, x): return super().forward(x*(torch.ones(2, 1) if dim==-1 else torch.ones(2)))
    learn = trained(source, dim, lambda d: Scales(d).double(), 1)
    def other(n): return source_loaders(source, dim, (signals()[0][...,:1].expand(-1, -1, n), signals()[1])).valid
    with learn.no_bar():
        for n in (1, 3):
            for f in (learn.validate, learn.get_preds):
                with pytest.raises(ValueError, match=rf'channels \[\({n},\)\], in training they had channels \[\(2,\)\]'): f(dl=other(n))
        learn.validate(dl=learn.dls.valid)

@dims
def test_a_recurrent_layer_that_is_given_other_channels_is_named(dim):
    class Bare(Net):
        def forward(self, x):
            o = self.out(self.rnn(x if dim==0 else x.transpose(1, 2))[0])
            return o if dim==0 else o.transpose(1, 2)
    with pytest.raises(ValueError, match=r'LSTM \(rnn\) is made for 3 channels, and was given 2'):
        trained('list', dim, lambda d: Bare(d).double())
    predictor = StreamPredictor(Bare(dim).double(), time_dim=dim)
    with pytest.raises(ValueError, match=r'LSTM \(rnn\) is made for 3 channels, and was given 2'): predictor(signals()[0])

@pytest.mark.parametrize('dim', [0, 1, -1])
def test_a_model_of_several_inputs_that_forgets_is_refused(dim):
    class Both(nn.Module):
        def __init__(self, forgets):
            super().__init__()
            self.net = pooled(dim, LAST, forgets)
        def forward(self, a, b): return self.net(a+b.sum(1 if dim==-1 else 2, keepdim=True))
    x = signals()[0]
    window = Window((from_rows(x, dim), from_rows(torch.cat([x, x[...,:1]], -1), dim)), 2, None, dim)
    check_remembers(Both(False), window)
    with pytest.raises(ValueError, match='remembers nothing'): check_remembers(Both(True), window)

@pytest.mark.parametrize('dim', [0, -1])
def test_a_block_is_laid_out_as_a_copy(dim):
    xs = [torch.randn(n, 2) for n in (9, 5)]
    dl = StreamDL(Sequences(xs, xs), bs=2, sub_seq_len=4, time_dim=dim)
    made = list(dl.layout(4))
    kept = [vars(o).copy() for o in made]
    for block,was in zip(made, kept):
        there = block.laid_out(dim)
        assert there.time_dim==dim and block.time_dim==1 and block.laid_out(1) is block and vars(block)==was
    view = dl.sub_windows()
    assert [view.segment.time_dim for _ in view]==[dim]*3
