"""Does a process that trains, validates and predicts for an hour grow or slow down?

One process, one thread. Each turn trains each of five learners for an epoch, validates it and predicts: windows in
memory, streams in memory, windows and streams of HDF5 files, and streams of a data frame, the first two with a
`TbpttCheckpoint` that writes. A `StreamPredictor` follows a stream, and one more learner is made anew, trained and
left to the collector. Once a minute, after a collection of garbage, come resident memory, open file handles, threads,
and the objects and tensors that the collector knows; the speed is that of the training steps since the last time. The
figures are from /proc (Linux).
"""
import argparse, gc, json, os, statistics, tempfile, threading, warnings
from pathlib import Path
from time import perf_counter, process_time
from harness import headline, save, status, table

SUB,HIDDEN = 20,24
SHOWN = dict(memory=('resident memory [MiB]', '.1f'), handles=('file handles', '.1f'), os_threads=('threads', '.1f'), threads=('threads of Python', '.1f'),
    objects=('objects', ',.0f'), tensors=('tensors', ',.1f'), files=('files written', '.1f'), rate=('training steps a second', '.0f'), processor_rate=('training steps a second of processor time', '.0f'))


def recordings(n=8, steps=1000):
    "Noise in two channels, and what is left of their product after a while"
    import numpy as np
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((steps+53*i, 2)).astype(np.float32) for i in range(n)]
    decay = np.exp(-np.arange(60)/20)/5
    return xs,[np.convolve(x[:,0]*x[:,1], decay)[:len(x),None].astype(np.float32) for x in xs]

def write_files(folder, xs, ys):
    "Each recording in an HDF5 file of its own, in compressed chunks"
    import h5py
    for i,o in enumerate(zip(xs, ys)):
        with h5py.File(folder/f'{i}.h5', 'w') as f:
            for name,a in zip('uy', o): f.create_dataset(name, data=a, chunks=(256, a.shape[1]), compression='gzip')
    return sorted(folder.glob('*.h5'))

def as_frame(xs, ys):
    import numpy as np, pandas as pd
    parts = [pd.DataFrame(dict(run=f'run {i}', t=np.arange(len(x)), u=x[:,0], v=x[:,1], y=y[:,0])) for i,(x,y) in enumerate(zip(xs, ys))]
    return pd.concat(parts, ignore_index=True)

def all_loaders(folder, xs, ys):
    "By their names, functions that make them"
    from tbptt_fastai.all import SequenceDataLoaders
    files,df = write_files(folder, xs, ys),as_frame(xs, ys)
    how,windows = dict(sub_seq_len=SUB, bs=8),dict(win_sz=200, stp_sz=100)
    def arrays(**kw): return SequenceDataLoaders.from_arrays(xs[:6], ys[:6], valid=(xs[6:], ys[6:]), **how, **kw)
    def hdf5(**kw): return SequenceDataLoaders.from_hdf5(files[:6], 'u', 'y', valid_files=files[6:], **how, **kw)
    def frame(): return SequenceDataLoaders.from_df(df, ['u', 'v'], 'y', group='run', time='t', **how)
    return dict(windows=lambda: arrays(**windows), streams=arrays, files=lambda: hdf5(**windows), file_streams=hdf5, frame=frame),df


class Steps:
    "Counts training steps and how long they took"
    def __init__(self):
        from fastai.callback.core import Callback
        self.n,self.seconds,self.processor = 0,0.,0.
        def before_train(cb): self.began = perf_counter(),process_time()
        def after_batch(cb): self.n += bool(cb.training)
        def after_train(cb):
            self.seconds += perf_counter()-self.began[0]
            self.processor += process_time()-self.began[1]
        self.make = lambda: Callback(before_train=before_train, after_batch=after_batch, after_train=after_train)

    def rates(self):
        "Training steps a second, and a second of processor time, since the last time"
        n,seconds,processor = self.n,self.seconds,self.processor
        self.n,self.seconds,self.processor = 0,0.,0.
        return dict(rate=n/seconds, processor_rate=n/processor)

