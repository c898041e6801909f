"First states that come from elsewhere: stored at an earlier visit, or passed on by another row. Run as a script, this file is one of two processes"
import copy, io, pickle, random, sys, warnings
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.utils._pytree import tree_map
from helpers import fit, sgd
from reference import permutations, rows_by_hand, stream_by_hand, window_epochs
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences
from tbptt_fastai.state.stateful import InitialState, StatefulRNN, learned_state
from tbptt_fastai.state.stored import PassedState, StoredState
from tbptt_fastai.state.unroll import Unroll
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.checkpoint import TbpttCheckpoint
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased

SEED,BS,LR,WIN,STP,H = 3,4,.05,40,4,3
LAYERS = dict(rnn=nn.RNN, gru=nn.GRU, lstm=nn.LSTM)


# Data, models and learners

def signals(lengths=(130, 97)):
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 1, generator=g, dtype=torch.float64) for n in lengths]
    return xs,[(x.cumsum(0)*.2).sin() for x in xs]

def net(initial, layer='lstm', num_layers=1):
    torch.manual_seed(1)
    rnn = LAYERS[layer](1, H, num_layers, batch_first=True)
    return nn.Sequential(StatefulRNN(rnn, initial=initial), nn.Linear(H, 1)).double()

def windows(bs=BS, lengths=(130, 97), stp_sz=STP, **kwargs):
    random.seed(SEED)
    ds = SequenceWindows(*signals(lengths), win_sz=WIN, stp_sz=stp_sz, dtype=torch.float64)
    return DataLoaders(TbpttDL(ds, bs=bs, **{**dict(shuffle=True, num_workers=0), **kwargs}), TbpttDL(ds, bs=bs, num_workers=0))

def stream(bs=3, lengths=(50, 33, 47, 28, 60, 9, 40), **kwargs):
    random.seed(SEED)
    ds = Sequences(*signals(lengths), dtype=torch.float64)
    return DataLoaders(StreamDL(ds, bs=bs, shuffle=True, **kwargs), StreamDL(ds, bs=bs, **kwargs))

def learner(dls, initial, layer='lstm', num_layers=1, **kwargs):
    return TbpttLearner(dls, net(initial, layer, num_layers), loss_func=nn.MSELoss(), opt_func=sgd, **kwargs)

def trained(learn, n_epoch=3):
    "The learner after a fit, and the seed of each of its epochs"
    initial,seeds = learn.model[0].initial,[]
    begin = initial.begin_epoch
    def begin_epoch(epoch, seed):
        seeds.append(seed)
        begin(epoch, seed)
    object.__setattr__(initial, 'begin_epoch', begin_epoch)
    try: fit(learn, n_epoch, LR)
    finally: del initial.begin_epoch
    return seeds

def same(learn, rnn, head, tol=1e-10):
    by_hand = {**{f'0.rnn.{k}': v for k,v in rnn.state_dict().items()}, **{f'1.{k}': v for k,v in head.state_dict().items()}}
    found = learn.model.state_dict()
    return max((found[k]-v).abs().max().item() for k,v in by_hand.items())<tol

def parts(learn):
    "The layer and the head, for a loop by hand"
    return copy.deepcopy(learn.model[0].rnn),copy.deepcopy(learn.model[1])


# By hand

PLANS = dict( # start, first step whose loss counts, stop, and where the next one starts
    whole=[(0, 0, 40, 40)],
    fixed=[(0, 0, 12, 12), (12, 12, 24, 24), (24, 24, 36, 36), (36, 36, 40, 40)],
    overlap=[(0, 0, 8, 0), (0, 8, 16, 4), (4, 16, 24, 12), (12, 24, 32, 20), (20, 32, 40, 40)])
SCHEMES = dict(whole=dict(sub_seq_len=None), fixed=dict(sub_seq_len=12), overlap=dict(truncation=Overlap(8, 20)))

def zeros(bs, rnn):
    def zero(): return torch.zeros(rnn.num_layers, bs, H, dtype=torch.float64)
    return [zero(), zero()] if isinstance(rnn, nn.LSTM) else [zero()]

def run(rnn, x, state):
    "Output and state, a list of tensors"
    out,new = rnn(x, tuple(state) if isinstance(rnn, nn.LSTM) else state[0])
    return out,list(new) if isinstance(rnn, nn.LSTM) else [new]

def window_starts(lengths, stp_sz=STP): return [(i, s) for i,n in enumerate(lengths) for s in range(0, n-WIN+1, stp_sz)]

def train_windows(rnn, head, epochs, plan, begin, came_to, lengths=(130, 97), n_skip=0, stp_sz=STP):
    """Windows by hand: `begin(epoch, windows)` gives the state of each row, or None, and `came_to(epoch, windows, step, state)` is told
    the state that rows go on from, or end in"""
    xs,ys = signals(lengths)
    where,opt = window_starts(lengths, stp_sz),torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=LR)
    most = max(stop-max(first, n_skip) for _,first,stop,_ in plan)
    for e,epoch in enumerate(epochs):
        for batch in epoch:
            rows = [where[i] for i in batch]
            x,y = (torch.stack([o[i][s:s+WIN] for i,s in rows]) for o in (xs, ys))
            state = zeros(len(rows), rnn)
            for row,given in enumerate(begin(e, rows)):
                if given is not None:
                    for o,new in zip(state, given): o[:,row] = new
            for start,first,stop,carry in plan:
                counted = stop-max(first, n_skip)
                with torch.set_grad_enabled(counted>0):
                    outs,now,kept = [],state,state
                    for a,b in ((start, carry), (carry, stop)):
                        if a==b: continue
                        out,now = run(rnn, x[:,a:b], now)
                        outs.append(out)
                        if b==carry: kept = [o.detach() for o in now]
                if counted>0:
                    loss = (head(torch.cat(outs, 1))[:,-counted:]-y[:,stop-counted:stop]).square().mean()*(counted/most)
                    loss.backward()
                    opt.step()
                    opt.zero_grad()
                state = kept
                if carry!=start: came_to(e, rows, carry, state)

