"""What does it cost to read many sequences of unequal length, sub-window by sub-window, with every step once?

An epoch of a `StreamDL` without a model, beside a gather of the very same blocks from one flat array, which is the least that any loader has to do, and
beside what one would write with PyTorch: a `DataLoader` that pads batches of whole sequences (`pad_sequence`) or packs them (`pack_sequence`), cut in
sub-windows; a packed batch has to be cut before it is packed. Beside these stands the `TimeSeriesDataSet` of pytorch-forecasting, where that is installed
(`pip install pytorch-forecasting`). Then how long loaders of up to a million sequences take to make, and their memory; and what is
gained by blocks of a few steps, between which sequences may begin inside a sub-window (`Fixed(64, block=16)`): fewer steps of padding, but shorter calls of the layer.
"""
import warnings
from importlib.util import find_spec
from itertools import islice
from time import perf_counter
import numpy as np, pandas as pd, torch
from harness import arguments, column, headline, in_process, ratios, save, spread, status, table, turns
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

SUB = 32
SETTINGS = {'10,000 of 50–500 steps, 64 rows': (10_000, 50, 500, 64), '10,000 of 50–500 steps, 512 rows': (10_000, 50, 500, 512),
            '100,000 of 10–100 steps, 512 rows': (100_000, 10, 100, 512)}
FORECASTING,FIRST = 'pytorch-forecasting, TimeSeriesDataSet',20 # blocks
SIZES = {'100,000': 100_000, '1,000,000': 1_000_000}


def sequences(n, least, most):
    rng = np.random.default_rng(0)
    lengths = rng.integers(least, most+1, n)
    ends = lengths.cumsum()[:-1]
    return [np.split(rng.standard_normal((lengths.sum(), 1)).astype(np.float32), ends) for _ in 'xy']

def stream(xs, ys, bs):
    from tbptt_fastai.loaders.streams import StreamDL
    from tbptt_fastai.sequences.windows import Sequences
    return StreamDL(Sequences(xs, ys), bs=bs, sub_seq_len=SUB)

def read_stream(dl):
    def epoch(): return sum(x.shape[0]*x.shape[1] for x,_ in dl.sub_windows())
    return epoch

def read_flat(dl, xs, ys):
    "The same blocks, whose places are known beforehand"
    begins = np.cumsum([len(o) for o in xs])-[len(o) for o in xs]
    flat = [torch.from_numpy(np.concatenate(o)) for o in (xs, ys)]
    places = [(np.where(b.n>0, begins[b.seq]+b.start, 0), b.n, b.steps) for b in dl.layout(SUB)]
    def gather(begin, n, steps):
        step = np.arange(steps)
        at = torch.from_numpy(np.minimum(begin[:,None]+step, len(flat[0])-1))
        batch = [o[at] for o in flat]
        if n.min()<steps:
            padding = torch.from_numpy(step>=n[:,None])[...,None]
            for o in batch: o.masked_fill_(padding, 0)
        return batch
    def epoch(): return sum(gather(*o)[0].shape[:2].numel() for o in places)
    return epoch

class Items(torch.utils.data.Dataset):
    def __init__(self, xs, ys): self.xs,self.ys = xs,ys
    def __len__(self): return len(self.xs)
    def __getitem__(self, i): return torch.from_numpy(self.xs[i]),torch.from_numpy(self.ys[i])

def read_padded(xs, ys, bs, pack=False):
    def collate(items): return [pad_sequence(o, batch_first=True) for o in zip(*items)],torch.tensor([len(x) for x,_ in items])
    dl = torch.utils.data.DataLoader(Items(xs, ys), bs, collate_fn=collate)
    def parts(batch, lengths):
        for a in range(0, batch[0].shape[1], SUB):
            left = (lengths-a).clamp(0, SUB)
            cut = [o[:,a:a+SUB] for o in batch]
            if pack: cut = [pack_padded_sequence(o[left>0], left[left>0], batch_first=True, enforce_sorted=False).data for o in cut]
            yield cut[0].shape[:2].numel() if not pack else len(cut[0])
    def epoch(): return sum(n for batch,lengths in dl for n in parts(batch, lengths))
    return epoch

