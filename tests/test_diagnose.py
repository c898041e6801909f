"check_memory_grads tells the mistakes apart; check_sub_windows names the layer that cannot be carried"
import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from functools import partial
from torch import nn
from helpers import adam, fit_own_lr, loaders
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.models.text import TextRNN
import tbptt_fastai.instruments.diagnose # noqa: it adds methods to Learner


def lstm(**kwargs): return nn.Sequential(StatefulRNN(nn.LSTM(2, 6, batch_first=True)), nn.Linear(6, 1))


class Slots(nn.Module):
    "What is written is read in later steps only: its write has a gradient through the memory alone"
    def __init__(self, early=False, frozen=False):
        super().__init__()
        self.write,self.read,self.unused,self.early = nn.Linear(2, 4),nn.Linear(2, 4),nn.Linear(2, 2),early
        if frozen: self.write.requires_grad_(False)
    def initial_state(self, bs, device, dtype): return torch.zeros(bs, 4, device=device, dtype=dtype)
    def forward(self, x, memory):
        out = []
        for xt in x.unbind(1):
            out.append(memory*self.read(xt).sigmoid())
            memory = .9*memory+self.write(xt).tanh()
            if self.early: memory = memory.detach()
        return torch.stack(out, 1),memory

def slots(**kwargs): return nn.Sequential(StatefulRNN(Slots(**kwargs)), nn.Linear(4, 1))

class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.out,self.h = nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1),None
    def forward(self, x):
        if self.h is not None and self.h.shape[1]!=len(x): self.h = None
        out,h = self.rnn(x, self.h)
        self.h = h.detach()
        return self.out(out)

class Feedforward(nn.Module):
    def __init__(self): super().__init__(); self.out = nn.Linear(2, 1)
    def reset(self): pass
    def forward(self, x): return self.out(x)


@pytest.mark.parametrize('model,sub_seq_len,verdict', [
    (lstm, 20, 'healthy'), (lstm, None, 'healthy'), (slots, 20, 'healthy'),
    (lstm, 1, 'sub-window of one step'), (slots, 1, 'sub-window of one step'),
    (partial(slots, early=True), 20, 'detached too early'), (Leaky, 20, 'forgotten boundaries'), (Feedforward, 20, 'no memory'),
])
def test_each_mistake_has_a_verdict_of_its_own(signals, model, sub_seq_len, verdict):
    torch.manual_seed(0)
    learn = TbpttLearner(loaders(signals, sub_seq_len), model())
    assert learn.check_memory_grads().attrs['verdict'].startswith(verdict)


class Tuple(nn.Module):
    def __init__(self, flip=False): super().__init__(); self.rnn,self.out,self.flip = nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1),flip
    def forward(self, x):
        out,h = self.rnn(x)
        return self.out(out).flip(1) if self.flip else self.out(out),h

class OwnZeros(nn.Module):
    def __init__(self): super().__init__(); self.rnn,self.out = nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1)
    def forward(self, x): return self.out(self.rnn(x, torch.zeros(1, len(x), 6))[0])

class Tiny(Leaky):
    def forward(self, x): return super().forward(x)*1e-9

def test_a_model_that_carries_nothing_does_not_pass_for_a_healthy_one(signals):
    torch.manual_seed(0)
    table = TbpttLearner(loaders(signals), OwnZeros()).check_memory_grads()
    assert table.attrs['verdict'].startswith('not carried') and table.share.isna().all()
    conv = TbpttLearner(loaders(signals, None), Beside(nn.Conv1d(2, 2, 3, padding=1)))
    assert conv.check_memory_grads().attrs['verdict'].startswith('not carried')
    assert TbpttLearner(loaders(signals), Tiny()).check_memory_grads().attrs['verdict'].startswith('forgotten boundaries')
    loss = lambda p,y: nn.functional.l1_loss(p[0] if isinstance(p, tuple) else p, y)
    assert TbpttLearner(loaders(signals), Tuple(), loss_func=loss).check_memory_grads().attrs['verdict'].startswith('healthy')
    with pytest.raises(ValueError, match='gives other predictions'): TbpttLearner(loaders(signals), Tuple(flip=True), loss_func=loss).check_sub_windows()
    with pytest.raises(ValueError, match='All parameters are frozen'): TbpttLearner(loaders(signals), lstm().requires_grad_(False)).check_memory_grads()


