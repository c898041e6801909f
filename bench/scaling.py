"""Does a training step take longer when windows are longer, or when there are more of them?

A thousand windows of 1000 to a million steps, and a thousand to ten million windows of 500 steps, over one series in memory; all sizes take turns in one process.
A step's time has three parts: what it waits for its sub-window where that is cut from a window which is there, or where the window has to be loaded first, and the
rest. The waits are weighted by how often they are in a window; one of a million steps lasts longer than what is timed, and its loading is timed at the first step.
Shuffling is no part of a step but of an epoch's set-up, which is all that comes before the first step. Exits with an error if the processor time of a step grows by more than 5 %.
"""
import gc, statistics, sys
from time import perf_counter, process_time
import numpy as np, torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException
from harness import arguments, column, headline, ratios, save, spread, table, turns
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.views import SubWindows

BS,HIDDEN,SUB,WIN,N_WIN,WARM,LIMIT = 16,40,100,500,1000,50,1.05


def now(): return np.array([perf_counter(), process_time()])

class Clock(Callback):
    "Times of steps, of waits for their sub-windows, of shuffling and of an epoch's set-up; training ends after `n_steps`"
    order = 100
    def __init__(self, n_steps): self.n_steps = n_steps
    def before_fit(self): self.ends,self.waits,self.firsts,self.shuffling = [],[],[],np.zeros(2)
    def before_epoch(self):
        self.began = now()
        self.firsts.append(len(self.ends))
    def before_batch(self):
        if not self.ends: self.set_up = now()-self.began
    def after_batch(self):
        self.ends.append(now())
        if len(self.ends)==WARM+self.n_steps: raise CancelFitException()
    def after_train(self): raise CancelEpochException() # no validation; a short epoch is followed by another

def timed(dl, clock):
    "Have a loader tell the clock what it waits for: whether a window had to be loaded, and how long it took, without shuffling"
    class View(SubWindows):
        def _open(self, batch):
            self.opened = True
            super()._open(batch)
        def __iter__(self):
            blocks = super().__iter__()
            while True:
                asked,shuffling,self.opened = now(),clock.shuffling.copy(),False
                try: block = next(blocks)
                except StopIteration: return
                clock.waits.append((self.opened, now()-asked-(clock.shuffling-shuffling)))
                yield block
    get_idxs = dl.get_idxs
    def shuffle():
        start = now()
        res = get_idxs()
        clock.shuffling += now()-start
        return res
    dl.view,dl.get_idxs = View,shuffle

def make_learner(series, n, win_sz, stp_sz, n_steps):
    x,y = (o[:n] for o in series)
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x[:win_sz], y[:win_sz]), win_sz=win_sz, stp_sz=stp_sz, sub_seq_len=SUB, bs=BS)
    clock = Clock(n_steps)
    timed(dls.train, clock)
    return TbpttLearner(dls, hidden_size=HIDDEN, cbs=clock)

def train(learn):
    "The parts of a step, in milliseconds by the clock and of processor time"
    gc.collect()
    with learn.no_bar(), learn.no_logging(): learn.fit(WARM+learn.clock.n_steps, 1e-3)
    clock,n_sub = learn.clock,learn.dls.train_ds.win_sz//SUB
    opened,waits = (np.array(o) for o in zip(*clock.waits))
    rest,counted = np.diff(clock.ends, axis=0, prepend=[clock.began])-waits,np.arange(len(waits))>=WARM
    counted[[o for o in clock.firsts if o<len(counted)]] = False # with what an epoch does before and after
    load,cut,rest = waits[opened & counted if (opened & counted).any() else opened].mean(0),waits[~opened & counted].mean(0),rest[counted].mean(0)
    step = rest+cut*(1-1/n_sub)+load/n_sub
    named = dict(step=step, load=load, load_share=load/n_sub, cut=cut, rest=rest, shuffle=clock.shuffling/len(clock.firsts), set_up=clock.set_up)
    return {f'{k}_{kind}': round(1e3*v, 6) for k,both in named.items() for kind,v in zip(('wall','cpu'), both.tolist())}


def compare(series, sizes, args):
    learners = {o: make_learner(series, **kw, n_steps=args.steps) for o,kw in sizes.items()}
    return turns(learners, args.repeats, lambda o, _: train(learners[o]), warm_up=1)

def show(what, runs):
    "A row for each size; those that take more time than the first"
    base,*_ = runs.values()
    rel = {o: {k: ratios(seen, base, f'step_{k}') for k in ('wall','cpu')} for o,seen in runs.items()}
    table([what,'time of a step [ms]','ratio','ratio of processor time','loading, of that [µs]','shuffling an epoch [ms]','set-up of an epoch [ms]'],
        [(f'{o:,}', spread(column(seen, 'step_wall')), *(spread(rel[o][k], '.3f') for k in ('wall','cpu')), spread(column(seen, 'load_share_wall', 1e3), '.0f'),
          spread(column(seen, 'shuffle_wall'), '.1f'), spread(column(seen, 'set_up_wall'), '.0f')) for o,seen in runs.items()], text=())
    print()
    return [f"{o:,} {what}: {statistics.median(r['cpu']):.3f} times the processor time" for o,r in rel.items() if statistics.median(r['cpu'])>LIMIT]

def main():
    parser = arguments(__doc__, 41, windows=dict(type=int, nargs='*', default=[10**o for o in range(3, 7)], help='steps of a window'),
        numbers=dict(type=int, nargs='*', default=[10**o for o in range(3, 8)], help='windows'), steps=dict(type=int, default=200, help=f'training steps that are timed, after {WARM}'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    length = max(args.windows, default=0)+N_WIN*SUB # of the series that windows of every length are taken from
    u = np.random.default_rng(0).standard_normal(max(length, max(args.numbers, default=0)+WIN), dtype=np.float32)
    series = u,np.convolve(u, np.ones(20, np.float32)/20)[:len(u)]
    longer = {o: dict(n=length, win_sz=o, stp_sz=(length-o)//(N_WIN-1)) for o in args.windows}
    more = {o: dict(n=o+WIN-1, win_sz=WIN, stp_sz=1) for o in args.numbers}
    headline('one thread', f'LSTM-{HIDDEN}, batch {BS}, sub-window {SUB}', f'{args.steps} training steps after {WARM}', f'median (range) of {args.repeats}')
    res = {what: compare(series, sizes, args) for what,sizes in {'steps of a window': longer, f'windows of {WIN} steps': more}.items() if sizes}
    failures = [o for what,runs in res.items() for o in show(what, runs)]
    save(args, res)
    if failures: sys.exit(f'Steps that take more than {LIMIT} times as long:\n'+'\n'.join(failures))

if __name__ == '__main__': main()
