"""How well does an LSTM-32 identify the recorded Wiener-Hammerstein system? Windows that take turns, chosen on validation

The 100,000 training steps are split: the first 85,000 to train on, the last 15,000 for validation. The test has 78,800 steps, of which the first 50 do not count,
as published.
"""
import os
from pathlib import Path
from recipe import *

PUBLISHED = 'GRU 3.97, LSTM 4.45, DT-SUBNET .241 mV (Champneys et al. 2024, arXiv 2405.10779)'
ROWS = {
    'LSTM-32, sub-windows of 100 in windows of 1000': dict(truncation=Fixed(100)),
    'LSTM-32, the same, 16 in flight': dict(truncation=Interleaved(100, 16)),
}

def load(path):
    import nonlinear_benchmarks as nb
    train,test = nb.WienerHammerBenchMark(dir_placement=path)
    return (train.u[:85_000], train.y[:85_000]), (train.u[85_000:], train.y[85_000:]), (test.u, test.y)

def run(row, seed, updates, data, look):
    (u,y),valid,test = data
    set_seed(seed)
    scales = Scales(u, y)
    train = TbpttDL(SequenceWindows(*([o] for o in scales(u, y)), win_sz=1000, stp_sz=10), bs=64, shuffle=True, drop_last=True, num_workers=0)
    in_one = TbpttDL(SequenceWindows(*([o] for o in scales(*valid)), win_sz=len(valid[0])), bs=1, num_workers=0)
    model = Net(nn.LSTM(1, 32, batch_first=True))
    learn,best,seconds = fitted(DataLoaders(train, in_one), model, updates, 3e-3, **ROWS[row])
    res = dict(valid=1e3*rmse(predicted(model, scales, valid[0]), valid[1]), seconds=seconds)
    return res | (dict(test=1e3*rmse(predicted(model, scales, test[0]), test[1])) if look else {})

def main():
    args = arguments(__doc__, 30_000).parse_args()
    path = args.path or Path(os.environ.get('TBPTT_DATA', '.'))/'nlb_cache'
    torch.set_num_threads(1)
    headline('one thread', f'{args.updates} updates', f'seeds {args.seeds}', 'median (range)', packages=('nonlinear_benchmarks',))
    data,results = load(path),{name: [] for name in args.only or ROWS}
    for seed in args.seeds: # they take turns
        for name,rs in results.items(): rs.append(run(name, seed, args.updates, data, args.look))
    keys = ['valid', *(['test'] if args.look else [])]
    table(['training', *(f'{o} [mV]' for o in keys), 'time [s]'],
        [[name, *(spread([r[k] for r in rs]) for k in keys), spread([r['seconds'] for r in rs], '.0f')] for name,rs in results.items()])
    print(f'\nPublished: {PUBLISHED}')
    save(args, results, packages=('nonlinear_benchmarks',))

if __name__ == '__main__': main()
