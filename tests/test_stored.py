"First states that come from elsewhere: stored at an earlier visit, or passed on by another row. Run as a script, this file is one of two processes"
import copy, io, pickle, random, sys, warnings
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fasttransform import Transform
from torch import nn
from helpers import fit, sgd, untaught_on_purpose
from reference import permutations, stream_by_hand, window_epochs
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.loaders.here import StreamRows, WindowRows
from tbptt_fastai.loaders.layout import Block
from tbptt_fastai.loaders.shared import BlockPart, Part
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.sequences.windows import SequenceWindows, Sequences
from tbptt_fastai.state.pieces import Piece
from tbptt_fastai.state.stateful import StatefulRNN, learned_state
from tbptt_fastai.state.stored import PassedState, StoredState
from tbptt_fastai.state.unroll import Unroll
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

def windows(bs=BS, lengths=(130, 97), stp_sz=STP, seed=SEED, **kwargs):
    if seed is not None: random.seed(seed)
    ds = SequenceWindows(*signals(lengths), win_sz=WIN, stp_sz=stp_sz, dtype=torch.float64)
    return DataLoaders(TbpttDL(ds, bs=bs, **{**dict(shuffle=True, num_workers=0), **kwargs}), TbpttDL(ds, bs=bs, num_workers=0, time_dim=kwargs.get('time_dim')))

def stream(bs=3, lengths=(50, 33, 47, 28, 9, 7, 40), seed=SEED, **kwargs):
    if seed is not None: random.seed(seed)
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

def is_close(params, rnn, head):
    by_hand = {**{f'0.rnn.{k}': v for k,v in rnn.state_dict().items()}, **{f'1.{k}': v for k,v in head.state_dict().items()}}
    return max((params[k]-v).abs().max().item() for k,v in by_hand.items())<1e-10

def same(learn, rnn, head): return is_close(learn.model.state_dict(), rnn, head)

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
    params = [*rnn.parameters(), *head.parameters()]
    opt = torch.optim.SGD(params, lr=LR)
    for grads in window_gradients(rnn, head, epochs, plan, begin, came_to, lengths, n_skip, stp_sz):
        for p,g in zip(params, grads): p.grad = g
        opt.step()

def window_gradients(rnn, head, epochs, plan, begin, came_to, lengths, n_skip, stp_sz):
    """Windows by hand: `begin(epoch, windows)` gives the state of each row, or None, and `came_to(epoch, windows, step, state)` is told
    the state that rows go on from, or end in"""
    xs,ys = signals(lengths)
    where = window_starts(lengths, stp_sz)
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
                    yield torch.autograd.grad(loss, [*rnn.parameters(), *head.parameters()])
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
        if o not in memory: continue
        kept = initial.kept if layer=='lstm' else [initial.kept]
        assert all(torch.allclose(mine[i], theirs, atol=1e-10, rtol=0) for mine,theirs in zip(kept, memory[o][0]))
    ages = memory.ages[2]
    assert (initial.n_rows, initial.n_begun)==(len(where), len(ages))
    assert initial.staleness==pytest.approx(np.mean(ages)) and initial.staleness_max==max(ages)

def test_it_is_not_the_same_without():
    a,b = (learner(windows(), o, sub_seq_len=12) for o in (StoredState(), None))
    for learn in (a, b): fit(learn, 2, LR)
    assert not torch.allclose(a.model[1].weight, b.model[1].weight)

@pytest.mark.parametrize('n_skip', [5, 14])
@pytest.mark.parametrize('how', ['fixed', 'overlap'])
@untaught_on_purpose
def test_a_washout_is_run_from_the_stored_state(how, n_skip):
    "The second one has a whole sub-window without a loss, whose end is stored too"
    learn = learner(windows(), StoredState(), n_skip=n_skip, **SCHEMES[how])
    (rnn,head),memory = parts(learn),Memory()
    trained(learn)
    train_windows(rnn, head, window_epochs(len(memory.starts), BS, 3, SEED), PLANS[how], memory.begin, memory.came_to, n_skip=n_skip)
    assert same(learn, rnn, head)

FIRST_STEPS = [(dict(burn_in=14), [(0, 14, 24, 24), (24, 24, 36, 36), (36, 36, 40, 40)]),
    (dict(warm_up=4), [(0, 4, 4, 4), (4, 4, 16, 16), (16, 16, 28, 28), (28, 28, 40, 40)]),
    (dict(warm_up=4, burn_in=18), [(0, 4, 4, 4), (4, 18, 28, 28), (28, 28, 40, 40)])]

