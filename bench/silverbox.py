"""How do truncation schemes compare on the recorded Silverbox? LSTM-16, the same number of updates for each, several seeds

The 50,000 training steps are 16 continuous streams; the state is carried, but for the two rows without it, whose windows begin at zero. The weights with the
best validation error are tested on the three test recordings, without their first 50 steps.
"""
import argparse, contextlib, io, statistics, tempfile, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from tbptt_fastai.all import *
from harness import headline, save, spread

TESTS = ('multisine', 'arrow_no_extrapolation', 'arrow')
SCHEMES = { # name: (scheme, steps of windows that begin at zero; None: streams)
    'sub-windows of 100': (Fixed(100), None), 'sub-windows of 20': (Fixed(20), None), 'sub-windows of 5': (Fixed(5), None),
    'Overlap(20, 100)': (Overlap(20, 100), None), 'Overlap(50, 100)': (Overlap(50, 100), None), 'RandomUnbiased(20, 6, block=10)': (RandomUnbiased(20, 6, block=10), None),
    'zero state, windows of 100': (None, 100), 'zero state, windows of 20': (None, 20),
}

def loaders(data, scheme, win_sz):
    "Streams, or windows that begin at zero; validation in 16 pieces that begin at zero, with a washout"
    (u,y),(uv,yv) = data
    rows = lambda o: list(torch.as_tensor(o[:len(o)//16*16]).view(16, -1, 1))
    valid = StreamDL(Sequences(rows(uv), rows(yv)), bs=16, sub_seq_len=len(uv)//16)
    if win_sz is None: return DataLoaders(StreamDL(Sequences(rows(u), rows(y)), bs=16, sub_seq_len=scheme.block), valid)
    return DataLoaders(TbpttDL(SequenceWindows(rows(u), rows(y), win_sz=win_sz, stp_sz=win_sz), bs=16, shuffle=True, num_workers=0), valid)

class StreamWashout(Callback):
    "Validation without the first 50 steps of each piece, where training has no washout"
    order = TbpttResetCB.order-.5
    def before_validate(self): self.learn.tbptt_reset_cb.n_skip = 50
    def after_validate(self): self.learn.tbptt_reset_cb.n_skip = 0

def run(name, seed, n_updates, path):
    "RMSE [mV] on each test, and the seconds that training took"
    scheme,win_sz = SCHEMES[name]
    set_seed(seed)
    (u,y),(uv,yv),tests = load_silverbox(path)
    su,sy = u.std(),y.std()
    dls = loaders(((u/su, y/sy), (uv/su, yv/sy)), scheme, win_sz)
    model = nn.Sequential(StatefulRNN(nn.LSTM(1, 16, batch_first=True)), nn.Linear(16, 1))
    how = dict(truncation=scheme, n_skip=50) if win_sz is None else dict(sub_seq_len=None, cbs=StreamWashout())
    with tempfile.TemporaryDirectory() as folder:
        learn = TbpttLearner(dls, model, loss_func=nn.MSELoss(), grad_clip=1., path=folder, **how)
        n_epoch = max(round(n_updates/learn_steps(learn)), 1)
        start = time.perf_counter()
        with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): learn.fit_one_cycle(n_epoch, 5e-3, cbs=SaveModelCallback(monitor='valid_loss')) # which prints
        seconds = time.perf_counter()-start
    model.eval()
    with torch.no_grad(): errors = {k: model(torch.as_tensor(a/su).view(1, -1, 1)).view(-1).numpy()*sy-b for k,(a,b) in tests.items()}
    return {k: 1e3*float(np.sqrt(np.mean(errors[k][50:]**2))) for k in TESTS} | dict(seconds=seconds)

def learn_steps(learn):
    "Updates of an epoch"
    cb,dl = learn.tbptt_reset_cb,learn.dls.train
    return len(view_of(dl, cb.truncation, cb.n_skip))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--updates', type=int, default=10_000)
    parser.add_argument('--only', nargs='+', default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument('--path', help='cache of nonlinear_benchmarks')
    parser.add_argument('--json', help='file for all results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    headline('one thread', f'{args.updates} updates', f'seeds {args.seeds}', 'median (range)')
    results = {name: [] for name in args.only}
    for seed in args.seeds: # they take turns
        for name in args.only: results[name].append(run(name, seed, args.updates, args.path))
    print('| training | multisine [mV] | arrow without extrapolation [mV] | arrow [mV] | time [s] |\n| --- | --: | --: | --: | --: |')
    for name,rs in results.items(): print(f"| {name} | {' | '.join(spread([r[k] for r in rs]) for k in TESTS)} | {spread([r['seconds'] for r in rs], '.0f')} |")
    save(args, results)
    if set(args.only)!=set(SCHEMES): return
    multisine = {name: [r['multisine'] for r in rs] for name,rs in results.items()}
    middle = {k: statistics.median(v) for k,v in multisine.items()}
    checks = {
        'sub-windows of 100 < 20 < 5': middle['sub-windows of 100']<middle['sub-windows of 20']<middle['sub-windows of 5'],
        'sub-windows of 20 at least twice as good as windows of 20 from zero': 2*max(multisine['sub-windows of 20'])<min(multisine['zero state, windows of 20']),
        'sub-windows of 100 below 1.5 mV, with every seed': max(multisine['sub-windows of 100'])<1.5,
        'the best scheme below 1.2 mV, with every seed': min(map(max, multisine.values()))<1.2,
    }
    print()
    for what,ok in checks.items(): print(f"{'holds' if ok else 'does NOT hold'}: {what}")
    if not all(checks.values()): raise SystemExit(1)

if __name__ == '__main__': main()
