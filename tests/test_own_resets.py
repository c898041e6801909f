"Which `reset()` is of a state, and models that are run where nobody trains them"
import copy, warnings
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.text.models.awdlstm import WeightDropout
from fastai.text.models.core import SequentialRNN
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from helpers import fit, sgd
from tbptt_fastai.instruments.activation import activation_memory
from tbptt_fastai.state.carry import Carry, without_carrying
from tbptt_fastai.state.own import check_reset, resets_state
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.truncation.schemes import Overlap

def batches(n=4, bs=4, steps=12, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(bs, steps, 2)+i for i in range(n)]

class First(nn.Module):
    "The output of a layer that returns more"
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x): return self.layer(x)[0]

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(2, 5, batch_first=True)
        self.reset()
    def reset(self): self.h = None
    def forward(self, x):
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return out

def with_norm(kind):
    torch.manual_seed(0)
    gru = nn.GRU(2, 5, batch_first=True)
    layer = {'StatefulRNN': lambda: StatefulRNN(gru), 'plain': lambda: First(gru), 'own': Own}[kind]()
    return nn.Sequential(layer, nn.Flatten(0, 1), nn.BatchNorm1d(5))

def means_by_hand(model, data):
    "The mean over batches of the mean of each, from a state of zeros in each"
    gru = next(m for m in model.modules() if isinstance(m, nn.GRU))
    with torch.no_grad(): return torch.stack([gru(x)[0].mean((0, 1)) for x in data]).mean(0)


@pytest.mark.parametrize('kind', ['StatefulRNN', 'plain', 'own'])
@pytest.mark.parametrize('averaged', [False, True])
@pytest.mark.parametrize('within', ['nothing', 'a run'])
def test_update_bn_without_carrying_has_the_means_of_unrelated_batches(kind, averaged, within):
    model = with_norm(kind)
    run,data = AveragedModel(model) if averaged else model,batches()
    expected = means_by_hand(run, data)
    with warnings.catch_warnings(), Carry(run) if within=='a run' else torch.enable_grad():
        run.train()
        run(data[0])
        slots = [m.slot.state for m in run.modules() if isinstance(m, StatefulRNN)]
        with without_carrying(run): update_bn(data, run)
        norm = next(m for m in run.modules() if isinstance(m, nn.BatchNorm1d))
        torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=1e-6)
        assert all(a is b for a,b in zip(slots, [m.slot.state for m in run.modules() if isinstance(m, StatefulRNN)], strict=True))
        assert not any(m._forward_pre_hooks for m in run.modules() if m is run and within=='nothing')

def test_update_bn_that_carries_from_batch_to_batch_says_so():
    model = with_norm('StatefulRNN')
    with pytest.warns(UserWarning, match=r'goes on from the state of the last batch.*without_carrying\(model\)'): update_bn(batches(), model)
    assert (model[2].running_mean-means_by_hand(model, batches())).abs().max()>1e-4

def test_a_loop_by_hand_is_not_warned_of():
    "A warm-up without gradients, training, evaluation; sequences that are reset; and what a Carry owns"
    model,(a,b,c,d) = StatefulRNN(nn.GRU(2, 5, batch_first=True)),batches()
    with torch.no_grad(): model(a)
    model(b).sum().backward()
    model.eval()
    with torch.no_grad(): model(a),model(b)
    model.train()
    model.reset()
    with torch.no_grad():
        for x in (a, b, c):
            model.reset()
            model(x)
        with Carry(model) as carry:
            carry.reset()
            for x in (a, b, c): model(x)

def test_the_state_of_a_training_outlives_an_update_of_statistics_in_the_middle():
    for kind in ('StatefulRNN', 'plain', 'own'):
        model,again = with_norm(kind),with_norm(kind)
        outs = []
        for m,update in ((model, True), (again, False)):
            with Carry(m) as carry:
                carry.reset()
                m(batches()[0])
                if update:
                    with without_carrying(m), torch.no_grad(): m(batches(seed=1)[0])
                if kind=='own': assert m[0].h is not None
                outs.append(m(batches()[1]))
        assert torch.equal(*outs), kind

