"""What the length index depends on: all that decides sizes, and nothing else."""
import dataclasses
import pathlib
import shutil

import pytest
from generated_set import RULE, mixed, write_tokenizer

from vora_jax.data.loader import batches
from vora_jax.data.samples import Samples
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.types import UserError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp('mixed'), 12)


def key_of(data, cache, rule=RULE, seed=0):
    """Name of the index that a run with this data uses, of those in the folder `cache`."""
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(cache).glob('lengths-*')}
    batches(data, rule, 2, seed, cache=str(cache)).close()
    after = {path: path.stat().st_mtime_ns for path in pathlib.Path(cache).glob('lengths-*')}
    new = after.keys() - before.keys()
    assert len(new) <= 1
    return new.pop().name if new else None


def with_policy(data, **changes):
    return dataclasses.replace(data, image=dataclasses.replace(data.image, **changes))


def test_budgets_weights_packing_and_seed_use_the_same_index(data, tmp_path, monkeypatch):
    assert key_of(data, tmp_path)
    monkeypatch.setattr(Samples, 'measure', None)
    sources = tuple(dataclasses.replace(source, weight=0.7) for source in data.sources)
    for other in (dataclasses.replace(data, max_slots=300), dataclasses.replace(data, max_patches=100, max_images=9),
                  dataclasses.replace(data, pack=False), dataclasses.replace(data, sources=sources, max_bad_fraction=0.2)):
        assert key_of(other, tmp_path) is None
    assert key_of(data, tmp_path, seed=7) is None


def test_all_else_needs_another_index(data, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(pathlib.Path(data.tokenizer).parent, folder)
    copied = [dataclasses.replace(source, path=source.path.replace(str(pathlib.Path(source.path).parent), str(folder)))
              for source in data.sources]
    changed = dataclasses.replace(data, sources=tuple(copied))
    found = [
        key_of(data, tmp_path),
        key_of(dataclasses.replace(data, template='plain'), tmp_path),
        key_of(dataclasses.replace(data, video_frames=3), tmp_path),
        key_of(with_policy(data, max_patches=20), tmp_path),
        key_of(with_policy(data, kind='square_pad', side=24), tmp_path),
        key_of(data, tmp_path, rule=dataclasses.replace(RULE, pool=2)),
        key_of(data, tmp_path, rule=dataclasses.replace(RULE, patch_size=16)),
        key_of(data, tmp_path, rule=dataclasses.replace(RULE, route_token=True)),
        key_of(dataclasses.replace(data, sources=data.sources[::-1]), tmp_path),
        key_of(dataclasses.replace(data, sources=data.sources[:2]), tmp_path),
    ]
    assert key_of(changed, tmp_path) is None, 'content decides, not the name'
    rows = pathlib.Path(copied[1].path).read_text()
    pathlib.Path(copied[1].path).write_text(rows.replace('red', 'Red', 1))
    found.append(key_of(changed, tmp_path))
    other = write_tokenizer(tmp_path)
    train_sentencepiece(['other words, of course'] * 9, other, 280)
    found.append(key_of(dataclasses.replace(data, tokenizer=other), tmp_path))
    moved = tuple(dataclasses.replace(source, image_root=str(folder / 'images')) for source in data.sources)
    found.append(key_of(dataclasses.replace(data, sources=moved), tmp_path))
    assert None not in found and len(set(found)) == len(found), found


def test_weights_that_give_nothing_are_refused(data):
    """The first sample of such a run would be in a far epoch."""
    sources = tuple(dataclasses.replace(source, weight=1e-9) for source in data.sources)
    with pytest.raises(UserError, match='give no sample with these weights'):
        batches(dataclasses.replace(data, sources=sources), RULE, 2, 0)
