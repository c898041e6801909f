"""Twelve pipelines of loaders and callbacks, as people build them, end with the parameters of a loop written by hand.

Bit by bit, except where the learning rate follows a schedule: fastai adds up the share of training done, step by step, and the loop
divides; the two differ in the last digit, and so may the learning rate. There the parameters agree to 1e-6."""
import copy
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import CollectDataCallback, WeightedDL
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import ModelResetter
from fastai.callback.schedule import combined_cos # with it come fit_one_cycle and its kind
from fastai.callback.tracker import ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import IndexSplitter
from fastai.optimizer import Adam
from fastai.torch_core import TensorBase, set_seed
from torch import nn
from torch.amp import GradScaler, autocast
from helpers import adam, fit, item_loaders
from reference import shuffled_epochs, train_any, windows_by_hand
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.state.stateful import StatefulRNN

SEED,N_EPOCH,LR,WIN,SUB,BS = 3,2,1e-2,60,25,4
l1 = nn.functional.l1_loss


class Net(nn.Module):
    "An RNN and a head on every step, or on the last one"
    def __init__(self, rnn=nn.LSTM, n_in=2, n_out=1, last=False):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.head,self.last = StatefulRNN(rnn(n_in, 5, batch_first=True)),nn.Linear(5, n_out),last
    def body(self, x): return x
    def out(self, h): return self.head(h[:,-1] if self.last else h)
    def forward(self, *xb): return self.out(self.rnn(self.body(*xb)))
    def by_hand(self, xb, state):
        out,state = self.rnn.rnn(self.body(*xb), state)
        return self.out(out),state

class WithStatic(Net):
    "Two signals and features of the window as a whole"
    def body(self, a, b, static): return torch.cat([a, b, static[:,None].expand(-1, a.shape[1], -1)], -1)

class Video(Net):
    def __init__(self):
        super().__init__(nn.GRU, 3)
        self.cnn = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.cnn[1].requires_grad_(False) # for BnFreeze
    def body(self, x): return self.cnn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    def by_hand(self, xb, state):
        self.cnn[1].eval()
        return super().by_hand(xb, state)


@pytest.fixture
def xy(signals): return windows_by_hand(*(torch.from_numpy(o[:600]) for o in signals), WIN, 36) # 16 windows

def epochs_of(xy, bs=BS, drop_last=False): return [[[o[i] for o in xy] for i in epoch] for epoch in shuffled_epochs(len(xy[0]), bs, N_EPOCH, SEED, drop_last)]

def seeded_loaders(xy, train=TfmdDL, **kwargs):
    set_seed(SEED)
    return item_loaders(list(zip(*xy)), 5, BS, train, shuffle=True, **kwargs)

def check(dls, model, epochs, by_hand, cbs=None, run=None, timed=(True,True), tol=0, loss_func=l1, sub=SUB,
          opt_func=adam):
    "Train both ways from the same weights and compare; `by_hand` are settings of the loop"
    other = copy.deepcopy(model)
    learn = TbpttLearner(dls, model, sub, loss_func=loss_func, opt_func=opt_func, cbs=cbs)
    start = [p.clone() for p in model.parameters()]
    with learn.no_bar(), learn.no_logging(): (run or (lambda o: o.fit(N_EPOCH, LR)))(learn)
    train_any(other.by_hand, [p for p in other.parameters() if p.requires_grad], epochs, sub, LR, loss_func, timed, **by_hand)
    for a,b,s in zip(model.parameters(), other.parameters(), start):
        torch.testing.assert_close(a, b, atol=tol, rtol=0)
        assert not torch.equal(a, s) or not a.requires_grad # it learned
    return learn


def test_TfmdDL_with_one_cycle_GradientClip_and_CSVLogger_equals_the_loop_by_hand(xy):
    "Schedule: to 1e-6"
    lr,mom = combined_cos(.25, LR/25, LR, LR/1e5),combined_cos(.25, .95, .85, .95)
    check(seeded_loaders(xy), Net(), epochs_of(xy), dict(clip=.1, hypers=lambda p: dict(lr=lr(p), betas=(mom(p),.999))),
          [GradientClip(.1), CSVLogger()], lambda o: o.fit_one_cycle(N_EPOCH, LR), tol=1e-6)


