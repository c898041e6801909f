"One stream that two or three processes share, against one process that has all its rows. Run as a script, this file is one of them."
import os, random, re, sys, time, warnings
from functools import cache, partial
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import mae
from helpers import sgd
from reference import OwnState, stream_by_hand
from tbptt_fastai.all import Adaptive, Jittered, Overlap, RandomUnbiased, Sequences, Standardize, StatefulRNN, StreamDL, TbpttLearner, TbpttResetCB
from tbptt_fastai.loaders.counts import SequenceCounts, TargetCounts
from tbptt_fastai.loaders.layout import BlockRun, Layout, VaryingLayout
from tbptt_fastai.loaders.shared import Part, SharedLayout
from tbptt_fastai.training.metrics import fun_rmse
from tbptt_fastai.state.stateful import learned_state
from test_distributed import launch

DDPKwargs = pytest.importorskip('accelerate').DistributedDataParallelKwargs
N_EPOCH,LR,SUB = 2,.1,7
LENGTHS = [17,20,46,30,12,5,33]


# Data: channel 0 is the number of the sequence, channel 1 the step, exactly

def sequences(lengths, targets='all', dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    xs = [torch.stack([torch.full((n,), i/16), torch.arange(n)/64, torch.randn(n, generator=g)], 1).to(dtype) for i,n in enumerate(lengths)]
    ys = [x[:,2:].cumsum(0).sin() for x in xs]
    if targets=='all': return xs,ys
    missing = [torch.rand(len(y), generator=g)<.6 for y in ys]
    for m in missing[::2]: m[:-3] = True # whole sub-windows without a target
    if targets=='some': return xs,[y.masked_fill(m[:,None], 99.) for y,m in zip(ys, missing)]
    return xs,[(y[:,0]>0).long().masked_fill(m, targets) for y,m in zip(ys, missing)]

class Source:
    "A file that notes which steps are read"
    def __init__(self, a): self.a,self.shape,self.dtype,self.asked = a,a.shape,a.dtype,[]
    def __getitem__(self, steps):
        self.asked.append((steps.start, steps.stop))
        return self.a[steps]

class Net(nn.Module):
    "A `StatefulRNN`, or a plain layer that `Carry` carries; its buffers are sent in every forward pass, which waits for the others"
    def __init__(self, out=1, plain=False):
        super().__init__()
        rnn = nn.LSTM(3, 5, batch_first=True)
        self.rnn,self.head,self.scale = rnn if plain else StatefulRNN(rnn),nn.Linear(5, out),Standardize()

    def forward(self, x):
        out = self.rnn(self.scale(x))
        return self.head(out[0] if isinstance(out, tuple) else out)

class Rows(nn.Module):
    "As `Net`, for batches (time, batch, channels)"
    def __init__(self):
        super().__init__()
        self.rnn,self.head = StatefulRNN(nn.GRU(3, 5)),nn.Linear(5, 1)
    def forward(self, x): return self.head(self.rnn(x))

def own_state(): return OwnState(nn.GRU(3, 5, batch_first=True), nn.Linear(5, 1))
def first_state():
    rnn = nn.GRU(3, 5, batch_first=True)
    return nn.Sequential(StatefulRNN(rnn, initial=learned_state(rnn, list(range(7)))), nn.Linear(5, 1))
def present(y): return y<50

CASES = dict( # what differs from: unequal sequences, 2 rows of each process, shuffled, all targets, the mean squared error
    unequal=dict(),
    one_row=dict(bs=1),
    plain=dict(model=partial(Net, plain=True), shuffle=False),
    single=dict(dtype=torch.float32),
    rests=dict(lengths=[60,8], bs=1, shuffle=False), # a process ends early; of three, one has no sequence at all
    more_rows=dict(lengths=LENGTHS[:3], bs=4),
    washout=dict(n_skip=15),
    washout_of_all=dict(n_skip=8, lengths=[30]*7), # steps without a loss in any process
    missing=dict(targets='some', counts=present),
    missing_washout=dict(targets='some', counts=present, n_skip=9, bs=1),
    files=dict(in_files=True),
    files_missing=dict(in_files=True, targets='some', counts=present, bs=1),
    classes=dict(targets=-100, loss=CrossEntropyLossFlat(), model=partial(Net, 2)),
    classes_out_of_range=dict(targets=-7, loss=nn.CrossEntropyLoss(), model=partial(Net, 2), counts=lambda y: y>=0, bs=1), # torch refuses -7
    sum=dict(loss=nn.MSELoss(reduction='sum'), lr=1e-4, targets='some', counts=present),
    whole=dict(sub_seq_len=None, bs=1),
    overlap=dict(truncation=Overlap(7, 14), sub_seq_len=7),
    overlap_missing=dict(truncation=Overlap(7, 14), sub_seq_len=7, targets='some', counts=present, n_skip=9),
    jittered=dict(truncation=Jittered(8, std=3, least=2)),
    jittered_missing=dict(truncation=Jittered(8, std=3, least=2), targets='some', counts=present, n_skip=5, bs=1),
    unbiased=dict(truncation=RandomUnbiased(14, block=7), sub_seq_len=7),
    own=dict(model=own_state, lengths=[20]*5, valid=[20]*3, bs=1),
    time_first=dict(model=Rows, time_dim=0),
    own_learner=dict(learner=TbpttLearner),
    first_state=dict(model=first_state, bs=1, ctx=dict(kwargs_handlers=[DDPKwargs(find_unused_parameters=True)])), # not in the graph of every step
)
ADAPTIVE = dict(truncation=Adaptive(delta=.5, k_max=12, n_batches=1), dtype=torch.float32) # each would find another length
THREE = ['one_row', 'single', 'rests', 'more_rows', 'missing_washout', 'files_missing', 'classes_out_of_range', 'jittered', 'overlap_missing', 'own'] # in three processes
REFUSED = dict(
    accumulation=(dict(cbs=[GradientAccumulation(20)]), 'GradientAccumulation counts the targets of one process'),
    train_metrics=(dict(train_metrics=True), 'Metrics of the training'),
    lr_find=(dict(cbs=[LRFinder()]), "fastai's lr_find"),
    nothing_counts=(dict(counts=lambda y: y>1000), 'No target of the 7 sequences counts'),
    other_steps=(dict(each=[dict(lengths=[40,25,31]), dict(lengths=[90,25,31])]), r"share one stream, but differ: \{'steps of all': \[96, 146\], 'checksum"),
    other_order=(dict(each=[dict(lengths=[40,25,31]), dict(lengths=[31,40,25])]), r"but differ: \{'checksum of their lengths': "),
    other_count=(dict(each=[dict(lengths=[40,25]), dict(lengths=[40,25,31])]), r"but differ: \{'sequences': \[2, 3\]"),
    other_rows=(dict(each=[dict(bs=2), dict(bs=3)]), r"but differ: \{'bs': \[2, 3\]\}"),
    other_steps_of_a_sub_window=(dict(each=[dict(sub_seq_len=5), dict(sub_seq_len=6)]), r"but differ: \{'sub_seq_len': \[5, 6\]\}"),
    other_washout=(dict(each=[dict(), dict(n_skip=3)]), r"but differ: \{'n_skip': \[0, 3\]\}"),
    other_shuffle=(dict(each=[dict(), dict(shuffle=False)]), r"but differ: \{'shuffle': \[1, 0\]\}"),
    other_counts=(dict(each=[dict(), dict(counts=present)]), r"but differ: \{'counts': \[0, 1\]\}"),
)


# What each process does

class Seen(Callback):
    "What was run over in training: (sequence, step)"
    order = TbpttResetCB.order+1
    def before_fit(self): self.learn.seen,self.learn.n_iters = [],[]
    def after_batch(self):
        if not self.training: return
        segment,warm_up = self.learn.dl.segment,[o for o,_ in self.learn.dl.warm_up]
        for block in [*warm_up, *getattr(segment, 'blocks', [segment])]:
            self.learn.seen += [(int(s),int(a)+i) for s,a,n in zip(block.seq, block.start, block.n) for i in range(n)]
    def after_train(self): self.learn.n_iters.append(self.n_iter)

def data_of(lengths, targets, dtype, in_files):
    xs,ys = sequences(lengths, targets, dtype)
    if not in_files: return Sequences(xs, ys, dtype=dtype),[]
    sources = [[Source(o.numpy()) for o in seqs] for seqs in (xs,ys)]
    ds = Sequences(*sources, dtype=dtype)
    for o in sources[0]: o.asked.clear() # when it was made, values were looked at
    return ds,sources[0]

def make_learner(rank=0, processes=1, lengths=LENGTHS, valid=(13,40,22), bs=2, sub_seq_len=SUB, shuffle=True, dtype=torch.float64, targets='all', counts=None, n_skip=0, model=Net, loss=None, lr=LR, truncation=None, in_files=False, time_dim=None, cbs=(), train_metrics=False, learner=Learner, ctx=None):
    random.seed(rank); torch.manual_seed(rank) # what starts out different is made equal by fastai, and by the first process
    ds,sources = data_of(lengths, targets, dtype, in_files)
    kwargs = dict(sub_seq_len=sub_seq_len, **{} if time_dim is None else dict(time_dim=time_dim))
    train = StreamDL(ds, bs=bs*processes, shuffle=shuffle, **kwargs)
    valid = StreamDL(data_of(valid, targets, dtype, False)[0], bs=2, **kwargs)
    cb = TbpttResetCB('dls' if truncation else sub_seq_len, n_skip, truncation=truncation, counts=counts)
    per_step = [] if targets in (-100,-7) else [fun_rmse, mae]
    learn = learner(DataLoaders(train, valid, device='cpu'), model().to(dtype), loss_func=loss or nn.MSELoss(), opt_func=sgd, lr=lr,
                    cbs=[*([cb] if learner is Learner else []), Seen(), *cbs], metrics=per_step)
    learn.recorder.train_metrics = train_metrics
    return learn,sources

def recorded(learn):
    "What a fit leaves behind"
    return dict(losses=[float(o) for o in learn.recorder.losses], values=[list(o) for o in learn.recorder.values], lrs=learn.recorder.lrs,
                seen=learn.seen, n_iters=learn.n_iters, pct_train=learn.pct_train, params={k:v.clone() for k,v in learn.model.state_dict().items() if torch.is_tensor(v)})

def process(case):
    "Train one case twice; what happened here"
    from fastai.distributed import rank_distrib
    if 'each' in case: case = case['each'][rank_distrib()]
    learn,sources = make_learner(rank_distrib(), **case)
    with learn.no_bar(), learn.no_logging():
        try:
            with learn.distrib_ctx(**case.get('ctx') or {}): learn.fit(N_EPOCH)
        except (NotImplementedError,ValueError) as e: return dict(error=str(e))
        fits,asked = [recorded(learn)],[list(o.asked) for o in sources]
        with learn.distrib_ctx(**case.get('ctx') or {}):
            learn.fit_one_cycle(1)
            fits.append(recorded(learn))
            inside = [*learn.get_preds(), learn.validate()]
        after = [*learn.get_preds(), learn.validate()]
        alone = learn.get_preds()[0] if rank_distrib()==0 else None
    return dict(fits=fits, inside=inside, after=after, alone=alone, asked=asked)

def die(rank):
    "The second process breaks off in the middle of an epoch"
    def end(self):
        if self.training and self.learn.iter==3 and rank==1: os._exit(7)
    learn,_ = make_learner(rank, cbs=[Callback(before_batch=end)])
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit(1)

def main(*args):
    from fastai.distributed import rank_distrib
    if args[0]=='die': return die(rank_distrib())
    folder,*names = args
    cases = {**CASES, 'adaptive': ADAPTIVE, **{name: case for name,(case,_) in REFUSED.items()}}
    torch.save({name: process(cases[name]) for name in names or cases}, f'{folder}/{rank_distrib()}.pt')

if __name__=='__main__': main(*sys.argv[1:])


# The same in one process

@pytest.fixture(scope='module')
def results_of(tmp_path_factory):
    "Of each number of processes, what all of them have found; they are started once"
    @cache
    def run(processes):
        folder = tmp_path_factory.mktemp('shared')
        try: launch('test_shared_streams.py', folder, *({3: THREE}.get(processes, [])), cwd=folder, processes=processes)
        except AssertionError as e: return e # said by each test, and not tried again
        return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in range(processes)]
    return run

