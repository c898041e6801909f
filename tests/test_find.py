"How far gradients reach back: against loops by hand, closed forms, and the bias that truncation really has"
import warnings
from itertools import combinations
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, get_worker_info
from torch.utils._pytree import tree_leaves, tree_map
from helpers import fit, fit_own_lr
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.instruments.find import decay_rate, relative_bias
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.models.memories import LRU
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

def data(n=9, steps=14, n_in=2, dtype=torch.float64):
    set_seed(0)
    return torch.randn(n, steps, n_in, dtype=dtype),torch.randn(n, steps, 1, dtype=dtype)

def torch_loaders(x, y, bs=3, shuffle=False):
    dl = DataLoader(list(zip(x, y)), bs, shuffle=shuffle)
    return DataLoaders(dl, dl)

class Plain(nn.Module):
    "A layer and a head, called without a state"
    def __init__(self, rnn): super().__init__(); self.rnn,self.head = rnn,nn.Linear(4, 1)
    def forward(self, x): return self.head(self.rnn(x)[0])

def phi_by_hand(rnn, head, x, y, lags, ends, loss=torch.nn.functional.mse_loss):
    "For each lag, the mean over rows and ends of the norm of the gradient, one row, one lag and one end at a time"
    res = np.zeros(len(lags))
    for row in range(len(x)):
        for s in ends:
            for i,k in enumerate(lags):
                with torch.no_grad(): _,state = rnn(x[row:row+1,:s-k+1])
                state = tree_map(lambda o: o.clone().requires_grad_(), state)
                out,_ = rnn(x[row:row+1,s-k+1:s+1], state)
                grads = torch.autograd.grad(loss(head(out[:,-1:]), y[row:row+1,s:s+1]), tree_leaves(state))
                res[i] += sum(float(g.abs().square().sum()) for g in grads)**.5/len(x)/len(ends)
    return res


@pytest.mark.parametrize('stateful', [True, False])
@pytest.mark.parametrize('make,step', [(lambda: nn.LSTM(2, 4, 2, batch_first=True), 1), (lambda: nn.GRU(2, 4, batch_first=True), 1), (lambda: nn.LSTM(2, 4, 2, batch_first=True, proj_size=4-1), 1),
                                       (lambda: nn.LSTM(2, 4, 2, batch_first=True), 2)])
