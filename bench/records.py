"""How well does an LSTM of 32 units identify three recorded systems? Trained on sub-windows, chosen on validation alone

Silverbox, Wiener-Hammerstein and the cascaded tanks of nonlinearbenchmark.org, with the training and test parts that are published. The last part of the training
data is held back for validation. Without `--look` the tests stay closed. As published, the first 50 steps of a test do not count.
"""
import argparse, os, statistics, tempfile, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from functools import partial
from pathlib import Path
from typing import NamedTuple
import numpy as np, torch
from tbptt_fastai.all import *
from harness import headline, save, spread, table
from systems import fit_best, in_one

SKIP = 50 # steps that are published not to count


class Data(NamedTuple):
    "A recorded system, in physical units"
    train:tuple # input and output, 1-D
    valid:tuple
    tests:dict # of such, by name
    unit:str # of the table
    per_volt:float # units in a volt

def _pair(o): return np.asarray(o.u, 'f8'),np.asarray(o.y, 'f8')
def _split(o, n): return tuple(a[:n] for a in o),tuple(a[n:] for a in o)

def silverbox(nb, path):
    train,tests = nb.Silverbox(dir_placement=path)
    tests = dict(zip(('multisine', 'arrow', 'arrow without extrapolation'), map(_pair, tests)))
    return Data(*_split(_pair(train), 50_000), tests, 'mV', 1e3)

def wiener_hammerstein(nb, path):
    train,test = nb.WienerHammerBenchMark(dir_placement=path)
    return Data(*_split(_pair(train), 85_000), dict(test=_pair(test)), 'mV', 1e3)

def cascaded_tanks(nb, path):
    train,test = nb.Cascaded_Tanks(dir_placement=path)
    return Data(*_split(_pair(train), 768), dict(test=_pair(test)), 'V', 1.)

LOAD = {'Silverbox': silverbox, 'Wiener-Hammerstein': wiener_hammerstein, 'cascaded tanks': cascaded_tanks}
PUBLISHED = {
    'Silverbox': 'LSTM 1.50, 2.68, .960; GRU 1.49, –, .947; optimised-cell LSTM –, 2.38, –; DT-SUBNET .36, 1.4, .32 mV',
    'Wiener-Hammerstein': 'GRU 3.97, LSTM 4.45, DT-SUBNET .241 mV',
    'cascaded tanks': 'GRU .396, LSTM .490, grey box .191 V'}


class Recipe(NamedTuple):
    "How a model is trained"
    scheme:object=Fixed(100)
    win_sz:int=1000 # steps
    stp_sz:int=10 # steps between two windows
    bs:int=64
    lr:float=3e-3
    hidden:int=32
    layer:type=nn.LSTM
    n_past:int=0 # first steps whose outputs the first state is estimated from
    updates:int=60_000
    wd:float=0.

OURS = Recipe(scheme=Interleaved(Overlap(20, 100), 16))
TANKS = Recipe(win_sz=450, stp_sz=1, bs=32, lr=1e-3, n_past=SKIP, updates=4000, wd=.3)
RECIPES = {
    'Silverbox': {'sub-windows of 100': Recipe(), 'Overlap(20, 100), 16 in flight': OURS},
    'Wiener-Hammerstein': {'sub-windows of 100': Recipe(), 'Overlap(20, 100), 16 in flight': OURS},
    'cascaded tanks': {
        'first state zero': TANKS._replace(n_past=0),
        'first state estimated from 50 steps': TANKS,
        'the same, Overlap(20, 100), 16 in flight': TANKS._replace(scheme=OURS.scheme),
    },
}


class Scales:
    "Input and output by the mean and the deviation of the training part"
    def __init__(self, u, y): self.values = [(o.mean(), o.std()) for o in (u, y)]
    def __call__(self, u, y): return [((o-m)/s).astype('f4')[:,None] for o,(m,s) in zip((u, y), self.values)]
    def output(self, y): return y*self.values[1][1]+self.values[1][0]

