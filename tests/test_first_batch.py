"What would train in silence and wrongly is refused before the first step, in any learner"
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from torch import nn
from helpers import fit, learner, sgd
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checks import check_carries

def windows(n=8, steps=60, channels=1, batches=4):
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, steps, channels, generator=g) for _ in range(batches)]
    return [(x, x.cumsum(1).sin()) for x in xs]

def rnn(n_out=1): return nn.Sequential(StatefulRNN(nn.LSTM(1, 4, batch_first=True)), nn.Linear(4, n_out))

def refused(dls, model, match, loss_func=nn.MSELoss(), sub_seq_len=20, **kwargs):
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=match): fit(learner(dls, model, sub_seq_len, loss_func=loss_func, opt_func=sgd, **kwargs))
    assert all(torch.equal(p, old) and p.grad is None for p,old in zip(model.parameters(), before))

def test_time_first_batches_of_a_list_are_held_against_the_sub_window():
    batches = [(x.transpose(0, 1), y.transpose(0, 1)) for x,y in windows()]
    refused(DataLoaders(batches, batches), rnn(), 'sub_seq_len is 20, but a window has 8 steps')

def test_batches_of_a_stream_of_items_too():
    class Items(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([(x[0,:8], y[0,:8]) for x,y in windows()])
    class Counted(torch.utils.data.DataLoader):
        def __len__(self): return 2
    dl = Counted(Items(), batch_size=2)
    refused(DataLoaders(dl, dl), rnn(), 'sub_seq_len is 20, but a window has 8 steps')

def test_items_that_are_not_put_together_are_no_batches():
    items = [(x[0], y[0]) for x,y in windows()]
    dl = torch.utils.data.DataLoader(items, batch_size=None)
    with pytest.raises(ValueError, match='batch_size=None.*shape .60, 1.'): learner(DataLoaders(dl, dl), rnn(), 20)
    dl = torch.utils.data.DataLoader(windows(), batch_size=None)
    assert len(fit(learner(DataLoaders(dl, dl), rnn(), 20)).recorder.losses)==12

class OfCells(nn.Module):
    "A loop over a cell after a layer whose state is carried"
    def __init__(self):
        super().__init__()
        self.lstm,self.cell,self.o = nn.LSTM(1, 4, batch_first=True),nn.LSTMCell(4, 4),nn.Linear(4, 1)
    def forward(self, x):
        x,state,res = self.lstm(x)[0],None,[]
        for o in x.unbind(1):
            state = self.cell(o, state)
            res.append(state[0])
        return self.o(torch.stack(res, 1))

class Coder(nn.Module):
    "An encoder whose last state starts a decoder"
    def __init__(self):
        super().__init__()
        self.encode,self.decode,self.o = nn.GRU(1, 4, batch_first=True),nn.GRU(1, 4, batch_first=True),nn.Linear(4, 1)
    def forward(self, x): return self.o(self.decode(x, self.encode(x)[1])[0])

def test_a_learner_of_fastai_checks_as_well():
    dls = DataLoaders(windows(), windows())
    refused(dls, OfCells(), 'gives other predictions than in one piece')
    refused(dls, Coder(), 'gives other predictions than in one piece')

def test_as_many_rows_as_steps_without_batch_first_has_its_remedy():
    data = windows(n=20)
    refused(DataLoaders(data, data), nn.Sequential(StatefulRNN(nn.LSTM(1, 4)), nn.Linear(4, 1)), 'batch_first=True')

class Head(nn.Module):
    def __init__(self, f, stateful=True):
        super().__init__()
        lstm = nn.LSTM(1, 4, batch_first=True)
        self.rnn,self.o,self.f = StatefulRNN(lstm) if stateful else lstm,nn.Linear(4, 3),f
    def forward(self, x):
        o = self.rnn(x)
        return self.o(self.f(o[0] if isinstance(o, tuple) else o))

@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('pool', [lambda o: o.mean(1), lambda o: o.amax(1), lambda o: (o.softmax(1)*o).sum(1), lambda o: o[:,0]],
                         ids=['mean', 'maximum', 'attention', 'first'])
def test_a_head_that_looks_along_time_is_refused(pool, stateful):
    data = [(x, torch.arange(8)%3) for x,_ in windows()]
    dls = DataLoaders(data, data)
    refused(dls, Head(pool, stateful), 'gives other predictions than in one piece', CrossEntropyLossFlat())
    fit(learner(dls, Head(lambda o: o[:,-1], stateful), 20, loss_func=CrossEntropyLossFlat()))
    fit(learner(dls, Head(pool, stateful), None, loss_func=CrossEntropyLossFlat()))

class Forgets(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.rnn,self.o,self.own = StatefulRNN(nn.LSTM(1, 4, batch_first=True)),nn.Linear(4, 1),own
    def reset(self): self.rnn.reset()
    def forward(self, x):
        if self.own: self.reset()
        return self.o(self.rnn(x)[:,-1:]).expand(-1, x.shape[1], -1)

class Smooths(nn.Module):
    "No memory at all, but a reset"
    def __init__(self):
        super().__init__()
        self.o = nn.Linear(1, 1)
    def reset(self): pass
    def forward(self, x): return self.o(x)

@pytest.mark.parametrize('make', [Smooths, lambda: Forgets(True)], ids=['feedforward', 'resets itself'])
def test_a_model_that_remembers_nothing_is_refused(make):
    data = windows()
    refused(DataLoaders(data, data), make(), 'remembers nothing|gives other predictions')

def test_a_gate_that_is_still_closed_is_no_reason():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.through,self.gate = StatefulRNN(nn.LSTM(1, 1, batch_first=True)),nn.Linear(1, 1),nn.Parameter(torch.zeros(()))
        def forward(self, x): return self.through(x)+self.gate*self.rnn(x)
    data = windows()
    m = Gated()
    fit(learner(DataLoaders(data, data), m, 20, loss_func=nn.MSELoss()))
    assert m.gate!=0

def test_a_model_that_takes_lengths_trains():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.o = StatefulRNN(nn.LSTM(1, 4, batch_first=True)),nn.Linear(4, 1)
        def forward(self, x, n):
            o = self.o(self.rnn(x))
            return o+0*o[torch.arange(len(x)),(n-1).clamp(max=19)][:,None]
    data = [(x, torch.full((8,), 20), y) for x,y in windows()]
    dls = DataLoaders(data, data)
    dls.n_inp = 2
    fit(learner(dls, Lengths(), 20, loss_func=nn.MSELoss()))

shapes = pytest.mark.parametrize('loss', [nn.L1Loss(), nn.MSELoss(), nn.SmoothL1Loss(), nn.functional.mse_loss, lambda a,b: (a-b).abs().mean(),
                                          lambda a,b: (b-a).square().mean(), lambda a,b: nn.functional.huber_loss(a, b)], ids=range(7))
@shapes
def test_a_target_that_only_broadcasting_makes_fit_is_refused(loss):
    data = [(x, y[...,0]) for x,y in windows(n=20)]
    refused(DataLoaders(data, data), rnn(), r'shape \(20, 20, 1\), targets \(20, 20\): .* would compare each with every other \(20, 20, 20\)', loss)
    data = [(x, torch.cat([y, y], -1)) for x,y in windows()]
    refused(DataLoaders(data, data), rnn(), r'Predictions have shape \(8, 20, 1\), targets \(8, 20, 2\)', loss)

@shapes
def test_integer_targets_of_a_regression_are_named(loss):
    xs = [torch.randn(n, 1) for n in (40, 30)]
    class Ints(StreamDL):
        def _read(self, block):
            x,y = super()._read(block)
            return x,(10*y[...,0]).long()
    dl = Ints(Sequences(xs, xs), bs=2, sub_seq_len=10)
    refused(DataLoaders(dl, dl), rnn(), r'targets \(20,\).*astype\(float\)', loss, 'dls')

@pytest.mark.parametrize('steps', [60, 62])
def test_targets_at_another_rate_are_refused(steps):
    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.rnn,self.o = nn.Conv1d(1, 4, 2, stride=2),StatefulRNN(nn.LSTM(4, 4, batch_first=True)),nn.Linear(4, 1)
        def forward(self, x): return self.o(self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2)))
    data = [(x, y[:,::2]) for x,y in windows(steps=steps)]
    refused(DataLoaders(data, data), Strided(), 'another number of steps')
    fit(learner(DataLoaders(data, data), Strided(), None, loss_func=nn.MSELoss()))

