"""The tokenizer inside a GGUF file."""
from collections.abc import Callable
from typing import Any

from vora_jax.types import UserError

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types that are found in a text before it is split
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")


def tokenizer_files(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, if there is one, chat_template.jinja.

    Args:
        metadata: {key: value} of the GGUF file.
        where: the file, for messages.

    Raises:
        UserError: the tokenizer is not a byte-level BPE, or splits words in a way that is not known here.
        KeyError: the metadata is incomplete.
    """
    tokens = metadata['tokenizer.ggml.tokens']
    kinds = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding', 'unk': 'unknown'}
    ids = {kind: metadata[f'tokenizer.ggml.{key}_token_id'] for kind, key in kinds.items()
           if f'tokenizer.ggml.{key}_token_id' in metadata}
    if wrong := [kind for kind, index in ids.items() if index >= len(tokens)]:
        raise UserError(f'{where}: the id of its {wrong[0]} token is outside of its {len(tokens)} tokens.')
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', **{f'{kind}_token': tokens[i] for kind, i in ids.items()},
                'model_max_length': metadata['llama.context_length'], 'clean_up_tokenization_spaces': False,
                'model_input_names': ['input_ids', 'attention_mask']}
    generation = {f'{kind}_token_id': index for kind, index in ids.items() if kind != 'unk'}
    files = {'tokenizer.json': tokenizer_json(metadata, where), 'tokenizer_config.json': settings,
             'generation_config.json': generation}
    if 'tokenizer.chat_template' in metadata:
        files['chat_template.jinja'] = metadata['tokenizer.chat_template']
    return files


def tokenizer_json(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of tokenizer.json: a byte-level BPE."""
    model, name = metadata['tokenizer.ggml.model'], metadata.get('tokenizer.ggml.pre', 'default')
    if model != 'gpt2':
        raise UserError(f'{where} has a tokenizer of kind {model!r}; only byte-level BPE (gpt2) can be converted.')
    if name not in _SPLITS:
        raise UserError(f'{where} splits words as {name!r}; only {", ".join(sorted(_SPLITS))} are known.')
    tokens, types = metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.token_type']
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(types) != len(tokens):
        raise UserError(f'{where}: its tokens are not unique, or not each of them has a type.')
    added = [{'id': index, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False, 'special': kind == _CONTROL}
             for index, (token, kind) in enumerate(zip(tokens, types)) if kind in (_CONTROL, _USER_DEFINED)]
    is_llama3 = name == 'llama-bpe'
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
        'pre_tokenizer': _SPLITS[name](),
        'post_processor': _with_ends(metadata, tokens, is_llama3),
        'decoder': _byte_level(add_prefix_space=True),
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': is_llama3,
                  'vocab': vocab, 'merges': metadata['tokenizer.ggml.merges']},
    }


def _byte_level(**changes: bool) -> dict[str, Any]:
    return {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True, **changes}


def _digits_apart() -> dict[str, Any]:
    return {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, _byte_level()]}


def _by_expression() -> dict[str, Any]:
    split = {'type': 'Split', 'pattern': {'Regex': _LLAMA3}, 'behavior': 'Isolated', 'invert': False}
    return {'type': 'Sequence', 'pretokenizers': [split, _byte_level(use_regex=False)]}


# GGUF's names of the ways to split a text into words.
_SPLITS: dict[str, Callable[[], dict[str, Any]]] = {
    'gpt-2': _byte_level, 'smollm': _digits_apart, 'starcoder': _digits_apart, 'refact': _digits_apart,
    'llama-bpe': _by_expression}


def _with_ends(metadata: dict[str, Any], tokens: list[str], is_llama3: bool) -> dict[str, Any] | None:
    """The step that puts the first and last token around a text; None if the file asks for neither."""
    parts, used = [{'Sequence': {'id': 'A', 'type_id': 0}}], {}
    for kind, is_default, place in (('bos', is_llama3, 0), ('eos', False, 2)):
        if metadata.get(f'tokenizer.ggml.add_{kind}_token', is_default):
            index = metadata[f'tokenizer.ggml.{kind}_token_id']
            used[tokens[index]] = {'id': tokens[index], 'ids': [index], 'tokens': [tokens[index]]}
            parts.insert(place, {'SpecialToken': {'id': tokens[index], 'type_id': 0}})
    if not used:
        return None
    second = [{kind: {**part, 'type_id': 1} for kind, part in item.items()} for item in parts]
    return {'type': 'TemplateProcessing', 'single': parts, 'pair': parts + second, 'special_tokens': used}
