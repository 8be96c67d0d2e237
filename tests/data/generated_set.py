"""A generated set of all that rows are made of: pictures of any size and shape, several of them, none, many turns."""
import hashlib
import json
import pathlib

import numpy as np
import PIL.Image

from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.loader import batches
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.method import VisionTokenRule

RULE = VisionTokenRule(8)
WORDS = 'red blue green circle square what is the colour of shape yes no a left right how many'.split()


def write_picture(path: pathlib.Path, height: int, width: int, rng: np.random.Generator) -> None:
    """Smooth noise, in the format of the name's ending."""
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
    coarse.resize((width, height), PIL.Image.Resampling.BILINEAR).save(path)


def write_pictures(folder: pathlib.Path, count: int, most: int, seed: int = 0) -> list[str]:
    """Names of pictures of 1 to `most` pixels a side: photographs, panoramas, icons of 64 x 64, strips."""
    rng, names = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        area, aspect = most ** 2 * rng.uniform(0.02, 0.6), np.exp(rng.normal(0, 0.5))
        height, width = ((64, 64), (int((area * aspect) ** 0.5), int((area / aspect) ** 0.5)))[number % 4 > 0]
        if number % 50 == 49:
            height, width = ((1, most), (most, 1), (1, 1))[number // 50 % 3]
        names.append(f'{number}.{("png", "jpg", "png", "webp")[number % 4]}')
        write_picture(folder / names[-1], *(min(max(side, 1), most) for side in (height, width)), rng)
    return names


def made_up_rows(count: int, names: list[str], kinds: tuple[int, ...], seed: int = 0, words: int = 12) -> list[dict]:
    """Rows of so many pictures as `kinds` say in turn (0: text only) and 1 to 4 turns; no two have the same text."""
    rng, rows = np.random.default_rng([seed, 1]), []

    def text(most):
        return ' '.join(rng.choice(WORDS, int(rng.integers(1, most + 1))))

    for number in range(count):
        frames = [str(name) for name in rng.choice(names, kinds[number % len(kinds)])]
        turns = []
        for turn in range(int(rng.choice([1, 1, 2, 4]))):
            question = '<image>' * len(frames) * (turn == 0) + f'{text(words)} {seed} {number}?'
            turns += [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': text(words)}]
        rows.append({'id': f'{seed}-{number}', 'conversations': turns} | ({'frames': frames} if frames else {}))
    return rows


def write_rows(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


def write_tokenizer(folder: pathlib.Path) -> str:
    train_sentencepiece([*WORDS, 'user', 'assistant', '0 1 2 3 4 5 6 7 8 9 ?'] * 9, str(folder / 'tokenizer'), 300)
    return str(folder / 'tokenizer')


def mixed(folder: pathlib.Path, count: int, weights=(1.0, 0.5, 2.0), pictures: int = 40, most: int = 60, **options) -> Data:
    """Three sources: one picture each, several, none; `count` rows each."""
    names = write_pictures(folder / 'images', pictures, most)
    kinds = {'one': (1,), 'several': (2, 3, 1, 4), 'none': (0,)}
    sources = []
    for seed, (name, kind) in enumerate(kinds.items()):
        path = write_rows(folder / f'{name}.jsonl', made_up_rows(count, names, kind, seed))
        sources.append(Source(path, str(folder / 'images'), weights[seed]))
    options = {'max_slots': 256, 'max_patches': 160, 'max_images': 12, 'image': ImagePolicy(max_patches=30)} | options
    return Data(tuple(sources), write_tokenizer(folder), **options)


def leaves(batch) -> dict[str, np.ndarray]:
    """The arrays of a batch by name."""
    found = batch._asdict() | ({} if batch.patches is None else batch.patches._asdict())
    return {name: leaf for name, leaf in found.items() if name != 'patches'}


def digest(shards) -> str:
    """Hash of every array of a global batch, given as the batches of its shards in order."""
    whole, parts = hashlib.sha256(), [leaves(shard) for shard in shards]
    for name in sorted(parts[0]):
        leaf = np.concatenate([part[name] for part in parts])
        whole.update(f'{name} {leaf.dtype} {leaf.shape}'.encode() + leaf.tobytes())
    return whole.hexdigest()


def open_hosts(data: Data, hosts: int, rows: int = 4, seed: int = 5, workers: int = 0, cache: str = '', rule=RULE) -> list:
    """The loaders of all hosts of a run."""
    return [batches(data, rule, rows, seed, (index, hosts), workers, cache=cache) for index in range(hosts)]


def global_batches(loaders: list, count: int) -> list[str]:
    """Hashes of the next global batches; all hosts have the same position before and after each."""
    digests = []
    for _ in range(count):
        digests.append(digest([next(loader) for loader in loaders]))
        assert all(loader.get_state() == loaders[0].get_state() for loader in loaders)
    return digests


def close(loaders: list) -> None:
    for loader in loaders:
        loader.close()
