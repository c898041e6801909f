"Every error and warning of the library has an entry on the page of messages, and every entry a message."
import ast, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT/'nbs/explanation/troubleshooting.ipynb'
VALUE = '…' # what a message says differently each time

# Functions that put words together, which another one raises or warns of
COMPOSED = {'instruments/find.py': ['_no_suggestion'], 'training/threads.py': ['_measure'], 'training/length.py': ['hint'],
    'training/parts.py': ['_indexed'], 'training/checks.py': ['_why_no_backward'], 'training/finite.py': ['__str__'], 'speed/dispatch.py': ['_explained']}
# Raises without words of their own: what a function above has composed, or an exception that is passed on
WORDLESS = {'instruments/find.py': ['why'], 'training/threads.py': ['hint'], 'training/length.py': ['hint'],
    'training/parts.py': ['_indexed(model, n, e)'], 'training/checks.py': ['BackwardError(said)'], 'speed/ahead.py': ['error.with_traceback(error.__traceback__)'],
    'speed/dispatch.py': ['modify_exception(without, words, replace=True)',
        'modify_exception(e, _explained(cb, event_name, e), replace=True)'],
    'training/callback.py': ['refusal.with_traceback(refusal.__traceback__)'],
    'sequences/arrays.py': ["type(e)(f'{path}: {e}')"],
    'sequences/times.py': ["ValueError(f'Row {plain(df.index[i])!r}{place}{of_group} {what(i)}')"], 'datasets/cli.py': ['SystemExit(130)']}

def template(o):
    "The text of an expression, with `…` for each value"
    if isinstance(o, ast.Constant): return o.value if isinstance(o.value, str) else VALUE
    if isinstance(o, ast.JoinedStr): return ''.join(map(template, o.values))
    if isinstance(o, ast.BinOp) and isinstance(o.op, ast.Add): return template(o.left)+template(o.right)
    return VALUE

def squeezed(text): return re.sub(f'{VALUE}+', VALUE, text)
def words(text): return re.findall(r'[^\W\d_]{2,}', text)
def name(o): return ast.unparse(o.func) if isinstance(o, ast.Call) else ''

def said(o):
    "The expression that makes the message of a raise or a warning, or of a row of a data frame; `None` if there is none"
    if isinstance(o, ast.Raise) and o.exc is not None and not name(o.exc).startswith('Cancel'): # fastai's control flow
        return o.exc.args[0] if isinstance(o.exc, ast.Call) and o.exc.args else o.exc
    if name(o)=='warnings.warn': return o.args[0]
    if name(o)=='refuse_row': return o.args[3].body

def functions(tree, names): return [o for o in ast.walk(tree) if isinstance(o, ast.FunctionDef) and o.name in names]
def returned(f): return [o.value for o in ast.walk(f) if isinstance(o, ast.Return) and o.value is not None]

def found_in(text, file):
    "Messages of a module, and the raises without words"
    tree = ast.parse(text)
    texts,wordless = [],[]
    for o in ast.walk(tree):
        if (e := said(o)) is None: continue
        if len(words(t := squeezed(template(e))))>1: texts.append((o.lineno, t))
        else: wordless.append(ast.unparse(e if name(o)=='warnings.warn' else o.exc))
    for o in [v for f in functions(tree, COMPOSED.get(file, ())) for v in returned(f)]:
        o = o.args[0] if isinstance(o, ast.Call) and o.args else o
        if words(t := squeezed(template(o))): texts.append((o.lineno, t))
    return texts,wordless

def library():
    "All modules: by their names, the messages and the raises without words"
    lib = ROOT/'tbptt_fastai'
    files = {p.relative_to(lib).as_posix():p for p in sorted(lib.rglob('*.py'))}
    return {file: found_in(p.read_text(encoding='utf-8'), file) for file,p in files.items()}

def messages(): return {f'{file}:{line}': text for file,(texts,_) in library().items() for line,text in texts}

def cells(): return [''.join(o['source']) for o in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if o['cell_type']=='markdown']
def entries():
    "The words in bold code, in front of what they mean"
    return [o for cell in cells() for o in re.findall(r'\*\*`` ?(.+?) ?``\*\*', cell)]

