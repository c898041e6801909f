"States of any nesting: detached, checked, begun anew in single rows"
import copy, dataclasses, pickle
from collections import namedtuple
from contextlib import nullcontext
import pytest
import torch
from fastai.torch_core import TensorBase
from torch import nn
from tbptt_fastai.state.stateful import InitialState, StatefulRNN
from tbptt_fastai.state.tree import batch_dims, check_state, detach_state, state_batch_size, state_leaves, where_state

Pair = namedtuple('Pair', 'h c')

@dataclasses.dataclass
class Memory:
    slots: torch.Tensor
    age: torch.Tensor
    note: object = None

@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Memory
    twice: torch.Tensor = dataclasses.field(init=False)
    def __post_init__(self): object.__setattr__(self, 'twice', self.inner.slots*2)


def tensors(bs=3, requires_grad=False): return [torch.randn(bs, 2, requires_grad=requires_grad) for _ in range(3)]

NESTS = dict(
    tensor=lambda a,b,c: a,
    tuple=lambda a,b,c: (a, (b, c)),
    namedtuple=lambda a,b,c: Pair(a, [b, None, c]),
    dict=lambda a,b,c: {'x': a, 'more': {'y': b, 'z': (c, 7, 'name', True)}},
    dataclass=lambda a,b,c: Memory(a, b, [c]),
    frozen=lambda a,b,c: (Frozen(Memory(a, b)), {'c': c}),
    numbers=lambda a,b,c: (a, torch.arange(3), torch.tensor([True,False,True]), torch.tensor(5)),
)

@pytest.mark.parametrize('nest', NESTS.values(), ids=NESTS)
def test_detached_state_keeps_values_and_form_and_no_history(nest):
    state = nest(*[o*1 for o in tensors(requires_grad=True)])
    cut = detach_state(state)
    before,after = state_leaves(state),state_leaves(cut)
    assert type(cut) is type(state) and len(before)==len(after)
    for a,b in zip(before, after):
        if isinstance(a, torch.Tensor): assert torch.equal(a, b) and not b.requires_grad
        else: assert a is b


@pytest.mark.parametrize('nest', NESTS.values(), ids=NESTS)
@pytest.mark.parametrize('zeros', [True, False])
def test_rows_that_begin_anew_take_the_first_state_and_the_others_keep_theirs(nest, zeros):
    old,new = nest(*tensors()),nest(*tensors())
    rows = torch.tensor([True, False, True])
    state = where_state(rows, None if zeros else new, old)
    assert type(state) is type(old)
    for a,o,n in zip(state_leaves(state), state_leaves(old), state_leaves(new), strict=True):
        if not isinstance(o, torch.Tensor) or o.ndim==0: assert a is o
        else:
            assert a.dtype==o.dtype and torch.equal(a[1], o[1])
            assert torch.equal(a[[0,2]], torch.zeros_like(o[[0,2]]) if zeros else n[[0,2]])


def test_what_has_no_batch_is_declared():
    state = {'slots': torch.randn(4, 3), 'mean': torch.randn(7), 'layers': Pair(torch.randn(2, 4), 3)}
    dims = {'slots': 0, 'mean': None, 'layers': Pair(1, None)}
    assert batch_dims(state, dims)==[0, None, 1, None] and state_batch_size(state, dims)==4
    assert batch_dims(torch.zeros(2, 3), -1)==[1] and batch_dims([torch.zeros(2, 3), torch.zeros(4)], -2)==[0, None]
    assert where_state(torch.tensor([True, False]), None, torch.ones(3, 2), -1).tolist()==[[0., 1.]]*3
    check_state(state, 4, torch.device('cpu'), dims)
    begun = where_state(torch.tensor([True,False,False,False]), None, state, dims)
    assert torch.equal(begun['mean'], state['mean']) and (begun['slots'][0]==0).all() and (begun['layers'].h[:,0]==0).all() and torch.equal(begun['layers'].h[:,1:], state['layers'].h[:,1:])
    with pytest.raises(ValueError, match='disagree about the batch size'): state_batch_size(state)
    with pytest.raises(ValueError, match='has not the form of the state'): batch_dims(state, {'slots': 0})
    with pytest.raises(ValueError, match='batch size 4, the input 5'): check_state(state, 5, torch.device('cpu'), dims)
    with pytest.raises(ValueError, match='expected the same form'): where_state(torch.tensor([True]*4), (torch.zeros(4, 3),), state, dims)


