"What becomes of a page on its way to the site"
from types import SimpleNamespace
import pytest
pytest.importorskip('nbdev') # which the lowest versions are tested without
from fastcore.nbio import NbCell
from tbptt_fastai._pages import InsideLast, OneHeading, drop_empty, one_link, table_widths

def markdown(text): return NbCell(0, dict(cell_type='markdown', source=text))

def test_sections_about_the_inside_are_last_and_keep_their_order():
    cells = [markdown(o) for o in ('# Page', 'p', '## Inside: b', 'of b', '## Use', 'of use', '### Inside is no section', '## Inside: a\n\nwords', '## More')]
    nb = SimpleNamespace(cells=[*cells, markdown('## Inside: nothing that shows')])
    InsideLast(nb).end()
    assert [o.source for o in nb.cells] == ['# Page', 'p', '## Use', 'of use', '### Inside is no section', '## More',
                                           '## Inside: b', 'of b', '## Inside: a\n\nwords']

@pytest.mark.parametrize('heading,left', [('## f', 'words'), ('## `f`', 'words'), ('## F', '---\n\n\n### f\nwords')])
def test_a_section_with_the_name_of_its_symbol_has_one_heading(heading, left):
    symbol = NbCell(1, dict(cell_type='code', source='show_doc(f)', outputs=[dict(data={'text/markdown': ['---\n', '\n', '\n', '### f\n', 'words']})]))
    proc = OneHeading(SimpleNamespace(cells=[]))
    proc.begin()
    for o in (markdown(heading), symbol): proc.cell(o)
    assert ''.join(symbol.outputs[0]['data']['text/markdown']) == left

def test_code_that_looks_like_a_heading_is_no_section():
    code = SimpleNamespace(cell_type='code', source='## Inside')
    nb = SimpleNamespace(cells=[code, markdown('## Use')])
    InsideLast(nb).end()
    assert nb.cells[0] is code

def test_a_page_without_sections_stays_as_it_is():
    nb = SimpleNamespace(cells=[])
    InsideLast(nb).end()
    assert nb.cells == []

def test_a_link_leads_where_its_author_said():
    cell = markdown('See [[`A.b`](/a.html#a.b)](how_to/x.ipynb) and [`C`](/c.html#c), [d [`E`](/e.html), [`f`](/f)](x)')
    one_link(cell)
    assert cell.source == 'See [`A.b`](how_to/x.ipynb) and [`C`](/c.html#c), [d `E`, `f`](x)'

def test_columns_are_as_wide_as_what_they_hold():
    cell = markdown('a\n\n| a | b |\n| --- | ---: |\n| [`x`](a/very/long/path.ipynb) | twelve chars |\n| y | a \\| b |\n\nb')
    table_widths(cell)
    assert cell.source == ('a\n\n| a | b |\n|---|-----------:|\n| [`x`](a/very/long/path.ipynb) | twelve chars |\n| y | a \\| b |\n\nb')

def test_one_long_cell_leaves_room_for_the_others():
    cell = markdown(f"| a | b |\n|:---|---|\n| {'x '*100}| {'y'*20} |")
    table_widths(cell)
    assert cell.source.split('\n')[1] == f"|:{'-'*59}|{'-'*20}|"

def test_lines_that_are_no_table_stay():
    cell = markdown('| a | b |\n\n`|x|`')
    table_widths(cell)
    assert cell.source == '| a | b |\n\n`|x|`'

@pytest.mark.parametrize('shown_as', ['', None])
def test_a_cell_without_a_symbol_is_left_out(shown_as):
    kept,empty = (NbCell(0, dict(cell_type='code', source='show_doc(f)', outputs=[dict(data={'text/markdown': o})])) for o in ('### f', shown_as))
    for o in (kept, empty): drop_empty(o)
    assert hasattr(kept, 'source') and not hasattr(empty, 'source')
