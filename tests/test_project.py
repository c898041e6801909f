"The files that describe or repeat the project agree with each other."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from nbdev.config import read_version, tomllib
from nbdev.migrate import nbdev_migrate_config

ROOT = Path(__file__).resolve().parent.parent

# What settings.ini cannot say, and why
ONLY_PYPROJECT = {f'project.optional-dependencies.{o}': 'nbdev 2 settings know no extra but dev'
    for o in ('benchmarks', 'bench', 'hdf5', 'onnx', 'distributed')}
ONLY_PYPROJECT |= {'project.urls.Repository': 'the address of the repository is set in one place'}
ONLY_PYPROJECT |= dict.fromkeys(['tool.nbdev.renderer', 'tool.nbdev.doc_procs'], 'nbdev 2 settings know none of this kind')
ONLY_PYPROJECT |= {f'tool.pytest.ini_options.{o}': "pytest's own table" for o in ('testpaths', 'filterwarnings')}

def prune(x):
    "Without empty strings: the migrator writes one for each thing that settings.ini leaves open"
    if isinstance(x, dict): return {k: prune(v) for k,v in x.items() if v != ''}
    return [prune(v) for v in x] if isinstance(x, list) else x

def flatten(d, pre=''):
    "Nested tables as one dict with dotted keys"
    res = {}
    for k,v in d.items(): res.update(flatten(v, f'{pre}{k}.') if isinstance(v, dict) else {f'{pre}{k}': v})
    return res

def fields(path): return flatten(prune(tomllib.loads(path.read_text(encoding='utf-8'))))

