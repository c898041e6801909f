"""Does the memory of a training step depend on the length of the window?

Every figure comes from a process of its own, which trains an LSTM on a batch of windows and reads how far its resident memory rose
at most (Linux). Activations are what `tbptt_fastai.memory.activation_memory` counts; the window is the batch of inputs and targets.
"""
import argparse, json, platform, statistics, subprocess, sys

BS,HIDDEN,SUB = 16,40,100


def status(key):
    "A line of this process's memory status, in MiB"
    with open('/proc/self/status') as f: return next(int(line.split()[1]) for line in f if line.startswith(key))/1024


def one_run(win_sz, sub_seq_len):
    "Train for two epochs of one batch; print what that took, in MiB"
    import numpy as np, torch
    from fastai.callback.core import CancelEpochException, Callback
    from tbptt_fastai.data import SequenceDataLoaders
    from tbptt_fastai.learner import RNNLearner
    from tbptt_fastai.memory import activation_memory

    class NoValidation(Callback): # it would run whole windows; here training is measured
        order = 100
        def after_train(self): raise CancelEpochException()

    torch.set_num_threads(1)
    u = list(np.random.default_rng(0).standard_normal((BS, win_sz)).astype(np.float32))
    dls = SequenceDataLoaders.from_arrays(u, u, valid=(u, u), win_sz=win_sz, bs=BS, shuffle=False)
    learn = RNNLearner(dls, hidden_size=HIDDEN, sub_seq_len=sub_seq_len, cbs=NoValidation())
    before = status('VmRSS')
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    peak = status('VmHWM')-before
    activations = activation_memory(learn.model, torch.zeros(BS, sub_seq_len or win_sz, 1))/2**20
    print(json.dumps(dict(peak=peak, activations=activations, window=2*BS*win_sz*4/2**20)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--windows', type=int, nargs='+', default=[1000, 10_000, 100_000], help='steps of the window')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--json', help='file for all measurements')
    parser.add_argument('--one', type=int, nargs=2, help=argparse.SUPPRESS) # win_sz and sub_seq_len (0: none), in this process
    args = parser.parse_args()
    if args.one: return one_run(args.one[0], args.one[1] or None)
    import torch, fastai
    runs = {(w,k): [] for w in args.windows for k in (SUB,0)}
    for _ in range(args.repeats):
        for (w,k),seen in runs.items(): # interleaved
            res = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', str(w), str(k)], capture_output=True, text=True, check=True)
            seen.append(json.loads(res.stdout.splitlines()[-1]))
    print(f'{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}; one thread; '
          f'LSTM-{HIDDEN}, batch {BS}, sub-window {SUB}; median (range) of {args.repeats}\n')
    print('| window [steps] | training | rise of resident memory [MiB] | activations of a step [MiB] | window itself [MiB] |\n| --: | --- | --: | --: | --: |')
    for (w,k),seen in runs.items():
        peaks = [r['peak'] for r in seen]
        print(f"| {w:,} | {f'TBPTT, {k}' if k else 'full backpropagation'} | {statistics.median(peaks):.0f} ({min(peaks):.0f}–{max(peaks):.0f}) "
              f"| {seen[0]['activations']:.1f} | {seen[0]['window']:.1f} |")
    if args.json:
        with open(args.json, 'w') as f: json.dump([dict(win_sz=w, sub_seq_len=k, runs=seen) for (w,k),seen in runs.items()], f, indent=1)

if __name__ == '__main__': main()
