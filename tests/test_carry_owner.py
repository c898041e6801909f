"One `Carry` owns the states of a model: it resets them, takes snapshots, and keeps an evaluation apart from a training."
import copy
import pickle
import pytest
import torch
from torch import nn
from tbptt_fastai.state.carry import Carry, out_of_reach
from tbptt_fastai.state.stateful import InitialState, Slot, StatefulRNN

class Mixed(nn.Module):
    "A plain layer, a stateful one, and one with a learned first state"
    def __init__(self):
        super().__init__()
        self.plain,self.rnn = nn.LSTM(2, 4, batch_first=True),StatefulRNN(nn.GRU(4, 3, batch_first=True))
        self.begun = StatefulRNN(nn.GRU(3, 3, batch_first=True), initial=InitialState(nn.Parameter(torch.ones(1, 2, 3)), ['a','b'], batch_dim=1))
    def forward(self, x): return self.begun(self.rnn(self.plain(x)[0]))

@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed()

@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 40, 2)

GROUPS = ['a','b','a']

def run(model, carry, x, sizes=(10,)*4):
    carry.reset(groups=GROUPS)
    return torch.cat([model(part) for part in x.split(sizes, 1)], 1)

def test_a_carry_names_all_that_carry_a_state(model):
    carry = Carry(model)
    assert list(carry.modules)==['plain', 'rnn', 'begun'] and not carry.is_own and carry.states=={} and not carry.active

def test_parts_give_what_the_whole_gives(model, x):
    with Carry(model) as carry:
        whole = run(model, carry, x, (40,))
        torch.testing.assert_close(run(model, carry, x), whole)
        torch.testing.assert_close(run(model, carry, x, (1, 7, 30, 2)), whole)

def test_going_on_from_a_snapshot_is_going_on(model, x):
    "... in another context, and in a copy of the model that never saw the first steps"
    with Carry(model) as carry:
        whole = run(model, carry, x)
        carry.reset(groups=GROUPS)
        model(x[:,:10])
        kept = pickle.loads(pickle.dumps(carry.snapshot()))
        model(x[:,10:30])
    for other in (model, copy.deepcopy(model)):
        with Carry(other) as carry:
            carry.restore(kept)
            rest = torch.cat([other(part) for part in x[:,10:].split(10, 1)], 1)
            assert torch.equal(rest, whole[:,10:])

def test_a_snapshot_keeps_which_rows_start_over(model, x):
    rows = torch.tensor([True,False,True])
    with Carry(model) as carry:
        carry.reset(groups=GROUPS)
        model(x[:,:10])
        carry.reset(rows, GROUPS)
        kept,expected = carry.snapshot(),model(x[:,10:20])
        model(x[:,20:])
        carry.restore(kept)
        assert torch.equal(model(x[:,10:20]), expected)

def test_rows_that_start_over_are_those_of_a_new_window(model, x):
    with Carry(model) as carry:
        new,whole = run(model, carry, x[:,10:], (30,)),run(model, carry, x, (40,))[:,10:]
        carry.reset(groups=GROUPS)
        model(x[:,:10])
        carry.reset(torch.tensor([True,False,False]), GROUPS)
        out = model(x[:,10:])
    torch.testing.assert_close(out, torch.cat([new[:1], whole[1:]]))

def test_an_evaluation_leaves_the_training_state_alone(model, x):
    def evaluate():
        model.eval()
        with torch.no_grad(), Carry(model, evaluation=True) as carry: res = run(model, carry, x)
        model.train()
        return res
    with Carry(model) as carry:
        whole,evaluated = run(model, carry, x),evaluate()
        carry.reset(groups=GROUPS)
        first = model(x[:,:10])
        assert torch.equal(evaluate(), evaluated) # from its own first state, whatever is carried here
        assert torch.equal(torch.cat([first, *(model(part) for part in x[:,10:].split(10, 1))], 1), whole)

@pytest.mark.parametrize('evaluation', [False, True])
def test_out_of_reach_nothing_is_seen_or_changed(model, x, evaluation):
    model.train(not evaluation)
    with Carry(model, evaluation) as carry:
        whole = run(model, carry, x)
        carry.reset(groups=GROUPS)
        first = model(x[:,:10])
        with out_of_reach(model), Carry(model, evaluation) as inner: assert torch.equal(run(model, inner, x), whole)
        assert torch.equal(torch.cat([first, *(model(part) for part in x[:,10:].split(10, 1))], 1), whole)

def test_nothing_stays_whatever_ends_the_context(model, x):
    with pytest.raises(KeyboardInterrupt), Carry(model) as carry:
        run(model, carry, x)
        raise KeyboardInterrupt
    assert not Carry.entered and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert carry.states=={} and all(slot.owner is None for slot in carry.slots.values())
    assert not any('state' in k and 'begun' not in k for k in model.state_dict())

def test_a_context_can_be_entered_again(model, x):
    carry = Carry(model)
    with carry: first = run(model, carry, x)
    with carry: assert torch.equal(run(model, carry, x), first)

def test_states_are_detached_unless_the_graph_is_kept(model, x):
    for keep_graph in (False, True):
        with Carry(model, keep_graph=keep_graph) as carry:
            carry.reset(groups=GROUPS)
            model(x[:,:10])
            tensors = [t for state in carry.states.values() for t in (state if isinstance(state, tuple) else (state,))]
            assert len(tensors)==4 and all(t.requires_grad==keep_graph for t in tensors)

def test_a_slot_that_is_copied_is_empty():
    slot = Slot()
    slot.keep(torch.ones(2))
    for other in (copy.copy(slot), copy.deepcopy(slot), pickle.loads(pickle.dumps(slot))): assert other.state is None and other.owner is None

class Own(nn.Module):
    "A model that carries its state by itself, and counts its resets"
    def __init__(self):
        super().__init__()
        self.rnn,self.state,self.n_resets = nn.GRUCell(2, 3),None,0
    def reset(self): self.state,self.n_resets = None,self.n_resets+1
    def forward(self, x):
        for x_t in x.unbind(1): self.state = self.rnn(x_t, self.state)
        return self.state

def test_a_model_that_carries_by_itself_is_reset_once_and_as_a_whole(x):
    model = Own()
    carry = Carry(model)
    assert carry.is_own
    carry.reset()
    assert model.n_resets==1
    with pytest.raises(ValueError, match=r'reset\(\) of Own resets all rows'): carry.reset(torch.tensor([True,False,False]))
    assert model.n_resets==1
