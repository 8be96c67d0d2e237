"""Rows against an independent double loop, and the plan."""

import numpy as np
import pytest

from vora_jax.data.fake import fake_batch, random_segments
from vora_jax.data.packing import Budgets, Picture, Text, layout, plan, stack
from vora_jax.method import VisionTokenRule
from vora_jax.types import PAD, TEXT, VISION

BUDGETS = Budgets(slots=40, patches=24, images=5, patch_dim=12)


def picture(rows, cols, value=0):
    return Picture(np.full((rows * cols, 12), value, np.uint8), rows, cols)


def flat_slots(segments):
    """One (segment, image, is_text, id, supervised) for each slot, image numbers counted through the row."""
    slots, image = [], 0
    for number, segment in enumerate(segments, 1):
        for part in segment:
            if isinstance(part, Text):
                slots += [(number, None, True, token, part.supervised) for token in part.ids]
            else:
                slots += [(number, image, False, 0, False)] * (part.rows * part.cols)
                image += 1
    return slots


def brute_force_mask(slots, size):
    """allowed[q, k] from the rule: same segment, and either k is not later or both are of the same image."""
    allowed = np.zeros((size, size), bool)
    for q, (q_segment, q_image, *_) in enumerate(slots):
        for k, (k_segment, k_image, *_) in enumerate(slots):
            same_image = q_image is not None and q_image == k_image
            allowed[q, k] = q_segment == k_segment and (k <= q or same_image)
    return allowed


def test_key_range_equals_double_loop_on_random_layouts():
    rng = np.random.default_rng(0)
    seen = {
        'starts with image': 0,
        'ends with image': 0,
        'adjacent images': 0,
        'packed': 0,
        'padded': 0,
        'text only': 0,
    }
    keys = np.arange(BUDGETS.slots)
    for trial in range(1000):
        segments = random_segments(rng, BUDGETS, vocab_size=50)
        row = layout(segments, BUDGETS)
        ranges = (row.key_start[:, None] <= keys) & (keys < row.key_stop[:, None])
        np.testing.assert_array_equal(
            ranges, brute_force_mask(flat_slots(segments), BUDGETS.slots), err_msg=str(trial)
        )
        kinds = [[isinstance(part, Picture) for part in segment] for segment in segments]
        seen['starts with image'] += any(kind[0] for kind in kinds)
        seen['ends with image'] += any(kind[-1] for kind in kinds)
        seen['adjacent images'] += any(a and b for kind in kinds for a, b in zip(kind, kind[1:]))
        seen['packed'] += len(segments) > 1
        seen['padded'] += bool((row.modality == PAD).any())
        seen['text only'] += not any(map(any, kinds))
    assert all(count > 30 for count in seen.values()), seen


@pytest.mark.parametrize('rule', [
    VisionTokenRule(2, bidirectional=False), VisionTokenRule(2, join_adjacent=True), VisionTokenRule(2, cls=True)])
def test_other_rules_equal_double_loop_on_random_layouts(rule):
    rng = np.random.default_rng(3)
    keys = np.arange(BUDGETS.slots)
    for trial in range(200):
        segments = random_segments(rng, BUDGETS._replace(patches=18), vocab_size=50)
        row, slots = layout(segments, BUDGETS, rule=rule), flat_slots(segments)
        if rule.join_adjacent:  # one number for a run of pictures: a picture right after one takes its number
            for index in range(1, len(slots)):
                if slots[index][0] == slots[index - 1][0] and None not in (slots[index][1], slots[index - 1][1]):
                    slots[index] = (slots[index][0], slots[index - 1][1], *slots[index][2:])
        elif not rule.bidirectional:
            slots = [(segment, None, *rest) for segment, _, *rest in slots]
        ranges = (row.key_start[:, None] <= keys) & (keys < row.key_stop[:, None])
        np.testing.assert_array_equal(ranges, brute_force_mask(slots, BUDGETS.slots), err_msg=str(trial))


