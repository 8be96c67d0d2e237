"""The demo's table: every method on the same data.

    python launch/demo_results.py runs/demo
"""
import json
import pathlib
import sys

METHODS = {'llava': 'LLaVA-1.5', 'vora': 'VoRA', 'lavin': 'LaVIN', 'llavit': 'LLaViT', 'vce_dual_lora': 'VCE + Dual-LoRA',
           'kernels_on_patches': "LLaViT's kernels on VoRA's front end", 'dual_lora_on_llava': 'Dual-LoRA on LLaVA-1.5'}
KINDS = ('colour', 'shape', 'yes_no')


def result(run: pathlib.Path, method: str) -> dict | None:
    """The figures of a method's last stage; None where it has not been run to its end."""
    for folder in (run / f'{method}_finetune', run / method):
        if (folder / 'verify.json').is_file():
            seconds = folder / 'seconds'
            evaluation, training, verification = (json.loads((folder / f'{name}.json').read_text())
                                                  for name in ('eval', 'summary', 'verify'))
            return {'accuracy': evaluation['by_kind'], 'blind': evaluation['blind_by_kind'],
                    'both': seen(evaluation, ''), 'both_blind': seen(evaluation, 'blind_'),
                    'trainable_params': training['trainable_params'], 'tokens_per_second': training['tokens_per_second'],
                    'max_abs_logit_diff': verification['max_abs_logit_diff'],
                    'seconds': int(seconds.read_text()) if seconds.is_file() else None}
    return None


def seen(evaluation: dict, prefix: str) -> float:
    """Accuracy on the questions that need the picture, those about colour and shape."""
    numbers = {kind: evaluation['num_by_kind'][kind] for kind in ('colour', 'shape')}
    right = sum(evaluation[f'{prefix}by_kind'][kind] * number for kind, number in numbers.items())
    return right / sum(numbers.values())


def main(folder: str) -> None:
    run = pathlib.Path(folder)
    results = {method: figures for method in METHODS if (figures := result(run, method))}
    (run / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    columns = ('method', *KINDS, 'colour + shape', 'blind', 'trained, last stage', 'tokens/s', 'torch diff', 'minutes')
    print('| ' + ' | '.join(columns) + ' |')
    print('|---' * len(columns) + '|')
    for method, figures in results.items():
        cells = [METHODS[method], *(f'{100 * figures["accuracy"][kind]:.1f}' for kind in KINDS),
                 f'**{100 * figures["both"]:.1f}**', f'{100 * figures["both_blind"]:.1f}',
                 f'{figures["trainable_params"]:,}', f'{figures["tokens_per_second"]:,.0f}',
                 f'{figures["max_abs_logit_diff"]:.0e}', f'{figures["seconds"] / 60:.1f}' if figures['seconds'] else '']
        print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(sys.argv[1])
