"""Ids and loss masks equal to `apply_chat_template`; the templates themselves."""
import json

import pytest
import tiny_tokenizers as tiny

from vora_jax.data.config import Data, Source
from vora_jax.data.packing import Text
from vora_jax.data.samples import Samples
from vora_jax.data.text.conversation import Image, place, render, render_prompt, render_turns
from vora_jax.data.text.templates import TEMPLATES, find_template, jinja
from vora_jax.data.text.tokenizer import load_tokenizer, train_sentencepiece
from vora_jax.types import UserError

CHATML = """\
{%- if messages[0].role != 'system' and SYSTEM -%}{{- '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' -}}{%- endif -%}
{{- END -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
CLOSED = CHATML.replace('END', repr('\n'))
QWEN = CLOSED.replace('SYSTEM', "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'")
SMOLLM = CLOSED.replace('SYSTEM', "'You are a helpful AI assistant named SmolLM, trained by Hugging Face'")
VICUNA = """\
{%- if messages[0].role != 'system' -%}{{- "A chat between a curious user and an artificial intelligence assistant. The \
assistant gives helpful, detailed, and polite answers to the user's questions. " -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content + ' ' -}}
{%- elif message.role == 'user' -%}{{- 'USER: ' + message.content + ' ASSISTANT:' -}}
{%- else -%}{%- generation -%}{{- ' ' + message.content + '</s>' -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}"""
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set loop_messages = messages[1:] -%}{%- set system_message = messages[0]['content'] -%}
{%- else -%}{%- set loop_messages = messages -%}{%- set system_message = false -%}{%- endif -%}
{%- for message in loop_messages -%}
{%- if loop.index0 == 0 and system_message != false -%}
{%- set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] -%}
{%- else -%}{%- set content = message['content'] -%}{%- endif -%}
{%- if message['role'] == 'user' -%}{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
{%- else -%}{%- generation -%}{{- ' ' + content.strip() + ' ' + eos_token -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}"""
LLAMA3 = """\
{%- for message in messages -%}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -%}
{%- if loop.index0 == 0 -%}{{- bos_token -}}{%- endif -%}{{- content -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""
CASES = [('qwen2.5', 'qwen', QWEN), ('smollm2', 'qwen', SMOLLM), ('llama3', 'llama3', LLAMA3)] + [
    (template, kind, text) for template, text in (('vicuna_v1', VICUNA), ('llama2', LLAMA2))
    for kind in ('llama2', 'llama2_legacy', 'llama2_model')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    def new(name):
        return tmp_path_factory.mktemp(name)

    model = tiny.llama_model(new('model'))
    return {'qwen': tiny.byte_level(new('qwen')), 'llama3': tiny.byte_level(new('llama3'), tiny.LLAMA3_MARKERS),
            'llama2_model': model, 'llama2': tiny.llama_json(model, new('llama2')),
            'llama2_legacy': tiny.llama_json(model, new('llama2_legacy'), legacy=True)}


def conversations():
    """(system or None, [(question, answer), ...]) with every tricky text as question and as answer."""
    texts = [*tiny.TRICKY, *tiny.SPECIAL_TEXTS, *tiny.random_texts(60)]
    for number, text in enumerate(texts):
        other, third = texts[number - 1], texts[number - 7]
        yield None, [(text, other)]
        yield 'Be brief.', [('what?', text), (other, third), (third, 'red')]
    for system in ('  spaced \n', 'a</s>b', '東京'):
        yield system, [(' q', 'a ')]


def record(system, exchanges, frames=()):
    turns = [{'from': role, 'value': value} for pair in exchanges for role, value in zip(('human', 'gpt'), pair)]
    lead = [] if system is None else [{'from': 'system', 'value': system}]
    return {'conversations': lead + turns, 'frames': list(frames)}


def messages(system, exchanges):
    said = [{'role': role, 'content': text} for pair in exchanges for role, text in zip(('user', 'assistant'), pair)]
    return ([] if system is None else [{'role': 'system', 'content': system}]) + said


def flat(pieces, image=-1):
    """(ids, loss mask) of pieces; a picture is one id."""
    pieces = [Text([image]) if isinstance(piece, Image) else piece for piece in pieces]
    return [token for piece in pieces for token in piece.ids], [
        int(piece.supervised) for piece in pieces for _ in piece.ids]


@pytest.mark.parametrize('name, kind, text', CASES, ids=[f'{case[0]}-{case[1]}' for case in CASES])
def test_ids_and_masks_are_those_of_transformers(folders, name, kind, text):
    """The reference templates are the published ones with generation marks. Vicuna's BOS is added by its tokenizer, as
    in LLaVA; it stands in front of the reference here."""
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    ours, template = load_tokenizer(folders[kind]), find_template(name)
    theirs = transformers.AutoTokenizer.from_pretrained(folders['llama2' if kind == 'llama2_model' else kind])
    lead = [ours.bos_id] if name == 'vicuna_v1' else []
    for system, exchanges in conversations():
        expected = theirs.apply_chat_template(messages(system, exchanges), chat_template=text, return_dict=True,
                                              return_assistant_tokens_mask=True)
        ids, mask = flat(render(record(system, exchanges), ours, template))
        assert ids == lead + expected['input_ids'], (system, exchanges)
        assert mask == [0] * len(lead) + expected['assistant_masks'], (system, exchanges)
        asked = messages(system, exchanges[:1])[:-1]
        prompt = theirs.apply_chat_template(asked, chat_template=text, add_generation_prompt=True, return_dict=False)
        assert flat(render_prompt(exchanges[0][0], 0, ours, template, system))[0] == lead + prompt, (system, exchanges)


@pytest.mark.parametrize('name, kind', [
    *((name, 'qwen') for name in ('chatml', 'chatml_system', 'vora', 'qwen2.5', 'smollm2', 'plain')), ('llama3', 'llama3'),
    *((name, kind) for name in ('image_first', 'image_first_instruction') for kind in ('qwen', 'llama3')),
    *((name, kind) for name in ('vicuna_v1', 'llama2', 'image_first', 'image_first_instruction')
      for kind in ('llama2', 'llama2_legacy', 'llama2_model'))])
def test_the_written_template_gives_the_same_prompts(folders, name, kind):
    """`jinja` is what an exported folder holds."""
    transformers = pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")
    ours, template = load_tokenizer(folders[kind]), find_template(name)
    theirs = transformers.AutoTokenizer.from_pretrained(folders['llama2' if kind == 'llama2_model' else kind])
    theirs.add_special_tokens({'additional_special_tokens': ['<image>']})
    image, text = theirs.convert_tokens_to_ids('<image>'), jinja(template, ours)
    for system, exchanges in conversations():
        # Where answers or end marks are tokenised apart, no token of the reference may reach over their border.
        if template.apart:
            exchanges = [(question, answer.strip('\n \t\r.\u200b\u0301') + '!') for question, answer in exchanges]
        elif template.answers_apart:
            exchanges = [(f'{question}:', answer) for question, answer in exchanges]
        elif name == 'plain':
            exchanges = [(exchanges[0][0], exchanges[0][1].rstrip('\n \t\r.\u200b\u0301') + 'a')]
        exchanges[0] = ('<image>' + exchanges[0][0] + '<image>', exchanges[0][1])
        expected = theirs.apply_chat_template(messages(system, exchanges), chat_template=text, return_dict=True,
                                              return_assistant_tokens_mask=True)
        found = flat(render(record(system, exchanges, 'ab'), ours, template), image)
        assert found == (expected['input_ids'], expected['assistant_masks']), (system, exchanges)
        parts = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': exchanges[0][0][7:]}]}]
        prompt = theirs.apply_chat_template(messages(system, [])[:1] + parts, chat_template=text, return_dict=False,
                                            add_generation_prompt=True)
        assert flat(render_prompt(exchanges[0][0], 2, ours, template, system), image)[0] == prompt


@pytest.mark.parametrize('name, kind', [('qwen2.5', 'qwen'), ('vicuna_v1', 'llama2_model'), ('llama3', 'llama3'),
                                        ('llama2', 'llama2'), ('chatml', 'qwen'), ('image_first', 'llama2_model'),
                                        ('image_first', 'qwen')])
def test_fewer_turns_are_the_beginning_of_more(folders, name, kind):
    """Dropping the last turns of a conversation gives what the shorter conversation gives."""
    ours, template = load_tokenizer(folders[kind]), find_template(name)
    exchanges = [('<image> a', ' b\n'), ('c', ''), ('<image>', 'd')]
    turns, _ = render_turns(record('S', exchanges, 'xy'), ours, template)
    assert [sum(isinstance(piece, Image) for piece in turn) for turn in turns] == [1, 0, 1]
    for number in (1, 2):
        shorter = render(record('S', exchanges[:number], 'x'), ours, template)
        assert flat([piece for turn in turns[:number] for piece in turn]) == flat(shorter)
    assert all(flat(turn)[1].count(1) >= 1 and template.end_id(ours) in flat(turn)[0] for turn in turns)


@pytest.mark.parametrize('kind', ['llama2', 'llama2_legacy', 'llama2_model', 'qwen', 'llama3'])
@pytest.mark.parametrize('image', [True, False], ids=['picture', 'text_only'])
def test_pictures_first_is_begin_mark_question_answer_end(folders, kind, image):
    """The stretches of LaVIN's sequence, each tokenised for itself as a text that begins with a space."""
    ours, template = load_tokenizer(folders[kind]), find_template('image_first')
    begin = [] if ours.bos_id is None else [ours.bos_id]

    def stretch(text, first=False):
        return ours.encode(text if first else f' {text}')

    question, answer = 'Question: what colour?\nOptions: (A) red (B) blue\nResponse:', 'The answer is A. BECAUSE: x'
    mark = [*stretch('Image: ', True), -1] if image else stretch('Image: N/A', True)
    whole = stretch(question + answer)
    learned = len(whole) - len(stretch(question))
    frames, shown = ['a'] * image, '<image>\n' * image + question
    ids, mask = flat(render(record(None, [(shown, answer)], frames), ours, template))
    assert ids == [*begin, *mark, *whole, ours.eos_id]
    assert mask == [0] * (len(ids) - learned - 1) + [1] * (learned + 1)
    prompt = flat(render_prompt(question, int(image), ours, template))[0]
    assert prompt == ids[:len(ids) - learned - 1] == flat(render_prompt(shown, int(image), ours, template))[0]
    if image and 'llama2' in kind:  # the space before the picture is a token of its own, as the one of `a ` is
        assert mark[-2] == ours.encode('a ')[-1] and ours.decode([ours.encode('a')[0], mark[-2]]) == 'a '


def test_no_token_reaches_over_the_beginning_of_an_answer(tmp_path, monkeypatch):
    """Byte-level tokenizers join a colon to the word behind it, if the pair is frequent."""
    pairs = [f'{begin}:{word}' for begin in ('Response', 'b') for word in ('The', 'the')] * 50
    monkeypatch.setattr(tiny, 'TEXTS', pairs)
    ours = load_tokenizer(tiny.byte_level(tmp_path))
    whole, template = ours.encode('Response:The answer'), find_template('image_first')
    assert any(ours.decode([token]).startswith(':') and len(ours.decode([token])) > 1 for token in whole)
    for question, answer in (('Response:', 'The answer'), ('x<image>:', 'The'), ('<image>', 'The'), ('a:', '')):
        ids, mask = flat(render(record(None, [(question, answer), ('b:', 'The')], 'x' * question.count('<image>')),
                                ours, template))
        prompt = flat(render_prompt(question, question.count('<image>'), ours, template))[0]
        assert ids[:len(prompt)] == prompt and mask[:len(prompt)] == [0] * len(prompt)
        learned = [token for token, one in zip(ids, mask) if one]
        assert learned == [*ours.encode(answer), ours.eos_id, *ours.encode('The'), ours.eos_id]


def test_pictures_first_with_several_turns(folders):
    ours, template = load_tokenizer(folders['qwen']), find_template('image_first_instruction')
    exchanges = [('a', 'b'), ('c <image> d<image>', 'e'), ('f', 'g')]
    pieces = render(record('S', exchanges, 'xy'), ours, template)
    shown = [piece.index if isinstance(piece, Image) else ours.decode(piece.ids) for piece in pieces]
    told = ['S Image: N/A Instruction: a\nResponse:', 'b', '<|im_end|>', ' Image: ', 0, 1,
            ' Instruction: c  d\nResponse:', 'e', '<|im_end|>', ' Instruction: f\nResponse:', 'g', '<|im_end|>']
    assert shown == told


def test_plain_is_picture_caption_line_break(folders):
    ours, template = load_tokenizer(folders['llama2_model']), find_template('plain')
    ids, mask = flat(render(record(None, [('<image>\nWrite a caption.', 'a red shape.')], 'x'), ours, template))
    caption, end = ours.encode_spans('a red shape.', start=False)[0], template.end_id(ours)
    assert ids == [ours.bos_id, -1, *caption, end] and mask == [0, 0] + [1] * (len(caption) + 1)
    assert ours.encode('a\n')[-1] == end
    byte_level = load_tokenizer(folders['qwen'])
    ids, _ = flat(render(record(None, [('<image>', 'It is red.')], 'x'), byte_level, template))
    assert ids == [-1, *byte_level.encode('It is red.'), *byte_level.encode('\n')]
    assert flat(render_prompt('<image>what?', 1, ours, template))[0] == [ours.bos_id, -1]


def test_an_empty_system_message_is_none(folders):
    for name, kind in (('qwen2.5', 'qwen'), ('vicuna_v1', 'llama2'), ('llama2', 'llama2'), ('llama3', 'llama3')):
        ours, template = load_tokenizer(folders[kind]), find_template(name)
        bare = ours.decode(flat(render(record('', [('q', 'a')]), ours, template))[0])
        assert bare.replace(ours.decode([ours.bos_id]) if ours.bos_id is not None else '-', '').lstrip().startswith(
            template.question('q', True, ''))


def test_all_bytes_of_an_answers_first_character_are_learned(tmp_path):
    own = train_sentencepiece(tiny.TEXTS, str(tmp_path), 400)
    ids, mask = flat(render(record(None, [('q', '🙂')]), own, find_template('qwen2.5')))
    learned = [token for token, one in zip(ids, mask) if one]
    assert learned == [*own.encode('🙂'), own.token_id('<|im_end|>')] and len(learned) == 5


def test_end_marks(folders):
    tokenizers = {kind: load_tokenizer(folder) for kind, folder in folders.items()}
    for name, kind, end in (('chatml', 'qwen', '<|im_end|>'), ('qwen2.5', 'qwen', '<|im_end|>'),
                            ('llama3', 'llama3', '<|eot_id|>'), ('vicuna_v1', 'llama2', '</s>')):
        assert [find_template(name).end_id(tokenizers[kind])] == tokenizers[kind].encode(end)
    assert find_template('chatml').end_id(tokenizers['llama2_model']) == tokenizers['llama2_model'].eos_id
    with pytest.raises(UserError, match=r"Data.template 'llama3' ends answers with <\|eot_id\|>, for which"):
        find_template('llama3').end_id(tokenizers['qwen'])


def test_find_template_and_place():
    assert all(find_template(name).name == name for name in TEMPLATES)
    with pytest.raises(UserError, match='vicuna_v1'):
        find_template('alpaca')
    assert place([Text([1]), Image(1), Image(0)], [['a'], ['b', 'c']]) == [Text([1]), 'b', 'c', 'a']


def test_samples_tell_a_template_of_another_tokenizer_at_once(folders, tmp_path):
    (tmp_path / 'rows.jsonl').write_text(json.dumps(record(None, [('q', 'a')])) + '\n')
    data = Data((Source(str(tmp_path / 'rows.jsonl')),), folders['qwen'], 'vicuna_v1')
    with pytest.raises(UserError, match="'vicuna_v1' ends answers with </s>"):
        Samples(data, None)