@pytest.fixture
def results(results_of, processes):
    res = results_of(processes)
    if isinstance(res, AssertionError): raise res
    return res

def runs(of=lambda name: True): return pytest.mark.parametrize('processes,name', [(n,o) for n,names in ((2,CASES), (3,THREE)) for o in names if of(o)])

@cache
def single(name, processes):
    "What one process finds that has the rows of all"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*not longer than n_skip')
        warnings.filterwarnings('ignore', r'n_skip=\d+ leaves the first') # on purpose
        return train_single(make_learner(0, processes, **CASES[name])[0])

def train_single(learn):
    with learn.no_bar(), learn.no_logging():
        learn.fit(N_EPOCH)
        fits = [recorded(learn)]
        learn.fit_one_cycle(1)
        fits.append(recorded(learn))
        return dict(fits=fits, preds=learn.get_preds(), values=learn.validate())

def tolerance(name):
    "fastai's own cross entropy is of float32, whatever the predictions"
    return 1e-6 if name in ('single','classes') else 1e-12

@runs()
def test_parameters_are_those_of_one_process(results, processes, name):
    for i,expected in enumerate(single(name, processes)['fits']):
        for k,v in expected['params'].items():
            for res in results: torch.testing.assert_close(res[name]['fits'][i]['params'][k], v, rtol=0, atol=tolerance(name), msg=f'fit {i}: {k}')

