"""What a row may hold: every dialect, and nothing else."""
import base64

import pytest

from vora_jax.data.frame import Frame
from vora_jax.data.text.record_frames import pick
from vora_jax.data.text.records import check_record
from vora_jax.types import UserError


def turns(*values, roles=('human', 'gpt'), names=('from', 'value')):
    return [{names[0]: roles[number % 2], names[1]: value} for number, value in enumerate(values)]


def messages(*contents):
    return turns(*contents, roles=('user', 'assistant'), names=('role', 'content'))


def text(value):
    return {'type': 'text', 'text': value}


def content(frame):
    with frame.open() as file:
        return file.read()


ASKED = [('<image>\nq', 'a')]


@pytest.mark.parametrize('record', [
    {'conversations': turns('<image>\nq', 'a'), 'frames': ['x.png']},
    {'conversations': turns('<image>\nq', 'a'), 'image': 'x.png', 'images': None, 'frames': [], 'messages': None},
    {'conversations': turns('<image>\nq', 'a'), 'images': {'path': 'x.png', 'bytes': None}, 'image': {'bytes': None}},
    {'conversations': turns('<image>\nq', 'a', roles=('user', 'assistant')), 'images': ['file://x.png']},
    {'messages': messages('<image>\nq', 'a'), 'image': ['x.png']},
    {'messages': messages([{'type': 'image'}, text('\nq')], [text('a')]), 'images': ['x.png']},
    {'messages': messages([{'type': 'image', 'text': None}, {**text('\nq'), 'image': None}], 'a'), 'images': ['x.png']},
    {'messages': messages([{'type': 'image', 'image': 'x.png'}, text('\n'), text('q')], 'a')},
    {'messages': messages([{'type': 'image', 'path': 'x.png'}, text('\nq')], 'a')},
    {'messages': messages([{'type': 'image', 'url': 'x.png'}, text('\nq')], 'a')},
    {'messages': messages([{'type': 'image_url', 'image_url': {'url': 'x.png'}}, text('\nq')], 'a')},
    {'messages': messages([{'type': 'image_url', 'image_url': 'x.png'}, text('\nq')], 'a'), 'images': []},
    {'video': ['x.png'], 'conversations': turns('<video>\nq', 'a')},
])
def test_dialects_give_the_same_record(record):
    assert check_record(record, 'row 1', 4) == (None, ASKED, ['x.png'])


def test_a_system_turn_and_interleaved_pictures():
    parts = [text('first '), {'type': 'image', 'image': 'x'}, text(' then '), {'type': 'image', 'image': 'y'}]
    record = {'messages': [{'role': 'system', 'content': [text('Be '), text('brief.')]},
                           *messages(parts, 'a', [{'type': 'image', 'image': 'z'}, text('?')], 'b')]}
    expected = [('first <image> then <image>', 'a'), ('<image>?', 'b')]
    assert check_record(record, 'row 1') == ('Be brief.', expected, ['x', 'y', 'z'])


def test_pictures_inside_a_record_are_opened_from_memory():
    url = f'data:image/png;base64,{base64.b64encode(b"three").decode()}'
    record = {'conversations': turns('q', 'a'), 'images': [b'one', {'bytes': b'two', 'path': 'p'}, url]}
    _, exchanges, frames = check_record(record, 'file row 7')
    assert exchanges[0][0] == '<image><image><image>q'
    assert [content(frame) for frame in frames] == [b'one', b'two', b'three']
    assert [content(frame) for frame in frames] == [b'one', b'two', b'three']  # each time a new file
    # The names are keys of caches: different ones within a row, and in different rows.
    assert [frame.name for frame in frames] == [f'file row 7 picture {number}' for number in (1, 2, 3)]
    given = Frame('mine', lambda: None, (3, 4))
    assert check_record({'conversations': turns('q', 'a'), 'frames': [given]}, '')[2] == [given]
    assert check_record({'conversations': turns('q', 'a'), 'frames': given}, '')[2] == [given]


def video(frames, question='<image>\nq', most=4, **more):
    return check_record({'conversations': turns(question, 'a', 'again?', 'b'), 'frames': frames, **more}, 'row 1', most)


