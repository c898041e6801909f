"The three things that make TBPTT: the state is carried, the gradient is cut, the state is reset. And where none of it may happen."
import copy, io
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from helpers import fit
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.state.stateful import StatefulRNN

WIN,SUB,BS = 120,50,4


class Record(Callback):
    "Keep every training prediction and, where asked, inputs that gradients can be read from"
    order = 40
    def __init__(self, grads=False): self.grads,self.preds,self.inputs = grads,[],[]
    def before_batch(self):
        if not (self.grads and self.training): return
        self.inputs.append(self.xb[0].clone().requires_grad_())
        self.learn.xb = (self.inputs[-1],)
    def after_pred(self):
        if self.training: self.preds.append(self.pred.detach())


def trained(x, y, rnn_type=nn.LSTM, lr=0., n_epoch=1, model=None, **record):
    "Predictions of an epoch in which nothing is learned (lr=0), windows in order, two batches of them"
    torch.manual_seed(0)
    model = model or nn.Sequential(StatefulRNN(rnn_type(1, 6, batch_first=True)), nn.Linear(6, 1))
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x[:WIN], y[:WIN]), win_sz=WIN, sub_seq_len=SUB, bs=BS, shuffle=False)
    rec = Record(**record)
    learn = TbpttLearner(dls, model, cbs=rec)
    fit(learn, n_epoch, lr)
    return rec,learn

@pytest.fixture
def xy():
    torch.manual_seed(1)
    return torch.randn(2*BS*WIN),torch.randn(2*BS*WIN)

@pytest.fixture(params=[nn.LSTM, nn.GRU, nn.RNN])
def rnn_type(request): return request.param


def test_state_is_carried(xy, rnn_type):
    "The prediction in sub-window 2 changes with the input of sub-window 1"
    x,y = xy
    other = x.clone()
    other[:SUB] += 1. # the first sub-window of the first window
    a,b = (trained(o, y, rnn_type)[0].preds for o in (x, other))
    assert [p.shape[1] for p in a]==[50,50,20]*2
    assert not torch.equal(a[1][0], b[1][0])
    assert torch.equal(a[1][1:], b[1][1:]) # and those of the other windows in the batch do not


def test_gradient_is_cut(xy, rnn_type):
    "The loss of sub-window 2 sends no gradient to the input of sub-window 1"
    class Grads(Callback):
        order = 41
        def __init__(self): self.seen = []
        def after_backward(self): self.seen.append([None if i.grad is None else i.grad.clone() for i in self.learn.record.inputs])
    grads = Grads()
    torch.manual_seed(0)
    dls = SequenceDataLoaders.from_arrays(*xy, valid=xy, win_sz=WIN, sub_seq_len=SUB, bs=BS, shuffle=False)
    model = nn.Sequential(StatefulRNN(rnn_type(1, 6, batch_first=True)), nn.Linear(6, 1))
    learn = TbpttLearner(dls, model, cbs=[Record(grads=True), grads])
    fit(learn, 1, 0.)
    after_1,after_2,after_3 = grads.seen[:3]
    assert after_1[0].abs().max()>0 and after_2[1].abs().max()>0
    assert torch.equal(after_2[0], after_1[0]) and torch.equal(after_3[0], after_1[0]) and torch.equal(after_3[1], after_2[1])


def test_state_is_reset(xy, rnn_type):
    "The predictions in window 2 do not change with anything in window 1; nor does a second epoch with the first"
    x,y = xy
    other = x.clone()
    other[:BS*WIN] += 1. # all of the first batch
    a,b = (trained(o, y, rnn_type, n_epoch=2)[0].preds for o in (x, other))
    assert not torch.equal(a[0], b[0])
    for i in (3,4,5): assert torch.equal(a[i], b[i])
    for i in range(6): assert torch.equal(a[i], a[i+6])


