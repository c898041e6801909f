"""Process every notebook as the build of the site does, without Quarto, and look at what a reader would see

A cell that cannot be run there is an error that names it. So are, on any page, a link, an image or an anchor that leads nowhere, a line of code
or of numbers that is too wide, a warning, a traceback, what a notebook says on stderr, a progress bar, a path of the machine, a page without a title
and a sentence about it, one that begins with code, a sentence that announces what is not there, and a name in an example that nothing above it
defines.
"""
import ast, builtins, json, re
from importlib import import_module
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 88 # columns of code that a page shows
OUTPUT = 112 # columns of numbers and names that an output has, at most: sentences are wrapped
PRIVATE = re.compile(r'(?<![\w.])/(?:home|root|work|venv|tmp|Users)/[\w.]+|site-packages')

SAID = {'a progress bar': re.compile('█'), 'a training without its table': re.compile(r'^\[0, \d+\.\d{6}', re.M),
        'a warning': re.compile(r'^\S+:\d+: \w*Warning: ', re.M),
        'a traceback': re.compile(r'^Traceback \(most recent call last\)', re.M)}
LINK = re.compile(r'\]\(([^)\s]+)(?: +"[^"]*")?\)|<(?:a|img)\b[^>]*?\b(?:href|src)=["\']?([^"\'\s>]+)')

IN_A_LINK = re.compile(r'(?<!\])\[[^][]*(?:\[[^][]*\]\([^)]*\)[^][]*)+\]\(')

def joined(o): return o if isinstance(o, str) else ''.join(o or [])

def cells_of(page): return json.loads(page.read_text(encoding='utf-8'))['cells']

def switched_off(cell, *names): return re.search(rf"^#\| *({'|'.join(names)}): *false", joined(cell['source']), re.M) is not None

def shown(cell):
    "Does a reader see the code of this cell?"
    return cell['cell_type']=='code' and not switched_off(cell, 'echo', 'include')

def code_of(cell): return [o for o in joined(cell['source']).split('\n') if not o.startswith('#|')]

def texts_of(cell):
    "What the outputs of a cell say, by kind"
    if switched_off(cell, 'output', 'include'): return
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        kind = o.get('name') or ('error' if o['output_type']=='error' else 'markdown' if 'text/markdown' in data else 'plain')
        yield kind,joined(o.get('text') or data.get('text/markdown') or data.get('text/plain') or o.get('traceback'))

def markdown_of(cell):
    "All Markdown that a reader sees in a cell"
    if cell['cell_type']=='markdown': return joined(cell['source'])
    return '\n'.join(text for kind,text in texts_of(cell) if kind=='markdown')

def is_sentence(line):
    "Words, rather than numbers and names in columns"
    return len(re.findall(r'(?<!\S)[a-z]+[,.:;]?(?!\S)', line))>=8

def is_signature(cell): return re.search(r'^show_doc\(', joined(cell['source']), re.M) is not None

def without_code(text): return re.sub(r'`[^`\n]*`', '', re.sub(r'^```.*?^```', '', text, flags=re.M|re.S))

def anchor(heading):
    "What Pandoc makes of a heading"
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '')
    text = re.sub(r'[^\w\s.-]', '', text.lower())
    return re.sub(r'\s+', '-', text.strip()).lstrip('0123456789.-_')

def anchors_of(page):
    headings = re.findall(r'^#+ +(.+?)\s*$', '\n'.join(map(markdown_of, cells_of(page))), re.M)
    return {anchor(o) for o in headings}

def html_name(page):
    "Where a page is on the site: without the number in front of its name"
    return page.with_name(re.sub(r'^\d+[a-z]?_', '', page.stem)+'.html')

def wide_code(cell):
    "Of its source, and of fenced code; a message in a fence wraps, and so does a command"
    lines = code_of(cell) if shown(cell) else []
    for language,text in re.findall(r'^```(\w*)\n(.*?)^```', markdown_of(cell), re.M|re.S):
        if language=='python': lines += text.split('\n')
        if language in ('text', ''): lines += [o for o in text.split('\n') if not is_sentence(o)]
    for line in lines:
        if len(line)>WIDTH: yield f'{len(line)} columns of code: {line.strip()[:60]}…'

def unfit_outputs(cell):
    for kind,text in texts_of(cell):
        if kind in ('stderr', 'error'): yield f'{kind}: {text.strip()[:80]}'
        for what,pattern in SAID.items():
            if pattern.search(text): yield what
        if kind not in ('stdout', 'plain'): continue
        for line in text.split('\n'):
            if len(line)>OUTPUT and not is_sentence(line): yield f'{len(line)} columns of output: {line.strip()[:60]}…'

def seen_in(cell):
    "All that a reader sees of a cell"
    code = code_of(cell) if shown(cell) else [markdown_of(cell)] if cell['cell_type']=='markdown' else []
    return '\n'.join([*code, *(text for _,text in texts_of(cell))])

def begins_with_code(cells):
    "Or with a signature, or a diagram, before the first words; headings are none"
    code = False
    for cell in cells[1:]:
        if is_signature(cell): return True
        words = re.sub(r'^#.*$|^<!--.*-->$', '', markdown_of(cell), flags=re.M).strip() if cell['cell_type']=='markdown' else ''
        if words: return code or words.startswith('```')
        code = code or shown(cell)
    return False

INTRODUCED = re.compile(r'```|\||[-*] |\d+\. |!\[|>|<|\$\$') # fences, tables, lists, figures, quotations, HTML, formulas

