"""Text to token ids and back.

One small interface; SentencePiece or the `tokenizers` library behind it. A tokenizer lives in a folder.
"""
import hashlib
import io
import pathlib
from typing import Iterable, Protocol, Sequence

import sentencepiece

from vora_jax.data.text.bpe_tokenizer import open_json, open_pair
from vora_jax.data.text.piece_tokenizer import PieceTokenizer, has_control_pieces, piece_spans
from vora_jax.data.text.special_tokens import IM_END, IM_START, IMAGE, read_settings
from vora_jax.types import UserError

MARKERS = (IM_START, IM_END, IMAGE)
FILES = ('added_tokens.json', 'config.json', 'generation_config.json', 'merges.txt', 'special_tokens_map.json',
         'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'vocab.json')


class Tokenizer(Protocol):
    """What the rest needs of a tokenizer.

    vocab_size: ids it can give for texts without `<image>`.
    eos_id: ends a text; what ends an *answer* is the template's, see `templates.Template.end_id`.
    bos_id: begins a text; None if the tokenizer has none.
    pad_id: fills up.
    """

    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of the text, special tokens such as `<|im_end|>` as their own ids; nothing is added."""

    def encode_spans(self, text: str, start: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, [(begin, stop), ...]): what each id covers, counted in characters.

        The ids that make up one character together cover it all, or nothing but its place.
        start: False for what continues a text behind a special token or a picture; some tokenizers put a space in
            front of a text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. `decode(encode(text)) == text`, except for spaces and Unicode forms that the tokenizer
        itself normalises."""

    def token_id(self, text: str) -> int | None:
        """Id of the special token with this text; None if there is none."""


class SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model file. Picklable and safe to share between threads."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._marker_id(IM_END, self._processor.eos_id())
        self.bos_id: int | None = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        self.pad_id: int = max(self._processor.pad_id(), 0)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_spans(self, text: str, start: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        return piece_spans(self._processor, text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def token_id(self, text: str) -> int | None:
        token = self._processor.piece_to_id(text)
        return token if self._processor.encode(text) == [token] else None

    def _marker_id(self, marker: str, otherwise: int) -> int:
        token = self._processor.piece_to_id(marker)
        return otherwise if self._processor.is_unknown(token) else token


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in the folder, by what the folder holds.

    tokenizer.json comes first: where other files stand beside it (`vora export` writes a tokenizer.model too, Llama 3
    a tokenizer.model that is none of SentencePiece's) it is the one `transformers` reads, and it alone holds tokens
    that were added later. Then tokenizer.model, then the pair vocab.json and merges.txt.

    Raises:
        UserError: the folder holds no tokenizer, or one that cannot be opened.
    """
    path = pathlib.Path(folder)
    if (path / 'tokenizer.json').is_file():
        return open_json(path / 'tokenizer.json', read_settings(path))
    if (path / 'tokenizer.model').is_file():
        return _open_model(path / 'tokenizer.model')
    if (path / 'vocab.json').is_file() and (path / 'merges.txt').is_file():
        return open_pair(path, read_settings(path))
    raise UserError(f'{folder} holds no tokenizer.model, tokenizer.json, or vocab.json with merges.txt; give '
                    'Data.tokenizer the `tokenizer` folder that `vora prepare` wrote, or the folder of a model.')


def _open_model(file: pathlib.Path) -> Tokenizer:
    model = file.read_bytes()
    try:
        tokenizer = SentencePieceTokenizer(model)
        return PieceTokenizer(model, read_settings(file.parent)) if has_control_pieces(model) else tokenizer
    except RuntimeError as error:
        raise UserError(f'{file} is not a SentencePiece model; run `vora prepare` again, or fetch the tokenizer.json '
                        'that belongs to it.') from error


def tokenizer_files(folder: str) -> list[pathlib.Path]:
    """The files that `load_tokenizer` may read, sorted; a model's folder holds more, and larger ones."""
    return [file for file in (pathlib.Path(folder) / name for name in FILES) if file.is_file()]


def fingerprint(folder: str) -> str:
    """sha256 over the names and contents of the tokenizer's files: equal fingerprints give equal token ids."""
    digest = hashlib.sha256()
    for file in tokenizer_files(folder):
        digest.update(f'{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n'.encode())
    return digest.hexdigest()


def train_sentencepiece(texts: Iterable[str], folder: str, vocab_size: int,
                        markers: Sequence[str] = MARKERS) -> SentencePieceTokenizer:
    """Trains a byte-pair model on the texts and writes it to `folder/tokenizer.model`.

    Text survives unchanged: nothing is normalised, no space is put in front, unseen characters become bytes. The
    same texts give the same file. The vocabulary may come out smaller than asked if the texts do not support more.

    Raises:
        UserError: the texts are empty, or the vocabulary cannot even hold bytes, markers and characters.
    """
    model = io.BytesIO()
    # Text is fed without its line breaks: they are the trainer's separators, and become single byte pieces.
    lines = [line for text in texts for line in text.split('\n') if line]
    if not lines:
        raise UserError(f'there is no text to train the tokenizer of {folder} on; check the conversations.')
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type='bpe',
            user_defined_symbols=list(markers), unk_id=0, pad_id=1, bos_id=-1, eos_id=-1, byte_fallback=True,
            normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False,
            character_coverage=1.0, hard_vocab_limit=False, num_threads=1, shuffle_input_sentence=False,
            max_sentence_length=1 << 20, minloglevel=2)
    except RuntimeError as error:
        raise UserError(f'a vocabulary of {vocab_size} pieces does not fit the data ({str(error).strip()}); '
                        'choose another --vocab-size.') from error
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / 'tokenizer.model').write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())
