"""The tokenizer files of an exported folder."""
import json
import pathlib
import shutil
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from vora_jax.convert.export.sentencepiece_json import IMAGE, SPACE, build_tokenizer, merges_of
from vora_jax.types import UserError

SOURCE_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json', 'merges.txt', 'added_tokens.json',
                'special_tokens_map.json', 'tokenizer_config.json')
# What follows reads a folder as data/special_tokens.py and data/bpe_tokenizer.py do, which this package may not import; the
# tests hold the two against each other.
NAMES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
LISTS = ('additional_special_tokens', 'extra_special_tokens')
VERBATIM = ('llava', 'llava_next', 'vipllava', 'phi3')
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece's piece types that are matched as a whole
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


def write_tokenizer_files(source: str, folder: pathlib.Path, template: str, eos_id: int,
                          image_token: bool = True) -> int | None:
    """Writes the tokenizer of an export in the form that `AutoTokenizer` loads; returns the id of `<image>`.

    With `image_token` the folder gets one tokenizer.json that spells out everything, so that every version of
    `transformers` gives the ids that the model was trained with, and `<image>` behind all other tokens (unless the
    vocabulary has exactly this token). Without, the source's own files are copied and nothing is added: for layouts of
    stock models.

    Args:
        source: folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt.
        folder: folder of the export.
        template: chat template, as the content of chat_template.jinja; '' for the source's own, if any.
        eos_id: id that ends an answer; pads where the source names no pad token.
        image_token: False adds nothing and returns None.
    Raises:
        UserError: the source holds no tokenizer, or one that cannot be written in this form.
    """
    path = pathlib.Path(source)
    config = _read(path / 'tokenizer_config.json')
    own = not (path / 'tokenizer.json').is_file() and (path / 'tokenizer.model').is_file() and not _has_control_pieces(path)
    if not image_token and not own:
        _copy(path, folder, config, template)
        return None
    added = _added_tokens(path, config)
    tokenizer = _open(path, config, added, image_token)
    named = {name: _text(config.get(name)) for name in NAMES if config.get(name)}
    lists = [config.get(name) or [] for name in LISTS]
    extra = [_text(token) for each in lists for token in (each.values() if isinstance(each, dict) else each)]
    for token in (*added.values(), *named.values(), *extra, *([IMAGE] if image_token else [])):
        _add(tokenizer, token)
    tokenizer.save(str(folder / 'tokenizer.json'))
    if (path / 'tokenizer.model').is_file():
        shutil.copyfile(path / 'tokenizer.model', folder / 'tokenizer.model')
    named['eos_token'] = tokenizer.id_to_token(eos_id)
    named.setdefault('pad_token', named['eos_token'])
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', **named, 'padding_side': 'left',
                'clean_up_tokenization_spaces': False, 'model_input_names': ['input_ids', 'attention_mask']}
    _write(folder / 'tokenizer_config.json', settings)
    _write(folder / 'special_tokens_map.json', named)
    _write_template(path, folder, config, template)
    return tokenizer.token_to_id(IMAGE) if image_token else None


def _copy(source: pathlib.Path, folder: pathlib.Path, config: dict[str, Any], template: str) -> None:
    found = [name for name in SOURCE_FILES if (source / name).is_file()]
    if not {'tokenizer.json', 'tokenizer.model', 'vocab.json'} & set(found):
        raise _nothing(source)
    for name in found:
        shutil.copyfile(source / name, folder / name)
    if template and 'chat_template' in config:  # only one of the two places may hold a template
        _write(folder / 'tokenizer_config.json', {key: value for key, value in config.items() if key != 'chat_template'})
    _write_template(source, folder, config if not template else {}, template)


def _write_template(source: pathlib.Path, folder: pathlib.Path, config: dict[str, Any], template: str) -> None:
    file = source / 'chat_template.jinja'
    if not template and file.is_file():
        template = file.read_text(encoding='utf-8')
    elif not template and isinstance(config.get('chat_template'), str):
        template = config['chat_template']
    if template:
        (folder / file.name).write_text(template, encoding='utf-8')