def test_a_callback_may_run_it_in_the_middle_of_a_fit():
    from fastai.callback.core import Callback
    class Update(Callback):
        order = 20
        def after_batch(self):
            if not self.training: return
            mode = {m:m.training for m in self.model.modules()}
            with without_carrying(self.learn.model), torch.no_grad(): self.learn.model.train()(batches(1, 3, 7)[0])
            for m,o in mode.items(): m.training = o
    class Head(nn.Module):
        def __init__(self, kind):
            super().__init__()
            torch.manual_seed(0)
            self.body = {'StatefulRNN': lambda: StatefulRNN(nn.GRU(2, 5, batch_first=True)), 'own': Own}[kind]()
            self.out = nn.Linear(5, 1)
            if kind=='own': self.reset = self.body.reset
        def forward(self, x): return self.out(self.body(x))
    data = [(x, x.cumsum(1)[...,:1]) for x in batches()]
    for kind in ('StatefulRNN', 'own'):
        a,b = (fit(Learner(DataLoaders(data, data), Head(kind), MSELossFlat(), opt_func=sgd, cbs=[TbpttResetCB(5), *cbs])).model for cbs in ([Update()], []))
        for p,q in zip(a.parameters(), b.parameters(), strict=True): assert torch.equal(p, q), kind


# --- reset

class Renamed(nn.LSTM): reset = nn.LSTM.reset_parameters

def test_a_reset_of_weights_is_not_taken_for_one_of_a_state():
    lstm = nn.LSTM(2, 5, batch_first=True)
    assert not resets_state(WeightDropout(copy.deepcopy(lstm), .1)) and not resets_state(Renamed(2, 5)) and not resets_state(lstm)
    assert not resets_state(SequentialRNN(First(WeightDropout(copy.deepcopy(lstm), .1)), nn.Linear(5, 1)))
    assert resets_state(Own()) and resets_state(SequentialRNN(Own(), nn.Linear(5, 1))) and resets_state(StatefulRNN(lstm))
    assert resets_state(WeightDropout(OwnCell(), .1, layer_names='w'))
    assert Carry(SequentialRNN(First(WeightDropout(lstm, .1)), nn.Linear(5, 1))).is_own is False

class OwnCell(nn.Module):
    "Carries a state, and has a weight"
    def __init__(self):
        super().__init__()
        self.w,self.h = nn.Parameter(torch.ones(1)),None
    def reset(self): self.h = None

class Body(SequentialRNN):
    def __init__(self, p=1e-12):
        torch.manual_seed(0)
        super().__init__(First(WeightDropout(nn.LSTM(2, 5, batch_first=True), p)), nn.Linear(5, 1))

def test_a_layer_with_dropped_weights_is_carried_as_a_plain_one():
    "... under a scheme too that keeps states in the middle, which a model of its own state cannot"
    data = [(x, x.cumsum(1)[...,:1]) for x in batches()]
    model = fit(Learner(DataLoaders(data, data), Body(), MSELossFlat(), opt_func=sgd, cbs=TbpttResetCB(truncation=Overlap(3, 6)))).model
    plain = nn.Sequential(First(nn.LSTM(2, 5, batch_first=True)), nn.Linear(5, 1))
    plain.load_state_dict({k.replace('module.', '').replace('_raw', ''):o for k,o in Body().state_dict().items()})
    fit(Learner(DataLoaders(data, data), plain, MSELossFlat(), opt_func=sgd, cbs=TbpttResetCB(truncation=Overlap(3, 6))))
    ours = {k.replace('module.', '').replace('_raw', ''):o for k,o in model.state_dict().items()}
    for k,o in plain.state_dict().items(): torch.testing.assert_close(ours[k], o, rtol=0, atol=1e-6)

class MadeAnew(nn.Module):
    "Its reset makes weights anew, in one of the ways in which it can be written"
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.out,self.norm,self.how = nn.GRU(2, 5, batch_first=True),nn.Linear(5, 1),nn.BatchNorm1d(5),how
        self.norm.running_mean.fill_(.3)
        if how=='frozen': self.out.requires_grad_(False)
    def forward(self, x): return self.out(self.rnn(x)[0])
    def reset(self):
        if self.how=='apply': self.apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None)
        if self.how=='data': self.rnn.weight_hh_l0.data.uniform_()
        if self.how in ('constant', 'frozen'): nn.init.constant_(self.out.bias, self.out.bias.item()*0)
        if self.how=='replaced': self.out.bias = nn.Parameter(torch.zeros(1))
        if self.how=='statistics': self.norm.reset_running_stats()