class Net(nn.Module):
    "A recurrent layer, and a linear one on its output"
    def __init__(self, recipe):
        super().__init__()
        initial = EncodedState(recipe.n_past, n_in=1, n_out=1) if recipe.n_past else None
        self.rnn = StatefulRNN(recipe.layer(1, recipe.hidden, batch_first=True), initial=initial)
        self.head = nn.Linear(recipe.hidden, 1)
    def forward(self, x): return self.head(self.rnn(x))

def learner(data, scales, recipe, folder):
    windows = SequenceWindows(*([o] for o in scales(*data.train)), win_sz=recipe.win_sz, stp_sz=recipe.stp_sz)
    train = TbpttDL(windows, bs=recipe.bs, shuffle=True, drop_last=True, num_workers=0)
    dls = DataLoaders(train, in_one(*scales(*data.valid)))
    adam = partial(FusedAdam, wd=recipe.wd)
    return TbpttLearner(dls, Net(recipe), loss_func=nn.MSELoss(), opt_func=adam, truncation=recipe.scheme, washout=0 if recipe.n_past else SKIP, grad_clip=1.,
                        path=folder, num_threads=1)

def rmse(learn, part, scales):
    "Root of the mean squared error of one pass, in volts, without the first steps"
    with learn.no_bar(): pred,_ = learn.get_preds(dl=in_one(*scales(*part)))
    return float(np.sqrt(np.mean((scales.output(pred[0,:,0].double().numpy())-part[1])[SKIP:]**2)))

def run(data, recipe, seed, look):
    set_seed(seed)
    scales = Scales(*data.train)
    with tempfile.TemporaryDirectory() as folder:
        learn = learner(data, scales, recipe, folder)
        _,seconds = fit_best(learn, recipe.updates, recipe.lr)
    parts = dict(validation=data.valid) | (data.tests if look else {})
    curve = [o[1]**.5 for o in learn.recorder.values]
    return {k: data.per_volt*rmse(learn, o, scales) for k,o in parts.items()} | dict(seconds=seconds, curve=curve)


def report(name, data, results):
    keys = [o for o in next(iter(results.values()))[0] if o not in ('seconds', 'curve')]
    table([name, *(f'{o} [{data.unit}]' for o in keys), 'time [s]'],
        [[row, *(spread([r[k] for r in rs], '.3f') for k in keys), spread([r['seconds'] for r in rs], '.0f')] for row,rs in results.items()])
    best = min(results, key=lambda o: statistics.median(r['validation'] for r in results[o]))
    print(f'\nChosen on validation: {best}. Published: {PUBLISHED[name]} (nonlinearbenchmark.org, Champneys et al. 2024).\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--data', nargs='+', default=list(LOAD), choices=list(LOAD))
    parser.add_argument('--only', nargs='+', help='some of the rows')
    parser.add_argument('--path', help='cache of nonlinear_benchmarks; default: nlb_cache in the folder of TBPTT_DATA')
    parser.add_argument('--look', action='store_true', help='also at the tests; without it, at the validation alone')
    parser.add_argument('--json', help='file for all results')
    args = parser.parse_args()
    import nonlinear_benchmarks as nb
    torch.set_num_threads(1)
    path = args.path or Path(os.environ.get('TBPTT_DATA', '.'))/'nlb_cache'
    headline('one thread', f'seeds {args.seeds}', 'median (range)', packages=('nonlinear_benchmarks',))
    everything = {}
    for name in args.data:
        data = LOAD[name](nb, path)
        rows = {k: r for k,r in RECIPES[name].items() if k in (args.only or RECIPES[name])}
        results = {k: [] for k in rows}
        for seed in args.seeds: # they take turns
            for k,recipe in rows.items(): results[k].append(run(data, recipe, seed, args.look))
        report(name, data, results)
        everything[name] = results
    save(args, everything, packages=('nonlinear_benchmarks',))

if __name__ == '__main__': main()