def test_settings_ini_migrates_to_pyproject(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    nbdev_migrate_config(path=str(tmp_path))
    ours = fields(ROOT/'pyproject.toml')
    assert ONLY_PYPROJECT.keys()-{'project.urls.Repository'} <= ours.keys() # which may be unknown
    packages = 'tool.setuptools.packages.find.include' # the migrator writes the package without its sub-packages
    theirs = fields(tmp_path/'pyproject.toml')
    readme = 'project.readme' # the migrator knows one README, for the repository and for the package index
    assert (ours.pop(readme), theirs.pop(readme))==('README.pypi.md', 'README.md')
    assert ours.pop(packages)==[f'{o}*' for o in theirs.pop(packages)]
    assert theirs == {k:v for k,v in ours.items() if k not in ONLY_PYPROJECT}
    assert read_version(tmp_path/'tbptt_fastai') == read_version(ROOT/'tbptt_fastai')

def run(*cmd, cwd):
    "Run a program, such as nbdev's, that this interpreter's environment installed"
    bin = Path(sys.executable).parent
    env = {**os.environ, 'PATH': f'{bin}{os.pathsep}{os.environ["PATH"]}', 'PYTHONWARNINGS': 'error::UserWarning'}
    res = subprocess.run(cmd, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if res.returncode: pytest.fail(f'{cmd} failed\n{res.stdout}', pytrace=False)

def contents(root):
    "Every file that nbdev may write, as text"
    skip = {'__pycache__', '.ipynb_checkpoints', '.last_checked', 'images'}
    files = [root/'pyproject.toml', *(root/'nbs').rglob('*'), *(root/'tbptt_fastai').rglob('*')]
    files = [f for f in files if f.is_file() and not skip & set(f.relative_to(root).parts)]
    return {f.relative_to(root).as_posix(): f.read_text(encoding='utf-8') for f in files}

def test_clean_and_export_change_nothing(tmp_path):
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    for d in ('nbs', 'tbptt_fastai'): shutil.copytree(ROOT/d, tmp_path/d)
    run('nbdev-clean', cwd=tmp_path)
    run('nbdev-export', cwd=tmp_path)
    run(sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', cwd=tmp_path)
    before,after = contents(ROOT),contents(tmp_path)
    assert before.keys() == after.keys()
    for name in before: assert before[name] == after[name], f'{name} is out of date: run nbdev-clean and nbdev-export'

def test_no_page_shows_a_path_of_the_machine_that_made_it():
    for f in (ROOT/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' not in f.parts: assert 'site-packages' not in f.read_text(encoding='utf-8'), f.name

def _mixed(cell):
    "Whether `cell` imports and does something else: the build of the site runs it, and none of those before it"
    text = ''.join(cell['source'])
    if cell['cell_type'] != 'code' or '#| export' in text: return False
    imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(text).body]
    return any(imports) and not all(imports)

def test_imports_of_pages_stand_in_cells_of_their_own():
    mixed = [f'{f.relative_to(ROOT)}: {"".join(c["source"])}' for f in sorted((ROOT/'nbs').rglob('*.ipynb'))
        if '.ipynb_checkpoints' not in f.parts for c in json.loads(f.read_text(encoding='utf-8'))['cells'] if _mixed(c)]
    assert not mixed, mixed

def test_readme_is_current(): run(sys.executable, 'tools/readme.py', '--check', cwd=ROOT)

ADDRESS = 'https://git.invalid/somebody/tbptt_fastai'

def test_the_address_of_the_repository_is_one_line(tmp_path):
    "Set it in pyproject.toml, run what CONTRIBUTING.md names, and every place has it"
    for o in ('nbs', 'tbptt_fastai', 'tools'): shutil.copytree(ROOT/o, tmp_path/o)
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if line.lstrip('# ').startswith('Repository = ')]
    assert len(lines)==1
    (tmp_path/'pyproject.toml').write_text(text.replace(lines[0], f'Repository = "{ADDRESS}"'), encoding='utf-8')
    run('nbdev-export', cwd=tmp_path)
    run(sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', cwd=tmp_path)
    run(sys.executable, 'tools/readme.py', cwd=tmp_path)
    run(sys.executable, '-c', 'from nbdev.serve import proc_nbs\nif __name__=="__main__": proc_nbs(n_workers=0, file_glob="00_plan.ipynb")', cwd=tmp_path)
    assert f'`git clone {ADDRESS}`' in (tmp_path/'README.md').read_text(encoding='utf-8')
    package = (tmp_path/'README.pypi.md').read_text(encoding='utf-8')
    assert f']({ADDRESS}/blob/main/nbs/explanation/troubleshooting.ipynb)' in package
    assert f']({ADDRESS}/raw/main/nbs/images/index-1.png)' in package
    assert all(o.startswith('https://') for o in re.findall(r'\]\(([^)\s]+)\)', package))
    assert f'repository-code: "{ADDRESS}"\n' in (tmp_path/'CITATION.cff').read_text(encoding='utf-8')
    assert f"'git_url': '{ADDRESS}'" in (tmp_path/'tbptt_fastai/_modidx.py').read_text(encoding='utf-8')
    assert f'repo-url: "{ADDRESS}"' in (tmp_path/'nbs/nbdev.yml').read_text(encoding='utf-8')
    page = (tmp_path/'_proc/truncation/00_plan.ipynb').read_text(encoding='utf-8')
    assert page.count(f'{ADDRESS}/blob/main/tbptt_fastai/truncation/plan.py#L')>=4 # a link to the source of each symbol

def test_no_address_is_named_before_it_is_known():
    "Links to this repository are relative, so that they hold wherever it is"
    known = fields(ROOT/'pyproject.toml').get('project.urls.Repository', '')
    for name in ('README.md', 'README.pypi.md', 'CITATION.cff', 'nbs/index.ipynb', 'nbs/nbdev.yml', 'CONTRIBUTING.md'):
        found = set(re.findall(r'https?://[^\s)"\\]*tbptt_fastai', (ROOT/name).read_text(encoding='utf-8')))
        assert found <= {known}, f'{name} names {found}'

def test_a_star_import_gives_the_names_that_users_type():
    code = """if 1:
    import warnings
    warnings.simplefilter('ignore')
    import tbptt_fastai.all as names
    ours = [k for k,v in vars(names).items() if k[0]!='_' and str(getattr(v, '__module__', '')).startswith('tbptt_fastai')]
    assert 40<len(ours)<=55, sorted(ours)
    assert {'TbpttLearner','TbpttResetCB','TbpttDL','StatefulRNN','EncodedState','StoredState','PassedState','StreamDL','SequenceDataLoaders','RNNLearner','Overlap','fun_rmse','Learner','nn','np'}<=vars(names).keys()
    assert hasattr(names.Learner, 'tbptt_find') and hasattr(names.Learner, 'check_memory_grads')"""
    run(sys.executable, '-W', 'ignore', '-c', code, cwd=ROOT)

def test_the_lowest_versions_that_are_tested_are_those_of_the_project():
    lines = (ROOT/'tools/lowest.txt').read_text(encoding='utf-8').splitlines()
    tested = dict(o.split('==') for o in lines if not o.startswith('#'))
    bounds = dict(o.split('>=') for o in fields(ROOT/'pyproject.toml')['project.dependencies'])
    assert bounds=={k: tested[k] for k in bounds}
    matrix = (ROOT/'.github/workflows/test.yaml').read_text(encoding='utf-8')
    assert f'''python: ["{fields(ROOT/'pyproject.toml')['project.requires-python'].removeprefix('>=')}"''' in matrix
