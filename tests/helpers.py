"What the tests share: a quiet fit, loaders and a learner"
from functools import partial
import pytest
import torch
from fastai.callback.progress import ProgressCallback # noqa: with it comes Learner.no_bar
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.training.callback import TbpttResetCB

# for tests of an n_skip that leaves steps without any gradient, of which a learner warns
untaught_on_purpose = pytest.mark.filterwarnings(r'ignore:n_skip=\d+ leaves the first')
adam,sgd = (partial(OptimWrapper, opt=o) for o in (torch.optim.Adam, torch.optim.SGD))


def fit(learn, n_epoch=1, lr=1e-2, how='fit', **kwargs):
    "Train without bar and logging; the learner"
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n_epoch, lr, **kwargs)
    return learn

def fit_own_lr(learn, n_epoch=1, **kwargs):
    "... at the learning rate that the learner was made with"
    return fit(learn, n_epoch, None, **kwargs)

def loaders(signals, sub_seq_len=20, **kwargs):
    "Windows of 100 steps, four at a time, the same in every call"
    set_seed(0)
    return SequenceDataLoaders.from_arrays(*signals, sub_seq_len=sub_seq_len, **{**dict(win_sz=100, bs=4), **kwargs})

def split_loaders(signals, n_train, seed=0, **kwargs):
    "Windows of the first `n_train` steps to train on, and of the others for validation"
    set_seed(seed)
    u,y = signals
    return SequenceDataLoaders.from_arrays(u[:n_train], y[:n_train], valid=(u[n_train:], y[n_train:]), **kwargs)

def item_loaders(items, n_valid=None, bs=4, cls=TfmdDL, **kwargs):
    "Batches of given items to train on, and of the first `n_valid` in their order for validation"
    return DataLoaders(cls(items, bs=bs, num_workers=0, **kwargs), TfmdDL(items[:n_valid], bs=bs, num_workers=0))

def learner(dls, model, sub_seq_len, cbs=(), **kwargs):
    "A Learner of fastai with a TbpttResetCB, as one that exists gets it"
    return Learner(dls, model, cbs=[TbpttResetCB(sub_seq_len), *cbs], **{**dict(loss_func=MSELossFlat()), **kwargs})

def check_trains_on(make, meanwhile):
    "A learner that has done something else in between trains as one that has not, bit by bit"
    a,b = make(),make()
    meanwhile(a)
    for learn in (a,b):
        set_seed(1)
        fit(learn, 1)
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True): assert torch.equal(p, q)
