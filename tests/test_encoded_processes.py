"Estimated states in two gloo processes on the CPU. Run as a script, this file is one of them."
import sys
from functools import partial
import pytest, torch
from torch import nn
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from tbptt_fastai.learner import TbpttLearner
from tbptt_fastai.models.sequence import Standardize
from tbptt_fastai.loaders.streams import StreamDL
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import Sequences, SequenceWindows
from tbptt_fastai.state.encoded import EncodedState
from tbptt_fastai.state.stateful import StatefulRNN

pytest.importorskip('accelerate')
N_PAST,SUB = 4,8
LENGTHS = [31, 25, 45, 24, 30] # the last begins in a row of one process alone

def model():
    torch.manual_seed(0)
    rnn = StatefulRNN(nn.LSTM(2, 3, batch_first=True), initial=EncodedState(N_PAST, 2, 1, hidden=4))
    return nn.Sequential(Standardize(), rnn, nn.Linear(3, 1)).double() # its buffers are broadcast in every forward pass: a process waits

def draw(lengths):
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(n, c, generator=g, dtype=torch.float64) for n in lengths] for c in (2, 1)]

def windows(bs=2): return TbpttDL(SequenceWindows(*draw([30]*8), dtype=torch.float64), bs=bs, sub_seq_len=SUB, shuffle=False)
def stream(bs=2): return StreamDL(Sequences(*draw(LENGTHS), dtype=torch.float64), bs=bs, sub_seq_len=SUB, shuffle=False)
KINDS = dict(windows=windows, stream=stream)

def learner(dl):
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    return TbpttLearner(DataLoaders(dl, dl, device='cpu'), model(), loss_func=nn.MSELoss(), opt_func=sgd, lr=.1)

def process(kind, **kwargs):
    learn = learner(KINDS[kind]())
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(**kwargs): learn.fit(2)
    return learn.model.state_dict()

if __name__=='__main__':
    from fastai.distributed import rank_distrib
    from accelerate import DistributedDataParallelKwargs
    found = {kind: process(kind) for kind in KINDS}
    found['unused'] = process('windows', kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    torch.save(found, f'{sys.argv[1]}/{rank_distrib()}.pt')

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    from test_distributed import launch
    folder = tmp_path_factory.mktemp('encoded')
    launch('test_encoded_processes.py', folder, cwd=folder)
    return [torch.load(folder/f'{rank}.pt') for rank in range(2)]

def check_same(a, b):
    for (name,p),q in zip(a.items(), b.values(), strict=True): torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)

@pytest.mark.parametrize('kind', [*KINDS, 'unused'])
def test_both_processes_have_the_same_model(results, kind): check_same(results[0][kind], results[1][kind])

def test_a_stream_that_is_shared_trains_as_one_that_is_not(results):
    learn = learner(stream(4)) # the rows of both
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    check_same(results[0]['stream'], learn.model.state_dict())

def test_windows_that_are_shared_give_the_mean_of_two_gradients(results):
    net,(xs,ys) = model(),draw([30]*8)
    rnn,head,enc = net[1].rnn,net[2],net[1].initial.encoder
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    for rows in ([0,1,4,5], [2,3,6,7])*2:
        x,y = (torch.stack([o[i] for i in rows]) for o in (xs, ys))
        h,c = (o[None].contiguous() for o in enc(torch.cat([x, y], 2)[:,:N_PAST]).split(3, 1))
        for start,stop in ((4,8), (8,16), (16,24), (24,30)):
            out,(h,c) = rnn(x[:,start:stop], (h, c))
            h,c = h.detach(),c.detach()
            (nn.functional.mse_loss(head(out), y[:,start:stop])*(stop-start)/8).backward()
            opt.step()
            opt.zero_grad()
    for kind in ('windows','unused'): check_same(results[0][kind], net.state_dict())