def test_each_message_has_an_entry():
    known = entries()
    assert known
    missing = {k:v for k,v in messages().items() if not any(o in v for o in known)}
    assert not missing, f'add to {PAGE.name}: {json.dumps(missing, indent=1, ensure_ascii=False)}'

def test_each_entry_is_in_a_message():
    texts = messages().values()
    assert [o for o in entries() if not any(o in t for t in texts)]==[]

def test_no_entry_stands_twice():
    known = entries()
    assert [o for o in set(known) if known.count(o)>1]==[]

def test_an_entry_with_few_words_is_a_whole_message():
    "As are those of a family, which say the same of every setting"
    whole = set(messages().values())
    assert [o for o in entries() if o not in whole and (len(words(o))<3 or o.startswith(VALUE))]==[]

def test_each_entry_says_what_to_do():
    "Words in bold are followed by text in the same item"
    items = [o for cell in cells() for o in re.split(r'^- ', cell, flags=re.M)[1:]]
    assert [o for o in items if '**``' in o and len(words(re.sub(r'\*\*``.+?``\*\*', '', o)))<5]==[]

def test_no_words_are_composed_elsewhere():
    "A raise without words would not be found: a function that composes them is named above"
    assert {k:v for k,(_,v) in library().items() if v}=={k:v for k,v in WORDLESS.items()}

@pytest.mark.parametrize('file', COMPOSED)
def test_functions_that_compose_are_there(file):
    tree = ast.parse((ROOT/'tbptt_fastai'/file).read_text(encoding='utf-8'))
    assert {o.name for o in functions(tree, COMPOSED[file])}==set(COMPOSED[file])

CODE = '''
def f(n, e):
    if n<1: raise ValueError(f"n is {n!r}{e}; " "expected at least 1.")
    if n>9: raise CancelFitException('no message')
    if n==2: warnings.warn('Two ' + f'are {n}.', stacklevel=2)
    raise e
'''
def test_what_is_collected(): assert found_in(CODE, 'f.py')==([(3,'n is …; expected at least 1.'), (5,'Two are ….')], ['e'])

def quoted():
    "Messages that pages show without running them: (page, text)"
    for page in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in page.parts: continue
        for cell in json.loads(page.read_text(encoding='utf-8'))['cells']:
            fences = re.findall(r'^```(\w*)\n(.*?)^```', ''.join(cell['source']), re.M|re.S) if cell['cell_type']=='markdown' else []
            yield from ((page.name, ' '.join(text.split())) for language,text in fences if not language)

def pattern(template):
    parts = [re.escape(' '.join(o.split())) for o in re.sub(r'\s+', ' ', template).split(VALUE)]
    return re.compile(r' ?.*? ?'.join(parts))

def is_quoted(text, template):
    "Whole, or where `[...]` ends it up to a sentence of the message"
    ends = [m.end() for m in re.finditer(r'[.:](?= )', template)] if text.endswith(' [...]') else [len(template)]
    return any(pattern(template[:o]).fullmatch(text.removesuffix(' [...]')) for o in ends)

@pytest.mark.parametrize('page,text', [pytest.param(*o, id=f'{o[0]}-{i}') for i,o in enumerate(quoted())])
def test_a_message_that_a_page_quotes_is_one_of_the_library(page, text):
    words = re.sub(r'^\w*(Error|Warning): |^Row \S+ of group \S+ ', '', text)
    assert any(is_quoted(words, o) for o in messages().values()), f'{page} quotes {text!r}'

def test_a_quotation_of_another_time_is_noticed():
    message = 'n_skip is …, the window has … steps: too many. Use fewer.'
    for o in ('n_skip is 4, the window has 40 steps: too many. Use fewer.', 'n_skip is 4, the window has 40 steps: too many. [...]'):
        assert is_quoted(o, message) and not is_quoted(o.replace('has', 'had'), message)
    assert not is_quoted('n_skip is 4, the window has 40 steps: too many.', message)
