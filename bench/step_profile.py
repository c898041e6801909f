"""Where does the time of a training step go, part by part, against the same loop written by hand?

Functions are wrapped in a clock that gives each moment to the innermost part it lies in. The clock takes about a microsecond for each call, which is measured
on a function that does nothing and taken off; what the parts then do not account for is the rest.
"""
import statistics, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from collections import Counter
from functools import partial, wraps
from inspect import isgeneratorfunction
import torch
from fastai.callback.core import TrainEvalCallback, _inner_loop
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientClip
from fastai.learner import CastToTensor, Recorder
from torch import nn
from tbptt_fastai.models.sequence import SequenceRNN
from tbptt_fastai.state import stateful as rnn
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.state.carry import Carry
from tbptt_fastai.speed.dispatch import LeanLearner
from tbptt_fastai.loaders.views import SubWindows
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.speed.optimizer import FusedAdam
from tbptt_fastai.speed.shortcuts import shortcuts
from tbptt_fastai.sequences.windows import SequenceWindows
import step_loops
from harness import arguments, headline, save, table, turns
from step_loops import CASES, Work, by_fastai, by_hand, tbptt

HOOKS = '_start_pass','_before','_after','_before_stateful'
CALLBACKS = {TrainEvalCallback: 'step counter', CastToTensor: 'cast', TbpttResetCB: 'TbpttResetCB', GradientClip: 'clipping',
             Recorder: 'recorder', ProgressCallback: 'progress bar', ParamScheduler: 'scheduler'}
PLACES = [(torch.Tensor, ['backward'], 'backward'), (nn.L1Loss, ['forward'], 'loss'), (step_loops, ['clip_grad_norm_'], 'clipping'), (step_loops, ['set_lr'], 'scheduler'),
          (torch.optim.Adam, ['step'], 'optimizer'), (FusedAdam, ['step'], 'optimizer'), (torch.optim.Adam, ['zero_grad'], 'zero_grad'), (FusedAdam, ['zero_grad'], 'zero_grad'),
          (step_loops.Net, ['forward'], 'model'), (SequenceRNN, ['forward'], 'model'), (Carry, HOOKS, 'carried state: hooks'), (rnn, ['check_carried','detach_state'], 'carried state: checked, detached'),
          (Work, ['batch'], 'windows: gathered'), (SequenceWindows, ['gather'], 'windows: gathered'), (TbpttDL, ['windows'], 'windows: loader'), (SubWindows, ['_open'], 'windows: planned'),
          (SubWindows, ['__iter__'], 'sub-windows: cut'), (LeanLearner, ['_set_device','_split'], 'device, split of the batch'), (LeanLearner, ['__call__'], 'event dispatch'),
          *((cb, [o for o in _inner_loop if hasattr(cb, o) and (cb, o) not in shortcuts], part) for cb,part in CALLBACKS.items())] # what a shortcut stands for has to stay what it is


class Parts:
    "A clock that gives each moment to the innermost part"
    def __init__(self): self.spent,self.calls,self.within,self.inside,self.outside = Counter(),Counter(),['rest of the loop'],0.,0.

    def enter(self, part):
        now = time.perf_counter()
        self.spent[self.within[-1]] += now-self.since
        self.calls[part,self.within[-1]] += 1
        self.within.append(part)
        self.since = time.perf_counter()

    def leave(self):
        now = time.perf_counter()
        self.spent[self.within.pop()] += now-self.since
        self.since = time.perf_counter()

    def wrap(self, f, part):
        @wraps(f)
        def clocked(*args, **kwargs):
            self.enter(part)
            try: res = f(*args, **kwargs)
            finally: self.leave()
            return self.wrap_iter(res, part) if isgeneratorfunction(f) else res
        return clocked

    def wrap_iter(self, it, part):
        while True:
            self.enter(part)
            try: o = next(it)
            except StopIteration: return
            finally: self.leave()
            yield o

    def __enter__(self):
        self.kept = [(owner, name, vars(owner).get(name)) for owner,names,_ in PLACES for name in names]
        for owner,names,part in PLACES:
            for name in names: setattr(owner, name, self.wrap(getattr(owner, name), part))
        self.shortcuts = dict(shortcuts)
        for (cb,event),shortcut in self.shortcuts.items(): shortcuts[cb,event] = self.wrap(shortcut, CALLBACKS[cb])
        self.since = time.perf_counter()
        return self

    def __exit__(self, *exc):
        self.leave()
        shortcuts.update(self.shortcuts)
        for owner,name,f in self.kept: setattr(owner, name, f) if f is not None else delattr(owner, name)

    def per_step(self, n_steps):
        "Microseconds, without what the clock itself took"
        inside,outside = cost_of_clock()
        spent = Counter(self.spent)
        for (part,outer),n in self.calls.items():
            spent[part] -= n*inside
            spent[outer] -= n*outside
        return {part: 1e6*seconds/n_steps for part,seconds in spent.items()}


def cost_of_clock(n=20_000):
    "Seconds of a call that are counted in the part that is called, and in the one that calls"
    clock,empty = Parts(),lambda: None
    f = clock.wrap(empty, 'inner')
    clock.since = start = time.perf_counter()
    for _ in range(n): empty()
    plain = time.perf_counter()-start
    clock.since = time.perf_counter()
    for _ in range(n): f()
    return clock.spent['inner']/n,(clock.spent['rest of the loop']-plain)/n


def clocked(run):
    "Run it with the clock on while it is timed"
    parts,timed = Parts(),step_loops.timed
    def with_clock(f):
        with parts: f()
    step_loops.timed = with_clock
    try: run()
    finally: step_loops.timed = timed
    return parts

def profile(work, contenders, repeats):
    "Microseconds of a step by part, and without a clock"
    def measure(name, i):
        plain,parts = contenders[name](work)[1]()[0],clocked(contenders[name](work)[1])
        return dict(parts=parts.per_step(work.n_steps), plain=1e6*plain/work.n_steps)
    return turns(contenders, repeats, measure, warm_up=1)

def rows(runs):
    "A row for each part, the one that the library adds most to first; then all of them, and the same training without a clock"
    names = {part for seen in runs.values() for o in seen for part in o['parts']}
    def medians(value): return [statistics.median(map(value, seen)) for seen in runs.values()]
    parts = {part: medians(lambda o: o['parts'].get(part, 0)) for part in names}
    every = [*sorted(parts.items(), key=lambda o: o[1][0]-o[1][1]), ('sum', [sum(o) for o in zip(*parts.values())]), ('without a clock', medians(lambda o: o['plain']))]
    return [(part, *(f'{v:.0f}' if abs(v)>=.5 else '–' for v in (*values, values[1]-values[0]))) for part,values in every]


def main():
    parser = arguments(__doc__, 5, case=dict(type=int, default=0, help='0: LSTM-40; 1: LSTM-128'), path=dict(help='cache of nonlinear_benchmarks'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    case,contenders = list(CASES)[args.case],{'by hand': by_hand, 'TbpttLearner': partial(by_fastai, tbptt), 'by hand, fused Adam': partial(by_hand, fused=True)}
    runs = profile(Work(**CASES[case], path=args.path), contenders, args.repeats)
    headline('one thread', case, f'microseconds of a step, median of {args.repeats}')
    table(['part',*contenders,'TbpttLearner, more'], rows(runs))
    save(args, {case: runs})

if __name__ == '__main__': main()
