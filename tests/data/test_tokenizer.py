"""Round trip, determinism, markers."""

import pickle
import shutil

import pytest

from vora_jax.data.text.tokenizer import MARKERS, fingerprint, load_tokenizer, tokenizer_files, train_sentencepiece
from vora_jax.types import UserError

TEXTS = ['what color is the shape?', 'blue', 'a blue circle.', 'yes', 'no', 'is there a circle?'] * 20


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('tokenizer'))
    train_sentencepiece(TEXTS, path, 320)
    return path


@pytest.mark.parametrize(
    'text',
    [
        '',
        'blue',
        ' blue',
        '  two  spaces ',
        '\n',
        'a\n\n b\t',
        'never seen: Zürich 東京 🙂',
        '<|im_start|>user\nx<|im_end|>\n',
        'circle?<image>\ncircle',
        '▁'.replace('▁', ' '),
    ],
)
def test_round_trip_is_exact(folder, text):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markers_are_single_pieces(folder):
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(marker) for marker in MARKERS]
    assert all(len(one) == 1 for one in ids) and tokenizer.encode('<|im_end|>') == [tokenizer.eos_id]
    assert tokenizer.encode(f'a{MARKERS[0]}b')[1] == ids[0][0]
    assert tokenizer.pad_id not in (tokenizer.eos_id, *tokenizer.encode('a b<|im_end|>'))
    assert max(tokenizer.encode('zZ\x00')) < tokenizer.vocab_size == 320
    assert len(tokenizer.encode('\n')) == 1


def test_pieces_do_not_depend_on_what_stands_before(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode('user\n' + 'blue') == tokenizer.encode('user\n') + tokenizer.encode('blue')


def test_same_texts_give_the_same_file(folder, tmp_path):
    train_sentencepiece(TEXTS, str(tmp_path / 'again'), 320)
    assert fingerprint(folder) == fingerprint(str(tmp_path / 'again'))
    train_sentencepiece(TEXTS + ['other words'] * 9, str(tmp_path / 'other'), 320)
    assert fingerprint(folder) != fingerprint(str(tmp_path / 'other'))


def test_only_the_tokenizers_files_count(folder, tmp_path):
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / 'model')
    (tmp_path / 'model' / 'model.safetensors').write_bytes(b'large')
    assert fingerprint(str(tmp_path / 'model')) == before
    assert [file.name for file in tokenizer_files(str(tmp_path / 'model'))] == ['tokenizer.model']
    (tmp_path / 'model' / 'tokenizer_config.json').write_text('{}')
    assert fingerprint(str(tmp_path / 'model')) != before


def test_pickle(folder):
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(folder)))
    assert tokenizer.decode(tokenizer.encode('a blue circle')) == 'a blue circle'


def test_user_mistakes(tmp_path):
    with pytest.raises(UserError, match='vora prepare'):
        load_tokenizer(str(tmp_path))
    (tmp_path / 'tokenizer.model').write_bytes(b'no model')
    with pytest.raises(UserError, match='not a SentencePiece model'):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match='vocab-size'):
        train_sentencepiece(TEXTS, str(tmp_path), 100)
    with pytest.raises(UserError, match='no text'):
        train_sentencepiece(['', '\n'], str(tmp_path), 300)