@pytest.mark.parametrize('first,plan', FIRST_STEPS)
@pytest.mark.parametrize('layer', LAYERS)
def test_a_burn_in_and_a_warm_up_begin_with_the_stored_state(layer, first, plan):
    "... and what they come to is stored"
    learn = learner(windows(), StoredState(), layer, sub_seq_len=12, **first)
    (rnn,head),memory = parts(learn),Memory()
    trained(learn)
    train_windows(rnn, head, window_epochs(len(memory.starts), BS, 3, SEED), plan, memory.begin, memory.came_to)
    assert same(learn, rnn, head)
    assert learn.model[0].initial.n_begun>0

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

def test_a_scheme_that_goes_back_to_the_start_of_a_window_begins_it_alike():
    "Overlap begins its second sub-window there too: by the same draw, with the same state"
    learn = learner(windows(), StoredState(share=.5), truncation=Overlap(8, 20))
    rnn,head = parts(learn)
    memory = Memory(share=.5, seeds=trained(learn))
    train_windows(rnn, head, window_epochs(len(memory.starts), BS, 3, SEED), PLANS['overlap'], memory.begin, memory.came_to)
    assert same(learn, rnn, head)

@pytest.mark.parametrize('how', [Exact(8), RandomUnbiased(10)])
def test_schemes_that_run_a_window_in_pieces_store_as_others_do(how):
    "Activations that are computed again begin with what the first pass began with, though other states were stored since"
    learn = learner(windows(), StoredState(), truncation=how)
    (rnn,head),memory = parts(learn),Memory()
    trained(learn)
    if isinstance(how, RandomUnbiased): return # that it runs
    train_windows(rnn, head, window_epochs(len(memory.starts), BS, 3, SEED), PLANS['whole'], memory.begin, memory.came_to)
    assert same(learn, rnn, head)

def test_a_learned_first_state_is_there_where_none_is_stored():
    "... and has a gradient of those rows alone"
    rnn = nn.GRU(1, H, batch_first=True)
    first = learned_state(rnn)
    with torch.no_grad(): first.tensors[0].fill_(.5)
    model = nn.Sequential(StatefulRNN(rnn, initial=StoredState(otherwise=first)), nn.Linear(H, 1)).double()
    dls = windows(lengths=(130,), stp_sz=WIN, bs=2, shuffle=False)
    learn = TbpttLearner(dls, model, loss_func=nn.MSELoss(), opt_func=sgd, sub_seq_len=20)
    begun = []
    class Look(Callback):
        def after_pred(self):
            if self.training: begun.append(learn.model[0].initial.n_begun)
    hook = learn.model[0].rnn.register_forward_pre_hook(lambda m, a: states.append(a[1].detach().clone()) if learn.model.training else None)
    states = []
    before = first.tensors[0].detach().clone()
    fit(learn, 1, LR, cbs=Look())
    hook.remove()
    states = states[-4:] # those of the training, without what is run before the first step
    assert torch.equal(states[0], before.expand(1, 2, H)) and begun==[0, 0, 1, 1]
    assert states[2].shape==(1, 1, H) and not torch.allclose(states[2], before[:,:1]) and torch.allclose(states[2][0,0], learn.model[0].initial.kept[2])
    assert not torch.equal(first.tensors[0], before)

def test_of_two_rows_at_one_place_the_last_is_stored():
    ds = SequenceWindows(torch.zeros(100), win_sz=40, stp_sz=20)
    o = StoredState()
    o.begin_epoch(2, 0)
    o.keep(torch.arange(3.)[None,:,None], WindowRows(3, np.array([0, 1, 0]), ds), 20, 1)
    assert o.kept.flatten().tolist()==[0, 2, 1, 0] and o.since.tolist()==[-1, 2, 2, -1]


# PassedState

class Passed:
    "The final states of the batch before"
    def __init__(self, seeds, share=1, from_epoch=0):
        self.rngs,self.share,self.from_epoch,self.pool,self.n = [random.Random(o) for o in seeds],share,from_epoch,[],0
    def chosen(self, e, begins):
        "For each row a state, or None; `begins` says which rows begin"
        drawn = [self.share==1 or self.rngs[e].random()<self.share for _ in begins]
        chosen = [row for row,b in enumerate(begins) if b and drawn[row] and e>=self.from_epoch]
        res = [None]*len(begins)
        if not chosen or not self.pool: return res
        order = self.rngs[e].sample(range(len(self.pool)), len(self.pool))
        for i,row in enumerate(chosen): res[row] = self.pool[order[i%len(order)]]
        self.n += len(chosen)
        return res
    def begin(self, e, rows): return self.chosen(e, [True]*len(rows))
    def came_to(self, e, rows, step, state):
        if step==WIN: self.pool = [[o[:,row].clone() for o in state] for row in range(len(rows))]

