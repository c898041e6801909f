"""Is the gradient bias that tbptt_find estimates at least as large as the one that truncation really has? The copy task, several networks

A network has to repeat ten symbols ten steps after it has seen them: C. Aicher, N. Foti and E. Fox, "Adaptively Truncating Backpropagation Through
Time to Control Gradient Bias" (UAI 2019, arXiv 1905.07473). It is trained as in copy_task.py, with K=10. Then the gradient of losses that reach back K
steps is compared with that of losses that reach back to the start of their window: for the weights of embedding and recurrent layers, on which
truncation acts, in float64. Exits with an error where an estimate is too small.
"""
import argparse, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from copy import deepcopy
import numpy as np, torch
from torch.nn.functional import cross_entropy
from copy_task import make_learner
from tbptt_fastai.all import *
from harness import headline, save, spread

WIN,LAGS = 200,100 # steps: of a window to measure on, of the longest lag
KS = [5, 10, 15, 20, 30]


def windows_of(learn):
    "Windows of the training data, in every phase of the task, to measure on"
    return TbpttDL(SequenceWindows(*learn.dls.train.dataset.arrays, win_sz=WIN, stp_sz=WIN-3), bs=64, shuffle=True, num_workers=0)

def state_gradients(model, x, y, states, s):
    "Gradient of the loss at step s with respect to the states k = 1, 2, ... steps before, `(lags, rows, units)`; step by step, apart from the library"
    state = tuple(o.clone().requires_grad_() for o in states[s-LAGS])
    seen = []
    for t in range(s-LAGS+1, s+1):
        seen += state
        out,state = model.rnn.rnn(model.embedding(x[:,t:t+1]), state)
    grads = torch.autograd.grad(cross_entropy(model.head(out[:,-1]), y[:,s], reduction='sum'), seen)
    return torch.stack([torch.cat([*h, *c], 1) for h,c in zip(grads[::2], grads[1::2])]).flip(0)

def measure(model, dl, ends):
    "Relative bias for each of KS: of the mean gradient, and of that of one step of one batch; and Aicher's bound, with both of its denominators"
    model = deepcopy(model).double().eval()
    rnn,params = model.rnn.rnn,[*model.embedding.parameters(), *model.rnn.parameters()]
    def gradient(x, y, state=None):
        out,_ = rnn(model.embedding(x), state)
        return torch.cat([o.flatten() for o in torch.autograd.grad(cross_entropy(model.head(out[:,-1]), y[:,-1]), params)])
    full,bias,of_one,state_grad,phi,n = 0,np.zeros(len(KS), object),np.zeros(len(KS)+1),0,0,0
    for x,y in dl:
        state,states = None,[]
        with torch.no_grad():
            for t in range(WIN): states.append(state := rnn(model.embedding(x[:,t:t+1]), state)[1])
        for s in ends:
            g = gradient(x[:,:s+1], y[:,:s+1])
            errors = [gradient(x[:,s-k+1:s+1], y[:,s-k+1:s+1], states[s-k])-g for k in KS]
            full,bias,of_one,n = full+g,[a+b for a,b in zip(bias, errors)],of_one+[float(o.norm()) for o in (*errors, g)],n+1
            by_lag = state_gradients(model, x, y, states, s)
            state_grad,phi = state_grad+by_lag.mean(1),phi+by_lag.norm(dim=2).mean(1).numpy()
    phi,norms = phi/n,(state_grad/n).cumsum(0).norm(dim=1).numpy()
    return dict(measured=[float(o.norm()/full.norm()) for o in bias], of_one_step=list(of_one[:-1]/of_one[-1]),
        aicher=aicher(phi, norms), sum_of_norms=aicher(phi, phi.cumsum()))

def aicher(phi, norms, tau=LAGS//10):
    "delta(K) as the paper has it: from tau on the straight line alone"
    beta,i = decay_rate(np.arange(1, LAGS+1), phi, tau),tau-1
    left = phi[i]*beta**np.arange(LAGS-i+1)/(1-beta)
    left = np.concatenate([left[0]+phi[:i][::-1].cumsum()[::-1], left])
    return [float(left[k-1]/np.max(norms-left[1:])) for k in KS]


def table(runs):
    "Medians and ranges over the seeds"
    print("\n| epochs | K [steps] | measured bias | tbptt_find | ratio | measured, one step | Aicher's bound | with a sum of norms |\n"+'| --: '*8+'|')
    for n_epoch in sorted({r['epochs'] for r in runs}):
        for i,k in enumerate(KS):
            seeds = [r for r in runs if r['epochs']==n_epoch]
            cells = [[r[o][i] for r in seeds] for o in ('measured','found','of_one_step','aicher','sum_of_norms')]
            cells.insert(2, [r['found'][i]/r['measured'][i] for r in seeds])
            print(f'| {n_epoch} | {k} | '+' | '.join(spread(o, '.2g') for o in cells)+' |')

def failures(runs):
    "What was expected, and is not so"
    def smaller(name, true='measured'): return [f"seed {r['seed']}, {r['epochs']} epochs, K={k}: {e:.3g} < {t:.3g}" for r in runs for k,e,t in zip(KS, r[name], r[true]) if e<t]
    res = [f'tbptt_find below the measured bias: {o}' for o in smaller('found')]
    res += [f'tbptt_find below the measured bias of one step: {o}' for o in smaller('found', 'of_one_step')]
    res += [f"Aicher's bound below the measured bias: {o}" for o in smaller('aicher')]
    return res if smaller('sum_of_norms') else [*res, 'A sum of norms gave no estimate below the measured bias; expected some']


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, nargs='+', default=[0, 10, 30], help='epochs after which to measure')
    parser.add_argument('--losses', type=int, default=4, help='steps of each window whose loss is measured')
    parser.add_argument('--json', help='file for all measurements')
    args = parser.parse_args()
    torch.set_num_threads(1)
    start,runs = time.time(),[]
    headline('one thread', f'{args.losses} losses in each of 1280 windows')
    print('| seed | epochs | perplexity | beta | suggested sub_seq_len [steps] |\n'+'| --: '*5+'|')
    for seed in args.seeds:
        learn = make_learner(10, seed)
        windows = windows_of(learn)
        train,trained = learn.dls,0
        for n_epoch in sorted(args.epochs):
            with learn.no_bar(), learn.no_logging():
                if n_epoch>trained: learn.fit(n_epoch-trained)
                perplexity,trained = float(np.exp(learn.validate()[0])),n_epoch
            learn.dls = DataLoaders(windows, windows)
            found = learn.tbptt_find(show=False)
            learn.dls = train
            run = dict(seed=seed, epochs=n_epoch, perplexity=perplexity, beta=found.beta, suggestion=found.suggestion)
            ends = np.linspace(LAGS, WIN-1, args.losses).round().astype(int)
            runs.append(dict(**run, found=[float(found.delta[k-1]) for k in KS], **measure(learn.model, windows, ends)))
            print(f'| {seed} | {n_epoch} | {perplexity:.3f} | {found.beta:.3f} | {found.suggestion} |', flush=True)
    table(runs)
    print(f'\n{time.time()-start:.0f} s')
    save(args, dict(K=KS, runs=runs))
    wrong = failures(runs)
    if wrong: raise SystemExit('\n'+'\n'.join(wrong))

if __name__ == '__main__': main()
