"Random calls of public constructors end in right behaviour or in a named error; the long form is bench/fuzz.py"
import importlib.util, warnings
from pathlib import Path
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    spec = importlib.util.spec_from_file_location('bench_fuzz', Path(__file__).resolve().parent.parent/'bench'/'fuzz.py')
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)


@pytest.mark.parametrize('seed', [0, 1])
def test_valid_arguments_are_right_in_each_call(seed):
    for name,f,given,check,_ in fuzz.targets(np.random.default_rng(seed)):
        assert fuzz.outcome(f, given, check)==('right',None), name

@pytest.mark.parametrize('seed', range(100, 104))
def test_wild_arguments_end_in_right_behaviour_or_in_a_named_error(seed):
    counts,bad = fuzz.run(seed, 150)
    assert not bad,'\n'.join(bad)
    for kind in ('right', 'refused'): assert sum(n for (_,k),n in counts.items() if k==kind)>5

def test_what_is_raw_wrong_or_hangs_is_seen():
    def raises(): raise ValueError('of a test, not of the library')
    assert fuzz.outcome(lambda: [][0], {}, fuzz.right)[0]=='raw'
    assert fuzz.outcome(raises, {}, fuzz.right)[0]=='raw'
    assert fuzz.outcome(fuzz.Fixed, dict(sub_seq_len='a'), fuzz.right)[0]=='refused'
    def is_wrong(made): assert made==2, 'wrong'
    assert fuzz.outcome(lambda: 1, {}, is_wrong)[0]=='wrong'
    def never():
        while True: pass
    assert fuzz.outcome(never, {}, fuzz.right, seconds=1)[0]=='hangs'
