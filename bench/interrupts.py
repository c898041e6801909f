"""Is a learner that was interrupted as good as new, wherever that was?

A learner is drawn: its model, loaders, truncation scheme and optimizer, TbpttLearner or fastai's Learner with a
TbpttResetCB. It trains, validates, predicts, searches or is exported, and somewhere in that an error or a
KeyboardInterrupt comes: in any event, before or after the callbacks of the library; in the model, its backward pass,
the loss, a metric, the optimizer, the loader, one of its worker processes; or at any line of the library. Then the
same learner trains, validates and predicts. So does a new one with the same weights, optimizer and random generators.
All numbers have to be the same, bit by bit.
"""
import argparse, copy, gc, os, random, signal, sys, tempfile, threading, warnings
from collections import Counter
from functools import partial
from linecache import getline
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, torch
from torch import nn
from torch.utils._pytree import tree_map_only
from fastai.callback.core import Callback, _events
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler # noqa: with it come fit_one_cycle and lr_find
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fastcore.imports import noop
from tbptt_fastai.all import (Adaptive, Exact, Fixed, Jittered, Overlap, RandomUnbiased, SequenceDataLoaders, StatefulRNN, StreamPredictor,
    TbpttCheckpoint, TbpttLearner, TbpttResetCB)
from tbptt_fastai.sequences.arrays import HDF5Array
from tbptt_fastai.speed.optimizer import FusedAdam
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.training.plain import encode_random, random_state, set_random

SUB = 10
LIBRARY = str(Path(sys.modules[TbpttResetCB.__module__].__file__).parent.parent)


# --- what goes off

class Stopped(Exception): "An error that no library knows"

ERRORS = dict(error=lambda: ValueError('stop'), wordless=RuntimeError, own=lambda: Stopped('stop'), ctrl_c=KeyboardInterrupt, exit=lambda: SystemExit('stop'))

class Bomb:
    "Goes off when a place is passed the n-th time"
    def __init__(self): self.disarm()
    def disarm(self): self.place,self.left = None,0
    def arm(self, place, n, error): self.place,self.left,self.error = place,n,error
    def passes(self, place):
        if place!=self.place: return
        self.left -= 1
        if self.left==0: raise self.error()

bomb = Bomb()

def cleans_up(frame):
    "Is it called by a context that is left, or about to be? What is interrupted there stays undone"
    if getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith('with '): return True
    while frame is not None:
        if frame.f_code.co_name in ('__exit__', 'close'): return True
        frame = frame.f_back

def trace_lines(frame, event, arg):
    if not frame.f_code.co_filename.startswith(LIBRARY): return None
    if event=='line' and bomb.left>0 and (bomb.left>1 or not cleans_up(frame)): bomb.passes('line')
    return trace_lines

class At(Callback):
    "Every event passes here, at one place among the callbacks"
    def __init__(self, order): self.order = order
def _pass_event(event): return lambda self: bomb.passes(event)
for o in _events: setattr(At, o, _pass_event(o))

ORDERS = -10,11.95,12.05,49.5,2000 # before all others; right before and after TbpttResetCB; before the recorder; after all others


# --- what is interrupted

class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, grad):
        bomb.passes('backward')
        return grad

class Own(nn.Module):
    "A layer that carries its state by itself"
    def __init__(self, n_in, n_hidden):
        super().__init__()
        self.rnn,self.state = nn.GRU(n_in, n_hidden, batch_first=True),None
    def reset(self): self.state = None
    def forward(self, x):
        out,state = self.rnn(x, self.state)
        self.state = state.detach()
        return out

class Plain(nn.Module):
    def __init__(self, n_in, n_hidden):
        super().__init__()
        self.rnn = nn.LSTM(n_in, n_hidden, batch_first=True)
    def forward(self, x): return self.rnn(x)[0]

def stateful(n_in, n_hidden): return StatefulRNN(nn.GRU(n_in, n_hidden, batch_first=True))

LAYERS = dict(stateful=stateful, plain=Plain, own=Own)

