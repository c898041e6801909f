"Modules that take one time step, and models that return their state: as loops by hand in plain PyTorch"
import copy, dataclasses, pickle
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, item_loaders
from reference import stream_by_hand, train_overlap, train_scheme_on_stream, train_tbptt
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import InitialState, StatefulRNN, first_state_of
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.truncation.schemes import Exact, Overlap

WIN,SUB,BS,LR = 30,12,4,1e-2 # sub-windows of 12, 12 and 6 steps
LENGTHS = [17,20,46,30,12,5,33]
mse = nn.functional.mse_loss

@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Cells

class Stack(nn.Module):
    "Two cells"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.LSTMCell(2, 5),nn.GRUCell(5, 6)
    def forward(self, x, state):
        a,b = (None,None) if state is None else state
        a = self.a(x, a)
        b = self.b(a[0], b)
        return b,(a,b)

class KnownStack(Stack):
    def initial_state(self, bs, device, dtype):
        h,c,b = (torch.zeros(bs, n, device=device, dtype=dtype) for n in (5,5,6))
        return (h,c),b

class DictCell(nn.Module):
    "A state in a dict, with a tensor of integers in it, that does not begin with zeros"
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(2+6, 6)
    def initial_state(self, bs, device, dtype):
        return dict(h=torch.full((bs,6), .3, device=device, dtype=dtype), age=torch.zeros(bs, device=device, dtype=torch.int64))
    def forward(self, x, state):
        h = torch.tanh(self.w(torch.cat([x, state['h']], -1)))*(1+.1*(state['age']%3)[:,None])
        return h,dict(age=state['age']+1, h=h)

class PairCell(nn.Module):
    "Another output than its state, and a first state that is learned"
    def __init__(self):
        super().__init__()
        self.w,self.out,self.h0 = nn.Linear(2+4, 4),nn.Linear(4, 6),nn.Parameter(torch.full((4,), .2))
    def init_hidden(self, batch_size): return self.h0.expand(batch_size, 4)
    def forward(self, x, h):
        h = torch.tanh(self.w(torch.cat([x, h], -1)))
        return self.out(h),h

class Broadcast(nn.Module):
    "As written for one sequence: its memory knows no batch"
    def __init__(self):
        super().__init__()
        self.w,self.read = nn.Parameter(torch.randn(2, 5)*.3),nn.Linear(5, 6)
    def init_memory(self): return torch.linspace(-.5, .5, 5)
    def forward(self, features, memory):
        memory = .8*memory+features@self.w
        return self.read(memory).tanh(),memory

class ByHand(nn.Module):
    "A loop over steps"
    def __init__(self, cell):
        super().__init__()
        self.cell = cell
    def first(self, bs):
        if hasattr(self.cell, 'initial_state'): return self.cell.initial_state(bs, 'cpu', torch.float64)
        if hasattr(self.cell, 'init_hidden'): return self.cell.init_hidden(bs)
        return self.cell.init_memory() if hasattr(self.cell, 'init_memory') else None
    def forward(self, x, state=None):
        outs = []
        if state is None: state = self.first(len(x))
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell): out,_ = state = self.cell(x[:,t], state)
            elif isinstance(self.cell, nn.RNNCellBase): out = state = self.cell(x[:,t], state)
            else: out,state = self.cell(x[:,t], state)
            outs.append(out)
        return torch.stack(outs, 1),state

CELLS = dict(lstm=lambda: nn.LSTMCell(2, 6), gru=lambda: nn.GRUCell(2, 6), rnn=lambda: nn.RNNCell(2, 6), relu=lambda: nn.RNNCell(2, 6, nonlinearity='relu'),
    stack=KnownStack, dict=DictCell, pair=PairCell, broadcast=Broadcast)
WITHOUT_FIRST = {'a stack that begins with None': Stack}
all_cells = pytest.mark.parametrize('kind', CELLS)

def cell_and_head(kind):
    torch.manual_seed(0)
    return {**CELLS, **WITHOUT_FIRST}[kind](),nn.Linear(6, 1)

def unrolled(cell, head): return nn.Sequential(StatefulRNN(Unroll(copy.deepcopy(cell))), copy.deepcopy(head))

def by_hand(cell, head): return ByHand(copy.deepcopy(cell)),copy.deepcopy(head)

def same(model, *expected):
    ours,theirs = list(model.parameters()),[p for m in expected for p in m.parameters()]
    assert len(ours)==len(theirs)
    for a,b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    return model

def windows(n=10):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, WIN, 2, generator=g)
    return x,torch.cumsum(x[...,:1]*.3, 1).sin()

def window_loaders(sub_seq_len=SUB, n=10): return item_loaders(list(zip(*windows(n))), 3, BS, TbpttDL, shuffle=False, sub_seq_len=sub_seq_len)
def batches(n=10): return [list(range(i, min(i+BS, n))) for i in range(0, n, BS)]

def sequences():
    g = torch.Generator().manual_seed(2)
    xs = [torch.randn(n, 2, generator=g) for n in LENGTHS]
    return xs,[torch.cumsum(x[:,:1]*.3, 0).sin() for x in xs]

def stream_loaders(sub_seq_len=7):
    kw = dict(dtype=torch.float64)
    return DataLoaders(*[StreamDL(Sequences(*sequences(), **kw), bs=3, sub_seq_len=sub_seq_len, shuffle=False) for _ in range(2)])

