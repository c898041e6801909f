"Several processes: fastai's distributed training with two gloo processes on the CPU. Run as a script, this file is one of them."
import os, random, re, subprocess, sys
from pathlib import Path
import pytest
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import SkipItemException
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastcore.basics import chunked
from reference import permutations
from tbptt_fastai.all import Adaptive, Exact, Jittered, Overlap, RandomUnbiased, SequenceWindows, Standardize, StatefulRNN, SubWindowEvalCB, TbpttDL, TbpttResetCB

pytest.importorskip('accelerate')
TESTS = Path(__file__).resolve().parent
N_EPOCH,LR,SUB = 2,.1,10


# Data: channel 0 is the number of the window, channel 1 the step, exactly

def windows(n, lengths=30, label=False):
    g = torch.Generator().manual_seed(0)
    lengths = [lengths]*n if isinstance(lengths, int) else lengths
    xs = [torch.stack([torch.full((l,), i/16), torch.arange(l)/64, torch.randn(l, generator=g)], 1) for i,l in enumerate(lengths)]
    return [(x, x[:,2].mean()[None] if label else x[:,2:].cumsum(0)/5) for x in xs]

class Skipping(list):
    "The second process, which has the last half, is left with a window less"
    def __getitem__(self, i):
        if i>=len(self)-2: raise SkipItemException
        return super().__getitem__(i)

class Plain(nn.Module): # `Standardize` has buffers, which are broadcast in every forward pass: another one that waits
    "A plain layer, carried by `Carry`; `own_state=True`: one that is given a state in every call"
    def __init__(self, own_state=False, label=False):
        super().__init__()
        self.rnn,self.head,self.scale,self.own_state,self.label = nn.LSTM(3, 5, batch_first=True),nn.Linear(5, 1),Standardize(),own_state,label

    def forward(self, x):
        zero = torch.zeros(1, len(x), 5)
        out = self.head(self.rnn(self.scale(x), (zero, zero) if self.own_state else None)[0])
        return out[:,-1] if self.label else out

class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn,self.head,self.scale = StatefulRNN(nn.LSTM(3, 5, batch_first=True)),nn.Linear(5, 1),Standardize()

    def forward(self, x): return self.head(self.rnn(self.scale(x)))

CASES = dict( # what differs from: 12 equal windows in batches of 2, TbpttDL, a plain layer
    stateful=dict(model=Stateful, gather=True),
    stateful_washout=dict(model=Stateful, n_skip=15, lengths=25),
    plain=dict(dl_type=TfmdDL),
    washout=dict(n_skip=15),
    ragged=dict(model=Stateful, dl_type=TfmdDL, lengths=25),
    uneven=dict(n=9, shuffle=True, gather=True),
    workers=dict(n=9, num_workers=2),
    drop_last=dict(bs=4, drop_last=True),
    drop_last_plain=dict(bs=4, drop_last=True, dl_type=TfmdDL),
    label=dict(label=True),
    lengths=dict(n=8, lengths=[30,30,20,20]*2),
    whole=dict(n=8, lengths=[30]*4+[20]*4, sub_seq_len=None),
)
SCHEMES = dict( # what they draw has to be the same in both processes, whose random numbers are not
    jittered=dict(truncation=Jittered(8, std=3, least=2)),
    unbiased=dict(truncation=RandomUnbiased(7, 6), n_skip=5),
    overlap=dict(truncation=Overlap(5, 12), model=Stateful),
    exact=dict(truncation=Exact(7), model=Stateful),
    adaptive=dict(truncation=Adaptive(delta=.5, k_max=12, n_batches=1), shuffle=True), # each would find another length
)
REFUSED = dict(
    unequal=(dict(n=8, lengths=[30]*6+[20]*2, dl_type=TfmdDL), r'have \[30, 20\] steps.*that is \[3, 2\] sub-windows'),
    unequal_washout=(dict(n=8, lengths=[30]*4+[14]*4, n_skip=15), r'have \[30, 14\] steps.*that is \[2, 0\] sub-windows'),
    unequal_whole=(dict(n=8, lengths=[30]*4+[14]*4, n_skip=15, sub_seq_len=None), r'have \[30, 14\] steps.*that is \[1, 0\] sub-windows'),
    skipped=(dict(dataset=Skipping), r'have \[30, 0\] steps.*that is \[3, 0\] sub-windows'),
    own_state=(dict(own_state=True, dl_type=TfmdDL), 'a state of its own in every call'),
)