def test_losses_that_want_other_shapes_are_left_alone():
    data = [(x, torch.zeros(8, 60).long()) for x,_ in windows()]
    fit(learner(DataLoaders(data, data), rnn(3), 20, loss_func=CrossEntropyLossFlat()))
    data = windows()
    def gaussian(o, y): return nn.functional.gaussian_nll_loss(o[...,:1], y, o[...,1:].exp())
    fit(learner(DataLoaders(data, data), rnn(2), 20, loss_func=gaussian))
    def quantiles(o, y): return torch.maximum(.9*(y-o[...,:1]), .1*(o[...,:1]-y)).mean()
    fit(learner(DataLoaders(data, data), rnn(2), 20, loss_func=quantiles))
    flat = [(x, y[...,0]) for x,y in data]
    fit(learner(DataLoaders(flat, flat), rnn(), 20, loss_func=MSELossFlat()))

def test_a_loss_that_cannot_take_them_is_named():
    data = [(x, torch.cat([y]*3, -1)) for x,y in windows()]
    refused(DataLoaders(data, data), rnn(2), r'shape \(8, 20, 2\), targets \(8, 20, 3\), which MSELoss cannot take')

def test_an_evaluation_is_held_against_its_targets_as_well():
    data = [(x, torch.cat([y, y], -1)) for x,y in windows()]
    learn = learner(DataLoaders(data, data), rnn(), 20, loss_func=nn.MSELoss())
    with pytest.raises(ValueError, match='targets .8, 60, 2.'), learn.no_bar(): learn.validate()