def test_dicts_may_come_in_any_order():
    initial,state = {'h': torch.zeros(1,2), 'c': (torch.ones(1,2), {'a': torch.full((1,2), 2.), 'b': 0})},{'c': (torch.full((2,2), 5.), {'b': 1, 'a': torch.full((2,2), 6.)}), 'h': torch.full((2,2), 7.)}
    begun = where_state(torch.tensor([True,False]), initial, state)
    assert begun['h'].tolist()==[[0,0],[7,7]] and begun['c'][0].tolist()==[[1,1],[5,5]] and begun['c'][1]['a'].tolist()==[[2,2],[6,6]]
    with pytest.raises(ValueError, match='expected the same form'): where_state(torch.tensor([True,False]), {'h': torch.zeros(1,2)}, {'c': torch.zeros(2,2)})
    assert batch_dims(state, {'h': 1, 'c': (None, {'a': 0, 'b': None})})==[None, None, 0, 1]


@dataclasses.dataclass
class Holder:
    kept: dict

def test_dicts_in_dataclasses_may_come_in_any_order():
    state,initial = (Holder({'a': torch.ones(2), 'b': torch.full((2,), 2.)}),),(Holder({'b': torch.full((2,), 20.), 'a': torch.full((2,), 10.)}),)
    begun = where_state(torch.tensor([True,False]), initial, state)[0].kept
    assert begun['a'].tolist()==[10,1] and begun['b'].tolist()==[20,2]
    assert batch_dims(state, (Holder({'b': None, 'a': 0}),))==[0, None]


def test_a_first_state_is_of_the_type_of_the_state():
    state = torch.ones(2, 3),torch.ones(2, 1, dtype=torch.int64)
    begun = where_state(torch.tensor([True,False]), (torch.full((1, 3), .5, dtype=torch.float64), torch.zeros(2, 1)), state)
    assert [o.dtype for o in begun]==[torch.float32, torch.int64] and begun[0].tolist()==[[.5]*3, [1]*3] and begun[1].tolist()==[[0],[1]]


@pytest.mark.parametrize('rows', [[True], [True,False,True,False], [1,0,1], [[True,False,True]]])
def test_rows_are_one_bool_for_each(rows):
    rows = torch.tensor(rows)
    with pytest.raises(ValueError, match=rf'rows is {rows.dtype} with shape \({rows.shape[0]},.*; expected bool with one value for each of 3'): where_state(rows, None, (torch.zeros(3, 2), 1))


@pytest.mark.parametrize('initial,match', [((torch.zeros(3, 5), None), r'shape \(3, 5\), the state shape \(3, 2\)'), ((torch.zeros(1, 3, 2), None), r'shape \(1, 3, 2\)'), ((7, None), 'int 7, the state shape'),
    ([torch.zeros(3, 2)], 'expected the same form'), ({'h': torch.zeros(3, 2), 'n': 1}, 'expected the same form'), (torch.zeros(3, 2), 'expected the same form')])
def test_a_first_state_that_does_not_fit_is_refused(initial, match):
    with pytest.raises(ValueError, match=match): where_state(torch.tensor([True,False,True]), initial, (torch.ones(3, 2), 1))


@pytest.mark.parametrize('batch_dim', [True, 1., '1', (0, True)])
def test_dimensions_are_numbers(batch_dim):
    with pytest.raises(TypeError, match='expected a number, or a nest'): batch_dims((torch.zeros(3, 2), torch.zeros(3)), batch_dim)


