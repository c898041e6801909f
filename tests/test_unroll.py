"Modules that take one time step, and models that return their state: as loops by hand in plain PyTorch"
import copy, dataclasses, pickle
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from torch import nn
from helpers import adam, fit, item_loaders, untaught_on_purpose
from reference import stream_by_hand, train_overlap, train_scheme_on_stream, train_tbptt
from torch._dynamo.testing import CompileCounter # counts graphs, and needs no compiler
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
    x = torch.randn(10, WIN, 2, generator=g)[:n]
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

@untaught_on_purpose
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


# A memory that takes one step, as it is written for one sequence at a time

class MemoryModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_write = nn.Parameter(torch.randn(3, 6)*.3)  # This needs gradients!

    def write(self, memory, value):
        # Write operation must be in graph when backward() called
        delta = torch.matmul(value, self.W_write)
        return memory + delta  # Keep attached!

class MemoryModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory,self.value,self.head = MemoryModule(),nn.Linear(2, 3),nn.Linear(6, 1)

    def init_memory(self): return torch.zeros(6)

    def forward(self, features, memory):
        memory = self.memory.write(memory, self.value(features))
        return self.head(memory),memory

class TBPTTMemoryTrainer:
    def __init__(self, model, tbptt_chunk_size=16):
        self.model = model
        self.chunk_size = tbptt_chunk_size

    def train_epoch(self, dataset):
        for ticker_data in dataset:
            # Reset memory for each ticker
            memory = self.model.init_memory()

            losses = []
            for i, (features, target) in enumerate(ticker_data):
                # Forward with memory update
                output, memory = self.model(features, memory)
                loss = self.criterion(output, target)
                losses.append(loss)

                # TBPTT: backward at chunk boundaries
                if (i + 1) % self.chunk_size == 0:
                    total_loss = sum(losses)
                    total_loss.backward()
                    self.optimizer.step()
                    self.optimizer.zero_grad()

                    # Detach memory for next chunk
                    memory = memory.detach()
                    losses = []

            # Handle remaining steps
            if losses:
                sum(losses).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

def memory_loaders(kind, bs):
    if kind=='windows': return item_loaders(list(zip(*windows())), 3, bs, TbpttDL, shuffle=False, sub_seq_len=SUB)
    return DataLoaders(*[StreamDL(Sequences(*sequences(), dtype=torch.float64), bs=bs, sub_seq_len=SUB, shuffle=False) for _ in range(2)])

@pytest.mark.parametrize('kind', ['windows', 'stream'])
def test_a_memory_trains_as_its_own_trainer_does(kind):
    "One sequence after the other, the loss a sum over steps"
    torch.manual_seed(0)
    model = MemoryModel()
    ours = StatefulRNN(Unroll(copy.deepcopy(model)))
    learn = TbpttLearner(memory_loaders(kind, 1), ours, loss_func=nn.MSELoss(reduction='sum'), opt_func=adam)
    fit(fit(learn, 1, LR), 1, LR)
    trainer = TBPTTMemoryTrainer(model, SUB)
    trainer.optimizer,trainer.criterion = torch.optim.Adam(model.parameters(), lr=LR),nn.MSELoss()
    dataset = [list(zip(x, y)) for x,y in zip(*(windows() if kind=='windows' else sequences()))]
    for _ in range(2): trainer.train_epoch(dataset)
    same(learn.model, model)

def test_a_memory_trains_on_batches_as_by_hand():
    torch.manual_seed(0)
    model = MemoryModel()
    learn = TbpttLearner(memory_loaders('windows', BS), StatefulRNN(Unroll(copy.deepcopy(model))), loss_func=nn.MSELoss(), opt_func=adam)
    train_tbptt(ByHand(model), nn.Identity(), *windows(), [batches()]*2, SUB, LR, mse)
    same(fit(learn, 2, LR).model, model)


# Models that return their state, as they are written

