"""The table of `step_cost.py`, with tsfast and pytorch-ignite in the same run

They train the same network, with the same optimizer, learning rates and clipping. tsfast loads the data its own way, from HDF5 files that it keeps in memory;
ignite has no way of its own and is given the batches of the loop by hand. Both have their progress bars on. ignite clips and sets learning rates by handlers.

    pip install -e '.[bench]'
"""
import tempfile
from functools import partial
from pathlib import Path
import h5py, ignite, tsfast, torch
from ignite.contrib.engines import Tbptt_Events, create_supervised_tbptt_trainer
from ignite.handlers import ProgressBar
from ignite.metrics import RunningAverage
from torch import nn
from tsfast.training.learner import TbpttLearner
from tsfast.tsdata.pipeline import create_dls
from step_cost import main
from step_loops import ADAM, CLIP, CONTENDERS, LR, SUB, WIN, Net, quiet, set_lr, timed

FOLDER = tempfile.TemporaryDirectory()


def by_tsfast(work):
    files = [Path(FOLDER.name)/f'{o}.hdf5' for o in ('train','valid')]
    for file,u,y in zip(files, (work.u[:,0].numpy(),work.u_valid), (work.y[:,0].numpy(),work.y_valid)):
        if not file.exists():
            with h5py.File(file, 'w') as f: f['u'],f['y'] = u,y
    dls = create_dls(['u'], ['y'], dict(train=files[:1], valid=files[1:]), win_sz=WIN, stp_sz=work.stp, bs=work.bs, n_batches_train=None, cache=True)
    learn = TbpttLearner(Net(work.start), dls, nn.L1Loss(), lr=LR, opt_func=partial(torch.optim.Adam, **ADAM), grad_clip=CLIP, sub_seq_len=SUB, device=torch.device('cpu'))
    train,seen = learn.train_one_epoch,[]
    def train_one_epoch(**kwargs):
        seen.append(timed(lambda: train(**kwargs)))
        return 0.
    learn.train_one_epoch,learn.validate = train_one_epoch,lambda: (0.,{})
    def run():
        with quiet(): learn.fit_flat_cos(1)
        return seen.pop()
    return learn.model,run

class Batches:
    def __init__(self, work): self.work = work
    def __len__(self): return self.work.n_batches
    def __iter__(self): return self.work.batches()

def by_ignite(work):
    net = Net(work.start)
    params = list(net.parameters())
    opt = torch.optim.Adam(params, LR, **ADAM)
    def clip(*args): nn.utils.clip_grad_norm_(params, CLIP)
    opt.register_step_pre_hook(clip)
    trainer,step = create_supervised_tbptt_trainer(net, opt, nn.L1Loss(), SUB, dim=1),iter(range(work.n_steps))
    trainer.add_event_handler(Tbptt_Events.TIME_ITERATION_STARTED, lambda: set_lr(opt, next(step)/work.n_steps))
    RunningAverage(output_transform=lambda o: o).attach(trainer, 'loss')
    ProgressBar().attach(trainer, ['loss'])
    def run():
        with quiet(): return timed(lambda: trainer.run(Batches(work), max_epochs=1))
    return net,run

if __name__ == '__main__':
    main({**CONTENDERS, f'tsfast {tsfast.__version__} TbpttLearner': by_tsfast, f'pytorch-ignite {ignite.__version__} TBPTT trainer': by_ignite},
         ['tsfast', 'pytorch-ignite'])
