"""`vora merge`: folds the adapters of a checkpoint."""
import argparse

import jax.numpy as jnp
import numpy as np

from vora_jax.cli import gin_config
from vora_jax.merge import merge
from vora_jax.model import VisionLanguageModel
from vora_jax.params import count, flatten
from vora_jax.training.checkpoint import open_checkpoint, write_checkpoint
from vora_jax.types import Params, UserError

HELP = """Fold the adapters of a checkpoint into its weights and write the result as a new checkpoint.

The merged model computes the same without adapters, distillation heads and teacher. Its configuration is that of the
stage the method names as the next one, so that stage can start from it: vora train NEXT.gin --init-from W.
"""
EXAMPLE = 'vora merge runs/vora --to runs/merged'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora merge`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('--to', required=True, metavar='W', help='workdir to write; must not hold a run yet')


def run(args: argparse.Namespace) -> int:
    """Writes the merged checkpoint; 0 on success. UserError on bad input."""
    opened = open_checkpoint(args.checkpoint)
    config, _ = gin_config.load('Train', texts=[opened.config_text])
    stage = config.method.stage(config.stage)
    if stage.merges_into is None:
        raise UserError(f'{args.checkpoint} holds the stage {config.stage!r} of {config.method.name}, which has nothing '
                        'to merge; give a checkpoint of a stage that trained adapters.')
    merged, model = merge(opened.params, stage.model)
    if model != config.method.stage(stage.merges_into).model:
        raise ValueError(f'{config.method.name}: the merged model is not that of the stage {stage.merges_into!r}.')
    _, text = gin_config.load('Train', texts=[opened.config_text], bindings=[f'Train.stage={stage.merges_into}'])
    write_checkpoint(args.to, merged, text, opened.tokenizer_dir, step=opened.step)
    folded, change, where = folded_adapters(opened.params, stage.model)
    print(f'{args.to}: {folded} adapters folded; {count(opened.params):,} parameters became {count(merged):,}')
    if folded:
        print(f'largest change of a weight: {change:.3g} ({where})')
    return 0


def folded_adapters(params: Params, model: VisionLanguageModel) -> tuple[int, float, str]:
    """(adapters, largest change of a weight they make, where)."""
    flat, folded, largest, where = flatten(params), 0, 0.0, ''
    first = 0
    for index, group in enumerate(model.groups):
        for linear, adapters in group.adapters:
            path = f'decoder/layers/group_{index}/block/{linear}'
            change = jnp.zeros(flat[f'{path}/kernel'].shape, jnp.float32)
            for number, adapter in enumerate(adapters):
                change = adapter.fold(change, {side: flat[f'{path}/adapter_{number}/{side}'] for side in ('a', 'b')})
            folded += len(adapters) * group.num_layers
            by_layer = np.max(np.abs(np.asarray(change)), axis=(1, 2))
            if by_layer.max() >= largest:
                largest, where = float(by_layer.max()), f'layer {first + int(by_layer.argmax())}, {linear}'
        first += group.num_layers
    return folded, largest, where