def test_phi_is_what_a_loop_by_hand_gives(make, step, stateful):
    x,y = data()
    rnn = make().double()
    head = nn.Linear(3 if rnn.proj_size else 4, 1).double()
    model = nn.Sequential(StatefulRNN(rnn), head)
    if not stateful:
        model = Plain(rnn)
        model.head = head
    learn = TbpttLearner(torch_loaders(x, y), model, sub_seq_len=5, loss_func=nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = learn.tbptt_find(max_lag=6, step=step, n_batches=2, n_losses=99, show=False)
    np.testing.assert_array_equal(res.lags, range(step, 7, step))
    ends = range(6, 12) if step==1 else (7, 9, 11) # limit: twice max_lag
    expected = [phi_by_hand(rnn, head, x[b:b+3], y[b:b+3], res.lags, ends) for b in (0,3)]
    np.testing.assert_allclose(res.phi, expected, rtol=1e-8)


def test_a_complex_state_has_two_units_for_each_number():
    x,y = data()
    torch.manual_seed(0)
    rnn,head = LRU(2, 4).double(),nn.Linear(4, 1).double()
    learn = TbpttLearner(torch_loaders(x, y), nn.Sequential(StatefulRNN(rnn), head), sub_seq_len=5,
                         loss_func=nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = learn.tbptt_find(max_lag=6, n_batches=2, n_losses=99, show=False)
    expected = [phi_by_hand(rnn, head, x[b:b+3], y[b:b+3], res.lags, range(6, 12)) for b in (0,3)]
    np.testing.assert_allclose(res.phi, expected, rtol=1e-8)


@pytest.mark.parametrize('growth', [1., 1.3])
def test_a_memory_that_reaches_no_further_needs_no_more(growth):
    "Nothing is left out from lag 9 on"
    lags = np.arange(1, 31)
    phi = np.where(lags<=8, growth**lags, 0.)
    delta = relative_bias(lags, phi, phi.cumsum(), beta=.9)
    assert (delta[8:]==0).all() and (delta[:8]>.1).any()


def test_phi_of_several_layers_and_of_a_summed_loss_is_that_by_hand():
    x,y = data()
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.head = nn.GRU(2, 3, batch_first=True),nn.LSTM(3, 4, batch_first=True),nn.Linear(4, 1)
        def forward(self, x): return self.head(self.b(self.a(x)[0])[0])
    model = Two().double()
    def both(x, state=None):
        out,h = model.a(x, None if state is None else state[0])
        out,hc = model.b(out, None if state is None else state[1])
        return out,(h,hc)
    expected = phi_by_hand(both, model.head, x[:3], y[:3], range(1, 7), range(6, 12))
    for loss_func in (nn.MSELoss(), nn.MSELoss(reduction='sum'), nn.MSELoss(reduction='none')):
        learn = TbpttLearner(torch_loaders(x, y), model, sub_seq_len=5, loss_func=loss_func)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            res = learn.tbptt_find(max_lag=6, n_batches=1, n_losses=6, show=False)
        np.testing.assert_allclose(res.phi[0], expected, rtol=1e-8)


class Leaky(nn.Module):
    "A linear recurrent layer that forgets by rho per step"
    def __init__(self, rho): super().__init__(); self.rho = nn.Parameter(torch.tensor(rho, dtype=torch.float64))
    def forward(self, x, state=None):
        h,out = torch.zeros_like(x[:,0]) if state is None else state,[]
        for o in x.unbind(1): out.append(h := self.rho*h+o)
        return torch.stack(out, 1),h

def leaky(rho, steps=200, sub_seq_len=5, **kwargs):
    x,y = data(6, steps, 1)
    # the loss is y-h, with gradient -1
    return TbpttLearner(torch_loaders(x, y+1e30), nn.Sequential(StatefulRNN(Leaky(rho))), sub_seq_len=sub_seq_len,
                        loss_func=nn.L1Loss(), **kwargs)

@pytest.mark.parametrize('rho', [.5, .9])
def test_a_linear_network_has_the_estimates_of_the_closed_form(rho):
    res = leaky(rho).tbptt_find(show=False)
    np.testing.assert_allclose(res.phi, np.tile(rho**res.lags, (2,1)), rtol=1e-9)
    np.testing.assert_allclose(res.beta, rho, rtol=1e-9)
    k = np.arange(1, 101)
    left,norm = rho**k/(1-rho),rho*(1-rho**k)/(1-rho)
    expected = left/np.max(norm-left*rho)
    np.testing.assert_allclose(res.delta, expected, rtol=1e-6)
    assert res.reached and res.suggestion==k[expected<.1][0]
    assert leaky(rho).tbptt_find(bias=.01, show=False).suggestion==k[expected<.01][0]
    np.testing.assert_allclose(res.delta_sub[9], expected[:10].mean(), rtol=1e-6)
    assert res.memory>0 and res.seconds>0


def test_gradients_that_cancel_make_the_estimate_larger():
    "Those of neighbouring lags (rho<0), and of rows that err in opposite directions"
    rho,k = -.9,np.arange(1, 101)
    learn = leaky(rho)
    x,y = data(6, 200, 1)[0],torch.tensor([1e30, 1e30, -1e30], dtype=torch.float64).repeat(2)[:,None,None].expand(6, 200, 1)
    learn.dls = torch_loaders(x, y)
    res = learn.tbptt_find(show=False)
    left,norm = .9**k/.1,np.abs(rho*(1-rho**k)/(1-rho))/3
    np.testing.assert_allclose(res.phi[0], .9**k, rtol=1e-9)
    np.testing.assert_allclose(res.delta, left/np.max(norm-left*.9), rtol=1e-6)


@pytest.mark.parametrize('rho', [1., 1.05, 30.])
def test_without_a_decay_there_is_no_suggestion(rho):
    with pytest.warns(UserWarning, match='do not fall'): res = leaky(rho).tbptt_find()
    assert res.suggestion is None and not res.reached and np.isinf(res.delta).all() and res.beta>=1-1e-12
    assert {'vanishing','exploding'}=={o.get_text() for o in plt.gca().texts}
    assert not [o for o in plt.gca().lines if str(o.get_label()).startswith(('suggested','at least'))]

def test_gradients_that_are_not_finite_give_a_warning_and_no_suggestion():
    with pytest.warns(UserWarning, match='not finite'): res = leaky(1e10).tbptt_find()
    assert res.suggestion is None

def test_a_window_too_short_for_the_decay_suggests_at_least_its_lags():
    with pytest.warns(UserWarning, match='No lag up to 100'): res = leaky(.999).tbptt_find()
    assert res.suggestion==100 and not res.reached
    assert [o.get_label() for o in plt.gca().lines if o.get_linestyle()=='--']==['at least 100']

def test_where_nothing_reaches_back_there_is_no_suggestion():
    with pytest.warns(UserWarning, match='nothing reaches that far'): assert leaky(0.).tbptt_find().suggestion is None

def test_the_plot_marks_the_suggestion():
    res = leaky(.9).tbptt_find()
    assert plt.gca().get_yscale()=='log' and [o.get_label() for o in plt.gca().lines if o.get_label()[0]!='_' and len(o.get_xdata())==2]==[f'suggested: {res.suggestion}']

def test_decay_rate_and_relative_bias_are_those_by_hand():
    lags = np.arange(1, 9)
    phi = np.array([5., 3, 3, 1, .5, .4, .3, 1e-30])
    assert decay_rate(lags, phi, 3)==pytest.approx(np.exp(np.polyfit(lags[2:7], np.log(phi[2:7]), 1)[0])) # below exp(-50) dropped
    assert np.isnan(decay_rate(lags[:3], np.array([1., 0, 0])))
    delta = relative_bias(lags, phi, phi.cumsum(), .5, 4)
    left = [max(phi[i:].sum()+1e-30, 1*.5**(i-3)/.5) for i in range(3, 8)]
    left = [left[0]+11, left[0]+6, left[0]+3]+left
    np.testing.assert_allclose(delta, np.array(left)/max(phi[:i+1].sum()-(left+[left[-1]*.5])[i+1] for i in range(8)))
    assert np.isinf(relative_bias(lags, phi, 0*phi, .5, 4)).all() # gradients cancel


def test_losses_in_the_washout_do_not_count():
    x,y = data()
    rnn,head = nn.GRU(2, 4, batch_first=True).double(),nn.Linear(4, 1).double()
    learn = TbpttLearner(torch_loaders(x, y), nn.Sequential(StatefulRNN(rnn), head), sub_seq_len=5, n_skip=11,
                         loss_func=nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = learn.tbptt_find(max_lag=6, n_batches=1, n_losses=99, show=False)
    np.testing.assert_allclose(res.phi[0], phi_by_hand(rnn, head, x[:3], y[:3], range(1, 7), range(11, 14)), rtol=1e-8)


@pytest.mark.parametrize('step', [1, 2])
def test_phi_of_one_label_per_window_is_that_of_the_last_step(step):
    x,_ = data()
    label = torch.randn(9, 2, dtype=torch.float64)
    class Last(Plain):
        def forward(self, x): return super().forward(x)[:,-1]
    model = Last(nn.GRU(2, 4, batch_first=True))
    model.head = nn.Linear(4, 2) # as many labels as a block may have steps
    model = model.double()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = TbpttLearner(torch_loaders(x, label), model, sub_seq_len=5,
                           loss_func=nn.MSELoss()).tbptt_find(n_batches=1, step=step, show=False)
    expected = phi_by_hand(model.rnn, model.head, x[:3], label[:3,None].expand(-1, 14, -1), res.lags, [13])
    np.testing.assert_allclose(res.phi[0], expected, rtol=1e-8)


def test_a_stream_is_measured_at_the_starts_of_its_sequences():
    rng = np.random.default_rng(0)
    xs,ys = ([rng.standard_normal((n,c)).astype(np.float32) for n in (30, 9, 25, 20, 40)] for c in (2,1))
    dl = StreamDL(Sequences(xs, ys), bs=3, sub_seq_len=10)
    rnn,head = nn.LSTM(2, 4, batch_first=True),nn.Linear(4, 1)
    learn = TbpttLearner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(rnn), head), loss_func=nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = learn.tbptt_find(max_lag=8, n_losses=8, show=False)
    seqs = [0,2,3,4] # those of 16 steps or more
    def by_hand(i, at): return phi_by_hand(rnn, head, *(torch.from_numpy(o[i][None,at:]) for o in (xs, ys)), range(1, 9), range(8, 16))
    first = {i:by_hand(i, 0) for i in seqs}
    n_rows = [1, 2, 3, 4]
    *starts,last = res.phi
    for phi in starts: # a batch is the mean over some of the sequences
        assert any(np.allclose(phi, np.mean([first[i] for i in some], 0), rtol=1e-3) for n in n_rows for some in combinations(seqs, n))
    np.testing.assert_allclose(last, by_hand(4, 16), rtol=1e-3) # the one that has as many steps left
    fit_own_lr(learn, 1)


def test_a_text_is_measured_at_as_many_parts_as_are_asked_for():
    "Its rows are sequences that begin once; their next steps are measured as the first are, from the first state"
    rng = np.random.default_rng(0)
    xs,ys = ([rng.standard_normal((70,c)).astype(np.float32) for _ in range(2)] for c in (2,1))
    dl = StreamDL(Sequences(xs, ys), bs=2, sub_seq_len=10)
    rnn,head = nn.LSTM(2, 4, batch_first=True),nn.Linear(4, 1)
    learn = TbpttLearner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(rnn), head), loss_func=nn.MSELoss())
    def part(i): return (torch.from_numpy(np.stack([o[i*16:] for o in seqs])) for seqs in (xs, ys))
    expected = [phi_by_hand(rnn, head, *part(i), range(1, 9), range(8, 16)) for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        for n in (1, 3, 4, 9):
            res = learn.tbptt_find(max_lag=8, n_batches=n, n_losses=8, show=False)
            np.testing.assert_allclose(res.phi, expected[:n], rtol=1e-3) # 70 steps are four parts


class Busy(nn.Module):
    "A model with buffers, random numbers and a frozen layer"
    def __init__(self):
        super().__init__()
        self.norm,self.first,self.rnn,self.head = nn.BatchNorm1d(2),nn.GRU(2, 3, batch_first=True),StatefulRNN(nn.LSTM(3, 4, 2, batch_first=True, dropout=.5)),nn.Linear(4, 1)
        self.head.weight.requires_grad_(False)
    def forward(self, x): return self.head(self.rnn(self.first(self.norm(x.transpose(1, 2)).transpose(1, 2))[0]))

def generator_in(kind, data):
    "Loaders that draw from a generator of their own, wherever it is"
    g = torch.Generator().manual_seed(0)
    dl = dict(loader=lambda: DataLoader(data, 4, shuffle=True, generator=g), sampler=lambda: DataLoader(data, 4, sampler=RandomSampler(data, generator=g)),
              batch_sampler=lambda: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=g), 4, False)))[kind]()
    return DataLoaders(dl, dl)

