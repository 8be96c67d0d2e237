"""Ids equal to those of `transformers`, for every kind of folder."""
import concurrent.futures
import json
import pathlib
import pickle
import shutil
import unicodedata

import pytest
import tiny_tokenizers as tiny

from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.types import UserError

KINDS = ('qwen', 'qwen_pair', 'llama3', 'llama2', 'llama2_legacy', 'llama2_model', 'llama2_model_legacy')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{kind: (folder of ours, folder for `transformers`)}."""
    def new(name):
        return tmp_path_factory.mktemp(name)

    model, legacy = tiny.llama_model(new('model')), tiny.llama_model(new('model_legacy'), legacy=True)
    same = {'qwen': tiny.byte_level(new('qwen')), 'llama3': tiny.byte_level(new('llama3'), tiny.LLAMA3_MARKERS),
            'llama2': tiny.llama_json(model, new('llama2'), legacy=False),
            'llama2_legacy': tiny.llama_json(model, new('llama2_legacy'), legacy=True)}
    same['qwen_pair'] = tiny.pair(same['qwen'], new('pair'))
    return {kind: (folder, folder) for kind, folder in same.items()} | {
        'llama2_model': (model, same['llama2']), 'llama2_model_legacy': (legacy, same['llama2_legacy'])}


@pytest.mark.parametrize('kind', KINDS)
def test_ids_and_texts_are_equal(folders, kind):
    """tokenizer.model is compared with the tokenizer.json of the same model: from a .model alone, transformers 5.23 orders
    merges by id where SentencePiece orders them by score, which makes a difference in some models (Mistral's)."""
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    ours = load_tokenizer(folders[kind][0])
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind][1])
    for text in (*tiny.TRICKY, *tiny.SPECIAL_TEXTS, *tiny.random_texts(1500)):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)['input_ids'], repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        assert not ids or max(ids) < ours.vocab_size
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs)
    if theirs.pad_token_id is not None:
        assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize('kind', KINDS)
def test_spans(folders, kind):
    """They follow each other, with gaps only for marks that NFC melts into the letter before; and a text behind a
    special token continues."""
    ours = load_tokenizer(folders[kind][0])
    marker = '</s>' if 'llama2' in kind else '<|im_end|>' if 'qwen' in kind else '<|eot_id|>'
    for text in (*tiny.TRICKY, *tiny.SPECIAL_TEXTS, *tiny.random_texts(300, seed=1)):
        ids, spans = ours.encode_spans(text)
        assert ids == ours.encode(text)
        covered = 0
        for begin, stop in spans:
            assert all(map(unicodedata.combining, text[covered:begin])) and stop >= begin, (text, spans)
            covered = max(covered, stop)
        assert all(map(unicodedata.combining, text[covered:]))
        assert [ours.token_id(marker), *ours.encode_spans(text, start=False)[0]] == ours.encode(marker + text), text


@pytest.mark.parametrize('kind', ('qwen', 'llama2', 'llama2_model'))
def test_pickle_and_threads(folders, kind):
    ours = load_tokenizer(folders[kind][0])
    again = pickle.loads(pickle.dumps(ours))
    texts = tiny.random_texts(200)
    expected = [ours.encode(text) for text in texts]
    assert [again.encode(text) for text in texts] == expected
    assert again.token_id('</s>') == ours.token_id('</s>') and again.eos_id == ours.eos_id
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again.encode, texts)) == expected


def test_json_comes_before_model_before_pair(folders, tmp_path):
    for kind in ('qwen_pair', 'llama2_model', 'qwen'):
        for file in pathlib.Path(folders[kind][0]).iterdir():
            shutil.copy(file, tmp_path)
        found = load_tokenizer(str(tmp_path))
        assert found.encode('the shape') == load_tokenizer(folders[kind][0]).encode('the shape')


def test_a_model_of_type_llava_keeps_the_rules_of_its_file(folders, tmp_path):
    """As `transformers` does; LLaVA-1.5 was trained with a space in front of every stretch."""
    folder = tiny.llama_json(folders['llama2_model'][0], tmp_path, legacy=False)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llava'}))
    ours, always = load_tokenizer(folder), load_tokenizer(folders['llama2_legacy'][0])
    assert ours.encode('a</s>red') == always.encode('a</s>red') != load_tokenizer(folders['llama2'][0]).encode('a</s>red')


def test_later_tokens_and_their_flags(folders, tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    table = {number: {'content': text, 'special': True, 'lstrip': False, 'rstrip': False, 'normalized': False,
                      'single_word': False} for number, text in enumerate(('<unk>', '<s>', '</s>'))}
    size = load_tokenizer(folders['llama2'][0]).vocab_size
    table |= {size: table[0] | {'content': '[SEP]', 'rstrip': True, 'lstrip': True},
              size + 1: table[0] | {'content': '[END]', 'special': False}, size + 2: table[0] | {'content': '[E'}}
    settings = {'legacy': False, 'added_tokens_decoder': table, 'pad_token': '[PAD]'}
    model, out = tmp_path / 'model', tmp_path / 'json'
    model.mkdir(), out.mkdir()
    ours = load_tokenizer(tiny.llama_model(model, **settings))
    folder = tiny.llama_json(str(model), out, **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ('a [SEP] b', '[SEP]\n c[END] d[E', '[PAD]x', 'a\u00a0[SEP]  </s> x'):
        assert ours.encode(text) == load_tokenizer(folder).encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == len(theirs) == size + 4 and ours.pad_id == theirs.pad_token_id == size + 3


def test_an_image_token_behind_all_others_needs_no_embedding(tmp_path):
    plain = load_tokenizer(tiny.byte_level(tmp_path))
    ours = load_tokenizer(tiny.byte_level(tmp_path, additional_special_tokens=['<image>']))
    assert ours.vocab_size == plain.vocab_size == ours.token_id('<image>')


def test_end_of_text_from_other_files(tmp_path):
    folder = tiny.byte_level(tmp_path, eos_token=None, pad_token=None)
    with pytest.raises(UserError, match='names no end-of-text token; add "eos_token"'):
        load_tokenizer(folder)
    (tmp_path / 'config.json').write_text('{"eos_token_id": 7, "pad_token_id": 3, "bos_token_id": null}')
    assert (load_tokenizer(folder).eos_id, load_tokenizer(folder).pad_id) == (7, 3)
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [9, 7]}')
    assert (load_tokenizer(folder).eos_id, load_tokenizer(folder).bos_id) == (9, None)


def test_user_mistakes(tmp_path):
    for name, content, problem in (('tokenizer.json', '{}', 'not a tokenizer of the tokenizers library'),
                                   ('tokenizer_config.json', '{', 'is not JSON'),
                                   ('tokenizer_config.json', '[]', 'is not a JSON object')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=problem):
            load_tokenizer(str(tmp_path))
    other = tmp_path / 'other'
    other.mkdir()
    with pytest.raises(UserError, match='no tokenizer.model, tokenizer.json, or vocab.json with merges.txt'):
        load_tokenizer(str(other))
    (other / 'merges.txt').write_text('a b\n')
    (other / 'vocab.json').write_text('{"a": 0}')
    with pytest.raises(UserError, match='do not fit each other'):
        load_tokenizer(str(other))
