"Before the first step of a fit, TbpttLearner compares a sub-window in one piece with its halves, and leaves nothing behind"
import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import nn
from helpers import adam, fit, loaders, untaught_on_purpose
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.segment import Window
from tbptt_fastai.training.parts import compare_parts
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
import tbptt_fastai.instruments.diagnose # noqa: it adds methods to Learner


class Flip(nn.Module):
    "Bidirectional by hand"
    def __init__(self):
        super().__init__()
        self.there,self.back,self.out = nn.GRU(2, 3, batch_first=True),nn.GRU(2, 3, batch_first=True),nn.Linear(6, 1)
    def forward(self, x): return self.out(torch.cat([self.there(x)[0], self.back(x.flip(1))[0].flip(1)], -1))

class TimeNorm(nn.Module):
    "Over batch and time, also in evaluation"
    def forward(self, x): return (x-x.mean((0,1)))/x.std((0,1))

class Attend(nn.Module):
    def __init__(self): super().__init__(); self.att = nn.MultiheadAttention(2, 1, batch_first=True)
    def forward(self, x): return self.att(x, x, x)[0]

class Chained(nn.Sequential):
    "Layers along channels"
    def forward(self, x): return super().forward(x.transpose(1, 2)).transpose(1, 2)

def with_rnn(*layers): return nn.Sequential(*layers, StatefulRNN(nn.LSTM(2, 6, batch_first=True)), nn.Linear(6, 1))

@pytest.mark.parametrize('make,name', [(Flip, r'GRU \(back\)'), (lambda: with_rnn(TimeNorm()), r'TimeNorm \(0\)'), (lambda: with_rnn(Attend()), r'MultiheadAttention \(0.att\)'),
    (lambda: with_rnn(Chained(nn.Conv1d(2, 2, 3, padding=1))), r'Conv1d \(0.0\)'), (lambda: with_rnn(Chained(nn.InstanceNorm1d(2))), r'InstanceNorm1d \(0.0\)')])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_what_cannot_be_carried_is_named_before_it_learns(signals, make, name, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    learn = TbpttLearner(loaders(signals, dtype=dtype), model)
    with pytest.raises(ValueError, match=f'first layer that differs is {name}.*sub_seq_len=None'): fit(learn)
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])
    assert all(p.grad is None for p in model.parameters()) and model.training
    learn.tbptt_reset_cb.check = False
    fit(learn)
    fit(TbpttLearner(loaders(signals, None, dtype=dtype), model)) # whole windows need nothing carried

def test_a_bidirectional_layer_is_refused_when_the_learner_is_made(signals):
    with pytest.raises(ValueError, match='bidirectional'): TbpttLearner(loaders(signals), nn.Sequential(nn.GRU(2, 3, batch_first=True, bidirectional=True)))


class Counts(nn.Module):
    "A state of its own, with a reset, and random numbers"
    def __init__(self):
        super().__init__()
        self.rnn,self.drop,self.out,self.h = nn.GRU(2, 6, batch_first=True),nn.Dropout(.5),nn.Linear(6, 1),None
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, torch.zeros(1, len(x), 6) if self.h is None else self.h)
        self.h = h.detach()
        return self.out(self.drop(out))

class Draws(nn.Module):
    "Random numbers, in evaluation too"
    def forward(self, x): return x+0*torch.rand(1)
