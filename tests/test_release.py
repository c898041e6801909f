"What a release needs: one version everywhere, a workflow that publishes it, links that hold on the package index, forms for issues"
import importlib.util, re, shlex, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT/'.github'
in_clone = pytest.mark.skipif(not GITHUB.exists(), reason='this is no clone')

def tool(name):
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT/f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

release = tool('release')

@pytest.fixture
def readme():
    pytest.importorskip('nbdev')
    return tool('readme')

# Versions

def version(): return release.versions(ROOT)['tbptt_fastai/__init__.py']

@pytest.fixture
def project(tmp_path):
    "A copy of the files that say a version"
    for f in release.PLACES:
        (tmp_path/f).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/f)
    return tmp_path

def test_every_file_has_the_version_of_the_package():
    assert release.faults(ROOT, f'v{version()}')==[]
    assert set(release.versions(ROOT).values())=={version()}

@pytest.mark.parametrize('file', release.PLACES)
def test_a_tag_is_refused_where_one_file_has_another_version(project, file):
    text = (project/file).read_text(encoding='utf-8')
    (project/file).write_text(text.replace(version(), '9.9.9', 1), encoding='utf-8')
    faults = release.faults(project, f'v{version()}')
    assert faults and all(o.startswith(file) for o in faults)

@pytest.mark.parametrize('tag', ['0.1.0', 'v0.1', 'v1', 'v0.1.0.dev1', 'version', 'v0.1.0 ', ''])
def test_what_is_no_tag_of_a_release_is_refused(tag): assert 'no tag of a release' in release.faults(ROOT, tag)[0]

def test_a_version_without_notes_is_refused(project):
    (project/'CHANGELOG.md').write_text(f'# Changelog\n\n## {version()}\n\n## 0.0.1\n\nOld.\n', encoding='utf-8')
    assert release.faults(project, f'v{version()}')==[f'CHANGELOG.md says nothing of {version()}']

