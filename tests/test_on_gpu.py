"On a GPU: the same numbers as on the CPU, to rounding, by every loader and scheme; graphs, pinned copies and mixed precision too"
from functools import partial
import copy, warnings
import numpy as np, pytest, torch
from fastai.callback.fp16 import MixedPrecision # noqa: with it comes Learner.to_fp16
from fastai.callback.schedule import lr_find # noqa: a method of Learner
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, sgd
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.speed.ahead import pinned_ahead
from tbptt_fastai.speed.graphs import CudaGraphCB
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU is there')


@pytest.fixture(autouse=True)
def exact():
    "Matrix products in full precision"
    kept = torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32 = kept

def signals(n=1200, seed=0):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, 2)).astype(np.float32)
    return u,np.sin(u[:,:1].cumsum(0)*.3).astype(np.float32)

def unequal():
    u,y = signals()
    cuts = np.cumsum([170, 20, 460, 300, 120])
    return np.split(u, cuts)[:-1],np.split(y, cuts)[:-1]

class Net(nn.Module):
    def __init__(self, rnn, n_out=1):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.lin = rnn(),nn.Linear(6, n_out)
    def forward(self, x):
        out = self.rnn(x)
        return self.lin(out[0] if isinstance(out, tuple) else out)

def windows(device, **kwargs):
    set_seed(0)
    return SequenceDataLoaders.from_arrays(*signals(), **{**dict(win_sz=100, sub_seq_len=30, bs=4, device=device), **kwargs})

def streams(device, xy=None, **kwargs):
    set_seed(0)
    dls = [StreamDL(Sequences(*(xy or unequal()), check=False), bs=3, sub_seq_len=20, **kwargs) for _ in range(2)]
    return DataLoaders(*dls, device=torch.device(device))

def trained(make, n=2, **kwargs):
    "Losses, evaluation and parameters after a fit on the CPU and on the GPU"
    res = []
    for device in ('cpu','cuda'):
        learn = make(device)
        fit(learn, n, 1e-2, **kwargs)
        values = list(learn.recorder.values[-1])
        with learn.no_bar(): preds = learn.get_preds()[0]
        assert next(learn.model.parameters()).device.type==device
        res.append((values, preds.cpu(), [p.detach().cpu() for p in learn.model.parameters()]))
    return res

def assert_same(cpu, gpu, tol=2e-4):
    np.testing.assert_allclose(gpu[0], cpu[0], atol=tol)
    torch.testing.assert_close(gpu[1], cpu[1], rtol=0, atol=tol)
    for a,b in zip(cpu[2], gpu[2]): torch.testing.assert_close(b, a, rtol=0, atol=tol)

LAYERS = dict(lstm=lambda: StatefulRNN(nn.LSTM(2, 6, batch_first=True)), gru=lambda: StatefulRNN(nn.GRU(2, 6, batch_first=True)),
              bare=lambda: nn.LSTM(2, 6, batch_first=True), cell=lambda: StatefulRNN(Unroll(nn.GRUCell(2, 6))))

def learner(dls, rnn='lstm', cbs=(), loss_func=None, n_out=1, opt=sgd, **kwargs):
    return Learner(dls, Net(LAYERS[rnn], n_out), loss_func or nn.MSELoss(), opt_func=opt, cbs=[TbpttResetCB(**kwargs), *cbs])


@pytest.mark.parametrize('rnn', LAYERS)
@pytest.mark.parametrize('loaders', [windows, streams])
def test_layers(loaders, rnn):
    assert_same(*trained(lambda device: learner(loaders(device), rnn)))

@pytest.mark.parametrize('loaders', [windows, streams])
@pytest.mark.parametrize('kwargs', [dict(n_skip=7), dict(truncation=Overlap(10, 20)), dict(truncation=RandomUnbiased(20, block=5))], ids=['washout','overlap','unbiased'])
def test_washout_and_schemes(loaders, kwargs):
    assert_same(*trained(lambda device: learner(loaders(device), **copy.deepcopy(kwargs))))

@pytest.mark.parametrize('scheme', [Exact(20), Jittered(20)])
def test_schemes_of_windows(scheme):
    assert_same(*trained(lambda device: learner(windows(device, sub_seq_len=None), truncation=copy.deepcopy(scheme))))

