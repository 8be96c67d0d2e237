"""ScienceQA's problems in the common format.

Prompts and answers are character for character those that LaVIN's released code makes, with its quirks: two spaces become
one only once; a line break in a lecture or a solution is the two characters `\\n`; an answer without a reason keeps
`BECAUSE:`; QCM-AL tells the solution and QCM-AE the lecture, though L stands for lecture and E for explanation.
"""
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Callable, Iterable

from vora_jax.data.images.decode import decode
from vora_jax.data.text.records import check_record
from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.types import UserError

SPLITS = ('train', 'val', 'test')
SUBJECTS = {'natural science': 'NAT', 'social science': 'SOC', 'language science': 'LAN'}
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
LAST_LOW_GRADE, LAST_GRADE = 6, 12
# What is asked: Q question, C context, M options.
ASKED = {'QCM': 'Question: {question}\nContext: {context}\nOptions: {options}\nResponse:',
         'CQM': 'Context: {context}\nQuestion: {question}\nOptions: {options}\nResponse:'}
# What is learned: A answer, L lecture, E explanation.
LEARNED = {'A': 'The answer is {letter}.',
           'AL': 'The answer is {letter}. BECAUSE: {solution}',
           'AE': 'The answer is {letter}. BECAUSE: {lecture}',
           'ALE': 'The answer is {letter}. BECAUSE: {lecture} {solution}',
           'LEA': '{lecture} {solution} The answer is {letter}.'}
FORMATS = tuple(f'{asked}-{learned}' for asked in ASKED for learned in LEARNED)


def prompt_and_answer(problem: Mapping[str, Any], form: str = 'QCM-ALE', caption: str = '') -> tuple[str, str]:
    """(prompt, answer) of a problem; an answer follows its prompt without a space.

    Args:
        problem: question, choices, answer (index), hint, lecture, solution.
        form: one of `FORMATS`: the parts of the prompt, and those of the answer, in their order.
        caption: text about the picture, told behind the hint; '' for none.
    """
    asked, learned = form.split('-')
    options = ' '.join(f'({letter}) {choice}' for letter, choice in zip(LETTERS, problem['choices']))
    context = f'{problem["hint"]} {caption}'.strip() or 'N/A'
    lecture, solution = (problem[name].replace('\n', '\\n') for name in ('lecture', 'solution'))
    texts = (ASKED[asked].format(question=problem['question'], context=context, options=options),
             LEARNED[learned].format(letter=LETTERS[problem['answer']], lecture=lecture, solution=solution))
    prompt, answer = (text.replace('  ', ' ').strip() for text in texts)
    return prompt, answer


def groups(problem: Mapping[str, Any]) -> list[str]:
    """The columns of the results table that a problem counts in.

    Subject NAT, SOC or LAN; context TXT (a hint) and IMG (a picture), which may both hold, or NO; grades G1-6 or G7-12.
    """
    context = ['TXT'] * bool(problem['hint']) + ['IMG'] * bool(problem.get('image'))
    grade = int(problem['grade'].removeprefix('grade'))
    return [SUBJECTS[problem['subject']], *(context or ['NO']), 'G1-6' if grade <= LAST_LOW_GRADE else 'G7-12']


def record(name: str, problem: Mapping[str, Any], frames: Sequence[str], form: str, caption: str = '') -> dict[str, Any]:
    """The problem as a row. Beside the conversation: what scores are grouped by, the choices' number, the right letter."""
    prompt, answer = prompt_and_answer(problem, form, caption)
    kinds = groups(problem)
    return {'id': name, 'frames': list(frames), 'kind': kinds[0], 'groups': kinds, 'num_choices': len(problem['choices']),
            'choice': LETTERS[problem['answer']], 'subject': problem['subject'], 'grade': problem['grade'],
            'has_image': bool(problem.get('image')), 'has_text': bool(problem['hint']),
            'conversations': [{'from': 'human', 'value': f'{IMAGE}\n' * len(frames) + prompt},
                              {'from': 'gpt', 'value': answer}]}