def normed(): return nn.Sequential(Draws(), Chained(nn.BatchNorm1d(2)), StatefulRNN(nn.LSTM(2, 6, 2, batch_first=True, dropout=.5)), nn.Linear(6, 1))
def plain():
    class Plain(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.drop,self.out = nn.LSTM(2, 6, batch_first=True),nn.Dropout(.5),nn.Linear(6, 1)
        def forward(self, x): return self.out(self.drop(self.rnn(x)[0]))
    return Plain()

@untaught_on_purpose
@pytest.mark.parametrize('make', [Counts, normed, plain])
@pytest.mark.parametrize('kwargs', [dict(), dict(n_skip=30), dict(n_skip=5), dict(stream=True)])
def test_training_is_the_same_with_and_without(signals, make, kwargs):
    "Bit by bit: parameters, buffers and random numbers; over two fits"
    if make is Counts and 'stream' in kwargs: pytest.skip('its reset is for all rows')
    def trained(check):
        set_seed(0)
        u,y = signals
        dls = SequenceDataLoaders.from_arrays([u[:300], u[300:700], u[700:900]], [y[:300], y[300:700], y[700:900]], sub_seq_len=20, bs=2) if 'stream' in kwargs else loaders(signals)
        learn = TbpttLearner(dls, make(), n_skip=kwargs.get('n_skip', 0), opt_func=adam)
        if not check: learn.tbptt_reset_cb.check = False
        set_seed(1)
        fit(learn)
        fit(learn)
        return [*learn.model.state_dict().values(), torch.rand(3)]
    for a,b in zip(trained(True), trained(False), strict=True): assert torch.equal(a, b)


def test_it_runs_once_in_each_fit_and_not_in_evaluation(signals):
    learn,seen = TbpttLearner(loaders(signals), with_rnn()),[]
    learn.model.register_forward_pre_hook(lambda m,args: seen.append((m.training, args[0].shape[1])) if m.training==torch.is_grad_enabled() else 1/0)
    learn.validate()
    evaluated = len(seen)
    for _ in range(2):
        seen.clear()
        fit(learn, 2)
        assert seen[:10]==[(False,20), *[(False,10)]*8, (True,20)]
        assert sum(not training for training,_ in seen)==9+2*evaluated

def test_a_model_for_one_number_of_steps_is_left_alone(signals):
    class Fixed(nn.Module):
        def __init__(self): super().__init__(); self.mix = nn.Linear(20, 20)
        def forward(self, x): return self.mix(x.transpose(1, 2)).transpose(1, 2)
    fit(TbpttLearner(loaders(signals), with_rnn(Fixed()), cbs=SubWindowEvalCB(20)))

def test_one_value_per_window_is_left_alone():
    class Last(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.out = nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1)
        def forward(self, x): return self.out(self.rnn(x)[0])[:,-1]
    x = torch.randn(8, 40, 2)
    from fastai.data.core import DataLoaders
    dl = torch.utils.data.DataLoader(list(zip(x, x[:,0,:1])), 4)
    fit(TbpttLearner(DataLoaders(dl, dl), Last(), sub_seq_len=10))

def test_a_sub_window_of_one_step_is_left_alone(signals): fit(TbpttLearner(loaders(signals, 1, win_sz=4), with_rnn()))

def test_learned_first_states_of_groups_are_not_taken_for_an_error():
    rng = np.random.default_rng(0)
    xs,ys = ([rng.standard_normal((60,c)).astype(np.float32) for _ in range(4)] for c in (2,1))
    dls = SequenceDataLoaders.from_arrays(xs, ys, sub_seq_len=20, bs=2, groups=list('abcd'))
    rnn = nn.LSTM(2, 6, batch_first=True)
    fit(TbpttLearner(dls, nn.Sequential(StatefulRNN(rnn, initial=learned_state(rnn, list('abcd'))), nn.Linear(6, 1))))

def test_it_can_be_added_to_another_learner(signals):
    learn = Learner(loaders(signals), with_rnn(TimeNorm()), nn.L1Loss(), cbs=TbpttResetCB())
    with pytest.raises(ValueError, match='TimeNorm'): fit(learn)

class RunningSum(nn.Module):
    "Its state is rounded between two calls, and not within one"
    def initial_state(self, bs, device, dtype): return torch.zeros(bs, 2, device=device, dtype=dtype)
    def forward(self, x, total):
        out = (total[:,None].float()+x.float().cumsum(1)).to(x.dtype)
        return out,out[:,-1]

def test_a_state_of_its_own_is_not_left_over(signals):
    learn = TbpttLearner(loaders(signals), Counts())
    learn.check_sub_windows()
    assert learn.model.h is None

def test_half_precision_is_not_taken_for_an_error():
    torch.manual_seed(0)
    window = Window((torch.randn(3, 40, 2).bfloat16(),))
    assert 1e-3<compare_parts(with_rnn(StatefulRNN(RunningSum())).bfloat16(), window, 20)<.05
    with pytest.raises(ValueError, match='other predictions'): compare_parts(with_rnn(TimeNorm()).bfloat16(), window, 20)

@pytest.mark.parametrize('n', [20, 10])
def test_a_later_element_may_be_as_long_as_a_window_or_a_sub_window(n):
    "What has a time axis is that of the window, or as timed says"
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.out = nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1)
        def forward(self, x, scale): return self.out(self.rnn(x)[0])*scale.mean(1)[:,None,None]
    from fastai.data.core import DataLoaders
    x = torch.randn(8, 20, 2)
    dl = torch.utils.data.DataLoader(list(zip(x, torch.rand(8, n), x[...,:1])), 4)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 2
    learn = Learner(dls, Two(), nn.L1Loss(), cbs=[TbpttResetCB(10, timed=(True, False, True))])
    fit(learn)
    learn.check_sub_windows()
    learn = Learner(dls, Two(), nn.L1Loss(), cbs=[TbpttResetCB(10)])
    if n==10: fit(learn)
    else:
        with pytest.raises(ValueError, match='other predictions'): fit(learn)

