"""The example of the page on costs, on the recorded Silverbox: full backpropagation and TBPTT, several seeds

Validation runs whole windows of 500 steps from the initial state, without washout: the error is mostly that of each window's
first steps, where no model can know the state.
"""
import argparse, statistics, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from tbptt_fastai.all import *
from harness import headline, spread


def one_run(sub_seq_len, seed, path):
    "Validation loss [V], RMSE [V] and seconds of ten epochs"
    set_seed(seed)
    dls = create_dls_silverbox(bs=16, win_sz=500, stp_sz=10, sub_seq_len=sub_seq_len, path=path)
    lrn = RNNLearner(dls, rnn_type='lstm', hidden_size=40, sub_seq_len=sub_seq_len, metrics=[fun_rmse])
    start = time.perf_counter()
    with lrn.no_bar(), lrn.no_logging(): lrn.fit_flat_cos(n_epoch=10, lr=3e-3)
    seconds = time.perf_counter()-start
    with lrn.no_bar(): return [*lrn.validate(), seconds]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--path', help='cache of nonlinear_benchmarks')
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {None: [], 100: []}
    for seed in args.seeds:
        for sub_seq_len,seen in runs.items(): seen.append(one_run(sub_seq_len, seed, args.path)) # interleaved
    headline('one thread', f'seeds {args.seeds}', 'median (range)')
    print('| training | validation L1 [mV] | validation RMSE [mV] | time of ten epochs, ratio |\n| --- | --: | --: | --: |')
    full_seconds = statistics.median(s for *_,s in runs[None])
    for sub_seq_len,seen in runs.items():
        loss,rmse,seconds = ([f*r[i] for r in seen] for i,f in ((0,1e3), (1,1e3), (2,1/full_seconds)))
        cells = map(spread, (loss,rmse,seconds))
        print(f"| {f'TBPTT, sub-windows of {sub_seq_len}' if sub_seq_len else 'full backpropagation'} | {' | '.join(cells)} |")

if __name__ == '__main__': main()
