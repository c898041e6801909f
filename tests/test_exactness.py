"Training through the library ends with the parameters, bit by bit, of a loop written by hand"
import copy
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, split_loaders, untaught_on_purpose
from reference import permutations, window_epochs, train_full, train_tbptt, windows_by_hand
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.state.stateful import StatefulRNN

SEED,N_EPOCH,LR,WIN,STEP,BS = 3,2,1e-2,120,60,5
WINDOWS = dict(n_train=900, seed=SEED, win_sz=WIN, stp_sz=STEP, bs=BS)
rnn_types = dict(lstm=nn.LSTM, gru=nn.GRU, rnn=nn.RNN)


def by_hand(signals):
    u,y = map(torch.from_numpy, signals)
    x,y = windows_by_hand(u[:900], y[:900], WIN, STEP)
    return x,y,window_epochs(len(x), BS, N_EPOCH, SEED)

def recurrent_and_head(rnn_type, num_layers, dtype=torch.float32):
    torch.manual_seed(0)
    return rnn_types[rnn_type](2, 6, num_layers, batch_first=True).to(dtype),nn.Linear(6, 1).to(dtype)

def assert_same(trained, *expected):
    params = [p for m in expected for p in m.parameters()]
    assert len(params)==len(list(trained.parameters()))
    for a,b in zip(trained.parameters(), params): assert torch.equal(a, b)


@pytest.mark.parametrize('num_workers', [0,2])
@pytest.mark.parametrize('sub_seq_len', [40,50]) # 50: a ragged tail of 20
@pytest.mark.parametrize('num_layers', [1,2])
@pytest.mark.parametrize('rnn_type', rnn_types)
def test_equals_the_loop_by_hand(signals, rnn_type, num_layers, sub_seq_len, num_workers):
    rnn,head = recurrent_and_head(rnn_type, num_layers)
    dls = split_loaders(signals, **WINDOWS, sub_seq_len=sub_seq_len, num_workers=num_workers)
    learn = TbpttLearner(dls, nn.Sequential(StatefulRNN(copy.deepcopy(rnn)), copy.deepcopy(head)), opt_func=adam)
    fit(learn, N_EPOCH)
    x,y,epochs = by_hand(signals)
    assert len(epochs[0])==3 and len(epochs[0][-1])==4 # the last batch is a partial one
    train_tbptt(rnn, head, x, y, epochs, sub_seq_len, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)


@untaught_on_purpose
@pytest.mark.parametrize('n_skip,clip', [(0,.05), (20,None), (50,None), (70,None)]) # within, all of, and beyond the first sub-window
def test_washout_and_clipping_equal_the_loop_by_hand(signals, n_skip, clip):
    rnn,head = recurrent_and_head('lstm', 1)
    learn = TbpttLearner(split_loaders(signals, **WINDOWS),
                         nn.Sequential(StatefulRNN(copy.deepcopy(rnn)), copy.deepcopy(head)),
                         sub_seq_len=50, n_skip=n_skip, grad_clip=clip, opt_func=adam)
    fit(learn, N_EPOCH)
    train_tbptt(rnn, head, *by_hand(signals), 50, LR, nn.functional.l1_loss, n_skip=n_skip, clip=clip)
    assert_same(learn.model, rnn, head)


@pytest.mark.parametrize('rnn_type', rnn_types)
def test_built_model_equals_the_loop_by_hand(signals, rnn_type):
    learn = RNNLearner(split_loaders(signals, **WINDOWS, sub_seq_len=50), rnn_type=rnn_type, hidden_size=6,
                       opt_func=adam)
    start = copy.deepcopy(learn.model)
    fit(learn, N_EPOCH)
    u,y = (torch.from_numpy(o[:900]).double() for o in signals)
    stats = [[f(o).float() for f in (lambda o: o.mean(0), lambda o: o.std(0, correction=0))] for o in (u,y)]
    torch.testing.assert_close([learn.model.scale_x.mean, learn.model.scale_x.std, learn.model.scale_y.mean, learn.model.scale_y.std], [*stats[0], *stats[1]])
    train_tbptt(start.rnn.rnn, start.head, *by_hand(signals), 50, LR, nn.functional.l1_loss,
                scale=lambda x: (x-learn.model.scale_x.mean)/learn.model.scale_x.std, unscale=lambda y: y*learn.model.scale_y.std+learn.model.scale_y.mean)
    assert_same(learn.model, start)


def test_float64_equals_the_loop_by_hand(signals):
    rnn,head = recurrent_and_head('lstm', 1, torch.float64)
    learn = TbpttLearner(split_loaders(signals, **WINDOWS, dtype=torch.float64, sub_seq_len=50),
                         nn.Sequential(StatefulRNN(copy.deepcopy(rnn)), copy.deepcopy(head)), opt_func=adam)
    fit(learn, N_EPOCH)
    x,y,epochs = by_hand(signals)
    train_tbptt(rnn, head, x.double(), y.double(), epochs, 50, LR, nn.functional.l1_loss)
    assert_same(learn.model, rnn, head)


@pytest.mark.parametrize('of_loader,of_learner', [(WIN,'dls'), (None,WIN), (None,'dls'), (50,None)])
def test_whole_window_is_full_backpropagation(signals, of_loader, of_learner):
    "... as a plain `Learner` does it, with a plain loader and a plain recurrent layer"
    rnn,head = recurrent_and_head('lstm', 2)
    by_loop = copy.deepcopy(rnn),copy.deepcopy(head)
    x,y,epochs = by_hand(signals)
    train_full(*by_loop, x, y, epochs, LR, nn.functional.l1_loss)

    class Plain(nn.Module):
        def __init__(self, rnn, head):
            super().__init__()
            self.rnn,self.head = rnn,head
        def forward(self, x): return self.head(self.rnn(x)[0])

    set_seed(SEED)
    orders = iter(permutations(len(x), N_EPOCH, SEED))
    dls = DataLoaders(TfmdDL(list(zip(x, y)), bs=BS, num_workers=0, get_idxs=lambda: next(orders)), TfmdDL(list(zip(x, y)), bs=BS, num_workers=0))
    plain = Learner(dls, Plain(copy.deepcopy(rnn), copy.deepcopy(head)), loss_func=nn.L1Loss(), opt_func=adam)
    fit(plain, N_EPOCH)
    assert_same(plain.model, *by_loop)

    learn = TbpttLearner(split_loaders(signals, **WINDOWS, sub_seq_len=of_loader),
                         nn.Sequential(StatefulRNN(rnn), head), sub_seq_len=of_learner, opt_func=adam)
    fit(learn, N_EPOCH)
    assert_same(learn.model, *by_loop)
