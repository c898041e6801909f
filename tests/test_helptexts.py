"`help()` shows what is written beside parameters"
import inspect, pydoc
import pytest
import tbptt_fastai.all as ours
from fastcore.docments import docments
from tbptt_fastai.helptexts import HEADING, add_parameters

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

def test_texts_are_added_once():
    before = ours.TbpttLearner.__doc__
    add_parameters(ours.TbpttLearner)
    assert ours.TbpttLearner.__doc__ == before and before.count(HEADING)==1

def test_names_of_the_helper_are_no_names_of_users(): assert not hasattr(ours, 'add_parameters') and not hasattr(ours, '_ours')