def test_a_cls_slot_comes_before_the_patches_of_its_image():
    rule = VisionTokenRule(2, cls=True)
    row = layout([[picture(1, 2, 7), Text([4]), picture(1, 1, 8)]], BUDGETS, rule=rule)
    patches = row.patches
    np.testing.assert_array_equal(patches.image_id[:6], [0, 0, 0, 1, 1, -1])
    np.testing.assert_array_equal(patches.row[:6], [-1, 0, 0, -1, 0, -1])
    np.testing.assert_array_equal(patches.col[:6], [-1, 0, 1, -1, 0, -1])
    np.testing.assert_array_equal(patches.pixels[:6, 0], [0, 7, 7, 0, 8, 0])
    np.testing.assert_array_equal(patches.key_start[:5], [0, 0, 0, 3, 3])
    np.testing.assert_array_equal(patches.key_stop[:5], [3, 3, 3, 5, 5])
    np.testing.assert_array_equal(row.vision_slot[:4], [0, 1, 3, -1])
    np.testing.assert_array_equal(row.vision_source[:4], [1, 2, 4, 0])
    assert rule.num_tokens(1, 2) == 2 and rule.num_places(1, 2) == 3
    with pytest.raises(ValueError, match='do not fit into a row'):
        layout([[picture(1, 2)]], BUDGETS._replace(patches=2), rule=rule)


def test_slots_targets_and_patches_equal_a_plain_loop():
    rng = np.random.default_rng(1)
    for _ in range(200):
        segments = random_segments(rng, BUDGETS, vocab_size=50)
        row, slots = layout(segments, BUDGETS), flat_slots(segments)
        pictures = [part for segment in segments for part in segment if isinstance(part, Picture)]
        position = 0
        for slot in range(BUDGETS.slots):
            assert row.route_slot[slot] == slot
            if slot >= len(slots):
                assert (row.modality[slot], row.segment_id[slot], row.tokens[slot], row.loss_mask[slot]) == (
                    PAD,
                    0,
                    0,
                    0,
                )
                assert row.key_start[slot] == row.key_stop[slot]
                continue
            segment, _, is_text, token, _ = slots[slot]
            position = position + 1 if slot and slots[slot - 1][0] == segment else 0
            following = slots[slot + 1] if slot + 1 < len(slots) else (None,) * 5
            learned = following[0] == segment and following[4]
            assert row.positions[slot] == position
            assert row.modality[slot] == (TEXT if is_text else VISION)
            assert (row.tokens[slot], row.segment_id[slot]) == (token, segment)
            assert (row.loss_mask[slot], row.targets[slot]) == ((1, following[3]) if learned else (0, 0))
        vision = [slot for slot, entry in enumerate(slots) if not entry[2]]
        np.testing.assert_array_equal(row.vision_slot, vision + [-1] * (BUDGETS.patches - len(vision)))
        patch = 0
        for image, part in enumerate(pictures):
            assert tuple(row.patches.grid[image]) == (part.rows, part.cols)
            for place in range(part.rows * part.cols):
                np.testing.assert_array_equal(
                    row.patches.pixels[row.vision_source[patch]], part.pixels[place]
                )
                assert (row.patches.row[patch], row.patches.col[patch]) == divmod(place, part.cols)
                assert row.patches.image_id[patch] == image
                assert row.patches.key_start[patch] == patch - place
                assert row.patches.key_stop[patch] == patch - place + part.rows * part.cols
                patch += 1
        assert (row.patches.image_id[patch:] == -1).all() and (row.patches.row[patch:] == -1).all()
        assert (row.patches.key_start[patch:] == row.patches.key_stop[patch:]).all()
        assert not row.patches.pixels[patch:].any() and not row.patches.grid[len(pictures) :].any()


