"Ten windows of 30 steps, a small model, a learner of both, and what each of its training steps saw"
import torch
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fastai.torch_core import set_seed
from torch import nn
from helpers import item_loaders, learner
from tbptt_fastai.state.stateful import StatefulRNN

WIN,SUB,BS = 30,12,4 # sub-windows of 12, 12 and 6 steps


def items(n=10, win_sz=WIN):
    "Window i is 100*i at its start and counts its steps"
    return [(100.*i+torch.arange(win_sz)[:,None], torch.full((win_sz,1), float(i))) for i in range(n)]

def noise(n=10, win_sz=WIN):
    torch.manual_seed(1)
    return list(zip(torch.randn(n, win_sz, 1), torch.randn(n, win_sz, 1)))

def net():
    torch.manual_seed(0)
    return nn.Sequential(StatefulRNN(nn.GRU(1, 3, batch_first=True)), nn.Linear(3, 1))

def small_loaders(its=None, cls=TfmdDL, shuffle=False, **kwargs):
    its = its or noise()
    return item_loaders(its, 7, BS, cls, shuffle=shuffle, **kwargs)

def small_learner(dls=None, model=None, cbs=(), sub=SUB, **kwargs):
    set_seed(0)
    return learner(dls or small_loaders(), model or net(), sub, cbs, **kwargs)

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))
def whole(learn, ds=None):
    with torch.no_grad(): return torch.cat([learn.model.eval()(x[None]) for x,_ in (ds or learn.dls.train_ds)])


class Watch(Callback):
    "Counts events, and keeps what was seen of each training step"
    order = 61
    def __init__(self): self.n,self.first,self.lens,self.pct = dict(before_batch=0, after_batch=0),[],[],[]
    def before_batch(self):
        if not self.training: return
        self.n['before_batch'] += 1
        self.first.append((self.x[0,0,0]//100).item())
        self.lens.append(self.x.shape[1])
        self.pct.append(self.pct_train)
    def after_batch(self): self.n['after_batch'] += self.training
