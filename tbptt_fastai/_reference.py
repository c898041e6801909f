"""How the pages show a symbol: its signature in lines that fit, what it does, and its parameters as a table

nbdev imports it by `renderer` in `pyproject.toml`, from wherever it builds the pages; nothing of the library needs it, or nbdev.
"""
import inspect, re, sys, textwrap
import tbptt_fastai.all
from fastai.callback.core import event
from fastcore.docments import DocmentTbl
from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer
from tbptt_fastai.helptexts import HEADING, all_docments, fields_of

WIDTH = 84 # columns of code that show on a page
TABLE = 100 # characters in the width of a table
NARROW = 16 # of these, for names, types and defaults, each at most; their meaning has the rest
EVENTS = event._fields # methods that fastai calls, and no reader

def _plain(o):
    if getattr(o, '__name__', '')=='<lambda>': return '...'
    return o.__name__ if inspect.isclass(o) or inspect.isfunction(o) or inspect.ismodule(o) else repr(o)

def _starred(p): return {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')+p.name

def _parameter(p): return _starred(p) if p.default is p.empty else f'{_starred(p)}={_plain(p.default)}'

def _lines(parameters):
    "A parameter is never taken apart, even where its default has spaces"
    whole = ', '.join(o.replace(' ', '\0') for o in parameters)
    lines = textwrap.wrap(whole, WIDTH-1, initial_indent='    ', subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)
    return '\n'.join(lines).replace('\0', ' ')

def _given(names):
    "Parameters that a caller gives: not the first, of a method, and no functions for the events of a callback"
    names = list(names)
    if names and names[0] in ('self', 'cls'): names = names[1:]
    return [o for o in names if o not in EVENTS]

def signature_of(name, sig, others=()):
    "Names and defaults; types and meanings are in the table, as are the names of `others`"
    parameters = [_parameter(sig.parameters[o]) for o in _given(sig.parameters) if o not in others]
    if others: parameters.append('**kwargs')
    line = f"{name}({', '.join(parameters)})"
    return line if len(line)<=WIDTH else f'{name}(\n{_lines(parameters)})'

def _type(anno):
    "Without the modules that it comes from: `Callback | list`, not `fastai.callback.core.Callback | list`"
    if any(anno is o for o in (inspect.Parameter.empty, None, type(None))): return inspect.Parameter.empty
    text = anno if isinstance(anno, str) else inspect.formatannotation(anno)
    text = re.sub(r'\b(?:[A-Za-z_]\w*\.)+(?=\w)', '', text)
    text = re.sub(r'^(Union|Optional)\[([^][]*)\]$', _alternatives, text)
    return re.sub(r'([][])', r'\\\1', text) # which would be a link

def _alternatives(union):
    "`Callable | None` for `Union[Callable, NoneType]`"
    names = union[2].replace('NoneType', 'None').split(', ')
    return ' | '.join(names if union[1]=='Union' else [*names, 'None'])

def _default(o):
    "A name in angle brackets would be read as HTML"
    return 'a function' if getattr(o, '__name__', '')=='<lambda>' else o

def _text(o): return '' if o is inspect.Parameter.empty else str(o)

def _function_of(obj): return obj.__init__ if inspect.isclass(obj) else getattr(obj, '__func__', obj)

def _texts(obj):
    "What is known of each parameter, as `help()` has it; nothing of what has no source of its own, as a dataclass"
    function = _function_of(obj)
    if not inspect.isfunction(function): return {}
    texts = all_docments(function)
    known = _given(inspect.signature(function).parameters)
    return {o: texts.get(o, inspect.Parameter.empty) for o in known} if texts else {}

def _own(function):
    "Parameters that its author wrote"
    code = inspect.unwrap(function).__code__
    return code.co_varnames[:code.co_argcount+code.co_kwonlyargcount]

def _taken_over(function):
    "Parameters that `@delegates` gave it, in their order"
    if not hasattr(function, '__delwrap__'): return []
    return [o for o in inspect.signature(function).parameters if o not in _own(function)]

def _sources(function, names):
    "Where parameters that it has taken over are described: their names, and those of the function or class that has them"
    source = getattr(function, '__delwrap__', None)
    if source is None or not names: return []
    inner = _function_of(source)
    own = [o for o in names if o in _own(inner)]
    rest = [o for o in names if o not in own]
    return [(own, source.__qualname__.removesuffix('.__init__')), *_sources(inner, rest)]

def _imported(cls):
    "A class of a cell as users import it; a cell's has no source"
    if cls.__module__!='__main__': return cls
    modules = [m for name,m in sys.modules.items() if name.startswith('tbptt_fastai.')]
    return next((o for m in modules if (o := vars(m).get(cls.__name__)) is not None), cls)

def _rows_of_fields(cls):
    "Of a named tuple, of which fastcore knows no parameters"
    texts,parameters = fields_of(_imported(cls)),inspect.signature(cls).parameters
    return {o: dict(anno=p.annotation, default=p.default, docment=texts[o]) for o,p in parameters.items() if o in texts}

def _is_named_tuple(obj): return inspect.isclass(obj) and issubclass(obj, tuple) and hasattr(obj, '_fields')

class _Table(DocmentTbl):
    "Rows for the parameters of which there is something to say; one for all those that are described elsewhere"
    def __init__(self, obj):
        super().__init__(obj)
        if _is_named_tuple(obj):
            self.dm = _rows_of_fields(obj)
            self.params = list(self.dm)
        self.function = _function_of(obj)
        self.others = _taken_over(self.function)
        for o in self.dm.values(): o['anno'],o['default'] = _type(o['anno']),_default(o['default'])
        for name,text in _texts(obj).items(): self.dm[name]['docment'] = text
        first = list(inspect.signature(self.function).parameters)[:1] if inspect.isfunction(self.function) else []
        method = set(first) & {'self', 'cls'}
        self.dm = {k:o for k,o in self.dm.items() if k not in (*method, *self.others) and self._says(o)}
        self.params = [o for o in self.params if o in self.dm]

    def _says(self, row): return any(row[o] is not inspect.Parameter.empty for o in self._map)

    @property
    def params_str(self):
        rows,sources = super().params_str,_sources(self.function, self.others)
        if not sources: return rows
        (names,source),*rest = sources
        more = ''.join(f', and those of `{o}`' for _,o in rest[:1])
        return f"{rows}\n| kwargs {'| '*len(self._columns)}{', '.join(names)}: as in `{source}`{more} |"

    @property
    def hdr_str(self):
        "Pandoc divides the width of a page by the dashes of each column"
        names = super().hdr_str.split('\n')[0]
        held = [list(self.dm)]+[[_text(o[c]) for o in self.dm.values()] for c in self._columns]
        dashes = [max(3, *map(len, o)) for o in held]
        dashes = [min(n, NARROW) for n in dashes[:-1]]
        return names+'\n'+'|'.join(['', *('-'*n for n in (*dashes, TABLE-sum(dashes))), ''])

def table_of(sym):
    "Parameters by name, type, default and meaning; nothing where none is described"
    try: return str(_Table(sym))
    except (TypeError, ValueError, OSError): return '' # without a source: a built-in, a constant

class TableRenderer(BasicMarkdownRenderer):
    "Markdown renderer for `show_doc`"
    def _repr_markdown_(self):
        if self.nm.split('.')[-1] in EVENTS and not self.sym.__doc__: return ''
        head,fence,rest = super()._repr_markdown_().partition('```python\n')
        if not get_config().git_url: head = '\n'.join(o for o in head.splitlines() if not o.startswith('[source]'))+'\n'
        if self.sig is None or not rest: return head+fence+rest
        docs = rest.partition('```')[2].partition(HEADING)[0].strip() # which the table has
        signature = signature_of(self.nm.split('.')[-1], self.sig, _taken_over(_function_of(self.sym)))
        return '\n\n'.join(filter(None, [head.rstrip(), f'{fence}{signature}\n```', docs, table_of(self.sym)]))