def busy(kind):
    set_seed(3)
    model = Busy()
    x,y = data(12, 40, dtype=torch.float32)
    if kind=='torch': dls = torch_loaders(x, y, bs=4, shuffle=True)
    elif kind in ('loader', 'sampler', 'batch_sampler'): dls = generator_in(kind, list(zip(x, y)))
    elif kind=='items': dls = DataLoaders(TfmdDL(list(zip(x, y)), 4, shuffle=True), TfmdDL(list(zip(x, y)), 4))
    else:
        u = np.random.default_rng(0).standard_normal((600,2)).astype(np.float32)
        dls = SequenceDataLoaders.from_arrays(u, u[:,:1], win_sz=40, bs=4, valid_pct=.2) if kind=='windows' else None
        if dls is None:
            dl = StreamDL(Sequences([u[:100],u[100:250],u[250:400]], [u[:100,:1],u[100:250,:1],u[250:400,:1]]), bs=2, sub_seq_len=10, shuffle=True)
            dls = DataLoaders(dl, dl)
    return TbpttLearner(dls, model, sub_seq_len=10, loss_func=nn.MSELoss())

def same_training(a, b):
    "Bit by bit"
    assert a.recorder.values==b.recorder.values
    for v,w in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True): assert torch.equal(v, w)

