"""Which way to begin and to cut windows trains best, with the same number of updates? The protocol and the data of arXiv 2602.10911

LSTM-8 and a linear layer on three recorded systems, input and output scaled by the training part; Adam at a constant 1e-4, batches of 100, 79,600 updates, each
of which costs what 100 steps cost, or 120. Windows begin at every step. The test is one pass over its steps, from the zero state; the error is the mean squared
one of all steps, scaled, times 100. The weights with the best validation error (the same error, on other steps) are tested, once. A second table has the
same rows with `fit_flat_cos` at 1e-3. Times are those of the processor, so that other work on the machine does not count.
"""
import argparse, os, statistics, tempfile, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
warnings.filterwarnings('ignore', 'n_skip') # which a row has on purpose
from functools import partial
from pathlib import Path
from typing import NamedTuple
import numpy as np, torch
from tbptt_fastai.all import *
from tbptt_fastai.state.stored import StoredState
from harness import headline, save, spread, table
from systems import fit_best, in_one

FILES = {'Silverbox': ('silverbox', 20_000, 10_000), 'Wiener-Hammerstein': ('WienerHammerBenchmark', 20_000, 10_000), 'RLC': ('rlc', 6_667, 3_333)}
PAPER = { # of all its rows the best, and the best of those with windows of 100: test, chosen on validation
    'Silverbox': (.117, .142), 'Wiener-Hammerstein': (.372, .445), 'RLC': (.176, .176)}
BURN_IN = {'Silverbox': 94, 'Wiener-Hammerstein': 36, 'RLC': 47} # the paper's, chosen on its validation
UPDATES,BS,SUB,TRANSIENT = 79_600,100,100,100


class Row(NamedTuple):
    "A way to begin and to cut"
    win_sz:int=1000 # steps of a window
    scheme:object=SUB # sub-windows; `None`: whole windows
    stream:bool=False # rows that each go through all the data, in one order, instead of windows
    burn_in:bool=False # with the paper's burn-in of each set
    n_skip:int=0 # first steps without a loss
    initial:object=None # what makes the first state, from the layer
    n_past:int=0 # first steps whose outputs are known, too, and whose errors do not count

ROWS = {
    'zero state, windows of 100': Row(win_sz=100, scheme=None),
    'zero state, windows of 100, burn-in': Row(win_sz=100, scheme=None, burn_in=True),
    'carried through all the data, in one order': Row(stream=True),
    'sub-windows of 100 in windows of 1000': Row(),
    'the same, first state learned': Row(initial=learned_state),
    'the same, 16 batches of windows in flight': Row(scheme=Interleaved(SUB, 16)),
    'Overlap(20, 100) in windows of 1000': Row(scheme=Overlap(20, 100)),
    'the same, 16 batches of windows in flight, Overlap(20, 100)': Row(scheme=Interleaved(Overlap(20, 100), 16)),
    'the same, n_skip=100': Row(n_skip=100),
    'Overlap(20, 100) in windows of 1000, n_skip=100': Row(scheme=Overlap(20, 100), n_skip=100),
    'stored states in nine of ten windows of 100': Row(win_sz=100, scheme=None, initial=lambda rnn: StoredState(share=.9)),
    'state encoded from 50 steps, windows of 150': Row(win_sz=150, scheme=None, initial=lambda rnn: EncodedState(n_past=50, n_in=1, n_out=1), n_past=50),
}
SCHEDULES = {'Adam, constant 1e-4': ('fit', 1e-4), 'fit_flat_cos, 1e-3': ('fit_flat_cos', 1e-3)}


def load(name, folder):
    "Input and output of training, validation and test, each (steps, 1), scaled by the training part"
    stem,n_train,n = FILES[name]
    def read(part, n): return np.loadtxt(folder/f'{stem}_{part}_{n}.csv', delimiter=',')[-2:]
    parts = read('train', n_train),read('val', n),read('test', n)
    mean,std = parts[0].mean(1, keepdims=True),parts[0].std(1, keepdims=True)
    return [[o.astype('f4')[:,None] for o in (part-mean)/std] for part in parts]

def loaders(row, train, valid):
    "Windows that begin at every step, or a stream of 100 rows, each of which begins a step after the last; validation in one pass"
    if row.stream:
        rows = [[o[i:] for i in range(BS)] for o in train]
        return DataLoaders(StreamDL(Sequences(*rows), bs=BS, sub_seq_len=SUB), in_one(*valid))
    windows = SequenceWindows(*([o] for o in train), win_sz=row.win_sz, stp_sz=1)
    return DataLoaders(TbpttDL(windows, bs=BS, shuffle=True, drop_last=True, num_workers=0), in_one(*valid))