def test_WeightedDL_with_SaveModel_equals_the_loop_by_hand(xy):
    wgts = np.arange(len(xy[0]))+1.
    set_seed(SEED)
    drawn = [np.random.choice(len(wgts), len(wgts), p=wgts/wgts.sum()) for _ in range(N_EPOCH)]
    epochs = [[[o[i] for o in xy] for i in torch.from_numpy(d).split(BS)] for d in drawn]
    learn = check(seeded_loaders(xy, WeightedDL, wgts=wgts), Net(nn.GRU), epochs, {},
                  SaveModelCallback(every_epoch=True, fname='m'))
    assert sorted(p.name for p in (learn.path/'models').iterdir())==['m_0.pth','m_1.pth']


@pytest.mark.parametrize('per_step', [1,2])
def test_a_torch_DataLoader_with_GradientAccumulation_equals_the_loop_by_hand(xy, per_step):
    "One step per window, and one for every two"
    items,n_acc = list(zip(*xy)),BS*3*per_step
    def loader(): return torch.utils.data.DataLoader(items, BS, shuffle=True, generator=torch.Generator().manual_seed(SEED))
    dl = loader()
    epochs = [list(dl) for _ in range(N_EPOCH)]
    learn = check(DataLoaders(loader(), torch.utils.data.DataLoader(items[:5], BS)), Net(), epochs, dict(n_acc=n_acc), GradientAccumulation(n_acc))
    assert next(iter(learn.opt.opt.state.values()))['step']==N_EPOCH*4//per_step # 4 batches of windows in an epoch


def block(xy, **kwargs):
    set_seed(SEED)
    items = list(range(len(xy[0])))
    return DataBlock((TransformBlock, TransformBlock), get_x=lambda i: xy[0][i], get_y=lambda i: xy[1][i], splitter=IndexSplitter(items[13:])).dataloaders(items, bs=BS, num_workers=0, **kwargs)

def test_a_DataBlock_with_ReduceLROnPlateau_equals_the_loop_by_hand(xy):
    "... a training loader that drops its last, partial batch, and fastai's own Adam, whose arithmetic is its own: to 1e-6"
    check(block(xy), Net(), epochs_of([o[:13] for o in xy], drop_last=True), dict(hypers=lambda p: dict(lr=LR if p<.5 else LR/2), betas=(.9,.99), eps=1e-5),
          ReduceLROnPlateau(comp=np.greater, min_delta=np.inf, factor=2.), lambda o: o.fit(N_EPOCH, LR, wd=0.), tol=1e-6, opt_func=Adam)


def test_a_DataBlock_by_dl_type_with_flat_cos_equals_the_loop_by_hand(xy):
    "Schedule: to 1e-6"
    lr = combined_cos(.75, LR, LR, LR/1e5)
    dls = block(xy, dl_type=TbpttDL, sub_seq_len=SUB)
    assert len(dls.train)==3*3 and len(dls.valid)==1
    check(dls, Net(nn.RNN), epochs_of([o[:13] for o in xy], drop_last=True), dict(hypers=lambda p: dict(lr=lr(p))),
          run=lambda o: o.fit_flat_cos(N_EPOCH, LR), tol=1e-6)


class Stream(torch.utils.data.IterableDataset):
    "Windows one after the other, with a known number of them; `n_inp` is given, see test_hazards"
    n_inp = 1
    def __init__(self, items): self.items = items
    def __iter__(self): return iter(self.items)
    def __len__(self): return len(self.items)

@pytest.mark.parametrize('DL', [TfmdDL, TbpttDL, torch.utils.data.DataLoader])
def test_an_iterable_dataset_with_TerminateOnNaN_equals_the_loop_by_hand(xy, DL):
    items = list(zip(*xy))
    def loader(items): return DL(Stream(items), BS, num_workers=0)
    epochs = [[[o[i:i+BS] for o in xy] for i in range(0, len(items), BS)]]*N_EPOCH
    check(DataLoaders(loader(items), loader(items[:5])), Net(), epochs, {}, TerminateOnNaNCallback())


