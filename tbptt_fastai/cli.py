"`tbptt-demo`: the same LSTM trained by full backpropagation and by TBPTT, side by side"
import time, warnings
from pathlib import Path

warnings.filterwarnings('ignore', '.torch.jit.script. is deprecated', FutureWarning) # said to fastai, on import

import matplotlib.pyplot as plt
import pandas as pd
import torch
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.basics import str_enum
from fastcore.script import call_parse

from tbptt_fastai.datasets import create_dls_duffing, create_dls_silverbox
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.memory import activation_memory
from tbptt_fastai.metrics import fun_rmse
from tbptt_fastai.rnn import rnn_types
from tbptt_fastai.truncation import check_steps

Data = str_enum('Data', 'duffing', 'silverbox')
RNN = str_enum('RNN', *rnn_types)


def train(dls, sub_seq_len, n_epoch, lr, seed, **rnn) -> tuple[Learner, dict]:
    "A fitted learner and its row of the table; `sub_seq_len=None` is full backpropagation"
    set_seed(seed)
    dls.train.rng.seed(seed) # both see the windows in the same order
    learn = RNNLearner(dls, sub_seq_len=sub_seq_len, metrics=fun_rmse, **rnn)
    start = time.perf_counter()
    learn.fit_flat_cos(n_epoch, lr)
    seconds = time.perf_counter()-start
    loss,rmse = learn.recorder.values[-1][1:]
    steps = len(learn.recorder.losses)
    x = dls.train.one_batch()[0][:,:sub_seq_len]
    return learn,{'valid loss [mV]': 1e3*loss, 'RMSE [mV]': 1e3*rmse, 'seconds': seconds, 'steps/s': steps/seconds,
                  'peak memory of a step [MiB]': activation_memory(learn.model, x)/2**20}


def plot(learners, path):
    "One validation window with predictions and their errors, and the validation loss of each epoch"
    ds = next(iter(learners.values())).dls.valid_ds
    x,y = ds[min(1, len(ds)-1)]
    time_axis,fig = torch.arange(len(y))*ds.dt,plt.figure(figsize=(11, 4.5), layout='constrained')
    axs = fig.subplot_mosaic([['signal','loss'], ['error','loss']], width_ratios=[2,1], height_ratios=[3,2])
    axs['signal'].plot(time_axis, 1e3*y[:,0], color='0.7', lw=3, label='target')
    for (name,learn),style in zip(learners.items(), ('-','--')):
        with learn.no_bar(): preds,_ = learn.get_preds()
        pred = preds[min(1, len(ds)-1),:,0]
        axs['signal'].plot(time_axis, 1e3*pred, lw=1, ls=style, label=name)
        axs['error'].plot(time_axis, 1e3*(pred-y[:,0]), lw=1, ls=style)
        axs['loss'].plot(range(1, len(learn.recorder.values)+1), [1e3*o[1] for o in learn.recorder.values], marker='.', label=name)
    axs['signal'].set(ylabel='y [mV]', title='a validation window; the model starts from zeros')
    axs['error'].set(xlabel='time [s]', ylabel='error [mV]')
    axs['loss'].set(xlabel='epoch', ylabel='mean absolute error [mV]', title='validation loss', ylim=(0, None))
    for name in ('signal','loss'): axs[name].legend(frameon=False, loc='upper right')
    fig.savefig(path, dpi=120)
    plt.close(fig)


def compare(data, path, n_epoch, lr, seed, out, rnn, **windows):
    "Train both ways, print the table, draw the figure"
    check_steps('n_epoch', n_epoch)
    if not lr>0: raise ValueError(f"lr is {lr}; expected a learning rate above 0.")
    if not Path(out).resolve().parent.is_dir(): raise ValueError(f"out is {out}, in a folder that does not exist.")
    if Path(out).suffix[1:] not in plt.gcf().canvas.get_supported_filetypes(): raise ValueError(f"out is {out}; expected a name that ends in .png, .svg or .pdf.")
    dls = create_dls_duffing(seed=seed, **windows) if data=='duffing' else create_dls_silverbox(path=path, **windows)
    learners,rows = {},{}
    for name,steps in (('full backpropagation',None), (f'TBPTT, {dls.train.sub_seq_len} steps',dls.train.sub_seq_len)):
        print(f'\n{name}: {len(dls.train_ds)} windows of {dls.train_ds.win_sz} steps, {n_epoch} epochs')
        learners[name],rows[name] = train(dls, steps, n_epoch, lr, seed, **rnn)
    print(f"\n{pd.DataFrame(rows).T.to_string(float_format='{:.3g}'.format)}\n\nMemory: what a step keeps for its backward pass.")
    plot(learners, out)
    print(f'Figure: {Path(out).resolve()}')


@call_parse
def tbptt_demo(
    data:Data=Data.duffing, # Simulated oscillator, or the Silverbox recording
    path:str=None, # Cache of the recording; default: $TBPTT_DATA/nlb_cache, else that of nonlinear_benchmarks
    win_sz:int=500, # Steps of a window
    stp_sz:int=20, # Steps from one training window to the next
    sub_seq_len:int=100, # Steps of a sub-window
    n_epoch:int=10, # Epochs of each training
    lr:float=3e-3, # Learning rate
    hidden_size:int=40, # Hidden units
    rnn_type:RNN=RNN.lstm, # Recurrent layer
    seed:int=0, # Seed of data, weights and order
    out:str='tbptt-demo.png', # Figure to write
):
    "Train one RNN twice, by full backpropagation and by TBPTT, and compare"
    plt.switch_backend('agg')
    try: compare(data, path, n_epoch, lr, seed, out, dict(rnn_type=str(rnn_type), hidden_size=hidden_size), win_sz=win_sz, stp_sz=stp_sz, sub_seq_len=sub_seq_len)
    except (ValueError, OSError, ImportError) as e: raise SystemExit(f'tbptt-demo: {e}') from None
