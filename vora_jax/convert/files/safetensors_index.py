"""Which safetensors files make up a folder.

A folder's weights are `model.safetensors`, or numbered shards with (or without) `model.safetensors.index.json`, or a
PEFT folder's `adapter_model.safetensors`.
"""
import collections
import json
import pathlib
import re

from vora_jax.convert.files.safetensors_header import TensorInfo, read_header
from vora_jax.types import UserError

SINGLE, ADAPTER, INDEX = 'model.safetensors', 'adapter_model.safetensors', 'model.safetensors.index.json'
_SHARD = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.safetensors')


def find_tensors(folder: pathlib.Path) -> dict[str, TensorInfo]:
    """{name: where it lies} of a folder or of one file; headers are read and checked, tensors are not.

    Raises:
        UserError: there are no weights, a shard is missing or damaged, or index and shards contradict each other.
    """
    if folder.is_file():
        return read_header(folder)
    if not folder.is_dir():
        raise UserError(f'{folder} does not exist; give a Hugging Face folder or a .safetensors file.')
    if (folder / INDEX).exists():
        return _indexed(folder)
    for name in (SINGLE, ADAPTER):
        if (folder / name).exists():
            return read_header(folder / name)
    return _join(folder, _numbered_shards(folder))


def _indexed(folder: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of an index; every name is in the shard it names, and no shard holds another."""
    weight_map = _read_index(folder / INDEX)
    files = list(dict.fromkeys(weight_map.values()))
    _all_present(folder, files)
    present = {path.name for path in folder.glob('*.safetensors')}
    stems = {match[1] for file in files if (match := _SHARD.fullmatch(file))}
    beside = [file for file in sorted(present - set(files))
              if file == SINGLE or ((match := _SHARD.fullmatch(file)) and match[1] in stems)]
    if beside:
        raise UserError(f'{folder} holds {beside[0]}, which {INDEX} does not name; delete whichever is out of date.')
    tensors = _join(folder, files)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            where = f'it is in {tensors[name].file.name}' if name in tensors else 'it is in no shard'
            raise UserError(f'{folder / INDEX} says that tensor {name} is in {file}, but {where}; download the index '
                            'and the shards again.')
    for name, info in tensors.items():
        if name not in weight_map:
            raise UserError(f'{info.file} holds tensor {name}, which {INDEX} does not name; download the index and '
                            'the shards again.')
    return tensors


def _join(folder: pathlib.Path, files: list[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found = read_header(folder / file)
        for name in found:
            if name in tensors:
                raise UserError(f'{folder} holds tensor {name} twice, in {tensors[name].file.name} and in {file}; '
                                'download the shards again.')
        tensors |= found
    return tensors


def _read_index(file: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding='utf-8'))['weight_map']
        plain = weight_map and all(isinstance(shard, str) and pathlib.PurePath(shard).name == shard
                                   for shard in weight_map.values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f'{file} is no readable index of safetensors shards ({error}); download it again.') from error
    if not plain:
        raise UserError(f'{file} names no files beside it in its weight_map; download it again.')
    return weight_map


def _numbered_shards(folder: pathlib.Path) -> list[str]:
    """The shards of a folder that has no index."""
    sets = collections.defaultdict(list)
    for path in sorted(folder.glob('*.safetensors')):
        if match := _SHARD.fullmatch(path.name):
            sets[match[1], int(match[3])].append(path.name)
    if not sets:
        raise UserError(_no_weights(folder))
    if len(sets) > 1:
        names = ' and '.join(names[0] for names in sets.values())
        raise UserError(f'{folder} holds several sets of shards ({names}); delete whichever is out of date.')
    (stem, total), = sets
    files = [f'{stem}-{number:05}-of-{total:05}.safetensors' for number in range(1, total + 1)]
    _all_present(folder, files)
    extra = sorted(set(sets[stem, total]) - set(files))
    if extra:
        raise UserError(f'{folder} holds {extra[0]}, whose number is beyond {total}; delete or rename it.')
    return files


def _all_present(folder: pathlib.Path, files: list[str]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        more = f' and {len(missing) - 4} more' if len(missing) > 4 else ''
        raise UserError(f'{folder} misses {len(missing)} of {len(files)} shards: {", ".join(missing[:4])}{more}; '
                        'download it again.')


def _no_weights(folder: pathlib.Path) -> str:
    pickles = sorted(path.name for end in ('*.bin', '*.pt', '*.pth') for path in folder.glob(end))
    if pickles:
        return (f'{folder} holds its weights as {pickles[0]} only; save it as safetensors first, with '
                '`AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)`.')
    others = sorted(path.name for path in folder.glob('*.safetensors'))
    if others:
        return f'{folder} holds no {SINGLE}, but {", ".join(others[:4])}; give the path of one file.'
    return f'{folder} holds no {SINGLE}, {INDEX} or {ADAPTER}; give a Hugging Face folder.'
