"""The rows of any source as a prepared folder, see `sources.prepared_rows`."""
import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vora_jax.data.prepare import tallies
from vora_jax.data.prepare.checked_row import ALL_FRAMES
from vora_jax.data.prepare.part_workers import write_parts
from vora_jax.data.prepare.prepared_folder import continued_folder, find_prepared, write_manifest
from vora_jax.data.prepare.row_parts import NEW, Plan, Work, read_report
from vora_jax.data.sources.prepared_rows import VERSION, PreparedRows
from vora_jax.data.sources.rows import Rows
from vora_jax.data.text.records import check_record
from vora_jax.data.text.tokenizer import fingerprint, train_sentencepiece
from vora_jax.types import UserError

MAX_LISTED = 1000  # dropped rows that the manifest tells; all are in DROPPED
DROPPED = 'dropped.jsonl'
MAX_TEXTS = 1_000_000  # that a tokenizer is trained on

Reports = Mapping[int, dict[str, Any]]


def source_of(rows: Rows, plan: Plan, vocab_size: int = 0) -> dict[str, Any]:
    """What identifies the result: two equal sources give the same folder."""
    return {'name': os.path.basename(rows.path.rstrip('/')), 'sha256': rows.sha256, **plan._asdict(),
            'tokenizer': fingerprint(plan.tokenizer) if plan.tokenizer else '', 'vocab_size': vocab_size}


def find(to: str, rows: Rows, plan: Plan, vocab_size: int) -> dict[str, Any] | None:
    """The manifest of the folder if it is this result already; UserError if it is something else."""
    return find_prepared(to, source_of(rows, plan, vocab_size), VERSION)


def prepare(rows: Rows, to: str, plan: Plan, progress: Callable[..., Any], workers: int = 0, max_bad: float = 0.01,
            vocab_size: int = 0) -> dict[str, Any]:
    """Writes the good rows with their pictures into the new folder `to`; returns its manifest.

    A row is bad if `check_record` refuses it, or one of its pictures is missing or cannot be decoded. The work is done in
    parts; what is complete stays in `TO.partial` when it is interrupted, and the next run does the rest. The result is the
    same, byte for byte, however often that happened and however many processes took part.

    Args:
        rows: of the source.
        plan: how they become parts.
        progress: a tqdm-like class.
        workers: processes; 0 works in this one.
        max_bad: share of rows that may be dropped, 0 to 1.
        vocab_size: also trains a tokenizer of this size on the texts, into `to/tokenizer`; 0 trains none.
    Raises:
        UserError: too many rows are bad, or the folder cannot be written.
    """
    count = plan.num_parts(rows)
    with continued_folder(to, source_of(rows, plan)) as folders:
        work = Work(*folders)
        for file in work.folder.glob(f'{NEW}*'):  # of a run that was killed
            file.unlink(missing_ok=True)
        reports = {part: report for part in range(count) if (report := read_report(part, plan, rows, work))}
        _check_share(reports, len(rows), max_bad, work)
        ready = sum(report['rows'] for report in reports.values())
        with progress(total=len(rows), initial=ready, desc=os.path.basename(rows.path)) as bar:
            missing = [part for part in range(count) if part not in reports]
            with contextlib.closing(write_parts(rows, missing, plan, work, workers, bar.update)) as parts:
                for part, report in parts:
                    reports[part] = report
                    _check_share(reports, len(rows), max_bad, work)
        source = source_of(rows, plan, vocab_size)
        try:
            return _finish([reports[part] for part in range(count)], source, work.files, vocab_size)
        except OSError as error:
            raise UserError(f'{work.files} cannot be written ({error.strerror}); make room or look at the storage, then '
                            'give the same command again: all parts are ready.') from error


def _check_share(reports: Reports, total: int, max_bad: float, work: Work) -> None:
    """UserError if more of all rows are bad than may be, as soon as that is sure, or none is good."""
    ready = [reports[part] for part in sorted(reports)]
    num_dropped, read = sum(len(report['dropped']) for report in ready), sum(report['rows'] for report in ready)
    if num_dropped <= max_bad * total and not num_dropped == read == total:
        return
    so_far = '' if read == total else f' (of {read} that were read)'
    first = _sentence(next(row for report in ready for row in report['dropped']))
    again = f'; the same command goes on with another limit, and begins anew once {work.folder} is removed'
    if num_dropped == read:  # nothing is worth keeping
        for report in work.folder.glob('part-*'):
            report.unlink()
        again = ''
    raise UserError(f'{num_dropped} of {total} rows{so_far} are bad, more than --max-bad {max_bad:g} allows; repair them or '
                    f'raise the limit, the first is {first}{again}.')


def _finish(reports: list[dict[str, Any]], source: dict[str, Any], files: pathlib.Path, vocab_size: int) -> dict[str, Any]:
    """Writes all but the parts; returns the manifest."""
    for stale in (files / 'manifest.json', files / DROPPED, files / 'tokenizer' / 'tokenizer.model'):  # a run killed in here
        stale.unlink(missing_ok=True)
    dropped = [row for report in reports for row in report['dropped']]
    if dropped:
        lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in dropped)
        (files / DROPPED).write_text(lines, encoding='utf-8', errors='backslashreplace')
    counts = {name: sum(report['counts'][name] for report in reports) for name in reports[0]['counts']}
    found = tallies.merged(report['tallies'] for report in reports)
    statistics = {name: tallies.summary(tally) for name, tally in sorted(found.items())}
    content = {
        'source': source, 'rows': sum(report['rows'] for report in reports), 'counts': counts, 'num_dropped': len(dropped),
        'dropped': [_sentence(row) for row in dropped[:MAX_LISTED]],
        'statistics': {**statistics, 'picture_bytes': sum(report['picture_bytes'] for report in reports)},
        'parts': [report['counts']['samples'] for report in reports],
        'pictures': [report['counts']['pictures'] for report in reports],
        'bytes': {name: size for report in reports for name, size in report['bytes'].items()}}
    known = {name: sha256 for report in reports for name, sha256 in report['files'].items()}
    manifest = write_manifest(files, content, VERSION, known)
    if not vocab_size:
        return manifest
    texts = _texts(PreparedRows(str(files)), counts)
    content['vocab_size'] = train_sentencepiece(texts, str(files / 'tokenizer'), vocab_size).vocab_size
    return write_manifest(files, content, VERSION, known)


def _texts(rows: PreparedRows, counts: Mapping[str, int]) -> Iterator[str]:
    """Questions and answers of all rows, or of every so manieth if they are too many."""
    step = -(-2 * counts['turns'] // MAX_TEXTS)
    for number in range(0, len(rows), step):
        _, exchanges, _ = check_record(rows[number], rows.where(number), ALL_FRAMES)
        yield from itertools.chain.from_iterable(exchanges)


def _sentence(row: Mapping[str, str]) -> str:
    return f'{row["where"]}: {row["reason"]}'
