"What `tools/pages.py` finds on a page that is not fit to be read"
import ast, importlib.util, json
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('pages', ROOT/'tools'/'pages.py')
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

HEAD = '---\ntitle: A page\ndescription: What it is about\n---\n'

def markdown(text): return dict(cell_type='markdown', metadata={}, source=text)
def code(text, *outputs): return dict(cell_type='code', metadata={}, execution_count=None, source=text, outputs=list(outputs))
def stream(text, name='stdout'): return dict(output_type='stream', name=name, text=text)

def write(folder, name, *cells, head=HEAD):
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = dict(cell_type='raw', metadata={}, source=head)
    path.write_text(json.dumps(dict(cells=[raw, *cells], metadata={}, nbformat=4, nbformat_minor=5)))

@pytest.fixture
def site(tmp_path):
    "A page to link to, `rooms/01_other.ipynb`, which is `rooms/other.html` on the site"
    write(tmp_path, 'rooms/01_other.ipynb', markdown('## What it *costs*, in `ms`'))
    return tmp_path

def faults(folder, *cells, head=HEAD):
    write(folder, 'page.ipynb', *cells, head=head)
    return pages.Site(folder).report()

def test_a_page_without_faults(site):
    links = 'See [that](rooms/01_other.ipynb#what-it-costs-in-ms), `a`, [this](/rooms/other.html) and [all](https://docs.fast.ai).'
    assert faults(site, markdown(links), code('x = 1\nx', stream('1\n'))) == []

@pytest.mark.parametrize('link, why', [
    ('rooms/02_other.ipynb', 'no such page'), ('../rooms/01_other.ipynb.html', 'no such page'), ('/rooms/another.html', 'no such page'),
    ('rooms/01_other.ipynb#what-it-is', 'no such section'), ('#nowhere', 'no such section'), ('bench/README.md', 'no such page')])
def test_a_link_that_leads_nowhere_is_named(site, link, why):
    [fault] = faults(site, markdown(f'[a link]({link})'))
    assert link in fault and why in fault and fault.startswith('page.ipynb: cell 1')

def test_a_link_in_code_is_none(site): assert faults(site, markdown('`[a](b.ipynb)`\n\n```python\nx[0](c)\n```')) == []

def test_a_link_in_a_link_is_named(site):
    (site/'other.md').write_text('x')
    for text in ('[see [`f`](other.md)](other.md)', '[[`f`](other.md), [`g`](other.md)](other.md)'):
        assert 'a link in a link' in faults(site, markdown(text))[0]

def test_a_link_in_brackets_is_none(site):
    (site/'other.md').write_text('x')
    assert faults(site, markdown('x[0] and ([see](other.md)) or [1] [`f`](other.md)')) == []

def test_code_that_is_too_wide_is_named(site):
    wide = 'x = '+'1+'*43+'1'
    assert len(wide)==91
    [fault] = faults(site, code(wide))
    assert '91 columns' in fault

def test_code_that_nobody_sees_may_be_wide(site): assert faults(site, code('#| echo: false\n'+'x = '+'1+'*43+'1')) == []

@pytest.mark.parametrize('language', ['python', 'text', ''])
def test_fenced_code_that_is_too_wide_is_named(site, language):
    "And a diagram; a message of several words wraps, which is no code"
    [fault] = faults(site, markdown(f"Words.\n\n```{language}\nx = {'1+'*43}1\n```"))
    assert '91 columns' in fault
    message = faults(site, markdown(f"Words.\n\n```{language}\n{'ValueError: it says what is wrong, and what to do. '*3}\n```"))
    assert len(message)==(language=='python')

def test_fenced_code_behind_another_block_or_of_many_words_is_named(site):
    wide = 'x = 1 # '+'and here is what it is for in words '*3
    [fault] = faults(site, markdown(f"Words.\n\n```sh\nls\n```\n\n```python\n{wide}\n```"))
    assert 'columns of code: x = 1' in fault