def test_a_video_becomes_frames_with_their_seconds():
    _, exchanges, frames = video(['x', 'y'])
    assert (exchanges[0][0], frames) == ('1s: <image>; 2s: <image>; \n\nq', ['x', 'y'])
    assert video(['x', 'y'], 'q')[1][0][0] == '1s: <image>; 2s: <image>; \nq'
    names = [str(number) for number in range(10)]
    _, exchanges, frames = video(names, most=3)
    assert (exchanges[0][0], frames) == ('2s: <image>; 6s: <image>; 9s: <image>; \n\nq', ['1', '5', '8'])
    assert exchanges[1] == ('again?', 'b')
    _, exchanges, _ = video(names, most=2, timestamps=[number * 0.25 for number in range(10)])
    assert exchanges[0][0].startswith('0.5s: <image>; 1.75s: <image>; \n')
    # One frame is a picture, also of a video.
    assert video(names, most=1)[1:] == ([('<image>\nq', 'a'), ('again?', 'b')], ['5'])
    # Several places are several pictures.
    assert video(['x', 'y'], '<image> and <image>')[1][0][0] == '<image> and <image>'
    later = check_record({'conversations': turns('hi', 'a', 'see <video>!', 'b'), 'video': ['x', 'y']}, '', 2)
    assert later[1] == [('hi', 'a'), ('see 1s: <image>; 2s: <image>; \n!', 'b')]


def test_frames_of_a_video_are_picked_evenly():
    for total in range(1, 60):
        for most in range(1, 12):
            picked = pick(total, most)
            assert len(picked) == min(total, most) and picked == sorted(set(picked)) and 0 <= picked[0] <= picked[-1] < total
            # The same from the other end, up to rounding; no part of the video is missed.
            gaps = [later - earlier for earlier, later in zip(picked, picked[1:])]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize('record, problem', [
    ({'conversations': turns('<image>q', 'a'), 'frames': ['x', 'y']}, 'set Data.video_frames'),
    ({'conversations': turns('q', 'a'), 'video': ['x', 'y']}, 'set Data.video_frames'),
    ({'conversations': turns('q', 'a'), 'video': 'film.mp4'}, 'ffmpeg -i FILE -vf fps=1'),
    ({'conversations': turns('q', 'a'), 'frames': ['film.WEBM']}, 'ffmpeg -i FILE -vf fps=1'),
    ({'conversations': turns('q', 'a'), 'images': ['https://a.b/c.png']}, 'is on the web; download it'),
    ({'conversations': turns('q', 'a'), 'images': ['data:image/png;base64,?']}, 'data URL without base64'),
    ({'conversations': turns('q', 'a'), 'images': ['a\0']}, 'no file name can have'),
    ({'conversations': turns('q', 'a'), 'images': ['\ud800']}, 'no file name can have'),
    ({'conversations': turns('q', '\udc00')}, 'half a surrogate pair'),
    ({'conversations': turns('q', 'a'), 'images': [{'picture': 3}]}, 'picture 1 is nothing'),
    ({'conversations': turns('q', 'a'), 'images': ['x', b'']}, 'picture 2 is empty'),
    ({'conversations': turns('q', 'a'), 'images': ['x'], 'frames': ['x']}, 'the row has frames and images'),
    ({'conversations': turns('q', 'a'), 'messages': messages('q', 'a')}, 'has conversations and messages'),
    ({'messages': messages([{'type': 'image', 'image': 'x'}], 'a'), 'images': ['x']}, 'in the turns and under images'),
    ({'messages': messages([{'type': 'image', 'image': 'x'}, {'type': 'image'}], 'a')}, 'some image parts'),
    ({'messages': messages([{'type': 'image', 'image': 7}], 'a')}, 'picture 1 is a number'),
    ({'messages': messages('q', [{'type': 'image', 'image': 'x'}])}, 'outside a human turn'),
    ({'messages': messages([{'type': 'audio'}], 'a')}, 'parts of type text and image'),
    ({'messages': messages([text(None)], 'a')}, 'parts of type text and image'),
    ({'messages': messages([['q']], 'a')}, 'parts of type text and image'),
    ({'messages': [{'role': 'tool', 'content': 'x'}]}, "one is 'tool'"),
    ({'messages': [{'role': ['user'], 'content': 'x'}]}, 'one is a list'),
])
def test_what_is_refused_is_named(record, problem):
    with pytest.raises(UserError) as caught:
        check_record(record, 'rows.jsonl row 3')
    told = str(caught.value)
    assert told.startswith('rows.jsonl row 3: ') and problem in told and told.endswith('.') and told.isprintable()


@pytest.mark.parametrize('timestamps', [[1], 'no', [1, float('nan')], [1, None], [1, -1], [True, 2], [1, 10 ** 400]])
def test_timestamps_are_one_number_for_each_frame(timestamps):
    with pytest.raises(UserError, match='row 1: timestamps'):
        video(['x', 'y'], timestamps=timestamps)


def test_two_places_for_one_video_are_refused():
    with pytest.raises(UserError, match='2 <image> placeholders for one video'):
        check_record({'video': ['x', 'y'], 'conversations': turns('<video><image>', 'a')}, 'row 1', 4)
