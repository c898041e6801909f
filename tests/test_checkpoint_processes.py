"Trainings in processes that are killed. Run as a script, this file is one of two that train together"
import json, os, signal, sys
from functools import partial
from importlib import import_module
from pathlib import Path
import multiprocessing, random
import pytest
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.losses import MSELossFlat
from fastai.metrics import mae
from fastai.torch_core import set_seed
from tbptt_fastai.all import RandomUnbiased, SequenceDataLoaders, StatefulRNN, TbpttCheckpoint, TbpttLearner
from test_distributed import launch

BENCH = Path(__file__).resolve().parent.parent/'bench'


# One process

@pytest.fixture
def kills(monkeypatch):
    monkeypatch.syspath_prepend(BENCH) # processes import it by its name
    return import_module('kills')

@pytest.mark.parametrize('loader,scheme', [('windows', 'overlap'), ('workers', 'fixed'), ('stream', 'unbiased')])
def test_processes_that_are_killed_end_as_one_that_is_not(kills, tmp_path, loader, scheme):
    "Killed after random times: at the beginning, in training, in validation, while a checkpoint is written"
    context,rng = multiprocessing.get_context('forkserver'),random.Random(3)
    (tmp_path/'data').mkdir()
    whole = tmp_path/'whole'
    whole.mkdir()
    assert not kills.run(context, loader, scheme, whole, tmp_path/'data')
    assert kills.trial(context, rng, loader, scheme, tmp_path, tmp_path/'data', 2.)[0]==json.loads((whole/'end.json').read_text())


# Two processes that share windows, or a stream

class KillAt(Callback):
    order = 2000
    def __init__(self, step=None): self.step = step
    def after_batch(self):
        if self.training and self.learn.train_iter==self.step: os.kill(os.getpid(), signal.SIGKILL)

def shared_learner(kind, path, seed):
    set_seed(seed)
    u = torch.randn(1600, 1, generator=torch.Generator().manual_seed(0))
    y = u.roll(2).cumsum(0).mul(.1).sin()
    if kind=='windows': dls = SequenceDataLoaders.from_arrays(u, y, win_sz=60, sub_seq_len=20, bs=2, device='cpu')
    else: dls = SequenceDataLoaders.from_arrays(*(list(o.split([170, 330, 210, 290, 600])) for o in (u, y)), sub_seq_len=20, bs=2, device='cpu')
    model = nn.Sequential(StatefulRNN(nn.LSTM(1, 5, batch_first=True)), nn.Dropout(.2), nn.Linear(5, 1))
    how = dict(truncation=RandomUnbiased(15)) if kind=='stream' else {} # draws the same lengths in both
    return TbpttLearner(dls, model, loss_func=MSELossFlat(), metrics=mae, path=path, **how)

def main(kind, folder, seed, rank_to_kill, step):
    from fastai.distributed import rank_distrib
    rank = rank_distrib()
    learn = shared_learner(kind, Path(folder), int(seed)+rank)
    kill = KillAt(int(step) if rank==int(rank_to_kill) else None)
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit_one_cycle(2, 1e-2, cbs=[TbpttCheckpoint(every=4, resume=True), kill])
    r = learn.recorder
    torch.save(dict(params=list(learn.model.state_dict().values()), losses=[*map(float, r.losses)], values=[[*map(float, o)] for o in r.values], lrs=[*map(float, r.lrs)]),
        f'{folder}/{rank}.pt')

if __name__=='__main__': main(*sys.argv[1:])

@pytest.mark.parametrize('kind', ['windows', 'stream'])
def test_two_processes_of_which_one_is_killed(tmp_path, kind):
    pytest.importorskip('accelerate')
    for name in ('whole', 'killed'): (tmp_path/name).mkdir()
    run = partial(launch, 'test_checkpoint_processes.py', kind)
    run(tmp_path/'whole', '10', '-1', '0', cwd=tmp_path)
    with pytest.raises(AssertionError, match='SIGKILL|Signal 9'): run(tmp_path/'killed', '10', '1', '11', cwd=tmp_path)
    run(tmp_path/'killed', '30', '-1', '0', cwd=tmp_path)
    for rank in range(2):
        whole,killed = (torch.load(tmp_path/name/f'{rank}.pt', weights_only=False) for name in ('whole', 'killed'))
        assert all(map(torch.equal, whole.pop('params'), killed.pop('params')))
        assert whole==killed
