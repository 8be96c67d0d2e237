"""Gathers the quickstart's figures into results.json.

    python launch/quickstart_results.py runs/quickstart
"""
import json
import pathlib
import sys
import time


def stage_results(run: pathlib.Path, stage: str) -> dict:
    """The figures of one stage, from what its training, evaluation and verification wrote."""
    evaluation, training, verification = (json.loads((run / stage / f'{name}.json').read_text())
                                          for name in ('eval', 'summary', 'verify'))
    scores = ('accuracy', 'by_kind', 'blind_accuracy', 'blind_by_kind', 'num_questions')
    return {name: evaluation[name] for name in scores} | {
        'trainable_params': training['trainable_params'],
        'total_params': training['total_params'],
        'tokens_per_second': training['tokens_per_second'],
        'max_abs_logit_diff': verification['max_abs_logit_diff'],
        'seconds': training['seconds'],
    }


def main(folder: str) -> None:
    run = pathlib.Path(folder)
    stages = {stage: stage_results(run, stage) for stage in ('vora', 'finetune')}
    seconds = time.time() - int((run / 'started').read_text())
    results = stages['finetune'] | {'seconds': seconds, 'stages': stages}
    (run / 'results.json').write_text(json.dumps(results, indent=1) + '\n')

    columns = ('colour', 'shape', 'yes_no', 'all')
    print(f'{"stage":10}{"":8}' + ''.join(f'{name:>9}' for name in columns) + f'{"trainable":>12}{"of":>11}'
          f'{"tokens/s":>10}{"torch diff":>12}')
    for name, stage in stages.items():
        for label, prefix in (('', ''), ('blind', 'blind_')):
            scores = {**stage[f'{prefix}by_kind'], 'all': stage[f'{prefix}accuracy']}
            row = f'{"" if label else name:10}{label:8}' + ''.join(f'{100 * scores[kind]:8.1f}%' for kind in columns)
            if not label:
                row += (f'{stage["trainable_params"]:12,}{stage["total_params"]:11,}{stage["tokens_per_second"]:10,.0f}'
                        f'{stage["max_abs_logit_diff"]:12.1e}')
            print(row)
    print(f'\n{results["num_questions"]:,} test questions; {seconds / 60:.1f} minutes in all; figures in '
          f'{run / "results.json"}, pictures in {run / "grid.png"}, PyTorch in {run / "finetune-hf"}')


if __name__ == '__main__':
    main(sys.argv[1])
