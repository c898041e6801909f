"Batches that are sent one ahead come in the same order, each once; on a GPU they are waited for, and their memory is kept, before they are used"
from contextlib import contextmanager
import numpy as np
import pytest
import torch
from torch import Tensor
from fastai.torch_core import set_seed
import fastai.data.load
from tbptt_fastai.speed import ahead
from tbptt_fastai.speed.ahead import one_ahead, pinned_ahead
from tbptt_fastai.loaders.windows import TbpttDL
from tbptt_fastai.sequences.windows import SequenceWindows


def logged(log, what):
    def f(o):
        log.append((what, o))
        return o
    return f

def run(batches):
    log = []
    for o in one_ahead(batches, logged(log, 'send'), logged(log, 'receive')): log.append(('use', o))
    return log

@pytest.mark.parametrize('n', [0, 1, 2, 5])
def test_each_batch_is_sent_once_and_one_ahead(n):
    log = run(range(n))
    for what in ('send','receive','use'): assert [o for w,o in log if w==what]==list(range(n))
    for i in range(n-1): assert log.index(('receive', i))<log.index(('send', i+1))<log.index(('use', i))

def test_batches_may_be_none_or_empty(): assert [o for w,o in run([None, (), None]) if w=='use']==[None, (), None]

def test_what_send_returns_is_received(): assert list(one_ahead('ab', str.upper, lambda o: o*2))==['AA','BB']

def failing(n):
    yield from range(n)
    raise OSError('no more')

def refuse_two(o):
    if o==2: raise OSError('two')
    return o

@pytest.mark.parametrize('batches,send', [(failing(2), int), (range(9), refuse_two)])
def test_an_error_comes_after_the_batches_before_it(batches, send):
    used = []
    with pytest.raises(OSError):
        for o in one_ahead(batches, send, int): used.append(o)
    assert used==[0, 1]

def test_an_error_of_the_first_batch_comes_at_once():
    with pytest.raises(OSError): next(one_ahead(failing(0), int, int))

def test_an_interrupt_is_not_kept_waiting():
    def batches():
        yield 0
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): next(one_ahead(batches(), int, int))

def test_nothing_is_read_before_it_is_asked_for():
    log = []
    one_ahead((log.append(i) for i in range(3)), int, int)
    assert log==[]

def test_a_closed_generator_closes_what_it_reads():
    closed = []
    def batches():
        try: yield from range(9)
        finally: closed.append(True)
    gen = one_ahead(batches(), int, int)
    next(gen)
    gen.close()
    del gen
    assert closed==[True]


class Stream:
    "A record of what is asked of a stream"
    def __init__(self, log, name): self.log,self.name = log,name
    def wait_stream(self, other): self.log.append(f'{self.name} waits for {other.name}')

@pytest.fixture
def streams(monkeypatch):
    "The calls of `pinned_ahead`, with the CPU as its device"
    log = []
    current,side,within = Stream(log, 'current'),Stream(log, 'side'),[]
    @contextmanager
    def use(stream):
        within.append(stream.name)
        yield
        within.pop()
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: side)
    monkeypatch.setattr(torch.cuda, 'stream', use)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: current)
    def pin(o):
        log.append(f'pin {int(o.flatten()[0])}')
        return o
    to = Tensor.to
    def copy(o, device, non_blocking=False):
        log.append(f'copy {int(o.flatten()[0])} on {within[-1]}, {non_blocking=}')
        return to(o, device)
    monkeypatch.setattr(Tensor, 'pin_memory', pin)
    monkeypatch.setattr(Tensor, 'to', copy)
    monkeypatch.setattr(Tensor, 'record_stream', lambda o, stream: log.append(f'{int(o.flatten()[0])} is used on {stream.name}'))
    return log

def test_copies_run_on_a_side_stream_and_are_waited_for(streams):
    for i,o in enumerate(pinned_ahead([torch.tensor([i]) for i in range(2)], 'cpu')): streams.append(f'use {i}')
    assert streams==['pin 0', 'copy 0 on side, non_blocking=True',
                     'current waits for side', '0 is used on current', 'pin 1', 'copy 1 on side, non_blocking=True', 'use 0',
                     'current waits for side', '1 is used on current', 'use 1']

def test_all_tensors_of_a_nest_are_copied(streams):
    batch = {'a': torch.tensor([1.]), 'b': [torch.tensor([2.]), (3, 'four')]},torch.tensor([5.])
    (res,), = [list(pinned_ahead([batch], 'cpu'))]
    assert res[0]['b'][1]==(3, 'four') and res[1]==5.
    assert [o for o in streams if o.startswith('pin')]==['pin 1', 'pin 2', 'pin 5'] and sum('is used' in o for o in streams)==3


def batches(dl):
    set_seed(3)
    dl.rng.seed(5)
    return list(dl)

def make(u, **kwargs): return TbpttDL(SequenceWindows(u, u, win_sz=50), bs=5, shuffle=True, num_workers=0, device='cpu', **kwargs)

def test_a_loader_for_a_gpu_copies_ahead(signals, monkeypatch):
    used = []
    def fake(batches, device):
        used.append(device)
        return one_ahead(batches, lambda o: o, lambda o: o)
    plain = batches(make(signals[0]))
    assert not used
    monkeypatch.setattr(fastai.data.load, 'to_device', lambda b, device: b)
    for device in ('cuda', torch.device('cuda', 0)):
        dl = make(signals[0], ahead=fake).new()
        dl.device = device
        for a,b in zip(plain, batches(dl), strict=True): np.testing.assert_equal([o.numpy() for o in a], [o.numpy() for o in b])
        assert used.pop()==torch.device(device) and 'it' not in vars(dl)

def test_a_loader_that_may_draw_random_numbers_does_not(signals):
    for kwargs in (dict(after_item=lambda o: o), dict(before_batch=lambda o: o)):
        dl = make(signals[0], ahead=pinned_ahead, **kwargs)
        dl.device = 'cuda'
        assert not dl._copies_ahead
    assert not make(signals[0], ahead=pinned_ahead)._copies_ahead # on the CPU

def test_nothing_is_copied_ahead_unless_it_is_asked_for(signals):
    dl = make(signals[0])
    dl.device = 'cuda'
    assert not dl._copies_ahead