def parts_of_groups(xs, ys):
    "A `TimeSeriesDataSet` has a window from each step of a group on; those from every `SUB`th step on hold every step once"
    from pytorch_forecasting import TimeSeriesDataSet
    n = np.array([len(o) for o in xs])
    at = np.concatenate([np.arange(o) for o in n])
    frame = pd.DataFrame(dict(group=np.repeat(np.arange(len(n)), n), at=at, x=np.concatenate(xs)[:,0], y=np.concatenate(ys)[:,0]))
    every = TimeSeriesDataSet(frame, 'at', 'y', ['group'], max_encoder_length=0, min_encoder_length=0, max_prediction_length=SUB,
        min_prediction_length=1, time_varying_known_reals=['x'], target_normalizer=None, scalers=dict(x=None))
    def is_part(o):
        steps = np.minimum(n[o.group.to_numpy(int)]-o.time_idx_first, SUB) # as many as there are
        return (o.time_idx_first%SUB==0)&(o.time_idx_last-o.time_idx_first+1==steps)
    return every.filter(is_part)

def read_forecasting(dl, xs, ys):
    "The same blocks: a sampler that knows the layout asks for a window for each row. Only the first blocks are read, as they take long"
    start = perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        parts = parts_of_groups(xs, ys)
    made,n_parts = perf_counter()-start,np.array([-(-len(o)//SUB) for o in xs])
    first,blocks = n_parts.cumsum()-n_parts,list(islice(dl.layout(SUB), FIRST))
    wanted = [(first[b.seq]+b.start//SUB)[b.n>0].tolist() for b in blocks]
    loader = parts.to_dataloader(train=False, batch_sampler=wanted, num_workers=0)
    def epoch(): return sum(x['decoder_cont'].shape[:2].numel() for x,_ in loader)
    epoch.share,epoch.made = sum(int(b.n.sum()) for b in blocks)/sum(map(len, xs)),made
    assert sum(int(x['decoder_lengths'].sum()) for x,_ in loader)==sum(int(b.n.sum()) for b in blocks)
    return epoch

def contenders(setting):
    n,least,most,bs = SETTINGS[setting]
    xs,ys = sequences(n, least, most)
    dl = stream(xs, ys, bs)
    each = {'StreamDL': read_stream(dl), 'flat gather of the same blocks': read_flat(dl, xs, ys),
            'DataLoader, pad_sequence': read_padded(xs, ys, bs), 'DataLoader, packed': read_padded(xs, ys, bs, True)}
    if find_spec('pytorch_forecasting'): each[FORECASTING] = read_forecasting(dl, xs, ys)
    return sum(map(len, xs)),each

def timed(epoch):
    "Seconds and steps run of an epoch; of one that is read in part, by that part"
    start,share = perf_counter(),getattr(epoch, 'share', 1)
    run = epoch()
    return dict(t=(perf_counter()-start)/share, run=run/share)

def made(n):
    "Seconds and MiB of the loaders of so many sequences, beside the data"
    from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
    xs,ys = sequences(n, 10, 100)
    before,start = status('VmRSS'),perf_counter()
    dls = SequenceDataLoaders.from_arrays(xs, ys, sub_seq_len=SUB, bs=512, device='cpu')
    t,rise = perf_counter()-start,status('VmRSS')-before
    peak = status('VmHWM')-before
    t_epoch = timed(read_stream(dls.train))['t']
    data = sum(o.nbytes for o in xs)*2/2**20
    return dict(t=t, rise=rise, peak=peak, data=data, bytes_each=(rise-data)*2**20/n, epoch=t_epoch)


BLOCKS = (64, 32, 16, 8)
MODELS = {"LSTM-40, 64 rows": (40, 64), "LSTM-128, 64 rows": (128, 64), "LSTM-128, 8 rows": (128, 8)}

def trained(model, block):
    "Seconds of an epoch of training in sub-windows of 64 steps, in which sequences begin every `block` steps"
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from tbptt_fastai.loaders.layout import Layout
    from tbptt_fastai.all import Fixed, StatefulRNN, TbpttLearner
    hidden,bs = MODELS[model]
    xs,ys = sequences(30*bs, 20, 199)
    dl = stream(xs, ys, bs)
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.lin = StatefulRNN(torch.nn.LSTM(1, hidden, batch_first=True)),torch.nn.Linear(hidden, 1)
        def forward(self, x): return self.lin(self.rnn(x))
    class Clock(Callback):
        def before_train(self): self.start = perf_counter()
        def after_train(self): self.t = perf_counter()-self.start
    torch.manual_seed(0)
    clock = Clock()
    learn = TbpttLearner(DataLoaders(dl, stream(xs[:1], ys[:1], 1)), Net(), truncation=Fixed(64, block=block), loss_func=torch.nn.L1Loss(), num_threads=1, cbs=clock)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return dict(t=clock.t, share=1-Layout(dl.dataset.lengths, bs, block).waste)


if __name__=='__main__':
    args = arguments(__doc__, repeats=5, one=dict(help='(one measurement)')).parse_args()
    torch.set_num_threads(1)
    if args.one:
        import json
        print(json.dumps(made(int(args.one))))
        raise SystemExit
    results = {}
    packages = ['pytorch-forecasting'] if find_spec('pytorch_forecasting') else []
    headline('one thread', f'sub-windows of {SUB} steps', f'median (range) of {args.repeats}', packages=packages)
    rows,made_in = [],{}
    for setting in SETTINGS:
        steps,each = contenders(setting)
        runs = turns(each, args.repeats, lambda name,_: timed(each[name]), warm_up=1)
        base = runs['flat gather of the same blocks']
        for name,o in runs.items():
            share = steps/o[0]['run']
            rows.append((setting, name, spread(column(o, 't'), '.2f'), spread(ratios(o, base, 't')), f'{share:.2f}'))
        results[setting] = runs
        if packages: made_in[setting] = each[FORECASTING].made
    table(['sequences', 'read by', 's an epoch', 'ratio to the gather', 'share of real steps'], rows, text=(0, 1))
    print()
    if packages: print('The TimeSeriesDataSet was made in', ', '.join(f'{t:.1f} s ({o})' for o,t in made_in.items()), end='\n\n')
    else: print('pytorch-forecasting is not installed: left out', end='\n\n')
    sizes = turns(SIZES, min(args.repeats, 3), lambda name,_: in_process(__file__, SIZES[name]))
    table(['sequences of 10–100 steps', 's to make the loaders', 's an epoch', 'data [MiB]', 'rise of resident memory [MiB]', 'beside one copy of the data, bytes a sequence'],
          [(name, spread(column(o, 't')), spread(column(o, 'epoch')), f"{o[0]['data']:.0f}", spread(column(o, 'rise'), '.0f'), spread(column(o, 'bytes_each'), '.0f'))
           for name,o in sizes.items()])
    print()
    rows = []
    for model in MODELS:
        runs = turns(BLOCKS, args.repeats, lambda block,_: trained(model, block), warm_up=1)
        results[model] = {str(k): o for k,o in runs.items()}
        for block,o in runs.items():
            rows.append((model, block, f"{o[0]['share']:.2f}", spread(column(o, 't')), spread(ratios(o, runs[BLOCKS[0]], 't'))))
    table(['model', 'a sequence may begin every … steps', 'share of real steps', 's an epoch of training', 'ratio'], rows)
    save(args, {**results, 'sizes': sizes, FORECASTING: made_in}, packages)
