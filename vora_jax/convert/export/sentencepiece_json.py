"""SentencePiece models as Hugging Face tokenizers."""
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from vora_jax.types import UserError

IMAGE = '<image>'
MARKERS = ('<|im_start|>', '<|im_end|>', IMAGE)
SPACE = '\u2581'
NORMAL, USER_DEFINED = 1, 4  # SentencePiece's piece types that text can become
UNIGRAM, BPE = 1, 2

# ChatML, as data/conversation.py writes it; `system` is put in front where the first message is not a system message.
CHAT_TEMPLATE = """\
{%- set system = __SYSTEM__ -%}
{%- if system and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages if not (message.role == 'system' and not message.content) -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{{- '<image>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' + ('' if loop.last and not add_generation_prompt else '\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_tokenizer(model: bytes, where: str, image_token: bool = True) -> Tokenizer:
    """A tokenizer that gives the same ids as the SentencePiece model, which is checked on probes before it is returned.

    `<image>` gets an id after all others where the model has no such piece, unless `image_token` is False.

    Raises:
        UserError: naming `where`, the model is of a kind without an equal, or a probe differs.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    if kind == BPE:
        tokenizer = Tokenizer(models.BPE(vocab, merges_of(proto), unk_token=proto.trainer_spec.unk_piece,
                                         byte_fallback=proto.trainer_spec.byte_fallback, fuse_unk=True))
    elif kind == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback))
    else:
        raise UserError(f'{where} is neither a byte-pair nor a unigram model; train such a SentencePiece model.')
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', SPACE)])
    decoding = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme='first', split=False)
        decoding.append(decoders.Strip(' ', 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    own = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    extra = [] if IMAGE in own or not image_token else [IMAGE]
    for piece in own + extra:
        add = tokenizer.add_special_tokens if piece in MARKERS else tokenizer.add_tokens
        add([AddedToken(piece, normalized=False, special=piece in MARKERS)])
    _check_probes(tokenizer, model, proto, where)
    return tokenizer


def merges_of(proto) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best piece first: SentencePiece joins by score of the result."""
    pieces = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece in sorted(pieces, key=pieces.get, reverse=True):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        merges += [(left, right) for left, right in cuts if left in pieces and right in pieces]
    return merges


def _check_probes(tokenizer: Tokenizer, model: bytes, proto, where: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in probe_texts(proto):
        if tokenizer.encode(text, add_special_tokens=False).ids != reference.encode(text):
            raise UserError(f'{where}: the Hugging Face tokenizer made of it splits {text!r} differently; this kind of '
                            'SentencePiece model cannot be exported.')


def probe_texts(proto, count: int = 300) -> list[str]:
    """Texts that try a tokenizer: its own pieces at random, spaces, line breaks, markers, unseen characters."""
    rng = random.Random(0)
    pieces = [piece.piece.replace(SPACE, ' ') for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)]
    pieces = [piece for piece in pieces if piece != IMAGE]  # pictures are cut out before the text is tokenised
    odd = ['', ' ', '  ', '    ', '\n', '\t', '\r\n', 'aaaaaaa', '0123456789', '"', '\\', 'Ä', 'ß', '東京', '🙂',
           'e\u0301', '\u00a0']
    return odd + [''.join(rng.choice(pieces if rng.random() < 0.8 else odd) for _ in range(rng.randint(1, 24)))
                  for _ in range(count)]
