"""Does a training that is killed again and again end as one that never was?

Each training is a process of its own, which is killed (SIGKILL, so it cannot notice) after a random time: while it reads, trains, validates or writes a checkpoint. The next process
goes on with the newest checkpoint, until one of them comes to the end. Then parameters, optimizer, records and metrics are compared, bit by bit, with those of a training that was not interrupted.
"""
import hashlib, json, multiprocessing, random, sys, tempfile
from pathlib import Path

EPOCHS,EVERY = 2,3
LOADERS = 'windows','workers','stream','files','text'
SCHEMES = 'fixed','overlap','jittered','unbiased','whole'


def signals():
    import torch
    g = torch.Generator().manual_seed(0)
    u = torch.randn(2400, 1, generator=g)
    return u,torch.cat([u.roll(1), u.roll(3)], 1).cumsum(0).mul(.1).sin()

def make_loaders(name, folder, bs):
    from tbptt_fastai.all import SequenceDataLoaders
    u,y = signals()
    parts = [230, 410, 155, 335, 870]
    xs,ys = u[:2000].split(parts),y[:2000].split(parts)
    if name in ('windows', 'workers'):
        return SequenceDataLoaders.from_arrays(u, y, win_sz=120, stp_sz=80, sub_seq_len=20, bs=bs, num_workers=2 if name=='workers' else 0)
    if name=='stream': return SequenceDataLoaders.from_arrays(list(xs), list(ys), sub_seq_len=20, bs=bs)
    if name=='text': return SequenceDataLoaders.from_text('all the world is a stage, and all the men and women merely players. '*40, bs=bs, sub_seq_len=20)
    import numpy as np
    for i,o in enumerate(zip(xs, ys)):
        for which,a in zip('xy', o):
            if not (folder/f'{which}{i}.npy').exists(): np.save(folder/f'{which}{i}.npy', a.numpy())
    mapped = [[np.load(folder/f'{which}{i}.npy', mmap_mode='r') for i in range(len(parts))] for which in 'xy']
    return SequenceDataLoaders.from_arrays(*mapped, sub_seq_len=20, bs=bs)

def make_scheme(name):
    from tbptt_fastai.all import Fixed, Jittered, Overlap, RandomUnbiased
    makes = dict(fixed=lambda: Fixed(20), overlap=lambda: Overlap(10, 20), jittered=lambda: Jittered(15), unbiased=lambda: RandomUnbiased(15),
        whole=lambda: None)
    return makes[name]()

def make_learner(loader, scheme, folder, data):
    import torch
    from torch import nn
    from tbptt_fastai.all import RNNLearner, StatefulRNN, TbpttLearner, mae, MSELossFlat
    torch.set_num_threads(1)
    dls = make_loaders(loader, data, 2 if scheme=='jittered' else 4)
    truncation = make_scheme(scheme)
    how = dict(sub_seq_len=None) if truncation is None else dict(truncation=truncation)
    if loader=='text': return RNNLearner(dls, 'lstm', 12, path=folder, **how)
    model = nn.Sequential(StatefulRNN(nn.LSTM(1, 12, batch_first=True)), nn.Dropout(.2), nn.Linear(12, 2))
    return TbpttLearner(dls, model, loss_func=MSELossFlat(), metrics=mae, path=folder, **how)

def digest(learn):
    "One string that all of a trained learner is in"
    import torch
    r = learn.recorder
    tensors = [*learn.model.state_dict().values(), *(v for o in learn.opt.state_dict()['state'] for v in o.values() if torch.is_tensor(v))]
    records = [torch.stack(list(r.losses)).as_subclass(torch.Tensor), *(torch.tensor([*map(float, o)], dtype=torch.float64) for o in (r.lrs, r.iters, *r.values))]
    bits = b''.join(o.detach().contiguous().numpy().tobytes() for o in [*tensors, *records])
    return hashlib.sha256(bits).hexdigest()

def train(loader, scheme, folder, data):
    "Go on with what there is, and say how it ended"
    from tbptt_fastai.all import TbpttCheckpoint, set_seed
    begins = not any((folder/'checkpoint').glob('*.pt'))
    set_seed(0 if begins else random.SystemRandom().getrandbits(31)) # what goes on owes nothing to the weights and numbers that it starts out with
    learn = make_learner(loader, scheme, folder, data)
    with learn.no_bar(), learn.no_logging(): learn.fit_flat_cos(EPOCHS, 1e-2, cbs=TbpttCheckpoint(every=EVERY, resume=True))
    (folder/'end.json').write_text(json.dumps(digest(learn)))


def run(context, *args, kill_after=None):
    "A process that trains; was it killed?"
    process = context.Process(target=train, args=args)
    process.start()
    process.join(kill_after)
    if process.exitcode is None: process.kill()
    process.join()
    if process.exitcode not in (0, -9): raise SystemExit(f'a training ended with exit code {process.exitcode}')
    return process.exitcode!=0

def trial(context, rng, loader, scheme, root, data, seconds):
    "How a training that is killed up to three times ends, and how often it was"
    folder,kills = root/f'{loader}-{scheme}-{rng.getrandbits(40):x}',0
    folder.mkdir()
    while kills<3 and run(context, loader, scheme, folder, data, kill_after=rng.uniform(0, seconds)): kills += 1
    if not (folder/'end.json').exists(): run(context, loader, scheme, folder, data)
    return json.loads((folder/'end.json').read_text()),kills

def main(n_kills=50, seed=0, pairs=None):
    from time import perf_counter
    context,rng = multiprocessing.get_context('forkserver'),random.Random(seed)
    context.set_forkserver_preload(['tbptt_fastai.all'])
    pairs = pairs or [(loader, scheme) for loader in LOADERS for scheme in SCHEMES if not (loader in ('stream', 'files') and scheme=='whole')]
    results,kills = {},0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        (root/'data').mkdir()
        while kills<n_kills:
            for loader,scheme in pairs:
                if (loader,scheme) not in results:
                    whole = root/f'{loader}-{scheme}'
                    whole.mkdir()
                    run(context, loader, scheme, whole, root/'data') # starts the server
                    (whole/'end.json').unlink()
                    for o in (whole/'checkpoint').iterdir(): o.unlink()
                    began = perf_counter()
                    run(context, loader, scheme, whole, root/'data')
                    results[loader,scheme] = dict(end=json.loads((whole/'end.json').read_text()), seconds=perf_counter()-began, trainings=0, kills=0, same=0)
                res = results[loader,scheme]
                end,n = trial(context, rng, loader, scheme, root, root/'data', res['seconds'])
                kills += n
                res.update(trainings=res['trainings']+1, kills=res['kills']+n, same=res['same']+(end==res['end']))
                print(f'{loader:8} {scheme:9} killed {n} times: {"the same" if end==res["end"] else "ANOTHER TRAINING"}', flush=True)
                if kills>=n_kills: break
    return {f'{a}, {b}': {k:v for k,v in o.items() if k!='end'} for (a,b),o in results.items()}


if __name__=='__main__':
    n = int(sys.argv[1]) if len(sys.argv)>1 else 50
    found = main(n)
    total = {k: sum(o[k] for o in found.values()) for k in ('trainings', 'kills', 'same')}
    print(total)
    if total['same']!=total['trainings']: raise SystemExit('a training ended in another way')
