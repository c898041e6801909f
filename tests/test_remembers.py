"Models that are held wrongly to forget, or to look ahead, train; those that do are refused, whatever they return and take"
import copy
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from helpers import fit, learner
from tbptt_fastai.loaders.segment import Window
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.models.memories import CausalConv
from tbptt_fastai.sequences.windows import Sequences
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.parts import check_remembers, compare_parts

def signal(steps=20, bs=4, channels=1, dtype=torch.float32):
    return torch.randn(bs, steps, channels, generator=torch.Generator().manual_seed(0)).to(dtype)

def check(model, *inputs, timed=None, dtype=torch.float32):
    "The checks before the first step; the model is as it was"
    torch.manual_seed(0)
    window = Window(tuple(inputs), len(inputs), timed)
    before,training = copy.deepcopy(model.state_dict()),model.training
    try:
        compare_parts(model, window, -(-window.steps//2))
        check_remembers(model, window)
    finally:
        assert model.training==training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

class Net(nn.Module):
    "A recurrent layer, what is made of its output, and maybe a reset in every call"
    def __init__(self, f=lambda o, m: m.out(o), forgets=False, n_in=1):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.out,self.f,self.forgets = StatefulRNN(nn.GRU(n_in, 4, batch_first=True)),nn.Linear(4, 2),f,forgets
    def forward(self, x):
        if self.forgets: self.rnn.reset()
        return self.f(self.rnn(x), self)

def last(o, m): return m.out(o[:,-1])


# what remembers, and may not look like it

@pytest.mark.parametrize('steps', [20, 401, 1200])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_long_sub_window_of_which_the_last_step_is_predicted(steps, dtype):
    "Its first half has faded at its end"
    check(Net(last).to(dtype), signal(steps, dtype=dtype))
    with pytest.raises(ValueError, match='remembers nothing'): check_remembers(Net(last, True).to(dtype), Window((signal(steps, dtype=dtype),), 1))

class Beside(nn.Module):
    "A way around the recurrent layer, which something that is zero keeps shut"
    def __init__(self, shut, forgets):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.through = Net(lambda o, m: o, forgets),nn.Linear(1, 4)
        self.shut,self.out = shut(),nn.Linear(4, 1)
    def forward(self, x): return self.out(self.through(x)+self.shut(self.rnn(x)))

class Scale(nn.Module):
    def __init__(self, *size): super().__init__(); self.gate = nn.Parameter(torch.zeros(size))
    def forward(self, x): return self.gate*x

def zero(layer):
    nn.init.zeros_(layer.weight)
    return layer

SHUT = dict(number=Scale, one=lambda: Scale(1), channels=lambda: Scale(4), norm=lambda: zero(nn.LayerNorm(4)), linear=lambda: zero(nn.Linear(4, 4)))

@pytest.mark.parametrize('name', SHUT)
def test_what_is_zero_before_it_is_trained(name):
    check(Beside(SHUT[name], False), signal())
    with pytest.raises(ValueError, match='remembers nothing'): check(Beside(SHUT[name], True), signal())

def test_a_last_layer_of_zeros_does_not_hide_that_nothing_is_remembered():
    for forgets in (False, True):
        model = nn.Sequential(Net(lambda o, m: o[:,-1], forgets), zero(nn.Linear(4, 1)))
        nn.init.zeros_(model[1].bias)
        if not forgets: check(model, signal())
        else:
            with pytest.raises(ValueError, match='remembers nothing'): check(model, signal())

def test_a_model_that_predicts_one_value_whatever_it_is_given():
    model = Net(lambda o, m: torch.relu(m.out(o)))
    nn.init.constant_(model.out.bias, -100.)
    check(model, signal())

def test_outputs_of_two_values():
    check(Net(lambda o, m: (m.out(o)>0).float()), signal())

@pytest.mark.parametrize('dilation', [1, 30, 200])
def test_a_memory_of_what_was_long_ago(dilation):
    torch.manual_seed(0)
    check(StatefulRNN(CausalConv(1, 2, 4, 2, (dilation,))), signal())

def test_tokens_of_one_row_that_are_all_the_same_and_half_precision_and_dropout():
    tokens = nn.Sequential(nn.Embedding(9, 4), Net(n_in=4))
    check(tokens, torch.randint(9, (4, 20)))
    check(tokens, torch.zeros(1, 20, dtype=torch.long))
    check(nn.Sequential(Net(), nn.Dropout(.5)).train(), signal())


# what forgets or looks along time, whatever it returns and takes

def mixture(o, m): return MixtureSameFamily(Categorical(logits=o), Normal(o, o.exp()))
OUT = dict(
    tensor=lambda o, m: m.out(o), tuple=lambda o, m: (m.rnn.rnn.weight_ih_l0.new_zeros(4), m.out(o)), list=lambda o, m: [m.out(o)], dict=lambda o, m: dict(y=m.out(o)),
    normal=lambda o, m: Normal(m.out(o), 1.), independent=lambda o, m: Independent(Normal(m.out(o), 1.), 1), categorical=lambda o, m: Categorical(logits=m.out(o)),
    mixture=lambda o, m: mixture(m.out(o), m), nested=lambda o, m: dict(a=(None, [Normal(m.out(o), 1.)])))
POOL = dict(mean=lambda o: o.mean(1), maximum=lambda o: o.amax(1), attention=lambda o: (o.softmax(1)*o).sum(1), first=lambda o: o[:,0],
            flipped=lambda o: o.flip(1)[:,-1], centred=lambda o: o-o.mean(1, keepdim=True))
out = pytest.mark.parametrize('name', OUT)

@out
@pytest.mark.parametrize('pool', POOL)
def test_every_output_is_held_to_account(name, pool):
    check(Net(OUT[name]), signal())
    check(Net(lambda o, m: OUT[name](o[:,-1], m)), signal())
    with pytest.raises(ValueError, match='gives other predictions'): check(Net(lambda o, m: OUT[name](POOL[pool](o), m)), signal())

@pytest.mark.parametrize('pool', POOL)
@pytest.mark.parametrize('form', [tuple, list, lambda o: dict(enumerate(o))])
def test_the_second_output_as_well(pool, form):
    def both(o, m): return form((m.out(o), m.out(POOL[pool](o))))
    with pytest.raises(ValueError, match='gives other predictions.*Linear .out.|gives other predictions.*Net'): check(Net(both), signal())

@out
def test_what_forgets_is_refused_whatever_it_returns(name):
    def of_last(o, m): return OUT[name](o[:,-1], m)
    model = Net(of_last, True)
    with pytest.raises(ValueError, match='remembers nothing'): check_remembers(model, Window((signal(),), 1))

def test_a_state_that_is_returned_and_a_number_for_the_loss_are_no_predictions():
    check(Net(lambda o, m: (m.out(o), o[:,-1][None])), signal())
    check(Net(lambda o, m: (m.out(o), o.square().mean())), signal())

def test_noise_is_not_taken_for_memory():
    def noisy(o, m): return m.out(o[:,-1])+torch.randn(2)
    check(Net(noisy), signal())
    with pytest.raises(ValueError, match='remembers nothing'): check_remembers(Net(noisy, True), Window((signal(),), 1))

def test_similarities_of_all_steps_are_not_for_sub_windows():
    "Their shape depends on the steps twice: what cannot be compared is no error of its own"
    compare_parts(Net(lambda o, m: o@o.transpose(1, 2)), Window((signal(),), 1), 10)

class Inputs(Net):
    def forward(self, x, s): return super().forward(x)+s[:,None]
class OfDict(Net):
    def forward(self, d): return super().forward(d['x'])+d['s'][:,None]

def test_several_inputs_and_dicts():
    x,s = signal(),torch.randn(4, 2)
    check(Inputs(), x, s)
    check(OfDict(), dict(s=s, x=x), timed=(False,True))
    for model,inputs,timed in ((Inputs(last, True), (x, s), None), (OfDict(last, True), (dict(s=s, x=x),), (False,True))):
        window = Window(inputs, len(inputs), timed)
        with pytest.raises(ValueError, match='remembers nothing'): check_remembers(model, window)

@pytest.mark.parametrize('stream', [False, True])
def test_sub_windows_of_one_step(stream):
    x = signal(30, 8)
    dl = StreamDL(Sequences(list(x), list(x[...,:1])), bs=4, sub_seq_len=1) if stream else [(o, o) for o in x.split(4)]
    def fitted(forgets): return fit(learner(DataLoaders(dl, dl), Net(lambda o, m: m.out(o)[...,:1], forgets), 'dls' if stream else 1, loss_func=nn.MSELoss()))
    fitted(False)
    with pytest.raises(ValueError, match='remembers nothing'): fitted(True)

def test_labels_of_long_sub_windows_train():
    data = [(signal(900), torch.arange(4)%2)]*2
    fit(learner(DataLoaders(data, data), Net(last), 300, loss_func=CrossEntropyLossFlat()))

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_loss_of_any_type_is_recorded(dtype):
    data = [(signal(40, dtype=dtype), signal(40, channels=2, dtype=dtype))]*2
    assert fit(learner(DataLoaders(data, data), Net().to(dtype), 20, loss_func=nn.MSELoss())).recorder.losses[0].isfinite()

def test_whole_numbers_are_compared_too():
    check(Net(lambda o, m: (1000*m.out(o)).round().div(100).long()), signal())
    with pytest.raises(ValueError, match='gives other predictions'): check(Net(lambda o, m: (1000*m.out(o.mean(1))).long()), signal())
