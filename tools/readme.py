"""Write README.md from nbs/index.ipynb, through nbdev's own processors but without Quarto, and what follows from it

README.pypi.md is what the package index shows: its links lead to the repository where the address of that is known, and are plain text where it is not.
CITATION.cff is written from pyproject.toml. `--check` only compares.
"""
import argparse, base64, difflib, json, os, posixpath, re, sys
from pathlib import Path
from fastcore.nbio import read_nb
from nbdev.config import read_version, tomllib
from nbdev.processors import FilterDefaults, add_links

ROOT = Path(__file__).resolve().parent.parent
NB,IMAGES = 'nbs/index.ipynb','nbs/images'

class ReadmeFilter(FilterDefaults):
    "nbdev's processors, less the links that depend on which other nbdev libraries are installed"
    def base_procs(self): return [p for p in super().base_procs() if p is not add_links]

def _join(s): return s if isinstance(s, str) else ''.join(s)

def _fence(s, lang=''):
    ticks = max(3, *(len(t)+1 for t in re.findall('`{3,}', s)), 0)*'`'
    return f'{ticks}{lang}\n{s.rstrip()}\n{ticks}'

def _outside_code(pattern, change, text):
    "As `re.sub`, but fenced code is left alone"
    parts = re.split(r'(^```.*?^```)', text, flags=re.M|re.S)
    return ''.join(p if i%2 else re.sub(pattern, change, p) for i,p in enumerate(parts))

def _relink(s):
    "Point links that are relative to `nbs/` at the same files from the project's root"
    def _link(m): return f"]({posixpath.normpath('nbs/' + m[1])}"
    return _outside_code(r'\]\((?![a-z]+:|[#/])([^)\s#]+)', _link, s)

def _alt(directives):
    "What a picture shows, in words, as its cell says"
    words = directives.get('fig-alt', '')
    return re.sub(r'[\[\]]', '', (words if isinstance(words, str) else ' '.join(words)).strip().strip('"\''))

def _output(o, images, alt=''):
    "One output as Markdown; a PNG goes to `images`, a dict of file name to bytes"
    if o.output_type=='error': raise ValueError(f'{NB} holds an error output: run it again with `nbdev-test --save`')
    if o.output_type=='stream': return _fence(_join(o.text), 'text')
    if png := o.data.get('image/png'):
        name = f'{IMAGES}/index-{len(images)+1}.png'
        images[name] = base64.b64decode(_join(png))
        return f'![{alt}]({name})'
    if md := o.data.get('text/markdown'): return _relink(_join(md))
    return _fence(_join(o.data['text/plain']), 'text')

def _cell(c, fm, images):
    "The Markdown blocks of one processed cell"
    if c.cell_type=='raw': return [f"# {fm['title']}"] + ([f"> {fm['description']}"] if 'description' in fm else [])
    if c.cell_type=='markdown': return [_relink(c.source)]
    opts,alt = {k:v.strip().lower()=='false' for k,v in c.directives.items()},_alt(c.directives)  # True where switched off
    c.remove_directives()
    res = [] if opts.get('echo') else [_fence(c.source, c.metadata.get('language', 'python'))]
    if not opts.get('output'): res += [_output(o, images, alt) for o in c.get('outputs', [])]
    return [] if opts.get('include') else res

def _with_address(text, url):
    "Where the repository is, once that is known"
    clone = 'In a clone of this repository'
    if clone not in text: raise ValueError(f'{NB} does not say "{clone}"')
    return text.replace(clone, f'{clone} (`git clone {url}`)', 1) if url else text

LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?![a-z]+:)([^)\s]+)\)')

def for_package_index(text, url, branch='main'):
    "`text` with links that hold outside of the repository, or with their words alone where its address is not known"
    def _link(m):
        picture,words,target = m.groups()
        if not url: return words if '`' in words or not words else f'*{words}*'
        place = '' if target.startswith('#') else f'/raw/{branch}/' if picture else f'/blob/{branch}/'
        return f'{picture}[{words}]({url}{place}{target})'
    res = re.sub(r'\n{3,}', '\n\n', _outside_code(LINK, _link, text))
    return res if url else f'{res}\nPages named in italics are notebooks in the folder `nbs` of the source distribution.\n'

def citation(project, version, url):
    "What CITATION.cff says"
    fields = {'cff-version': '1.2.0', 'message': 'To cite this software, use the metadata of this file.', 'type': 'software', 'title': project['name'],
              'abstract': project['description'], 'version': version, 'license': project['license'], 'authors': project['authors']}
    if url: fields['repository-code'] = url
    return ''.join(f'{k}: {json.dumps(v)}\n' for k,v in fields.items()) # JSON is YAML

def generated():
    "Every generated file: name, relative to the project's root, to bytes"
    nb,images = read_nb(NB),{}
    ReadmeFilter()(nb)
    blocks = [b.strip() for c in nb.cells for b in _cell(c, nb.frontmatter_, images)]
    project,text = tomllib.loads(Path('pyproject.toml').read_text(encoding='utf-8'))['project'],'\n\n'.join(filter(None, blocks))+'\n'
    url = project.get('urls', {}).get('Repository', '').rstrip('/')
    text = _with_address(text, url)
    return {'README.md': text.encode(), 'README.pypi.md': for_package_index(text, url).encode(), 'CITATION.cff': citation(project, read_version(Path(project['name'])), url).encode(), **images}

def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--check', action='store_true', help='exit with 1 and a diff where a file is stale; write nothing')
    check = ap.parse_args().check
    os.chdir(ROOT)
    new = generated()
    old = {str(p): p.read_bytes() for p in [*map(Path, ('README.md', 'README.pypi.md', 'CITATION.cff')), *Path(IMAGES).glob('index-*.png')] if p.exists()}
    stale = [f for f in {**old, **new} if old.get(f) != new.get(f)]
    for f in stale:
        if check and not f.endswith('.png'):
            a,b = (d.get(f, b'').decode().splitlines(True) for d in (old, new))
            sys.stdout.writelines(difflib.unified_diff(a, b, f, f'{f} as generated'))
        elif check: print(f'{f} is stale')
        elif f not in new: Path(f).unlink()
        else:
            Path(f).parent.mkdir(parents=True, exist_ok=True)
            Path(f).write_bytes(new[f])
    if check and stale: sys.exit(f'{", ".join(stale)} out of date: run `python tools/readme.py`')

if __name__ == '__main__': main()
