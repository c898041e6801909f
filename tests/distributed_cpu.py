"Runs a script as one of several processes on the CPU: `torchrun --nproc_per_node 2 distributed_cpu.py script.py args`"
import faulthandler, os, runpy, sys

os.environ['ACCELERATE_USE_CPU'] = 'true' # what `accelerate launch --cpu` sets
faulthandler.dump_traceback_later(240, exit=True) # a process that hangs says where, and ends

import torch
from fastai.distributed import DistributedDL

torch.set_num_threads(1)

def broadcast(self, t, rank):
    "`DistributedDL._broadcast` without its `.cuda()`: gloo, unlike nccl, works with tensors on the CPU"
    t = torch.tensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()

DistributedDL._broadcast = broadcast

if __name__=='__main__':
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
    sys.stdout.flush()
    os._exit(0) # all is done; a process that ends by itself aborts now and then, when the machine is busy, on a thread of torch ("terminate called without an active exception")