def convert(root: str, folder: pathlib.Path, progress: Callable[..., Iterable], form: str = 'QCM-ALE',
            captions: str = '') -> dict[str, Any]:
    """Writes train.jsonl, val.jsonl and test.jsonl, pictures as absolute paths; returns the manifest's content.

    Args:
        root: folder with problems.json, `images/<split>/<id>/<image>` and, unless each problem names its split,
            pid_splits.json.
        folder: an existing empty folder.
        progress: wraps an iterable to show progress; takes `desc`.
        form, captions: see `prompt_and_answer`; captions is a file {"captions": {id: text}}, '' for none.
    Raises:
        UserError: a file is missing or is not what it should be, or no problem belongs to a split.
    """
    problems = _read(os.path.join(root, 'problems.json'), 'correct the folder or download ScienceQA')
    told = _read(captions, 'correct --captions').get('captions') if captions else {}
    if not isinstance(told, dict):
        raise UserError(f'{captions} is not an object {{"captions": {{id: text}}}}; correct --captions.')
    dropped: list[str] = []
    counts, total = {}, 0
    for split, names in _splits(root, problems).items():
        rows = []
        for name in progress(names, desc=split):
            total += 1
            try:
                row = _row(name, problems, os.path.abspath(root), split, form, told)
            except UserError as error:
                dropped.append(str(error).rstrip('.'))
                continue
            rows.append(json.dumps(row, ensure_ascii=False) + '\n')
        counts[split] = len(rows)
        (folder / f'{split}.jsonl').write_text(''.join(rows), encoding='utf-8')
    if not total:
        raise UserError(f'no problem of {root} belongs to {", ".join(SPLITS)}; put pid_splits.json beside problems.json.')
    return {'source': source(root, form, captions), 'rows': total, 'counts': counts, 'dropped': dropped}


def source(root: str, form: str, captions: str) -> dict[str, Any]:
    """What identifies the result: two equal sources give the same folder. UserError where problems.json is missing."""
    files = [os.path.join(root, 'problems.json'), os.path.join(root, 'pid_splits.json'), *([captions] if captions else [])]
    if not os.path.isfile(files[0]):
        raise UserError(f'{files[0]} does not exist; give the folder of ScienceQA that holds problems.json.')
    hashes = [hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest() for file in files if os.path.isfile(file)]
    return {'name': 'ScienceQA', 'root': os.path.abspath(root), 'format': form, 'sha256': hashes,
            'captions': bool(captions)}


def _splits(root: str, problems: Mapping[str, Any]) -> dict[str, list[str]]:
    """{split: ids in order}: of pid_splits.json, or of the problems' own `split`."""
    file = os.path.join(root, 'pid_splits.json')
    if os.path.isfile(file):
        listed = _read(file, 'download ScienceQA again')
        named = {split: listed.get(split, []) for split in SPLITS}
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in named.values()):
            raise UserError(f'{file} is not an object {{split: [id, ...]}}; download ScienceQA again.')
    else:
        named = {split: [name for name, problem in problems.items()
                         if isinstance(problem, dict) and problem.get('split') == split] for split in SPLITS}
    return {split: names for split, names in named.items() if names}


def _row(name: str, problems: Mapping[str, Any], root: str, split: str, form: str,
         captions: Mapping[str, Any]) -> dict[str, Any]:
    where = f'{os.path.join(root, "problems.json")} problem {name}'
    problem, caption = problems.get(name), captions.get(name) or ''
    if (fault := _fault(problem)) or not isinstance(caption, str):
        raise UserError(f'{where}: {fault or "its caption is not a text"}.')
    texts = {key: problem.get(key) or '' for key in ('hint', 'lecture', 'solution')}
    files = [os.path.join(root, 'images', split, name, problem['image'])] if problem.get('image') else []
    row = record(name, {**problem, **texts}, files, form, caption)
    check_record(row, where)
    for file in files:
        try:
            decode(file)
        except UserError as error:
            raise UserError(f'{where}: {error}') from error
    return row


def _fault(problem: Any) -> str:
    """What is wrong with a problem; '' if nothing is."""
    if not isinstance(problem, dict):
        return 'there is no such problem'
    choices, answer, grade = (problem.get(key) for key in ('choices', 'answer', 'grade'))
    if not isinstance(problem.get('question'), str):
        return 'question is not a text'
    if not all(isinstance(problem.get(key) or '', str) for key in ('hint', 'lecture', 'solution', 'image')):
        return 'hint, lecture, solution or image is not a text'
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        return 'choices is not a list of texts'
    if not 1 <= len(choices) <= len(LETTERS):
        return f'there are {len(choices)} choices; a letter is known for 1 to {len(LETTERS)}'
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f'answer {answer!r} is not the number of a choice, 0 to {len(choices) - 1}'
    if problem.get('subject') not in SUBJECTS:
        return f'subject {problem.get("subject")!r} is none of {", ".join(SUBJECTS)}'
    if not re.fullmatch(r'grade\d+', str(grade)) or not 1 <= int(grade[5:]) <= LAST_GRADE:
        return f'grade {grade!r} is none of grade1 to grade{LAST_GRADE}'
    return ''


def _read(file: str, advice: str) -> dict[str, Any]:
    """The JSON object in the file; UserError if there is none."""
    try:
        content = json.loads(pathlib.Path(file).read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror}); {advice}.') from error
    except ValueError as error:
        raise UserError(f'{file} is not JSON ({error}); {advice}.') from error
    if not isinstance(content, dict):
        raise UserError(f'{file} is not a JSON object; {advice}.')
    return content
