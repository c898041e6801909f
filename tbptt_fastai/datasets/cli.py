"`tbptt-demo`: what is typed is checked here, before anything that takes seconds to import"
import sys
from math import isfinite
from pathlib import Path
from fastcore.basics import str_enum
from fastcore.script import call_parse, store_true
from tbptt_fastai import __version__

Data = str_enum('Data', 'duffing', 'silverbox')
RNN = str_enum('RNN', 'rnn', 'gru', 'lstm')
FIGURES = '.png','.svg','.pdf'


def check(lr, out, sub_seq_len, win_sz, **counts):
    "A `ValueError` that names the option and what it takes"
    for name,n in dict(counts, win_sz=win_sz, sub_seq_len=sub_seq_len).items():
        if n<1: raise ValueError(f"--{name.replace('_', '-')} is {n}; expected a whole number of at least 1.")
    if sub_seq_len>win_sz: raise ValueError(
        f"--sub-seq-len is {sub_seq_len}, but a window has {win_sz} steps (--win-sz). "
        f"Use at most {win_sz}, which is full backpropagation.")
    if not (lr>0 and isfinite(lr)): raise ValueError(f"--lr is {lr}; expected a learning rate above 0, such as 0.003.")
    if Path(out).suffix not in FIGURES: raise ValueError(
        f"--out is {out}; expected a name that ends in {', '.join(FIGURES)}.")
    if not Path(out).resolve().parent.is_dir(): raise ValueError(f"--out is {out}, in a folder that does not exist.")


@call_parse
def tbptt_demo(
    data:Data=Data.duffing, # A simulated oscillator, or the Silverbox recording (needs the extra 'benchmarks')
    path:str=None, # Cache of the recording; default: $TBPTT_DATA/nlb_cache, else that of nonlinear_benchmarks
    win_sz:int=500, # Time steps of a window
    stp_sz:int=20, # Time steps from one training window to the next
    sub_seq_len:int=100, # Time steps of a sub-window
    n_epoch:int=10, # Epochs of each training
    lr:float=3e-3, # Learning rate
    hidden_size:int=40, # Hidden units
    rnn_type:RNN=RNN.lstm, # Recurrent layer
    seed:int=0, # Seed of data, weights and order
    threads:int=1, # Threads of the CPU: small recurrent layers are fastest on one
    out:str='tbptt-demo.png', # Figure to write
    version:store_true=False, # Print the version, and do nothing else
):
    "Train one recurrent network twice, by full backpropagation and by truncated backpropagation through time, and compare"
    if version: return print(f'tbptt_fastai {__version__}')
    windows = dict(win_sz=win_sz, stp_sz=stp_sz, sub_seq_len=sub_seq_len)
    try:
        check(lr=lr, out=out, n_epoch=n_epoch, hidden_size=hidden_size, threads=threads, **windows)
        from tbptt_fastai.datasets.demo import compare
        rnn = dict(rnn_type=str(rnn_type), hidden_size=hidden_size)
        compare(str(data), path, n_epoch, lr, seed, threads, out, rnn, windows)
    except (ValueError, OSError, ImportError) as e: raise SystemExit(f'tbptt-demo: {e}') from None
    except KeyboardInterrupt as e:
        print(f'\ntbptt-demo: interrupted {e}'.rstrip(), file=sys.stderr)
        raise SystemExit(130) from None # as a shell reports it