class Net(nn.Module):
    "Passes where it begins, in the middle, and on the way back"
    def __init__(self, layer, n_in, n_out, vocab=None):
        super().__init__()
        self.embed = nn.Identity() if vocab is None else nn.Embedding(vocab, n_in)
        self.layer,self.drop,self.head = LAYERS[layer](n_in, 5),nn.Dropout(.2),nn.Linear(5, n_out)
        if layer=='own': self.reset = self.layer.reset
    def forward(self, x):
        bomb.passes('forward')
        h = Backward.apply(self.layer(self.embed(x)))
        bomb.passes('half of forward')
        return self.head(self.drop(h))
    def __getstate__(self):
        bomb.passes('pickle')
        return self.__dict__.copy()

class Distance(nn.MSELoss):
    def forward(self, pred, targ):
        bomb.passes('loss')
        return super().forward(pred, targ)

class Classes(CrossEntropyLossFlat):
    def __call__(self, *args, **kwargs):
        bomb.passes('loss')
        return super().__call__(*args, **kwargs)

def distance(pred, targ):
    bomb.passes('metric')
    return (pred-targ).abs().mean()

def hits(pred, targ):
    bomb.passes('metric')
    return (pred.argmax(-1)==targ).float().mean()

class Fused(FusedAdam):
    def step(self, *args, **kwargs):
        bomb.passes('step')
        super().step(*args, **kwargs)
        bomb.passes('after the step')

class Wrapped(OptimWrapper):
    def step(self):
        bomb.passes('step')
        self.opt.step()
        bomb.passes('after the step')

def reads(dataset):
    "What is read passes, in whatever process that is"
    for name in ('gather', 'read'):
        f = getattr(dataset, name, None)
        if f is not None: setattr(dataset, name, partial(_passing, f))
def _passing(f, *args, **kwargs):
    bomb.passes('read')
    return f(*args, **kwargs)


# --- a learner

SIGNAL = torch.randn(190, 1, generator=torch.Generator().manual_seed(0))
RESULT = torch.cat([SIGNAL, SIGNAL.roll(2)], 1).cumsum(0).mul(.1).sin()
LENGTHS = 40,25,45,30,50
TEXT = 'all the world is a stage, and all the men and women merely players. '*3

def parts(o): return list(o.split(LENGTHS))

def as_frame():
    t = np.concatenate([np.arange(n) for n in LENGTHS])
    return pd.DataFrame(dict(run=np.repeat(list('abcde'), LENGTHS), t=t, u=SIGNAL[:,0].numpy(), a=RESULT[:,0].numpy(), b=RESULT[:,1].numpy()))

def in_files(o, name):
    import h5py
    for i,part in enumerate(parts(o)):
        if Path(f'{name}{i}.h5').exists(): continue
        with h5py.File(f'{name}{i}.h5', 'w') as f: f['u'] = part.numpy()
    return [HDF5Array(f'{name}{i}.h5', 'u') for i in range(len(LENGTHS))]

def make_loaders(name):
    how = dict(sub_seq_len=SUB, bs=2)
    if name in ('windows', 'workers'):
        return SequenceDataLoaders.from_arrays(SIGNAL, RESULT, win_sz=25, stp_sz=25, num_workers=2 if name=='workers' else 0, **how)
    if name=='stream': return SequenceDataLoaders.from_arrays(parts(SIGNAL), parts(RESULT), groups=list('abcde'), **how)
    if name=='files': return SequenceDataLoaders.from_arrays(in_files(SIGNAL, 'x'), in_files(RESULT, 'y'), groups=list('abcde'), **how)
    if name=='frame': return SequenceDataLoaders.from_df(as_frame(), 'u', ['a', 'b'], group='run', time='t', **how)
    return SequenceDataLoaders.from_text(TEXT, **how)

