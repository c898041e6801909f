"""What does a loop over single steps cost, and what does torch.compile save of it?

Forward and backward pass of one sub-window, by `nn.LSTM`, by a cell of torch.nn and by a memory of several operations step by step (`Unroll`): as they are, with the cell
compiled, and with the whole `Unroll` compiled, which is done again for each number of steps. The first pass compiles, and is shown apart.
"""
from functools import partial
from time import perf_counter
import torch, torch._inductor.config
from harness import arguments, column, headline, save, spread, table, turns
from torch import nn
from tbptt_fastai.state.stateful import StatefulRNN
from tbptt_fastai.state.unroll import Unroll

BS,STEPS,CHANNELS,HIDDEN,PASSES = 16,20,4,32,50


class Memory(nn.Module):
    "A gated sum, read by a linear layer"
    def __init__(self):
        super().__init__()
        self.gate,self.value,self.read = nn.Linear(CHANNELS, HIDDEN),nn.Linear(CHANNELS, HIDDEN),nn.Linear(HIDDEN, HIDDEN)

    def init_memory(self): return torch.zeros(HIDDEN)

    def forward(self, x, memory):
        gate = self.gate(x).sigmoid()
        memory = gate*memory+(1-gate)*self.value(x).tanh()
        return self.read(memory).tanh(),memory


def layer(): return nn.LSTM(CHANNELS, HIDDEN, batch_first=True)

def unrolled(make, compiled=None):
    unroll = Unroll(make())
    if compiled=='cell': unroll.cell.compile()
    if compiled=='whole': unroll.compile()
    return unroll

def contenders():
    res = {'nn.LSTM': layer}
    for name,make in {'nn.LSTMCell': partial(nn.LSTMCell, CHANNELS, HIDDEN), 'memory': Memory}.items():
        for how,compiled in {'': None, ', cell compiled': 'cell', ', Unroll compiled': 'whole'}.items():
            res[name+how] = partial(unrolled, make, compiled)
    return res

def passes(rnn, x, n):
    start = perf_counter()
    for _ in range(n): rnn(x).sum().backward()
    return (perf_counter()-start)/n


if __name__=='__main__':
    torch._inductor.config.force_disable_caches = True # what the first pass costs on a new machine
    args = arguments(__doc__, repeats=5).parse_args()
    torch.set_num_threads(1)
    x,made,firsts = torch.randn(BS, STEPS, CHANNELS),{},{}
    for name,make in contenders().items():
        made[name] = StatefulRNN(make())
        firsts[name] = passes(made[name], x, 1)
    runs = turns(made, args.repeats, lambda name,_: dict(t=passes(made[name], x, PASSES)), warm_up=1)
    headline('one thread', f'batch {BS}, sub-window {STEPS}, {HIDDEN} hidden', f'median (range) of {args.repeats}')
    table(['', 'ms a sub-window', 's the first'], [(name, spread(column(o, 't', 1e3), '.2f'), f'{firsts[name]:.1f}') for name,o in runs.items()])
    save(args, runs)