def test_the_steps_are_those_of_a_sub_window(signals):
    torch.manual_seed(0)
    model = lstm()
    def share(sub_seq_len, **kwargs): return TbpttLearner(loaders(signals, sub_seq_len), model).check_memory_grads(**kwargs).share['0.rnn.weight_hh_l0']
    assert share(2)==share(20, steps=2)<share(5)<share(20)
    assert share(1)==share(20)


def test_norms_are_those_of_a_loop_by_hand(signals):
    torch.manual_seed(0)
    learn = TbpttLearner(loaders(signals, shuffle=False, dtype=torch.float64), lstm().double(), loss_func=nn.MSELoss())
    rnn,head = learn.model[0].rnn,learn.model[1]
    table = learn.check_memory_grads(steps=30)
    x,y = (o[:,:30].double() for o in learn.dls.train.one_batch())
    params,grads = [*rnn.parameters(), *head.parameters()],[]
    for cut in (False, True):
        state,out = None,[]
        for t in range(30):
            o,state = rnn(x[:,t:t+1], state)
            if cut: state = tuple(s.detach() for s in state)
            out.append(o)
        grads.append(torch.autograd.grad(nn.functional.mse_loss(head(torch.cat(out, 1)), y), params))
    np.testing.assert_allclose(table.norm, [g.norm() for g in grads[0]], rtol=1e-5)
    np.testing.assert_allclose(table['through memory'][:4], [(g-d).norm() for g,d in zip(*grads)][:4], rtol=1e-4)
    assert (table['through memory'][4:]<1e-8).all()


def test_parameters_are_told_apart(signals):
    torch.manual_seed(0)
    table = TbpttLearner(loaders(signals), slots()).check_memory_grads()
    assert table.verdict['0.rnn.write.weight']=='through the memory' and table.share['0.rnn.write.weight']==1 # it has no other gradient
    assert table.verdict['0.rnn.read.weight']=='directly only' and table.verdict['0.rnn.unused.weight']=='not in the graph' and table.verdict['1.weight']=='directly only'
    table = TbpttLearner(loaders(signals), slots(frozen=True)).check_memory_grads()
    assert table.verdict['0.rnn.write.weight']=='frozen'


def test_nothing_is_left_behind(signals):
    "The next fit is the same, bit by bit"
    def trained(look):
        torch.manual_seed(0)
        model = nn.Sequential(StatefulRNN(nn.LSTM(2, 6, num_layers=2, dropout=.5, batch_first=True)), nn.Linear(6, 1))
        learn = TbpttLearner(loaders(signals), model, opt_func=adam)
        set_seed(1)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-2)
            modes = [m.training for m in model.modules()]
            if look:
                learn.check_memory_grads()
                learn.check_sub_windows()
                assert [m.training for m in model.modules()]==modes
            learn.fit(1, 1e-2)
        return list(model.parameters())
    for a,b in zip(trained(True), trained(False), strict=True): assert torch.equal(a, b)


def test_streams_and_text_can_be_checked(signals):
    u,y = signals
    learn = TbpttLearner(SequenceDataLoaders.from_arrays([u[:300], u[300:900]], [y[:300], y[300:900]], sub_seq_len=20, bs=2), lstm())
    assert learn.check_memory_grads().attrs['verdict'].startswith('healthy')
    learn.check_sub_windows()
    dls = SequenceDataLoaders.from_text('the quick brown fox '*40, bs=4, sub_seq_len=10)
    learn = TbpttLearner(dls, TextRNN(len(dls.vocab), hidden_size=8))
    table = learn.check_memory_grads()
    assert table.attrs['verdict'].startswith('healthy') and table.verdict['embedding.weight']=='through the memory'
    learn.check_sub_windows()


