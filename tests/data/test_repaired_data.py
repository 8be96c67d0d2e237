"""Pictures that change behind the index, and runs that start again after a repair."""
import json
import shutil

import numpy as np
import pytest
from generated_set import RULE, made_up_rows, write_picture, write_pictures, write_rows, write_tokenizer

from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches
from vora_jax.types import UserError


def small_set(folder, fraction=1.0):
    names = write_pictures(folder / 'images', 10, 60)
    rows = made_up_rows(10, names, (1,))
    for number, row in enumerate(rows):
        row['frames'] = [names[number]]
    source = Source(write_rows(folder / 'rows.jsonl', rows), str(folder / 'images'))
    options = {'image': ImagePolicy(max_patches=30), 'max_bad_fraction': fraction, 'cache': str(folder / 'cache')}
    return Data((source,), write_tokenizer(folder), max_slots=256, max_patches=90, max_images=9, **options), names


def one_epoch(data, quarantine=''):
    """Sum of the tallies, and segments laid out, of an epoch."""
    loader = batches(data, RULE, 1, 0, quarantine=quarantine)
    try:
        rows = [next(loader) for _ in range(loader.num_rows)]
        return sum(row.tally[0].sum(0) for row in rows).tolist(), sum(int(row.segment_id.max()) for row in rows)
    finally:
        loader.close()


def test_a_picture_that_changed_its_size_is_left_out(tmp_path):
    data, names = small_set(tmp_path)
    (good, bad, dropped), segments = one_epoch(data, str(tmp_path / 'quarantine.jsonl'))
    assert (good, bad, segments) == (10, 0, 10) and not (tmp_path / 'quarantine.jsonl').exists()
    write_picture(tmp_path / 'images' / names[2], 17, 90, np.random.default_rng(0))
    (good, bad, dropped), segments = one_epoch(data, str(tmp_path / 'quarantine.jsonl'))
    assert (good, bad, segments) == (9, 1, 9)
    (line,) = (tmp_path / 'quarantine.jsonl').read_text().splitlines()
    assert json.loads(line)['row'] == 2
    assert 'rows.jsonl row 3: its (slots, patches, images) are (' in line and 'when it was measured' in line
    shutil.rmtree(tmp_path / 'cache')  # what the sentence says
    assert one_epoch(data)[1] == 10


def test_a_repaired_set_is_measured_anew(tmp_path):
    """A run that could not start says what is missing, and starts when it is there."""
    data, names = small_set(tmp_path, fraction=0.1)
    for name in names[:4]:
        (tmp_path / 'images' / name).rename(tmp_path / name)
    for number in range(4):
        with pytest.raises(UserError, match=rf'^{4 - number} of 10 samples .* row {number + 1}: image .* does not exist'):
            one_epoch(data, str(tmp_path / 'quarantine.jsonl'))
        (tmp_path / names[number]).rename(tmp_path / 'images' / names[number])
        if number == 2:
            break
    # The last one is within the limit. What the file holds of before does not count.
    assert one_epoch(data, str(tmp_path / 'quarantine.jsonl')) [0][:2] == [9, 1]
    assert len((tmp_path / 'quarantine.jsonl').read_text().splitlines()) == 4


def test_failures_of_an_earlier_run_do_not_stop_this_one(tmp_path):
    """Pictures that could not be decoded were repaired; another is damaged now."""
    data, names = small_set(tmp_path, fraction=0.1)
    quarantine = str(tmp_path / 'quarantine.jsonl')
    assert one_epoch(data, quarantine)[1] == 10
    whole = {name: (tmp_path / 'images' / name).read_bytes() for name in names}
    for name in (names[4], names[6]):
        (tmp_path / 'images' / name).write_bytes(whole[name][:-30])
    with pytest.raises(UserError, match=r'^2 of 10 samples cannot be used'):
        one_epoch(data, quarantine)
    for name in (names[4], names[6]):
        (tmp_path / 'images' / name).write_bytes(whole[name])
    (tmp_path / 'images' / names[8]).write_bytes(whole[names[8]][:-30])
    tally, segments = one_epoch(data, quarantine)
    assert tally[:2] == [9, 1] and segments == 9
