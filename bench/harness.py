"""What the benchmarks have in common: turns, medians with their range, tables, and a file of measurements that says where they come from"""
import argparse, json, os, platform, re, statistics, subprocess, sys
from importlib.metadata import version
from pathlib import Path


def arguments(doc, repeats, **more):
    "A parser with the arguments of every benchmark, and `more`: a name and what `add_argument` takes"
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=repeats, help='turns of all contenders')
    parser.add_argument('--json', help='file for all measurements')
    for name,kw in more.items(): parser.add_argument(f'--{name}', **kw)
    return parser

def turns(contenders, repeats, measure, warm_up=0):
    "`measure(contender, turn)` of one after the other in each turn, so that what else the machine does meets all of them; `warm_up` turns do not count"
    runs = {o: [] for o in contenders}
    for i in range(-warm_up, repeats):
        for o,seen in runs.items():
            res = measure(o, i)
            if i>=0: seen.append(res)
    return runs

def in_process(file, *args):
    "What `file --one args` prints last, as JSON, from a process of its own"
    res = subprocess.run([sys.executable, '-W', 'ignore', file, '--one', *map(str, args)], capture_output=True, text=True)
    if res.returncode: sys.exit(res.stderr)
    return json.loads(res.stdout.splitlines()[-1])

def status(key):
    "A line of this process's memory status, in MiB (Linux): VmRSS is what is resident, VmHWM the most that ever was"
    with open('/proc/self/status') as f: return next(int(line.split()[1]) for line in f if line.startswith(key))/1024


def column(runs, key, scale=1):
    "One figure of all turns"
    return [scale*o[key] for o in runs]

def ratios(runs, base, key):
    "A figure against that of another contender in the same turn"
    return [o[key]/b[key] for o,b in zip(runs, base, strict=True)]

def spread(values, form='.2f'):
    "Median and range"
    return f'{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})'

def table(header, rows, text=(0,)):
    "Print a table; columns in `text` are words, all others numbers"
    print(f"| {' | '.join(header)} |\n| {' | '.join('---' if i in text else '--:' for i in range(len(header)))} |")
    for row in rows: print(f"| {' | '.join(map(str, row))} |")


def machine():
    "Kind of processor, its name and its cores"
    info,names = Path('/proc/cpuinfo'),[]
    if info.exists(): names = [o.split(':', 1)[1].strip() for o in info.read_text().splitlines() if o.startswith('model name')]
    return dict(machine=platform.machine(), processor=names[0] if names else platform.processor(), cores=os.cpu_count(), system=platform.system())

def versions(*packages):
    "Python, torch, fastai, and more by their names in the package index"
    import fastai, torch
    return {'Python': platform.python_version(), 'torch': torch.__version__, 'fastai': fastai.__version__, **{o: version(o) for o in packages}}

def headline(*what, packages=()):
    "The line above a table: machine, versions, and what else a reader has to know"
    print('; '.join([', '.join([platform.machine(), *(f'{k} {v}' for k,v in versions(*packages).items())]), *what]), end='\n\n')

def save(args, results, packages=()):
    "Write all measurements to the file that was asked for, with machine, versions and arguments; without where files are"
    if not args.json: return
    given = {k: v for k,v in vars(args).items() if k not in ('json','path','tmp')}
    text = json.dumps({**machine(), 'versions': versions(*packages), 'arguments': given, 'results': results}, indent=1)
    Path(args.json).write_text(re.sub(r'[{[][^{}[\]]*[]}]', lambda o: re.sub(r'\s*\n\s*', ' ', o[0]), text)+'\n') # one measurement a line
