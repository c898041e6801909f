"The plan covers every step once, in order, and weighs every counted step alike"
import pytest
from hypothesis import given, strategies as st
from tbptt_fastai.truncation import Fixed


@given(st.integers(1, 400), st.data())
def test_the_plan_covers_the_window_and_weighs_steps_alike(win_sz, data):
    sub_seq_len,n_skip = data.draw(st.none() | st.integers(1, 500)),data.draw(st.integers(0, win_sz-1))
    plan = Fixed(sub_seq_len or win_sz).sub_windows(win_sz, n_skip)
    steps = [t for o in plan for t in range(o.start, o.stop)]
    assert steps==list(range(win_sz))
    assert all(o.stop-o.start==(sub_seq_len or win_sz) for o in plan[:-1])
    counted = [t for o in plan for t in range(o.loss_start, o.stop)]
    assert counted==list(range(n_skip, win_sz))
    # the gradient is weight x mean loss, so a step pulls with weight / number of counted steps: the same everywhere
    pulls = [o.weight/(o.stop-o.loss_start) for o in plan if o.stop>o.loss_start]
    assert max(pulls)==pytest.approx(min(pulls)) and max(o.weight for o in plan)==1


@pytest.mark.parametrize('args,exc,message', [
    ((100, 0), ValueError, 'sub_seq_len is 0; expected at least 1'), ((100, -3), ValueError, 'sub_seq_len is -3'),
    ((100, 2.), TypeError, 'sub_seq_len is 2.0, a float'), ((100, True), TypeError, 'sub_seq_len is True'),
    ((100, '10'), TypeError, "sub_seq_len is '10'"), ((0, 10), ValueError, 'win_sz is 0'),
    ((100, 10, -1), ValueError, 'n_skip is -1; expected at least 0'), ((100, 10, 100), ValueError, 'n_skip is 100, the window has 100 steps'),
])
def test_lengths_that_make_no_sense(args, exc, message):
    with pytest.raises(exc, match=message): Fixed(args[1]).sub_windows(args[0], *args[2:])