SCHEMES = dict(fixed=lambda: Fixed(SUB), ragged=lambda: Fixed(SUB-3), whole=lambda: None, overlap=lambda: Overlap(SUB//2, SUB), jittered=lambda: Jittered(12, std=2., least=4),
    rates=lambda: Jittered(12, std=2., least=4, rescale='lr'), unbiased=lambda: RandomUnbiased(12, block=2), exact=lambda: Exact(12),
    adaptive=lambda: Adaptive(delta=.5, k_max=8, k_min=2, n_batches=1, step=2, scheme=lambda k: Overlap(2, 4) if k<5 else Fixed(6)))
OF_STREAMS = 'fixed','overlap','unbiased','jittered','ragged'

def make(o):
    "The learner of a case: the same in each call"
    set_seed(o.seed)
    dls,scheme = make_loaders(o.loader),SCHEMES[o.scheme]()
    for dl in dls.loaders: reads(dl.dataset)
    vocab = len(dls.vocab) if o.loader=='text' else None
    model = Net(o.layer, 4, vocab, vocab) if vocab else Net(o.layer, 1, 2)
    cbs = [] if o.order is None else [At(o.order)]
    if o.accumulates: cbs.append(GradientAccumulation(4))
    how = dict(loss_func=Classes() if vocab else Distance(), metrics=hits if vocab else distance, path=Path('learner'))
    truncation = dict(sub_seq_len=None) if scheme is None else dict(truncation=scheme)
    if o.maker=='library': learn = TbpttLearner(dls, model, opt_func=Fused, num_threads=1 if o.seed%2 else None, cbs=cbs, **truncation, **how)
    else: learn = Learner(dls, model, opt_func=partial(Wrapped, opt=torch.optim.Adam), cbs=[*cbs, TbpttResetCB(**truncation)], **how)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, how='fit', n_epoch=1, **kwargs): getattr(learn, how)(n_epoch, 1e-2, **kwargs)

ACTIONS = dict(
    fit=lambda learn, cbs: fit(learn, n_epoch=2, cbs=cbs),
    fit_one_cycle=lambda learn, cbs: fit(learn, 'fit_one_cycle', n_epoch=2, cbs=cbs),
    validate=lambda learn, _: learn.validate(),
    get_preds=lambda learn, _: learn.get_preds(with_loss=True),
    lr_find=lambda learn, _: learn.lr_find(num_it=8, show_plot=False, suggest_funcs=()),
    tbptt_find=lambda learn, _: learn.tbptt_find(show=False, n_batches=1, max_lag=6, n_losses=1, bias=.5),
    check_memory_grads=lambda learn, _: learn.check_memory_grads(),
    predict_df=lambda learn, _: learn.predict_df(as_frame()[['run', 't', 'u']]),
    export=lambda learn, _: learn.export('learner.pkl'))
OF_EVALUATION = ['before_fit','before_epoch','before_validate','before_batch','after_pred','after_loss','after_batch','after_validate',
    'after_epoch','after_fit']
OFTEN = ('before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch',
    'forward','half of forward','backward','loss','step','after the step')

# what is raised there in an evaluation is fastai's own matter: its Learner keeps a lock, and waits for it for ever at the next one
LOCKED = 'before_fit','before_epoch'

def passed(action, accumulates):
    "The events that an action comes to"
    if action in ('validate', 'get_preds', 'predict_df'): return OF_EVALUATION
    if action not in ('fit', 'fit_one_cycle', 'lr_find'): return []
    cancelled = [o for o,is_so in dict(after_cancel_batch=accumulates, after_cancel_validate=action=='lr_find', after_cancel_fit=action=='lr_find').items() if is_so]
    return [o for o in _events[1:] if 'cancel' not in o]+cancelled

INNER = dict(fit=['forward','half of forward','backward','loss','read','step','after the step','metric','line'], validate=['forward','half of forward','loss','read','metric','line'],
    get_preds=['forward','half of forward','loss','read','metric','line'], predict_df=['forward','half of forward','read','line'], tbptt_find=['forward','half of forward','backward','loss','read','line'],
    check_memory_grads=['forward','half of forward','backward','loss','line'], export=['pickle'])
for o in ('fit_one_cycle', 'lr_find'): INNER[o] = INNER['fit']


# --- a case