# What each process does

class Record(Callback):
    order = TbpttResetCB.order+1
    def before_fit(self): self.learn.seen,self.learn.n_iters = [],[]
    def before_batch(self):
        x, = self.xb
        if self.training: self.learn.seen.append(((x[:,0,0]*16).int().tolist(), int(x[0,0,1]*64), x.shape[1]))
    def after_train(self): self.learn.n_iters.append(self.n_iter)

def make_learner(rank, n=12, lengths=30, bs=2, model=Plain, dl_type=TbpttDL, dataset=list, gather=False, sub_seq_len=SUB, n_skip=0, own_state=False, label=False, num_workers=0, truncation=None, **kwargs):
    random.seed(rank); torch.manual_seed(rank) # what starts out different is made equal by fastai
    ds = dataset(windows(n, lengths, label))
    train = dl_type(SequenceWindows(*map(list, zip(*ds))) if gather else ds, bs=bs, num_workers=num_workers, **dict(sub_seq_len=sub_seq_len) if dl_type is TbpttDL else {}, **kwargs)
    dls = DataLoaders(train, dl_type(windows(7, label=label), bs=bs, num_workers=0), device='cpu')
    model = Plain(own_state, label) if model is Plain else model()
    return Learner(dls, model, loss_func=nn.MSELoss(), opt_func=SGD, lr=LR, cbs=[TbpttResetCB('dls' if truncation else sub_seq_len, n_skip, truncation=truncation), Record()])

def process(case):
    "Train one case; what happened here"
    from fastai.distributed import rank_distrib
    learn = make_learner(rank_distrib(), **case)
    before = list(learn.dls.loaders)
    with learn.no_bar(), learn.no_logging():
        try:
            with learn.distrib_ctx(): learn.fit(N_EPOCH)
        except ValueError as e: return dict(error=str(e))
        res = dict(seen=learn.seen, n_iters=learn.n_iters, pct_train=learn.pct_train, model=type(learn.model).__name__,
                   restored=[a is b for a,b in zip(before, learn.dls.loaders)])
        after = [*learn.get_preds(), learn.validate()[0]]
        learn.dls.loaders[1] = learn.dls.valid.new(windows(6, label=case.get('label', False))) # a multiple of the processes
        with learn.distrib_ctx():
            inside = [*learn.get_preds(), learn.validate()[0]]
            short = learn.validate(dl=TbpttDL(windows(4, [30,30,20,20], case.get('label', False)), bs=2, num_workers=0), cbs=SubWindowEvalCB(SUB))[0]
        alone = learn.get_preds()[0].shape if rank_distrib()==0 else None
    return dict(params=learn.model.state_dict(), after=after, inside=inside, short=short, alone=alone, **res)

if __name__=='__main__':
    from fastai.distributed import rank_distrib
    torch.save({name: process(case) for name,case in {**CASES, **SCHEMES, **{k: v[0] for k,v in REFUSED.items()}}.items()}, f'{sys.argv[1]}/{rank_distrib()}.pt')


# The same by hand, in one process