@pytest.mark.parametrize('how', PLANS)
@pytest.mark.parametrize('layer', LAYERS)
def test_windows_begin_with_the_final_state_of_others(layer, how):
    "A batch of two is followed by one of four, of which two share a final state"
    learn = learner(windows(), PassedState(), layer, 2, **SCHEMES[how])
    rnn,head = parts(learn)
    passed = Passed(trained(learn))
    train_windows(rnn, head, window_epochs(38, BS, 3, SEED), PLANS[how], passed.begin, passed.came_to)
    assert same(learn, rnn, head)
    assert learn.model[0].initial.summary()=='epoch 2: 38 of 38 rows began with the final state of another' and passed.n==3*38-BS

def test_a_share_of_the_windows_begins_with_passed_states_from_some_epoch_on():
    learn = learner(windows(), PassedState(share=.4, from_epoch=1), n_skip=14, truncation=Overlap(8, 20))
    rnn,head = parts(learn)
    passed = Passed(trained(learn, 4), .4, 1)
    train_windows(rnn, head, window_epochs(38, BS, 4, SEED), PLANS['overlap'], passed.begin, passed.came_to, n_skip=14)
    assert same(learn, rnn, head) and .2<passed.n/(3*38)<.6

def test_a_foreign_loader_of_windows_passes_states_as_well():
    xs,ys = signals()
    where = window_starts((130, 97))
    def loader(): return TfmdDL([(xs[i][s:s+WIN], ys[i][s:s+WIN]) for i,s in where], bs=BS, num_workers=0)
    learn = learner(DataLoaders(loader(), loader()), PassedState(), sub_seq_len=12)
    rnn,head = parts(learn)
    passed = Passed(trained(learn))
    train_windows(rnn, head, [[list(range(i, min(i+BS, 38))) for i in range(0, 38, BS)]]*3, PLANS['fixed'], passed.begin, passed.came_to)
    assert same(learn, rnn, head)

LENGTHS = (50, 33, 47, 28, 9, 7, 40)

def train_stream(rnn, head, orders, sub, passed, bs=3, lengths=LENGTHS, n_skip=0):
    """Each row by itself, over its real steps alone: its final state is that at its last step

    Of several processes, one `Passed` each, every one has every so many of the rows"""
    processes = passed if isinstance(passed, list) else [passed]
    xs,ys = signals(lengths)
    opt,ended = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=LR),{}
    most = bs*max(min(a+sub, n)-max(a, min(n_skip, n)) for n in lengths for a in range(0, n, sub))
    for e,order in enumerate(orders):
        states = [None]*bs
        for step in stream_by_hand(lengths, bs, sub, order):
            begins = [p is not None and p[1]==0 for p in step]
            given = [None]*bs
            for rank,o in enumerate(processes):
                rows = range(rank, bs, len(processes))
                o.pool = [ended[row] for row in rows if row in ended]
                own = [begins[row] for row in rows]
                if any(own): given[rank::len(processes)] = o.chosen(e, own)
            preds,targets = [],[]
            for row,p in enumerate(step):
                if p is None: continue
                i,a,b = p
                if a==0: states[row] = given[row] or [o[:,0] for o in zeros(1, rnn)]
                out,new = run(rnn, xs[i][None,a:b], [o[:,None] for o in states[row]])
                states[row] = [o[:,0].detach() for o in new]
                if b==lengths[i]: ended[row] = states[row]
                skip = min(max(n_skip-a, 0), b-a)
                preds.append(head(out)[0,skip:])
                targets.append(ys[i][a+skip:b])
            preds,targets = torch.cat(preds),torch.cat(targets)
            if not len(preds): continue
            ((preds-targets).square().mean()*(len(preds)/most)).backward()
            opt.step()
            opt.zero_grad()

@pytest.mark.filterwarnings('ignore:.*sequences are not longer than n_skip')
@pytest.mark.parametrize('n_skip', [0, 11])
@pytest.mark.parametrize('layer', LAYERS)
@untaught_on_purpose
def test_sequences_of_a_stream_begin_with_the_final_state_of_others(layer, n_skip):
    "Sequences end in the middle of a block, with padding behind; with a washout, in a block without a loss"
    orders = permutations(len(LENGTHS), 4, SEED)
    firsts = [stream_by_hand(LENGTHS, 3, 10, order)[0] for order in orders]
    assert any(p[2]<10 for o in firsts for p in o) # a short sequence ends in such a block
    learn = learner(stream(sub_seq_len=10), PassedState(share=.7), layer, 2, n_skip=n_skip)
    rnn,head = parts(learn)
    passed = Passed(trained(learn, 4), .7)
    train_stream(rnn, head, orders, 10, passed, n_skip=n_skip)
    assert same(learn, rnn, head) and passed.n>10