class CharRNN(nn.Module):
    def __init__(self, vocab_size, embed_size, hidden_size, num_layers):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_layers = num_layers

        # Embedding layer
        self.embedding = nn.Embedding(vocab_size, embed_size)

        # LSTM (better than simple RNN)
        self.lstm = nn.LSTM(
            embed_size, hidden_size, num_layers,
            batch_first=True, dropout=0.2
        )

        # Output layer
        self.fc = nn.Linear(hidden_size, vocab_size)

    def forward(self, x, hidden=None):
        # x: [batch, seq_len]
        x = self.embedding(x)  # [batch, seq_len, embed_size]

        # LSTM forward
        output, hidden = self.lstm(x, hidden)
        # output: [batch, seq_len, hidden_size]

        # Decode
        output = self.fc(output)
        # output: [batch, seq_len, vocab_size]

        return output, hidden

    def init_hidden(self, batch_size):
        # LSTM has two hidden states (h and c)
        h = torch.zeros(self.num_layers, batch_size, self.hidden_size)
        c = torch.zeros(self.num_layers, batch_size, self.hidden_size)
        return (h, c)

def train_epoch(model, dataloader, criterion, optimizer, chunk_size=50):
    model.train()
    total_loss = 0
    hidden = None

    for batch_idx, (data, targets) in enumerate(dataloader):
        # data: [batch, seq_len]
        batch_size, seq_len = data.shape

        # Process in chunks
        for i in range(0, seq_len, chunk_size):
            # Get chunk
            chunk_end = min(i + chunk_size, seq_len)
            data_chunk = data[:, i:chunk_end]
            target_chunk = targets[:, i:chunk_end]

            # Detach hidden state
            if hidden is not None:
                hidden = tuple(h.detach() for h in hidden)
            else:
                hidden = model.init_hidden(batch_size)

            # Forward pass
            optimizer.zero_grad()
            output, hidden = model(data_chunk, hidden)

            # Reshape for loss computation
            output = output.reshape(-1, output.size(-1))
            target_chunk = target_chunk.reshape(-1)

            # Compute loss
            loss = criterion(output, target_chunk)

            # Backward pass
            loss.backward()

            # Gradient clipping (IMPORTANT!)
            torch.nn.utils.clip_grad_norm_(
                model.parameters(), max_norm=1.0
            )

            # Update weights
            optimizer.step()

            total_loss += loss.item()

    return total_loss / len(dataloader)

class SimpleRNN(nn.Module):
    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.hidden_size = hidden_size

        # Weight matrices
        self.W_xh = nn.Parameter(torch.randn(hidden_size, input_size) * 0.01)
        self.W_hh = nn.Parameter(torch.randn(hidden_size, hidden_size) * 0.01)
        self.W_hy = nn.Parameter(torch.randn(output_size, hidden_size) * 0.01)

        self.b_h = nn.Parameter(torch.zeros(hidden_size))
        self.b_y = nn.Parameter(torch.zeros(output_size))

    def forward(self, x, h_prev=None):
        """
        x: [seq_len, batch_size, input_size]
        """
        seq_len, batch_size, _ = x.shape

        if h_prev is None:
            h = torch.zeros(batch_size, self.hidden_size)
        else:
            h = h_prev

        outputs = []

        # Forward pass through time
        for t in range(seq_len):
            # h_t = tanh(W_hh @ h_{t-1} + W_xh @ x_t + b_h)
            z = h @ self.W_hh.T + x[t] @ self.W_xh.T + self.b_h
            h = torch.tanh(z)

            # y_t = W_hy @ h_t + b_y
            y = h @ self.W_hy.T + self.b_y

            outputs.append(y)

        # Stack outputs: [seq_len, batch_size, output_size]
        return torch.stack(outputs, dim=0), h

class TruncatedBPTTModel(nn.Module):
    def __init__(self, input_size, hidden_size, output_size):
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size, batch_first=False)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x, hidden=None):
        output, hidden = self.rnn(x, hidden)
        output = self.fc(output)
        return output, hidden

criterion = nn.CrossEntropyLoss()

