"""What does a training step cost, against the same loop written by hand?

Every contender trains the same first weights for an epoch of the same windows, drawn at random, with Adam, a flat and then falling learning rate and gradient
clipping. They take turns, so that what else the machine does meets all of them; a ratio is that of one turn. Loading is included, validation is not.
Where each microsecond goes is what `step_profile.py` says, with the same loops.
"""
from collections import Counter
import torch
from harness import arguments, column, headline, ratios, save, spread, table, turns
from step_loops import CASES, CONTENDERS, SUB, WIN, Work


def same_work(work, make):
    "Train with every training step counted, and check that there are as many as there should be, of the right shape"
    model,run = make(work)
    shapes,grads = Counter(),[]
    model.register_forward_pre_hook(lambda m,args: shapes.update([tuple(args[0].shape)] if m.training else []))
    next(model.parameters()).register_post_accumulate_grad_hook(grads.append)
    run()
    if shapes!={(work.bs,SUB,1): work.n_steps} or len(grads)!=work.n_steps: raise AssertionError(f'{shapes}, {len(grads)} backward passes; expected {work.n_steps}')

def compare(work, contenders, repeats):
    "Time, and the error that each contender arrives at"
    for make in contenders.values(): same_work(work, make)
    def measure(name, i):
        torch.manual_seed(i)
        model,run = contenders[name](work)
        seconds,cpu = run()
        return dict(seconds=seconds, cpu=cpu, error=work.error(model))
    return turns(contenders, repeats, measure)

def show(case, work, runs):
    print(f'{case}, sub-window {SUB}, window {WIN}: {work.n_steps} steps a turn\n')
    base,*_ = runs.values()
    table(['loop','ratio','ratio of processor time','time of a step [ms]','validation L1 after the epoch [mV]'],
        [(name, spread(ratios(o, base, 'seconds')), spread(ratios(o, base, 'cpu')), spread(column(o, 'seconds', 1e3/work.n_steps)), spread(column(o, 'error'), '.1f')) for name,o in runs.items()])
    print()


def main(contenders=CONTENDERS, packages=()):
    parser = arguments(__doc__, 7, cases=dict(type=int, nargs='+', default=[0, 1], help='0: LSTM-40; 1: LSTM-128'), path=dict(help='cache of nonlinear_benchmarks'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline('one thread', f'median (range) of {args.repeats}', packages=packages)
    res = {}
    for case in [list(CASES)[i] for i in args.cases]:
        work = Work(**CASES[case], path=args.path)
        res[case] = compare(work, contenders, args.repeats)
        show(case, work, res[case])
    save(args, res, packages)

if __name__ == '__main__': main()
