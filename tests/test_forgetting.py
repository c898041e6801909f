"How long a first state is felt, against what a few lines of numpy say"
import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from tbptt_fastai.all import Sequences, StatefulRNN, StreamDL, TbpttDL, TbpttLearner
from tbptt_fastai.instruments.forgetting import measure_forgetting

def windows(n=24, steps=80, seed=0, classes=False):
    torch.manual_seed(seed)
    x = torch.randn(n, steps, 1)
    y = x.cumsum(1).sin()
    return list(zip(x, (y[...,0]>0).long() if classes else y))

class Net(nn.Module):
    def __init__(self, layer=nn.GRU, n_out=1):
        super().__init__()
        torch.manual_seed(2)
        self.rnn,self.head,self.drop = StatefulRNN(layer(1, 6, batch_first=True)),nn.Linear(6, n_out),nn.Dropout(.5)
    def forward(self, x): return self.head(self.drop(self.rnn(x)))

def made(items, model, loss=None, bs=8, **kwargs):
    dls = DataLoaders(*(TbpttDL(items, bs=bs, sub_seq_len=10, num_workers=0) for _ in range(2)))
    return TbpttLearner(dls, model, loss_func=loss or nn.MSELoss(), **kwargs)

@torch.no_grad()
def by_hand(model, items, bs, n_batches, loss):
    "Losses by step from the middle of a window on, cold and warm, and how far predictions are apart"
    model.eval()
    rows = []
    for i in range(0, bs*n_batches, bs):
        x,y = (torch.stack(o) for o in zip(*items[i:i+bs]))
        half = x.shape[1]//2
        run = lambda x: model.head(model.rnn.rnn(x)[0])
        warm,cold = run(x)[:,half:2*half],run(x[:,half:2*half])
        y = y[:,half:2*half]
        rows.append(([loss(cold[:,k], y[:,k]).item() for k in range(half)], [loss(warm[:,k], y[:,k]).item() for k in range(half)],
            ((cold-warm)**2).mean((0, 2)).numpy()))
    cold,warm,apart = (np.mean([r[k] for r in rows], 0) for k in range(3))
    return (cold-warm)/warm.mean(),np.sqrt(apart)

@pytest.mark.parametrize('layer', [nn.GRU, nn.LSTM, nn.RNN])
def test_excess_and_distance_are_those_of_two_runs(layer):
    items,model = windows(),Net(layer)
    res = measure_forgetting(made(items, model), n_batches=2)
    excess,distance = by_hand(model, items, 8, 2, nn.functional.mse_loss)
    assert np.allclose(res.excess, excess, atol=1e-5) and np.allclose(res.distance, distance, atol=1e-6)
    above = [k for k,e in enumerate(excess) if abs(e)>=.1]
    assert res.burn_in==(above[-1]+1 if above else 0)

def test_of_classes():
    items,model = windows(classes=True),Net(n_out=2)
    res = measure_forgetting(made(items, model, CrossEntropyLossFlat()), n_batches=3)
    excess,_ = by_hand(model, items, 8, 3, nn.functional.cross_entropy)
    assert np.allclose(res.excess, excess, atol=1e-5)

def test_the_learner_stays_as_it_is():
    model = Net()
    learn = made(windows(), model)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    model.train()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_forgetting(learn)
    assert model.training and model.drop.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k,v in before.items()) and model.rnn.state is None

def test_of_a_stream():
    rows = [torch.randn(n, 1) for n in (200, 150, 180)]
    dl = StreamDL(Sequences(rows, [o.cumsum(0).sin() for o in rows]), bs=2, sub_seq_len=25)
    learn = TbpttLearner(DataLoaders(dl, dl), Net(), loss_func=nn.MSELoss())
    res = measure_forgetting(learn)
    assert len(res.excess)>=70 and np.isfinite(res.excess).all()

def test_an_advice_for_a_stream_whose_rows_are_always_the_same():
    torch.manual_seed(0)
    rows = [torch.randn(600, 1) for _ in range(3)]
    dl = StreamDL(Sequences(rows, [o.cumsum(0).sin() for o in rows]), bs=3, sub_seq_len=25)
    learn = TbpttLearner(DataLoaders(dl, dl), Net(), loss_func=nn.MSELoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    res = learn.tbptt_find(show=False)
    assert 'on the same rows' in res.advice and f'win_sz={max(10*res.burn_in, 100)}' in res.advice

class Whole(nn.Module):
    "A prediction for a window"
    def __init__(self):
        super().__init__()
        self.rnn,self.head = StatefulRNN(nn.GRU(1, 6, batch_first=True)),nn.Linear(6, 1)
    def forward(self, x): return self.head(self.rnn(x)[:,-1])

def test_without_steps_there_is_none():
    items = [(x, y[-1]) for x,y in windows()]
    assert measure_forgetting(made(items, Whole())) is None
    broken = Net()
    with torch.no_grad(): broken.head.bias.fill_(float('nan'))
    assert measure_forgetting(made(windows(), broken)) is None

def test_a_first_state_that_is_felt_to_the_end_has_no_burn_in():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))
        def initial_state(self, bs, device, dtype): return torch.zeros(bs, 1, device=device, dtype=dtype)
        def forward(self, x, s):
            out = s[:,None]+x.cumsum(1)*self.by
            return out,out[:,-1]
    items = [(x, x.cumsum(0)) for x,_ in windows()]
    learn = made(items, StatefulRNN(Sum()))
    assert measure_forgetting(learn).burn_in is None
    with pytest.warns(UserWarning): res = learn.tbptt_find(show=False)
    assert res.burn_in is None and 'for all of the 40 steps' in res.advice

@pytest.mark.parametrize('share', [0, -1, 'a', None, float('nan')])
def test_shares_that_cannot_be_are_refused(share):
    with pytest.raises((TypeError, ValueError), match='share'): made(windows(), Net()).tbptt_find(share=share, show=False)
