"""`vora merge`: folds the adapters of a checkpoint."""
import argparse

from vora_jax.cli import gin_config
from vora_jax.cli.export_source import open_source
from vora_jax.convert.export.exportable import exportable
from vora_jax.convert.export.merge_report import merge_report
from vora_jax.merge import merge, raise_if_unmergeable
from vora_jax.params import count
from vora_jax.training.checkpoints.checkpoint import raise_if_used, write_checkpoint
from vora_jax.types import UserError

HELP = """Fold the adapters of a checkpoint into its weights and write the result as a new checkpoint.

The merged model computes the same without adapters, distillation heads and teacher. Its configuration is that of the
stage the method names as the next one, so that stage can start from it: vora train NEXT.gin --init-from W. It is kept in
float32; what a later cast to --dtype will lose is told.
"""
EXAMPLE = 'vora merge runs/vora --to runs/merged'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora merge`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('--to', required=True, metavar='W', help='workdir to write; must not hold a run yet')
    parser.add_argument('--dtype', choices=('bfloat16', 'float16'), default='bfloat16',
                        help='the cast whose loss is told; nothing is cast here; default %(default)s')


def run(args: argparse.Namespace) -> int:
    """Writes the merged checkpoint; 0 on success. UserError on bad input."""
    raise_if_used(args.to)  # before anything large is read
    source = open_source(args.checkpoint)
    text, provenance = source.provenance.config_text, source.provenance
    config, _ = gin_config.load('Train', texts=[text])
    stage = config.method.stage(config.stage)
    if stage.merges_into is None:
        raise_if_unmergeable(stage.model)  # says why
        raise UserError(f'{args.checkpoint} holds the stage {config.stage!r} of {config.method.name}, which has no '
                        'stage for the merged model; write that with `vora export --merge`.')
    merged, model = merge(source.params, stage.model)
    if model != config.method.stage(stage.merges_into).model:
        raise ValueError(f'{config.method.name}: the merged model is not that of the stage {stage.merges_into!r}.')
    _, text = gin_config.load('Train', texts=[text], bindings=[f'Train.stage={stage.merges_into}'])
    write_checkpoint(args.to, merged, text, source.data.tokenizer, step=provenance.step)
    print(f'{args.to}: {count(source.params):,} parameters became {count(merged):,}')
    del merged  # the report folds again, layer by layer
    for line in merge_report(exportable(source.params, stage.model), args.dtype, source.probe()).lines():
        print(line)
    return 0
