"The sidebar has every page once, and the front page leads to what people look for"
import ast, json, re
from pathlib import Path
import pytest, yaml
import tbptt_fastai

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
PACKAGE = Path(tbptt_fastai.__file__).parent # which the source distribution is tested without
SECTIONS = ['Start', 'Tutorials', 'How-to', 'Understand', 'Reference']

def contents(): return yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']

def section(items, name): return next(o for o in items if o.get('section')==name)['contents']

def entries(items):
    "All links, in order"
    for o in items:
        if 'href' in o: yield o
        yield from entries(o.get('contents', []))

def hrefs(items): return [o['href'] for o in entries(items)]

def pages(): return sorted(str(p.relative_to(NBS).as_posix()) for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts))

def cells(page): return json.loads((NBS/page).read_text(encoding='utf-8'))['cells']

def front_page(): return '\n'.join(''.join(o['source']) for o in cells('index.ipynb') if o['cell_type']=='markdown')

def title_lines(page): return next(''.join(c['source']) for c in cells(page) if ''.join(c['source']).startswith('# ')).splitlines()

def test_no_words_are_lost_with_a_title():
    "What a cell has beyond a title, a sentence, and settings is not on the site"
    lost = {}
    for page in pages():
        beyond = [o for o in title_lines(page)[1:] if o.strip() and not o.startswith(('>', '- '))]
        if beyond: lost[page] = beyond
    assert not lost, f'these lines belong in a cell of their own: {lost}'

def test_every_page_is_in_the_sidebar_once():
    listed = hrefs(contents())
    missing,unknown = sorted(set(pages())-set(listed)),sorted(set(listed)-set(pages()))
    assert not missing, f'nbs/sidebar.yml has no line for {missing}'
    assert not unknown, f'nbs/sidebar.yml names {unknown}, which are not there'
    assert len(set(listed)) == len(listed)

def test_the_sections_are_what_people_do(): assert [o['section'] for o in contents()] == SECTIONS

def test_every_entry_is_a_page_or_a_section_with_pages():
    def check(items):
        assert items
        for o in items:
            assert o.keys() in ({'text','href'}, {'section','contents'}), o
            check(o['contents']) if 'section' in o else None
    check(contents())

def test_the_first_page_is_the_front_page(): assert hrefs(contents())[0] == 'index.ipynb'

def test_internals_are_last(): assert contents()[-1]['contents'][-1]['section'] == 'Internals'

def test_a_page_has_the_same_name_in_the_sidebar_and_above_it():
    "But for those of the reference, which list what is on them, and the front page"
    named = {o['href']: o['text'] for name in SECTIONS[:-1] for o in entries(section(contents(), name)) if o['href']!='index.ipynb'}
    assert len(named)>25 and named == {o: title_lines(o)[0][2:] for o in named}

def test_names_tell_pages_apart():
    names = [o['text'] for o in entries(contents())]
    assert len(set(names)) == len(names)

def test_reference_is_folded_by_room():
    "Titles of tutorials and how-to pages show at once; pages of a room, and the internals, once a reader opens them"
    sidebar = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']
    assert sidebar['collapse-level'] == 2
    for name in SECTIONS[:-1]: assert all('href' in o for o in section(contents(), name))
    assert all('section' in o for o in section(contents(), 'Reference')[1:])

def modules():
    "The page that each module is written in"
    found = {p: re.search(r'^#\| *default_exp +(\S+)', '\n'.join(''.join(c['source']) for c in cells(p)), re.M) for p in pages()}
    return {m[1]: p for p,m in found.items() if m}

def test_names_that_users_type_are_not_among_the_internals():
    names = (PACKAGE/'all.py').read_text(encoding='utf-8')
    typed = set(re.findall(r'^from tbptt_fastai\.(\S+) import', names, re.M))
    reference = section(contents(), 'Reference')
    internal = set(hrefs(section(reference, 'Internals')))
    assert len(typed)>20 and typed<=modules().keys()
    hidden = sorted(o for o in typed if modules()[o] in internal)
    assert not hidden, hidden