@pytest.mark.parametrize('output, found', [
    (stream('UserWarning: something\n', 'stderr'), 'stderr'), (stream('█ 0.00% [0/8 00:00<?]\n'), 'progress bar'),
    (stream("File '/home/somebody/x.py'\n"), '/home/somebody'), (stream('/usr/lib/site-packages/torch\n'), 'site-packages'),
    (stream('x.py:3: UserWarning: something\n  f()\n'), 'a warning'), (stream('Traceback (most recent call last):\n  f()\n'), 'a traceback'),
    (stream('[0, 1.172500729560852, 0.9470813274383545]\n'), 'without its table'), (stream('1.25 '*30), '150 columns of output'),
    (dict(output_type='error', ename='ValueError', evalue='no', traceback=['ValueError: no']), 'error')])
def test_an_output_that_is_not_for_readers_is_named(site, output, found):
    [fault] = faults(site, code('input()', output))
    assert found in fault

def test_a_sentence_of_an_output_may_be_long(site): assert faults(site, code('input()', stream('it says what is wrong and then what to do about it, '*4))) == []

def test_an_output_that_nobody_sees_may_say_anything(site):
    assert faults(site, code('#| output: false\ninput()', stream('UserWarning: something\n', 'stderr'))) == []

@pytest.mark.parametrize('text', ['It is in /home/somebody/data.', '`/tmp/x.csv`'])
def test_a_path_in_the_text_is_named(site, text): assert 'the path /' in faults(site, markdown(text))[0]

def test_a_path_in_code_that_shows_is_named(site): assert 'the path /work/data' in faults(site, code("open('/work/data')"))[0]

@pytest.mark.parametrize('text', ['![](figure.png)', '<img src="figure.png">', '<a href="rooms/03_other.ipynb">there</a>', '[a](b.ipynb "title")'])
def test_an_image_or_a_link_of_another_form_that_leads_nowhere_is_named(site, text): assert 'no such page' in faults(site, markdown(text))[0]

def test_an_image_that_is_there_is_found(site):
    (site/'figure.png').write_bytes(b'')
    assert faults(site, markdown('![](figure.png) <img width=3 src="figure.png">')) == []

def signature(): return code('#| echo: false\n#| output: asis\nshow_doc(f)')

def test_a_page_begins_with_a_sentence(site):
    words = markdown('## Heading\n\nWhat it is for.')
    for first in (signature(), code('import f'), markdown('```text\na diagram\n```')):
        assert 'begins with code' in faults(site, markdown('## Heading'), first, words)[0]
        assert faults(site, words, first) == []

@pytest.mark.parametrize('head, found', [('---\ndescription: it\n---\n', 'no title'), ('---\ntitle: it\n---\n', 'no description')])
def test_a_page_says_what_it_is(site, head, found): assert faults(site, head=head) == [f'page.ipynb: {found}']

def test_shown_cells_of_the_notebooks_fit():
    "Before they are processed, too: cells that show, without those that are exported or hidden"
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if any(o[0] in '._' for o in path.relative_to(ROOT/'nbs').parts): continue
        for cell in pages.cells_of(path):
            text = pages.joined(cell['source'])
            if not pages.shown(cell) or any(f'#| {o}' in text for o in ('export', 'hide', 'default_exp')): continue
            wide = [o for o in pages.code_of(cell) if len(o)>pages.WIDTH]
            assert not wide, f'{path.relative_to(ROOT)}: {wide}'

def test_numbers_of_a_page_are_those_of_the_benchmark():
    "Pages are run without the files of the repository, so they repeat what they draw"
    sources = [pages.joined(c['source']) for c in pages.cells_of(ROOT/'nbs'/'explanation'/'which_truncation.ipynb')]
    [source] = [o for o in sources if o.startswith('silverbox = {')]
    results = json.loads((ROOT/'bench'/'results'/'silverbox.json').read_text(encoding='utf-8'))['results']
    assert ast.literal_eval(source.removeprefix('silverbox = ')) == {k: [round(r['multisine'], 3) for r in rs] for k,rs in results.items()}

