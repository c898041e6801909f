"""What does it cost to make loaders of a large data frame, against what pandas needs to sort it and to take its groups apart?

A frame of machines, times and three channels, its rows in the order of time, so that those of a machine are far apart. Each figure comes from a process of its own (Linux), which makes the frame, and
says what was done with it took and how far resident memory rose at most.
"""
import json, sys
from harness import arguments, column, headline, in_process, ratios, save, spread, status, table, turns

WAYS = dict(loaders='SequenceDataLoaders.from_df', groups='pandas: sort, and each group', count='pandas: sort, and count')


def frame(rows, groups):
    import numpy as np, pandas as pd
    rng = np.random.default_rng(0)
    steps = rows//groups
    return pd.DataFrame(dict(machine=np.tile(np.arange(groups), steps), time=np.repeat(np.arange(steps), groups),
        **{name: rng.normal(size=steps*groups) for name in 'abc'}))

def loaders(df):
    import torch
    from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
    torch.set_num_threads(1)
    return lambda: SequenceDataLoaders.from_df(df, ['a','b'], 'c', group='machine', time='time', sub_seq_len=32, bs=512)

def groups(df): return lambda: [o for _,o in df.sort_values(['machine','time']).groupby('machine')]
def count(df): return lambda: df.sort_values(['machine','time']).groupby('machine').size()

def one(way, rows, n_groups):
    "Seconds, and MiB"
    from time import perf_counter
    df = frame(rows, n_groups)
    run = globals()[way](df) # with its imports
    before,start = status('VmRSS'),perf_counter()
    made = run()
    return dict(seconds=perf_counter()-start, peak=status('VmHWM')-before, left=status('VmRSS')-before, frame=df.memory_usage().sum()/2**20, n=len(made) if way=='groups' else n_groups)

def main():
    args = arguments(__doc__, 3, rows=dict(type=int, default=10_000_000), groups=dict(type=int, default=100_000)).parse_args()
    runs = turns(WAYS, args.repeats, lambda way,_: in_process(__file__, way, args.rows, args.groups))
    headline(f'{args.rows:,} rows of {args.groups:,} groups, {runs["loaders"][0]["frame"]:.0f} MiB', f'median (range) of {args.repeats}', packages=['pandas'])
    rows = [(name, spread(column(runs[o], 'seconds'), '.1f'), spread(ratios(runs[o], runs['groups'], 'seconds')), spread(column(runs[o], 'peak'), '.0f'),
        spread(column(runs[o], 'left'), '.0f')) for o,name in WAYS.items()]
    table(['of the frame', 's', 'ratio to each group', 'peak above the frame [MiB]', 'left of it [MiB]'], rows)
    save(args, runs, ['pandas'])

if __name__=='__main__':
    if '--one' in sys.argv: print(json.dumps(one(sys.argv[2], *map(int, sys.argv[3:]))))
    else: main()