class Stop(Exception): pass

@pytest.mark.parametrize('kind,interrupted', [*((kind, when) for kind in ('torch', 'windows', 'stream') for when in (False, True, 'cost')), *((kind, False) for kind in ('loader', 'sampler', 'batch_sampler', 'items'))])
def test_the_learner_stays_as_it_is(kind, interrupted, monkeypatch):
    learns = []
    for find in (False, True):
        learn = busy(kind)
        fit(learn, 1)
        learn.model.rnn.train()
        learn.model.rnn(torch.ones(2, 1, 3)) # a state in the middle of something
        learn.model.eval()
        learn.model.first.train()
        if find:
            before = dict(values={k:v.clone() for k,v in learn.model.state_dict().items()}, grads=[p.grad for p in learn.model.parameters()], req=[p.requires_grad for p in learn.model.parameters()],
                          modes=[m.training for m in learn.model.modules()], cbs=list(learn.cbs), losses=list(learn.recorder.losses), dl=learn.dl, state=learn.model.rnn.state, vars=dict(vars(learn.dls.train)))
            counts = iter(range(99))
            loss_func = learn.loss_func
            if interrupted is True:
                def fail(*args):
                    if next(counts)==2: raise KeyboardInterrupt
                    return loss_func(*args)
                learn.loss_func = fail
            elif interrupted: monkeypatch.setattr('tbptt_fastai.instruments.find.activation_memory', lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', UserWarning)
                if interrupted:
                    with pytest.raises(KeyboardInterrupt): learn.tbptt_find(bias=1e6, max_lag=8, step=2, show=False)
                else: learn.tbptt_find(max_lag=8, step=2, show=False)
            learn.loss_func = loss_func
            for k,v in learn.model.state_dict().items(): assert torch.equal(v, before['values'][k])
            assert all(a is b for a,b in zip(before['grads'], (p.grad for p in learn.model.parameters())))
            assert before['req']==[p.requires_grad for p in learn.model.parameters()]
            assert before['modes']==[m.training for m in learn.model.modules()]
            assert before['cbs']==list(learn.cbs) and before['losses']==learn.recorder.losses and before['dl'] is learn.dl
            assert all(torch.equal(a, b) for a,b in zip(before['state'], learn.model.rnn.state))
            assert before['vars'].keys()==vars(learn.dls.train).keys()
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules()) and 'carry_in_evaluation' not in vars(learn.model.rnn)
        learn.model.rnn.reset()
        fit(learn, 2)
        learns.append(learn)
    same_training(*learns)


