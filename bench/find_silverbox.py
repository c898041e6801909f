"""Does the sub_seq_len that tbptt_find suggests reach the error of full backpropagation? The recorded Silverbox, several seeds

One epoch is trained in sub-windows of 100, tbptt_find is asked, and training starts anew: with the suggestion, and with whole windows.
"""
import argparse, statistics, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from tbptt_fastai.all import *
from harness import headline


def learner(sub_seq_len, seed, path):
    set_seed(seed)
    dls = create_dls_silverbox(bs=16, win_sz=500, stp_sz=10, sub_seq_len=sub_seq_len, path=path)
    return RNNLearner(dls, rnn_type='lstm', hidden_size=40, sub_seq_len=sub_seq_len, metrics=[fun_rmse])

def rmse_of(sub_seq_len, seed, path, n_epoch):
    "Validation RMSE [V]"
    lrn = learner(sub_seq_len, seed, path)
    with lrn.no_bar(), lrn.no_logging(): lrn.fit_flat_cos(n_epoch=n_epoch, lr=3e-3)
    with lrn.no_bar(): return lrn.validate()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--bias', type=float, default=.1)
    parser.add_argument('--path', help='cache of nonlinear_benchmarks')
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline('one thread', f'{args.epochs} epochs', f'bias {args.bias}')
    print('| seed | suggested sub_seq_len [steps] | beta | RMSE, suggestion [mV] | RMSE, full backpropagation [mV] | ratio |\n| --: | --: | --: | --: | --: | --: |')
    ratios = []
    for seed in args.seeds:
        lrn = learner(100, seed, args.path)
        with lrn.no_bar(), lrn.no_logging(): lrn.fit(1, 3e-3)
        found = lrn.tbptt_find(bias=args.bias, show=False)
        part,full = (1e3*rmse_of(o, seed, args.path, args.epochs) for o in (found.suggestion, None))
        ratios.append(part/full)
        print(f'| {seed} | {found.suggestion} | {found.beta:.3f} | {part:.2f} | {full:.2f} | {part/full:.3f} |', flush=True)
    print(f'\nmedian ratio {statistics.median(ratios):.3f}')

if __name__ == '__main__': main()