def test_the_curves_of_a_page_end_where_those_of_the_benchmark_do():
    rows = {'zero state': 'zero state, windows of 100', 'zero state, burn-in': 'zero state, windows of 100, burn-in',
        'one order': 'carried through all the data, in one order', 'sub-windows of 100': 'sub-windows of 100 in windows of 1000',
        'in flight': 'the same, 16 batches of windows in flight', 'Overlap(20, 100)': 'Overlap(20, 100) in windows of 1000',
        'Overlap, in flight': 'the same, 16 batches of windows in flight, Overlap(20, 100)', 'stored states': 'stored states in nine of ten windows of 100'}
    sources = [pages.joined(c['source']) for c in pages.cells_of(ROOT/'nbs'/'explanation'/'which_truncation.ipynb')]
    [source] = [o for o in sources if 'curves = {' in o]
    curves = ast.literal_eval(source.partition('curves = ')[2])
    results = json.loads((ROOT/'bench'/'results'/'burn_in.json').read_text(encoding='utf-8'))['results']
    measured = {k: results[f'Wiener-Hammerstein | {row} | fit_flat_cos, 1e-3'][0]['curve'] for k,row in rows.items()}
    assert {k: points[-1][1] for k,points in curves.items()} == {k: round(100*min(o), 3) for k,o in measured.items()}


# what is announced, and what is used

def test_a_sentence_that_announces_what_is_not_there_is_named(site):
    "Private code is left out of a page; a sentence before it stays"
    unseen = code('#| echo: false\n#| output: false\nx = 1', stream('1\n'))
    for after in ([markdown('And another sentence.')], [markdown('## A heading')], [], [unseen]):
        [fault] = faults(site, markdown('A text.\n\nIt is written so:'), *after)
        assert fault.endswith('nothing follows: …It is written so:')
    [fault] = faults(site, markdown('It is written so:\n\nAnd another sentence.'))
    assert 'nothing follows' in fault

@pytest.mark.parametrize('after', ['```python\nx = 1\n```', '| a | b |\n|---|---|', '- one\n- two', '1. one', '![x](rooms/01_other.ipynb)', '> said', '$$x$$'])
def test_what_may_be_announced(site, after):
    assert faults(site, markdown('Here it is:\n\n'+after)) == [] == faults(site, markdown('Here it is:'), markdown(after))

def test_code_and_output_may_be_announced(site):
    assert faults(site, markdown('Here it is:'), code('1+1', stream('2\n')))==[]
    assert faults(site, markdown('Here it is:'), code('#| echo: false\nprint(1)', stream('1\n')))==[]

def test_a_callout_announces_nothing(site): assert faults(site, markdown('::: {.callout-note}\nA text.\n:::'), markdown('Another.'))==[]

def test_a_name_that_a_reader_does_not_have_is_named(site):
    hidden = code('#| include: false\nfolder = 1')
    [fault] = faults(site, markdown('A text.'), hidden, code('folder+1'), code('folder+2'))
    assert fault == 'page.ipynb: folder is not defined above'
    [fault] = faults(site, markdown('A text.'), code('f(1)'), code('def f(x): return x'))
    assert 'f is not defined' in fault

@pytest.mark.parametrize('defined', ['import os.path as a', 'from os import path as a', 'from os.path import *; a = join', 'a = 1', 'def a(): pass', 'class a: pass',
    'for a in []: pass', 'b,(a,*c) = 1,(2,3)', 'with open(0) as a: pass', 'if (a := 1): pass', 'try: pass\nexcept OSError as a: pass', '[print(a) for a in []]',
    'f = lambda a: a', '%matplotlib inline\na = 1'])
def test_how_a_name_may_be_defined(site, defined): assert faults(site, markdown('A text.'), code(defined), code('print(a)'))==[]

def test_a_star_import_defines_what_the_module_exports(site):
    assert faults(site, markdown('A text.'), code('from tbptt_fastai.all import *'), code('RNNLearner,torch,np,test_eq'))==[]
    [fault] = faults(site, markdown('A text.'), code('from os.path import *'), code('join,listdir'))
    assert 'listdir' in fault

def test_sections_about_the_inside_and_internal_pages_may_use_what_is_hidden(site):
    assert faults(site, markdown('A text.'), markdown('## Inside: how'), code('_hidden(1)'))==[]
    sidebar = 'website:\n  sidebar:\n    contents:\n      - section: Reference\n        contents:\n          - section: Internals\n            contents:\n              - text: A page\n                href: '
    (site/'sidebar.yml').write_text(sidebar+'page.ipynb\n')
    assert faults(site, markdown('A text.'), code('_hidden(1)'))==[]
    (site/'sidebar.yml').write_text(sidebar+'rooms/01_other.ipynb\n')
    assert len(faults(site, markdown('A text.'), code('_hidden(1)')))==1
