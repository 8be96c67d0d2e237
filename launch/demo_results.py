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
        if (folder / 'seconds').is_file():
            evaluation, training, verification = (json.loads((folder / f'{name}.json').read_text())
                                                  for name in ('eval', 'summary', 'verify'))
            return {'accuracy': evaluation['by_kind'], 'blind': evaluation['blind_by_kind'],
                    'both': seen(evaluation['by_kind']), 'both_blind': seen(evaluation['blind_by_kind']),
                    'trainable_params': training['trainable_params'], 'tokens_per_second': training['tokens_per_second'],
                    'max_abs_logit_diff': verification['max_abs_logit_diff'],
                    'seconds': int((folder / 'seconds').read_text())}
    return None


def seen(by_kind: dict[str, float]) -> float:
    """Accuracy on the questions that need the picture."""
    return (by_kind['colour'] + by_kind['shape']) / 2


def main(folder: str) -> None:
    run = pathlib.Path(folder)
    results = {method: figures for method in METHODS if (figures := result(run, method))}
    (run / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    print('| method | ' + ' | '.join(KINDS) + ' | colour + shape | blind | trainable | tokens/s | torch diff | minutes |')
    print('|---' * 10 + '|')
    for method, figures in results.items():
        cells = [METHODS[method], *(f'{100 * figures["accuracy"][kind]:.1f}' for kind in KINDS),
                 f'**{100 * figures["both"]:.1f}**', f'{100 * figures["both_blind"]:.1f}',
                 f'{figures["trainable_params"]:,}', f'{figures["tokens_per_second"]:,.0f}',
                 f'{figures["max_abs_logit_diff"]:.0e}', f'{figures["seconds"] / 60:.1f}']
        print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(sys.argv[1])