class MainProcessOnly(list):
    def __getitem__(self, i):
        if get_worker_info() is not None: raise AssertionError("read by a worker")
        return super().__getitem__(i)

def test_no_worker_is_started_and_nothing_stays_in_the_loader():
    x,y = data()
    dl = TfmdDL(MainProcessOnly(zip(x, y)), 3, num_workers=2)
    learn = TbpttLearner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(nn.GRU(2, 4, batch_first=True)), nn.Linear(4, 1)).double(), sub_seq_len=5, loss_func=nn.MSELoss())
    before = dict(vars(dl))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        learn.tbptt_find(n_batches=1, max_lag=6, show=False)
    assert vars(dl)==before and dl.fake_l.num_workers==2


class FindWithin(Callback):
    "Measure before the third sub-window of a training"
    order = 13 # after TbpttResetCB
    def before_batch(self):
        if self.training and self.train_iter==2: self.res = self.learn.tbptt_find(max_lag=6, step=2, show=False)

@pytest.mark.parametrize('stateful', [True, False])
def test_what_is_measured_within_a_training_and_what_is_trained_are_as_if_alone(stateful):
    "What is measured and what is trained is as if each were done alone"
    learns,x,y = [],*data(12, dtype=torch.float32)
    for cbs in ([], [FindWithin()]):
        set_seed(0)
        rnn = nn.LSTM(2, 4, batch_first=True)
        model = nn.Sequential(StatefulRNN(rnn), nn.Linear(4, 1)) if stateful else Plain(rnn)
        learn = TbpttLearner(torch_loaders(x, y), model, sub_seq_len=5, loss_func=nn.MSELoss(), cbs=cbs)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            alone = learn.tbptt_find(max_lag=6, step=2, show=False)
            fit(learn, 1, 0.)
            if cbs: np.testing.assert_allclose(learn.find_within.res.phi, alone.phi, rtol=1e-5)
            fit(learn, 2)
        learns.append(learn)
    same_training(*learns)