def test_checks_can_be_left_out():
    data = [(x, torch.cat([y, y], -1)) for x,y in windows()]
    def difference(o, y): return (o-y).abs().mean()
    fit(Learner(DataLoaders(data, data), OfCells(), difference, cbs=TbpttResetCB(20, check=False)))

def test_random_numbers_and_parameters_are_those_without_checks():
    def trained(check):
        torch.manual_seed(0)
        m = nn.Sequential(StatefulRNN(nn.LSTM(1, 4, batch_first=True)), nn.Dropout(.5), nn.Linear(4, 1))
        fit(Learner(DataLoaders(windows(), windows()), m, MSELossFlat(), cbs=TbpttResetCB(20, check=check)), 2)
        return [*m.parameters(), torch.rand(3)]
    for a,b in zip(trained(True), trained(False)): assert torch.equal(a, b)

def test_a_model_without_memory_is_trained_by_sub_windows_if_that_is_meant():
    data = windows()
    dls = DataLoaders(data, data)
    with pytest.raises(ValueError, match='no recurrent layer'): learner(dls, nn.Linear(1, 1), 20)
    fit(Learner(dls, nn.Linear(1, 1), MSELossFlat(), cbs=TbpttResetCB(20, check=False)))
    both = nn.Sequential(StatefulRNN(nn.LSTM(1, 4, batch_first=True)), nn.GRU(4, 1, bidirectional=True))
    with pytest.raises(ValueError, match='bidirectional'): Learner(dls, both, MSELossFlat(), cbs=TbpttResetCB(20, check=False))

def test_a_layer_that_took_steps_for_rows_is_refused_also_without_the_other_checks():
    class TimeFirst(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.out = nn.GRU(1, 4),nn.Linear(4, 1)
        def forward(self, x): return self.out(self.rnn(x)[0])
    dls = DataLoaders(windows(), windows())
    for check in (True, False):
        with pytest.raises(ValueError, match='batch_first=True'): fit(Learner(dls, TimeFirst(), nn.MSELoss(), cbs=TbpttResetCB(20, check=check)))
    with pytest.raises(ValueError, match='took the 20 steps for a batch, and the 8 windows for steps'):
        fit(Learner(dls, TimeFirst(), nn.MSELoss(), cbs=TbpttResetCB(20, check=False)))

def test_a_bidirectional_layer_carries_nothing_by_itself():
    with pytest.raises(ValueError, match='bidirectional'): check_carries(nn.GRU(1, 4, bidirectional=True))
