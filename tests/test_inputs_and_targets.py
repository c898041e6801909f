"Several inputs and several targets, some per step and some per window: one source for which are which, for every loader"
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from torch import nn
from helpers import fit, learner, sgd, untaught_on_purpose
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.loaders.windows import TbpttDL

N,STEPS,SUB,BS,SKIP = 6,20,5,3,7
pytestmark = untaught_on_purpose # SKIP is more than SUB
TIMED = True,False,True,False # a signal, constants, a target for each step, and one for each window

def arrays(n=N, seed=0, kind=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x,s = torch.randn(n, STEPS, 2, generator=g, dtype=kind),torch.randn(n, 3, generator=g, dtype=kind)
    return x,s,x.cumsum(1)[...,:1].sin()+s[:,None,:1],s.sum(1, keepdim=True)

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn,self.step,self.window = (o.double() for o in (nn.GRU(5, 4, batch_first=True), nn.Linear(4, 1), nn.Linear(4, 1)))
    def forward(self, x, s):
        h = self.rnn(torch.cat([x, s[:,None].expand(-1, x.shape[1], -1)], -1))[0]
        return self.step(h),self.window(h[:,-1])

def both(pred, y, z): return (pred[0]-y).abs().mean()+(pred[1]-z).abs().mean()

def items(data): return list(zip(*data))
def batches(data): return list(zip(*(o.split(BS) for o in data)))
def datasets(data): return Datasets(range(len(data[0])), [[o.__getitem__] for o in data], n_inp=2)
class Iterated(torch.utils.data.IterableDataset):
    def __init__(self, data): self.data = data
    def __iter__(self): return iter(items(self.data))
    def __len__(self): return len(self.data[0])

LOADERS = dict(
    batches=batches,
    torch=lambda data: torch.utils.data.DataLoader(items(data), BS),
    iterable=lambda data: torch.utils.data.DataLoader(Iterated(data), BS),
    fastai=lambda data: TfmdDL(items(data), bs=BS, num_workers=0),
    datasets=lambda data: TfmdDL(datasets(data), bs=BS, num_workers=0),
    tbptt=lambda data: TbpttDL(items(data), BS, num_workers=0),
    tbptt_datasets=lambda data: TbpttDL(datasets(data), BS, num_workers=0))
SAYS = 'datasets','tbptt_datasets' # how many of their elements are inputs
loader = pytest.mark.parametrize('name', LOADERS)

def made(train, valid, cls=learner, **kwargs):
    dls = DataLoaders(LOADERS[train](arrays()), LOADERS[valid](arrays(seed=1)))
    if train not in SAYS: dls.n_inp = 2
    model = Both()
    if cls is TbpttLearner: return TbpttLearner(dls, model, SUB, n_skip=SKIP, timed=TIMED, loss_func=both, opt_func=sgd, **kwargs)
    learn = learner(dls, model, SUB, loss_func=both, opt_func=sgd, **kwargs)
    learn.tbptt_reset_cb.n_skip,learn.tbptt_reset_cb.timed = SKIP,TIMED
    return learn

def by_hand(n_epoch, lr=.01):
    m = Both()
    opt = torch.optim.SGD(m.parameters(), lr)
    for _ in range(n_epoch):
        for x,s,y,z in batches(arrays()):
            h = None
            for a in range(0, STEPS, SUB):
                b,skip = a+SUB,min(max(SKIP-a, 0), SUB)
                out,h = m.rnn(torch.cat([x[:,a:b], s[:,None].expand(-1, SUB, -1)], -1), h)
                h = h.detach()
                if skip==SUB: continue
                loss = both((m.step(out[:,skip:]), m.window(out[:,-1])), y[:,a+skip:b], z)*(SUB-skip)/SUB
                loss.backward()
                opt.step()
                opt.zero_grad()
    return m

def evaluated(m, data):
    with torch.no_grad():
        x,s,y,z = data
        p,q = m(x, s)
        return both((p[:,SKIP:], q), y[:,SKIP:], z).item()

@pytest.mark.parametrize('cls', [learner, TbpttLearner])
@loader
def test_a_training_is_the_loop_by_hand(name, cls):
    learn,m = fit(made(name, name, cls), 2, .01),by_hand(2)
    for a,b in zip(learn.model.parameters(), m.parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert learn.recorder.values[-1][1]==pytest.approx(evaluated(m, arrays(seed=1)), abs=1e-6)

@pytest.mark.parametrize('cls', [learner, TbpttLearner])
@pytest.mark.parametrize('train', LOADERS)
@loader
def test_another_loader_is_evaluated_as_the_training_says(train, name, cls):
    learn,data = made(train, train, cls),arrays(seed=2)
    other = LOADERS[name](data)
    with learn.no_bar():
        assert learn.validate(dl=other)[0]==pytest.approx(evaluated(learn.model, data), abs=1e-6)
        preds,targs = learn.get_preds(dl=other)
    with torch.no_grad(): expected = learn.model(*data[:2])
    for a,b in zip((*preds, *targs), (*expected, *data[2:])): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert fit(learn).recorder.values[-1][1]==pytest.approx(evaluated(learn.model, arrays(seed=1)), abs=1e-6)

@pytest.mark.parametrize('train,valid', [('datasets', 'batches'), ('datasets', 'fastai'), ('tbptt_datasets', 'torch'), ('torch', 'datasets')])
def test_validation_in_training_goes_by_the_training_loader(train, valid):
    learn = fit(made(train, valid))
    assert learn.recorder.values[-1][1]==pytest.approx(evaluated(learn.model, arrays(seed=1)), abs=1e-6)

@loader
def test_a_prediction_of_the_window_may_be_as_wide_as_a_sub_window(name):
    "... which is none of its steps"
    class Wide(Both):
        def forward(self, x, s):
            p,q = super().forward(x, s)
            return p,q.expand(-1, STEPS)
    learn,data = made(name, name),arrays(seed=2)
    learn.model = Wide()
    data = (*data[:3], data[3].expand(-1, STEPS).contiguous())
    p,q = learn.model(*data[:2])
    expected = both((p[:,SKIP:], q), data[2][:,SKIP:], data[3]).item()
    with learn.no_bar(): assert learn.validate(dl=LOADERS[name](data))[0]==pytest.approx(expected, abs=1e-6)

@loader
def test_a_prediction_for_each_step_is_cut_also_where_its_target_is_one_for_the_window(name):
    class Steps(Both):
        def forward(self, x, s):
            p,_ = super().forward(x, s)
            return p,2*p
    def loss(pred, y, z): return (pred[0]-y).abs().mean()+(pred[1].mean(1)-z).abs().mean()
    learn,(x,s,y,z) = made(name, name),arrays(seed=2)
    learn.model,learn.loss_func = Steps(),loss
    p = learn.model(x, s)[0][:,SKIP:]
    with learn.no_bar(): assert learn.validate(dl=LOADERS[name]((x, s, y, z)))[0]==pytest.approx(loss((p, 2*p), y[:,SKIP:], z).item(), abs=1e-6)