def truncated_bptt(model, sequence, targets, chunk_size, optimizer):
    seq_len = sequence.shape[0]
    hidden = None  # Initial hidden state

    total_loss = 0
    num_chunks = 0

    # Process sequence in chunks
    for i in range(0, seq_len, chunk_size):
        # Get chunk
        chunk_end = min(i + chunk_size, seq_len)
        x_chunk = sequence[i:chunk_end]
        y_chunk = targets[i:chunk_end]

        # Forward pass through chunk
        optimizer.zero_grad()

        if hidden is not None:
            hidden = hidden.detach()  # Detach from previous chunk!

        outputs, hidden = model(x_chunk, hidden)

        # Compute loss for chunk
        loss = 0
        for t in range(len(x_chunk)):
            loss += criterion(outputs[t], y_chunk[t])
        loss = loss / len(x_chunk)

        # Backward pass (only through this chunk!)
        loss.backward()

        # Update weights
        optimizer.step()

        total_loss += loss.item()
        num_chunks += 1

    return total_loss / num_chunks

class TimeFirst(nn.Module):
    "Batch first outside, time first inside"
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
    def forward(self, x): return self.rnn(x.transpose(0, 1)).transpose(0, 1)

VOCAB,STEPS,N_EPOCH = 7,60,3
def flat_loss(pred, y): return nn.functional.cross_entropy(pred.flatten(0, -2), y.flatten()) # fastai's is in single precision
tokens = dict(loss_func=flat_loss, opt_func=adam, metrics=accuracy)

def token_items(n=4):
    g = torch.Generator().manual_seed(3)
    text = torch.randint(0, VOCAB, (n, STEPS+1), generator=g)
    return [(o[:-1], o[1:]) for o in text]

def label_items(n=4):
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(STEPS, 3, generator=g), torch.randint(0, 5, (STEPS,), generator=g)) for _ in range(n)]

def together(items): return [torch.stack(o) for o in zip(*items)]

class Seed(Callback):
    "The random numbers of an epoch's steps begin with its number; the loaders draw some before"
    order = 70
    def before_train(self): self.begun = False
    def before_batch(self):
        if self.training and not self.begun: torch.manual_seed(self.epoch)
        self.begun = True

def test_a_language_model_trains_as_its_own_loop_does():
    "Its dropout draws the same numbers; its training function carries the state from batch to batch, so there is one"
    torch.manual_seed(0)
    model = CharRNN(VOCAB, 4, 6, 2)
    dls,ours = item_loaders(token_items(), 2, cls=TbpttDL, shuffle=False, sub_seq_len=20),StatefulRNN(copy.deepcopy(model), batch_dim=1)
    learn = TbpttLearner(dls, ours, grad_clip=1., cbs=Seed(), **tokens)
    fit(learn, N_EPOCH, LR)
    opt,data = torch.optim.Adam(model.parameters(), lr=LR),together(token_items())
    for epoch in range(N_EPOCH):
        torch.manual_seed(epoch)
        train_epoch(model, [data], nn.CrossEntropyLoss(), opt, 20)
    same(learn.model, model)
    x,y = together(token_items(2))
    with torch.no_grad(): assert learn.recorder.values[-1][-1]==pytest.approx((model.eval()(x)[0].argmax(-1)==y).double().mean().item())

@pytest.mark.parametrize('make,batch_dim', [(SimpleRNN, 0), (TruncatedBPTTModel, 1)])
def test_a_model_written_time_first_trains_as_its_own_loop_does(make, batch_dim):
    torch.manual_seed(0)
    model = make(3, 6, 5)
    ours = TimeFirst(StatefulRNN(copy.deepcopy(model), batch_dim=batch_dim, batch_first=False))
    learn = TbpttLearner(item_loaders(label_items(), 2, cls=TbpttDL, shuffle=False, sub_seq_len=20), ours, **tokens)
    fit(learn, N_EPOCH, LR)
    opt,(x,y) = torch.optim.Adam(model.parameters(), lr=LR),together(label_items())
    for _ in range(N_EPOCH): truncated_bptt(model, x.transpose(0, 1), y.transpose(0, 1), 20, opt)
    same(learn.model, model)
    with torch.no_grad(): pred = model(x[:2].transpose(0, 1))[0].transpose(0, 1)
    assert learn.recorder.values[-1][-1]==pytest.approx((pred.argmax(-1)==y[:2]).double().mean().item())