def test_a_stream_of_whole_sequences_of_one_length():
    lengths = (20,)*7
    learn = learner(stream(lengths=lengths), PassedState())
    rnn,head = parts(learn)
    passed = Passed(trained(learn))
    train_stream(rnn, head, permutations(7, 3, SEED), 20, passed, lengths=lengths)
    assert same(learn, rnn, head)

def test_a_stream_in_blocks_of_varying_length_runs():
    learn = learner(stream(), PassedState(), truncation=Jittered(10, least=5, longest=15))
    trained(learn)
    assert learn.model[0].initial.n_begun==len(LENGTHS)


# What it leaves alone

KINDS = dict(stored=StoredState, passed=PassedState)

@pytest.mark.parametrize('kind', KINDS)
def test_evaluations_are_bitwise_those_without(kind):
    "After a training, and in the middle of one; so is the training"
    class Evaluate(Callback):
        "Between epochs, and in the middle of a window"
        busy = False
        def before_epoch(self):
            if self.busy: return
            self.busy = True
            self.learn.validate()
            self.busy = False
        after_epoch = before_epoch
        def after_batch(self):
            if not self.training: return
            self.model.eval()
            with torch.no_grad(): self.model(*self.xb)
            self.model.train()
    def make(): return learner(windows(), KINDS[kind](), sub_seq_len=12)
    a,b = make(),make()
    set_seed(0)
    fit(a, 2, LR)
    set_seed(0)
    fit(b, 2, LR, cbs=Evaluate())
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))
    plain = learner(windows(), None, sub_seq_len=12)
    plain.model.load_state_dict(a.model.state_dict())
    with a.no_bar(), plain.no_bar():
        assert a.validate()[0]==plain.validate()[0]
        assert torch.equal(a.get_preds()[0], plain.get_preds()[0])
    x = a.dls.one_batch()[0]
    with torch.no_grad(): assert torch.equal(a.model.eval()(x), plain.model.eval()(x))

def test_evaluations_of_a_stream_are_bitwise_those_without():
    a = learner(stream(sub_seq_len=10), PassedState())
    fit(a, 2, LR)
    plain = learner(stream(sub_seq_len=10), None)
    plain.model.load_state_dict(a.model.state_dict())
    with a.no_bar(), plain.no_bar(): assert torch.equal(a.get_preds()[0], plain.get_preds()[0]) and a.validate()[0]==plain.validate()[0]

@pytest.mark.parametrize('kind', KINDS)
def test_what_is_kept_is_in_no_state_dict_buffer_copy_pickle_or_export(kind):
    learn = learner(windows(), KINDS[kind](.5, 1), sub_seq_len=12)
    names = list(learn.model.state_dict())
    fit(learn, 2, LR)
    assert list(learn.model.state_dict())==names and not list(learn.model.buffers())
    initial = learn.model[0].initial
    assert initial.kept is not None
    file = io.BytesIO()
    torch.save(learn.model, file)
    file.seek(0)
    learn.export('a.pkl')
    copies = [copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model)), torch.load(file, weights_only=False), load_learner('a.pkl').model]
    for o in copies:
        other = o[0].initial
        assert other.kept is None and other.rng is None and (other.share, other.from_epoch)==(.5, 1)
        assert all(map(torch.equal, o.state_dict().values(), learn.model.state_dict().values()))
    assert initial.kept is not None

@pytest.mark.parametrize('kind', KINDS)
def test_a_fit_begins_with_nothing_and_a_search_leaves_nothing(kind):
    "A learner that has trained, or searched, before trains as another one with its weights"
    a,b = (learner(windows(shuffle=False), KINDS[kind](.7), sub_seq_len=12) for _ in range(2))
    fit(a, 1, LR)
    with a.no_bar(), a.no_logging(): a.lr_find(num_it=20, show_plot=False)
    b.model.load_state_dict(a.model.state_dict())
    for learn in (a, b):
        set_seed(5)
        fit(learn, 2, LR)
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))

def test_a_search_of_the_learning_rate_begins_both_models_alike():
    "With a learning rate of nothing the model is the untrained one, in each step"
    learn = learner(windows(), StoredState(.6), sub_seq_len=12)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(start_lr=1e-20, end_lr=1e-18, num_it=60, show_plot=False, suggest_funcs=())
    assert learn.model[0].initial.n_begun and {float(o) for o in learn.recorder.losses}=={1.}

