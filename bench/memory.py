"""How much memory does training take, and does it depend on the length of the window?

Every figure comes from a process of its own (Linux). The first table trains an LSTM with and without truncation and says how far resident memory rose at most.
Activations are what `tbptt_fastai.instruments.activation.activation_memory` counts; the window is the batch of inputs and targets.
The second table has windows of a million steps, of which as many training steps as asked for are done: by a loop written by hand, with torch and numpy alone, that reads a batch of
windows from .npy files and cuts it; and by TbpttLearner, with the same files in memory or mapped. Resident are all pages of a process, also those of a file that it maps.
"""
import json, sys, tempfile
from functools import partial
from pathlib import Path
from harness import arguments, column, headline, in_process, ratios, save, spread, status, table, turns

BS,HIDDEN,SUB,SHORT = 16,40,100,1000
SHOWN = dict(peak='peak resident memory', above_imports='above the imports', above_short='above short windows')


def quiet_fit(learn, n_epoch, lr=None):
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, lr)

def by_length(win_sz, sub_seq_len):
    "Train for two epochs of one batch; what that took, in MiB"
    import numpy as np, torch
    from fastai.callback.core import CancelEpochException, Callback
    from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
    from tbptt_fastai.learner import RNNLearner
    from tbptt_fastai.instruments.activation import activation_memory

    class NoValidation(Callback): # it would run whole windows; here training is measured
        order = 100
        def after_train(self): raise CancelEpochException()

    torch.set_num_threads(1)
    u = list(np.random.default_rng(0).standard_normal((BS, win_sz)).astype(np.float32))
    dls = SequenceDataLoaders.from_arrays(u, u, valid=(u, u), win_sz=win_sz, bs=BS, shuffle=False)
    learn = RNNLearner(dls, hidden_size=HIDDEN, sub_seq_len=sub_seq_len, cbs=NoValidation())
    before = status('VmRSS')
    quiet_fit(learn, 2)
    peak = status('VmHWM')-before
    activations = activation_memory(learn.model, torch.zeros(BS, sub_seq_len or win_sz, 1))/2**20
    return dict(peak=peak, activations=activations, window=2*BS*win_sz*4/2**20)


def make_files(folder, win_sz, bs, channels):
    "Recordings of one window each: noise in `channels` channels, and the moving average of the first"
    import numpy as np
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(bs):
        u = rng.standard_normal((win_sz, channels), dtype=np.float32)
        np.save(folder/f'u{i:02}.npy', u)
        np.save(folder/f'y{i:02}.npy', np.convolve(u[:,0], np.ones(20, np.float32)/20)[:win_sz,None])

def by_hand():
    "A loop that holds a batch of windows"
    import numpy as np, torch
    from torch import nn

    def batch(files):
        first = np.load(files[0], mmap_mode='r')
        res = torch.empty(len(files), *first.shape)
        for row,f in zip(res, files): row.copy_(torch.from_numpy(np.load(f))) # one after the other, so that no more than one window is there twice
        return res
    class Net(nn.Module):
        def __init__(self, n_in):
            super().__init__()
            self.rnn,self.head = nn.LSTM(n_in, HIDDEN, batch_first=True),nn.Linear(HIDDEN, 1)
        def forward(self, x, state):
            out,state = self.rnn(x, state)
            return self.head(out),state
    def train(files, n_steps):
        x,y = map(batch, files)
        net,state = Net(x.shape[-1]),None
        opt = torch.optim.Adam(net.parameters(), 1e-3)
        for a in range(0, n_steps*SUB, SUB):
            pred,state = net(x[:,a:a+SUB], state)
            nn.functional.l1_loss(pred, y[:,a:a+SUB]).backward()
            opt.step()
            opt.zero_grad()
            state = tuple(o.detach() for o in state)
    return train