@runs()
def test_losses_metrics_and_schedules_are_those_of_one_process(results, processes, name):
    for i,expected in enumerate(single(name, processes)['fits']):
        for res in results:
            found = res[name]['fits'][i]
            assert found['n_iters']==expected['n_iters'] and found['pct_train']==pytest.approx(1)
            for what in ('losses', 'lrs'): np.testing.assert_allclose(found[what], expected[what], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(found['values'], expected['values'], rtol=1e-5)

@runs(lambda name: 'overlap' not in name and name!='unbiased') # in these several training steps run over a block
def test_every_step_is_seen_once_and_by_one_process(results, processes, name):
    lengths,n_fits = CASES[name].get('lengths', LENGTHS),[N_EPOCH,1]
    for i,epochs in enumerate(n_fits):
        seen = [s for res in results for s in res[name]['fits'][i]['seen']]
        if 'n_skip' in CASES[name] or 'counts' in CASES[name]: assert len(set(seen))*epochs>=len(seen) # what is warmed up at the end is not run
        else: assert sorted(seen)==sorted([(s,t) for s,n in enumerate(lengths) for t in range(n)]*epochs)

@runs()
def test_evaluation_is_whole_and_in_order_in_every_process(results, processes, name):
    expected = single(name, processes)
    for res in results:
        for found in (res[name]['inside'], res[name]['after']):
            for a,b in zip(found[:2], expected['preds']): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            np.testing.assert_allclose(list(found[2]), list(expected['values']), rtol=1e-5)
    torch.testing.assert_close(results[0][name]['alone'], expected['preds'][0], rtol=0, atol=1e-6)

@runs(lambda name: 'files' in name)
def test_each_process_reads_the_files_of_its_own_rows(results, processes, name):
    for res in results:
        own = {s for s,_ in res[name]['fits'][0]['seen']}
        read = {i for i,asked in enumerate(res[name]['asked']) if asked}
        assert read==own or name=='files_missing' and own<=read
        for i,asked in enumerate(res[name]['asked']): assert all(b-a<=SUB for a,b in asked)
    total = sum(b-a for res in results for asked in res[name]['asked'] for a,b in asked)
    assert total==N_EPOCH*sum(LENGTHS)

@pytest.mark.parametrize('processes', [2])
def test_a_length_that_is_measured_is_that_of_the_first_process_in_all(results, processes):
    a,b = ([fit['params'] for fit in res['adaptive']['fits']] for res in results)
    for one,other in zip(a, b):
        for k,v in one.items(): assert torch.equal(v, other[k]), k
    seen = {s for res in results for s in res['adaptive']['fits'][0]['seen']}
    assert seen=={(s,t) for s,n in enumerate(LENGTHS) for t in range(n)}

@pytest.mark.parametrize('processes,name', [(2,name) for name in REFUSED])
def test_what_counts_targets_of_one_process_or_would_wait_is_refused(results, processes, name):
    for res in results: assert re.search(REFUSED[name][1], res[name]['error'])

def test_a_process_that_dies_ends_the_others_within_a_minute(tmp_path):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r'(?s)exitcode\s*: 7') as e: launch('test_shared_streams.py', 'die', cwd=tmp_path)
    assert time.monotonic()-begin<60
    assert 'rank' in str(e.value)