class Net(nn.Module):
    "LSTM-8 and a linear layer"
    def __init__(self, initial=None):
        super().__init__()
        rnn = nn.LSTM(1, 8, batch_first=True)
        self.rnn = StatefulRNN(rnn, initial=None if initial is None else initial(rnn))
        self.head = nn.Linear(8, 1)
    def forward(self, x): return self.head(self.rnn(x))

def learner(name, row, train, valid, folder):
    how = dict(truncation=row.scheme) if isinstance(row.scheme, Truncation) else dict(sub_seq_len=row.scheme)
    if row.burn_in: how['burn_in'] = BURN_IN[name]
    if row.n_skip: how['n_skip'] = row.n_skip
    adam = partial(FusedAdam, mom=.9, sqr_mom=.999, eps=1e-8, wd=0.)
    return TbpttLearner(loaders(row, train, valid), Net(row.initial), loss_func=nn.MSELoss(), opt_func=adam, path=folder, num_threads=1, **how)

def error(learn, part, n_past=0):
    "Of all steps but the first `n_past`, and of those after the first 100"
    with learn.no_bar(): pred,y = learn.get_preds(dl=in_one(*part))
    squares = (pred-y)[0].square()
    return 100*squares[n_past:].mean().item(),100*squares[TRANSIENT:].mean().item()

def run(case, seed, updates, folder):
    "Errors of one training, and the seconds that it took"
    name,row,(method,lr) = case[0],ROWS[case[1]],SCHEDULES[case[2]]
    set_seed(seed)
    train,valid,test = load(name, folder)
    with tempfile.TemporaryDirectory() as tmp:
        learn = learner(name, row, train, valid, tmp)
        done,seconds = fit_best(learn, updates, lr, method)
        curve = [o[1] for o in learn.recorder.values]
    all_steps,after = error(learn, test, row.n_past)
    return dict(valid=error(learn, valid, row.n_past)[0], test=all_steps, after=after, seconds=seconds, updates=done, curve=curve)


def shown(values): return spread(values, '.3f') if len(values)>1 else f'{values[0]:.3f}'

def report(name, results, rows):
    "A table of one set and schedule"
    cells = [[r, *(shown([o[k] for o in results[r]]) for k in ('valid','test','after')), spread([o['seconds']/o['updates']*1e3 for o in results[r]], '.1f')] for r in rows]
    table([name, 'validation', 'test', 'test after 100 steps', 'ms an update'], cells)
    alike = [r for r in rows if not ROWS[r].n_past] or rows # with known outputs, other steps count
    best = min(alike, key=lambda r: statistics.median(o['valid'] for o in results[r]))
    value,(whole,short) = statistics.median(o['test'] for o in results[best]),PAPER[name]
    print(f'\nChosen on validation: {best}, test {value:.3f}; the paper has {whole} at best, {short} with windows of 100.\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--updates', type=int, default=UPDATES)
    parser.add_argument('--data', nargs='+', default=list(FILES), choices=list(FILES))
    parser.add_argument('--only', nargs='+', default=list(ROWS), choices=list(ROWS))
    parser.add_argument('--schedules', nargs='+', default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument('--path', help='folder of the files; default: burn_in in that of TBPTT_DATA')
    parser.add_argument('--json', help='file for all results')
    args = parser.parse_args()
    folder = Path(args.path or Path(os.environ.get('TBPTT_DATA', '.'))/'burn_in')
    if not folder.is_dir(): raise SystemExit(f'{folder} is not there: give --path, or set TBPTT_DATA.')
    torch.set_num_threads(1)
    headline('one thread', f'LSTM-8, batches of {BS}', f'{args.updates} updates', f'median (range) of {len(args.seeds)} seeds')
    cases = [(name, row, schedule) for schedule in args.schedules for name in args.data for row in args.only]
    results = {case: [] for case in cases}
    for seed in args.seeds: # they take turns
        for case in cases: results[case].append(run(case, seed, args.updates, folder))
    for schedule in args.schedules:
        print(f'**{schedule}**\n')
        for name in args.data: report(name, {row: results[name, row, schedule] for row in args.only}, args.only)
    save(args, {' | '.join(case): o for case,o in results.items()})

if __name__ == '__main__': main()
