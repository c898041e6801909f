"The plan covers every step once, in order, and weighs every counted step alike"
from random import Random
import pytest
from hypothesis import given, strategies as st
from tbptt_fastai.truncation.plan import Fixed


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
def test_lengths_that_make_no_sense_are_refused(args, exc, message):
    with pytest.raises(exc, match=message): Fixed(args[1]).sub_windows(args[0], *args[2:])


def test_a_plan_that_is_kept_is_the_one_that_is_asked_for():
    "... by length, washout and sub-window; what is done to a list that was given does not come back"
    fixed = Fixed(5)
    first = fixed.sub_windows(20)
    first.pop()
    assert len(fixed.sub_windows(20))==4 and len(fixed.sub_windows(25))==5 and fixed.sub_windows(25, 3)[0].loss_start==3 and fixed.sub_windows(25)[0].loss_start==0
    fixed.sub_seq_len = 10
    assert len(fixed.sub_windows(25))==3
    for args in ((25., 0),(25, True),(25, -1)):
        with pytest.raises((TypeError,ValueError)): fixed.sub_windows(*args)

def test_plans_of_subclasses_are_made_anew():
    class Drawn(Fixed):
        random = True
        def plan(self, win_sz, rng): return [(0, n := rng.randrange(1, win_sz)), (n, win_sz)]
    drawn,rng = Drawn(5),Random(0)
    assert len({drawn.sub_windows(1000, 0, rng)[0].stop for _ in range(6)})>3
    class Weighed(Fixed):
        factor = 1.
        def weight(self, n, most): return self.factor
    weighed = Weighed(5)
    weighed.sub_windows(20)
    weighed.factor = 3.
    assert weighed.sub_windows(20)[0].weight==3
    fixed = Fixed(5)
    fixed.sub_windows(20)
    fixed.plan = lambda win_sz, rng: [(0, win_sz)]
    assert len(fixed.sub_windows(20))==1
