"""Which tokens a tokenizer folder calls special."""
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vora_jax.types import UserError

IM_START, IM_END, IMAGE = '<|im_start|>', '<|im_end|>', '<image>'
NAMES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
LISTS = ('additional_special_tokens', 'extra_special_tokens')
LLAMA = 'LlamaTokenizer'
# For these model types `transformers` takes tokenizer.json as it is, whatever class its settings name.
VERBATIM = ('llava', 'llava_next', 'vipllava', 'phi3')


@dataclasses.dataclass(frozen=True)
class Added:
    """A text that is cut out before the rest is tokenised.

    lstrip, rstrip: it swallows the white space beside it.    special: marks structure, is not language.
    """

    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the JSON files beside a tokenizer say about it.

    named: {'eos_token': text, ...}.    added: (id or None for the next free one, token), in the order of adding.
    tokenizer_class: without `Fast`; '' where no file tells.    model_type: of config.json, or ''.
    legacy: a Llama tokenizer puts a space in front of every stretch between special tokens, not only of the first.
    prefix: whether it puts a space in front at all; None where no file tells.
    ids: the ids that generation_config.json and config.json give, {'eos_token': id, ...}.
    """

    named: Mapping[str, str]
    added: tuple[tuple[int | None, Added], ...]
    tokenizer_class: str = ''
    model_type: str = ''
    legacy: bool = False
    prefix: bool | None = None
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def rebuilds_prefix(self) -> bool:
        """True where `transformers` replaces the white space rules of tokenizer.json by those of `legacy`."""
        return self.tokenizer_class == LLAMA and self.model_type not in VERBATIM


def read_settings(folder: pathlib.Path) -> Settings:
    """The settings in tokenizer_config.json, special_tokens_map.json, added_tokens.json, (generation_)config.json.

    All are optional. As in `transformers`, the middle two are read only where tokenizer_config.json lists no added
    tokens itself.

    Raises:
        UserError: a file is not a JSON object.
    """
    config = read_json(folder / 'tokenizer_config.json')
    added: list[tuple[int | None, Added]] = []
    if 'added_tokens_decoder' in config:
        table = {int(token): content for token, content in config['added_tokens_decoder'].items()}
        added += [(token, _added(table[token])) for token in sorted(table)]
    else:
        config = {**read_json(folder / 'special_tokens_map.json'), **config}
        table = read_json(folder / 'added_tokens.json')
        added += [(token, Added(text)) for text, token in sorted(table.items(), key=lambda item: item[1])]
    named = {name: _added(config[name]) for name in NAMES if config.get(name)}
    lists = [config.get(name) or [] for name in LISTS]
    extra = [_added(token) for each in lists for token in (each.values() if isinstance(each, Mapping) else each)]
    known = {token.text for _, token in added}
    for token in (*named.values(), *extra):
        if token.text not in known:
            known.add(token.text)
            added.append((None, token))
    model = read_json(folder / 'config.json')
    ids: dict[str, int] = {}
    for source in (read_json(folder / 'generation_config.json'), model, model.get('text_config') or {}):
        for name in NAMES:
            value = source.get(f'{name}_id')
            value = value[0] if isinstance(value, Sequence) and value else value
            if isinstance(value, int):
                ids.setdefault(name, value)
    kind = config.get('tokenizer_class') or model.get('tokenizer_class') or ''
    return Settings({name: token.text for name, token in named.items()}, tuple(added), kind.removesuffix('Fast'),
                    model.get('model_type', ''), bool(config.get('legacy', False)), config.get('add_prefix_space'), ids)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in the file; {} where there is no file. UserError if it holds something else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{file} is not JSON ({error}); fetch it again.') from error
    if not isinstance(content, dict):
        raise UserError(f'{file} is not a JSON object; fetch it again.')
    return content


def end_id(ids: Mapping[str, int], settings: Settings, where: str) -> int:
    """Id of the end-of-text token; UserError where no file names one."""
    found = named_id(ids, settings, 'eos_token')
    if found is None:
        raise UserError(f'{where} names no end-of-text token; add "eos_token" to its tokenizer_config.json.')
    return found


def named_id(ids: Mapping[str, int], settings: Settings, name: str) -> int | None:
    """Id of the token of this name, `ids` being the ids by text; None where no file names it."""
    if name in settings.named:
        return ids.get(settings.named[name])
    return settings.ids.get(name)


def num_ids(ids: Mapping[str, int]) -> int:
    """One more than the largest id. A last `<image>` does not count: pictures are cut out before the tokenizer, so
    a model needs no embedding for it."""
    size = max(ids.values()) + 1
    return size - 1 if ids.get(IMAGE) == size - 1 else size


def _added(token: Any) -> Added:
    if isinstance(token, str):
        return Added(token)
    flags = {name: bool(token[name]) for name in ('special', 'lstrip', 'rstrip', 'single_word', 'normalized')
             if name in token}
    return Added(token['content'], **flags)