# The layout of each process, without starting any

class Together(Part):
    "Processes that are not there: the sums are known"
    known = None
    def sums(self, numbers): return numbers if self.known is None else self.known

def shared(whole, processes, counted=None):
    "The layouts of all processes"
    res = [SharedLayout(whole, Together(rank, processes), counted) for rank in range(processes)]
    if counted is not None:
        known = np.sum([o.labels for o in res], 0).tolist()
        res = [SharedLayout(whole, Together(rank, processes), counted) for rank in range(processes)]
        for o in res: o.part.known = known
    return res

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 999), st.integers(0, 30), st.booleans(), st.booleans())
def test_parts_are_the_blocks_of_one_process(lengths, bs, processes, sub_seq_len, seed, n_skip, missing, varies):
    rng = np.random.default_rng(seed)
    xs,ys = sequences(lengths)
    ys = [y.masked_fill(torch.from_numpy(rng.random((len(y), 1))<.7), 99.) for y in ys]
    counted = SequenceCounts(Sequences(xs, ys, dtype=torch.float64), TargetCounts(present)) if missing else None
    kwargs = dict(bs=bs*processes, sub_seq_len=sub_seq_len, order=rng.permutation(len(lengths)), n_skip=n_skip)
    def sizes(): return Jittered(sub_seq_len, std=2, least=1).lengths(random.Random(seed))
    def layout(**more): return VaryingLayout(np.array(lengths), sizes, **kwargs, **more) if varies else Layout(np.array(lengths), **kwargs, **more)
    whole = layout(counted=counted)
    parts = shared(layout(), processes, counted)
    steps = [list(o) for o in parts]
    assert {len(o) for o in [*steps, *parts]}=={len(whole)}
    assert {o.n_counted() for o in parts}=={whole.n_counted()}
    seen = []
    for block,*own in zip(whole, *steps):
        assert {o.steps for o in own}=={block.steps} and {o.weight for o in own}=={block.weight}
        assert sum(o.n_counted for o in own)==block.n_counted
        assert sum(o.share for o in own)==pytest.approx(processes if block.n_counted else 0)
        assert sum(len(o.seq) for o in own)==len(block.seq)+sum(len(block.seq)<=rank for rank in range(processes))
        seen += [(s,a+t) for o in own for s,a,n in zip(o.seq, o.start, o.n) for t in range(n)]
    assert sorted(seen)==[(s,t) for s,n in enumerate(lengths) for t in range(n)]

def test_all_processes_run_a_training_step_in_as_many_calls():
    "Else layers that look at the batches of all processes, such as SyncBatchNorm, would wait for ever"
    layouts = shared(Layout(np.array(LENGTHS), 4, 7), 3)
    plan = Overlap(7, 21).sub_windows(len(layouts[0])*7)[2]._replace(start=0, stop=3, loss_start=2, cuts=())
    calls = set()
    for layout in layouts:
        blocks = list(layout)
        for i in range(1, len(blocks)-3): calls.add((i, tuple(o.steps for o in BlockRun(blocks[i:i+3], plan, 7).pieces(blocks[i-1]))))
    assert len(calls)==len(list(layouts[0]))-4