class GivesAState(Plain):
    def forward(self, x): return self.head(self.rnn(x, x.new_zeros(1, len(x), 4))[0])

class Sum(nn.Module):
    def forward(self, x, state=None):
        out = x.cumsum(1)+(0 if state is None else state[:,None])
        return out,out[:,-1]

@pytest.mark.parametrize('find,message', [
    (lambda: TbpttLearner(torch_loaders(*data()), nn.Linear(2, 1), sub_seq_len=None,
                          loss_func=nn.MSELoss()).tbptt_find(), 'no recurrent layer'),
    (lambda: leaky(.9, 1, None).tbptt_find(), 'window has 1 steps: too short for two lags'),
    (lambda: leaky(.9, 20).tbptt_find(max_lag=20), 'window has 20 steps: too short for max_lag=20'),
    (lambda: leaky(.9, 20).tbptt_find(step=6), 'or a smaller step'),
    (lambda: leaky(.9, 20).tbptt_find(max_lag=3, step=2), 'max_lag is 3, with step=2'),
    (lambda: leaky(.9, 20).tbptt_find(bias=0), 'bias is 0'),
    (lambda: leaky(.9, 20).tbptt_find(n_batches=0), 'n_batches is 0'),
    (lambda: leaky(.9, 20).tbptt_find(tau=10), 'tau is 10'),
    (lambda: TbpttLearner(torch_loaders(*data()), GivesAState(nn.GRU(2, 4, batch_first=True)).double(), sub_seq_len=5,
                          loss_func=nn.MSELoss()).tbptt_find(),
     r'gives its recurrent layers \(rnn\) a state of its own'),
    (lambda: TbpttLearner(torch_loaders(*data(n_in=1)), nn.Sequential(StatefulRNN(Sum())), sub_seq_len=5,
                          loss_func=nn.MSELoss()).tbptt_find(), 'Sequential has 0 parameters'),
])
def test_what_cannot_be_measured_is_refused_by_name(find, message):
    with pytest.raises(ValueError, match=message): find()

def test_a_bias_in_words_is_refused():
    with pytest.raises(TypeError, match="bias is '10%', a str"): leaky(.9, 20).tbptt_find(bias='10%')

@pytest.mark.parametrize('all_of_it', [True, False])
def test_a_frozen_network_is_refused(all_of_it):
    learn = leaky(.9, 20)
    learn.model.requires_grad_(False)
    if not all_of_it: learn.model.add_module('head', nn.Linear(1, 1).double())
    with pytest.raises(ValueError, match='Unfreeze it'): learn.tbptt_find()
    assert learn.model[0].state is None

class OwnState(nn.Module):
    "Carries its state by itself, and counts how often it is run"
    def __init__(self, cell):
        super().__init__()
        self.cell,self.state,self.n = cell,None,0
        self.register_buffer('last', None)
    def reset(self): self.state = None
    def forward(self, x):
        self.n += 1
        out,h = self.cell(x, torch.zeros(1, len(x), 1) if self.state is None else self.state[None])
        self.state = self.last = self.added = h[0].detach()
        return out

class Cell(nn.Module):
    def __init__(self): super().__init__(); self.rho = nn.Parameter(torch.tensor(.5))
    def forward(self, x, h): return (out := x.cumsum(1)*self.rho+h[0][:,None]),out[None,:,-1]