def trained(dls, model, fits=(1,), **kwargs):
    "... and evaluated in between"
    learn = TbpttLearner(dls, model, loss_func=nn.MSELoss(), opt_func=adam, lr=LR, **kwargs)
    for n in fits:
        fit(learn, n, LR)
        with learn.no_bar(): learn.validate()
    return learn

def on_stream(rnn, head, runs, weigh, n_epoch, size=7, opt=None, n_skip=0):
    opt = opt or torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=LR)
    for _ in range(n_epoch): train_scheme_on_stream(rnn, head, *sequences(), 3, size, runs, opt, mse, weigh, n_skip)


# Trained as by hand

@pytest.mark.parametrize('kind', [*CELLS, *WITHOUT_FIRST])
@pytest.mark.parametrize('n_skip', [0, 5, 14])
def test_windows_train_as_by_hand(kind, n_skip):
    cell,head = cell_and_head(kind)
    learn = trained(window_loaders(), unrolled(cell, head), (1,2), n_skip=n_skip)
    rnn,hand = by_hand(cell, head)
    train_tbptt(rnn, hand, *windows(), [batches()]*3, SUB, LR, mse, n_skip)
    same(learn.model, rnn, hand)
    x,y = windows()
    with torch.no_grad(), learn.no_bar():
        assert learn.validate()[0]==pytest.approx(mse(hand(rnn(x[:3])[0])[:,n_skip:], y[:3,n_skip:]).item(), rel=1e-6)

@all_cells
@pytest.mark.parametrize('n_skip', [0, 4])
def test_rows_of_a_stream_that_begin_at_different_times_train_as_by_hand(kind, n_skip):
    cell,head = cell_and_head(kind)
    learn = trained(stream_loaders(), unrolled(cell, head), (1,1), n_skip=n_skip)
    rnn,hand = by_hand(cell, head)
    steps = stream_by_hand(LENGTHS, 3, 7, range(len(LENGTHS)))
    assert any(len({p and p[1]==0 for p in step})>1 for step in steps[1:])
    runs = [(k, k+1, k, k+1, {}) for k in range(len(steps))]
    on_stream(rnn, hand, runs, lambda run,n,rows: n/(7*rows), 2, n_skip=n_skip)
    same(learn.model, rnn, hand)
    with torch.no_grad(), learn.no_bar():
        errors = torch.cat([(hand(rnn(x[None])[0])[0]-y)[n_skip:] for x,y in zip(*sequences())])
        assert learn.validate()[0]==pytest.approx(errors.square().mean().item(), rel=1e-6)

@all_cells
@pytest.mark.parametrize('losses', ['last', 'all'])
def test_overlap_trains_windows_as_by_hand(kind, losses):
    cell,head = cell_and_head(kind)
    learn = trained(window_loaders(), unrolled(cell, head), (2,), truncation=Overlap(5, 15, losses))
    rnn,hand = by_hand(cell, head)
    opt = torch.optim.Adam([*rnn.parameters(), *hand.parameters()], lr=LR)
    train_overlap(rnn, hand, *windows(), [batches()]*2, 5, 15, opt, mse, losses)
    same(learn.model, rnn, hand)

@all_cells
def test_exact_trains_windows_as_full_backpropagation_by_hand(kind):
    cell,head = cell_and_head(kind)
    learn = trained(window_loaders(), unrolled(cell, head), (2,), truncation=Exact(SUB))
    rnn,hand = by_hand(cell, head)
    train_tbptt(rnn, hand, *windows(), [batches()]*2, WIN, LR, mse)
    same(learn.model, rnn, hand)

def test_two_cells_in_turn_train_as_by_hand():
    torch.manual_seed(0)
    a,b,head = nn.LSTMCell(2, 5),nn.GRUCell(5, 6),nn.Linear(6, 1)
    stacked = Stack()
    stacked.a,stacked.b = copy.deepcopy(a),copy.deepcopy(b)
    learn = trained(window_loaders(), nn.Sequential(*[StatefulRNN(Unroll(o)) for o in (a,b)], copy.deepcopy(head)))
    rnn = ByHand(stacked)
    train_tbptt(rnn, head, *windows(), [batches()], SUB, LR, mse)
    same(learn.model, rnn, head)

LAYERS = dict(lstm=nn.LSTM, gru=nn.GRU, rnn=nn.RNN)

@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('data', [window_loaders, stream_loaders])
def test_a_cell_trains_as_the_layer_with_its_weights(kind, data):
    cell,head = cell_and_head(kind)
    layer = LAYERS[kind](2, 6, batch_first=True)
    layer.load_state_dict({f'{name}_l0':o for name,o in cell.state_dict().items()})
    learn = trained(data(), unrolled(cell, head), (2,))
    other = trained(data(), nn.Sequential(StatefulRNN(layer), copy.deepcopy(head)), (2,))
    same(learn.model, other.model)
    np.testing.assert_allclose(learn.recorder.values, other.recorder.values, rtol=1e-5)

def test_a_plain_learner_trains_the_same():
    cell,head = cell_and_head('lstm')
    learn = Learner(window_loaders(), unrolled(cell, head), nn.MSELoss(), adam, cbs=TbpttResetCB(SUB))
    same(fit(learn, 2, LR).model, trained(window_loaders(), unrolled(cell, head), (2,)).model)
