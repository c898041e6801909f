"How the site shows a symbol: its signature in lines that fit, what it does, and its parameters as a table"
import inspect, textwrap
from fastcore.docments import DocmentTbl
from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer

WIDTH = 84 # columns of code that show on a page

def _plain(o): return o.__name__ if inspect.isclass(o) or inspect.isfunction(o) or inspect.ismodule(o) else repr(o)

def _parameter(p):
    stars = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
    return f'{stars}{p.name}' if p.default is p.empty else f'{p.name}={_plain(p.default)}'

def signature_of(name, sig):
    "Names and defaults; types and meanings are in the table"
    parameters = [_parameter(p) for n,p in sig.parameters.items() if n not in ('self', 'cls')]
    line = f"{name}({', '.join(parameters)})"
    if len(line)<=WIDTH: return line
    return f'{name}(\n'+textwrap.fill(', '.join(parameters), WIDTH, initial_indent='    ', subsequent_indent='    ')+')'

class _Table(DocmentTbl):
    "Without the rows that have no meaning in words"
    def __init__(self, obj):
        super().__init__(obj)
        self.params = [o for o in self.params if o not in ('self', 'cls')]

def table_of(sym):
    "Parameters by name, type, default and meaning; nothing where none is described"
    try: return str(_Table(sym)).replace("| NoneType |", "|  |")
    except Exception: return '' # of a kind that has no source: a built-in, a constant

class TableRenderer(BasicMarkdownRenderer):
    "Markdown renderer for `show_doc`"
    def _repr_markdown_(self):
        shown = super()._repr_markdown_()
        head,_,rest = shown.partition('```python\n')
        if not get_config().git_url: head = '\n'.join(o for o in head.splitlines() if not o.startswith('[source]'))+'\n'
        if self.sig is None or not rest: return head+_+rest
        docs = rest.partition('```')[2].partition('Parameters:')[0].strip() # which the table has
        name = self.nm.split('.')[-1]
        parts = [head.rstrip(), f'```python\n{signature_of(name, self.sig)}\n```', docs, table_of(self.sym)]
        return '\n\n'.join(filter(None, parts))
