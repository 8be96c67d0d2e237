"""Exported tokenizers give the ids and prompts of ours."""
import json
import pathlib

import pytest
import tiny_tokenizers as tiny
from tiny_models import tokenizer_folders

from vora_jax.convert.export.tokenizer_files import write_tokenizer_files
from vora_jax.data.text.conversation import Image, render, render_prompt
from vora_jax.data.text.templates import find_template, jinja
from vora_jax.data.text.tokenizer import fingerprint, load_tokenizer
from vora_jax.types import UserError

CASES = [('qwen', 'qwen2.5'), ('qwen', 'chatml_system'), ('qwen_pair', 'vora'), ('llama3', 'llama3'),
         ('llama2', 'vicuna_v1'), ('llama2_legacy', 'vicuna_v1'), ('llama2_model', 'vicuna_v1'), ('llama2_model', 'llama2'),
         ('own', 'chatml'), ('own', 'qwen2.5')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return tokenizer_folders(tmp_path_factory)


def write(source, folder, name, **settings):
    """(our tokenizer, template, id of `<image>`) after an export of the source."""
    ours, template = load_tokenizer(source), find_template(name)
    image = write_tokenizer_files(source, folder, jinja(template, ours), template.end_id(ours), **settings)
    return ours, template, image


@pytest.mark.parametrize('kind, name', CASES)
def test_auto_tokenizer_gives_the_same_ids_and_prompts(folders, tmp_path, kind, name):
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    ours, template, image = write(folders[kind], tmp_path, name)
    theirs, again = transformers.AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))
    for text in (*tiny.TRICKY, *(tiny.SPECIAL_TEXTS if kind != 'own' else []), *tiny.random_texts(300)):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) == theirs(text)['input_ids'] == again.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids) == again.decode(ids), text
    assert theirs.convert_tokens_to_ids('<image>') == image == again.token_id('<image>')
    assert image == ours.vocab_size or kind == 'own'
    assert again.vocab_size == ours.vocab_size
    assert (theirs.eos_token_id, theirs.padding_side) == (template.end_id(ours), 'left')
    assert (theirs.bos_token_id, theirs.pad_token_id is not None) == (ours.bos_id, True)
    for text in (text for text in tiny.TRICKY if text.strip()):
        question = f'<image>\n{text}'
        said = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': f'\n{text}'}]}]
        prompt = [token for piece in render_prompt(question, 1, ours, template)
                  for token in ([image] if isinstance(piece, Image) else piece.ids)]
        assert theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False) == prompt, text
        turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'red'}]
        pieces = render({'frames': ['x'], 'conversations': turns}, ours, template)
        found = theirs.apply_chat_template(said + [{'role': 'assistant', 'content': 'red'}], return_dict=True,
                                           return_assistant_tokens_mask=True)
        assert found['input_ids'] == [token for piece in pieces
                                      for token in ([image] if isinstance(piece, Image) else piece.ids)]
        assert sum(found['assistant_masks']) == sum(len(p.ids) for p in pieces if not isinstance(p, Image) and p.supervised)


def test_an_image_token_of_the_source_is_used_only_under_its_own_name(folders, tmp_path):
    source, out = tmp_path / 'source', tmp_path / 'out'
    source.mkdir(), out.mkdir()
    tiny.byte_level(source, additional_special_tokens=['<image>', '<|image_pad|>'])
    expected = load_tokenizer(folders['qwen']).vocab_size
    assert write(str(source), out, 'qwen2.5')[2] == expected == load_tokenizer(str(source)).token_id('<image>')
    tiny.byte_level(source, additional_special_tokens=['<|image_pad|>', '<image_soft_token>'])
    assert write(str(source), out, 'qwen2.5')[2] == expected + 2


@pytest.mark.parametrize('kind', ['qwen', 'qwen_pair', 'llama2_model'])
def test_without_an_image_token_the_files_are_copied(folders, tmp_path, kind):
    source = pathlib.Path(folders[kind])
    assert write(folders[kind], tmp_path, 'qwen2.5' if 'qwen' in kind else 'vicuna_v1', image_token=False)[2] is None
    for file in source.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    (tmp_path / 'chat_template.jinja').unlink()
    assert fingerprint(str(tmp_path)) == fingerprint(folders[kind])


def test_the_chat_template_stands_in_one_place(folders, tmp_path):
    source, out = tmp_path / 'source', tmp_path / 'out'
    source.mkdir(), out.mkdir()
    tiny.byte_level(source, chat_template='{{ messages }}')
    write(str(source), out, 'qwen2.5', image_token=False)
    assert 'chat_template' not in json.loads((out / 'tokenizer_config.json').read_text())
    assert 'You are Qwen' in (out / 'chat_template.jinja').read_text()
    write_tokenizer_files(str(source), out, '', 0)
    assert (out / 'chat_template.jinja').read_text() == '{{ messages }}'


def test_own_sentencepiece_models_become_json_in_stock_layouts_too(folders, tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    ours, _, image = write(folders['own'], tmp_path, 'chatml', image_token=False)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert image is None and len(theirs) == ours.vocab_size
    assert theirs.encode('is it red?') == ours.encode('is it red?')


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    for image_token in (True, False):
        with pytest.raises(UserError, match='holds no tokenizer.json, tokenizer.model, or vocab.json'):
            write_tokenizer_files(str(tmp_path), tmp_path, '', 3, image_token)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(UserError, match='cannot be opened'):
        write_tokenizer_files(str(tmp_path), tmp_path / 'out', '', 3)
    (tmp_path / 'tokenizer.json').unlink()
    (tmp_path / 'tokenizer.model').write_bytes(b'no model')
    with pytest.raises(UserError, match='is not a SentencePiece model'):
        write_tokenizer_files(str(tmp_path), tmp_path / 'out', '', 3)
