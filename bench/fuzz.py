"""Does each wrong argument end in right behaviour, or in a named error of the library? Random calls of public constructors

Each call takes valid arguments, some of which are replaced by values that may be wrong: numbers out of bounds, other types,
tensors that are not dense, ragged lists, modules, classes. What is made is held against an independent computation, in numpy or
plain PyTorch. An error is named if it is raised by a statement of the library, with a message; one that arises inside an
expression, or in PyTorch, is raw.
Exits with an error if there are raw ones, wrong numbers or hangs.
"""
import copy, dis, signal, sys, time, traceback, warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch import nn
from fastai.callback.progress import ProgressCallback
from fastcore.imports import noop
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.instruments.adaptive import Adaptive
from tbptt_fastai.learner import RNNLearner, TbpttLearner
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders, split_by_time
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.models.memories import LRU, CachedAttention, CausalConv, FastWeights, WorkingMemory
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.models.text import TextRNN
from tbptt_fastai.sequences.windows import SequenceParts, Sequences, SequenceWindows
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.training.evaluation import SubWindowEvalCB
from tbptt_fastai.truncation.plan import Fixed
from tbptt_fastai.truncation.schemes import Exact, Jittered, Overlap, RandomUnbiased

NAMED = TypeError,ValueError,IndexError,KeyError,OSError,NotImplementedError


# --- values

def signal_of(rng, n=None, channels=1):
    return rng.standard_normal((n or int(rng.integers(120, 200)), channels)).astype(np.float32)

def numbers(rng):
    return [0, -1, 1, 2, 3, 7, 20, 64, 10**9, 2**63, -2**63, .5, 1.5, -.1, float('nan'), float('inf'), 1e-30, True, False, 1j,
            np.float32(.5), np.int64(5), np.array(3), np.array(.5), torch.tensor(5), torch.tensor(.5)]

def things(rng):
    return [None, '', 'a', 'cuda:7', b'x', [], [1], [None], (1,2), {}, {'a':1}, {1,2}, object(), range(3), iter([1]), slice(0, 3), len,
            np.array([1.,2.]), np.array('a'), np.array(['a','b']), np.array([None,1]), np.zeros((0,1)), np.zeros((3,2,1)),
            torch.zeros(0), torch.zeros(3, 2), torch.float16, torch.int64, int, nn.GRU, nn.GRU(1, 2), nn.Linear(1, 1), Path('x'),
            pd.DataFrame(dict(u=[1.,2.])), pd.Series(['a','b']), Overlap(2, 4), Fixed(7)]

def arrays(rng):
    a = signal_of(rng)
    t = torch.from_numpy(a)
    holed = a.copy()
    holed[5] = rng.choice([np.nan, np.inf])
    return [a, t, a[::-1], a[:,0], a.astype('f8'), a.astype('f2'), a.astype('>f4'), a.astype(np.longdouble), (a*9).astype(int),
            (a*9).astype(np.uint8), (a*9).astype(np.uint64), a>0, a.astype(complex), a.astype(str), a.astype(object), holed, a.T, a[:0],
            a[:3], a.tolist(), [a,a[:50]], [a,None], [a,'a'], [a,t], [a[:,0],a], (a,), [[a]], pd.DataFrame(a, columns=['u']),
            pd.DataFrame(dict(u=list('abc'))), np.ma.masked_array(a, a>0), t.to_sparse(), t.to('meta'), t.requires_grad_(),
            torch.nested.nested_tensor([t.detach(), t.detach()[:9]]), torch.quantize_per_tensor(t.detach(), .1, 0, torch.qint8),
            t.detach().bfloat16(), t.detach().expand(-1, 3), np.broadcast_to(a, (*a.shape[:1],40)), signal_of(rng, channels=3)]

def wild(rng):
    pools = [numbers, things, arrays]
    pool = pools[rng.choice(3, p=[.5, .3, .2])](rng)
    return pool[rng.integers(len(pool))]


# --- what can be called: valid arguments, and what is made of them held against an independent computation

