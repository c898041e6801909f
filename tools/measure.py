"Counts that go with readable code, over the library and its notebooks. Needs `radon`: python -m pip install radon"
import ast, json, re
from pathlib import Path
from statistics import mean, median
from radon.complexity import cc_visit

ROOT = Path(__file__).resolve().parent.parent
modules = {p.relative_to(ROOT/'tbptt_fastai').as_posix(): p.read_text(encoding='utf-8') for p in sorted((ROOT/'tbptt_fastai').rglob('*.py')) if p.name not in ('_modidx.py', '__init__.py')}

def code_lines(text): return [o for o in text.splitlines() if o.strip() and not o.lstrip().startswith('#')]

def functions(text):
    "Complexity of each function and method, by radon: branches and one"
    blocks = cc_visit(text)
    return [o.complexity-1 for o in blocks if o.letter in 'FM'] + [m.complexity-1 for o in blocks if o.letter=='F' for m in o.closures]

def defined(tree):
    "The private names that a module gives to attributes itself"
    names = {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Store)}
    return names | {o.name for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.ClassDef))} | {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)}

def private_of_others(trees):
    "Private attributes that a module takes from an object and does not define, but another of ours does"
    own = {name:defined(tree) for name,tree in trees.items()}
    res = []
    for name,tree in trees.items():
        others = set().union(*(v for k,v in own.items() if k!=name))
        for o in ast.walk(tree):
            if not isinstance(o, ast.Attribute) or not re.match('_[a-z]', o.attr) or o.attr in own[name] or o.attr not in others: continue
            if not (isinstance(o.value, ast.Name) and o.value.id in ('self', 'cls')): res.append(f'{name}:{o.lineno} {o.attr}')
    return res

def exported_cells():
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            text = ''.join(c['source'])
            if c['cell_type']=='code' and re.match(r'#\| *export', text): yield p.name,len(code_lines(text))

def main():
    lines = [o for text in modules.values() for o in code_lines(text)]
    trees = {name:ast.parse(text) for name,text in modules.items()}
    branches = [(n, name) for name,text in modules.items() for n in functions(text)]
    n_branches = [n for n,_ in branches]
    streams = [name for name,text in modules.items() if not name.startswith('loaders/') for _ in re.findall(r'isinstance\([^\n]*(?:StreamView|StreamDL|BlockRun)', text)]
    private,cells = private_of_others(trees),list(exported_cells())
    sizes = {name:len(code_lines(text)) for name,text in modules.items()}
    share = lambda n: f'{n} ({100*n/len(lines):.1f} %)'
    rows = {'code lines': len(lines), **{f'lines > {n}': share(sum(len(o)>n for o in lines)) for n in (120, 140, 160)},
            'branches per function: mean / over 10 / most': f'{mean(n_branches):.1f} / {100*mean(n>10 for n in n_branches):.1f} % / {max(branches)}',
            'vars(': sum(text.count('vars(') for text in modules.values()), "isinstance of a stream's classes outside their room": f'{len(streams)} in {sorted(set(streams))}',
            'private attributes of another module': f'{len(private)}: {private}', 'AST nodes': sum(sum(1 for _ in ast.walk(o)) for o in trees.values()),
            'longest module': max((n, name) for name,n in sizes.items()), 'exported cells > 60 lines / median': f'{sum(n>60 for _,n in cells)} / {median(n for _,n in cells)}'}
    for name,value in rows.items(): print(f'{name}: {value}')

if __name__=='__main__': main()
