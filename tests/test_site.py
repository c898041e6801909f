"The sidebar has every page once"
from pathlib import Path
import pytest, yaml

NBS = Path(__file__).resolve().parent.parent/'nbs'
SECTIONS = ['Start', 'Tutorials', 'How-to', 'Understand', 'Reference']

def contents(): return yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']

def entries(items):
    "All links, in order"
    for o in items:
        if 'href' in o: yield o
        yield from entries(o.get('contents', []))

def pages(): return sorted(str(p.relative_to(NBS).as_posix()) for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts))

def test_every_page_is_in_the_sidebar_once(): assert sorted(o['href'] for o in entries(contents())) == pages()

def test_the_sections_are_what_people_do(): assert [o['section'] for o in contents()] == SECTIONS

def test_internals_are_last(): assert contents()[-1]['contents'][-1]['section'] == 'Internals'

def test_names_tell_pages_apart():
    names = [o['text'] for o in entries(contents())]
    assert len(set(names)) == len(names)

def test_the_build_leaves_it_alone():
    tomllib = pytest.importorskip('tomllib')
    config = tomllib.loads((NBS.parent/'pyproject.toml').read_text(encoding='utf-8'))
    assert config['tool']['nbdev']['custom_sidebar'] is True