def test_two_workers_give_what_none_does():
    a,b = (learner(windows(num_workers=n), StoredState(.7), sub_seq_len=12) for n in (0, 2))
    for learn in (a, b):
        set_seed(1)
        fit(learn, 2, LR)
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))

def test_another_run_over_the_same_loader_in_between_changes_nothing():
    class Iterate(Callback):
        order = 70
        def after_batch(self):
            if self.training and self.train_iter==4: list(self.learn.dls.train.whole_windows())
    a,b = (learner(windows(), StoredState(), sub_seq_len=12) for _ in range(2))
    for learn,cbs in ((a, None), (b, Iterate())):
        set_seed(1)
        fit(learn, 1, LR, cbs=cbs)
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))

def test_kept_on_the_cpu_it_is_the_same():
    a,b = (learner(windows(), StoredState(device=o), sub_seq_len=12) for o in (None, 'cpu'))
    for learn in (a, b): fit(learn, 2, LR)
    assert all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.model[0].initial.nbytes==38*2*H*8

def test_a_state_that_is_not_finite_begins_nothing():
    learn = learner(windows(), StoredState(), sub_seq_len=12)
    class Break(Callback):
        order = 70
        def before_epoch(self):
            if self.epoch==1:
                for o in learn.model[0].initial.kept: o[:] = float('nan')
    fit(learn, 2, LR, cbs=Break())
    assert all(o.isfinite().all() for o in learn.model.state_dict().values())

def test_two_layers_are_begun_in_the_same_rows():
    "Each has a memory of its own, and draws as the other does"
    torch.manual_seed(0)
    one,two = (StatefulRNN(nn.GRU(n, H, batch_first=True), initial=StoredState(.5)) for n in (1, H))
    learn = TbpttLearner(windows(), nn.Sequential(one, two, nn.Linear(H, 1)).double(), loss_func=nn.MSELoss(), opt_func=sgd, sub_seq_len=12)
    masks = [[], []]
    for o,found in zip((one, two), masks):
        def begin_from(*args, begin=o.initial.begin_from, found=found):
            first = begin(*args)
            found.append(first and first[0].tolist())
            return first
        object.__setattr__(o.initial, 'begin_from', begin_from)
    fit(learn, 2, LR)
    assert masks[0]==masks[1] and any(o and True in o and False in o for o in masks[0])

def test_what_is_kept_is_a_copy():
    "... of states that a CUDA graph writes over"
    ds = SequenceWindows(torch.zeros(100), win_sz=40, stp_sz=20)
    for o in (PassedState(), StoredState()):
        state = torch.ones(1, 2, H)
        o.begin_epoch(0, 0)
        o.keep(state, WindowRows(2, np.array([0, 1]), ds), None, 1)
        state.zero_()
        assert o.kept.sum() in (H, 2*H) # of stored states, window 3 begins where window 1 ends

def test_states_that_wait_are_not_for_an_evaluation():
    "A window has begun, and another callback evaluates before its first step"
    torch.manual_seed(0)
    rnn = StatefulRNN(nn.GRU(1, H, batch_first=True), initial=PassedState())
    rnn.slot.first = torch.ones(2, dtype=bool),torch.ones(1, 2, H)
    x = torch.randn(2, 5, 1)
    assert torch.equal(rnn.eval()(x), rnn.rnn(x)[0])
    assert not torch.equal(rnn.train()(x), rnn.rnn(x)[0])

def test_processes_call_the_model_as_often_as_each_other():
    "Though sequences end in the rows of one of them alone"
    whole = Block(np.array([0, 1, 2, 3]), np.array([0, 0, 10, 0]), np.array([10, 10, 4, 7]))
    cut = [StreamRows(BlockPart(whole, Part(rank, 2)), np.array([30, 40, 14, 7])).cut([Piece(10)]) for rank in range(2)]
    assert [[o.steps for o in pieces] for pieces in cut]==[[4, 3, 3]]*2
    assert [o.came_to for o in cut[0]]==[4, 7, 10]


# A training that was interrupted

class Killed(BaseException): pass

class KillAt(Callback):
    order = 2000
    def __init__(self, n): self.left = iter(range(n-1))
    def after_batch(self):
        if self.training and next(self.left, None) is None: raise Killed

OVERLAP,FIXED = dict(truncation=Overlap(8, 20)),dict(sub_seq_len=12)
RESUMED = dict(
    stored=(windows, partial(StoredState, .6), OVERLAP), fixed=(windows, partial(StoredState, device='cpu'), FIXED),
    passed=(windows, partial(PassedState, .6), OVERLAP), workers=(partial(windows, num_workers=2), StoredState, FIXED),
    stream=(partial(stream, sub_seq_len=10), partial(PassedState, .6), {}))