def test_the_device_is_that_of_the_input():
    check_state((torch.zeros(3, 2), 1), 3, torch.device('cpu'))
    with pytest.raises(ValueError, match='on meta, the input on cpu'): check_state((torch.zeros(3, 2), torch.zeros(3, device='meta')), 3, torch.device('cpu'))


class Counting(nn.Module):
    "A leaky sum in a dataclass, with a count of steps for each row and statistics that all rows share"
    def __init__(self): super().__init__(); self.leak = nn.Parameter(torch.tensor(.9))
    def initial_state(self, bs, device, dtype): return {'memory': Memory(torch.ones(bs, 2, device=device, dtype=dtype), torch.zeros(bs, dtype=torch.int64, device=device)), 'seen': torch.zeros(3)}
    def forward(self, x, state):
        m,out = state['memory'],[]
        h = m.slots
        for t in range(x.shape[1]):
            h = self.leak*h+x[:,t]
            out.append(h)
        return torch.stack(out, 1),{'memory': Memory(h, m.age+x.shape[1]), 'seen': state['seen']+1}

DIMS = {'memory': Memory(0, 0), 'seen': None}

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_module_with_a_first_state_of_its_own_begins_rows_with_it(dtype):
    torch.manual_seed(0)
    core = Counting().to(dtype)
    rnn,x = StatefulRNN(core, batch_dim=DIMS),torch.randn(3, 20, 2, dtype=dtype)
    whole = core(x, core.initial_state(3, x.device, dtype))[0]
    parts = torch.cat([rnn(o) for o in x.split(6, 1)], 1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6 if dtype==torch.float32 else 1e-12)
    assert rnn.state['memory'].age.tolist()==[20]*3 and not rnn.state['memory'].slots.requires_grad and rnn.state['memory'].slots.dtype==dtype
    rnn.reset(torch.tensor([False, True, False]))
    y = rnn(x)
    torch.testing.assert_close(y[1], whole[1])
    assert rnn.state['memory'].age.tolist()==[40, 20, 40] and rnn.state['seen'].tolist()==[5]*3
    rnn.eval()
    torch.testing.assert_close(rnn(x), whole)
    with pytest.raises(ValueError, match='batch size 3, the input 2'): rnn.train()(x[:2])


def test_an_evaluation_leaves_a_pending_reset():
    torch.manual_seed(0)
    x,gru = torch.randn(3, 5, 2),nn.GRU(2, 4, batch_first=True)
    rnn = StatefulRNN(gru)
    first,rows = rnn(x),torch.tensor([True,False,False])
    expected = gru(x, torch.where(rows[:,None], 0., rnn.state))[0]
    rnn.reset(rows)
    torch.testing.assert_close(rnn.eval()(x[:2]), first[:2])
    torch.testing.assert_close(rnn.train()(x), expected)
    torch.testing.assert_close(rnn(x), gru(x, gru(x, torch.where(rows[:,None], 0., gru(x)[1]))[1])[0]) # once


def test_groups_that_are_given_for_an_evaluation_are_for_one_call():
    rnn,x = StatefulRNN(nn.GRU(2, 4, batch_first=True), initial=InitialState(torch.randn(1, 1, 4), batch_dim=1)).eval(),torch.randn(3, 5, 2)
    rnn.reset(groups=list('abc'))
    torch.testing.assert_close(rnn(x)[:2], rnn(x[:2]))


class BatchSecond(nn.Module):
    "A GRU inside of a module: its state is `(layers, batch, hidden)`"
    def __init__(self): super().__init__(); self.gru = nn.GRU(2, 3, 2, batch_first=True)
    def initial_state(self, bs, device, dtype): return torch.zeros(2, bs, 3, device=device, dtype=dtype)
    def forward(self, x, state): return self.gru(x, state)

