"""Small tokenizers of every kind, and texts that are hard for them."""
import io
import json
import pathlib
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
MARKERS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
LLAMA3_MARKERS = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
TRICKY = [
    '', ' ', '  ', 'a', ' a', 'a ', '  two  spaces  ', '\n', '\n\n', ' \n ', '\nx', 'x\n\n', '.\n', '\t\ttabs\t', '\r\n',
    'Hello, world!', "I'm sure YOU'LL", '12345 3.14 1e-5', 'def f(x):\n    return x + 1\n', 'Zürich', 'e\u0301a\u030a',
    '\u0301', 'ﬁ Ⅳ ½', '東京は晴れ。', '你好，世界。', 'مرحبا بالعالم', 'สวัสดีครับ', 'नमस्ते', '🙂', '👩‍👩‍👧‍👦🇨🇭',
    '\u00a0x\u3000y', '\u200b', '\ufeff', '\x00', '▁', ' ▁▁a', '<|im_end', '< s >', '</s', '<0x0A>',
    '[INST]', '<<SYS>>', 'a' * 700, ' ' * 90,
    'ab ' * 200, '\n' * 40]
SPECIAL_TEXTS = ['<|im_end|>', 'a<|im_start|>b', '<s>', 'a </s> b', '</s></s>', 'red</s>blue', '<unk>',
                 '<|eot_id|> x', '<|endoftext|>']
TEXTS = ['What is the colour of the shape?', 'It is red.\n\nIt is blue.\n', 'user', 'assistant', 'system', 'return x + 1\n',
         'You are a helpful assistant.', 'Hello, world!', '12 + 30 = 42\n', 'two  spaces  and    four', 'red\n\nblue\n\n',
         'こんにちは 東京'] * 20


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng, parts = random.Random(seed), [*(text for text in TRICKY if len(text) < 40), *'abc .,\n!?1', 'the ', ' red']
    return [''.join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(count)]


def byte_level(folder: pathlib.Path, special: list[str] = MARKERS, **settings) -> str:
    """A folder with a byte-level BPE in Qwen's style; Llama 3's has no normalizer and adds a begin token."""
    tokenizer = Tokenizer(models.BPE())
    is_qwen = special is MARKERS
    tokenizer.normalizer = normalizers.NFC() if is_qwen else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_WORDS), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if is_qwen:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(
                single=f'{special[0]} $A', special_tokens=[(special[0], tokenizer.token_to_id(special[0]))])])
        settings = {'bos_token': special[0], 'eos_token': special[-1], **settings}
    tokenizer.save(str(folder / 'tokenizer.json'))
    write_settings(folder, {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': special[-1],
                            'pad_token': special[0], **settings})
    return str(folder)


def llama_model(folder: pathlib.Path, **settings) -> str:
    """A folder with a tokenizer.model in Llama's style: control pieces, byte fallback, a space in front of texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for line in TEXTS for text in line.split('\n') if text), model_writer=model,
        vocab_size=400, model_type='bpe', byte_fallback=True, normalization_rule_name='identity', add_dummy_prefix=True,
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / 'tokenizer.model').write_bytes(model.getvalue())
    write_settings(folder, {'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '</s>',
                            'unk_token': '<unk>', **settings})
    return str(folder)


def llama_json(source: str, folder: pathlib.Path, **settings) -> str:
    """The same tokenizer as the tokenizer.json that Llama 2 came with: `legacy` white space rules in a normalizer."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((pathlib.Path(source) / 'tokenizer.model').read_bytes())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    merges = sorted(((left, piece[len(left):]) for piece in vocab if scores[piece] <= 0 and len(piece) > 1
                     for left in (piece[:cut] for cut in range(1, len(piece)))
                     if left in vocab and piece[len(left):] in vocab),
                    key=lambda pair: -scores[''.join(pair)])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(' ', 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ('<unk>', '<s>', '</s>')])
    tokenizer.save(str(folder / 'tokenizer.json'))
    write_settings(folder, {'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '</s>',
                            'unk_token': '<unk>', **settings})
    return str(folder)


def pair(source: str, folder: pathlib.Path) -> str:
    """The byte-level tokenizer of `source` as vocab.json, merges.txt and added_tokens.json, as older Qwen folders."""
    content = json.loads((pathlib.Path(source) / 'tokenizer.json').read_text(encoding='utf-8'))
    (folder / 'vocab.json').write_text(json.dumps(content['model']['vocab']), encoding='utf-8')
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in content['model']['merges']]
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']), encoding='utf-8')
    added = {token['content']: token['id'] for token in content['added_tokens']}
    (folder / 'added_tokens.json').write_text(json.dumps(added))
    settings = {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>', 'additional_special_tokens': ['<|im_start|>']}
    (folder / 'special_tokens_map.json').write_text(json.dumps(settings))
    write_settings(folder, {'tokenizer_class': 'Qwen2Tokenizer'})
    return str(folder)


def write_settings(folder: pathlib.Path, settings: dict) -> None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings), encoding='utf-8')