@pytest.mark.parametrize('kill', [2, 6, 18, 78])
@pytest.mark.parametrize('case', RESUMED)
def test_a_training_that_was_interrupted_ends_as_one_that_was_not(case, kill, tmp_path):
    "In the first epoch and later, at step 16 and 76 between two sub-windows of one window that both begin at its start"
    data,initial,how = RESUMED[case]
    if case=='workers' and kill!=18: pytest.skip('one is enough')
    def make(seed, path):
        set_seed(seed)
        return learner(data(seed=None), initial(), path=tmp_path/path, **how)
    def run(learn, kill=10**9): fit(learn, 3, LR, cbs=[TbpttCheckpoint(every=4, resume=True), KillAt(kill)])
    whole = make(1, 'whole')
    run(whole)
    killed = make(1, 'killed')
    with pytest.raises(Killed): run(killed, min(kill, 14) if case=='stream' else kill)
    resumed = make(2, 'killed')
    run(resumed)
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))
    a,b = (o.model[0].initial for o in (whole, resumed))
    assert a.summary()==b.summary() and a.n_begun
    if case in ('stored','fixed'): assert all(map(torch.equal, a.kept, b.kept)) and (a.since==b.since).all()

def test_a_checkpoint_is_that_of_its_own_first_states(tmp_path):
    for share in (.5, .6):
        learn = learner(windows(), StoredState(share), sub_seq_len=12, path=tmp_path)
        if share==.5:
            with pytest.raises(Killed): fit(learn, 2, LR, cbs=[TbpttCheckpoint(every=1), KillAt(5)])
        else:
            with pytest.raises(ValueError, match=r'first_states.*share=0.5.*share=0.6'): fit(learn, 2, LR, cbs=[TbpttCheckpoint(resume=True), KillAt(5)])


# Refused by name, before the first step

def check_refused(dls, initial, match, error=ValueError, **how):
    with pytest.raises(error, match=match): learner(dls, initial, **how)

def test_streams_and_loaders_that_do_not_tell_are_refused_for_stored_states():
    xs,ys = signals()
    items = [(xs[0][s:s+WIN], ys[0][s:s+WIN]) for s in range(0, 80, 4)]
    check_refused(stream(sub_seq_len=10), StoredState(), 'StoredState .* StreamDL .* nothing before it')
    for cls in (TfmdDL, TbpttDL):
        dls = DataLoaders(cls(items, bs=4, num_workers=0), cls(items, bs=4, num_workers=0))
        check_refused(dls, StoredState(), f'StoredState .* {cls.__name__} of list does not tell', sub_seq_len=12)
    loader = torch.utils.data.DataLoader(items, batch_size=4)
    check_refused(DataLoaders(loader, loader), StoredState(), 'StoredState .* DataLoader of list does not tell', sub_seq_len=12)
    whole = Sequences(*signals((60, 60)), dtype=torch.float64)
    check_refused(DataLoaders(TbpttDL(whole, bs=2), TbpttDL(whole, bs=2)), StoredState(), 'TbpttDL of Sequences does not tell', sub_seq_len=12)

def test_loaders_that_may_leave_windows_out_are_refused_for_stored_states():
    check_refused(windows(after_item=lambda o: o), StoredState(), 'transforms of items', sub_seq_len=12)
    check_refused(windows(sample=lambda: iter(range(8))), StoredState(), 'does not tell', sub_seq_len=12)
    class Skipping(TbpttDL):
        def create_batches(self, samps): return super().create_batches(list(samps)[2:])
    ds = windows().train_ds
    check_refused(DataLoaders(Skipping(ds, bs=4), Skipping(ds, bs=4)), StoredState(), 'Skipping of SequenceWindows does not tell', sub_seq_len=12)

def test_windows_of_which_none_begins_where_another_ends_are_refused():
    check_refused(windows(stp_sz=7), StoredState(), 'begin every 7 steps, up to step 84 .* there 40 steps', sub_seq_len=None)
    check_refused(windows(lengths=(40, 40)), StoredState(), 'would begin no window', sub_seq_len=12)

def test_a_warm_up_and_a_burn_in_change_where_states_are():
    for first in (dict(warm_up=5), dict(burn_in=39), dict(burn_in=37, warm_up=11)):
        check_refused(windows(stp_sz=12), StoredState(), 'would begin no window', sub_seq_len=12, **first)
    learn = learner(windows(stp_sz=12), StoredState(), sub_seq_len=10, warm_up=12) # after 12, 22, 32 and 40 steps
    fit(learn, 2, LR)
    assert learn.model[0].initial.n_begun>0
    check_refused(windows(stp_sz=12), StoredState(), 'would begin no window', sub_seq_len=10)

