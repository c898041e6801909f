"What `tbptt-demo` does: the same network trained by full backpropagation and by TBPTT, a table and a figure"
import time, warnings
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings('ignore', '.torch.jit.script. is deprecated', FutureWarning) # said to fastai, on import

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from fastai.torch_core import set_seed
from matplotlib.figure import Figure

from tbptt_fastai.datasets.benchmarks import create_dls_duffing, create_dls_silverbox
from tbptt_fastai.learner import RNNLearner
from tbptt_fastai.instruments.activation import activation_memory
from tbptt_fastai.training.metrics import fun_rmse


class Run(NamedTuple):
    "What is shown of one training"
    name:str
    losses:list # mean absolute error on the validation windows after each epoch, in V
    rmse:float # after the last epoch, in V
    n_updates:int
    seconds:float # of training and validation
    memory:int # bytes that an update keeps for its backward pass
    pred:np.ndarray # of the validation window that is drawn, in V


def shown_window(dls):
    "The inputs and targets of a validation window that does not begin at rest"
    return dls.valid_ds[min(1, len(dls.valid_ds)-1)]


def train(name, dls, sub_seq_len, n_epoch, lr, seed, threads, **rnn) -> Run:
    "A training from the same weights, with the windows in the same order; `sub_seq_len=None` is full backpropagation"
    set_seed(seed)
    dls.train.rng.seed(seed)
    learn = RNNLearner(dls, sub_seq_len=sub_seq_len, metrics=fun_rmse, num_threads=threads, **rnn)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '(?s).*the weights are not finite') # `compare` says so
            learn.fit_flat_cos(n_epoch, lr)
    except KeyboardInterrupt:
        done = learn.recorder.values
        reached = f', where the validation MAE was {1e3*done[-1][1]:.3g} mV' if done else ''
        raise KeyboardInterrupt(f'in {name}, after {len(done)} of {n_epoch} epochs{reached}') from None
    seconds = time.perf_counter()-start
    values,n_updates = list(learn.recorder.values),len(learn.recorder.losses)
    memory = activation_memory(learn.model, dls.train.one_batch()[0][:,:sub_seq_len])
    with learn.no_bar(): pred = learn.get_preds(dl=dls.test_dl([shown_window(dls)]))[0]
    return Run(name, [v[1] for v in values], values[-1][2], n_updates, seconds, memory, pred[0,:,0].numpy())


def table(runs:list[Run]) -> str:
    "A row for each training"
    columns = {'MAE [mV]': [1e3*r.losses[-1] for r in runs], 'RMSE [mV]': [1e3*r.rmse for r in runs],
        'seconds': [r.seconds for r in runs], 'updates': [r.n_updates for r in runs],
        'activations per update [MiB]': [r.memory/2**20 for r in runs]}
    rows = pd.DataFrame(columns, index=[r.name for r in runs])
    return rows.to_string(formatters={'updates': '{:.0f}'.format}, float_format='{:.3g}'.format)


def figure(runs:list[Run], y:np.ndarray, dt:float) -> Figure:
    "The validation window `y` with the predictions for it and their errors, and the validation loss of each epoch"
    fig = plt.figure(figsize=(11, 5), layout='constrained')
    axs = fig.subplot_mosaic([['signal','loss'], ['error','loss']], width_ratios=[2,1], height_ratios=[3,2])
    seconds = np.arange(len(y))*dt
    axs['signal'].plot(seconds, 1e3*y, color='0.75', lw=3, label='target')
    for r,style in zip(runs, ('-','--')):
        axs['signal'].plot(seconds, 1e3*r.pred, lw=1, ls=style, label=r.name)
        axs['error'].plot(seconds, 1e3*(r.pred-y), lw=1, ls=style)
        axs['loss'].plot(range(1, len(r.losses)+1), 1e3*np.array(r.losses), ls=style, marker='.')
    axs['signal'].set(ylabel='y [mV]', title='a validation window; the model starts from zeros')
    axs['error'].set(xlabel='time [s]', ylabel='prediction − target [mV]')
    axs['loss'].set(xlabel='epoch', ylabel='mean absolute error [mV]', title='validation loss', ylim=(0, None))
    axs['loss'].xaxis.get_major_locator().set_params(integer=True)
    fig.legend(loc='outside lower center', ncols=3, frameon=False)
    return fig


def compare(data, path, n_epoch, lr, seed, threads, out, rnn, windows):
    "Train both ways, print the table, draw the figure"
    plt.switch_backend('agg')
    dls = create_dls_duffing(seed=seed, **windows) if data=='duffing' else create_dls_silverbox(path=path, **windows)
    steps,runs = windows['sub_seq_len'],[]
    try:
        for name,sub_seq_len in (('full backpropagation', None), (f'TBPTT, sub-windows of {steps}', steps)):
            print(f'\n{name}: {len(dls.train_ds)} windows of {dls.train_ds.win_sz} steps, {n_epoch} epochs')
            runs.append(train(name, dls, sub_seq_len, n_epoch, lr, seed, threads, **rnn))
    finally:
        for o in runs:
            if not np.isfinite(o.losses[-1]): print(f'\n{o.name} diverged: the validation MAE is {o.losses[-1]}. Use a smaller --lr.')
        if runs: print(f'\nOn the validation windows, after the last epoch:\n{table(runs)}')
    fig = figure(runs, shown_window(dls)[1][:,0].numpy(), dls.valid_ds.dt)
    fig.savefig(out, dpi=120)
    plt.close(fig)
    print(f'\nFigure: {Path(out).resolve()}')