class Beside(nn.Module):
    "A recurrent layer, and another on the way"
    def __init__(self, layer, swap=True):
        super().__init__()
        self.layer,self.rnn,self.out,self.swap = layer,nn.GRU(2, 6, batch_first=True),nn.Linear(6, 1),swap
    def forward(self, x):
        x = self.layer(x.transpose(1, 2)).transpose(1, 2) if self.swap else self.layer(x)
        return self.out(self.rnn(x)[0])

class Attend(nn.Module):
    def __init__(self): super().__init__(); self.att = nn.MultiheadAttention(2, 1, batch_first=True)
    def forward(self, x): return self.att(x, x, x)[0]

class OverTime(nn.Module):
    def forward(self, x): return x-x.mean(1, keepdim=True)

@pytest.mark.parametrize('layer,swap,name', [(lambda: nn.Conv1d(2, 2, 3, padding=1), True, r'Conv1d \(layer\)'), (lambda: nn.GroupNorm(1, 2), True, r'GroupNorm \(layer\)'),
                                             (Attend, False, r'MultiheadAttention \(layer.att\)'), (OverTime, False, r'OverTime \(layer\)')])
def test_a_layer_that_looks_along_time_is_named(signals, layer, swap, name):
    torch.manual_seed(0)
    for sub_seq_len in ('dls', None):
        learn = TbpttLearner(loaders(signals), Beside(layer(), swap), sub_seq_len=sub_seq_len)
        with pytest.raises(ValueError, match=f'first layer that differs is ({name}).*sub_seq_len=None'): learn.check_sub_windows()


@pytest.mark.parametrize('layer,swap', [(lambda: nn.Conv1d(2, 2, 1), True), (lambda: nn.BatchNorm1d(2), True), (lambda: nn.LayerNorm(2), False), (lambda: nn.Dropout(.5), False)])
def test_a_layer_that_does_not_is_no_harm(signals, layer, swap):
    TbpttLearner(loaders(signals), Beside(layer(), swap)).check_sub_windows()


class Early(nn.Module):
    "Detached after each step"
    def __init__(self, n_in=2, size=16): super().__init__(); self.cell = nn.GRUCell(n_in, size)
    def forward(self, x, h=None):
        out = []
        for xt in x.unbind(1):
            h = self.cell(xt, h)
            out.append(h)
            h = h.detach()
        return torch.stack(out, 1),h

@pytest.mark.parametrize('bad_first', [True, False])
def test_a_detached_memory_is_named_beside_a_healthy_one(signals, bad_first):
    torch.manual_seed(0)
    layers = [StatefulRNN(Early(2, 2)), StatefulRNN(nn.GRU(2, 2, batch_first=True))]
    model = nn.Sequential(*(layers if bad_first else layers[::-1]), nn.Linear(2, 1))
    verdict = TbpttLearner(loaders(signals), model).check_memory_grads().attrs['verdict']
    assert verdict.startswith(f'detached too early in {0 if bad_first else 1}: ')
    model = nn.Sequential(*layers[1:], StatefulRNN(Slots()), nn.Linear(4, 1))
    assert TbpttLearner(loaders(signals), model).check_memory_grads().attrs['verdict'].startswith('healthy')


def test_a_detached_memory_of_tokens_is_found():
    class Tokens(nn.Module):
        def __init__(self, early): super().__init__(); self.embed,self.cell,self.early = nn.Embedding(30, 3),nn.GRUCell(3, 4),early
        def forward(self, x, h=None):
            out = []
            for xt in x.unbind(1):
                h = self.cell(self.embed(xt), h)
                out.append(h)
                if self.early: h = h.detach()
            return torch.stack(out, 1),h
    dls = SequenceDataLoaders.from_text('the quick brown fox '*40, bs=4, sub_seq_len=10)
    for early,verdict in ((True, 'detached too early in 0'), (False, 'healthy')):
        torch.manual_seed(0)
        learn = TbpttLearner(dls, nn.Sequential(StatefulRNN(Tokens(early)), nn.Linear(4, len(dls.vocab))))
        assert learn.check_memory_grads().attrs['verdict'].startswith(verdict)


