"""Tokenizers of the Hugging Face library."""
import pathlib
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from vora_jax.data.text.special_tokens import Added, Settings, end_id, named_id, num_ids, read_json
from vora_jax.types import UserError

Span = tuple[int, int]

SPACE = '\u2581'
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


class BpeTokenizer:
    """A `tokenizers.Tokenizer` behind our interface. Picklable and safe to share between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: Settings, where: str):
        """Takes the tokenizer over.

        Args:
            tokenizer: any; its post-processor is dropped, as nothing is ever added to a text.
            settings: which tokens are special; those that it lacks are added as `transformers` does.
            where: names the tokenizer in messages.
        Raises:
            UserError: nothing says which token ends a text.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # It would only add tokens, and shorten the spans of tokens that begin with a space.
        tokenizer.post_processor = None
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        for _, token in settings.added:
            if token.text not in known:
                add(tokenizer, token)
        self._tokenizer = tokenizer
        self._special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = num_ids(ids)
        self.eos_id: int = end_id(ids, settings, where)
        self.bos_id: int | None = named_id(ids, settings, 'bos_token')
        pad = named_id(ids, settings, 'pad_token')
        self.pad_id: int = self.eos_id if pad is None else pad
        self._lead = self._find_lead()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str, start: bool = True) -> tuple[list[int], list[Span]]:
        if start or not self._lead or not text:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            return encoded.ids, encoded.offsets
        # What stands after a special token is not the start of a text.
        encoded = self._tokenizer.encode(self._lead + text, add_special_tokens=False)
        skip = len(self._lead)
        return encoded.ids[1:], [(begin - skip, stop - skip) for begin, stop in encoded.offsets[1:]]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        return self._special.get(text)

    def _find_lead(self) -> str:
        """A special token to put in front of what continues a text; '' where the start of a text is like the rest."""
        for token in self._tokenizer.get_added_tokens_decoder().values():
            ids = self.encode(token.content + 'a')
            if ids[:1] == [self._special[token.content]] and not token.rstrip and not token.single_word:
                return token.content if ids[1:] != self.encode('a') else ''
        return ''


def add(tokenizer: tokenizers.Tokenizer, token: Added) -> None:
    """Gives the token an id, the one it has in the vocabulary if any, and cuts it out of texts from now on."""
    put = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
    put([AddedToken(token.text, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                    normalized=token.normalized, special=token.special)])


def open_json(file: pathlib.Path, settings: Settings) -> BpeTokenizer:
    """The tokenizer of a tokenizer.json, as `transformers` opens it; UserError if it is none.

    The file is taken as it is, with one exception: where the settings name the class LlamaTokenizer, `transformers` 5
    replaces the file's white space rules by those that `legacy` asks for. Byte-level files have none.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare `Exception`
        raise UserError(f'{file} is not a tokenizer of the tokenizers library ({error}); fetch it again.') from error
    if settings.rebuilds_prefix and 'ByteLevel' not in f'{tokenizer.pre_tokenizer} {tokenizer.decoder}':
        prefix = settings.prefix is not False
        scheme = 'never' if not prefix else 'always' if settings.legacy else 'first'
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        steps = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(' ', 1, 0)] * prefix)
    return BpeTokenizer(tokenizer, settings, str(file.parent))


def open_pair(folder: pathlib.Path, settings: Settings) -> BpeTokenizer:
    """The byte-level tokenizer of vocab.json and merges.txt: Qwen2's where the settings say so, else GPT-2's.

    Raises:
        UserError: the files are malformed.
    """
    vocab: dict[str, int] = read_json(folder / 'vocab.json')
    lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
    merges = [tuple(line.split(' ')) for line in lines if line.strip() and not line.startswith('#version')]
    # An id of added_tokens.json holds, even where ids before it are unused.
    vocab |= {token.text: number for number, token in settings.added if number is not None}
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises bare `Exception`
        raise UserError(f'{folder}: vocab.json and merges.txt do not fit each other ({error}); fetch them again.') from error
    if settings.tokenizer_class.startswith('Qwen2') or settings.model_type.startswith('qwen'):
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), 'isolated')
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.prefix), use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.prefix))
    tokenizer.decoder = decoders.ByteLevel()
    return BpeTokenizer(tokenizer, settings, str(folder))
