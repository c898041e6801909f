"Layers with a memory: the output of a whole window whatever the sub-windows, exact gradients, rows that begin anew, and a memory that is trained"
import copy, pickle
from functools import partial
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn
from torch.utils._pytree import tree_leaves
from helpers import adam, fit, split_loaders
from reference import train_any, window_epochs, windows_by_hand
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.models.memories import LRU, CachedAttention, CausalConv, FastWeights, WorkingMemory
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.sequences.windows import Sequences

SEED,LR,WIN,BS,N_EPOCH = 3,1e-2,30,8,2
WINDOWS = dict(n_train=600, seed=SEED, win_sz=WIN, bs=BS)
TOL = {torch.float32: 1e-5, torch.float64: 1e-10}
MEMORIES = dict(slots=partial(WorkingMemory, slots=4, n_mem=5), fast=partial(FastWeights, n_mem=5), attention=partial(CachedAttention, mem_len=9, n_mem=6), short_attention=partial(CachedAttention, mem_len=2, n_mem=6),
                lru=partial(LRU, n_mem=7), conv=partial(CausalConv, n_mem=5))
# What the memory is made of: the parameters that feed the state, or the part of them that only acts through it
FEEDS = dict(slots=lambda m: [m.address, m.turn, m.write.weight, m.write.bias], fast=lambda m: [m.decay, m.write.weight, m.write.bias], attention=lambda m: [m.bias[:,1:], m.write.weight],
             short_attention=lambda m: [m.bias[:,1:], m.write.weight], lru=lambda m: [m.nu, m.theta, m.write.weight], conv=lambda m: [o.weight[...,:-1] for o in m.convs])

each_memory = pytest.mark.parametrize('kind', MEMORIES)
each_dtype = pytest.mark.parametrize('dtype', TOL)

def memory_and_head(kind, dtype=torch.float32):
    torch.manual_seed(0)
    core = MEMORIES[kind](2, 6)
    with torch.no_grad():
        for p in core.parameters(): p.add_(torch.randn_like(p)*.1) # a bias of zeros would hide a wrong distance
    return core.to(dtype),nn.Linear(6, 1).to(dtype)

def stateful(core, head): return nn.Sequential(StatefulRNN(copy.deepcopy(core)), copy.deepcopy(head))

def batches(signals, dtype=torch.float32):
    x,y = windows_by_hand(*[torch.from_numpy(o[:600]).to(dtype) for o in signals], WIN, WIN)
    return [[(x[i],y[i]) for i in epoch] for epoch in window_epochs(len(x), BS, N_EPOCH, SEED)]

class Gradients(Callback):
    "The gradients of each step"
    def __init__(self): self.all = []
    def after_backward(self): self.all.append([p.grad.clone() for p in self.model.parameters()])


# The same output whatever the sub-windows

@each_dtype
@each_memory
@pytest.mark.parametrize('sizes', [1, 7, [1,11,2,20,6]], ids=str)
def test_output_of_sub_windows_is_that_of_the_window(kind, dtype, sizes):
    core,_ = memory_and_head(kind, dtype)
    x = torch.randn(3, 40, 2, dtype=dtype)
    whole,end = core(x)
    rnn = StatefulRNN(core)
    torch.testing.assert_close(torch.cat([rnn(o) for o in x.split(sizes, 1)], 1), whole, rtol=0, atol=TOL[dtype])
    torch.testing.assert_close(rnn.state, end, rtol=0, atol=TOL[dtype])
    assert whole.dtype==dtype and all(o.requires_grad is False and o.dtype in (dtype, dtype.to_complex(), torch.int64) for o in tree_leaves(rnn.state))
    torch.testing.assert_close(rnn.eval()(x), whole, rtol=0, atol=TOL[dtype])
    assert [(o.shape,o.dtype) for o in tree_leaves(core.initial_state(3, x.device, dtype))]==[(o.shape,o.dtype) for o in tree_leaves(end)]


@each_memory
def test_no_step_looks_ahead(kind):
    core,_ = memory_and_head(kind, torch.float64)
    x = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    core(x)[0][:,7].sum().backward()
    assert (x.grad[:,8:]==0).all() and (x.grad[:,5:8]!=0).any(0).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize('kind', ['attention', 'short_attention'])
def test_attention_equals_one_step_and_head_after_the_other(kind):
    core,_ = memory_and_head(kind, torch.float64)
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    query,(key,value) = core.query(x),core.write(x).chunk(2, -1)
    reads,n = torch.zeros_like(query),core.n_mem//core.heads
    for b in range(3):
        for t in range(20):
            for h in range(core.heads):
                c,past = slice(h*n, h*n+n),range(max(t-core.mem_len, 0), t+1)
                score = torch.stack([query[b,t,c]@key[b,s,c]/n**.5+core.bias[h,t-s] for s in past])
                reads[b,t,c] = sum(w*value[b,s,c] for w,s in zip(score.softmax(0), past))
    torch.testing.assert_close(core(x)[0], core.out(torch.cat([x, reads], -1)), rtol=0, atol=1e-10)
    assert core(x)[1]['valid'].tolist()==[core.mem_len]*3 and core(x[:,:1])[1]['valid'].tolist()==[1]*3


