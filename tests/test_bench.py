"What the benchmarks have in common: turns, figures and files of measurements."
import importlib.util, json, os
from argparse import Namespace
from pathlib import Path
import fastai, torch

spec = importlib.util.spec_from_file_location('bench_harness', Path(__file__).resolve().parent.parent/'bench'/'harness.py')
harness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(harness)

def test_contenders_take_turns_and_warm_up_does_not_count():
    order = []
    runs = harness.turns(['a','b'], 2, lambda name, i: order.append((name, i)) or dict(t=i+1), warm_up=1)
    assert order==[('a',-1), ('b',-1), ('a',0), ('b',0), ('a',1), ('b',1)]
    assert runs==dict(a=[dict(t=1), dict(t=2)], b=[dict(t=1), dict(t=2)])

def test_ratios_are_by_round_and_a_spread_is_median_and_extremes():
    runs,base = [dict(t=3.), dict(t=2.), dict(t=8.)],[dict(t=1.), dict(t=2.), dict(t=2.)]
    assert harness.ratios(runs, base, 't')==[3., 1., 4.]
    assert harness.spread(harness.column(runs, 't', 10), '.1f')=='30.0 (20.0–80.0)'

def test_a_table_has_words_to_the_left_and_numbers_to_the_right(capsys):
    harness.table(['loop','ms'], [('by hand', 1.5)])
    assert capsys.readouterr().out=='| loop | ms |\n| --- | --: |\n| by hand | 1.5 |\n'

def test_measurements_say_where_they_come_from(tmp_path):
    file = tmp_path/'runs.json'
    harness.save(Namespace(json=str(file), path='a folder', repeats=2), dict(a=[dict(t=1.), dict(t=2.)]))
    kept = json.loads(file.read_text())
    assert kept['results']==dict(a=[dict(t=1.), dict(t=2.)]) and kept['arguments']==dict(repeats=2)
    assert kept['versions']['torch']==torch.__version__ and kept['versions']['fastai']==fastai.__version__ and kept['cores']==os.cpu_count()
    harness.save(Namespace(json=None), {}) # nothing asked for