class CPUMixedPrecision(MixedPrecision):
    "fastai's own, which always asks for 'cuda', on the CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = autocast('cpu', dtype=torch.bfloat16),GradScaler('cpu', enabled=False),[]

class Bf16(Net):
    def by_hand(self, xb, state):
        with autocast('cpu', dtype=torch.bfloat16): pred,state = super().by_hand(xb, state)
        assert pred.dtype==state[0].dtype==torch.bfloat16
        return pred.float(),state

def test_typed_tensors_with_MixedPrecision_equal_the_loop_by_hand(xy):
    "Tensors of fastai's own type, in bfloat16; MixedPrecision knows no CPU, so this is it with another device"
    typed = [TensorBase(o) for o in xy]
    class Watch(Callback):
        order = 1
        def before_batch(self): self.learn.kind = type(self.x)
        def after_pred(self): self.learn.half = self.pred.dtype
    learn = check(seeded_loaders(typed), Bf16(), epochs_of(xy), {}, [CPUMixedPrecision(), Watch()])
    assert learn.kind is TensorBase and learn.half==torch.bfloat16


class CPUHalf(CPUMixedPrecision):
    "In float16, with a scale that overflows at first"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = autocast('cpu', dtype=torch.float16),GradScaler('cpu', init_scale=2.**24),[]
    def before_step(self):
        try: super().before_step()
        finally: self.learn.n_skipped += self.skipped
    def after_fit(self): pass # keep the scaler, to look at

def test_float16_with_a_scaler_that_skips_steps_equals_the_loop_by_hand(xy):
    "A step that overflows is skipped, and the state goes on; a GRU, whose head alone is in float16 on the CPU, as oneDNN trains no LSTM in it. The loop is written out: what is scaled and skipped are its steps"
    model = Net(nn.GRU)
    rnn,head = copy.deepcopy(model.rnn.rnn),copy.deepcopy(model.head)
    learn = TbpttLearner(seeded_loaders(xy), model, SUB, loss_func=l1, opt_func=adam, cbs=CPUHalf())
    learn.n_skipped = 0
    fit(learn, N_EPOCH, LR)
    params = [*rnn.parameters(), *head.parameters()]
    opt,scaler,scales = torch.optim.Adam(params, lr=LR),GradScaler('cpu', init_scale=2.**24),[]
    for epoch in epochs_of(xy):
        for x,y in epoch:
            state = None
            for start in range(0, WIN, SUB):
                with autocast('cpu', dtype=torch.float16):
                    out,state = rnn(x[:,start:start+SUB], state)
                    loss = l1(head(out).float(), y[:,start:start+SUB])
                state = state.detach()
                if start+SUB>WIN: loss = loss*((WIN-start)/SUB)
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
                scales.append(scaler.get_scale())
    assert learn.scaler.get_scale()==scales[-1]
    assert learn.n_skipped==sum(a>b for a,b in zip([2.**24]+scales, scales))>0
    for a,b in zip(model.parameters(), params): assert torch.equal(a, b)


def test_inputs_targets_and_static_features_with_sgdr_and_ActivationStats_equal_the_loop_by_hand(xy):
    "Two signals and the features of a window in, two signals out. Schedule: to 1e-6"
    x,y = xy
    data = [x[...,:1], x[...,1:], x[:,:7,0].contiguous(), y, y.square()]
    dls = seeded_loaders(data)
    for dl in dls.loaders: dl._n_inp = 3
    loss = lambda pred,a,b: l1(pred[...,:1], a)+l1(pred[...,1:], b)
    cos = lambda p: LR*(1+np.cos(np.pi*p))/2
    model = WithStatic(n_in=9, n_out=2)
    learn = check(dls, model, epochs_of(data), dict(n_inp=3, hypers=lambda p: dict(lr=cos(p))), ActivationStats(modules=[model.rnn.rnn, model.head]),
                  lambda o: o.fit_sgdr(1, N_EPOCH, LR), timed=(True,True,False,True,True), loss_func=loss, tol=1e-6)
    assert len(learn.activation_stats.stats)==N_EPOCH*4*3