def doubled(x): return 2*x

@pytest.mark.parametrize('tfms', [None, [doubled]])
def test_first_states_of_groups_are_those_of_the_rows_that_are_checked(tfms):
    from tbptt_fastai.state.stateful import learned_state
    rng = np.random.default_rng(0)
    xs,ys = ([rng.standard_normal((60,c)).astype(np.float32) for _ in range(4)] for c in (2,1))
    dls = SequenceDataLoaders.from_arrays(xs, ys, sub_seq_len=20, bs=2, groups=['a','b','c','d'], **({} if tfms is None else dict(after_batch=tfms)))
    rnn = nn.LSTM(2, 6, batch_first=True)
    learn = TbpttLearner(dls, nn.Sequential(StatefulRNN(rnn, initial=learned_state(rnn, ['a','b','c','d'])), nn.Linear(6, 1)))
    table = learn.check_memory_grads()
    assert table.attrs['verdict'].startswith('healthy') and table.norm['0.initial.tensors.0']>0 # it was given the groups of its rows
    learn.check_sub_windows()
    fit_own_lr(learn, 1)


def test_predictions_that_are_not_finite_are_not_compared(signals):
    model = lstm()
    nn.init.constant_(model[1].bias, float('nan'))
    with pytest.raises(ValueError, match='not finite'): TbpttLearner(loaders(signals), model).check_sub_windows()


class NoGrad(nn.Module):
    def __init__(self): super().__init__(); self.rnn = nn.GRU(2, 6, batch_first=True)
    def forward(self, x, h=None):
        with torch.no_grad(): return self.rnn(x, h)

class Noise(nn.Module):
    def forward(self, x): return x+torch.randn_like(x)

def verdict(signals, model, sub_seq_len=20, **kwargs): return TbpttLearner(loaders(signals, sub_seq_len), model, **kwargs).check_memory_grads().attrs['verdict']

def test_the_cause_is_not_always_the_detach(signals):
    model = lstm()
    model[0].requires_grad_(False)
    assert verdict(signals, model).startswith('frozen: all 4 parameters') and not model[0].rnn.weight_hh_l0.requires_grad
    assert verdict(signals, nn.Sequential(StatefulRNN(NoGrad(), batch_dim=1), nn.Linear(6, 1))).startswith('not in the graph: 0 runs')
    assert verdict(signals, lstm(), loss_func=lambda p,y: (p-y).sum()*float('nan')).startswith('not finite')
    assert verdict(signals, lstm(), loss_func=lambda p,y: (p-p).sum()).startswith('no gradient')
    assert verdict(signals, lstm(), loss_func=lambda p,y: y.mean()).startswith('no gradient')
    assert verdict(signals, lstm(), loss_func=nn.MSELoss(reduction='none')).startswith('healthy')
    with pytest.raises(ValueError, match='other predictions each time'): verdict(signals, nn.Sequential(Noise(), *lstm()))
    model = lstm()
    nn.init.constant_(model[1].bias, float('nan'))
    with pytest.raises(ValueError, match='not finite'): verdict(signals, model)
    u,y = signals
    with pytest.raises(ValueError, match='1 step'): TbpttLearner(SequenceDataLoaders.from_arrays(u, y, win_sz=1, sub_seq_len=1, bs=4), lstm()).check_memory_grads()

