"""What becomes of a page on its way to the site: what is inside comes last, headings and links are there once, tables fit

nbdev imports it by `doc_procs` in `pyproject.toml`, as it does `_reference.py`.
"""
import re, warnings
from itertools import filterfalse
from nbdev.process import Processor

warnings.filterwarnings('ignore', '.torch.jit.script. is deprecated', FutureWarning) # said to fastai, by the first page that imports it

INSIDE = '## Inside' # how the heading of a section begins that is shown last
LONG = 60 # characters of a cell that make its column wider, at most

def drop_empty(cell):
    "A cell whose symbol is not shown"
    data = [o.get('data', {}) for o in cell.get('outputs', [])]
    if any('text/markdown' in o and not o['text/markdown'] for o in data): del cell['source']

class InsideLast(Processor):
    "Sections about what a page is made of come after those about what its readers use, though Python needs them first"
    def end(self):
        sections = [[]]
        for cell in self.nb.cells:
            if cell.cell_type=='markdown' and cell.source.startswith('## '): sections.append([])
            sections[-1].append(cell)
        first,*others = sections
        self.nb.cells = sum([first, *sorted(filterfalse(_is_empty, others), key=_is_inside)], [])

def _is_inside(section): return section[0].source.startswith(INSIDE)

def _is_empty(section):
    "A heading above private names alone, which are not shown"
    return _is_inside(section) and len(section)==1 and '\n' not in section[0].source.strip()

class OneHeading(Processor):
    "A section that has the name of the symbol it shows needs no second heading"
    def begin(self): self.section = ''

    def cell(self, cell):
        if cell.cell_type=='markdown' and cell.source.startswith('## '): self.section = cell.source.split('\n')[0][3:].strip(' `')
        for data in [o['data'] for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]:
            data['text/markdown'] = re.sub(rf'^(?:---\s*)?### {re.escape(self.section)}\n', '', ''.join(data['text/markdown']))

NAME = r'\[(`[^`]*`)\]\([^)]*\)' # of the library, with its link
LINKED = re.compile(rf'\[((?:[^][]|{NAME})*)\](?=\()')

def _with_names_alone(link): return '['+re.sub(NAME, r'\1', link[1])+']'

def one_link(cell):
    "A name of the library within the text of a link leads where its author said, and not to its own page"
    if cell.cell_type=='markdown': cell.source = LINKED.sub(_with_names_alone, cell.source)

TABLE_LINES = re.compile(r'^\|.*\|[ ]*\n\|[-:| ]+\|[ ]*\n(?:\|.*\|[ ]*(?:\n|\Z))+', re.M)
LINK = re.compile(r'\[([^][]*)\]\([^)]*\)')

def _cells(line): return [o.strip() for o in re.split(r'(?<!\\)\|', line.strip())[1:-1]]

def _held(cell):
    "Characters that a reader sees"
    return min(len(LINK.sub(r'\1', cell).replace('`', '')), LONG)

def _dashes(rule, n):
    "At least three, with the colons that align a column"
    return f"{':' if rule[0]==':' else '-'}{'-'*max(n-2, 1)}{':' if rule[-1]==':' else '-'}"

def _by_content(table):
    head,rules,*rows = table[0].strip('\n').split('\n')
    columns = zip(*map(_cells, [head, *rows]))
    widths = [max(map(_held, o)) for o in columns]
    dashes = [_dashes(rule, n) for rule,n in zip(_cells(rules), widths)]
    end = '\n' if table[0].endswith('\n') else ''
    return '\n'.join([head, f"|{'|'.join(dashes)}|", *rows])+end

def table_widths(cell):
    "A column of a table is as wide, in proportion, as what it holds: Pandoc gives each the same where all have three dashes"
    if cell.cell_type=='markdown': cell.source = TABLE_LINES.sub(_by_content, cell.source)