@pytest.mark.parametrize('how', ['apply', 'data', 'constant', 'frozen', 'replaced', 'statistics'])
def test_a_reset_that_makes_weights_anew_is_refused_and_leaves_them(how):
    data = [(x, x.cumsum(1)[...,:1]) for x in batches()]
    model = MadeAnew(how)
    before,state = [*model.parameters()],copy.deepcopy(model.state_dict())
    for sub_seq_len in (5, None):
        with pytest.raises(ValueError, match=r'MadeAnew.reset\(\) changes weights'): Learner(DataLoaders(data, data), model, MSELossFlat(), cbs=TbpttResetCB(sub_seq_len))
    with pytest.raises(ValueError, match='changes weights'): Carry(model).reset()
    with pytest.raises(ValueError, match='changes weights'): activation_memory(model, data[0][0])
    assert all(a is b for a,b in zip(before, model.parameters(), strict=True))
    for k,o in model.state_dict().items(): assert torch.equal(o, state[k]), k

class Learned(nn.Module):
    "A first state that is learned, and parameters and buffers as states"
    def __init__(self):
        super().__init__()
        self.first,self.h = nn.Parameter(torch.full((1, 5), .5)),nn.Parameter(torch.zeros(4, 5), requires_grad=False)
        self.register_buffer('count', torch.zeros(1))
        self.reset()
    def reset(self):
        self.state = self.first.expand(4, 5).clone()
        with torch.no_grad(): self.h.zero_(),self.count.zero_()

def test_states_of_every_kind_may_be_reset():
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    for model in (Learned(), Own(), Body()): check_reset(model)
    model = Learned()
    model.h.data.fill_(2.)
    check_reset(model)
    assert (model.first==.5).all() and (model.state==.5).all() and (model.h==0).all()
    for _ in range(2):
        Carry(copy.deepcopy(Own())).reset()
        other = Learned()
        Carry(other).reset()
        assert other.state.requires_grad and model.state.requires_grad # the first state is learned
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), drawn)


# a reset that leaves the state

class Leaves(nn.Module):
    "Its reset misses the state, in one of the ways in which that happens"
    def __init__(self, how):
        super().__init__()
        self.how,self.rnn = how,nn.GRU(2, 5, batch_first=True)
        self.h = None
        if how=='in place': self.register_buffer('kept', torch.zeros(1, 4, 5))
    def reset(self):
        if self.how=='misspelt': self.hidden = None
        if self.how=='clears': self.h = None
        if self.how=='another': self.last = None
    def forward(self, x):
        h = self.h[0] if self.how=='in a tuple' and self.h else self.kept[:,:len(x)].clone() if self.how=='in place' else self.h
        out,h = self.rnn(x, h)
        h = h.detach()
        if self.how=='in place': self.kept[:,:len(x)] = h
        else: self.h = (h,) if self.how=='in a tuple' else h
        self.last = out.detach()
        return out

def fit_own(model, **kwargs):
    "On four batches of unrelated windows"
    data = [(x, torch.zeros(len(x), 12, 5)) for x in batches()]
    learn = Learner(DataLoaders(data, data[:1]), model, loss_func=MSELossFlat(), opt_func=sgd, cbs=TbpttResetCB(**kwargs))
    return fit(learn, 1)

@pytest.mark.parametrize('sub_seq_len', [4, None])
@pytest.mark.parametrize('how,name', [('misspelt','h'), ('pass','h'), ('another','h'), ('in a tuple','h'), ('in place','kept')])
def test_a_reset_that_leaves_the_state_of_the_last_window_is_refused_by_name(how, name, sub_seq_len):
    "Else every window would start from that of another one, and train all the same"
    model = Leaves(how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf'Leaves\.reset\(\) leaves [\w, ]*\b{name}\b.*each window would start from the state of another'): fit_own(model, sub_seq_len=sub_seq_len)
    for k,v in model.rnn.state_dict().items(): assert torch.equal(v, before[f'rnn.{k}'])

def test_within_another_model_it_is_named_with_its_place():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Leaves('pass')
        def reset(self): self.inner.reset()
        def forward(self, x): return self.inner(x)
    with pytest.raises(ValueError, match=r'Outer\.reset\(\) leaves inner\.h\b'): fit_own(Outer(), sub_seq_len=4)

def test_what_is_kept_and_not_used_is_no_state():
    "`last` stays; and `check=False` lets a state stay as well"
    fit_own(Leaves('clears'), sub_seq_len=4)
    fit_own(Leaves('pass'), sub_seq_len=4, check=False)

def test_random_predictions_with_a_reset_are_not_refused():
    class Noisy(Own):
        "By a generator of its own"
        g = torch.Generator()
        def forward(self, x): return super().forward(x)+torch.rand(1, generator=self.g)
    fit_own(Noisy(), sub_seq_len=4)
