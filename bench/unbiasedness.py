"""Is the mean gradient of randomly truncated backpropagation the full one? An LSTM, one window, many draws of the cuts

The gradient of the summed loss of one window, with respect to the recurrent weights, is averaged over draws, and compared with that of plain PyTorch
without truncation. An unbiased scheme is as far from it as the scatter of its draws lets expect; one that cuts at random and leaves gradients as they
are, or that cuts every ten steps, is farther. Exits with an error where that is not so.
"""
import argparse, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from torch import nn
from tbptt_fastai.all import *
from harness import headline, save

WIN,UNITS,MEAN = 60,8,10 # steps of the window, hidden units, steps of a sub-window in the mean


class NotReweighted(RandomUnbiased):
    "The same cuts at random, with gradients as they are"
    def plan(self, *args): return [o._replace(cuts=()) for o in super().plan(*args)]

class WindowGradients(Callback):
    "The gradient of each window's recurrent weights; no step is taken"
    order = 90
    def before_fit(self): self.windows = []
    def before_step(self):
        g = torch.cat([p.grad.flatten() for p in self.learn.model[0].parameters()])
        if self.dl.is_first: self.windows.append(torch.zeros_like(g))
        self.windows[-1] += g
        raise CancelStepException()


def problem(seed):
    "One window, of noise and its sum that is forgotten by 5 % a step; and a model that forgets 8 %"
    set_seed(seed)
    x = torch.randn(WIN, 2, dtype=torch.float64)
    y = torch.zeros(WIN, 1, dtype=torch.float64)
    for t in range(WIN): y[t] = .95*y[t-1]+x[t,0]
    rnn,head = nn.LSTM(2, UNITS, batch_first=True).double(),nn.Linear(UNITS, 1).double()
    nn.init.constant_(rnn.bias_ih_l0[UNITS:2*UNITS], 2.5)
    nn.init.constant_(rnn.bias_hh_l0[UNITS:2*UNITS], 0)
    return x,y,rnn,head

def full_gradient(x, y, rnn, head):
    "In plain PyTorch"
    loss = (head(rnn(x[None])[0])[0]-y).pow(2).sum()
    return torch.cat([o.flatten() for o in torch.autograd.grad(loss, [*rnn.parameters()])])

def draws(scheme, n, seed):
    "The gradients of so many passes over the window, `(n, weights)`, and the full one"
    x,y,rnn,head = problem(seed)
    dl = TbpttDL(Sequences([x]*n, [y]*n, dtype=torch.float64), bs=1, num_workers=0)
    seen = WindowGradients()
    learn = TbpttLearner(DataLoaders(dl, dl.new(Sequences([x], [y], dtype=torch.float64))), nn.Sequential(StatefulRNN(rnn), head),
                         truncation=scheme, loss_func=nn.MSELoss(reduction='sum'), opt_func=SGD, cbs=seen)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return torch.stack(seen.windows),full_gradient(x, y, rnn, head)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of window, weights and draws')
    parser.add_argument('--draws', type=int, default=1500)
    parser.add_argument('--json', help='file for all measurements')
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline('one thread', f'{WIN} steps, LSTM-{UNITS}, float64; {args.draws} draws; errors relative to the norm of the full gradient')
    print('| seed | truncation | error of the mean gradient | Monte-Carlo error to expect | ratio | time of a draw [ms] |\n| --: | --- | --: | --: | --: | --: |')
    schemes = {f'fixed {MEAN}': Fixed(MEAN), f'random, not reweighted, {MEAN}, 6': NotReweighted(MEAN, 6), f'unbiased {MEAN}, 6': RandomUnbiased(MEAN, 6),
               f'unbiased {MEAN}, 4': RandomUnbiased(MEAN, 4), f'unbiased {MEAN}, 6, blocks of 5': RandomUnbiased(MEAN, 6, block=5)}
    runs,wrong = [],[]
    for seed in args.seeds:
        for name,scheme in schemes.items():
            start = time.time()
            n = args.draws if scheme.random else 1
            g,full = draws(scheme, n, seed)
            error = ((g.mean(0)-full).norm()/full.norm()).item()
            chance = ((g.var(0).sum()/n)**.5/full.norm()).item() if scheme.random else 0.
            unbiased = type(scheme) is RandomUnbiased
            if unbiased and error>=3*chance: wrong.append(f'seed {seed}, {name}: error {error:.3g}, expected less than 3 x {chance:.3g}')
            if not unbiased and not error>max(5*chance, .1): wrong.append(f'seed {seed}, {name}: error {error:.3g}; expected a bias')
            runs.append(dict(seed=seed, scheme=name, error=error, chance=chance, seconds=time.time()-start))
            shown = f'{chance:.3f} | {error/chance:.1f} | {1e3*runs[-1]["seconds"]/n:.0f}' if scheme.random else '– | – | –'
            print(f'| {seed} | {name} | {error:.3f} | {shown} |', flush=True)
    save(args, runs)
    if wrong: raise SystemExit('\n'+'\n'.join(wrong))

if __name__ == '__main__': main()
