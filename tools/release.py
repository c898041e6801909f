"""Is everything ready for the release of a tag?

`python tools/release.py v0.1.0` exits with 1 where the version of a file is another one, and prints what CHANGELOG.md says of this version.
It needs Python alone, so that a workflow can run it before anything is installed.
"""
import argparse, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where a version stands, and how
PLACES = {
    'tbptt_fastai/__init__.py': r'^__version__ = "([^"]+)"',
    'settings.ini': r'^version = (\S+)',
    'CITATION.cff': r'^version: "([^"]+)"',
    'CHANGELOG.md': r'^## (\S+)'}

def versions(root):
    "The first version in each file; `None` where there is none"
    found = {f: re.search(how, (root/f).read_text(encoding='utf-8'), re.M) for f,how in PLACES.items()}
    return {f: m and m[1] for f,m in found.items()}

def notes(root, version):
    "What the changelog says of `version`"
    sections = re.split(r'^## +', (root/'CHANGELOG.md').read_text(encoding='utf-8'), flags=re.M)
    return next((o.partition('\n')[2].strip() for o in sections if o.split('\n')[0].strip()==version), '')

def faults(root, tag):
    "What is not ready, in words"
    if not re.fullmatch(r'v\d+\.\d+\.\d+((a|b|rc)\d+)?', tag): return [f'{tag!r} is no tag of a release: expected v and three numbers, as v0.1.0']
    version = tag[1:]
    res = [f'{f} has version {found}, the tag is {tag}' for f,found in versions(root).items() if found != version]
    return res if notes(root, version) else [*res, f'CHANGELOG.md says nothing of {version}']

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tag', help='as v0.1.0')
    parser.add_argument('--root', type=Path, default=ROOT, help='folder of the project; default: that of this file')
    args = parser.parse_args()
    if wrong := faults(args.root, args.tag): sys.exit('\n'.join(wrong))
    print(notes(args.root, args.tag[1:]))

if __name__=='__main__': main()