def test_a_layer_made_for_a_window_is_named(signals):
    learn = TbpttLearner(loaders(signals), with_rnn(nn.BatchNorm1d(100)))
    for check in (lambda: fit(learn), learn.check_sub_windows):
        with pytest.raises(ValueError, match=r'BatchNorm1d \(0\) cannot be run on (20|48) steps'): check()

def test_random_numbers_in_evaluation_are_not_taken_for_an_error(signals):
    class Noise(nn.Module):
        def forward(self, x): return x+torch.randn_like(x)
    fit(TbpttLearner(loaders(signals), with_rnn(Noise())))

def test_an_evaluation_of_a_stream_is_not_compared(signals):
    u,y = signals
    learn,seen = TbpttLearner(SequenceDataLoaders.from_arrays([u[:300], u[300:900]], [y[:300], y[300:900]], sub_seq_len=20, bs=2), with_rnn()),[]
    learn.model.register_forward_pre_hook(lambda m,args: seen.append(args[0].shape[1]))
    with learn.no_bar(): learn.validate()
    assert set(seen)<={20, 60%20 or 20} and 10 not in seen


class CellLoop(nn.Module):
    "A layer that is carried, then a loop over steps whose state begins anew in each sub-window"
    def __init__(self, cell, head_in_loop=False, twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.cell,self.o = nn.LSTM(2, 6, batch_first=True),cell(),nn.Linear(6, 1)
        self.head_in_loop,self.twice = head_in_loop,twice
    def step(self, x, state):
        if isinstance(self.cell, nn.Linear): return torch.tanh(self.cell(torch.cat([x, torch.zeros_like(x) if state is None else state], -1)))
        return self.cell(x, state)
    def forward(self, x):
        x,state,outs = self.rnn(x)[0],None,[]
        for t in range(x.shape[1]):
            for _ in range(1+self.twice): state = self.step(x[:,t], state)
            h = state[0] if isinstance(state, tuple) else state
            outs.append(self.o(h) if self.head_in_loop else h)
        return torch.stack(outs, 1) if self.head_in_loop else self.o(torch.stack(outs, 1))

CELLS = {'LSTMCell': lambda: nn.LSTMCell(6, 6), 'GRUCell': lambda: nn.GRUCell(6, 6), 'RNNCell': lambda: nn.RNNCell(6, 6), 'Linear': lambda: nn.Linear(12, 6)}

@pytest.mark.parametrize('name', CELLS)
@pytest.mark.parametrize('head_in_loop', [False, True])
@pytest.mark.parametrize('twice', [False, True])
@pytest.mark.parametrize('make', [TbpttLearner, Learner])
def test_the_cell_of_a_loop_is_named_though_it_runs_once_for_each_step(signals, name, head_in_loop, twice, make):
    model = CellLoop(CELLS[name], head_in_loop, twice)
    own = dict(cbs=TbpttResetCB(), loss_func=nn.L1Loss()) if make is Learner else {}
    with pytest.raises(ValueError, match=rf'first layer that differs is {name} \(cell\)'): fit(make(loaders(signals), model, **own))


# what goes wrong in a forward pass is said as it is

class Says(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how,self.rnn,self.head = how,nn.LSTM(2, 4, batch_first=True),nn.Linear(4, 1)
    def forward(self, x):
        if self.how=='attribute': return self.heads(self.rnn(x)[0])
        if self.how=='name': return self.head(rnn(x)[0])
        return self.head(self.rnn(x))

@pytest.mark.parametrize('how,error,said', [('attribute', AttributeError, "no attribute 'heads'"), ('name', NameError, "'rnn' is not defined"),
    ('tuple', TypeError, r'(?s)Linear \(head\) was given a tuple: .*returns \(output, state\)\. Take its output, self\.rnn\(x\)\[0\]; or wrap the layer in StatefulRNN')])
def test_a_slip_of_a_forward_pass_is_not_taken_for_a_length(how, error, said):
    with pytest.raises(error, match=said) as e: compare_parts(Says(how), Window((torch.randn(3, 8, 2),)), 4)
    assert 'number of steps' not in str(e.value)

@pytest.mark.parametrize('after', [nn.Linear(4, 1), nn.LayerNorm(4), nn.GRU(4, 4, batch_first=True), nn.ReLU()], ids=lambda o: type(o).__name__)
def test_a_layer_after_all_that_a_recurrent_one_returns_says_what_to_take(after):
    model = nn.Sequential(nn.GRU(2, 4, batch_first=True), after)
    with pytest.raises(TypeError, match=rf'{type(after).__name__} \(1\) was given a tuple'): compare_parts(model, Window((torch.randn(3, 8, 2),)), 4)
