"""Small rows of conversations with pictures, in files of every kind."""
import hashlib
import io
import json
import pathlib
import random
import tarfile

import PIL.Image

from vora_jax.data.frame import Frame


def picture(number, size=None, form='JPEG'):
    rng, file = random.Random(number), io.BytesIO()
    size = size or (rng.randint(8, 60), rng.randint(8, 60))
    PIL.Image.new('RGB', size, (number * 37 % 256, number % 256, 9)).save(file, form)
    return file.getvalue()


def turns(*texts):
    return [{'from': ('human', 'gpt')[number % 2], 'value': text} for number, text in enumerate(texts)]


def made_up_rows(count):
    """Rows of 0 to 3 pictures, some used by several rows, some texts with a system turn."""
    rng, rows = random.Random(count), []
    for number in range(count):
        names = [f'{number + step}.jpg' for step in range(rng.choice((0, 1, 1, 2, 3)))]
        question = '<image>' * len(names) + f'What is {number}? \u00e9\u4f60'
        conversation = turns(question, 'It is\nnothing.' * rng.randint(1, 3))
        if rng.random() < 0.3:
            conversation.insert(0, {'from': 'system', 'value': 'Be brief.'})
        frames = {'frames': names} if names else {}
        rows.append({'id': number, **frames, 'conversations': conversation, 'kind': {'a': [1.5]}})
    return rows


def written(folder, rows, pictures=None):
    folder.mkdir(exist_ok=True)
    names = {name for row in rows for name in row.get('frames', ())} if pictures is None else pictures
    for name in names:
        (folder / name).write_bytes(picture(int(name.split('.')[0])))
    (folder / 'rows.jsonl').write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    return str(folder / 'rows.jsonl')


def plain(rows):
    """The rows with the bytes of their pictures in place of `Frame`s."""
    found = []
    for number in range(len(rows)):
        row = rows[number]
        for key in ('frames', 'video'):
            if key in row:
                assert all(isinstance(frame, Frame) for frame in row[key])
                row[key] = [frame.open().read() for frame in row[key]]
        found.append(row)
    return found


def with_bytes(rows):
    return [{**row, 'frames': [picture(int(name.split('.')[0])) for name in row['frames']]} if 'frames' in row else row
            for row in rows]


def hashes(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(pathlib.Path(folder).rglob('*')) if path.is_file()}


def in_every_kind(folder, rows):
    """{kind: path} of the same rows and pictures in files of every kind."""
    import pyarrow
    import pyarrow.parquet
    (folder / 'rows.json').write_text(json.dumps([
        {**{key: value for key, value in row.items() if key != 'frames'}, 'image': row['frames']} if 'frames' in row else row
        for row in rows]))
    held = [{'id': row['id'], 'images': [{'bytes': content, 'path': None} for content in row.get('frames', ())],
             'conversations': row['conversations']} for row in with_bytes(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), folder / 'rows.parquet', row_group_size=4)
    with tarfile.open(folder / 'rows.tar', 'w') as tar:
        for number, (row, told) in enumerate(zip(with_bytes(rows), rows)):
            record = {key: value for key, value in told.items() if key != 'frames'}
            members = [(f'{number:04}.json', json.dumps(record).encode())]
            members += [(f'{number:04}.{place}.jpg', content) for place, content in enumerate(row.get('frames', ()))]
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return {kind: str(folder / f'rows.{kind}') for kind in ('jsonl', 'json', 'parquet', 'tar')}
