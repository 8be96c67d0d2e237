"""What is told about a row is what was put into it."""
import inspect
import textwrap

import numpy as np
import PIL.Image
import pytest

from vora_jax.batch import Patches
from vora_jax.data.fake import random_segments
from vora_jax.data.images.patches import patchify
from vora_jax.data.inspect.row_mask import draw_mask
from vora_jax.data.inspect.row_text import escaped, find_runs, tell_row
from vora_jax.data.inspect.unpatchify import contact_sheet, pictures_of
from vora_jax.data.packing import Budgets, Picture, Text, layout
from vora_jax.method import VisionTokenRule
from vora_jax.types import PAD, ROUTE, TEXT, VISION

RULES = [VisionTokenRule(2), VisionTokenRule(2, cls=True, bidirectional=False), VisionTokenRule(2, pool=2, route_token=True),
         VisionTokenRule(2, cls=True, select='cls', tokens_per_place=3),
         VisionTokenRule(2, tokens_per_place=2, join_adjacent=True)]


class Letters:
    """Ids are characters."""

    def decode(self, ids):
        return ''.join(map(chr, ids))


def picture(rng, rows, cols, side=2):
    return Picture(rng.integers(0, 256, (rows * cols, side * side * 3)).astype(np.uint8), rows, cols)


def text(letters, supervised=False):
    return Text([ord(letter) for letter in letters], supervised)


@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('seed', range(8))
def test_runs_are_the_segments(rule, seed):
    rng = np.random.default_rng(seed)
    budgets = Budgets(40, 30, 6, 12)
    segments = random_segments(rng, budgets, 90, rule)
    row = layout(segments, budgets, rule=rule)
    runs, image = find_runs(row, rule), 0
    assert [run.first for run in runs] == np.cumsum([0, *(run.size for run in runs[:-1])]).tolist()
    assert sum(run.size for run in runs) == 40
    for number, segment in enumerate(segments, 1):
        mine = [run for run in runs if run.segment == number]
        if rule.route_token:
            assert mine.pop(0)[1:] == (ROUTE, row.segment_id.tolist().index(number), 1, False, -1)
        # Every slot of the segment as (kind, picture, learned, token) in order.
        expected, found = [], []
        for part in segment:
            if isinstance(part, Text):
                expected += [(TEXT, -1, part.supervised, token) for token in part.ids]
            else:
                expected += [(VISION, image, False, 0)] * rule.num_tokens(part.rows, part.cols)
                image += 1
        if not rule.route_token and expected[0][0] == TEXT:  # nothing predicts the first slot of a row's segment
            expected[0] = (*expected[0][:2], False, expected[0][3])
        for run in mine:
            found += [(run.kind, run.picture, run.learned, token)
                      for token in row.tokens[run.first:run.first + run.size].tolist()]
        assert found == expected
    assert {run.kind for run in runs if not run.segment} <= {PAD}


