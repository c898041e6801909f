"How the pages show a symbol"
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Optional, Union
import pytest
pytest.importorskip('nbdev') # which the lowest versions are tested without
from nbdev.config import get_config, tomllib
from nbdev.showdoc import show_doc
from tbptt_fastai._reference import TableRenderer, WIDTH, signature_of
from tbptt_fastai.deploy.predictor import StreamPredictor
from tbptt_fastai.learner import RNNLearner, TbpttLearner, default_loss, scaling_from_data
from tbptt_fastai.instruments.health import GradientHealth
from tbptt_fastai.instruments.table import TrainingTable
from tbptt_fastai.truncation.plan import SubWindow, Truncation

ROOT = Path(__file__).resolve().parent.parent

def shown(o): return TableRenderer(o)._repr_markdown_()

def described(a:int, # How many
              b:str='x', # Which
              c:'dict|None'=None, # Which of two
              *args, **kwargs):
    "What it does"

def test_parameters_are_a_table_and_the_signature_has_no_comments():
    text = shown(described)
    assert "described(a, b='x', c=None, *args, **kwargs)" in text
    assert '| a | int |  | How many |' in text and '| b | str | x | Which |' in text
    assert '# How many' not in text

def test_what_is_not_described_has_no_row(): assert '| args |' not in shown(described) and '| kwargs |' not in shown(described)

def test_every_docment_is_in_the_table():
    text = shown(default_loss)
    assert '| scale_y | Standardize | None | Scaling of the outputs;' in text

def dashes(o): return [len(d) for d in next(l for l in shown(o).splitlines() if set(l)=={'|','-'}).strip('|').split('|')]

@pytest.mark.parametrize('o', [TbpttLearner, default_loss], ids=lambda o: o.__name__)
def test_the_meaning_has_more_than_half_of_the_width(o):
    "Pandoc would give each column a quarter of it, if all had three dashes"
    *others,meaning = dashes(o)
    assert meaning>sum(others) and sum(others)+meaning==100

def test_a_table_without_types_has_no_column_for_them():
    def f(a, # How many
          b): # Which
        pass
    assert len(dashes(f))==2

def test_the_fields_of_a_named_tuple_are_a_table():
    text = shown(SubWindow)
    assert '| start | int |  | First step; 0 marks a new window |' in text
    assert '| carry | int \\| None | None | Step whose state the next sub-window starts from; default: `stop` |' in text
    assert 'every counted step of a window weighs the same; 0: no step counts. `Truncation.sub_windows` sets it |' in text
    assert '| args |' not in text and '**Returns**' not in text

def test_a_named_tuple_of_a_cell_has_the_texts_of_its_module():
    "Python knows no source of a class that a page defines"
    names = {'__name__': '__main__'}
    exec('from typing import NamedTuple\nclass SubWindow(NamedTuple):\n    "Of a cell"\n    start:int\n    stop:int', names)
    text = shown(names['SubWindow'])
    assert '*Of a cell*' in text and '| start | int | First step; 0 marks a new window |' in text

def test_parameters_that_another_page_describes_are_one_row():
    text = shown(RNNLearner)
    assert '| kwargs | | | sub_seq_len, truncation, n_skip, ' in text and 'washout: as in `TbpttLearner`, and those of `Learner` |' in text
    assert '| hidden_size |' in text and '| grad_clip |' not in text
    assert 'initial=None, **kwargs)' in ' '.join(text.split()) and 'grad_clip=' not in text
    text = shown(TbpttLearner)
    assert '| kwargs | | | lr, splitter, metrics, ' in text and ': as in `Learner` |' in text and '| grad_clip |' in text

def test_types_are_named_without_their_modules():
    text = shown(TbpttLearner)
    assert 'fastai.callback' not in text and 'collections.abc' not in text and 'typing' not in text
    assert '| Optional |' not in text and '| Union |' not in text # of what?

def test_alternatives_are_shown_with_bars():
    def f(a:Union[Callable, list, None], # Which
          b:Optional[int], # Which
          c:Optional[list[int]], # Which
    ): pass
    for o in (r'| a | Callable \| list \| None | ', r'| b | int \| None | ', r'| c | Optional\[list\[int\]\] | '): assert o in shown(f)

def test_the_texts_that_help_shows_are_not_shown_twice():
    text = shown(TbpttLearner)
    assert text.count('Steps of a sub-window;')==1 and 'Parameters:' not in text

def test_a_default_is_no_html():
    def g(
        scheme=lambda k: k, # What to try
    ): pass
    assert '| scheme | function | a function | What to try |' in shown(g)

def test_events_of_a_callback_are_not_shown():
    "But for those that say what they are for, such as the hook of a scheme"
    assert shown(GradientHealth.before_fit) == '' and 'GradientHealth(' in shown(GradientHealth)
    assert 'before_epoch(learn)' in shown(Truncation.before_epoch)

def test_a_callback_without_settings_is_called_without(): assert 'TrainingTable()' in shown(TrainingTable)

def test_a_lambda_is_no_html_in_a_signature():
    def g(scheme=lambda k: k): pass
    assert signature_of('g', signature(g)) == 'g(scheme=...)'

def test_a_parameter_named_cls_is_shown():
    class A:
        def new(self,
            cls=None, # Of what kind
        ): pass
    text = shown(A.new)
    assert 'new(cls=None)' in text and '| cls | None | Of what kind |' in text

def test_brackets_of_a_type_are_no_link(): assert r'| list\[Standardize\]' in shown(scaling_from_data).replace('*', '')

def test_a_method_is_shown_without_self(): assert 'self' not in shown(StreamPredictor.reset).partition('\n\n*')[0]

@pytest.mark.parametrize('o', [TbpttLearner, default_loss, described], ids=lambda o: o.__name__)
def test_signatures_fit(o): assert max(map(len, shown(o).split('```')[1].splitlines()))<=WIDTH

def test_a_default_with_spaces_stays_on_its_line():
    def f(first=None, second=None, third=None, fourth=None, moms=(0.95, 0.85, 0.95), last='as the loaders say, or 1'): pass
    for name in ('f', 'f'+'x'*20, 'f'+'x'*30):
        text = signature_of(name, signature(f))
        assert 'moms=(0.95, 0.85, 0.95)' in text and "last='as the loaders say, or 1'" in text
        assert max(map(len, text.splitlines()))<=WIDTH

def test_no_source_link_where_the_address_is_not_known():
    assert ('[source]' in shown(TbpttLearner)) == bool(get_config(ROOT).git_url)

def test_a_source_link_leads_to_the_address(monkeypatch):
    monkeypatch.setattr('tbptt_fastai._reference.get_config', lambda: SimpleNamespace(git_url='https://git.invalid/a/b'))
    monkeypatch.setattr('nbdev.showdoc.NbdevLookup.code', lambda self, sym: f'https://git.invalid/a/b/{sym}')
    assert '[source](https://git.invalid/a/b/tbptt_fastai.learner.TbpttLearner)' in shown(TbpttLearner)

def test_the_renderer_is_one_that_is_installed():
    "The site is built by a program that has its own folder on the path, not that of the repository: it finds packages alone"
    config = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['tool']
    name = config['nbdev']['renderer']
    assert any(fnmatch(name.split('.')[0], o) for o in config['setuptools']['packages']['find']['include'])
    assert isinstance(show_doc(described, renderer=name), TableRenderer)