def test_linear_recurrence_equals_a_loop():
    core,_ = memory_and_head('lru', torch.float64)
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    eigenvalue,h,outs = torch.exp(torch.complex(-core.nu.exp(), core.theta.exp())),torch.zeros(3, 7, dtype=torch.complex128),[]
    for t in range(20):
        u = core.write(x[:,t]).view(3, 7, 2)
        h = eigenvalue*h+(1-eigenvalue.abs()**2).sqrt()*torch.complex(u[...,0], u[...,1])
        outs.append(core.out(torch.cat([x[:,t], torch.view_as_real(h).flatten(1)], -1)))
    torch.testing.assert_close(core(x)[0], torch.stack(outs, 1), rtol=0, atol=1e-10)


def slots_by_hand(core, x):
    "One row, one slot after the other"
    sigmoid,n,slots,outs = torch.sigmoid,core.n_mem,[torch.zeros(core.n_mem, dtype=x.dtype)]*core.slots,[]
    for t,o in enumerate(x):
        score = lambda key: torch.stack([key@(s+a)/n**.5 for s,a in zip(slots, core.address)])
        weights = score(core.query(o)).softmax(0)
        outs.append(core.out(torch.cat([o, sum(w*s for w,s in zip(weights, slots))])))
        w = core.write(o)
        key,value,erase,gate = w[:n],w[n:2*n],sigmoid(w[2*n:3*n]),sigmoid(w[-1])
        prefer = torch.stack([core.turn if i==t%core.slots else core.turn*0 for i in range(core.slots)])
        slots = [s*(1-gate*p*erase)+gate*p*value for s,p in zip(slots, (score(key)+prefer).softmax(0))]
    return torch.stack(outs)

def fast_by_hand(core, x):
    "The delta rule as a product of matrices, W(I-rate*k*k')+rate*v*k'"
    n,fast,outs = core.n_mem,torch.zeros(core.n_mem, core.n_mem, dtype=x.dtype),[]
    for o in x:
        w,query = core.write(o),core.query(o)
        key,value,rate = w[:n]/w[:n].norm(),w[n:2*n],torch.sigmoid(w[-1])
        fast = torch.sigmoid(core.decay)*fast@(torch.eye(n, dtype=x.dtype)-rate*torch.outer(key, key))+rate*torch.outer(value, key)
        outs.append(core.out(torch.cat([o, fast@(query/query.norm())])))
    return torch.stack(outs)

@pytest.mark.parametrize('kind,by_hand', [('slots',slots_by_hand), ('fast',fast_by_hand)])
def test_output_and_gradients_of_slots_and_fast_weights_equal_loops(kind, by_hand):
    core,_ = memory_and_head(kind, torch.float64)
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    out,expected = core(x)[0],torch.stack([by_hand(core, o) for o in x])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for a,b in zip(*[torch.autograd.grad(o.square().mean(), [*core.parameters()]) for o in (out, expected)]): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# Training

@each_dtype
@each_memory
def test_gradient_of_a_whole_window_is_full_backpropagation(signals, kind, dtype):
    "... through a chain of single steps, whose states are not detached"
    core,head = memory_and_head(kind, dtype)
    seen = Gradients()
    fit(TbpttLearner(split_loaders(signals, **WINDOWS, dtype=dtype, sub_seq_len=WIN), stateful(core, head),
                     opt_func=adam, cbs=seen), 1)
    x,y = batches(signals, dtype)[0][0]
    state,outs = None,[]
    for t in range(WIN):
        out,state = core(x[:,t:t+1], state)
        outs.append(head(out))
    nn.functional.l1_loss(torch.cat(outs, 1), y).backward()
    for a,p in zip(seen.all[0], [*core.parameters(), *head.parameters()], strict=True): torch.testing.assert_close(a, p.grad, rtol=0, atol=TOL[dtype])


@pytest.mark.parametrize('sub_seq_len', [1, 10, 12, WIN]) # 12: a ragged tail of 6
@each_memory
def test_training_equals_the_loop_by_hand(signals, kind, sub_seq_len):
    core,head = memory_and_head(kind)
    learn = TbpttLearner(split_loaders(signals, **WINDOWS, sub_seq_len=sub_seq_len), stateful(core, head),
                         opt_func=adam)
    fit(learn, N_EPOCH)
    def forward(inputs, state):
        out,state = core(*inputs, state)
        return head(out),state
    params = [*core.parameters(), *head.parameters()]
    train_any(forward, params, batches(signals), sub_seq_len, LR, nn.functional.l1_loss, (True,True))
    for a,b in zip(learn.model.parameters(), params, strict=True): assert torch.equal(a, b)


