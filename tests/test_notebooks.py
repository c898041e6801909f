"Every notebook runs from top to bottom, by nbdev's own runner, each in a process of its own."
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
notebooks = sorted(p.relative_to(NBS) for p in NBS.rglob('*.ipynb'))
notebooks = [p for p in notebooks if not any(part.startswith(('.', '_')) for part in p.parts)]

def test_there_are_notebooks(): assert Path('index.ipynb') in notebooks

@pytest.mark.parametrize('nb', notebooks, ids=str)
def test_notebook(nb):
    # a process each: a notebook defines and patches again what the modules under test already hold
    code = 'import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], basepath=sys.argv[2])[0])'
    cmd = [sys.executable, '-c', code, NBS/nb, ROOT]
    res = subprocess.run(cmd, cwd=NBS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if res.returncode: pytest.fail(f'nbs/{nb.as_posix()} failed\n{res.stdout}', pytrace=False)