def test_video_with_BnFreeze_and_GradientClip_equals_the_loop_by_hand():
    "Frames (batch, time, channel, height, width) through a CNN with frozen statistics and a GRU"
    torch.manual_seed(1)
    xy = torch.randn(8, 12, 1, 6, 6),torch.randn(8, 12, 1)
    model = Video()
    stats = copy.deepcopy(model.cnn[1].state_dict())
    check(seeded_loaders(xy), model, epochs_of(xy), dict(clip=.05), [BnFreeze(), GradientClip(.05)], sub=5)
    assert all(torch.equal(v, stats[k]) for k,v in model.cnn[1].state_dict().items())


def test_one_label_per_window_with_CollectData_equals_the_loop_by_hand(xy):
    "The loss counts in the last sub-window only; the state comes through all of them"
    labelled = xy[0],xy[1].mean((1,2))
    learn = check(seeded_loaders(labelled), Net(last=True), epochs_of(labelled), {}, CollectDataCallback(),
                  timed=(True,False), loss_func=lambda p,y: l1(p[:,0], y))
    assert len(learn.recorder.losses)==N_EPOCH*4
    assert [(xb[0].shape[1],len(yb)) for xb,yb,*_ in learn.collect_data.data[:4]]==[(WIN-2*SUB,1)]*4 # only what is a step


@pytest.mark.parametrize('first', [0,1])
def test_windows_of_different_length_with_flat_cos_equal_the_loop_by_hand(xy, first):
    "... from batch to batch, the first the shortest or the longest. Schedule: to 1e-6"
    lengths,lr = ((30,60,50,10) if first else (60,30,10,50)),combined_cos(.75, LR, LR, LR/1e5)
    batches = [tuple(o[4*i:4*i+4,:n] for o in xy) for i,n in enumerate(lengths)]
    set_seed(SEED)
    dls = DataLoaders(*[TfmdDL(batches, bs=None, num_workers=0)]*2) # each item is a batch
    pct = []
    class Watch(Callback):
        order = 13
        def after_batch(self): pct.append(self.pct_train) if self.training else None
    check(dls, Net(), [batches]*N_EPOCH, dict(hypers=lambda p: dict(lr=lr(p))), Watch(), lambda o: o.fit_flat_cos(N_EPOCH, LR), tol=1e-6)
    ends = np.cumsum([-(-n//SUB) for n in lengths*N_EPOCH])-1
    np.testing.assert_allclose(np.array(pct)[ends], np.arange(1, 9)/8) # every window is one eighth of training


class Own(nn.Module):
    "A model that carries its state by itself, in AWD_LSTM's way"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb,self.rnn,self.head = nn.Embedding(9, 4),nn.LSTM(4, 5, batch_first=True),nn.Linear(5, 9)
        self.reset()
    def reset(self): self.h = None
    def forward(self, x):
        zeros = torch.zeros(1, len(x), 5)
        out,h = self.rnn(self.emb(x), self.h or (zeros, zeros))
        self.h = tuple(o.detach() for o in h)
        return self.head(out)
    def by_hand(self, xb, state):
        self.h = state
        return self(*xb),self.h

def test_tokens_through_Datasets_and_a_model_with_ModelResetter_equal_the_loop_by_hand():
    torch.manual_seed(1)
    tokens = torch.randint(9, (13,WIN+1))
    xy = tokens[:,:-1],tokens[:,1:]
    dsets = Datasets(list(range(13)), [[lambda i: xy[0][i]], [lambda i: xy[1][i]]], splits=[list(range(8)),list(range(8, 13))])
    set_seed(SEED)
    dls = dsets.dataloaders(bs=BS, num_workers=0)
    ce = lambda pred,y: nn.functional.cross_entropy(pred.flatten(0, 1), y.flatten())
    check(dls, Own(), epochs_of([o[:8] for o in xy]), {}, ModelResetter(), loss_func=ce)
