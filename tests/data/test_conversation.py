"""The rules of the record format."""

import pytest

from vora_jax.data.packing import Text
from vora_jax.data.text.conversation import (
    Image,
    place,
    render,
    render_prompt,
    render_turns,
)
from vora_jax.data.text.templates import TEMPLATES, find_template
from vora_jax.types import UserError

CHATML = ('chatml', 'chatml_system', 'vora', 'qwen2.5', 'smollm2')


class Letters:
    """A tokenizer with one id for each character; 1 ends an answer."""

    vocab_size, eos_id, pad_id, bos_id = 0x110000, 1, 0, 2

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return ''.join(map(chr, ids))

    def encode_spans(self, text, start=True):
        return self.encode(text), [(place, place + 1) for place in range(len(text))]

    def token_id(self, text):
        return 1 if text in ('<|im_end|>', '</s>', '<|eot_id|>') else None


def record(*values, frames=None, roles=('human', 'gpt')):
    turns = [{'from': roles[number % 2], 'value': value} for number, value in enumerate(values)]
    return {'id': '0', 'conversations': turns} | ({} if frames is None else {'frames': frames})


def show(pieces):
    """The pieces as text: [image], {supervised text}, $ for the end mark."""
    shown = ''
    for piece in pieces:
        if isinstance(piece, Image):
            shown += f'[{piece.index}]'
        else:
            text = ''.join('$' if token == 1 else chr(token) for token in piece.ids)
            shown += '{' + text + '}' if piece.supervised else text
    return shown


def rendered(sample, template='chatml'):
    return show(render(sample, Letters(), TEMPLATES[template]))


def test_one_question():
    assert rendered(record('<image>\nwhat?', 'blue', frames=['a.png'])) == (
        '<|im_start|>user\n[0]\nwhat?<|im_end|>\n<|im_start|>assistant\n{blue$}'
    )


def test_several_turns_and_images():
    sample = record('a<image>b<image>', 'c', '<image>d', 'e', frames=['1', '2', '3'])
    assert rendered(sample, 'chatml_system') == (
        '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na[0]b[1]<|im_end|>\n'
        '<|im_start|>assistant\n{c$}\n<|im_start|>user\n[2]d<|im_end|>\n<|im_start|>assistant\n{e$}'
    )
    turns, frames = render_turns(sample, Letters(), TEMPLATES['chatml'])
    assert len(turns) == 2 and frames == ['1', '2', '3']


def test_a_system_turn_replaces_the_templates():
    sample = record('q', 'a')
    sample['conversations'].insert(0, {'from': 'system', 'value': 'Be brief.'})
    for template in CHATML:
        assert rendered(sample, template).startswith(
            '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq'
        )


def test_missing_placeholders_are_prepended_without_a_line_break():
    assert '<|im_start|>user\n[0]what?' in rendered(record('what?', 'x', frames=['a']))
    assert '<|im_start|>user\n[0][1]what?' in rendered(record('what?', 'x', 'more?', 'y', frames=['a', 'b']))


@pytest.mark.parametrize(
    'sample, problem',
    [
        ([], 'not a JSON object'),
        ({'id': 0}, 'conversations is missing or empty'),
        ({'conversations': []}, 'conversations is missing or empty'),
        ({'conversations': {'from': 'human'}}, 'conversations is missing or empty'),
        ({'conversations': ['q', 'a']}, 'a turn of conversations'),
        ({'conversations': [{'from': 'human', 'value': 3}]}, 'a turn of conversations'),
        ({'conversations': [{'from': 'system', 'value': 's'}]}, 'roles'),
        (record('q'), 'roles'),
        (record('q', 'a', 'q'), 'roles'),
        (record('q', 'a', roles=('gpt', 'human')), 'roles'),
        (record('q', 'a', frames=3), 'frames is not a list'),
        (record('q', 'a', frames=[['a.png']]), 'frames is not a list'),
        (record('q', 'a', frames=[None]), 'frames is not a list'),
        (record('<image>q', 'a'), '1 <image> placeholders for 0 frames'),
        (record('<image><image>q', 'a', frames=['a']), '2 <image> placeholders for 1 frames'),
        (record('<image>q', 'a', frames=['a', 'b']), '1 <image> placeholders for 2 frames'),
        (record('q', '<image>a', frames=['a']), 'outside a human turn'),
    ],
)
def test_malformed_records_name_file_row_and_reason(sample, problem):
    with pytest.raises(UserError) as caught:
        render(sample, Letters(), TEMPLATES['chatml'], 'train.jsonl row 7')
    assert str(caught.value).startswith('train.jsonl row 7: ') and problem in str(caught.value)


def test_prompt_for_generation():
    prompt = render_prompt('what?', 1, Letters(), TEMPLATES['chatml'])
    assert show(prompt) == '<|im_start|>user\n[0]\nwhat?<|im_end|>\n<|im_start|>assistant\n'
    # The same pieces as in training, up to the answer.
    assert prompt == render(record('<image>\nwhat?', 'x', frames=['a']), Letters(), TEMPLATES['chatml'])[:-1]
    assert show(render_prompt('hi', 0, Letters(), TEMPLATES['chatml'], system='Be brief.')).startswith(
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi'
    )
    with pytest.raises(UserError, match='2 <image> placeholders for 1 images'):
        render_prompt('<image><image>', 1, Letters(), TEMPLATES['chatml'])


def test_place_and_find_template():
    # A picture may have become several tiles.
    assert place([Text([1]), Image(1), Image(0)], [['first'], ['2a', '2b']]) == [Text([1]), '2a', '2b', 'first']
    with pytest.raises(UserError, match='chatml'):
        find_template('alpaca')
