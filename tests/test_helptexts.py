"`help()` shows what is written beside parameters"
import inspect, pydoc
from dataclasses import dataclass, field
import pytest
import tbptt_fastai.all as ours
from fastcore.docments import docments
from tbptt_fastai.helptexts import HEADING, add_parameters, fields_of

public = {name: o for name,o in vars(ours).items() if getattr(o, '__module__', '').startswith('tbptt_fastai.') and (inspect.isclass(o) or inspect.isfunction(o))}

def test_there_are_public_names(): assert len(public)>35

@pytest.mark.parametrize('name', public)
def test_help_has_every_docment(name):
    o = public[name]
    shown = ' '.join(pydoc.render_doc(o, renderer=pydoc.plaintext).split())
    source = o if inspect.isfunction(o) else vars(o).get('__init__')
    if source is None: return
    told = {k: v for k,v in docments(source, returns=False).items() if v and k not in ('self', 'return')}
    for parameter,text in told.items(): assert ' '.join(text.split()) in shown, parameter

def test_a_loader_a_learner_and_an_instrument():
    for o,words in ((ours.TbpttLearner, 'sub_seq_len: Steps of a sub-window'), (ours.SequenceDataLoaders.from_arrays, 'win_sz: Steps of a window'),
                    (ours.Learner.tbptt_find, 'bias: Largest relative bias')):
        assert words in o.__doc__

@dataclass
class Pair:
    "Two numbers"
    a:int # First of them
    # Second of them;
    # default: none
    b:int|None=None
    c:int=field(default=0, repr=False)
    def sum(self):
        a = self.a # is no field
        return a+(self.b or 0)

def test_fields_of_a_named_tuple_and_of_a_data_class():
    assert 'start: First step' in ours.SubWindow.__doc__ and 'carry: Step whose state' in ours.SubWindow.__doc__
    assert fields_of(Pair) == dict(a='First of them', b='Second of them; default: none')
    assert fields_of(ours.TbpttResetCB) == {} and fields_of(int) == {}

def test_texts_are_added_once():
    before = ours.TbpttLearner.__doc__
    add_parameters(ours.TbpttLearner)
    assert ours.TbpttLearner.__doc__ == before and before.count(HEADING)==1

def test_names_of_the_helper_are_no_names_of_users(): assert not hasattr(ours, 'add_parameters') and not hasattr(ours, '_ours')