@pytest.mark.parametrize('rule', RULES, ids=str)
def test_pictures_are_put_together_again(rule):
    rng = np.random.default_rng(5)
    originals = [rng.integers(0, 256, (2 * rows, 2 * cols, 3)).astype(np.uint8) for rows, cols in ((1, 4), (3, 2), (1, 1))]
    parts = [Picture(patchify(each, 2), each.shape[0] // 2, each.shape[1] // 2) for each in originals]
    row = layout([[parts[0], text('a'), parts[1]], [parts[2]]], Budgets(64, 20, 5, 12), rule=rule)
    found = pictures_of(row.patches)
    assert len(found) == 3 and all((one == other).all() for one, other in zip(found, originals))
    assert pictures_of(Patches(*(leaf[:0] for leaf in row.patches))) == []


def test_a_row_is_told():
    rng = np.random.default_rng(0)
    segment = [text('<user>\n'), picture(rng, 2, 3), text('what?'), text('blue$', supervised=True)]
    row = layout([segment, [text('hi'), text('é\u200b', supervised=True)]], Budgets(32, 16, 4, 12), rule=RULES[0])
    lines = tell_row(row, RULES[0], Letters()).split('\n')
    assert lines[:5] == [
        'samples       2', 'slots        27 of     32, 15.6% padding', 'patches       6 of     16, 62.5% padding',
        'pictures      1 of      4, 75.0% padding', 'learned       7 slots']
    assert [line.split(maxsplit=4) for line in lines[7:]] == [
        ['1', 'text', '0', '7', '<user>\\n'], ['1', 'vision', '7', '6', 'picture 0: 2 x 3 patches'],
        ['1', 'text', '13', '5', 'what?'], ['1', 'text', '18', '5', '[[blue$]]'],
        ['2', 'text', '23', '2', 'hi'], ['2', 'text', '25', '2', '[[é\\u200b]]'], ['pad', '27', '5']]
    routed = layout([[text('a')], [picture(rng, 1, 1)]], Budgets(8, 4, 2, 12), rule=RULES[2])
    told = tell_row(routed, RULES[2], Letters())
    assert 'text alone' in told and 'with pictures' in told
    blind = layout([[text('a' * 200)]], Budgets(200))
    told = tell_row(blind, None, Letters())
    assert 'patches' not in told and told.count('a' * 90) == 2 and max(map(len, told.split('\n'))) < 125
    assert escaped('a\tb\r\n\x00 c') == 'a\\tb\\r\\n\\x00 c'


def test_a_mask_is_drawn():
    rng = np.random.default_rng(0)
    row = layout([[text('ab'), picture(rng, 1, 3), text('c')], [text('de')]], Budgets(10, 4, 2, 12), rule=RULES[0])
    assert draw_mask(row).split('\n') == [
        '  ttvvvttt', '0 x.......', '1 xx......', '2 xxxxx...', '3 xxxxx...', '4 xxxxx...', '5 xxxxxx..', '6 ......x.',
        '7 ......xx']
    assert textwrap.indent(draw_mask(row), 4 * ' ') in inspect.getdoc(draw_mask)  # the docstring's example
    blocks = draw_mask(row, 4).split('\n')
    assert blocks[0].startswith('blocks of 2 slots') and blocks[1:] == ['  tv*t', '0 +...', '2 xx+.', '4 xx+.', '6 ...+']
    assert draw_mask(layout([], Budgets(4))) == '(an empty row)'


@pytest.mark.parametrize('seed', range(6))
def test_a_drawn_mask_is_the_mask(seed):
    rng = np.random.default_rng(seed)
    budgets = Budgets(90, 60, 9, 12)
    row = layout(random_segments(rng, budgets, 90, RULES[seed % 5]), budgets, rule=RULES[seed % 5])
    slots = np.arange(90)
    sees = (row.key_start[:, None] <= slots) & (slots < row.key_stop[:, None])
    used = int((row.segment_id > 0).sum())
    drawn = draw_mask(row, 100).split('\n')[1:]
    assert [line.split()[1] for line in drawn] == [''.join(np.where(line, 'x', '.')) for line in sees[:used, :used]]
    step = -(-used // 16)
    for line in draw_mask(row, 16).split('\n')[2:]:
        first, marks = int(line.split()[0]), line.split()[1]
        for block, mark in enumerate(marks):
            part = sees[first:min(first + step, used), block * step:min(block * step + step, used)]
            assert mark == ('x' if part.all() else '+' if part.any() else '.')


def test_a_contact_sheet_holds_every_picture():
    rng = np.random.default_rng(3)
    sizes = [(40, 1500), (300, 200), (10, 10), (64, 700), (64, 700)]
    pictures = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    sheet = np.asarray(contact_sheet(pictures, [f'picture {number}' for number in range(5)]))
    assert sheet.shape[1] >= 1500
    for picture in pictures:
        height, width = picture.shape[:2]
        corners = np.argwhere((sheet[:-height or None, :-width or None] == picture[0, 0]).all(-1))
        assert any((sheet[y:y + height, x:x + width] == picture).all() for y, x in corners.tolist())
    assert isinstance(contact_sheet([], []), PIL.Image.Image)
