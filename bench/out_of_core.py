"""Do memory and speed of training depend on the length of a window that is read from a file?

Every figure comes from a process of its own, which makes loaders and a learner over files, and trains an LSTM for a number of steps. Memory is the peak of
resident memory of that process from its start on, so with everything that finds the scaling and checks the values (Linux). The files are dropped from the
page cache before training. The stall is the time that training waits for the reading thread; the loader's time is all that passes from when a training step
asks for its sub-window until it has it. Processor time is that of both threads, which other work on the machine changes less than it changes the speed.
"""
import json, os, statistics, sys, tempfile
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from harness import arguments, column, headline, in_process, save, spread, status, table, turns

BS,HIDDEN,SUB,WARM = 4,40,200,50


def make_files(folder, win_sz, hdf5):
    "Noise and its moving average, long enough for a window in each row, every hundredth part of a window"
    import numpy as np
    n,rng,size = win_sz+(BS-1)*(win_sz//100),np.random.default_rng(0),1<<20
    names = [folder/f'{name}{win_sz}.{"h5" if hdf5 else "bin"}' for name in 'uy']
    if hdf5:
        import h5py
        files = [h5py.File(o, 'w') for o in names]
        out = [f.create_dataset('v', (n,), 'f4') for f in files]
    else: out = [np.memmap(o, np.float32, 'w+', shape=(n,)) for o in names]
    for start in range(0, n, size):
        u = rng.standard_normal(min(size, n-start), dtype=np.float32)
        out[0][start:start+len(u)],out[1][start:start+len(u)] = u,np.convolve(u, np.ones(20, np.float32)/20)[:len(u)]
    if hdf5:
        for f in files: f.close()
    return names


def drop_cache(files):
    "What is read next comes from the disk"
    for o in files:
        fd = os.open(o, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def one_run(folder, win_sz, source, n_steps, skip):
    "Train for `n_steps` after `WARM` of warming up, from the `skip`-th sub-window of the windows on; print what was measured"
    import numpy as np, torch
    from concurrent.futures import ThreadPoolExecutor
    from fastai.callback.core import Callback, CancelEpochException, CancelFitException
    from tbptt_fastai.sequences.arrays import HDF5Array
    from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
    from tbptt_fastai.learner import RNNLearner
    from tbptt_fastai.loaders import streams

    stalls,waits,times,rss,cpu = [],[],[],[],[]
    class TimedFuture:
        def __init__(self, future): self.future = future
        def result(self):
            asked = perf_counter()
            res = self.future.result()
            stalls.append(perf_counter()-asked)
            return res
    class TimedPool(ThreadPoolExecutor):
        def submit(self, *args): return TimedFuture(super().submit(*args))
    class TimedView(streams.StreamView):
        def __iter__(self):
            blocks = super().__iter__()
            while True:
                asked = perf_counter()
                try: batch = next(blocks)
                except StopIteration: return
                waits.append(perf_counter()-asked)
                yield batch
    class Stop(Callback):
        order = 100
        def after_batch(self):
            times.append(perf_counter())
            if len(times) in (WARM, WARM+n_steps):
                rss.append(status('VmRSS'))
                cpu.append(process_time())
            if len(times)==WARM+n_steps: raise CancelFitException()
        def after_train(self): raise CancelEpochException() # no validation; a short window goes on with another epoch
    class LateLayout(streams.Layout):
        def __iter__(self): return islice(super().__iter__(), skip, None)

    torch.set_num_threads(1)
    streams.ThreadPoolExecutor = TimedPool
    base = status('VmRSS')
    files = [Path(folder)/f'{name}{win_sz}.{"h5" if source=="hdf5" else "bin"}' for name in 'uy']
    began = perf_counter()
    x,y = (HDF5Array(o, 'v') if source=='hdf5' else np.memmap(o, np.float32, 'r') for o in files)
    if source=='memory': x,y = np.array(x),np.array(y)
    dls = SequenceDataLoaders.from_arrays(x, y, valid=(x, y), win_sz=win_sz, stp_sz=win_sz//100, sub_seq_len=SUB, bs=BS)
    learn = RNNLearner(dls, hidden_size=HIDDEN, cbs=Stop())
    if source!='memory': dls.train.view = TimedView
    if skip: dls.train.layout = lambda sub_seq_len, n_skip: LateLayout(dls.train_ds.lengths, BS, sub_seq_len, None, n_skip)
    set_up = perf_counter()-began
    if source!='memory': drop_cache(files)
    with learn.no_bar(), learn.no_logging(): learn.fit(WARM+n_steps)
    step = np.diff(times)[WARM-1:]
    print(json.dumps(dict(set_up=set_up, rate=1/step.mean(), cpu_ms=1e3*(cpu[1]-cpu[0])/n_steps, base=base, peak=status('VmHWM'), grown=rss[1]-rss[0], last_step=SUB*(skip+WARM+n_steps),
                          stall=sum(stalls[WARM:])/step.sum(), longest_stall_ms=1e3*max(stalls[WARM:], default=0), loader=sum(waits[WARM:])/step.sum(),
                          tenths=[float(1/o.mean()) for o in np.array_split(step, 10)])))


def show(runs):
    def cell(seen, key, form='.0f', scale=1): return spread(column(seen, key, scale), form)
    rows = []
    for (w,source,_,_,what),seen in runs.items():
        stall = ('–',)*3 if source=='memory' else (cell(seen, 'stall', '.1f', 100),cell(seen, 'longest_stall_ms', '.1f'),cell(seen, 'loader', '.1f', 100))
        rows.append((f'{w:,}', what, cell(seen, 'peak'), cell(seen, 'grown', '.1f'), cell(seen, 'rate'), cell(seen, 'cpu_ms', '.2f'), *stall, cell(seen, 'set_up', '.1f')))
    table(['window [steps]','steps trained on','peak resident memory [MiB]','growth while training [MiB]','training steps per second','processor time of a step [ms]','stall [% of time]',
           'longest stall [ms]','loader in all [% of time]','set-up [s]'], rows, text=(1,))
    print(f"\nOf the memory, {statistics.median(r['base'] for seen in runs.values() for r in seen):.0f} MiB are there once everything is imported.")


def main():
    if sys.argv[1:2]==['--one']: # one figure, in this process
        folder,win_sz,source,n_steps,skip = sys.argv[2:]
        return one_run(folder, int(win_sz), source, int(n_steps), int(skip))
    parser = arguments(__doc__, 5, windows=dict(type=int, nargs='+', default=[10**5, 10**6, 10**7, 10**8], help='steps of the window'),
        steps=dict(type=int, default=1000, help='training steps that are measured'), deep=dict(type=int, default=20_000, help='training steps of one more run on the longest window; 0: none'),
        hdf5=dict(action='store_true', help='HDF5 files instead of raw float32'), tmp=dict(help='folder for the files; default: that of the system'))
    args = parser.parse_args()
    kind,longest = 'hdf5' if args.hdf5 else 'memmap',max(args.windows)
    cases = [(w, kind, args.steps, 0, 'first sub-windows') for w in args.windows]
    cases.append((longest, kind, args.steps, longest//SUB-WARM-args.steps, 'last sub-windows'))
    if not args.hdf5: cases.insert(0, (min(args.windows), 'memory', args.steps, 0, 'in memory, cut by a TbpttDL'))
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        for w in args.windows: make_files(Path(folder), w, args.hdf5)
        runs = turns(cases, args.repeats, lambda c, _: in_process(__file__, folder, *c[:4]))
        deep = in_process(__file__, folder, longest, kind, args.deep, 0) if args.deep else None
    headline('one thread for computing', kind, f'LSTM-{HIDDEN}, batch {BS}, sub-window {SUB}', f'{args.steps} training steps after {WARM}', f'median (range) of {args.repeats}')
    show(runs)
    if deep:
        print(f"\n{args.deep:,} training steps in a row, to step {deep['last_step']:,} of the window of {longest:,}: resident memory grows by {deep['grown']:.1f} MiB to at most {deep['peak']:.0f} MiB; "
              f"training steps per second in each tenth: {', '.join(f'{o:.0f}' for o in deep['tenths'])}; stall {deep['stall']:.1%}.")
    save(args, [dict(win_sz=c[0], source=c[1], what=c[4], runs=seen) for c,seen in runs.items()]+[dict(deep=deep)])

if __name__ == '__main__': main()
