"""SentencePiece models with control pieces, as Llama's."""
import itertools
import re
from collections.abc import Iterator, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2, sentencepiece_pb2

from vora_jax.data.text.special_tokens import Added, Settings, named_id, num_ids

Span = tuple[int, int]

SPACE = '\u2581'
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece's piece types that are matched as a whole


class PieceTokenizer:
    """A SentencePiece model whose control pieces (`<s>`, `</s>`) are special tokens of a text.

    Gives the ids that `transformers` gives: special tokens are cut out first; then the text before the first of them
    gets a space in front unless it begins with one -- with `legacy`, every stretch between them does. SentencePiece
    alone would spell `</s>` out, and put two spaces in front of a text that begins with one.
    Picklable and safe to share between threads.
    """

    def __init__(self, model: bytes, settings: Settings):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        spec = proto.normalizer_spec
        self._prefix = spec.add_dummy_prefix if settings.prefix is None else settings.prefix
        self._always = settings.legacy
        spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._special, flags = _special_tokens(proto, settings)
        self._texts = {number: text for text, number in self._special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile('|'.join(_pattern(flags.get(text, Added(text))) for text in longest_first))
        ids = self._special | {'': len(proto.pieces) - 1}
        self.vocab_size: int = num_ids(ids)
        spec = proto.trainer_spec
        found = [named_id(ids, settings, name) for name in ('eos_token', 'bos_token', 'pad_token')]
        self.eos_id: int = spec.eos_id if found[0] is None else found[0]
        self.bos_id: int | None = spec.bos_id if found[1] is None else found[1]
        self.pad_id: int = self.eos_id if found[2] is None else found[2]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for begin, stretch, special in self._stretches(text):
            if special is None:
                ids += self._processor.encode(self._lead(stretch, begin == 0) + stretch)
            else:
                ids.append(special)
        return ids

    def encode_spans(self, text: str, start: bool = True) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        for begin, stretch, special in self._stretches(text):
            if special is not None:
                ids.append(special)
                spans.append((begin, begin + len(stretch)))
                continue
            lead = self._lead(stretch, start and begin == 0)
            first = begin - len(lead)
            some, covers = piece_spans(self._processor, lead + stretch)
            ids += some
            spans += [(max(first + here, begin), max(first + stop, begin)) for here, stop in covers]
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        text, run = '', []
        for token in [*map(int, ids), None]:
            if token is not None and token not in self._texts:
                run.append(token)
                continue
            text += self._processor.decode(run) if run else ''
            text += self._texts.get(token, '')
            run = []
        return text[1:] if self._prefix and text.startswith(' ') else text

    def token_id(self, text: str) -> int | None:
        return self._special.get(text)

    def _stretches(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """(where it begins, the stretch, its id if it is a special token) along the text."""
        begin = 0
        for match in self._pattern.finditer(text):
            if match.start() > begin:
                yield begin, text[begin:match.start()], None
            yield match.start(), match.group(), self._special[match[match.lastindex]]
            begin = match.end()
        if begin < len(text):
            yield begin, text[begin:], None

    def _lead(self, stretch: str, first: bool) -> str:
        wanted = self._prefix and (first or self._always)
        return ' ' if wanted and not stretch.startswith((' ', SPACE)) else ''


def piece_spans(processor: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[Span]]:
    """(ids, spans in characters) of the text; of the bytes that spell one character only the last covers it."""
    encoded = sentencepiece_pb2.SentencePieceText.FromString(processor.encode(text, out_type='serialized_proto'))
    stops = list(itertools.accumulate((len(piece.surface) for piece in encoded.pieces), initial=0))
    return [piece.id for piece in encoded.pieces], list(itertools.pairwise(stops))


def has_control_pieces(model: bytes) -> bool:
    """True where the model has its own pieces for the start and the end of a text."""
    spec = sentencepiece_model_pb2.ModelProto.FromString(model).trainer_spec
    return spec.bos_id >= 0 and spec.eos_id >= 0


def _special_tokens(proto, settings: Settings) -> tuple[dict[str, int], dict[str, Added]]:
    """({text: id}, {text: how it is cut out}): the model's own, then those of the settings at their ids or the end."""
    pieces = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    special = {piece.piece: number for number, piece in enumerate(proto.pieces)
               if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)}
    size = len(pieces)
    for number, token in settings.added:
        if token.text not in special:
            number = pieces.get(token.text, size if number is None else number)
            special[token.text] = number
            size = max(size, number + 1)
    return special, {token.text: token for _, token in settings.added}


def _pattern(token: Added) -> str:
    """A regular expression whose only group is the token."""
    before, after = r'\s*' * token.lstrip, r'\s*' * token.rstrip
    return f'{before}({re.escape(token.text)}){after}'