def test_batches_that_continue_each_other_are_refused():
    for initial in (StoredState(), PassedState()):
        check_refused(windows(shuffle=False, bs=2), initial, f'continue each other.*{type(initial).__name__}', sub_seq_len=12, continuing=True)

def test_schemes_that_go_back_over_the_end_of_a_sequence_are_refused_in_streams():
    for scheme in (Overlap(10, 20), RandomUnbiased(20, block=10), Exact(8)):
        check_refused(stream(sub_seq_len=10), PassedState(), 'PassedState passes .*several times', truncation=scheme)
    check_refused(stream(), PassedState(), '7 to 50 steps are run whole')

def test_one_memory_for_two_layers_is_refused():
    initial = StoredState()
    model = nn.Sequential(*(StatefulRNN(nn.GRU(n, H, batch_first=True), initial=initial) for n in (1, H)), nn.Linear(H, 1)).double()
    with pytest.raises(ValueError, match='0 and 1 have the same StoredState'): TbpttLearner(windows(), model, loss_func=nn.MSELoss(), sub_seq_len=12)

class Counting(nn.Module):
    "Its state has a number of steps, the same for all rows"
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, H, batch_first=True)
    def initial_state(self, bs, device, dtype): return torch.zeros(1, bs, H, device=device, dtype=dtype),0
    def forward(self, x, state):
        out,h = self.rnn(x, state[0])
        return out,(h, state[1]+x.shape[1])

@pytest.mark.parametrize('kind', KINDS)
def test_a_state_that_is_not_one_for_each_row_is_refused_before_anything_is_learned(kind):
    torch.manual_seed(0)
    model = nn.Sequential(StatefulRNN(Counting(), batch_dim=(1, None), initial=KINDS[kind]()), nn.Linear(H, 1)).double()
    learn = TbpttLearner(windows(), model, loss_func=nn.MSELoss(), sub_seq_len=12)
    before = [o.clone() for o in model.state_dict().values()]
    with pytest.raises(TypeError, match='holds 12, which is the same for all rows'): fit(learn, 1, LR)
    assert all(map(torch.equal, before, model.state_dict().values()))

@pytest.mark.parametrize('cls', KINDS.values())
def test_settings_are_refused_by_their_names(cls):
    with pytest.raises(ValueError, match='share is 0'): cls(share=0)
    with pytest.raises(ValueError, match='share is 1.5'): cls(share=1.5)
    with pytest.raises(ValueError, match='from_epoch is -1'): cls(from_epoch=-1)
    with pytest.raises(TypeError, match='from_epoch'): cls(from_epoch=.5)
    with pytest.raises(TypeError, match='otherwise is'): cls(otherwise=torch.zeros(3))
    with pytest.raises(TypeError, match='otherwise is'): cls(otherwise=cls())
    with pytest.raises(TypeError, match='InitialState'): StatefulRNN(nn.GRU(1, 1), initial=cls)

def test_another_device_is_refused():
    with pytest.raises(ValueError, match="device is 'nowhere'"): StoredState(device='nowhere')

def test_an_epoch_that_does_not_come_is_named():
    learn = learner(windows(), StoredState(from_epoch=2), sub_seq_len=12)
    with pytest.warns(UserWarning, match=r'StoredState\(from_epoch=2\) begins no row in this fit of 2 epochs'): fit(learn, 2, LR)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(learn, 3, LR)
    with warnings.catch_warnings(record=True) as found:
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())
    assert not any('begins no row' in str(o.message) for o in found)

class Without(Transform):
    "A batch without its first row"
    def encodes(self, x:torch.Tensor): return x[1:]

def test_rows_that_were_left_out_are_refused():
    learn = learner(windows(after_batch=Without()), StoredState(), sub_seq_len=12)
    with pytest.raises(ValueError, match='3 rows, but its loader drew 4'): fit(learn, 1, LR)


# Into the models of the library

def test_the_default_model_takes_it():
    dls = SequenceDataLoaders.from_arrays(*(torch.cat(o).float() for o in signals()), win_sz=40, stp_sz=20, sub_seq_len=20, bs=4)
    learn = RNNLearner(dls, hidden_size=4, initial=StoredState())
    fit(learn, 2)
    assert learn.model.rnn.initial.n_begun and TbpttLearner(dls, hidden_size=4, initial=PassedState(.5)).model.rnn.initial.share==.5