@pytest.mark.parametrize('cell,message', [(Cell, 'by itself, where no gradient can be followed'), (lambda: nn.GRU(1, 1, batch_first=True), 'No state of OwnState has a gradient')])
def test_a_model_with_a_state_of_its_own_is_refused_and_keeps_it(cell, message):
    x,y = data(n_in=1, dtype=torch.float32)
    learn = TbpttLearner(torch_loaders(x, y), OwnState(cell()), sub_seq_len=5, loss_func=nn.MSELoss())
    learn.model.state,learn.model.n = (state := torch.ones(3, 1)),0
    with pytest.raises(ValueError, match=message): learn.tbptt_find()
    assert learn.model.state is state and learn.model.n==0 and learn.model.last is None and not hasattr(learn.model, 'added')


def copy_task(n, steps, delay, rng):
    "Symbols 1–4 among blanks, to be repeated `delay` steps later"
    symbols = rng.integers(1, 5, (n, steps))*(rng.random((n, steps))<.45)
    return torch.from_numpy(symbols),torch.from_numpy(np.concatenate([np.zeros((n, delay), int), symbols[:,:-delay]], 1))

class Copy(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.rnn,self.head = nn.Embedding(5, 8),nn.LSTM(8, 24, batch_first=True),nn.Linear(24, 5)
    def forward(self, x): return self.head(self.rnn(self.emb(x))[0])

def true_bias(model, x, y, ends, ks):
    "Relative bias of the gradient of the recurrent weights if the losses at `ends` reach back K steps, in the mean over rows"
    params = list(model.rnn.parameters())
    def gradient(k):
        total = 0
        for s in ends:
            state = None
            if k is not None and s+1>k:
                with torch.no_grad(): _,state = model.rnn(model.emb(x[:,:s+1-k]))
            out,_ = model.rnn(model.emb(x[:,:s+1] if state is None else x[:,s+1-k:s+1]), state)
            loss = nn.functional.cross_entropy(model.head(out[:,-1]), y[:,s])
            total = total+torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])
        return total
    full = gradient(None)
    return [float((gradient(k)-full).norm()/full.norm()) for k in ks]

def test_the_estimate_is_conservative_on_the_copy_task():
    set_seed(0)
    rng = np.random.default_rng(0)
    x,y = copy_task(64, 80, 4, rng)
    learn = TbpttLearner(torch_loaders(x, y, bs=64), Copy(), sub_seq_len=20, loss_func=CrossEntropyLossFlat(), lr=1e-2)
    ks,table = (5,8,12,16,20,25,30),[]
    for n_epoch in (0, 60, 120):
        fit(learn, n_epoch) if n_epoch else None
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            res = learn.tbptt_find(max_lag=40, n_batches=1, n_losses=40, show=False)
        true = true_bias(learn.model, x, y, range(40, 80), ks)
        est = [res.delta[k-1] for k in ks]
        print(n_epoch, 'beta', res.beta, 'suggestion', res.suggestion, res.reached, '\n', np.round(true, 4), '\n', np.round(est, 4))
        table.append((true, est))
    for true,est in table: assert all(e>=t for e,t in zip(est, true))


def test_the_suggestion_for_silverbox_is_between_20_and_250_steps(data_dir):
    pytest.importorskip('nonlinear_benchmarks')
    from tbptt_fastai.datasets.benchmarks import create_dls_silverbox
    from tbptt_fastai.learner import RNNLearner
    set_seed(0)
    learn = RNNLearner(create_dls_silverbox(bs=16, win_sz=500, stp_sz=20, sub_seq_len=100), rnn_type='lstm', hidden_size=40)
    fit(learn, 1)
    res = learn.tbptt_find()
    print(res)
    assert res.reached and 20<res.suggestion<250 and .9<res.beta<1


class Shift(nn.Module):
    "Features are passed on twice, doubled each time, and then forgotten: gradients grow, and end"
    def __init__(self): super().__init__(); self.lift = nn.Linear(2, 4)
    def initial_state(self, bs, device, dtype): return tuple(torch.zeros(bs, 4, device=device, dtype=dtype) for _ in range(3))
    def forward(self, x, s):
        out = []
        for z in self.lift(x).unbind(1):
            s = z,2*s[0],2*s[1]
            out.append(sum(s))
        return torch.stack(out, 1),s