def launch(script, *args, cwd, processes=2):
    "Run a script in several processes; a process that hangs for four minutes ends itself, and the launcher ends the others"
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), TESTS/'distributed_cpu.py', TESTS/script, *args]
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONWARNINGS': 'ignore'}
    proc = subprocess.Popen(cmd, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try: out = proc.communicate(timeout=300)[0]
    finally: proc.terminate() # passed on to the processes
    assert proc.returncode==0, out
    return out

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    launch('test_distributed.py', folder, cwd=folder)
    return [torch.load(folder/f'{rank}.pt', weights_only=False) for rank in range(2)]

def shares(order, bs, drop_last=False):
    "The batches of either process: half of the windows each, the first window repeated if their number is odd"
    order = order+order[:len(order)%2]
    half = len(order)//2
    return [[list(o) for o in chunked(part, bs, drop_last)] for part in (order[:half], order[half:])]

def orders(n, shuffle):
    "Order of the windows in each epoch, as the first process draws it"
    if not shuffle: return [list(range(n))]*N_EPOCH
    return [order.tolist() for order in permutations(n, N_EPOCH, 0)]

def expected(case, rank=None):
    "The sub-windows, per process, as (numbers of windows, start, stop); or those of one process that have a loss, as (numbers, start, steps)"
    case = {**dict(n=12, bs=2, lengths=30, sub_seq_len=SUB), **case}
    lengths = [case['lengths']]*case['n'] if isinstance(case['lengths'], int) else case['lengths']
    steps = []
    for order in orders(case['n'], case.get('shuffle')):
        for batches in zip(*shares(order, case['bs'], case.get('drop_last', False))):
            subs = [[(b, start, min(start+(case['sub_seq_len'] or 99), lengths[b[0]])) for start in range(0, lengths[b[0]], case['sub_seq_len'] or 99)] for b in batches]
            steps += zip(*subs, strict=True)
    if rank is None: return steps
    return [(b, start, stop-start) for b,start,stop in (s[rank] for s in steps) if stop>(lengths[b[0]]-1 if case.get('label') else case.get('n_skip', 0))]

def train_by_hand(case):
    "TBPTT with the mean of two gradients, of states that never meet"
    torch.manual_seed(0)
    model = case.get('model', Plain)()
    rnn,head = getattr(model.rnn, 'rnn', model.rnn),model.head
    params,label,n_skip = list(model.parameters()),case.get('label', False),case.get('n_skip', 0)
    data = windows(case.get('n', 12), case.get('lengths', 30), label)
    opt = torch.optim.SGD(params, lr=LR)
    states = [None]*2
    for step in expected(case):
        grads = []
        for rank,(idxs,start,stop) in enumerate(step):
            x,y = (torch.stack([data[i][k] for i in idxs]) for k in range(2))
            win_sz = x.shape[1]
            sub_seq_len = case.get('sub_seq_len', SUB) or win_sz
            out,state = rnn(x[:,start:stop], states[rank] if start else None)
            states[rank] = tuple(o.detach() for o in state)
            out,skip = head(out),max(n_skip-start, 0)
            if label:
                if stop<win_sz: continue
                loss = (out[:,-1]-y).square().mean()
            else:
                if stop-start<=skip: continue
                most = max(min(s+sub_seq_len, win_sz)-max(s, n_skip) for s in range(0, win_sz, sub_seq_len))
                loss = (out[:,skip:]-y[:,start+skip:stop]).square().mean()*((stop-start-skip)/most)
            grads.append(torch.autograd.grad(loss, params))
        if not grads: continue
        for p,a,b in zip(params, *grads): p.grad = (a+b)/2
        opt.step()
    return model.state_dict()

def evaluate_by_hand(case, params, n):
    model = Plain(label=case.get('label', False))
    model.load_state_dict({k.replace('rnn.rnn.', 'rnn.'): v for k,v in params.items()})
    x,y = map(torch.stack, zip(*(windows(7, label=case.get('label', False))[:n] if isinstance(n, int) else [windows(4, [30,30,20,20], case.get('label', False))[i] for i in n])))
    with torch.no_grad(): pred = model(x)
    skip = 0 if case.get('label') else case.get('n_skip', 0)
    return pred,y,(pred[:,skip:]-y[:,skip:]).square().mean()


@pytest.mark.parametrize('name', CASES)
def test_each_process_gets_the_ordered_sub_windows_of_its_own_windows(results, name):
    for rank in range(2): assert results[rank][name]['seen']==expected(CASES[name], rank)

@pytest.mark.parametrize('name', CASES)
def test_two_processes_equal_the_loop_by_hand(results, name):
    "This fails if a state is lost, kept too long or shared, if a gradient is not averaged, and if the weight of a ragged end is lost"
    a,b = (results[rank][name]['params'] for rank in range(2))
    for k,v in train_by_hand(CASES[name]).items():
        assert torch.equal(a[k], b[k]), k
        torch.testing.assert_close(a[k], v, rtol=0, atol=1e-6, msg=k)

@pytest.mark.parametrize('name', CASES)
def test_the_schedule_ends_at_one_and_loaders_and_model_are_restored(results, name):
    for rank in range(2):
        res = results[rank][name]
        assert res['pct_train']==pytest.approx(1) and all(res['restored']) and res['model'] in ('Plain', 'Stateful')
        if name!='lengths': assert res['n_iters']==[len(expected(CASES[name], rank))//N_EPOCH]*N_EPOCH

@pytest.mark.parametrize('name', CASES)
def test_evaluation_gives_the_predictions_and_losses_of_whole_windows(results, name):
    for rank in range(2):
        res = results[rank][name]
        pred,y,loss = evaluate_by_hand(CASES[name], res['params'], 7)
        for out,truth in zip(res['after'], (pred, y, loss)): torch.testing.assert_close(torch.as_tensor(out), truth)
        pred,y,loss = evaluate_by_hand(CASES[name], res['params'], 6)
        order = [i for both in zip(*shares(list(range(6)), CASES[name].get('bs', 2))) for b in both for i in b] # fastai's own: interleaved
        for out,truth in zip(res['inside'], (pred[order], y[order], loss)): torch.testing.assert_close(torch.as_tensor(out), truth)
        losses = [evaluate_by_hand(CASES[name], res['params'], n)[2] for n in ([0,1], [2,3])]
        assert res['short']==pytest.approx(float(sum(losses)/2), rel=1e-5)
    assert results[0][name]['alone']==pred.shape

@pytest.mark.parametrize('name', SCHEMES)
def test_both_processes_follow_one_plan(results, name):
    a,b = (results[rank][name] for rank in range(2))
    assert [o[1:] for o in a['seen']]==[o[1:] for o in b['seen']] and [o[0] for o in a['seen']]!=[o[0] for o in b['seen']]
    if name in ('jittered', 'unbiased'): assert len({o[2] for o in a['seen']})>3
    for k,v in a['params'].items(): assert torch.equal(v, b['params'][k])
    assert a['pct_train']==pytest.approx(1)

def test_exact_gradients_of_two_processes_are_those_of_whole_windows(results):
    for k,v in train_by_hand(dict(model=Stateful, sub_seq_len=None)).items(): torch.testing.assert_close(results[0]['exact']['params'][k], v, rtol=0, atol=1e-6, msg=k)

@pytest.mark.parametrize('name', REFUSED)
def test_every_process_refuses_what_it_cannot_train(results, name):
    for rank in range(2): assert re.search(REFUSED[name][1], results[rank][name]['error'])

def test_the_script_of_the_how_to_page_runs_and_the_first_process_saves_and_prints(tmp_path):
    out = launch('distributed_script.py', cwd=tmp_path)
    assert (tmp_path/'models'/'duffing.pth').exists()
    assert sum(line.startswith('1 ') for line in out.splitlines())==1, out # the first process alone prints

def test_nothing_needs_accelerate_until_it_is_used():
    subprocess.run([sys.executable, '-W', 'ignore', '-c', "import sys; sys.modules['accelerate'] = None; import tbptt_fastai.all"], check=True)