def test_a_text_model_takes_it():
    dls = SequenceDataLoaders.from_text('to be or not to be '*40, bs=3, sub_seq_len=15)
    learn = RNNLearner(dls, hidden_size=4, initial=PassedState())
    fit(learn, 2)
    assert learn.model.rnn.initial.n_begun==3

def test_a_cell_that_is_unrolled():
    torch.manual_seed(0)
    model = nn.Sequential(StatefulRNN(Unroll(nn.LSTMCell(1, H)), initial=StoredState()), nn.Linear(H, 1)).double()
    learn = TbpttLearner(windows(), model, loss_func=nn.MSELoss(), opt_func=sgd, sub_seq_len=12)
    fit(learn, 2, LR)
    assert model[0].initial.n_begun and model[0].initial.kept[0].shape==(38, H)

@pytest.mark.parametrize('time_dim', [0, -1])
def test_time_on_another_axis(time_dim):
    "Bit by bit what it is on the second"
    learns = []
    for dim in (1, time_dim):
        torch.manual_seed(0)
        model = SequenceRNN(1, 1, 'gru', H, time_dim=dim, initial=StoredState()).double()
        learns.append(TbpttLearner(windows(time_dim=dim), model, loss_func=nn.MSELoss(), opt_func=sgd, sub_seq_len=12))
        fit(learns[-1], 2, LR)
    a,b = (o.model.state_dict().values() for o in learns)
    assert all(torch.allclose(p, q, atol=1e-12) for p,q in zip(a, b)) and learns[1].model.rnn.initial.n_begun


# Two processes

SHARED = (130, 93) # 37 windows: one is read twice

def process(kind, folder):
    from fastai.distributed import rank_distrib
    set_seed(SEED)
    if kind=='stored': learn = learner(windows(lengths=SHARED, device='cpu'), StoredState(.7), sub_seq_len=12)
    else: learn = learner(stream(bs=2, sub_seq_len=10, device='cpu'), PassedState(.7))
    rnn,head = parts(learn)
    with learn.distrib_ctx(): seeds = trained(learn)
    initial = learn.model[0].initial
    torch.save(dict(params=learn.model.state_dict(), seeds=seeds, rnn=rnn, head=head, n=(initial.n_rows, initial.n_begun), since=getattr(initial, 'since', None)), f'{folder}/{rank_distrib()}.pt')

if __name__=='__main__': process(*sys.argv[1:])

def of_two(kind, tmp_path):
    pytest.importorskip('accelerate')
    from test_distributed import launch
    launch('test_stored.py', kind, tmp_path, cwd=tmp_path)
    found = [torch.load(tmp_path/f'{rank}.pt', weights_only=False) for rank in range(2)]
    assert all(map(torch.equal, found[0]['params'].values(), found[1]['params'].values()))
    rnn,head = (found[0][o] for o in ('rnn','head'))
    def is_same(): return is_close(found[0]['params'], rnn, head)
    return found,rnn,head,is_same

def test_each_of_two_processes_has_a_memory_of_its_own(tmp_path):
    "A window that the other process had in the last epoch begins with an older state, or with none"
    found,rnn,head,is_same = of_two('stored', tmp_path)
    ranks = [[], []]
    for order in permutations(37, 3, SEED):
        order = [*order.tolist(), order.tolist()[0]]
        for rank in range(2): ranks[rank].append([order[19*rank:][:19][i:i+BS] for i in range(0, 19, BS)])
    memories = [Memory(SHARED, .7, seeds=o['seeds']) for o in found]
    runs = [window_gradients(rnn, head, epochs, PLANS['fixed'], m.begin, m.came_to, SHARED, 0, STP) for epochs,m in zip(ranks, memories)]
    params = [*rnn.parameters(), *head.parameters()]
    opt = torch.optim.SGD(params, lr=LR)
    for grads in zip(*runs, strict=True):
        for p,a,b in zip(params, *grads): p.grad = (a+b)/2
        opt.step()
    assert is_same()
    for o,m in zip(found, memories): assert o['n']==(19, len(m.ages[2])) and (o['since']>=0).sum()==len(m)
    assert set(memories[0])!=set(memories[1]) or any(memories[0][k][1]!=memories[1][k][1] for k in memories[0])

def test_two_processes_that_share_a_stream_pass_the_states_of_their_own_rows(tmp_path):
    found,rnn,head,is_same = of_two('passed', tmp_path)
    train_stream(rnn, head, permutations(len(LENGTHS), 3, SEED), 10, [Passed(o['seeds'], .7) for o in found], bs=4)
    assert is_same() and all(o['n'][1] for o in found)