def draw(seed):
    "What is interrupted, and where"
    rng = random.Random(seed)
    loader = rng.choices(['windows','stream','files','frame','text','workers'], [30, 20, 10, 22, 15, 3])[0]
    scheme = rng.choice([*SCHEMES] if loader in ('windows', 'workers') else OF_STREAMS)
    follows = scheme in ('fixed', 'ragged', 'whole', 'jittered', 'rates')
    layer = rng.choice(['stateful', 'plain', 'own'] if loader in ('windows', 'workers') and follows else ['stateful', 'plain'])
    maker = rng.choice(['library', 'fastai'])
    actions = [o for o in ACTIONS if not (o=='export' and maker=='fastai' or o=='predict_df' and (loader!='frame' or maker=='fastai'))]
    weights = dict(fit=8, fit_one_cycle=2, validate=2, get_preds=2, lr_find=2, predict_df=8)
    action = rng.choices(actions, [weights.get(o, 1) for o in actions])[0]
    accumulates,checkpoint = rng.random()<.2,action.startswith('fit') and rng.random()<.3
    inner,events = INNER[action],passed(action, accumulates)
    place,order = (rng.choice(inner),None) if not events or rng.random()<.4 else (rng.choice(events),rng.choice(ORDERS))
    if maker=='fastai' and action in ('validate', 'get_preds') and place in (*LOCKED, 'line'): place,order = 'forward',None
    error = 'ctrl_c' if place=='line' else rng.choice([*ERRORS])
    n = int(10**rng.uniform(0, 4)) if place=='line' else rng.choice([1, 2, 3, 5, 8] if place in OFTEN else [1, 1, 2])
    return SimpleNamespace(seed=seed, loader=loader, scheme=scheme, layer=layer, maker=maker, accumulates=accumulates, action=action, place=place, order=order, n=n, error=error,
        trained=rng.random()<.5, checkpoint=checkpoint, then=rng.choice(['fit', 'fit_one_cycle', 'validate', 'get_preds', 'checkpoint']))

def interrupted(learn, o):
    "Run into what was drawn; what came of it"
    cbs = [TbpttCheckpoint(f'checkpoint-{o.seed}', every=3)] if o.checkpoint else []
    bomb.arm(o.place, o.n, ERRORS[o.error])
    if o.place=='line': sys.settrace(trace_lines)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ACTIONS[o.action](learn, cbs)
        return None
    except BaseException as e: return e
    finally:
        sys.settrace(None)
        bomb.disarm()

def rngs(learn): return [dl.rng for dl in learn.dls.loaders]

def as_new(o, learn):
    "A new learner with the same weights, optimizer and random generators of its loaders"
    new = make(o)
    new.model.load_state_dict(learn.model.state_dict())
    if learn.opt is not None:
        new.create_opt()
        new.opt.load_state_dict(copy.deepcopy(learn.opt.state_dict()))
    if o.accumulates and not learn.tbptt_reset_cb._is_unfinished: # GradientAccumulation leaves some at the end of a fit
        for a,b in zip(new.model.parameters(), learn.model.parameters()): a.grad = None if b.grad is None else b.grad.clone()
    for a,b in zip(rngs(new), rngs(learn), strict=True): a.setstate(b.getstate())
    return new

def follows(learn, o, folder):
    "All numbers of what a learner does next"
    found = {}
    if o.then=='validate': found['first'] = learn.validate()
    if o.then=='get_preds': found['first'] = learn.get_preds()
    fit(learn, 'fit_one_cycle' if o.then=='fit_one_cycle' else 'fit', cbs=[TbpttCheckpoint(folder, every=5)] if o.then=='checkpoint' else None)
    found.update(losses=torch.stack([*learn.recorder.losses]), values=[*learn.recorder.values], lrs=[*learn.recorder.lrs])
    found.update(preds=learn.get_preds(with_loss=True), weights=learn.model.state_dict(), opt=learn.opt.state_dict(), rngs=[r.getstate() for r in rngs(learn)], random=encode_random(random_state()))
    if o.loader!='text' and o.layer!='own': found['stream'] = StreamPredictor(learn)(SIGNAL[None,:20])
    return bits(found)