def typed_names():
    "What `from tbptt_fastai.all import *` has of this library, by the page it is written on"
    text = (PACKAGE/'all.py').read_text(encoding='utf-8')
    found = [o for o in ast.parse(text).body if isinstance(o, ast.ImportFrom) and o.module.startswith('tbptt_fastai.')]
    written = modules()
    return {written[o.module.removeprefix('tbptt_fastai.')]: [n.name for n in o.names] for o in found}

def shown_sections(page):
    "The sections of a page but those about its inside, which come last"
    sections = [[]]
    for cell in cells(page):
        if cell['cell_type']=='markdown' and ''.join(cell['source']).startswith('## '): sections.append([])
        sections[-1].append(cell)
    return [sections[0], *(o for o in sections[1:] if not ''.join(o[0]['source']).startswith('## Inside'))]

def class_of(o):
    "Of a method that a cell adds to it; `None` for other definitions"
    added = any(re.match(r'patch\b', ast.unparse(d)) for d in o.decorator_list)
    return ast.unparse(o.args.args[0].annotation) if added else None

def defined(cell):
    "Public names that a page shows for a cell; a method shows its class"
    code = ''.join(cell['source'])
    if shown := re.match(r'show_doc\((\w+)(\.\w+)?\)', code): return [shown[1]]
    if cell['cell_type']!='code' or not re.search(r'^#\| *export\b', code, re.M) or re.search(r'^#\| *hide\b', code, re.M): return []
    tree = ast.parse('\n'.join(o for o in code.splitlines() if not o.startswith(('%', '!'))))
    public = [o for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name[0]!='_']
    return [class_of(o) or o.name for o in public]

def has_output(cell):
    return cell['cell_type']=='code' and bool(cell['outputs']) and not re.search(r'^#\| *(hide|output: *false)', ''.join(cell['source']), re.M)

@pytest.mark.parametrize('page', typed_names())
def test_a_reference_page_begins_with_what_its_readers_type(page):
    first = next(n for o in shown_sections(page) for c in o for n in defined(c))
    assert first in typed_names()[page], f'{first}, of {page}, belongs in a section "## Inside: …"'

@pytest.mark.parametrize('page,name', [(p, n) for p,names in typed_names().items() for n in names])
def test_a_name_that_users_type_has_an_example_with_its_output(page, name):
    shown = sum(shown_sections(page), [])
    at = next(i for i,c in enumerate(shown) if name in defined(c))
    later = [i for i,c in enumerate(shown) if i>at and set(defined(c)) & set(typed_names()[page])-{name}]
    own = shown[at:later[0] if later else None]
    example = [c for c in own if has_output(c) and re.search(rf'\b{name}\b', ''.join(c['source']))]
    assert example, f'{page} shows no output of `{name}` after it, and before the next name'

@pytest.mark.parametrize('page', [o for o in pages() if o.startswith(('how_to/', 'tutorials/', 'explanation/'))])
def test_a_page_that_runs_code_shows_what_comes_of_it(page):
    shown = [c for c in cells(page) if c['cell_type']=='code' and not re.match(r'#\| *hide', ''.join(c['source']))]
    assert len(shown)<2 or any(map(has_output, shown)), f'{page} was saved without outputs'

def test_the_build_leaves_it_alone():
    tomllib = pytest.importorskip('tomllib')
    config = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))
    assert config['tool']['nbdev']['custom_sidebar'] is True

def test_it_is_in_the_repository():
    ignore = ROOT/'.gitignore'
    if not ignore.exists(): pytest.skip('this is no clone')
    assert 'sidebar.yml' not in ignore.read_text(encoding='utf-8')

def leads_to(page):
    "Has the front page a link to it, or to a section of it?"
    return re.search(rf'\]\({re.escape(page)}(#[^)]*)?\)', front_page()) is not None