def test_sub_windows_give_the_output_of_the_whole_window(xy, rnn_type):
    rec,learn = trained(*xy, rnn_type)
    x = xy[0].view(-1, WIN, 1)
    whole = learn.model.eval()(x)
    parts = torch.cat([torch.cat(rec.preds[:3], 1), torch.cat(rec.preds[3:], 1)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_every_layer_of_a_model_is_carried_and_reset(xy):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.out = StatefulRNN(nn.GRU(1, 4, batch_first=True)),nn.ModuleList([StatefulRNN(nn.LSTM(4, 4, batch_first=True))]),nn.Linear(4, 1)
        def forward(self, x): return self.out(self.b[0](self.a(x)))
    torch.manual_seed(0)
    rec,learn = trained(*xy, model=Two())
    whole = learn.model.eval()(xy[0].view(-1, WIN, 1))
    torch.testing.assert_close(torch.cat([torch.cat(rec.preds[:3], 1), torch.cat(rec.preds[3:], 1)]), whole, atol=1e-6, rtol=0)


def test_evaluation_leaves_the_training_state_alone():
    rnn,x = StatefulRNN(nn.GRU(1, 3, batch_first=True)),torch.randn(2, 10, 1)
    rnn(x)
    state = rnn.state.clone()
    rnn.eval()
    first = rnn(x)
    assert torch.equal(rnn(x), first) # from the initial state, every time
    assert rnn(x[:1]).shape[0]==1 # whatever the batch size
    rnn.train()
    assert torch.equal(rnn.state, state)


def test_state_is_nowhere_saved(xy):
    rnn = StatefulRNN(nn.LSTM(1, 3, batch_first=True))
    keys,size = list(rnn.state_dict()),len(_saved(rnn))
    rnn(torch.randn(64, 100, 1))
    assert list(rnn.state_dict())==keys and not list(rnn.buffers())
    assert len(_saved(rnn))==size and copy.deepcopy(rnn).state is None
    assert rnn.state is not None

def _saved(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    return buffer.getvalue()


def test_time_first_layers_carry_too():
    torch.manual_seed(0)
    rnn,x = StatefulRNN(nn.LSTM(2, 3, num_layers=2)),torch.randn(30, 4, 2)
    parts = torch.cat([rnn(o) for o in x.split([13,13,4])])
    torch.testing.assert_close(parts, rnn.rnn(x)[0])
    with pytest.raises(ValueError, match='batch size 4, the input 3'): rnn(x[:,:3])


def test_dropout_between_layers_differs_from_call_to_call():
    torch.manual_seed(0)
    rnn,x = StatefulRNN(nn.LSTM(2, 8, num_layers=2, dropout=.5, batch_first=True)),torch.randn(4, 30, 2)
    a = rnn(x)
    rnn.reset()
    assert not torch.equal(a, rnn(x))
    rnn.eval()
    assert torch.equal(rnn(x), rnn(x))


@pytest.mark.parametrize('change,message', [
    (lambda rnn,x: (rnn, x[:3]), 'batch size 4, the input 3'),
    (lambda rnn,x: (rnn.double(), x.double()), 'float32, the input torch.float64'),
    (lambda rnn,x: (rnn.to('meta'), x.to('meta')), 'is on cpu, the input on meta'),
])
def test_a_state_that_does_not_fit_is_refused(change, message):
    rnn = StatefulRNN(nn.LSTM(2, 3, batch_first=True))
    x = torch.randn(4, 10, 2)
    rnn(x)
    rnn,x = change(rnn, x)
    with pytest.raises(ValueError, match=message): rnn(x)
    rnn.reset()
    rnn(x)


def test_a_state_that_cannot_be_detached_is_refused():
    class Odd(nn.Module):
        def forward(self, x, state): return x,{object()}
    with pytest.raises(TypeError, match='a set, which cannot be detached'): StatefulRNN(Odd())(torch.zeros(1, 2, 3))


def test_packed_sequences_and_bidirectional_layers_are_refused():
    rnn = StatefulRNN(nn.LSTM(2, 3, batch_first=True))
    with pytest.raises(TypeError, match='PackedSequence'): rnn(nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 4, 2), [4,2], batch_first=True))
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.GRU(1, 2, bidirectional=True))
    with pytest.raises(ValueError, match=r'GRU \(inner.0\) is bidirectional'): StatefulRNN(Deep())
