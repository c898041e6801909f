"""Can truncated backpropagation learn where short gradients have the wrong sign? Influence balancing, with four ways of truncation

A parameter pushes ten units of a linear chain up and thirteen down; the loss sees the first unit, on which the thirteen act late but more in all. The
experiment is that of C. Tallec and Y. Ollivier, "Unbiasing Truncated Backpropagation Through Time" (2017, arXiv 1705.08209). Two questions: what the
mean gradient of a step is while the parameter is held at 1/2, where the full gradient is 24; and where training ends, when the best parameter is -1/6.
Exits with an error where an answer is not the expected one.
"""
import argparse, statistics, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from torch import nn
from tbptt_fastai.all import *
from harness import headline, save

BEST,FULL,BURN_IN = -1/6,24.,200 # BURN_IN: first steps of a window whose loss does not count, until the state is at rest


class InfluenceBalancing(nn.Module):
    "23 units `s <- A s + theta p`, of which the first is seen; the input is not read"
    def __init__(self, theta=.5):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.register_buffer('A', (.5*torch.eye(23)+.5*torch.diag(torch.ones(22), 1)).double().T.contiguous())
        self.register_buffer('p', torch.tensor([1.]*10+[-1.]*13, dtype=torch.float64))

    def forward(self, x, s):
        if s is None: s = x.new_zeros(len(x), 23)
        out,push = [],self.theta*self.p
        for _ in range(x.shape[1]):
            s = torch.addmm(push, s, self.A)
            out.append(s[:,:1])
        return torch.stack(out, 1),s

class NotReweighted(RandomUnbiased):
    "The same cuts at random, with gradients as they are"
    def plan(self, *args): return [o._replace(cuts=()) for o in super().plan(*args)]

class HalfSquares(nn.Module):
    "Their sum, which is not weighed by the length of a sub-window"
    reduction = 'sum'
    def forward(self, pred, target): return (pred-target).pow(2).sum()/2

class MeanGradient(Callback):
    "Gradients are added up for each window, and no step is taken"
    order = 90
    def before_fit(self): self.sums = []
    def before_step(self):
        if self.dl.is_first: self.sums.append(0.)
        self.sums[-1] += self.learn.model.rnn.theta.grad.item()
        raise CancelStepException()

class InverseSquareRoot(Callback):
    "A learning rate of 1e-3/sqrt(1+t), t in time steps"
    def before_step(self): self.opt.set_hyper('lr', 1e-3/(1+self.dl.sub_window.stop)**.5)