def bits(o):
    "Something that compares as its values do, bit by bit"
    if isinstance(o, torch.Tensor): return str(o.dtype),tuple(o.shape),o.detach().contiguous().numpy().tobytes()
    if isinstance(o, dict): return {k: bits(v) for k,v in o.items()}
    if isinstance(o, (list, tuple)) or type(o).__name__=='L': return [*map(bits, o)]
    return repr(o)

def hooks(model): return {(name,key): len(o) for name,m in model.named_modules() for key,o in vars(m).items() if 'hooks' in key and isinstance(o, dict)}

def around(learn):
    "What may not have changed"
    return dict(hooks=hooks(learn.model), owners=[o for o in Carry.entered], callbacks=[*map(id, learn.cbs)], lock=learn.lock.locked(), logger=learn.logger, dls=id(learn.dls), dtype=torch.get_default_dtype(),
        threads=torch.get_num_threads(), running=[cb.run for cb in learn.cbs], reduction=learn.loss_func.reduction if hasattr(learn.loss_func, 'reduction') else None, grad=torch.is_grad_enabled())

def differences(a, b): return [k for k in a if a[k]!=b.get(k)]

def trial(o):
    "How a case ends: 'same', or 'not reached', if nothing was interrupted; else what is wrong"
    learn = make(o)
    if o.trained: fit(learn)
    before = around(learn)
    e = interrupted(learn, o)
    changed = differences(before, around(learn))
    # the two hints of TbpttLearner are given once
    if 'callbacks' in changed: changed = [k for k in changed if k not in ('callbacks', 'running')] if set(around(learn)['callbacks'])<set(before['callbacks']) else changed
    if changed: return f'left behind: {changed}',e
    if e is None: return 'not reached',e
    state = copy.deepcopy(encode_random(random_state()))
    new = as_new(o, learn)
    set_random(state)
    expected = follows(new, o, f'new-{o.seed}')
    set_random(state)
    try: found = follows(learn, o, f'old-{o.seed}')
    except BaseException as after: return f'cannot go on: {type(after).__name__} {str(after)[:200]!r}',e
    wrong = differences(expected, found)
    if wrong: return f'other numbers: {wrong}',e
    return 'same',e

def hangs(*_): raise TimeoutError('it hangs')

def run(seeds, out=None, seconds=60):
    "Counts of how the cases ended, by action; and a line for each that should not end so"
    counts,bad = Counter(),[]
    for seed in seeds:
        o = draw(seed)
        signal.signal(signal.SIGALRM, hangs)
        signal.alarm(seconds)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                end,e = trial(o)
        except BaseException as broken: end,e = f'raises {type(broken).__name__} {str(broken)[:200]!r}',None
        finally: signal.alarm(0)
        counts[o.action,end if end in ('same', 'not reached') else 'other'] += 1
        if end in ('same', 'not reached'): continue
        bad.append(f"{' '.join(f'{k}={v!r}' for k,v in vars(o).items())}: {end} after {e!r:.200}")
        if out: print(bad[-1], file=out, flush=True)
    e = None
    with warnings.catch_warnings(): # the folders of searches that were interrupted
        warnings.simplefilter('ignore')
        gc.collect()
    return counts,bad


# --- the long form

def table(counts):
    "Markdown: a row for each action"
    kinds = ['same','other','not reached']
    rows = [[name, *(counts[name,k] for k in kinds)] for name in ACTIONS]
    rows.append(['all', *(sum(o[i] for o in rows) for i in range(1, len(kinds)+1))])
    lines = ['| interrupted in | the same afterwards | another | not reached |', '| --- | --: | --: | --: |']
    return '\n'.join(lines+[f"| {' | '.join(map(str, row))} |" for row in rows])

def main():
    from time import perf_counter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=2000, help='interruptions')
    parser.add_argument('--seed', type=int, default=0, help='of the first')
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        counts,bad = run(range(args.seed, args.seed+args.n), sys.stdout)
        os.chdir('/')
    print(table(counts))
    print(f'{args.n} cases in {perf_counter()-began:.0f} s, from seed {args.seed}')
    return bool(bad)

if __name__=='__main__': sys.exit(main())