@each_dtype
@pytest.mark.parametrize('sub_seq_len', [1,7,None])
@each_memory
def test_predictions_of_a_stream_are_those_of_each_sequence_alone(kind, dtype, sub_seq_len):
    core,head = memory_and_head(kind, dtype)
    xs = [torch.randn(n, 2, dtype=dtype) for n in (17,20,46,30,12,5,33)]
    ys = [x[:,:1].cumsum(0).sin() for x in xs]
    set_seed(SEED)
    dls = DataLoaders(*[StreamDL(Sequences(xs, ys, dtype=dtype), bs=3, sub_seq_len=sub_seq_len, shuffle=shuffle) for shuffle in (True,False)])
    learn = TbpttLearner(dls, stateful(core, head), opt_func=adam)
    def alone():
        core,head = learn.model[0].rnn,learn.model[1]
        with torch.no_grad(): return torch.cat([head(core(x[None])[0])[0] for x in xs])
    before = alone()
    for _ in range(2):
        with learn.no_bar(): preds = [learn.get_preds(ds_idx=i)[0] for i in (0,1)]
        for o in preds: torch.testing.assert_close(o, alone(), rtol=0, atol=TOL[dtype])
        fit(learn, 1)
    assert not torch.allclose(before, alone())


# What the memory learns from

@each_memory
def test_memory_is_trained_within_a_sub_window(signals, kind):
    core,head = memory_and_head(kind)
    rnn,x = StatefulRNN(copy.deepcopy(core)),torch.randn(3, 14, 2)
    for part in x.split(7, 1): # the second begins from a detached memory
        rnn.zero_grad()
        rnn(part).square().mean().backward()
        for p in rnn.parameters(): assert p.grad is not None
        grads = copy.deepcopy(rnn.rnn)
        for p,q in zip(grads.parameters(), rnn.parameters()): p.data = q.grad
        for g in FEEDS[kind](grads): assert g.abs().max()>1e-7
    learn = TbpttLearner(split_loaders(signals, **WINDOWS, sub_seq_len=10), stateful(core, head), opt_func=adam)
    fit(learn, N_EPOCH)
    for before,after in zip(FEEDS[kind](core), FEEDS[kind](learn.model[0].rnn), strict=True): assert (before-after).abs().max()>1e-3


def test_a_sub_window_of_one_step_trains_no_write(signals):
    core,head = memory_and_head('slots')
    writes = lambda m: [m.turn, *m.write.parameters()]
    learn = TbpttLearner(split_loaders(signals, **WINDOWS, sub_seq_len=1), stateful(core, head), opt_func=adam)
    fit(learn, N_EPOCH)
    trained = learn.model[0].rnn
    assert all(torch.equal(a, b) for a,b in zip(writes(core), writes(trained))) and not torch.equal(core.query.weight, trained.query.weight)
    rnn = StatefulRNN(core)
    for part in torch.randn(3, 5, 2).split(1, 1): rnn(part).square().mean().backward()
    assert all(p.grad is None for p in writes(core)) and core.query.weight.grad.abs().sum()>0


@pytest.mark.parametrize('kind', [o for o in MEMORIES if o!='slots'])
def test_a_sub_window_of_one_step_has_no_gradient_from_the_past(kind):
    "What was put into the memory before has none; what the step does with it has"
    core,_ = memory_and_head(kind, torch.float64)
    x = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    rnn = StatefulRNN(core)
    outs = [rnn(o) for o in x.split(1, 1)]
    outs[-1].square().sum().backward()
    assert (x.grad[:,:-1]==0).all() and (x.grad[:,-1]!=0).all()
    uses = dict(fast='decay', lru='nu').get(kind, 'bias' if 'attention' in kind else 'convs.0.weight')
    assert dict(core.named_parameters())[uses].grad.abs().sum()>0


# Copies

@each_memory
def test_a_model_in_the_middle_of_a_window_is_copied_without_its_memory(kind):
    core,head = memory_and_head(kind)
    model,x = stateful(core, head),torch.randn(3, 14, 2)
    whole = model(x)
    assert model.state_dict().keys()==dict(model.named_parameters()).keys()
    model[0].reset()
    model(x[:,:7])
    fresh = nn.Sequential(StatefulRNN(MEMORIES[kind](2, 6)), nn.Linear(6, 1))
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert other[0].state is None and torch.equal(other(x), whole)
    torch.testing.assert_close(model(x[:,7:]), whole[:,7:], rtol=0, atol=1e-5)


@pytest.mark.parametrize('nu', [-18.5, -25.])
def test_the_slowest_modes_of_an_lru_have_a_finite_gradient(nu):
    m = LRU(3, 5)
    with torch.no_grad(): m.nu[0] = nu
    m(torch.randn(2, 30, 3))[0].sum().backward()
    assert m.nu.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_an_lru_in_half_precision(dtype):
    torch.manual_seed(0)
    m,x = LRU(3, 5),torch.randn(2, 30, 3)
    out,state = copy.deepcopy(m).to(dtype)(x.to(dtype))
    assert out.dtype==dtype and state.dtype==torch.complex64
    torch.testing.assert_close(out.float(), m(x)[0], rtol=0, atol=.05)