def test_the_command_exits_with_1_and_says_why(project):
    def run(tag):
        cmd = [sys.executable, '-S', ROOT/'tools/release.py', tag, '--root', project] # -S: without any installed package
        return subprocess.run(cmd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    good,bad = run(f'v{version()}'),run('v9.9.9')
    assert (good.returncode, good.stdout.strip())==(0, release.notes(ROOT, version()))
    assert bad.returncode==1 and 'the tag is v9.9.9' in bad.stderr and not bad.stdout

def test_the_notes_of_the_version_are_short_and_in_groups():
    notes = release.notes(ROOT, version())
    assert len(notes.splitlines())<=45 and len(notes.split())<=450
    assert len(re.findall(r'^\*\*.+\*\*$', notes, re.M))>=3

# Links on the package index

URL = 'https://git.invalid/somebody/something'
LINKS = [
    ('[a page](nbs/a.ipynb)', '*a page*', f'[a page]({URL}/blob/main/nbs/a.ipynb)'),
    ('[`code`](nbs/a.ipynb#part)', '`code`', f'[`code`]({URL}/blob/main/nbs/a.ipynb#part)'),
    ('[`x[0]`](nbs/a.ipynb), [b](c.md)', '`x[0]`, *b*', f'[`x[0]`]({URL}/blob/main/nbs/a.ipynb), [b]({URL}/blob/main/c.md)'),
    ('![words](nbs/a.png)', '*words*', f'![words]({URL}/raw/main/nbs/a.png)'),
    ('![](nbs/a.png)', '', f'![]({URL}/raw/main/nbs/a.png)'),
    ('[below](#install)', '*below*', f'[below]({URL}#install)'),
    ('[out](https://pytorch.org)', *['[out](https://pytorch.org)']*2),
    ('```md\n[a](b.md)\n```', *['```md\n[a](b.md)\n```']*2)]

@pytest.mark.parametrize('text,unknown,known', LINKS, ids=[o[0] for o in LINKS])
def test_links_hold_outside_of_the_repository(readme, text, unknown, known):
    assert readme.for_package_index(text, URL)==known
    assert readme.for_package_index(text, '').split('\nPages named')[0]==unknown

def links_of(text): return re.findall(r'\]\(([^)\s]+)\)', re.sub(r'^```.*?^```', '', text, flags=re.M|re.S))

def test_the_package_index_gets_no_relative_link():
    found = links_of((ROOT/'README.pypi.md').read_text(encoding='utf-8'))
    assert all(re.match('https?:', o) for o in found), found

def test_every_relative_link_of_the_readme_leads_to_a_file():
    found = [o for o in links_of((ROOT/'README.md').read_text(encoding='utf-8')) if not re.match('https?:|#', o)]
    assert len(found)>10
    missing = [o for o in found if not (ROOT/o.split('#')[0]).is_file()]
    assert not missing, missing

def test_pictures_of_the_readme_are_described():
    assert re.findall(r'!\[(.*?)\]', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert '![]' not in (ROOT/'README.md').read_text(encoding='utf-8')

def test_the_readme_says_how_to_install_it():
    for name in ('README.md', 'README.pypi.md'): assert '\npip install tbptt_fastai\n' in (ROOT/name).read_text(encoding='utf-8')

# Workflows and forms

def load(path): return yaml.safe_load(path.read_text(encoding='utf-8'))

def triggers(workflow): return workflow[True] # `on` is a truth value in YAML 1.1

@in_clone
def test_a_tag_is_tested_before_it_is_published():
    flow = load(GITHUB/'workflows/publish.yaml')
    assert triggers(flow)=={'push': {'tags': ['v*']}}
    jobs = flow['jobs']
    assert [jobs[o].get('needs') for o in ('version', 'test', 'build', 'publish')]==[None, 'version', 'test', 'build']
    assert any('tools/release.py "$GITHUB_REF_NAME"' in o.get('run', '') for o in jobs['version']['steps'])
    assert jobs['test']['uses']=='./.github/workflows/test.yaml'
    assert 'workflow_call' in triggers(load(GITHUB/'workflows/test.yaml'))
    commands = [o.get('run', '') for o in jobs['build']['steps']]
    assert 'python -m build' in commands and 'python -m twine check --strict dist/*' in commands

@in_clone
def test_only_the_job_that_publishes_may_and_it_needs_no_secret():
    text = (GITHUB/'workflows/publish.yaml').read_text(encoding='utf-8')
    flow = load(GITHUB/'workflows/publish.yaml')
    assert 'secrets.' not in text and flow['permissions']=={'contents': 'read'}
    assert [o for o,job in flow['jobs'].items() if 'permissions' in job]==['publish']
    publish = flow['jobs']['publish']
    assert publish['permissions']=={'id-token': 'write'} and publish['environment']=='pypi'
    assert publish['steps'][-1]['uses'].startswith('pypa/gh-action-pypi-publish@')

@in_clone
def test_branches_and_pull_requests_are_tested_as_before():
    on = triggers(load(GITHUB/'workflows/test.yaml'))
    assert on['push']=={'branches': ['**']} and {'pull_request', 'workflow_dispatch'}<=on.keys()

FORMS = ['bug', 'question', 'feature']

def form(name): return load(GITHUB/f'ISSUE_TEMPLATE/{name}.yml')

@in_clone
@pytest.mark.parametrize('name', FORMS)
def test_forms_have_what_github_asks_for(name):
    got = form(name)
    assert {'name', 'description', 'body'}<=got.keys()<={'name', 'description', 'body', 'labels', 'title', 'assignees'}
    ids = [o['id'] for o in got['body'] if o['type']!='markdown']
    assert ids and len(set(ids))==len(ids)
    for o in got['body']:
        assert o['type'] in ('markdown', 'textarea', 'input')
        assert 'value' in o['attributes'] if o['type']=='markdown' else o['attributes']['label']

def field(name, id): return next(o for o in form(name)['body'] if o.get('id')==id)

@in_clone
def test_a_fault_is_reported_with_versions_and_code():
    for o in ('happened', 'code', 'versions'): assert field('bug', o)['validations']['required'] is True

@in_clone
def test_the_command_for_the_versions_prints_them():
    line = re.search('`(python .+)`', field('bug', 'versions')['attributes']['description'])[1]
    cmd = [sys.executable, '-W', 'ignore', *shlex.split(line)[1:]]
    res = subprocess.run(cmd, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert res.returncode==0 and res.stdout.split()[-1]==version(), res.stderr

@in_clone
def test_the_code_to_begin_with_runs(tmp_path):
    (tmp_path/'fault_report.py').write_text(field('bug', 'code')['attributes']['value'], encoding='utf-8')
    res = subprocess.run([sys.executable, '-W', 'ignore', 'fault_report.py'], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