def test_rounding_is_no_memory(signals):
    "At the optimum of the head gradients cancel, and what is left of them is rounding"
    torch.manual_seed(0)
    learn = TbpttLearner(loaders(signals, 100, shuffle=False), nn.Sequential(StatefulRNN(Early()), nn.Linear(16, 1)), loss_func=nn.MSELoss())
    x,y = learn.dls.train.one_batch()
    with torch.no_grad():
        h = learn.model[0](x)
        h = torch.cat([h, torch.ones_like(h[...,:1])], -1).flatten(0, 1).double()
        w = torch.linalg.lstsq(h, y.flatten(0, 1).double()).solution.float()
        learn.model[1].weight.copy_(w[:-1].T)
        learn.model[1].bias.copy_(w[-1])
    learn.model[0].reset()
    table = learn.check_memory_grads()
    assert set(table.verdict)=={'directly only'} and table.attrs['verdict'].startswith('detached too early in 0')

def test_the_verdict_is_shown_with_the_table(signals):
    table = TbpttLearner(loaders(signals), lstm()).check_memory_grads()
    assert 'healthy: ' in table._repr_html_() and 'healthy: ' in repr(table) and 'healthy' in repr(table[table.share>0])

def test_a_state_that_was_never_detached_is_named(signals):
    class Held(Leaky):
        def forward(self, x):
            out,self.h = self.rnn(x)
            return self.out(out)
    learn = TbpttLearner(loaders(signals), Held())
    learn.model(torch.zeros(4, 5, 2))
    with pytest.raises(TypeError, match='not detached'): learn.check_memory_grads()

def test_a_learner_without_the_callback_can_be_checked(signals):
    from fastai.learner import Learner
    assert Learner(loaders(signals), lstm(), nn.L1Loss()).check_memory_grads().attrs['verdict'].startswith('healthy')

@pytest.mark.parametrize('kind', ['torch', 'windows', 'stream', 'transformed'])
def test_the_order_of_the_data_is_not_changed(signals, kind):
    from fastai.data.core import DataLoaders
    u,y = signals
    def order(look):
        set_seed(0)
        if kind=='torch':
            x = torch.randn(24, 40, 2)
            dl = torch.utils.data.DataLoader(list(zip(x, x[...,:1])), 4, shuffle=True, generator=torch.Generator().manual_seed(1))
            dls = DataLoaders(dl, dl)
        elif kind=='stream': dls = SequenceDataLoaders.from_arrays([u[:300], u[300:900]], [y[:300], y[300:900]], sub_seq_len=20, bs=2)
        else: dls = SequenceDataLoaders.from_arrays(u, y, win_sz=100, sub_seq_len=20, bs=4, **(dict(after_batch=[doubled]) if kind=='transformed' else {}))
        learn = TbpttLearner(dls, lstm(), sub_seq_len=20, loss_func=nn.L1Loss())
        if look:
            learn.check_memory_grads()
            learn.check_sub_windows()
        return [b[0] for b in (dls.train.sub_windows() if kind=='stream' else dls.train)]
    for a,b in zip(order(True), order(False), strict=True): assert torch.equal(a, b)


class Ignores(nn.Module):
    "A state that is counted on, and not looked at"
    def __init__(self): super().__init__(); self.lin = nn.Linear(2, 2)
    def forward(self, x, n=None): return self.lin(x),torch.ones(len(x)) if n is None else n+1

class EarlySum(nn.Module):
    "Detached, and without any parameter"
    def forward(self, x, h=None):
        out,h = [],torch.zeros_like(x[:,0]) if h is None else h
        for u in x.unbind(1):
            h = .5*h.detach()+u
            out.append(h)
        return torch.stack(out, 1),h

def test_a_memory_without_parameters_is_judged_by_the_gradients_through_it(signals):
    torch.manual_seed(0)
    assert verdict(signals, nn.Sequential(StatefulRNN(Ignores()), *lstm())).startswith('healthy')
    assert verdict(signals, nn.Sequential(nn.Linear(2, 2), StatefulRNN(EarlySum()), *lstm())).startswith('detached too early in 1')