def same(a, b, what):
    a,b = (np.asarray(o.detach() if isinstance(o, torch.Tensor) else o, dtype=float) for o in (a, b))
    assert a.shape==b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True), f'{what}: {a.shape}, {b.shape}'

def plain(o):
    "An array `(time, ...)` in float32, or integers as they are"
    if isinstance(o, torch.Tensor): o = o.detach().float() if o.is_floating_point() else o.detach()
    a = np.asarray(o)
    if a.dtype.kind=='f': a = a.astype(np.float32)
    return a[:,None] if a.ndim==1 and a.dtype.kind=='f' else a

def as_list(o): return list(o) if isinstance(o, (list,tuple)) else [o]

def right(made, **kw): "Nothing to be held against"

def check_scheme(scheme, **kw):
    for win in (1, 40, 97):
        if win<scheme.least_window: continue
        plan = scheme.sub_windows(win)
        assert plan[0].start==0 and plan[-1].stop==win, 'the plan does not cover the window'
        counted = np.zeros(win, int)
        for o in plan: counted[o.loss_start:o.stop] += 1
        if getattr(scheme, 'losses', 'last')=='last': assert (counted==1).all(), 'a step counts not once'
        assert all(0<=o.weight<np.inf for o in plan)

def check_sequences(ds, x, y=None, **kw):
    for i,o in enumerate(as_list(x)): same(ds[i][0], plain(o).astype(ds[i][0].numpy().dtype), 'a sequence')