class Memory(dict):
    "Of (sequence, step): a state, and the epoch in which it was stored"
    def __init__(self, lengths=(130, 97), share=1, from_epoch=0, seeds=(), stp_sz=STP):
        self.starts,self.share,self.from_epoch,self.stp_sz = set(window_starts(lengths, stp_sz)),share,from_epoch,stp_sz
        self.rngs,self.ages = [random.Random(o) for o in seeds],[[] for _ in range(20)]
    def begin(self, e, rows):
        drawn = [self.share==1 or self.rngs[e].random()<self.share for _ in rows]
        found = [self.get(o) if use and e>=self.from_epoch else None for o,use in zip(rows, drawn)]
        self.ages[e] += [e-o[1] for o in found if o]
        return [o and o[0] for o in found]
    def came_to(self, e, rows, step, state):
        for row,(i,s) in enumerate(rows):
            if (i, s+step) in self.starts: self[i,s+step] = [o[:,row].clone() for o in state],e


# StoredState

@pytest.mark.parametrize('how', PLANS)
@pytest.mark.parametrize('layer', LAYERS)
def test_windows_begin_with_the_state_that_their_first_step_was_last_come_to(layer, how):
    "Shuffled windows that overlap, two sequences, a last batch that is smaller, a last sub-window that is shorter; three epochs"
    learn = learner(windows(), StoredState(), layer, 2, **SCHEMES[how])
    (rnn,head),memory = parts(learn),Memory()
    epochs = window_epochs(len(memory.starts), BS, 3, SEED)
    assert len(epochs[0][-1]) not in (0, BS)
    trained(learn)
    train_windows(rnn, head, epochs, PLANS[how], memory.begin, memory.came_to)
    assert same(learn, rnn, head)
    initial = learn.model[0].initial
    where = window_starts((130, 97))
    for i,o in enumerate(where):
        assert (initial.since[i]>=0)==(o in memory)
        if o in memory: assert all(torch.allclose(kept[i], mine, atol=1e-10, rtol=0) for kept,mine in zip(initial.kept if layer=='lstm' else [initial.kept], memory[o][0]))
    ages = memory.ages[2]
    assert (initial.n_rows, initial.n_begun)==(len(where), len(ages))
    assert initial.staleness==pytest.approx(np.mean(ages)) and initial.staleness_max==max(ages)

def test_it_is_not_the_same_without():
    a,b = (learner(windows(), o, sub_seq_len=12) for o in (StoredState(), None))
    for learn in (a, b): fit(learn, 2, LR)
    assert not torch.allclose(a.model[1].weight, b.model[1].weight)

@pytest.mark.parametrize('n_skip', [5, 14])
@pytest.mark.parametrize('how', ['fixed', 'overlap'])
def test_a_washout_is_run_from_the_stored_state(how, n_skip):
    "The second one has a whole sub-window without a loss, whose end is stored too"
    learn = learner(windows(), StoredState(), n_skip=n_skip, **SCHEMES[how])
    (rnn,head),memory = parts(learn),Memory()
    trained(learn)
    train_windows(rnn, head, window_epochs(len(memory.starts), BS, 3, SEED), PLANS[how], memory.begin, memory.came_to, n_skip=n_skip)
    assert same(learn, rnn, head)

def test_a_share_of_the_windows_from_some_epoch_on():
    learn = learner(windows(), StoredState(share=.6, from_epoch=1), sub_seq_len=12)
    rnn,head = parts(learn)
    seeds = trained(learn, 4)
    memory = Memory(share=.6, from_epoch=1, seeds=seeds)
    train_windows(rnn, head, window_epochs(len(memory.starts), BS, 4, SEED), PLANS['fixed'], memory.begin, memory.came_to)
    assert same(learn, rnn, head)
    assert not memory.ages[0] and .3<learn.model[0].initial.n_begun/learn.model[0].initial.n_rows<.75

def test_consecutive_windows_in_order():
    "A window is one later's past, in the same epoch"
    dls = windows(shuffle=False, stp_sz=WIN)
    learn = learner(dls, StoredState(), sub_seq_len=12)
    (rnn,head),memory = parts(learn),Memory(stp_sz=WIN)
    n = len(memory.starts)
    trained(learn)
    train_windows(rnn, head, [[list(range(i, min(i+BS, n))) for i in range(0, n, BS)]]*3, PLANS['fixed'], memory.begin, memory.came_to, stp_sz=WIN)
    assert same(learn, rnn, head)
    assert learn.model[0].initial.summary()==f'epoch 2: 3 of {n} windows began with a stored state, 0.67 epochs old in the mean, 1 at most'