def test_a_memory_that_ends_is_suggested_whole_though_its_gradients_grow():
    x,y = data(steps=30)
    model = nn.Sequential(StatefulRNN(Shift()), nn.Linear(4, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        res = TbpttLearner(torch_loaders(x, y), model, sub_seq_len=10, loss_func=nn.MSELoss()).tbptt_find(show=False)
    lags = res.lags[res.phi.mean(0)>0]
    assert res.beta>1 and lags.tolist()==[1, 2] and res.reached and res.suggestion==3 and res.delta[2]==0<res.delta[1]
    assert np.isinf(relative_bias(np.arange(1, 5), np.array([1., 2, 4, 8]), np.ones(4), 2.)).all()


class TwoStates(nn.Module):
    "Forgets by rho per step; the state has the last two of its outputs, and at first only the last one has a gradient"
    def __init__(self, rho, order): super().__init__(); self.rho,self.order = nn.Parameter(torch.tensor(rho, dtype=torch.float64)),order
    def initial_state(self, bs, device, dtype): return torch.zeros(2, bs, 1, device=device, dtype=dtype).unbind(0)
    def forward(self, x, state):
        h,before = (state[i] for i in self.order)
        out = []
        for o in x.unbind(1):
            h,before = self.rho*h+o,h
            out.append(h)
        return torch.stack(out, 1),tuple((h,before)[i] for i in self.order)

class Growing(Leaky):
    "The state has every output so far, of which the last one is used"
    def forward(self, x, state=None):
        out,_ = super().forward(x, None if state is None else state[:,-1])
        return out,out if state is None else torch.cat([state, out], 1)

@pytest.mark.parametrize('memory', [lambda: TwoStates(.8, (0,1)), lambda: TwoStates(.8, (1,0)), lambda: Growing(.8)])
def test_parts_of_a_state_without_a_gradient_count_as_zero(memory):
    "So the closed form of one state holds"
    learn = leaky(.8)
    expected = learn.tbptt_find(show=False)
    learn.model = nn.Sequential(StatefulRNN(memory()))
    res = learn.tbptt_find(show=False)
    np.testing.assert_allclose(res.phi, expected.phi, rtol=1e-9)
    assert res.suggestion==expected.suggestion


def test_a_learned_first_state_is_that_of_the_group_of_each_sequence():
    "A learned first state is found by the group of each sequence"
    rng = np.random.default_rng(0)
    xs,ys = ([rng.standard_normal((30,c)).astype(np.float32) for _ in range(3)] for c in (2,1))
    dl = StreamDL(Sequences(xs, ys, groups=list('abc')), bs=3, sub_seq_len=10)
    rnn,head = nn.GRU(2, 4, batch_first=True),nn.Linear(4, 1)
    initial = learned_state(rnn, list('cab'))
    with torch.no_grad(): initial.tensors[0].copy_(torch.randn(1, 3, 4))
    learn = TbpttLearner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(rnn, initial=initial), head), loss_func=nn.MSELoss())
    by_hand = np.mean([phi_by_hand(lambda x, state=None: rnn(x, initial(list(group)) if state is None else state), head, torch.from_numpy(x[None]), torch.from_numpy(y[None]), range(1, 9), range(8, 16))
                       for x,y,group in zip(xs, ys, 'abc')], 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = learn.tbptt_find(bias=1e6, max_lag=8, n_losses=8, show=False)
    np.testing.assert_allclose(res.phi, [by_hand], rtol=1e-3)
    assert res.memory>0 # which is measured with groups, too


def test_shorter_windows_are_left_out():
    "Those in which no loss has as many steps before it as in the first window; the others are cut to what they have"
    (x,y),(short,of_short) = data(6),data(3, 5)
    dl = [(x[:3],y[:3]), (short,of_short), (x[3:],y[3:])]
    rnn,head = nn.GRU(2, 4, batch_first=True).double(),nn.Linear(4, 1).double()
    learn = TbpttLearner(DataLoaders(dl, dl), nn.Sequential(StatefulRNN(rnn), head), sub_seq_len=5, loss_func=nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        res = learn.tbptt_find(max_lag=6, n_losses=99, show=False)
    np.testing.assert_allclose(res.phi, [phi_by_hand(rnn, head, x[b:b+3], y[b:b+3], res.lags, range(6, 12)) for b in (0,3)], rtol=1e-8)