def blocks_of(cell):
    "What a reader sees of a cell: paragraphs of text, and `None` for anything else"
    if cell['cell_type']=='markdown':
        text = re.sub(r'^```.*?^```', '```', joined(cell['source']), flags=re.M|re.S)
        return [None if INTRODUCED.match(o) else o for o in re.split(r'\n\s*\n', text.strip()) if o]
    seen = shown(cell) and any(o.strip() for o in code_of(cell))
    return [None] if seen or any(True for _ in texts_of(cell)) else []

def announced(cells):
    "Paragraphs that end with a colon, before another paragraph, a heading or the end"
    blocks = sum(map(blocks_of, cells), [])
    for text,after in zip(blocks, [*blocks[1:], '']):
        if text and re.search('[^:]:$', text.rstrip()) and after is not None: yield f'nothing follows: …{text.strip()[-60:]}'

def before_inside(cells):
    "Without the sections about what a page is made of, which come last"
    at = next((i for i,o in enumerate(cells) if joined(o['source']).startswith('## Inside')), None)
    return cells[:at]

def names_from(module):
    module = import_module(module)
    return getattr(module, '__all__', None) or [o for o in vars(module) if not o.startswith('_')]

def bound_in(tree):
    "Names that some code defines, wherever"
    for o in ast.walk(tree):
        if isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)): yield o.name
        elif isinstance(o, ast.Name) and not isinstance(o.ctx, ast.Load): yield o.id
        elif isinstance(o, ast.arg): yield o.arg
        elif isinstance(o, ast.ImportFrom) and o.names[0].name=='*': yield from names_from(o.module)
        elif isinstance(o, (ast.Import, ast.ImportFrom)): yield from ((a.asname or a.name).split('.')[0] for a in o.names)

def undefined(cells):
    "Names in the code of a page that a reader, who runs its cells from the top, would not have"
    known = set(dir(builtins))
    for cell in before_inside(cells):
        if cell['cell_type']!='code' or not shown(cell): continue
        tree = ast.parse('\n'.join(o for o in code_of(cell) if not re.match(r'\s*[%!]', o)))
        known.update(bound_in(tree))
        used = [o.id for o in ast.walk(tree) if isinstance(o, ast.Name) and o.id not in known]
        yield from dict.fromkeys(used)
        known.update(used)

def links_in(items):
    "Of a part of the sidebar"
    return {o['href'] for o in items if 'href' in o}.union(*(links_in(o['contents']) for o in items if 'contents' in o))

def internal_pages(folder):
    "By the sidebar, those of the internals"
    sidebar = folder/'sidebar.yml'
    if not sidebar.exists(): return set()
    sections = yaml.safe_load(sidebar.read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return links_in([o for part in sections for o in part['contents'] if o.get('section')=='Internals'])

class Site:
    "The processed pages, by their own names and by those of the site"
    def __init__(self, folder):
        self.folder = Path(folder)
        self.pages = sorted(p for p in self.folder.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
        self.by_name = {p.relative_to(self.folder): p for p in self.pages}
        self.by_name |= {html_name(o): p for o,p in list(self.by_name.items())}
        self.internal = internal_pages(self.folder)
        self._anchors = {}

    def anchors(self, page):
        if page not in self._anchors: self._anchors[page] = anchors_of(page)
        return self._anchors[page]

    def leads_nowhere(self, page, link):
        "Why, or nothing"
        path,_,name = link.partition('#')
        if re.match(r'[a-z]+:', link): return
        if path.startswith('/'): target = Path(path[1:])
        else: target = Path(*page.relative_to(self.folder).parent.parts, path)
        if not path: target = page.relative_to(self.folder)
        parts = []
        for o in target.parts: parts = parts[:-1] if o=='..' else [*parts, o]
        found = self.by_name.get(Path(*parts))
        if found is None: return None if (self.folder/Path(*parts)).is_file() else 'there is no such page'
        if name and name not in self.anchors(found) and name.lower() not in self.anchors(found): return 'that page has no such section'

    def faults(self, page):
        "Of one page, in words"
        cells = cells_of(page)
        head = joined(cells[0]['source']) if cells else ''
        for o in ('title', 'description'):
            if page.stem!='index' and not re.search(rf'^{o}: *\S', head, re.M): yield f'no {o}'
        if begins_with_code(cells): yield 'begins with code: a sentence about it first'
        yield from announced(cells)
        if page.relative_to(self.folder).as_posix() not in self.internal: yield from (f'{o} is not defined above' for o in undefined(cells))
        for i,cell in enumerate(cells):
            for o in [*wide_code(cell), *unfit_outputs(cell), *self.dead_links(page, cell)]: yield f'cell {i}: {o}'
            if m := PRIVATE.search(seen_in(cell)): yield f'cell {i}: the path {m[0]}'
            if m := IN_A_LINK.search(markdown_of(cell)): yield f'cell {i}: a link in a link: {m[0]}'

    def dead_links(self, page, cell):
        for m in LINK.finditer(without_code(markdown_of(cell))):
            link = m[1] or m[2]
            if why := self.leads_nowhere(page, link): yield f'{link}: {why}'

    def report(self): return [f'{p.relative_to(self.folder)}: {o}' for p in self.pages for o in self.faults(p)]

def main():
    from nbdev.serve import proc_nbs
    folder = proc_nbs(n_workers=0, force=True)
    faults = Site(folder).report()
    print(*faults, sep='\n')
    if faults: raise SystemExit(f'{len(faults)} faults on the pages in {folder}')
    print(f'pages in {folder}')

if __name__=='__main__': main()
