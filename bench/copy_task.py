"""How far must gradients go back, so that a network learns to repeat what it has seen ten steps before? The copy task, with two truncations

A network has to repeat ten symbols ten steps after it has seen them: C. Aicher, N. Foti and E. Fox, "Adaptively Truncating Backpropagation Through
Time to Control Gradient Bias" (UAI 2019, arXiv 1905.07473). Every K steps it is trained on the losses of these K, with gradients over the last 2K-1
steps, so that a loss reaches back over K to 2K-1 steps, its own included; the delay is 10. Without any memory the perplexity is exp(.45 ln 4) =
1.866: of twenty targets eleven are certain, and nine are one of four kinds. Exits with an error unless K=5 stays there, and K=10 is below 1.06 after
thirty epochs.
"""
import argparse, statistics, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np, torch
from torch import nn
from fastai.optimizer import SGD
from tbptt_fastai.all import *
from harness import headline, save

DELAY = 10 # steps
MEMORYLESS = float(np.exp(.45*np.log(4)))


def copy_task(rows, steps, rng):
    "Inputs and targets: a start symbol and nine others of four kinds, then ten blanks; each row begins somewhere in it"
    symbols = rng.integers(2, 6, (rows, steps//(2*DELAY)+1, DELAY))
    symbols[...,0] = 1
    blank = np.zeros_like(symbols)
    shift = rng.integers(0, 2*DELAY, rows)
    return [[row[s:s+steps] for row,s in zip(np.concatenate(o, 2).reshape(rows, -1), shift)] for o in ((symbols,blank), (blank,symbols))]

def make_learner(k, seed):
    "Its loaders have 64 rows of 4000 steps, and 64 of 1000 others for validation"
    set_seed(seed)
    rng = np.random.default_rng(seed)
    dls = DataLoaders(*(TbpttDL(Sequences(*copy_task(64, steps, rng)), bs=64, num_workers=0) for steps in (4000, 1000)))
    model = TextRNN(6, 50, 'lstm', hidden_size=50, num_layers=2, dropout=0.)
    for o in (model.embedding.weight, model.head.weight): nn.init.uniform_(o, -.1, .1) # small, as in PyTorch's example of a word language model
    nn.init.zeros_(model.head.bias)
    return TbpttLearner(dls, model, truncation=Overlap(k1=k, k2=2*k-1), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=k**.5, grad_clip=1/k)

def train(k, seed, n_epoch):
    "Perplexity of other data after each epoch, and seconds"
    learn,start = make_learner(k, seed),time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch)
    return dict(k=k, seed=seed, perplexity=[float(np.exp(o[1])) for o in learn.recorder.values], seconds=time.time()-start)

def failures(runs):
    "What was expected, and is not so: of K=5 in the median of the last ten epochs, as single ones go up and down; of K=10 after thirty"
    res = []
    for r in runs:
        seen,where = r['perplexity'],f"K={r['k']}, seed {r['seed']}"
        last = statistics.median(seen[-10:])
        if r['k']==5 and abs(last-MEMORYLESS)>.01: res.append(f'{where}: perplexity {last:.4f} in the last epochs, expected {MEMORYLESS:.3f} within .01')
        if r['k']==10 and len(seen)>=30 and seen[29]>=1.06: res.append(f'{where}: perplexity {seen[29]:.4f} after 30 epochs, expected below 1.06')
    return res


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ks', type=int, nargs='+', default=[5, 10], help='steps from one update to the next')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--json', help='file for all measurements')
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline('one thread', f'LSTM-50, two layers, batch 64, 4000 steps an epoch; without memory {MEMORYLESS:.3f}; seeds {args.seeds}'+'; median (range)'*(len(args.seeds)>1))
    shown = [o for o in (1, 5, 10, 20, 30, 60) if o<=args.epochs]
    print('| K [steps] | updates an epoch | '+' | '.join(f'perplexity after {o}' for o in shown)+' | time of an epoch [s] |\n'+'| --: '*(len(shown)+3)+'|')
    runs = []
    for k in args.ks:
        mine = [train(k, seed, args.epochs) for seed in args.seeds]
        runs += mine
        cells = [[r['perplexity'][o-1] for r in mine] for o in shown]+[[r['seconds']/args.epochs for r in mine]]
        formats = ['.3f']*len(shown)+['.1f']
        print(f'| {k} | {-(-4000//k)} | '+' | '.join(f'{statistics.median(o):{f}}'+(f' ({min(o):{f}}–{max(o):{f}})' if len(o)>1 else '') for o,f in zip(cells, formats))+' |', flush=True)
    save(args, runs)
    wrong = failures(runs)
    if wrong: raise SystemExit('\n'+'\n'.join(wrong))

if __name__ == '__main__': main()