def _open(source: pathlib.Path, config: dict[str, Any], added: dict[int, AddedToken],
          image_token: bool) -> tokenizers.Tokenizer:
    """The tokenizer of the folder, with the white space rules that it is used with."""
    model_type = _read(source / 'config.json').get('model_type', '')
    kind = (config.get('tokenizer_class') or '').removesuffix('Fast')
    try:
        if (source / 'tokenizer.json').is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(source / 'tokenizer.json'))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokenizer.post_processor = None  # prompts bring their own special tokens
            if kind == 'LlamaTokenizer' and model_type not in VERBATIM \
                    and 'ByteLevel' not in f'{tokenizer.pre_tokenizer} {tokenizer.decoder}':
                _set_prefix(tokenizer, config, True)
            return tokenizer
        if (source / 'tokenizer.model').is_file():
            model = (source / 'tokenizer.model').read_bytes()
            if _has_control_pieces(source):
                return _llama_tokenizer(model, config)
            return build_tokenizer(model, str(source / 'tokenizer.model'), image_token)
        if (source / 'vocab.json').is_file() and (source / 'merges.txt').is_file():
            return _byte_level_tokenizer(source, config, added, kind.startswith('Qwen2') or model_type.startswith('qwen'))
    except UserError:
        raise
    except Exception as error:  # the library raises bare `Exception`
        raise UserError(f'{source}: the tokenizer cannot be opened ({error}); fetch it again.') from error
    raise _nothing(source)


def _llama_tokenizer(model: bytes, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """A byte-pair SentencePiece model with pieces for the start and end of a text, as Llama's."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges_of(proto), unk_token=proto.trainer_spec.unk_piece,
                                                byte_fallback=proto.trainer_spec.byte_fallback, fuse_unk=True))
    _set_prefix(tokenizer, config, proto.normalizer_spec.add_dummy_prefix)
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            _add(tokenizer, AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED))
    return tokenizer


def _set_prefix(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], default: bool) -> None:
    """A space in front of the first stretch between special tokens; `legacy`: of every stretch."""
    prefix = default if config.get('add_prefix_space') is None else bool(config['add_prefix_space'])
    scheme = 'never' if not prefix else 'always' if config.get('legacy') else 'first'
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(' ', 1, 0)] * prefix)


def _byte_level_tokenizer(source: pathlib.Path, config: dict[str, Any], added: dict[int, AddedToken],
                          is_qwen: bool) -> tokenizers.Tokenizer:
    vocab = _read(source / 'vocab.json') | {token.content: number for number, token in added.items()}
    lines = (source / 'merges.txt').read_text(encoding='utf-8').split('\n')
    merges = [tuple(line.split(' ')) for line in lines if line.strip() and not line.startswith('#version')]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    spaced = bool(config.get('add_prefix_space'))
    if is_qwen:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN_WORDS), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(source: pathlib.Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens that the settings add at fixed ids, in order; `config` gets the names of special_tokens_map.json."""
    if 'added_tokens_decoder' in config:
        found = {int(number): token for number, token in config['added_tokens_decoder'].items()}
    else:
        for name, token in _read(source / 'special_tokens_map.json').items():
            config.setdefault(name, token)
        found = {number: {'content': text} for text, number in _read(source / 'added_tokens.json').items()}
    flags = ('lstrip', 'rstrip', 'single_word')
    return {number: AddedToken(found[number]['content'], normalized=bool(found[number].get('normalized', False)),
                               special=bool(found[number].get('special', True)),
                               **{flag: bool(found[number].get(flag, False)) for flag in flags})
            for number in sorted(found)}


def _add(tokenizer: tokenizers.Tokenizer, token: AddedToken | str) -> None:
    token = AddedToken(token, normalized=False, special=True) if isinstance(token, str) else token
    if token.content not in {known.content for known in tokenizer.get_added_tokens_decoder().values()}:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _has_control_pieces(source: pathlib.Path) -> bool:
    try:
        spec = sentencepiece_model_pb2.ModelProto.FromString((source / 'tokenizer.model').read_bytes()).trainer_spec
    except Exception as error:  # protobuf's own error class is not public
        raise UserError(f'{source / "tokenizer.model"} is not a SentencePiece model; fetch the tokenizer.json that belongs '
                        'to it.') from error
    return spec.bos_id >= 0 and spec.eos_id >= 0


def _nothing(source: pathlib.Path) -> UserError:
    return UserError(f'{source} holds no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; give '
                     'Data.tokenizer the folder the model was trained with.')


def _text(token: Any) -> str:
    return token['content'] if isinstance(token, dict) else token


def _read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else {}


def _write(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
