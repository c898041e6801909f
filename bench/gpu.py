"""What does a training step cost on a GPU, and what do CUDA graphs save?

Every contender trains the same first weights for an epoch of windows of the same simulated signal, with Adam, a flat and then falling learning rate and gradient
clipping. They take turns; a ratio is that of one turn. The GPU has done its work before the clock is read. First, parameters after an epoch with and without
CUDA graphs are compared, and the times that a training step waits for the GPU are counted.
"""
import sys, warnings
from functools import partial
import torch
from fastai.torch_core import set_seed
from harness import arguments, column, headline, ratios, save, spread, table, turns
from step_loops import CASES, SUB, WIN, Work, by_fastai, by_hand, tbptt
from tbptt_fastai.loaders.dataloaders import SequenceDataLoaders
from tbptt_fastai.speed.ahead import pinned_ahead
from tbptt_fastai.speed.graphs import CudaGraphCB
from tbptt_fastai.learner import RNNLearner

N_STEPS = 50_000 # of the signal


class OnDevice(Work):
    "The work of `step_cost.py` on a simulated signal; the loop by hand has the signal on the device"
    def __init__(self, hidden, bs, stp, device):
        self.hidden,self.bs,self.stp,self.device = hidden,bs,stp,device
        torch.manual_seed(0)
        u = torch.randn(N_STEPS)
        y = torch.nn.functional.conv1d(torch.tanh(u)[None,None], torch.exp(-torch.arange(30)/10)[None,None], padding=29)[0,0,:N_STEPS] # remembers what was before
        self.arrays = [o[:,None].numpy() for o in (u,y)]
        self.u,self.y = (o[:,None].to(device) for o in (u,y))
        self.start = self.learner().model.to(device)
        self.n_windows = (N_STEPS-WIN)//stp+1
        self.n_batches = self.n_windows//bs
        self.n_steps = self.n_batches*(WIN//SUB)

    def learner(self, ahead=None, **kwargs):
        dls = SequenceDataLoaders.from_arrays(*self.arrays, valid=[o[:WIN] for o in self.arrays], win_sz=WIN, stp_sz=self.stp, sub_seq_len=SUB, bs=self.bs, drop_last=True, device=self.device, ahead=ahead)
        return RNNLearner(dls, hidden_size=self.hidden, grad_clip=1., **kwargs)

    def batch(self, numbers):
        at = (numbers[:,None]*self.stp+torch.arange(WIN)).to(self.device)
        return self.u[at],self.y[at]

def copied_ahead(work): return tbptt(work, ahead=pinned_ahead)
def graphed(work): return tbptt(work, cbs=CudaGraphCB, ahead=pinned_ahead)

CONTENDERS = {'by hand, fused Adam': partial(by_hand, fused=True), 'TbpttLearner': partial(by_fastai, tbptt),
              'TbpttLearner, copied ahead': partial(by_fastai, copied_ahead), 'TbpttLearner, CUDA graphs, copied ahead': partial(by_fastai, graphed)}


def trained(work, make):
    "Parameters after an epoch, and how often a step waited for the GPU"
    set_seed(0) # the order of windows too, which Python's random numbers decide
    model,run = make(work)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try: run()
        finally: torch.cuda.set_sync_debug_mode('default')
    waits = sum('synchronizing CUDA operation' in str(o.message) for o in seen)
    return torch.cat([p.detach().flatten() for p in model.parameters()]),waits/work.n_steps

def check(work):
    "With and without CUDA graphs the parameters are the same, but for rounding"
    res = {name: trained(work, make) for name,make in CONTENDERS.items()}
    eager,replayed = (res[name][0] for name in ('TbpttLearner, copied ahead','TbpttLearner, CUDA graphs, copied ahead'))
    diff = (eager-replayed).abs().max().item()
    print(f'largest difference of a parameter after {work.n_steps} steps with and without CUDA graphs: {diff:.1e}, of {eager.abs().max().item():.2f}\n')
    if not torch.allclose(eager, replayed, rtol=1e-3, atol=1e-4): sys.exit('CUDA graphs train another model.')
    return {name: waits for name,(_,waits) in res.items()}

def compare(work, repeats):
    "Times of all contenders"
    def measure(name, i):
        torch.manual_seed(i)
        seconds,cpu = CONTENDERS[name](work)[1]()
        return dict(seconds=seconds, cpu=cpu)
    return turns(CONTENDERS, repeats, measure, warm_up=1)

def show(case, work, runs, waits):
    print(f'{case}, sub-window {SUB}, window {WIN}: {work.n_steps} steps a turn\n')
    base,*_ = runs.values()
    table(['loop','ratio','time of a step [ms]','processor time of a step [ms]','waits for the GPU, per step'],
        [(name, spread(ratios(o, base, 'seconds')), spread(column(o, 'seconds', 1e3/work.n_steps)), spread(column(o, 'cpu', 1e3/work.n_steps)), f'{waits[name]:.2f}') for name,o in runs.items()])
    print()


def main():
    args = arguments(__doc__, 7, cases=dict(type=int, nargs='+', default=[0, 1], help='0: LSTM-40; 1: LSTM-128')).parse_args()
    if not torch.cuda.is_available(): sys.exit('This measures a GPU, and torch.cuda finds none. On a processor: step_cost.py.')
    device = torch.device('cuda', torch.cuda.current_device())
    headline(torch.cuda.get_device_name(device), f'median (range) of {args.repeats}')
    res = {}
    for case in [list(CASES)[i] for i in args.cases]:
        work = OnDevice(**CASES[case], device=device)
        waits = check(work)
        runs = compare(work, args.repeats)
        show(case, work, runs, waits)
        res[case] = dict(runs=runs, waits=waits)
    save(args, res)

if __name__ == '__main__': main()