def check_windows(ds, x, win_sz, stp_sz=None, **kw):
    if win_sz is None: win_sz = len(plain(as_list(x)[0]))
    win,stp = int(win_sz),int(win_sz if stp_sz is None else stp_sz)
    expected = [plain(o)[i:i+win] for o in as_list(x) for i in range(0, len(plain(o))-win+1, stp)]
    assert len(ds)==len(expected), 'the number of windows'
    for i in (0, len(ds)//2, len(ds)-1): same(ds[i][0], expected[i], 'a window')

def check_parts(ds, x, win_sz, **kw):
    whole = np.concatenate([plain(o) for o in as_list(x)])
    same(np.concatenate([ds[i][0].numpy() for i in range(len(ds))]), whole, 'the parts')

def check_loaders(dls, x, y, **kw):
    "Each value of a batch is one of the data, and validation is behind training"
    values = {float(v) for o in as_list(x) for v in plain(o).ravel()}|{0.}
    for dl in dls.loaders[:1 if kw.get('valid') is not None else 2]:
        dl.device = 'cpu'
        found = dl.one_batch()[0].double().numpy().ravel()
        assert all(min(abs(v-float(o)) for v in values)<1e-2*max(abs(o), 1) for o in found[:20]), 'a value that is not in the data'

def check_text(dls, text, **kw):
    x,y = dls.train.one_batch()
    assert (x[:,1:]==y[:,:-1]).all(), 'the target is not the next token'

def check_split(parts, seqs, valid_pct=.2, **kw):
    for a,b,o in zip(*parts, as_list(seqs)): same(np.concatenate([plain(a), plain(b)]), plain(o), 'the parts of a split')

def check_stateful(m, rnn, **kw):
    x = torch.randn(2, 5, 1)
    same(m(x), rnn(x)[0], 'the first call')

def check_model(m, **kw):
    n = m.rnn.rnn.input_size if isinstance(m, SequenceRNN) else 1
    x = torch.randint(m.embedding.num_embeddings, (2,6)) if isinstance(m, TextRNN) else torch.randn(2, 6, n)
    if getattr(m, 'time_dim', 1)!=1: return
    m.eval()
    out = m(x)
    assert len(out)==2 and out.isfinite().all(), 'no prediction for each row'

def check_memory(m, n_in, **kw):
    x = torch.randn(2, 6, int(n_in))
    whole,(first,state) = m(x)[0],m(x[:,:4])
    same(torch.cat([first, m(x[:,4:], state)[0]], 1), whole, 'a memory in two parts')

def chunk_model():
    torch.manual_seed(0)
    return SequenceRNN(1, 1, hidden_size=3)

def check_chunk(out, x, **kw):
    "`out` are predictions of a chunk by itself"
    if isinstance(x, list): return
    x = torch.as_tensor(plain(x.to_numpy() if hasattr(x, 'to_numpy') else x).copy())
    if x.ndim<3: x = x[None]
    with torch.no_grad(): expected = chunk_model().eval()(x)
    same(np.asarray(out).reshape(expected.shape), expected, 'predictions of a chunk')

def quiet_fit(make, dls, **kw):
    "A short training of a learner"
    learn = make(dls, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(1, 1e-3)
    return learn

def check_trained(learn, **kw):
    assert all(p.isfinite().all() for p in learn.model.parameters()), 'parameters that are not finite'
    loss = learn.loss_func(*learn.get_preds()[:2])
    left_out = kw.get('n_skip') or kw.get('washout')
    if not left_out and kw.get('counts') is None: same(learn.validate()[0], loss.mean(), 'the loss of the validation')

def tiny(rng, **kw):
    x = signal_of(rng, 160)
    return SequenceDataLoaders.from_arrays(x, x, **{**dict(win_sz=30, sub_seq_len=10, bs=2, device='cpu'), **kw})

def frame(rng):
    x = signal_of(rng, 160)[:,0]
    return pd.DataFrame(dict(u=x, y=x*2, group=np.repeat(list('ab'), 80), t=np.tile(np.arange(80.), 2)))

def recording(path='fuzz.h5'):
    "An HDF5 file with two datasets, in the working folder"
    import h5py
    if not Path(path).exists():
        with h5py.File(path, 'w') as f: f['u'],f['y'] = np.arange(1., 101.),np.arange(1., 101.)
    return path

def check_reads(dls, **kw): assert float(dls.train.one_batch()[0].max())>0, 'a file that reads as zeros'

def targets(rng):
    "Name, function, valid arguments, the check, and how often it is drawn"
    x,short = signal_of(rng),dict(win_sz=30, stp_sz=20)
    fit = lambda make: lambda dls, **kw: quiet_fit(make, dls, **kw)
    yield 'Fixed',Fixed,dict(sub_seq_len=10, block=None),check_scheme,2
    yield 'Overlap',Overlap,dict(k1=5, k2=15, losses='last'),check_scheme,2
    yield 'Jittered',Jittered,dict(k=20, half=.1, std=3., least=5, longest=None, rescale='loss'),check_scheme,3
    yield 'RandomUnbiased',RandomUnbiased,dict(mean=10, alpha=4., block=1),check_scheme,2
    yield 'Exact',Exact,dict(segment=None),check_scheme,1
    yield 'Adaptive',Adaptive,dict(delta=.1, k_max=40, k_min=1, every=1, n_batches=2, step=None),right,2
    yield 'Sequences',Sequences,dict(x=x, y=x, groups=None, dtype=torch.float32, x_names=None, dt=None),check_sequences,4
    yield 'SequenceWindows',SequenceWindows,dict(x=x, y=x, groups=None, **short),check_windows,5
    yield 'SequenceParts',SequenceParts,dict(x=x, y=x, win_sz=30, groups=None),check_parts,3
    yield 'split_by_time',split_by_time,dict(seqs=x, valid_pct=.3),check_split,2
    options = dict(valid=None, valid_pct=.3, sub_seq_len=10, bs=2, val_bs=None, groups=None, dt=None, num_workers=0,
                   shuffle=True, time_dim=None, vocab=None, dtype=torch.float32, x_names=None, device='cpu', path='.')
    yield 'from_arrays',SequenceDataLoaders.from_arrays,dict(x=x, y=x, **short, **options),check_loaders,10
    many = [x[:70],x[70:]]
    yield 'from_arrays, many',SequenceDataLoaders.from_arrays,dict(x=many, y=many, win_sz=None, **options),check_loaders,6
    of_df = dict(df=frame(rng), x='u', y='y', group='group', time='t', max_gap=None, valid_pct=.3, valid_groups=None, win_sz=None, dt=None,
                 sub_seq_len=10, bs=2, vocab=None, x_vocab=None, on_unknown='raise', one_label=False, device='cpu')
    yield 'from_df',SequenceDataLoaders.from_df,of_df,right,8
    of_text = dict(text='abcab'*40, valid=None, valid_pct=.3, vocab=None, bs=2, val_bs=None, sub_seq_len=5, device='cpu', path='.')
    yield 'from_text',SequenceDataLoaders.from_text,of_text,check_text,4
    of_hdf5 = dict(files=recording(), x='u', y='y', valid_files=None, win_sz=None, bs=1, sub_seq_len=10, external=False, device='cpu')
    yield 'from_hdf5',SequenceDataLoaders.from_hdf5,of_hdf5,check_reads,2
    ds = SequenceWindows(x, x, 40)
    yield 'TbpttDL',TbpttDL,dict(dataset=ds, bs=2, sub_seq_len=10, time_dim=None, num_workers=0, ahead=None),lambda dl, **kw: dl.one_batch(),3
    yield 'StreamDL',StreamDL,dict(dataset=Sequences(x, x), bs=1, sub_seq_len=10, time_dim=None, num_workers=0),lambda dl, **kw: dl.one_batch(),3
    dls = tiny(rng)
    yield 'test_dl',dls.test_dl,dict(test_items=[x], with_labels=False, as_stream=None, bs=2),lambda dl, **kw: dl.one_batch(),4
    yield 'StatefulRNN',StatefulRNN,dict(rnn=nn.GRU(1, 2, batch_first=True), batch_dim=None, initial=None, batch_first=None),check_stateful,2
    yield 'SequenceRNN',SequenceRNN,dict(n_in=1, n_out=1, rnn_type='gru', hidden_size=3, num_layers=1, dropout=0., time_dim=1),check_model,3
    yield 'TextRNN',TextRNN,dict(n_vocab=5, emb_sz=4, rnn_type='gru', hidden_size=3, num_layers=1, dropout=0.),check_model,3
    yield 'WorkingMemory',WorkingMemory,dict(n_in=1, n_out=1, slots=3, n_mem=4),check_memory,1
    yield 'FastWeights',FastWeights,dict(n_in=1, n_out=1, n_mem=4, decay=.9),check_memory,1
    yield 'CachedAttention',CachedAttention,dict(n_in=1, n_out=1, mem_len=4, n_mem=4, heads=2),check_memory,1
    yield 'LRU',LRU,dict(n_in=1, n_out=1, n_mem=4, r_min=.5, r_max=.9, max_phase=.3),check_memory,1
    yield 'CausalConv',CausalConv,dict(n_in=1, n_out=1, n_mem=4, kernel_size=3, dilations=(1,2)),check_memory,1
    yield 'StreamPredictor',StreamPredictor,dict(learn=chunk_model(), ndim=None, timed=None, on_nan='raise', time_dim=None),right,2
    def predict(x): return StreamPredictor(chunk_model())(x)
    yield 'a chunk',predict,dict(x=x),check_chunk,6
    first = dict(n_skip=0, burn_in=0, warm_up=0, washout=0)
    of_cb = dict(sub_seq_len='dls', timed=None, truncation=None, time_dim=None, counts=None, continuing=None, **first)
    yield 'TbpttResetCB',TbpttResetCB,of_cb,right,3
    yield 'SubWindowEvalCB',SubWindowEvalCB,dict(sub_seq_len=7),right,1
    of_cb = dict(of_cb, grad_clip=None, num_threads=None)
    of_rnn = dict(dls=dls, rnn_type='gru', hidden_size=3, num_layers=1, dropout=0., **of_cb)
    yield 'RNNLearner',fit(RNNLearner),of_rnn,check_trained,6
    yield 'TbpttLearner',fit(TbpttLearner),dict(dls=dls, model=SequenceRNN(1, 1, hidden_size=3), **of_cb),check_trained,4

# what is not asked for here: so much memory, so many processes or threads, or a data set that takes longer than a test
TOO_MUCH = {'hidden_size','num_layers','n_mem','slots','heads','n_in','n_out','n_vocab','emb_sz','mem_len','kernel_size',
            'num_workers','num_threads','n_batches'}

def draw(rng):
    "One call: its name, the function, its arguments, those that are wild, and the check"
    all_targets = list(targets(rng))
    weights = np.array([o[-1] for o in all_targets], float)
    name,f,args,check,_ = all_targets[rng.choice(len(all_targets), p=weights/weights.sum())]
    names = list(rng.choice(list(args), size=min(len(args), int(rng.choice([1, 1, 1, 2, 3]))), replace=False))
    given = dict(args)
    for o in names:
        value = wild(rng)
        is_much = isinstance(value, (int,float)) and not isinstance(value, bool) and value>64
        if not (o in TOO_MUCH and is_much): given[str(o)] = value
    return name,f,given,names,check


# --- what comes of it

def is_raised(e):
    "Is it raised by a statement of the library?"
    tb = e.__traceback__
    while tb.tb_next is not None: tb = tb.tb_next
    code = tb.tb_frame.f_code
    return 'tbptt_fastai' in code.co_filename and code.co_code[tb.tb_lasti]==dis.opmap['RAISE_VARARGS']

class Hangs(BaseException): pass

@contextmanager
def within(seconds):
    "In it, what takes longer is broken off"
    def stop(*_): raise Hangs(f'longer than {seconds} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

def outcome(f, given, check, seconds=60):
    "'right', 'refused', 'raw', 'wrong' or 'hangs', and the error"
    try:
        with within(seconds), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            made = f(**given)
            try: check(made, **given)
            except AssertionError as e: return 'wrong',e
    except Hangs as e: return 'hangs',e
    except Exception as e:
        return 'refused' if is_raised(e) and isinstance(e, NAMED) and str(e) else 'raw',e
    return 'right',None

def shown(o):
    try: text = f'{type(o).__name__} {tuple(o.shape)}' if hasattr(o, 'shape') and not hasattr(o, 'columns') else repr(o)
    except RuntimeError: text = 'a nested tensor'
    return ' '.join(text.split())[:60]

def run(seed, n, out=None):
    "Counts of the outcomes of `n` calls, by what was called; and a line for each that should not be"
    counts,bad = Counter(),[]
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        torch.manual_seed(i)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            name,f,given,names,check = draw(rng)
        kind,e = outcome(f, given, check)
        counts[name,kind] += 1
        if kind in ('right','refused'): continue
        last = traceback.extract_tb(e.__traceback__)[-1]
        where = f'{Path(last.filename).name}:{last.lineno}'
        called = f"{name}({', '.join(f'{o}={shown(given[o])}' for o in names)})"
        bad.append(f'{seed},{i} {kind}: {called} {type(e).__name__} [{where}] {str(e)[:120]!r}')
        if out: print(bad[-1], file=out, flush=True)
    return counts,bad


# --- the long form

def table(counts):
    "Markdown: a row for each that was called"
    kinds = ['right','refused','raw','wrong','hangs']
    rows = [[name, *(counts[name,k] for k in kinds)] for name in sorted({name for name,_ in counts})]
    rows.append(['all', *(sum(o[i] for o in rows) for i in range(1, len(kinds)+1))])
    lines = ['| called | calls | '+' | '.join(kinds)+' |', '| --- '+'| --: '*(len(kinds)+1)+'|']
    return '\n'.join(lines+[f"| {name} | {sum(ns)} | {' | '.join(map(str, ns))} |" for name,*ns in rows])

def main():
    import argparse, os, tempfile
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--calls', type=int, default=8_000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        counts,bad = run(args.seed, args.calls, sys.stdout)
        os.chdir('/')
    print(table(counts))
    print(f'{args.calls} calls in {time.perf_counter()-start:.0f} s, seed {args.seed}')
    return bool(bad)

if __name__=='__main__': sys.exit(main())