def test_an_init_hidden_lets_rows_of_a_stream_begin_at_different_times():
    "As each sequence alone, in evaluation; and in training as a stream of the layers in the model"
    torch.manual_seed(0)
    model,g = CharRNN(VOCAB, 4, 6, 2),torch.Generator().manual_seed(4)
    model.lstm.dropout = 0.
    texts = [torch.randint(0, VOCAB, (n+1,), generator=g) for n in LENGTHS]
    xs,ys = [o[:-1] for o in texts],[o[1:] for o in texts]
    def dls(): return DataLoaders(*[StreamDL(Sequences(xs, ys), bs=3, sub_seq_len=7, shuffle=False) for _ in range(2)])
    class Alone(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.embedding,self.lstm,self.fc = m.embedding,StatefulRNN(m.lstm),m.fc
        def forward(self, x): return self.fc(self.lstm(self.embedding(x)))
    learn = fit(TbpttLearner(dls(), StatefulRNN(copy.deepcopy(model), batch_dim=1), **tokens), 2, LR)
    other = fit(TbpttLearner(dls(), Alone(copy.deepcopy(model)), **tokens), 2, LR)
    same(learn.model, other.model)
    model = learn.model.rnn.eval()
    with torch.no_grad(): losses = torch.cat([nn.functional.cross_entropy(model(x[None])[0][0], y, reduction='none') for x,y in zip(xs, ys)])
    with learn.no_bar(): assert learn.validate()[0]==pytest.approx(losses.mean().item(), rel=1e-6)


# A model that returns its state, and is not wrapped

UNWRAPPED = dict(
    language=(lambda: CharRNN(VOCAB, 4, 6, 2), token_items,
        r'CharRNN returned a tuple \(\(4, 20, 7\), \(\(2, 4, 6\), \(2, 4, 6\)\)\).*StatefulRNN\(CharRNN\(...\), batch_dim=1\) carries it'),
    layer=(lambda: nn.LSTM(3, 5, batch_first=True), label_items, r'LSTM returned a tuple .*StatefulRNN\(LSTM\(...\)\) carries it'),
)

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.head = nn.GRU(3, 5, batch_first=True),nn.Linear(5, 5)
    def forward(self, x):
        h = self.rnn(x)[0]
        return self.head(h),h

UNWRAPPED['two heads'] = TwoHeads,label_items,'TwoHeads returned a tuple .*Return predictions alone, or give a loss that takes the tuple'

@pytest.mark.parametrize('kind', UNWRAPPED)
@pytest.mark.parametrize('make', [TbpttLearner, lambda dls, model, **kwargs: Learner(dls, model, cbs=TbpttResetCB(20), **kwargs)])
def test_a_state_beside_the_predictions_is_refused_before_the_first_step_with_the_remedy(kind, make):
    model,items,message = UNWRAPPED[kind]
    learn = make(item_loaders(items(), 2, cls=TbpttDL, shuffle=False, sub_seq_len=20), model(), **tokens)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(TypeError, match=message): fit(learn)
    for name,o in learn.model.state_dict().items(): assert torch.equal(o, before[name])
    with pytest.raises(TypeError, match=message.split(r' \(')[0]), learn.no_bar(): learn.validate()

def test_it_is_refused_on_a_stream():
    learn = TbpttLearner(stream_loaders(), nn.LSTM(2, 1, batch_first=True), loss_func=nn.MSELoss())
    with pytest.raises(TypeError, match=r'StatefulRNN\(LSTM\(...\)\) carries it'): fit(learn)

def test_a_model_that_keeps_its_own_loop_is_told_how_to_carry():
    "No layer of torch.nn in it"
    with pytest.raises(ValueError, match='Wrap its module with a state in StatefulRNN'):
        TbpttLearner(item_loaders(label_items(), 2, cls=TbpttDL, sub_seq_len=20), SimpleRNN(3, 6, 5), **tokens)

def test_a_loss_that_takes_the_tuple_trains_as_the_wrapped_model():
    torch.manual_seed(0)
    model = CharRNN(VOCAB, 4, 6, 2)
    model.lstm.dropout = 0.
    def dls(): return item_loaders(token_items(), 2, cls=TbpttDL, shuffle=False, sub_seq_len=20)
    kw = dict(opt_func=adam, loss_func=lambda pred,y: flat_loss(pred[0], y))
    learn = fit(TbpttLearner(dls(), copy.deepcopy(model), **kw), 2, LR)
    same(learn.model, fit(TbpttLearner(dls(), StatefulRNN(model, batch_dim=1), **tokens), 2, LR).model)


# A cell in a loop of the model's own

class Loop(nn.Module):
    "Each sub-window begins with zeros"
    def __init__(self, layer=True, cell=nn.LSTMCell):
        super().__init__()
        self.rnn = nn.LSTM(2, 2, batch_first=True) if layer else None
        self.cell,self.o = cell(2, 6),nn.Linear(6, 1)
    def forward(self, x):
        if self.rnn is not None: x = self.rnn(x)[0]
        state,outs = None,[]
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return self.o(torch.stack(outs, 1))

@pytest.mark.parametrize('cell', [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize('layer', [False, True])
@pytest.mark.parametrize('data', [window_loaders, stream_loaders])
def test_a_loop_over_cells_is_refused_and_unroll_is_named(cell, layer, data):
    with pytest.raises(ValueError, match=rf'{cell.__name__} \(cell\) is carried by StatefulRNN\(Unroll\({cell.__name__}\(...\)\)\)'):
        fit(TbpttLearner(data(), Loop(layer, cell), loss_func=nn.MSELoss(), opt_func=adam))

def test_unroll_is_not_named_where_no_cell_is_loose():
    look_ahead = nn.Sequential(StatefulRNN(Unroll(nn.GRUCell(2, 6))), Mean(), nn.Linear(6, 1))
    with pytest.raises(ValueError, match='It looks ahead') as e: fit(TbpttLearner(window_loaders(), look_ahead, loss_func=nn.MSELoss()))
    assert 'Unroll' not in str(e.value)

class Mean(nn.Module):
    def forward(self, x): return x-x.mean(1, keepdim=True)

@pytest.mark.parametrize('cell', [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_that_is_not_unrolled_is_refused(cell):
    with pytest.raises(TypeError, match=rf'{cell.__name__} takes one time step.*StatefulRNN\(Unroll\({cell.__name__}'): StatefulRNN(cell(2, 6))


# Inputs, outputs and first states

def test_inputs_and_outputs_of_any_nesting():
    class Cell(nn.Module):
        def forward(self, x, state):
            a,(b,c) = x['a'],x['more']
            state = (0 if state is None else state)+a*b[:,None]
            return dict(sum=state, pair=(state*c, (a.sum(), len(a), None))),state
    g = torch.Generator().manual_seed(5)
    a,b,c = torch.randn(4, 9, 3, generator=g),torch.randn(4, 9, generator=g),torch.randn(4, 3, generator=g)
    x = dict(more=[b, c], a=a)
    out,state = Unroll(Cell(), timed=(True, False, True))(x)
    sums = (a*b[...,None]).cumsum(1)
    torch.testing.assert_close([out['sum'], out['pair'][0], state], [sums, sums*c[:,None], sums[:,-1]])
    torch.testing.assert_close(out['pair'][1][0], a.sum((0, 2)))
    assert out['pair'][1][1:]==(4, None)
    rnn = StatefulRNN(Unroll(Cell(), timed=(True, False, True)))
    parts = [rnn(dict(more=[b[:,s], c], a=a[:,s])) for s in (slice(0, 5), slice(5, 9))]
    torch.testing.assert_close(torch.cat([o['sum'] for o in parts], 1), sums)
    with pytest.raises(ValueError, match='batch size 4, the input 3'): rnn(dict(more=[b[:3], c[:3]], a=a[:3]))

def test_what_has_a_time_axis_is_named_and_not_guessed():
    unroll = Unroll(Wants())
    two = torch.randn(4, 9, 2),torch.randn(4, 3)
    with pytest.raises(ValueError, match=r'of shape \[\(4, 9, 2\), \(4, 3\)\]; expected the same number of steps.*timed='): unroll(two)
    with pytest.raises(ValueError, match='timed has 1 entries, the input 2 elements'): Unroll(Wants(), timed=(True,))(two)
    with pytest.raises(ValueError, match='expected the same number of steps, at least 1'): unroll(torch.randn(4, 0, 2))
    with pytest.raises(ValueError, match=r'have a time axis are of shape \[\]'): unroll(torch.randn(4))

class Wants(nn.Module):
    def forward(self, x, state): return x,0

@dataclasses.dataclass
class Step:
    signal: torch.Tensor
    name: str

def test_dataclasses_go_step_by_step():
    class Cell(nn.Module):
        def forward(self, x, state): return Step(x.signal+state, x.name),state+x.signal
        def initial_state(self, bs, device, dtype): return torch.zeros(bs, device=device, dtype=dtype)
    out,state = Unroll(Cell())(Step(torch.ones(3, 5), 'force'))
    assert isinstance(out, Step) and out.name=='force' and out.signal.tolist()==[[1,2,3,4,5]]*3 and state.tolist()==[5]*3

@all_cells
def test_time_first_is_the_same(kind):
    cell,_ = cell_and_head(kind)
    x = torch.randn(4, 9, 2)
    whole,rnn = ByHand(cell)(x)[0],StatefulRNN(Unroll(cell, batch_first=False))
    parts = []
    for k,part in enumerate(x.split([4,5], 1)):
        parts.append(rnn(part.transpose(0, 1)).transpose(0, 1))
        if not k: rnn.reset([True,False,False,True])
    torch.testing.assert_close(torch.cat(parts, 1)[1:3], whole[1:3])
    torch.testing.assert_close(parts[1][[0,3]], ByHand(cell)(x[:,4:])[0][[0,3]])

class Inits(nn.Module):
    "A module with methods of given names"
    def __init__(self, **methods):
        super().__init__()
        for name,f in methods.items(): object.__setattr__(self, name, f)

def ones(*shape, **kwargs): return torch.ones(*shape, **kwargs)

FIRST = dict(
    initial_state=(dict(initial_state=lambda bs,device,dtype: ones(bs, 3, device=device, dtype=dtype)), torch.float32),
    memory_alone=(dict(init_memory=lambda: ones(3)), torch.float32), memory_of_one=(dict(init_memory=lambda: ones(1, 3)), torch.float32),
    memory_of_batch=(dict(init_memory=lambda batch_size: ones(batch_size, 3)), torch.float32),
    optional=(dict(init_memory=lambda bs=1: ones(bs, 3)), torch.float32),
    other_options=(dict(init_memory=lambda scale=1., absolute=True: ones(3)*scale), torch.float32),
    hidden=(dict(init_hidden=lambda bsz: ones(bsz, 3)), torch.float32), hidden_on=(dict(init_hidden=lambda n,device: ones(n, 3, device=device)), torch.float32),
    hidden_typed=(dict(init_hidden=lambda n,dtype=None: ones(n, 3, dtype=torch.float16)), torch.float16),
    variable=(dict(init_hidden=lambda n,*args,**kwargs: ones(n, 3)), torch.float32),
)

@pytest.mark.parametrize('kind', FIRST)
def test_first_states_by_any_name_and_signature(kind):
    methods,dtype = FIRST[kind]
    state = first_state_of(Inits(**methods))(4, torch.device('cpu'), torch.float32)
    assert state.shape==(4, 3) and state.dtype==dtype and (state==1).all()

def test_nested_first_states_keep_integers_and_what_has_no_batch():
    make = first_state_of(Inits(init_memory=lambda: dict(slots=ones(5, 3), age=torch.zeros(1, dtype=torch.int64), n=torch.tensor(2), name='a', none=None)))
    state = make(4, torch.device('cpu'), torch.float32)
    assert state['slots'].shape==(4, 5, 3) and state['slots'].dtype==torch.float32
    assert state['age'].shape==(4, 1) and state['age'].dtype==torch.int64
    assert state['n'].shape==() and (state['name'],state['none'])==('a', None)

def test_a_first_state_is_asked_for_in_one_order():
    names = 'initial_state','init_memory','init_hidden'
    for i in range(3):
        methods = {name: (lambda *args, j=j: torch.full((2,3), float(j))) for j,name in enumerate(names) if j>=i}
        assert (first_state_of(Inits(**methods))(2, 'cpu', torch.float64)==i).all()
    assert first_state_of(nn.Linear(1, 1)) is None and not hasattr(Unroll(Wants()), 'initial_state')

@pytest.mark.parametrize('f,message', [(lambda a,b: 0, r'needs a, b; expected a batch size'), (lambda bs: None, 'returned None; expected the first state')])
def test_a_first_state_that_cannot_be_made_is_refused(f, message):
    with pytest.raises(TypeError, match=message): first_state_of(Inits(init_hidden=f))(4, 'cpu', torch.float64)

def test_rows_are_refused_where_the_first_state_is_not_known_and_the_cell_is_named():
    model = nn.Sequential(StatefulRNN(Unroll(Stack())), nn.Linear(6, 1))
    with pytest.raises(ValueError, match='the first state of a Stack is not known'): fit(TbpttLearner(stream_loaders(), model, loss_func=nn.MSELoss()))
    initial = InitialState(((torch.zeros(1, 5), torch.zeros(1, 5)), torch.zeros(1, 6)))
    fit(TbpttLearner(stream_loaders(), nn.Sequential(StatefulRNN(Unroll(Stack()), initial=initial), nn.Linear(6, 1)), loss_func=nn.MSELoss()))

def test_a_learned_first_state_of_a_cell_learns():
    "Also on a stream; the gradient of a first state is that of the sequences that begin with it"
    cell,head = cell_and_head('pair')
    before = cell.h0.detach().clone()
    learn = trained(stream_loaders(), unrolled(cell, head))
    assert not torch.equal(learn.model[0].rnn.cell.h0, before)


# What is refused

class ReturnsTensor(nn.Module):
    def forward(self, x, h): return x
class ReturnsNone(nn.Module):
    def forward(self, x, h): return x,None
class LikeLSTMCell(nn.Module):
    "Returns (h, c), as nn.LSTMCell does, without being one"
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(2, 6)
    def initial_state(self, bs, device, dtype): return tuple(torch.zeros(2, bs, 6, device=device, dtype=dtype))
    def forward(self, x, state): return self.cell(x, state)
class OneArgument(nn.Module):
    def forward(self, x): return x,x
class ThreeArguments(nn.Module):
    def forward(self, x, y, state): return x,state

@pytest.mark.parametrize('make,message', [(ReturnsTensor, r'ReturnsTensor returned a Tensor; expected \(output, state\)'),
    (ReturnsNone, 'returned no state'), (LikeLSTMCell, r'was a tuple, and is a Tensor after a step.*returns h, \(h, c\)')])
def test_what_a_cell_returns_is_checked(make, message):
    with pytest.raises(TypeError, match=message): Unroll(make())(torch.randn(2, 5, 2))

@pytest.mark.parametrize('make,message', [(lambda: nn.LSTM(2, 6), 'LSTM runs over time itself'), (lambda: nn.GRU(2, 6), 'GRU runs over time itself'),
    (OneArgument, r'OneArgument.forward takes \(x\)'), (ThreeArguments, 'expected'),
    (lambda: nn.Sequential(nn.LSTMCell(2, 6), nn.LSTMCell(6, 6)), 'Several cells'),
    (lambda: StatefulRNN(Unroll(nn.GRUCell(2, 6))), 'StatefulRNN.forward takes'), (lambda: nn.LSTMCell, 'expected a module'), (lambda: len, 'expected a module')])
def test_what_cannot_be_unrolled_is_refused_where_it_is_made(make, message):
    with pytest.raises(TypeError, match=message): Unroll(make())

@pytest.mark.parametrize('n_layers_is_bs', [False, True])
def test_a_module_that_takes_the_rows_of_a_step_for_time_is_refused(n_layers_is_bs):
    "It would mix the rows, and where it has as many layers as rows nothing else would tell"
    model = TruncatedBPTTModel(2, 6, 1)
    if n_layers_is_bs: model.rnn = nn.RNN(2, 6, 4)
    with pytest.raises(ValueError, match=r'RNN is called with one step of shape \(4, 2\), and takes its rows for time'):
        StatefulRNN(Unroll(model))(torch.randn(4, 5, 2))
    model(torch.randn(4, 2)) # as it was

def test_a_layer_within_a_cell_may_be_called_with_one_step():
    class Cell(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn
        def forward(self, x, state):
            out,state = self.rnn(x[:,None], state)
            return out[:,0],state
    torch.manual_seed(0)
    lstm,x = nn.LSTM(2, 6, 2, batch_first=True),torch.randn(4, 9, 2)
    rnn = StatefulRNN(Unroll(Cell(lstm)), batch_dim=1)
    torch.testing.assert_close(torch.cat([rnn(o) for o in x.split(5, 1)], 1), lstm(x)[0])


# With all the rest

@all_cells
def test_evaluation_in_sub_windows_and_at_run_time_gives_the_same(kind):
    cell,head = cell_and_head(kind)
    learn = trained(window_loaders(), unrolled(cell, head))
    x,y = windows(3)
    with torch.no_grad(): whole = learn.model.eval()(x)
    with learn.no_bar(): preds = learn.get_preds(cbs=SubWindowEvalCB(7))[0]
    torch.testing.assert_close(preds, whole, rtol=0, atol=1e-12)
    predict = StreamPredictor(learn)
    torch.testing.assert_close(torch.cat([predict(o) for o in x.split(8, 1)], 1), whole, rtol=0, atol=1e-12)

def test_a_learner_with_cells_is_exported(tmp_path):
    cell,head = cell_and_head('lstm')
    learn = trained(stream_loaders(), unrolled(cell, head))
    learn.export(tmp_path/'cells.pkl')
    model,(x,_) = load_learner(tmp_path/'cells.pkl').model.eval(),windows(3)
    assert torch.equal(model(x), learn.model.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(learn.model))(x), model(x))

def layers_compile_in_place():
    "PyTorch 2.6 runs its own layers as they are after `layer.compile()`"
    layer,backend = torch.nn.Linear(1, 1),CompileCounter()
    layer.compile(backend=backend)
    layer(torch.zeros(1, 1))
    return backend.frame_count>0

@pytest.mark.parametrize('how', ['compile', 'torch.compile'])
@pytest.mark.parametrize('kind,data', [('lstm', window_loaders), ('lstm', stream_loaders), ('gru', stream_loaders), ('dict', window_loaders)])
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning') # torch's own, while it traces
def test_a_compiled_cell_trains_the_same(kind, data, how):
    cell,head = cell_and_head(kind)
    torch._dynamo.reset()
    torch.compiler.set_stance('default') # whatever ran in this process before
    model,backend = unrolled(cell, head),CompileCounter()
    if how=='compile': model[0].rnn.cell.compile(backend=backend)
    else: model[0] = StatefulRNN(Unroll(torch.compile(copy.deepcopy(cell), backend=backend)))
    learn = trained(data(), model, (2,))
    same(learn.model, trained(data(), unrolled(cell, head), (2,)).model)
    assert backend.frame_count>0 or how=='compile' and kind!='dict' and not layers_compile_in_place()

@pytest.mark.parametrize('kind', ['lstm', 'dict', 'broadcast', 'pair'])
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning')
def test_a_whole_model_with_cells_compiles(kind):
    cell,head = cell_and_head(kind)
    torch._dynamo.reset()
    model = unrolled(cell, head)
    model.compile(backend=CompileCounter())
    same(trained(stream_loaders(), model).model, trained(stream_loaders(), unrolled(cell, head)).model)


@pytest.mark.parametrize('cell', [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize('how', [lambda o: o, torch.compile])
def test_a_step_without_channels_is_refused(cell, how):
    "A cell of torch.nn would take the rows for channels"
    with pytest.raises(ValueError, match=rf'{cell.__name__} takes channels in each step; .*not of shape \(4, 20\)'):
        Unroll(how(cell(4, 4)))(torch.randn(4, 20))
    with pytest.raises(ValueError, match=r'not of shape \(4, 20, 4, 1\)'): Unroll(how(cell(4, 4)))(torch.randn(4, 20, 4, 1))
    with pytest.raises(ValueError, match='not a tuple'): Unroll(how(cell(4, 4)))((torch.randn(4, 20, 4), torch.randn(4, 20, 4)))

def test_an_element_that_is_named_has_a_time_axis():
    with pytest.raises(ValueError, match='timed names an element without a time axis: 3'): Unroll(Wants(), timed=(True, True))((torch.randn(4, 9, 2), 3))
    with pytest.raises(ValueError, match=r'without a time axis: \(4,\)'): Unroll(Wants(), timed=(True, True))((torch.randn(4, 9, 2), torch.randn(4)))
