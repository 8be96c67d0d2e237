"""Equal token ids and prompts on both sides."""
import io
import json
import random

import pytest
import sentencepiece
from tiny_models import TEXTS, make_tokenizer

from vora_jax.convert.export.sentencepiece_json import CHAT_TEMPLATE, IMAGE, build_tokenizer
from vora_jax.convert.export.tokenizer_files import write_tokenizer_files
from vora_jax.data.text.conversation import Image, render, render_prompt
from vora_jax.data.text.templates import TEMPLATES
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.types import UserError


def train(**settings) -> bytes:
    model = io.BytesIO()
    settings = {'model_type': 'bpe', 'byte_fallback': True, 'vocab_size': 320, 'add_dummy_prefix': False,
                'remove_extra_whitespaces': False, 'normalization_rule_name': 'identity', **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, hard_vocab_limit=False,
                                             minloglevel=2, **settings)
    return model.getvalue()


def assert_equal_ids(model: bytes, count: int = 2000):
    ours, theirs = sentencepiece.SentencePieceProcessor(model_proto=model), build_tokenizer(model, 'here')
    rng = random.Random(1)
    alphabet = ['<|im_start|>', '<|im_end|>', ' ', '  ', '\n', 'Ä', '東', '🙂', *'aaeehiistt rsd?', 'the ', 'shape',
                ' colour']
    for _ in range(count):
        text = ''.join(rng.choices(alphabet, k=rng.randint(0, 40)))
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == ours.decode(ours.encode(text)), text


def test_ids_are_equal_on_random_texts(tmp_path):
    folder = make_tokenizer(tmp_path)
    assert_equal_ids((tmp_path / 'tokenizer' / 'tokenizer.model').read_bytes())
    assert load_tokenizer(folder).vocab_size <= 300


@pytest.mark.parametrize('settings', [
    {'user_defined_symbols': ['<|im_start|>', '<|im_end|>', 'ist']},
    {'model_type': 'unigram', 'vocab_size': 300},
    {'normalization_rule_name': 'nfkc'},
])
def test_other_kinds_of_model(settings):
    assert_equal_ids(train(**settings), count=300)


@pytest.mark.parametrize('settings', [{'model_type': 'word', 'byte_fallback': False, 'vocab_size': 20},
                                      {'model_type': 'char', 'byte_fallback': False, 'vocab_size': 20}])
def test_a_kind_without_an_equal_is_refused(settings):
    with pytest.raises(UserError, match='here is neither a byte-pair nor a unigram model'):
        build_tokenizer(train(**settings), 'here')


def test_image_gets_an_id_after_all_others_where_there_is_no_such_piece():
    model = train()
    tokenizer = build_tokenizer(model, 'here')
    assert tokenizer.token_to_id(IMAGE) == sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


@pytest.fixture
def loaded(tmp_path, request):
    """(our tokenizer, the exported one as users load it) with the system message of a template."""
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    ours = load_tokenizer(make_tokenizer(tmp_path))
    out = tmp_path / 'out'
    out.mkdir()
    template = CHAT_TEMPLATE.replace('__SYSTEM__', json.dumps(TEMPLATES[request.param].system))
    write_tokenizer_files(str(tmp_path / 'tokenizer'), out, template, ours.eos_id)
    return ours, transformers.AutoTokenizer.from_pretrained(str(out))


@pytest.mark.parametrize('loaded', ['chatml', 'chatml_system'], indirect=True)
def test_auto_tokenizer_gives_the_same_ids_and_prompts(loaded, request):
    ours, theirs = loaded
    template = TEMPLATES[request.node.callspec.params['loaded']]
    for text in (*TEXTS[:6], 'a\n b <|im_end|>\n', '  two', 'Zürich 🙂'):
        ids = theirs(text, add_special_tokens=False)['input_ids']
        assert ids == theirs(text)['input_ids'] == ours.encode(text)
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.padding_side) == (ours.eos_id, 'left')

    def flat(pieces):
        return [token for piece in pieces
                for token in ([theirs.convert_tokens_to_ids(IMAGE)] if isinstance(piece, Image) else piece.ids)]

    def chat(messages, **settings):
        return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)

    question = {'role': 'user', 'content': f'{IMAGE}\nwhat is it?'}
    assert chat([question], add_generation_prompt=True) == flat(render_prompt('what is it?', 1, ours, template))
    parts = {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': '\nwhat is it?'}]}
    assert chat([parts], add_generation_prompt=True) == chat([question], add_generation_prompt=True)
    for system in (None, '', 'be brief'):
        turns = [{'from': 'human', 'value': question['content']}, {'from': 'gpt', 'value': 'red'},
                 {'from': 'human', 'value': 'sure?'}, {'from': 'gpt', 'value': 'yes'}]
        messages = [question, {'role': 'assistant', 'content': 'red'}, {'role': 'user', 'content': 'sure?'},
                    {'role': 'assistant', 'content': 'yes'}]
        if system is not None:
            turns.insert(0, {'from': 'system', 'value': system})
            messages.insert(0, {'role': 'system', 'content': system})
        assert chat(messages) == flat(render({'frames': ['x'], 'conversations': turns}, ours, template)), system