class Soak:
    "What goes on for an hour"
    def __init__(self, folder):
        import torch
        from tbptt_fastai.all import StreamPredictor
        torch.set_num_threads(1)
        self.folder,self.steps,self.n = folder,Steps(),0
        (folder/'data').mkdir()
        self.xs,self.ys = recordings()
        self.loaders,self.df = all_loaders(folder/'data', self.xs, self.ys)
        self.learners = {name:self.learner(name) for name in self.loaders}
        self.predictor = StreamPredictor(self.learners['streams'])

    def learner(self, name):
        from tbptt_fastai.all import RNNLearner, mae
        return RNNLearner(self.loaders[name](), 'lstm', HIDDEN, metrics=mae, path=self.folder, cbs=self.steps.make())

    def train(self, name, learn, checkpoint):
        from tbptt_fastai.all import TbpttCheckpoint
        cbs = [TbpttCheckpoint(f'checkpoint-{name}', every=10)] if checkpoint else None
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)

    def evaluate(self, name, learn):
        with learn.no_bar(), learn.no_logging():
            learn.validate()
            learn.get_preds()
            if name=='frame': learn.predict_df(self.df.drop(columns='y'))

    def follow(self):
        for a in range(0, 200, 50): self.predictor(self.xs[self.n%8][a:a+50])
        self.predictor.reset()

    def turn(self):
        for name,learn in self.learners.items():
            self.train(name, learn, name in ('windows', 'streams'))
            self.evaluate(name, learn)
        self.follow()
        name = list(self.loaders)[self.n%len(self.loaders)]
        self.train(name, self.learner(name), False) # and nobody keeps it
        self.n += 1

    def look(self, began):
        "Where it stands"
        import torch
        rates = self.steps.rates()
        gc.collect()
        objects = gc.get_objects()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # some objects of torch warn when they are asked for their class
            tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
        return dict(minutes=(perf_counter()-began)/60, turns=self.n, memory=status('VmRSS'), handles=len(os.listdir('/proc/self/fd')), os_threads=len(os.listdir('/proc/self/task')),
            threads=threading.active_count(), objects=len(objects), tensors=tensors, files=sum(o.is_file() for o in self.folder.rglob('*')), **rates)


def tenths(seen, key):
    "Median of the first and last tenth, and how much the line through all of them rises in an hour"
    values,n = [o[key] for o in seen],max(len(seen)//10, 1)
    slope = statistics.linear_regression([o['minutes']/60 for o in seen], values).slope if len(seen)>1 else 0.
    return statistics.median(values[:n]),statistics.median(values[-n:]),slope

def show(seen):
    headline('one thread', f"{seen[-1]['minutes']:.0f} minutes, {seen[-1]['turns']} turns, a look at it {len(seen)} times")
    table(['', 'first tenth', 'last tenth', 'change in an hour'],
        [(what, *(f'{o:{form}}' for o in tenths(seen, key)[:2]), f'{tenths(seen, key)[2]:+{form}}') for key,(what,form) in SHOWN.items()])

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60, help='how long it goes on')
    parser.add_argument('--every', type=float, default=1, help='minutes from one look to the next')
    parser.add_argument('--warm_up', type=int, default=10, help='turns before the first look, so that caches are filled')
    parser.add_argument('--json', help='file for all measurements, kept up to date')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as folder:
        soak,seen = Soak(Path(folder)),[]
        for _ in range(args.warm_up): soak.turn()
        soak.steps.rates()
        began = perf_counter()
        while perf_counter()-began<60*args.minutes:
            until = perf_counter()+60*args.every
            while perf_counter()<until: soak.turn()
            seen.append(soak.look(began))
            save(args, seen)
    show(seen)


if __name__=='__main__': main()