def test_a_batch_in_another_dimension_is_declared():
    x,core,rows = torch.randn(2, 5, 2),BatchSecond(),torch.tensor([True,False])
    rnn = StatefulRNN(core)
    rnn(x)
    rnn.reset(rows) # as many rows as layers
    with pytest.raises(ValueError, match=r'batch of 3 has 2 in its batch dimension, 0.*batch_dim='): rnn(x)
    for rnn in (StatefulRNN(core, batch_dim=1), StatefulRNN(core, -2, InitialState(torch.zeros(2, 1, 3), batch_dim=1))):
        first = rnn(x)
        rnn.reset(rows)
        torch.testing.assert_close(rnn(x)[0], first[0])
    with pytest.raises(ValueError, match=r'dimensions \[1\], those of the state in \[0\]'): StatefulRNN(core, initial=InitialState(torch.zeros(2, 1, 3), batch_dim=1))
    rnn,x = StatefulRNN(core),torch.randn(4, 5, 2)
    rnn(x)
    with pytest.raises(ValueError, match=r'batch size 2, the input 4.*StatefulRNN\(\.\.\., batch_dim=1\)'): rnn(x)
    with pytest.raises(ValueError, match='TbpttResetCB` does[^=]*$'): check_state(torch.zeros(5, 3), 4, torch.device('cpu'))


@pytest.mark.parametrize('groups', [None, ['a','b']])
def test_first_states_may_be_of_any_nesting(groups):
    @dataclasses.dataclass
    class Unmet:
        h: torch.Tensor
        age: torch.Tensor
        note: object = None
    n = len(groups or 'a')
    state = {'memory': Unmet(nn.Parameter(torch.randn(2, n)), torch.arange(n), 'name'), 'mean': torch.zeros(7), 'count': 3, 'none': None}
    initial = InitialState(state, groups, batch_dim={'count': None, 'none': None, 'mean': None, 'memory': Unmet(1, 0)})
    assert [o.requires_grad for o in initial.parameters()]==[True, False, False]
    initial.load_state_dict(pickle.loads(pickle.dumps(initial.state_dict())))
    for o in (initial, copy.deepcopy(initial)):
        first,row = o(list('ba')),[n-1, 0]
        assert torch.equal(first['memory'].h, state['memory'].h[:,row]) and first['memory'].age.tolist()==row
        torch.utils._pytree.SUPPORTED_NODES.pop(Unmet) # as in another process, where it is unpickled
        assert first['memory'].note=='name' and first['mean'].shape==(7,) and first['count']==3 and first['none'] is None
    with pytest.raises(ValueError, match='has shape \\(5, 2\\); expected'): InitialState((torch.zeros(5, 2), None), groups)


def test_flat_states_keep_their_types():
    "The short way for plain tuples of tensors is for those alone"
    class Pair(tuple): pass
    State = namedtuple('State', 'h c')
    a,b = torch.ones(1, 2, 3, requires_grad=True)*2,torch.ones(1, 2, 3)
    for state in ((a,b), Pair((a,b)), State(a, b), [a,b], (a,(b,)), (a,None), a):
        if type(state) is Pair: # no form that PyTorch knows: a leaf
            with pytest.raises(TypeError, match='Pair'): detach_state(state)
            continue
        cut = detach_state(state)
        assert type(cut) is type(state) and not any(o.requires_grad for o in state_leaves(cut) if o is not None) and len(state_leaves(cut))==len(state_leaves(state))
    assert type(detach_state((TensorBase(b),))[0]) is TensorBase

@pytest.mark.parametrize('batch_dim,match', [(5, None), (-1, 'batch size 3, the input 2'), ((0,0), None), ((1,1), 'batch size 3, the input 2')])
def test_a_declared_batch_dimension_is_looked_at_in_the_short_way_too(batch_dim, match):
    "... also negative, out of range (no batch there), and as a nest"
    class Cell(nn.Module):
        def forward(self, x, state=None): return x,(torch.zeros(2, 3),torch.zeros(2, 3))
    rnn = StatefulRNN(Cell(), batch_dim=batch_dim)
    rnn(torch.zeros(2, 4, 1))
    with nullcontext() if match is None else pytest.raises(ValueError, match=match): rnn(torch.zeros(2, 4, 1))
