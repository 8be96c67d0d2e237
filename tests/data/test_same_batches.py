"""The same rows in files of every kind give the same batches."""
import json

import jax
import pytest
import tiny_rows

from vora_jax.cli.main import main
from vora_jax.data import loader
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.method import VisionTokenRule


def leaves(path, folder, **settings):
    """The bytes of the first batches, over the border of an epoch."""
    data = Data((Source(str(path)),), str(folder / 'tokenizer'), max_slots=300, max_patches=200, **settings)
    batches = loader.batches(data, VisionTokenRule(8), 2, seed=3)
    found = [leaf.tobytes() for _ in range(12) for leaf in jax.tree.leaves(next(batches))]
    assert batches.epoch(batches.get_state()) > 1 and not batches.warnings
    batches.close()
    return found


@pytest.mark.parametrize('settings', [{}, {'video_frames': 2}, {'image': ImagePolicy(kind='square_pad', side=24)}],
                         ids=['native', 'video', 'square'])
def test_every_kind_gives_equal_batches(tmp_path, settings):
    pytest.importorskip('pyarrow')
    rows = tiny_rows.made_up_rows(40)
    first = tiny_rows.written(tmp_path, rows)
    train_sentencepiece((turn['value'] for row in rows for turn in row['conversations']), str(tmp_path / 'tokenizer'), 320)
    paths = tiny_rows.in_every_kind(tmp_path, rows)
    (tmp_path / 'windows.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\r\n\r\n'.join(
        json.dumps(row).encode() for row in rows) + b'\r\n')
    held = [{**row, 'conversations': [{**turn, 'value': turn['value'].replace('<image>', ' <image> ')}
                                      for turn in row['conversations']]} for row in rows]
    (tmp_path / 'held.jsonl').write_text('\n'.join(map(json.dumps, held)))
    (tmp_path / 'held.json').write_text(json.dumps(held))
    assert main(['prepare', 'rows', first, '--to', str(tmp_path / 'folder'), '--workers', '0', '--rows-per-part', '7']) == 0
    expected = leaves(first, tmp_path, **settings)
    for path in (paths['parquet'], paths['tar'], tmp_path / 'windows.jsonl', tmp_path / 'folder'):
        assert leaves(path, tmp_path, **settings) == expected, path
    # A list in which pictures stand under `frames` is not LLaVA's: its `<image>` stay where they are.
    assert leaves(tmp_path / 'held.json', tmp_path, **settings) == leaves(tmp_path / 'held.jsonl', tmp_path, **settings)
