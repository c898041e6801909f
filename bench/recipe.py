"The recipe of the benchmarks of recorded systems: what is trained, how the epoch is chosen, and what is reported"
import argparse, contextlib, io, tempfile, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
from time import perf_counter
import numpy as np, torch
from fastai.callback.tracker import SaveModelCallback
from tbptt_fastai.all import *
from harness import headline, save, spread, table

SKIP = 50 # steps at the start of a test, where the published figures do not count the error either


class Scales:
    "Input and output by the mean and the deviation of the training part"
    def __init__(self, u, y): self.values = [(o.mean(), o.std()) for o in (u, y)]
    def __call__(self, u, y): return [((o-m)/s).astype('f4')[:,None] for o,(m,s) in zip((u, y), self.values)]
    def output(self, y): return y*self.values[1][1]+self.values[1][0]

class Net(nn.Module):
    "A recurrent layer, and a linear one on its output and, if asked for, on the input"
    def __init__(self, layer, n_in=1, initial=None, direct=False):
        super().__init__()
        self.rnn = StatefulRNN(layer, initial=initial)
        self.head = nn.Linear(layer.hidden_size, 1)
        self.direct = nn.Linear(n_in, 1, bias=False) if direct else None
    def forward(self, x):
        out = self.head(self.rnn(x))
        return out if self.direct is None else out+self.direct(x)

def steps_of_epoch(learn): return len(learn.tbptt_reset_cb.training_view(learn.dls.train))

def fitted(dls, model, updates, lr, **how):
    "A learner with the weights of the best validation, that error, and the seconds that it took"
    with tempfile.TemporaryDirectory() as folder:
        learn = TbpttLearner(dls, model, loss_func=nn.MSELoss(), grad_clip=1., path=folder, num_threads=1, **how)
        n_epoch = max(updates//steps_of_epoch(learn), 1)
        start = perf_counter()
        with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
            learn.fit_flat_cos(n_epoch, lr, cbs=SaveModelCallback())
        seconds = perf_counter()-start
        best = min(o[1] for o in learn.recorder.values)
    return learn,best**.5,seconds

@torch.no_grad()
def predicted(model, scales, u):
    "The output of one pass over all steps, from the first state"
    model.eval()
    x,_ = scales(u, u)
    return scales.output(model(torch.tensor(x)[None])[0,:,0].numpy())

def rmse(pred, y, skip=SKIP): return float(np.sqrt(np.mean((pred[skip:]-y[skip:])**2)))

def arguments(doc, updates):
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--updates', type=int, default=updates)
    parser.add_argument('--path', help='cache of nonlinear_benchmarks; default: nlb_cache in the folder of TBPTT_DATA')
    parser.add_argument('--only', nargs='+', help='some of the rows')
    parser.add_argument('--look', action='store_true', help='also at the test; without it, at the validation alone')
    parser.add_argument('--json', help='file for all results')
    return parser
