"""Batches drawn from a description, their areas and pictures."""
import numpy as np
import pytest

from vora_jax.bench.mask_picture import EMPTY, FULL, LINE, LOADED, MARGIN, PARTIAL, draw_mask
from vora_jax.bench.random_batch import CAPTION, SAMPLES, Description, Kind, draw, parse
from vora_jax.bench.tile_statistics import tile_statistics, true_area
from vora_jax.ops.tile_walk import Tile
from vora_jax.types import KeyRange, UserError


def test_the_words_of_the_default_description():
    assert parse(SAMPLES, CAPTION) == Description()
    assert parse('3x5@2', '7', own_image_only=True) == Description((Kind(2, 3, 5, 5),), (7, 7), True)


@pytest.mark.parametrize('samples, caption, message', [
    ('1x10', '1-2', "--samples: '1x10' is not IMAGESxTOKENS@WEIGHT"),
    ('text@.5, 1x10-5@1', '1-2', "--samples: '1x10-5@1' has no images or no tokens"),
    ('0x10@1', '1-2', "'0x10@1' has no images"),
    ('text@0', '1-2', "--samples: all weights of 'text@0' are 0"),
    ('text@1', '9-2', "--caption: '9-2' is not MIN-MAX"),
    ('text@1', '0-2', "--caption: '0-2' is not MIN-MAX"),
])
def test_mistakes_of_the_description_are_told(samples, caption, message):
    with pytest.raises(UserError) as error:
        parse(samples, caption)
    assert message in str(error.value)


def test_samples_that_fit_no_row_are_told():
    with pytest.raises(UserError, match='none of 8 drawn samples fits into a row of 64 slots'):
        draw(parse('1x65@1', '1'), 2, 64, 0)


def test_a_batch_follows_from_its_seed():
    first, again, other = (draw(Description(), 2, 2048, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.key_range, again.key_range)
    assert (first.key_range.stop != other.key_range.stop).any()


def expected(pieces, slots, own_image_only):
    """start and stop of one row by its definition. pieces: [(is an image, tokens)] of each sample."""
    start, stop = np.zeros((2, slots), int)
    slot = 0
    for sample in pieces:
        first = slot
        for is_image, tokens in sample:
            for query in range(slot, slot + tokens):
                start[query] = slot if is_image and own_image_only else first
                stop[query] = slot + tokens if is_image else query + 1
            slot += tokens
    return start, stop


@pytest.mark.parametrize('own_image_only', [False, True])
def test_key_ranges_of_rows(own_image_only):
    drawn = draw(parse('2x5@1', '3', own_image_only), 2, 30, seed=0)  # samples of 13 slots: two a row
    start, stop = expected([[(True, 5), (True, 5), (False, 3)]] * 2, 30, own_image_only)
    np.testing.assert_array_equal(drawn.key_range.start, [start, start])
    np.testing.assert_array_equal(drawn.key_range.stop, [stop, stop])
    np.testing.assert_array_equal(drawn.segment_id[0], [1] * 13 + [2] * 13 + [0] * 4)
    assert drawn.samples == 4


def test_rows_are_filled_first_fit_with_all_kinds():
    drawn = draw(parse('1x30@.5, text@.5', '4-12'), 3, 256, seed=0)
    lengths = [np.unique(row[row > 0], return_counts=True)[1] for row in drawn.segment_id]
    sizes = np.concatenate(lengths)
    assert drawn.samples == len(sizes) and sizes.min() <= 12 and sizes.max() >= 34
    # A sample goes to the first row with room, so only what row 0 had no room for is in the others.
    assert (drawn.segment_id == 0).sum(1).max() < 42


def test_statistics_of_a_mask_known_by_hand():
    # Query 0 sees key 0, 1 sees 0 and 1, 2 and 3 see 2 to 4 (S is 5), 4 and 5 see nothing.
    key_range = KeyRange(np.array([[0, 0, 2, 2, 0, 0]]), np.array([[1, 2, 5, 5, 0, 0]]))
    found = tile_statistics(key_range, 5, Tile(2, 2))
    assert true_area(key_range) == 9
    assert found.density == pytest.approx(9 / 30)
    # of 3 x 3 tiles (0, 0), (1, 1), (1, 2) are visited, (1, 2) for its lower half; (1, 1) is full; query tile 2 sees nothing
    assert found.visited == pytest.approx(5 * 2 / 30) and found.loaded == pytest.approx(3 * 4 / 30)
    assert found.full == pytest.approx(2 / 5)
    assert (found.zero_rows, found.zero_columns) == (1, 0)
    assert found.visited_per_true == pytest.approx(10 / 9)
    assert found.causal == pytest.approx(6 * 4 / 30) and found.visited_per_causal == pytest.approx(10 / 24)


def test_a_picture_shows_mask_and_tiles():
    # Queries 0 to 3 see keys [0, 4), 4 to 6 see key 8, 7 sees nothing.
    key_range = KeyRange(np.array([[0] * 4 + [8] * 3 + [0]]), np.array([[4] * 4 + [9] * 3 + [0]]))
    picture = draw_mask(key_range, 12, Tile(4, 4))
    zoom, left, top = 1024 // 12, MARGIN, 2 * MARGIN + LINE
    colours = [[picture.getpixel((left + int((key + 0.5) * zoom), top + int((query + 0.5) * zoom))) for key in range(12)]
               for query in (0, 3, 4, 7)]
    empty, loaded = [EMPTY[0]] * 4, [LOADED[0]] * 2
    assert colours[0] == colours[1] == [FULL[0]] * 4 + empty * 2
    assert colours[2] == empty * 2 + [PARTIAL[1], PARTIAL[0]] + loaded
    assert colours[3] == empty * 2 + [PARTIAL[0]] * 2 + loaded
    long = draw_mask(draw(Description(), 1, 5000, seed=0).key_range, 5000, Tile(128, 512))
    assert long.width < 1200 and long.height < 1200
    colours = {colour for _, colour in long.getcolors(maxcolors=1 << 16)}
    assert {EMPTY[0], LOADED[0], PARTIAL[0], PARTIAL[1], FULL[0]} <= colours
