"The page of messages and the library cannot drift apart"
import ast, re
from pathlib import Path
import tbptt_fastai
from fastcore.nbio import read_nb

PAGE = Path(__file__).resolve().parent.parent/'nbs'/'explanation'/'troubleshooting.ipynb'

def cells(): return read_nb(PAGE).cells

def collector():
    "The functions of the page"
    scope = dict(ast=ast, re=re, Path=Path, tbptt_fastai=tbptt_fastai)
    exec(next(o.source for o in cells() if 'def messages' in o.source), scope)
    return scope

def saved_list():
    "What the page shows, as it was saved"
    shown = next(o for o in cells() if 'def listed' in o.source)
    return ''.join(shown.outputs[0]['data']['text/markdown'])

def common_messages():
    "The first column of the table of common ones"
    text = next(o.source for o in cells() if '## The most common messages' in o.source)
    return re.findall(r'^\| `([^`]+)` \|', text.split('## The most common messages')[1], re.M)

def test_every_message_is_on_the_page():
    shown = saved_list()
    missing = [text for said in collector()['messages']().values() for _,text in said if text not in shown]
    assert not missing, f'run the page again (nbdev-test --save): {missing[:3]}'

def test_the_page_has_no_message_that_is_gone():
    said = {f'**{kind}** {text}' for room in collector()['messages']().values() for kind,text in room}
    shown = [line[2:] for line in saved_list().splitlines() if line.startswith('- ')]
    assert len(shown)>300 and not [o for o in shown if o not in said]

def test_every_room_is_listed():
    root = Path(tbptt_fastai.__file__).parent
    files = [p for p in root.rglob('*.py') if re.search(r'^\s*(if .*: )?raise \w+\(|warnings\.warn\(', p.read_text(encoding='utf-8'), re.M)]
    says = {p.relative_to(root).parts[0].removesuffix('.py') for p in files}
    assert len(says)>8
    assert says <= set(collector()['ROOMS'])

def test_common_messages_are_those_of_the_library():
    source = ' '.join(p.read_text(encoding='utf-8') for p in Path(tbptt_fastai.__file__).parent.rglob('*.py'))
    source = re.sub(r'"\s*\n\s*f?"|\'\s*\n\s*f?\'', '', re.sub(r'\{[^{}]*\}', '…', source))
    common = common_messages()
    assert len(common)>20
    assert not [o for o in common if o not in source]