@pytest.mark.parametrize('loaders', [windows, streams])
def test_targets_that_are_missing(loaders):
    def make(device):
        if loaders is windows:
            u,y = signals()
            y[::3] = y[330:480] = np.nan
            set_seed(0)
            dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, sub_seq_len=30, bs=4, check=False, device=device)
        else:
            xs,ys = unequal()
            for y in ys: y[:-1] = np.nan
            dls = streams(device, (xs, ys))
        return learner(dls, counts=lambda y: ~y.isnan())
    assert_same(*trained(make))

def test_classes_some_of_which_are_ignored():
    def make(device):
        xs,ys = unequal()
        labels = [np.where(np.arange(len(y))%3==0, (y[:,0]>0).astype(int), -100) for y in ys]
        return learner(streams(device, (xs, labels)), loss_func=CrossEntropyLossFlat(ignore_index=-100), n_out=2)
    assert_same(*trained(make))

@pytest.mark.parametrize('time_dim', [0, -1])
@pytest.mark.parametrize('stream', [False, True])
def test_time_elsewhere(stream, time_dim):
    class Moved(Net):
        def forward(self, x):
            x = x.transpose(0, 1) if time_dim==0 else x.movedim(-1, 1)
            out = super().forward(x)
            return out.transpose(0, 1) if time_dim==0 else out.movedim(1, -1)
    def make(device):
        dls = (streams if stream else windows)(device, time_dim=time_dim)
        return Learner(dls, Moved(LAYERS['lstm']), nn.MSELoss(), opt_func=sgd, cbs=TbpttResetCB())
    assert_same(*trained(make))

def test_evaluation_in_sub_windows():
    assert_same(*trained(lambda device: learner(windows(device), cbs=[SubWindowEvalCB(30)])))

def test_learners_of_the_factory():
    def make(device):
        learn = RNNLearner(windows(device), hidden_size=6)
        torch.manual_seed(1)
        for p in learn.model.parameters(): p.data = torch.randn(p.shape)*.2
        return learn
    assert_same(*trained(make), tol=2e-3)

def test_a_learning_rate_is_found_and_the_state_is_let_go():
    learn = learner(windows('cuda'))
    with learn.no_bar(), learn.no_logging(): res = learn.lr_find(num_it=30, show_plot=False)
    assert np.isfinite(res.valley) and learn.model.rnn.state is None


def steps_of(cbs=(), bs=4, dtype=None, **kwargs):
    learn = learner(windows('cuda', bs=bs, drop_last=True, **kwargs), cbs=cbs, opt=adam)
    if dtype is not None: learn.to_fp16() if dtype is torch.float16 else learn.to_bf16()
    return fit(learn, 3, 1e-2)

def test_cuda_graphs_train_the_same_model():
    graph = CudaGraphCB()
    plain,graphed = steps_of(),steps_of([graph])
    assert graph.n_replayed>0
    for p,q in zip(plain.model.parameters(), graphed.model.parameters()): torch.testing.assert_close(q, p, rtol=0, atol=2e-4)

def test_cuda_graphs_of_streams_and_missing_targets_run_as_they_are():
    for make in (lambda cbs: learner(streams('cuda'), cbs=cbs), lambda cbs: learner(windows('cuda'), cbs=cbs, counts=lambda y: y[...,0]>0)):
        plain,graphed = fit(make([]), 2, 1e-2),fit(make([CudaGraphCB()]), 2, 1e-2)
        for p,q in zip(plain.model.parameters(), graphed.model.parameters()): torch.testing.assert_close(q, p, rtol=0, atol=2e-4)

def test_batches_that_are_copied_ahead_are_the_same():
    plain,ahead = steps_of(),steps_of(ahead=pinned_ahead)
    for p,q in zip(plain.model.parameters(), ahead.model.parameters()): torch.testing.assert_close(q, p, rtol=0, atol=1e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_trains_about_the_same(dtype):
    plain,mixed = steps_of(),steps_of(dtype=dtype)
    assert abs(plain.recorder.values[-1][1]-mixed.recorder.values[-1][1])<.05
    assert all(p.dtype==torch.float32 for p in mixed.model.parameters())

def test_mixed_precision_on_a_stream():
    learn = learner(streams('cuda')).to_fp16()
    assert np.isfinite(fit(learn, 2, 1e-2).recorder.values[-1]).all()

def test_a_stream_of_chunks():
    model = Net(LAYERS['lstm'])
    x = torch.randn(3, 50, 2)
    with torch.no_grad(): whole = model.eval()(x)
    live = StreamPredictor(model.cuda())
    chunks = torch.cat([live(o.cuda()).cpu() for o in x.split(13, 1)], 1)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-5)
