"""How well does an LSTM on a stream forecast the next count of ten series, against the last value, yesterday's, and a linear model?

Ten files of counts of tweets, one every five minutes for eight weeks (`Twitter_volume_*.csv` of the Numenta Anomaly Benchmark), are one data frame, a group each.
What is forecast is the logarithm of the next count, log(1+n). The last 15 % of each group are the test, the 15 % before them validation, of which the size and
the epoch are chosen; the test is looked at once, with these. Whoever forecasts may use all that was before.
"""
import io, os, tempfile, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from contextlib import redirect_stdout
from pathlib import Path
from time import perf_counter
import numpy as np, pandas as pd, torch
from fastai.callback.tracker import SaveModelCallback
from tbptt_fastai.all import *
from harness import arguments, column, headline, save, spread, table

DAY,HOUR = 288,12 # steps
VALID,TEST = .15,.15 # shares of each group
INPUTS = ['now','yesterday','sin','cos']
LINEAR = 'linear in two hours and yesterday'
SIZES = {'LSTM-32': 32, 'LSTM-64': 64}


def series(folder):
    "A row for each forecast: its inputs, what comes next, and whether the group's training, validation or test has it"
    def of(file):
        df = pd.read_csv(file, parse_dates=['timestamp'])
        log = np.log1p(df.value.astype('f4'))
        angle = 2*np.pi*(df.timestamp.dt.hour*60+df.timestamp.dt.minute)/1440
        out = pd.DataFrame(dict(ticker=file.stem.split('_')[-1], time=df.timestamp, now=log, yesterday=log.shift(DAY-1),
            sin=np.sin(angle).astype('f4'), cos=np.cos(angle).astype('f4'), hour=log.rolling(HOUR).mean(), next=log.shift(-1)))
        for lag in range(1, 24): out[f'before{lag}'] = log.shift(lag)
        out = out.dropna(ignore_index=True)
        at = (np.arange(len(out))+.5)/len(out)
        return out.assign(part=np.select([at<1-VALID-TEST, at<1-TEST], ['train','valid'], 'test'))
    return pd.concat(map(of, sorted(folder.glob('Twitter_volume_*.csv'))), ignore_index=True)

def linear(df):
    "Least squares on the last two hours, yesterday and the time of day; one model for each ticker"
    names = ['now','yesterday','sin','cos', *(f'before{lag}' for lag in range(1, 24))]
    def of(group):
        x = np.c_[group[names], np.ones(len(group))]
        weights = np.linalg.lstsq(x[group.part=='train'], group.next[group.part=='train'], rcond=None)[0]
        return pd.Series(x@weights, group.index)
    return pd.concat([of(o) for _,o in df.groupby('ticker')]).loc[df.index]

def errors(df, pred, part):
    "RMSE and mean absolute error of log(1+n), and the RMSE of each ticker"
    here = df.part==part
    error = (pred-df.next)[here]
    return dict(rmse=float((error**2).mean()**.5), mae=float(error.abs().mean()),
                each=((error**2).groupby(df.ticker[here]).mean()**.5).to_dict())

def trained(df, hidden, seed, epochs):
    "An LSTM of the epoch with the best validation, and the seconds that it took"
    set_seed(seed)
    start,seen = perf_counter(),df[df.part!='test']
    dls = SequenceDataLoaders.from_df(seen, x=INPUTS, y='next', group='ticker', time='time', valid_pct=VALID/(1-TEST),
        win_sz=7*DAY, sub_seq_len=DAY//4, bs=64, device='cpu')
    loaded,loss = perf_counter()-start,torch.nn.MSELoss()
    with tempfile.TemporaryDirectory() as folder:
        learn = RNNLearner(dls, rnn_type='lstm', hidden_size=hidden, loss_func=loss, grad_clip=1, num_threads=1, path=folder)
        start = perf_counter()
        with learn.no_bar(), learn.no_logging(), redirect_stdout(io.StringIO()):
            learn.fit_one_cycle(epochs, 1e-2, cbs=SaveModelCallback(fname='best'))
        return learn,dict(load=loaded, epoch=(perf_counter()-start)/epochs)


def shown(values): return spread(values, '.3f') if len(values)>1 else f'{values[0]:.3f}'

def main():
    more = dict(epochs=dict(type=int, default=60), path=dict(help='folder of the files; default: series in that of TBPTT_DATA'))
    args = arguments(__doc__, repeats=3, **more).parse_args()
    folder = Path(args.path or Path(os.environ.get('TBPTT_DATA', '.'))/'series')
    if not [*folder.glob('Twitter_volume_*.csv')]:
        raise SystemExit(f'{folder} has no Twitter_volume_*.csv: give --path, or set TBPTT_DATA.')
    torch.set_num_threads(1)
    df = series(folder)
    tickers = df.ticker.unique()
    headline('one thread', f'{len(tickers)} tickers, {len(df)} steps', f'{args.epochs} epochs', f'median (range) of {args.repeats} seeds')
    preds = {'last value': [df.now], "yesterday's": [df.yesterday], 'mean of the last hour': [df.hour], LINEAR: [linear(df)]}
    times = {}
    for name,hidden in SIZES.items():
        preds[name],times[name] = [],[]
        for seed in range(args.repeats):
            learn,t = trained(df, hidden, seed, args.epochs)
            with learn.no_bar(): preds[name].append(learn.predict_df(df.drop(columns='next')).next_pred)
            times[name].append(t)
    valid = {name: [errors(df, o, 'valid') for o in each] for name,each in preds.items()}
    chosen = min(SIZES, key=lambda o: np.median(column(valid[o], 'rmse')))
    test = {name: [errors(df, o, 'test') for o in each] for name,each in preds.items() if name==chosen or name not in SIZES}
    def of_ticker(name, o): return np.median([e['each'][o] for e in test[name]])
    rows = []
    for name in preds:
        tested,by_it = ['–']*3,[shown(column(valid[name], 'rmse')), spread(column(times[name], 'epoch')) if name in times else '–']
        if name in test:
            worse = '–' if name==chosen else sum(of_ticker(chosen, o)<of_ticker(name, o) for o in tickers)
            tested = [shown(column(test[name], 'rmse')), shown(column(test[name], 'mae')), worse]
        rows.append((name, by_it[0], *tested, by_it[1]))
    table(['forecast', 'validation RMSE', 'test RMSE', 'test mean absolute error', f'tickers on which {chosen} is better', 's an epoch'], rows)
    print(f"\nfrom_df: {spread([o['load'] for r in times.values() for o in r])} s")
    save(args, dict(valid=valid, test=test, times=times))

if __name__=='__main__': main()