def fit(scheme, seed, steps, cbs, n_windows=1, n_skip=0):
    "The parameter after one epoch on windows of so many steps"
    set_seed(seed)
    dls = DataLoaders(*(TbpttDL(Sequences(*[[torch.full((n, 1), o, dtype=torch.float64)]*m for o in (0,1)], dtype=torch.float64), bs=1, num_workers=0) for n,m in ((steps,n_windows), (n_skip+1,1))))
    learn = TbpttLearner(dls, StatefulRNN(InfluenceBalancing()), truncation=scheme, n_skip=n_skip, loss_func=HalfSquares(), opt_func=SGD, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn.model.rnn.theta.item()

def mean_gradient(scheme, n_windows=20, steps=5000):
    "Of a step, once the state is at rest; and its standard error over the windows"
    total = MeanGradient()
    fit(scheme, 0, BURN_IN+steps, total, n_windows, BURN_IN)
    means = [o/steps for o in total.sums]
    return statistics.mean(means),statistics.stdev(means)/n_windows**.5

def expected(scheme):
    "The mean gradient in closed form: a step that comes j steps after a cut has that of the j+1 last pushes"
    if type(scheme) is RandomUnbiased: return FULL
    m = InfluenceBalancing()
    pushes,s = [],m.p
    for _ in range(5000):
        pushes.append(s[0])
        s = s@m.A
    since_cut = -4*torch.stack(pushes).cumsum(0) # -4: the first unit's distance from its target
    if isinstance(scheme, Fixed): return since_cut[:scheme.sub_seq_len].mean().item()
    uncut = torch.tensor([1.]+[1-scheme.probability(n) for n in range(1, 5000)]).double().cumprod(0)
    return ((since_cut*uncut).sum()/uncut.sum()).item()

def table_of_gradients():
    "Prints it; returns what was measured"
    print('| truncation | mean gradient of a step | expected |\n| --- | --: | --: |')
    res = {}
    for name,scheme in SCHEMES.items():
        start = time.time()
        g,error = mean_gradient(scheme)
        res[name] = dict(gradient=g, error=error, expected=expected(scheme), seconds=time.time()-start)
        print(f"| {name} | {g:.2f}{f' ± {error:.2f}' if scheme.random else ''} | {res[name]['expected']:.2f} |", flush=True)
    return res

def table_of_trainings(seeds, steps):
    "Prints it; returns where each training ended"
    print(f'\n| truncation, {steps:,} steps | trainings | diverged | theta | loss at rest, largest | time of one [s] |\n| --- | --: | --: | --: | --: | --: |')
    res = {}
    for name in TRAINED:
        start,scheme = time.time(),SCHEMES[name]
        of_scheme = seeds if scheme.random else [0]
        thetas = [fit(scheme, seed, steps, [InverseSquareRoot(), TerminateOnNaNCallback()]) for seed in of_scheme]
        ends = [o for o in thetas if abs(o)<1e6]
        res[name] = dict(thetas=thetas, diverged=len(thetas)-len(ends), seconds=(time.time()-start)/len(thetas))
        shown = f'{statistics.median(ends):.4f} | {max(18*(o-BEST)**2 for o in ends):.1g}' if ends else '– | –'
        print(f"| {name} | {len(thetas)} | {res[name]['diverged']} | {shown} | {res[name]['seconds']:.0f} |", flush=True)
    return res

def failures(gradients, trainings):
    "What was expected, and is not so"
    res = [f"{name}: mean gradient {o['gradient']:.3f}, expected {o['expected']:.3f}" for name,o in gradients.items() if abs(o['gradient']-o['expected'])>3*o['error']+1e-6]
    def end(name, ok, what): res.extend(f'{name}: theta is {o:.6g}; expected {what}' for o in trainings[name]['thetas'] if not ok(o))
    for name in ('fixed 10', 'random, not reweighted'): end(name, lambda o: not abs(o)<1e6, 'it to diverge')
    end('fixed 100', lambda o: abs(o-3.14)<.01, '3.14')
    end('fixed 200', lambda o: abs(o+.1666)<1e-4, '-.1666')
    end('unbiased 16, 6', lambda o: 18*(o-BEST)**2<1e-18, '-1/6, with a loss below 1e-18')
    return res

SCHEMES = {**{f'fixed {k}': Fixed(k) for k in (10, 100, 200)}, 'random, not reweighted': NotReweighted(16, 6), 'unbiased 16, 6': RandomUnbiased(16, 6), 'unbiased 16, 4': RandomUnbiased(16, 4)}
TRAINED = [o for o in SCHEMES if o!='unbiased 16, 4']

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(5)), help='of trainings with random truncation')
    parser.add_argument('--steps', type=int, default=100_000, help='of a training')
    parser.add_argument('--json', help='file for all measurements')
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline('one thread', 'theta held at 1/2 in 20 windows of 5000 steps, ± standard error', f'trained from there with seeds {args.seeds}')
    gradients,trainings = table_of_gradients(),table_of_trainings(args.seeds, args.steps)
    save(args, dict(gradients=gradients, trainings=trainings))
    wrong = failures(gradients, trainings)
    if wrong: raise SystemExit('\n'+'\n'.join(wrong))

if __name__ == '__main__': main()