# What people say, and the page that it is about
TASKS = {
    'five machines with holes in their CSV files': 'how_to/my_csv_files.ipynb',
    'my language model forgets between batches': 'how_to/fastai_text.ipynb',
    'it is slow on my laptop': 'how_to/gpu_and_threads.ipynb',
    'which length?': 'tutorials/by_task.ipynb',
    'I have a Learner, and its loaders': 'how_to/existing_pipeline.ipynb',
    'a label for each second of sound': 'how_to/classification.ipynb',
    'my recordings do not fit in memory': 'how_to/larger_than_memory.ipynb',
    'the machine is switched off at night': 'how_to/resume.ipynb',
    'a colleague wants my trained model': 'how_to/save_and_share.ipynb',
    'predictions on a microcontroller, sample by sample': 'how_to/deploy.ipynb',
    'we used Keras with stateful=True': 'how_to/coming_from.ipynb',
    'what does this warning mean?': 'explanation/troubleshooting.ipynb',
    'frames of a camera': 'tutorials/video.ipynb',
    'two GPUs': 'how_to/distributed.ipynb',
    'ragged series, every step counted once': 'how_to/unequal_lengths.ipynb',
    'the first predictions are bad, and I set n_skip': 'how_to/burn_in.ipynb',
    'a metric in the units of my measurement': 'how_to/several_outputs.ipynb#units',
    'my own LSTM cell': 'state/04_unroll.ipynb',
    'can I trust the numbers?': 'explanation/what_is_tested.ipynb',
    'validation loss differs from mine': 'explanation/troubleshooting.ipynb#the-validation-loss-is-not-the-one-i-calculate'}

@pytest.mark.parametrize('task', TASKS)
def test_the_front_page_leads_to_the_page_of_a_task(task): assert leads_to(TASKS[task])

def test_the_front_page_leads_to_every_how_to_and_tutorial():
    missing = [o for o in pages() if o.startswith(('how_to/', 'tutorials/')) and not leads_to(o)]
    assert not missing, f'nbs/index.ipynb has no link to {missing}'

def test_the_front_page_is_short():
    "One picture, ten lines of code, and no more words than one reads in two minutes"
    shown = [c for c in cells('index.ipynb') if c['cell_type']=='code' and not re.match(r'#\| *hide', ''.join(c['source']))]
    pictures = [o for c in shown for o in c['outputs'] if 'image/png' in o.get('data', {})]
    lines = [o for c in shown if 'echo: false' not in ''.join(c['source']) for o in ''.join(c['source']).splitlines()]
    assert len(pictures)==1 and len(lines)<=10
    above = front_page().split('## Where to start')[0]
    assert len(re.sub(r'\]\([^)]*\)', '', above).split())<=250

def test_the_picture_shows_the_recorded_numbers():
    "Those of the page on costs, which names the scripts that measured them"
    costs = '\n'.join(''.join(o['source']) for o in cells('explanation/what_it_costs.ipynb'))
    drawn = next(s for s in (''.join(o['source']) for o in cells('index.ipynb')) if 'errors =' in s)
    values = dict(re.findall(r"^(errors|memory) = (.*)$", drawn, re.M))
    errors,memory = (ast.literal_eval(values[o]) for o in ('errors', 'memory'))
    for name,(low,mid,high) in errors.items(): assert f'{mid} ({low}–{high})' in costs, name
    for name,row in zip(('full', 'TBPTT, 100'), ('full backpropagation', 'TBPTT, 100')):
        assert memory[name] == [int(o) for o in re.findall(rf'^\| [\d,]+ \| {row} \| (\d+) ', costs, re.M)]
    assert 'bench/memory.py' in drawn and 'bench/silverbox_example.py' in drawn

def test_the_site_is_light_and_dark_and_fits_a_phone():
    html = yaml.safe_load((NBS/'_quarto.yml').read_text(encoding='utf-8'))['format']['html']
    assert html['theme'].keys() == {'light', 'dark'}
    for o in (html['css'], *(s for s in html['theme']['dark'] if s.endswith('.scss'))): assert (NBS/o).is_file()
    css = (NBS/html['css']).read_text(encoding='utf-8')
    assert 'max-width: 100%' in css and 'overflow-x: auto' in css and '.quarto-dark' in css