def by_learner(mapped):
    "`TbpttLearner`, with the windows in memory or in files that are mapped"
    import numpy as np
    from fastai.callback.core import Callback, CancelFitException
    from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
    from tbptt_fastai.learner import TbpttLearner
    from tbptt_fastai.loaders.windows import TbpttDL
    from tbptt_fastai.loaders.streams import StreamDL

    class Stop(Callback):
        order = 100
        def __init__(self, n_steps): self.n_steps,self.seen = n_steps,0
        def after_batch(self):
            self.seen += 1
            if self.seen==self.n_steps: raise CancelFitException()
    def train(files, n_steps):
        x,y = ([np.load(f, mmap_mode='r' if mapped else None) for f in o] for o in files)
        dls = SequenceDataLoaders.from_arrays(x, y, valid=(x[:1], y[:1]), win_sz=len(x[0]), bs=len(x), sub_seq_len=SUB)
        if type(dls.train) is not (StreamDL if mapped else TbpttDL): raise AssertionError(f'{dls.train}')
        stop = Stop(n_steps)
        quiet_fit(TbpttLearner(dls, hidden_size=HIDDEN, cbs=stop), 1, 1e-3)
        if stop.seen!=n_steps: raise AssertionError(f'{stop.seen} steps')
    return train

HOLDERS = {'by hand, windows held': by_hand, 'TbpttLearner, in memory': partial(by_learner, False), 'TbpttLearner, mapped files': partial(by_learner, True)}

def holding(folder, name, n_steps):
    "Peak resident memory of a training, and how far that is above what the imports take, and above a training with short windows, which imports and prepares the rest; in MiB"
    train = HOLDERS[name]()
    import torch
    torch.set_num_threads(1)
    imports = status('VmRSS')
    def files(kind): return [sorted((Path(folder)/kind).glob(f'{o}*.npy')) for o in 'uy']
    train(files('short'), SHORT//SUB)
    short = status('VmRSS')
    train(files('long'), int(n_steps))
    peak = status('VmHWM')
    return dict(imports=imports, short=short, peak=peak, above_imports=peak-imports, above_short=peak-short)


def length_table(args):
    runs = turns([(w,k) for w in args.windows for k in (SUB,0)], args.repeats, lambda c, _: in_process(__file__, 'length', *c))
    headline('one thread', f'LSTM-{HIDDEN}, batch {BS}, sub-window {SUB}', f'median (range) of {args.repeats}')
    table(['window [steps]','training','rise of resident memory [MiB]','activations of a step [MiB]','window itself [MiB]'],
          [(f'{w:,}', f'TBPTT, {k}' if k else 'full backpropagation', spread(column(o, 'peak'), '.0f'), f"{o[0]['activations']:.1f}", f"{o[0]['window']:.1f}") for (w,k),o in runs.items()], text=(1,))
    return [dict(win_sz=w, sub_seq_len=k, runs=seen) for (w,k),seen in runs.items()]

def holding_table(args):
    print(f'\nWindows of {args.long:,} steps, {args.steps} training steps; LSTM-{HIDDEN}, sub-window {SUB}; median (range) of {args.repeats}\n')
    rows,res = [],[]
    for bs,channels in zip(*[iter(args.batches)]*2):
        with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
            for kind,win_sz in dict(short=SHORT, long=args.long).items(): make_files(Path(folder)/kind, win_sz, bs, channels)
            runs = turns(HOLDERS, args.repeats, lambda name, _: in_process(__file__, 'holding', folder, name, args.steps))
        base = runs['by hand, windows held']
        rows += [(f'{bs} windows, {channels} + 1 channels', name, *(spread(column(o, k), '.0f') for k in SHOWN), *(spread(ratios(o, base, k)) for k in SHOWN)) for name,o in runs.items()]
        res.append(dict(bs=bs, channels=channels, window=bs*(channels+1)*args.long*4/2**20, runs=runs))
    table(['batch','training',*(f'{o} [MiB]' for o in SHOWN.values()),*(f'{o}, ratio' for o in SHOWN.values())], rows, text=(0,1))
    return res

def main():
    if sys.argv[1:2]==['--one']: # one figure, in this process
        what,*args = sys.argv[2:]
        return print(json.dumps(holding(*args) if what=='holding' else by_length(int(args[0]), int(args[1]) or None)))
    parser = arguments(__doc__, 3, windows=dict(type=int, nargs='*', default=[1000, 10_000, 100_000], help='steps of the windows of the first table'),
        long=dict(type=int, default=10**6, help='steps of the windows of the second table'), steps=dict(type=int, default=300, help='training steps there'),
        batches=dict(type=int, nargs='*', default=[16, 1, 64, 1, 64, 8], help='windows in a batch and input channels, several times'), tmp=dict(help='folder for the files; default: that of the system'))
    args = parser.parse_args()
    save(args, dict(length=length_table(args) if args.windows else [], holding=holding_table(args) if args.batches else []))

if __name__ == '__main__': main()
