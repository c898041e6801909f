"""What does a training step cost, against the same loop written by hand?

Every contender trains the same first weights for an epoch of the same windows, drawn at random, with Adam, a flat and then falling learning rate and gradient
clipping. They take turns, so that what else the machine does meets all of them; a ratio is that of one turn. Loading is included, validation is not.
"""
import argparse, json, platform, statistics
from collections import Counter
from step_loops import CASES, CONTENDERS, SUB, WIN, Work
import fastai, torch


def same_work(work, make):
    "Train with every training step counted, and check that there are as many as there should be, of the right shape"
    model,run = make(work)
    shapes,grads = Counter(),[]
    model.register_forward_pre_hook(lambda m,args: shapes.update([tuple(args[0].shape)] if m.training else []))
    next(model.parameters()).register_post_accumulate_grad_hook(grads.append)
    run()
    if shapes!={(work.bs,SUB,1): work.n_steps} or len(grads)!=work.n_steps: raise AssertionError(f'{shapes}, {len(grads)} backward passes; expected {work.n_steps}')

def compare(work, contenders, repeats):
    "Turns of all contenders, one after the other, and the error that each of them arrives at"
    for make in contenders.values(): same_work(work, make)
    runs = {name: [] for name in contenders}
    for i in range(repeats):
        for name,make in contenders.items(): # interleaved
            torch.manual_seed(i)
            model,run = make(work)
            seconds,cpu = run()
            runs[name].append(dict(seconds=seconds, cpu=cpu, error=work.error(model)))
    return runs

def spread(values, form='.2f'): return f'{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})'

def show(case, work, runs):
    print(f'{case}, sub-window {SUB}, window {WIN}: {work.n_steps} steps a turn\n')
    print('| loop | ratio | ratio of processor time | time of a step [ms] | validation L1 after the epoch [mV] |\n| --- | --: | --: | --: | --: |')
    first,*_ = runs.values()
    for name,seen in runs.items():
        ratios = [[o[k]/f[k] for o,f in zip(seen, first)] for k in ('seconds','cpu')]
        print(f"| {name} | {' | '.join(map(spread, ratios))} | {spread([1e3*o['seconds']/work.n_steps for o in seen])} | {spread([o['error'] for o in seen], '.1f')} |")
    print()


def main(contenders=CONTENDERS, versions=''):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, nargs='+', default=[0, 1], help='0: LSTM-40; 1: LSTM-128')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--path', help='cache of nonlinear_benchmarks')
    parser.add_argument('--json', help='file for all measurements')
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f'{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}{versions}; one thread; median (range) of {args.repeats}\n')
    res = {}
    for case in [list(CASES)[i] for i in args.cases]:
        work = Work(**CASES[case], path=args.path)
        res[case] = compare(work, contenders, args.repeats)
        show(case, work, res[case])
    if args.json:
        with open(args.json, 'w') as f: json.dump(res, f, indent=1)

if __name__ == '__main__': main()
