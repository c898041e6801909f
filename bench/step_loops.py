"""The training loops that `step_cost.py` compares: by hand, TbpttLearner, and fastai's Learner, on the same work"""
import gc, math, os, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import partial
import torch
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tbptt_fastai.training.callback import TbpttResetCB
from tbptt_fastai.datasets.benchmarks import create_dls_silverbox, load_silverbox
from tbptt_fastai.learner import RNNLearner

WIN,SUB,LR,CLIP = 500,100,3e-3,1.
ADAM = dict(betas=(.9,.99), eps=1e-5) # as fastai's
CASES = {'LSTM-40, batch 16': dict(hidden=40, bs=16, stp=10), 'LSTM-128, batch 32': dict(hidden=128, bs=32, stp=20)} # stp: steps from one window to the next


class Work:
    "What all contenders have in common: data, first weights, number of steps"
    def __init__(self, hidden, bs, stp, path=None):
        self.hidden,self.bs,self.stp,self.path = hidden,bs,stp,path
        (u,y),(self.u_valid,self.y_valid),_ = load_silverbox(path)
        self.u,self.y = (torch.from_numpy(o.copy())[:,None] for o in (u,y))
        torch.manual_seed(0)
        self.start = self.learner().model
        self.n_windows = (len(u)-WIN)//stp+1
        self.n_batches = self.n_windows//bs
        self.n_steps = self.n_batches*(WIN//SUB)

    def dls(self): return create_dls_silverbox(bs=self.bs, win_sz=WIN, stp_sz=self.stp, sub_seq_len=SUB, path=self.path, drop_last=True)
    def learner(self, **kwargs): return RNNLearner(self.dls(), hidden_size=self.hidden, grad_clip=CLIP, **kwargs)

    def batches(self):
        "Random windows, by one indexing operation a batch"
        for numbers in torch.randperm(self.n_windows)[:self.n_batches*self.bs].view(-1, self.bs): yield self.batch(numbers)

    def batch(self, numbers):
        at = numbers[:,None]*self.stp+torch.arange(WIN)
        return self.u[at],self.y[at]

    @torch.no_grad()
    def error(self, model):
        "Validation L1 in mV, whole windows"
        x,y = (torch.from_numpy(o[:len(o)//WIN*WIN].copy()).view(-1, WIN, 1) for o in (self.u_valid,self.y_valid))
        out = model.eval()(x)
        return 1e3*((out[0] if isinstance(out, tuple) else out)-y).abs().mean().item()


class Net(nn.Module):
    "The same network without the library"
    def __init__(self, start):
        super().__init__()
        self.rnn,self.head = deepcopy(start.rnn.rnn),deepcopy(start.head)
        for k,m in dict(x=start.scale_x, y=start.scale_y).items():
            for name in ('mean','std'): self.register_buffer(f'{name}_{k}', getattr(m, name).clone())

    def forward(self, x, state=None):
        out,state = self.rnn((x-self.mean_x)/self.std_x, state)
        return self.head(out)*self.std_y+self.mean_y,state

class Stateless(Net):
    def forward(self, x): return super().forward(x)[0]


def flat_cos(pct): return LR if pct<.75 else LR*(1+math.cos(math.pi*(pct-.75)/.25))/2

def set_lr(opt, pct):
    for group in opt.param_groups: group['lr'] = flat_cos(pct)

@contextmanager
def quiet():
    "Progress bars write to a file that keeps nothing"
    with open(os.devnull, 'w') as null, redirect_stdout(null), redirect_stderr(null): yield

def wait():
    "Until a GPU has done what it was given, if there is one"
    if torch.cuda.is_initialized(): torch.cuda.synchronize()

def timed(f):
    "Seconds, and those of the processor"
    gc.collect()
    wait()
    start,cpu = time.perf_counter(),time.process_time()
    f()
    wait()
    return time.perf_counter()-start,time.process_time()-cpu


def by_hand(work, **kwargs):
    net,loss_func = Net(work.start),nn.L1Loss()
    params = list(net.parameters())
    opt = torch.optim.Adam(params, LR, **ADAM, **kwargs)
    def epoch():
        step,smooth = 0,0.
        for x,y in work.batches():
            state = None
            for a in range(0, WIN, SUB):
                set_lr(opt, step/work.n_steps)
                pred,state = net(x[:,a:a+SUB], state)
                loss = loss_func(pred, y[:,a:a+SUB])
                loss.backward()
                clip_grad_norm_(params, CLIP)
                opt.step()
                opt.zero_grad()
                state = tuple(o.detach() for o in state)
                if step%10==0: smooth = .8*smooth+.2*loss.item()
                step += 1
    return net,lambda: timed(epoch)

def by_fastai(make, work):
    learn,seen = make(work),[]
    learn._do_epoch_train = lambda: seen.append(timed(partial(type(learn)._do_epoch_train, learn)))
    learn._do_epoch_validate = lambda: None
    def run():
        with quiet(): learn.fit_flat_cos(1, LR)
        return seen.pop()
    return learn.model,run

def tbptt(work, **kwargs):
    learn = work.learner(**kwargs)
    learn.model.load_state_dict(work.start.state_dict())
    return learn

def existing(work):
    "fastai's `Learner` and optimizer, on the same loaders, with a `TbpttResetCB`: what one line makes of a pipeline that is there"
    return Learner(work.dls(), deepcopy(work.start), loss_func=nn.L1Loss(), cbs=[TbpttResetCB(), GradientClip(CLIP)])

def plain(work):
    "fastai's `Learner`, with sub-windows that lie ready, each from the zero state"
    cut = [(x[:,a:a+SUB],y[:,a:a+SUB]) for x,y in work.batches() for a in range(0, WIN, SUB)]
    return Learner(DataLoaders(cut, cut), Stateless(work.start), loss_func=nn.L1Loss(), cbs=GradientClip(CLIP))

CONTENDERS = {'by hand, torch.optim.Adam': by_hand, 'by hand, fused Adam': partial(by_hand, fused=True),
              'TbpttLearner': partial(by_fastai, tbptt), "TbpttLearner, fastai's Adam": partial(by_fastai, partial(tbptt, opt_func=Adam)),
              'fastai Learner with TbpttResetCB': partial(by_fastai, existing), 'fastai Learner without state, nothing to load or cut': partial(by_fastai, plain)}
