"""Text to token ids and back.

One small interface; SentencePiece behind it. A tokenizer lives in a folder.
"""
import hashlib
import io
import pathlib
from typing import Iterable, Protocol, Sequence

import sentencepiece

from vora_jax.types import UserError

IM_START, IM_END, IMAGE = '<|im_start|>', '<|im_end|>', '<image>'
MARKERS = (IM_START, IM_END, IMAGE)


class Tokenizer(Protocol):
    """What the rest needs of a tokenizer. eos_id ends an answer; pad_id is never part of a text."""

    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of the text, markers such as `<|im_end|>` as their own ids; nothing is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; `decode(encode(text)) == text`."""


class SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model file. Picklable and safe to share between threads."""

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eos_id: int = self._marker_id(IM_END, self._processor.eos_id())
        self.pad_id: int = max(self._processor.pad_id(), 0)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def _marker_id(self, marker: str, otherwise: int) -> int:
        token = self._processor.piece_to_id(marker)
        return otherwise if self._processor.is_unknown(token) else token


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in the folder; UserError if there is none."""
    file = pathlib.Path(folder) / 'tokenizer.model'
    if not file.is_file():
        raise UserError(f'{folder} holds no tokenizer.model; give Data.tokenizer the `tokenizer` folder that '
                        '`vora prepare` wrote.')
    try:
        return SentencePieceTokenizer(file.read_bytes())
    except RuntimeError as error:
        raise UserError(f'{file} is not a SentencePiece model; run `vora prepare` again.') from error


def fingerprint(folder: str) -> str:
    """sha256 over the names and contents of the folder's files: equal fingerprints give equal token ids."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(folder).iterdir()):
        if file.is_file():
            digest.update(f'{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n'.encode())
    return digest.hexdigest()


def train_sentencepiece(texts: Iterable[str], folder: str, vocab_size: int,
                        markers: Sequence[str] = MARKERS) -> SentencePieceTokenizer:
    """Trains a byte-pair model on the texts and writes it to `folder/tokenizer.model`.

    Text survives unchanged: nothing is normalised, no space is put in front, unseen characters become bytes.
        The same texts
    give the same file. The vocabulary may come out smaller than asked if the texts do not support more.

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
