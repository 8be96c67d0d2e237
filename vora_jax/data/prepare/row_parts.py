"""One part of a prepared folder, written from its rows."""
import contextlib
import json
import os
import pathlib
from typing import Any, Callable, Iterator, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.patches import fit_grid
from vora_jax.data.prepare import tallies
from vora_jax.data.prepare.checked_row import CheckedRow, Pictures, check_row
from vora_jax.data.prepare.prepared_folder import file_sha256
from vora_jax.data.sources.prepared_rows import part_files
from vora_jax.data.sources.rows import Rows
from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vora_jax.data.whole_file import write_whole
from vora_jax.types import UserError

# One thread and one record a group: the bytes of the file depend on nothing but its records.
ROW_OPTIONS = 'group_size:1,zstd:3,max_parallelism:1'
PICTURE_OPTIONS = 'group_size:1,uncompressed,max_parallelism:1'
NEW = 'new-'  # begins the name of a file that is still being written


class Plan(NamedTuple):
    """How rows become parts.

    rows_per_part: rows of the source in a part, good and bad.
    image_root: folder that file names are relative to.
    decoded: decode every picture; otherwise only its header is read.
    tokenizer: folder; counts tokens. '' counts none.
    patch_size: counts patches of this many pixels, at native aspect ratio within the defaults of `ImagePolicy`; 0 none.
    """

    rows_per_part: int
    image_root: str
    decoded: bool = True
    tokenizer: str = ''
    patch_size: int = 0

    def num_parts(self, rows: Rows) -> int:
        return -(-len(rows) // self.rows_per_part)


class Work(NamedTuple):
    """folder: where reports and unfinished files are.    files: the folder in it that receives the finished files."""

    folder: pathlib.Path
    files: pathlib.Path

    def report(self, part: int, count: int) -> pathlib.Path:
        """The file that appears when a part is complete."""
        return self.folder / f'part-{part:05}-of-{count:05}.json'


def write_part(rows: Rows, part: int, plan: Plan, work: Work, tick: Callable[[], None]) -> dict[str, Any]:
    """Writes the part's two files, then its report; returns the report.

    The same rows and plan give the same bytes.

    Args:
        rows: of the whole source.
        part: which.
        tick: called after each row; an exception that it raises ends the part, which leaves nothing behind.
    Raises:
        UserError: the files cannot be written, or a remote store does not answer.
    """
    count = plan.num_parts(rows)
    names = part_files(part, count)
    temporary = [work.folder / f'{NEW}{os.getpid()}-{name}' for name in names]
    try:
        report = _convert(rows, part, plan, temporary, tick)
        report['bytes'] = {name: file.stat().st_size for name, file in zip(names, temporary)}
        report['files'] = {name: file_sha256(file) for name, file in zip(names, temporary)}
        for name, file in zip(names, temporary):
            file.replace(work.files / name)
        write_whole(work.report(part, count), lambda file: file.write(json.dumps(report).encode()))
    except OSError as error:
        raise UserError(f'{work.folder} cannot be written, or the source does not answer ({error}); make room or look at '
                        'the storage, then give the same command again: it goes on with the missing parts.') from error
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)
    return report


def read_report(part: int, plan: Plan, rows: Rows, work: Work) -> dict[str, Any] | None:
    """The report of a part that is complete; None if it is still to be made."""
    try:
        report = json.loads(work.report(part, plan.num_parts(rows)).read_bytes())
        return report if all((work.files / name).stat().st_size == size for name, size in report['bytes'].items()) else None
    except (FileNotFoundError, ValueError):
        return None


def _convert(rows: Rows, part: int, plan: Plan, files: list[pathlib.Path], tick: Callable[[], None]) -> dict[str, Any]:
    """Writes the files of rows and pictures; returns what they hold."""
    numbers = range(part * plan.rows_per_part, min((part + 1) * plan.rows_per_part, len(rows)))
    tokenizer = load_tokenizer(plan.tokenizer) if plan.tokenizer else None
    counts, dropped, found = {'samples': 0, 'pictures': 0, 'turns': 0, 'text_only': 0}, [], {}
    met, picture_bytes = Pictures({}, {}), 0
    with _writer(files[0], ROW_OPTIONS) as write_row, _writer(files[1], PICTURE_OPTIONS) as write_picture:
        for number in numbers:
            where = rows.where(number)
            try:
                row = check_row(rows[number], where, plan.image_root, met, plan.decoded)
            except UserError as error:
                dropped.append({'where': where, 'reason': str(error).removeprefix(f'{where}: ').rstrip('.')})
                tick()
                continue
            for name, content, picture in row.new:
                write_picture(content)
                met.held[name] = picture
                picture_bytes += len(content)
                tallies.add(found, width=picture['width'], height=picture['height'])
            write_row(row.line)
            counts['samples'] += 1
            counts['pictures'] += len(row.new)
            counts['turns'] += row.exchanges
            counts['text_only'] += not row.pictures
            tallies.add(found, **_measured(row, plan, tokenizer))
            tick()
    return {'rows': len(numbers), 'counts': counts, 'dropped': dropped, 'picture_bytes': picture_bytes,
            'tallies': tallies.stored(found)}


@contextlib.contextmanager
def _writer(path: pathlib.Path, options: str) -> Iterator[Callable[[bytes], None]]:
    """A function that adds a record to a new file. OSError where it cannot."""
    writer = ArrayRecordWriter(str(path), options)

    def told(write: Callable[..., None], *record: bytes) -> None:
        try:
            write(*record)
        except RuntimeError as error:  # what the library raises for a full disk
            raise OSError(str(error).partition(';')[0]) from error

    try:
        yield lambda record: told(writer.write, record)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # what went wrong first is told
            writer.close()
        raise
    told(writer.close)


def _measured(row: CheckedRow, plan: Plan, tokenizer: Tokenizer | None) -> dict[str, int]:
    """Characters, tokens and patches of a row."""
    texts = [text.replace(IMAGE, '') for text in row.texts]
    found = {'characters': sum(map(len, texts))}
    if tokenizer is not None:
        found['tokens'] = sum(len(tokenizer.encode(text)) for text in texts if text)
    if plan.patch_size:
        grids = [fit_grid(each['height'], each['width'], plan.patch_size, ImagePolicy()) for each in row.pictures]
        found['patches'] = sum(height * width for height, width in grids)
    return found