def test_worked_example():
    row = layout(
        [[Text([7]), picture(1, 2), Text([8], supervised=True)], [Text([9])]], BUDGETS._replace(slots=6)
    )
    assert row.tokens.tolist() == [7, 0, 0, 8, 9, 0]
    assert row.targets.tolist() == [0, 0, 8, 0, 0, 0] and row.loss_mask.tolist() == [0, 0, 1, 0, 0, 0]
    assert row.key_start.tolist() == [0, 0, 0, 0, 4, 0] and row.key_stop.tolist() == [1, 3, 3, 4, 5, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 0]


def test_the_last_slot_of_a_question_predicts_the_first_of_the_answer():
    row = layout([[Text([1, 2]), Text([3, 4], supervised=True)], [Text([5], supervised=True)]], Budgets(8))
    assert row.targets.tolist() == [0, 3, 4, 0, 0, 0, 0, 0]  # nothing predicts across a border of segments


@pytest.mark.parametrize(
    'segments',
    [
        [[Text([1] * 41)]],
        [[picture(5, 5)]],
        [[picture(1, 1)] * 6],
        [[Picture(np.zeros((3, 12), np.uint8), 2, 2)]],
        [[Picture(np.zeros((4, 12), np.float32), 2, 2)]],
    ],
)
def test_what_does_not_fit_raises(segments):
    with pytest.raises(ValueError):
        layout(segments, BUDGETS)


def test_an_empty_row_is_all_padding():
    row = layout([], BUDGETS, tally=np.array([[0, 2, 1]]))
    assert not row.modality.any() and not row.loss_mask.any() and row.tally.tolist() == [[0, 2, 1]]
    assert not layout([[]], BUDGETS).modality.any()


def test_stack_keeps_types_and_missing_patches():
    text = stack([layout([[Text([1, 2])]], Budgets(4))] * 2)
    assert text.patches is None and text.vision_slot.shape == (2, 0) and text.tally.tolist() == [[[1, 0, 0]]] * 2
    batch = fake_batch(3, 32, 16, 4, 50, 4, seed=0)
    types = {name: str(leaf.dtype) for name, leaf in batch._asdict().items() if name not in ('patches',)}
    assert (
        types.pop('loss_mask') == 'float32'
        and types.pop('modality') == 'int8'
        and set(types.values()) == {'int32'}
    )
    assert [str(leaf.dtype) for leaf in batch.patches] == [
        'uint8',
        'int16',
        'int16',
        'int32',
        'int32',
        'int32',
        'int32',
    ]
    assert batch.patches.pixels.shape == (3, 16, 48) and batch.patches.grid.shape == (3, 4, 2)


def test_fake_batch_is_a_function_of_its_arguments():
    first, again, other = (fake_batch(2, 32, 16, 4, 50, 4, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.patches.pixels, again.patches.pixels)
    assert (first.tokens != other.tokens).any() and first.tokens.max() < 50
    assert fake_batch(2, 32, 16, 4, 50, 4, seed=5, text_only=True).patches is None


def rows_of(found):
    return np.split(found.samples, found.starts[1:-1])


def test_plan_places_every_sample_once_and_fills_rows():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(5, 20, 500), rng.integers(0, 9, 500), rng.integers(0, 2, 500)], 1)
    rows = rows_of(plan(lengths, BUDGETS, seed=3))
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    totals = np.array([lengths[row].sum(0) for row in rows])
    assert (totals <= [BUDGETS.slots, BUDGETS.patches, BUDGETS.images]).all()
    assert totals[:, 0].mean() > 0.9 * BUDGETS.slots
    again, other = rows_of(plan(lengths, BUDGETS, seed=3)), rows_of(plan(lengths, BUDGETS, seed=4))
    assert (
        [row.tolist() for row in rows] == [row.tolist() for row in again] != [row.tolist() for row in other]
    )
    assert [len(row) for row in rows_of(plan(lengths, BUDGETS, seed=3, pack=False))] == [1] * 500
    with pytest.raises(ValueError, match='sample 1 is larger'):
        plan([[1, 0, 0], [41, 0, 0]], BUDGETS, seed=0)
