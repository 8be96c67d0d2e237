"""`vora export`: a checkpoint as a PyTorch folder."""
import argparse
import dataclasses
import json
import resource
import time

import jax
import tqdm

from vora_jax.cli import gin_config
from vora_jax.cli.export_source import Source, open_source
from vora_jax.cli.json_report import write_report
from vora_jax.convert.export.adapters import export_adapters
from vora_jax.convert.export.layouts import ADAPTERS, LAYOUTS
from vora_jax.convert.export.to_hf import DTYPES, Exported, export
from vora_jax.types import UserError

HELP = """Write a checkpoint as a PyTorch / Hugging Face folder.

Layouts:
  own      every method, merged or not, with the model's own code; loads with
           AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) and needs nothing of vora_jax
  vora     names and configuration of VoRA's release; its code is to be copied in
  llava    stock LlavaForConditionalGeneration: a CLIP or SigLIP encoder, a projector of two layers, a causal model
  llm      the language model alone, as stock Qwen2, Qwen3 or Llama
  peft     adapters for PEFT, and the model without them in DIR/base
  encoder  a stock CLIP, SigLIP, AIMv2 or DINOv2
  adapters what the stage trained, in the files of the method's own code: LaVIN's checkpoint-N.pth, LLaVA's
           mm_projector.bin or LoRA folder, adapter_weight.pth of VCE + Dual-LoRA; `vora import --config` reads them

Adapters stay adapters unless --merge folds them (llm and llava always do): in float32, cast once. What a cast loses is
told. The folder also holds tokenizer, chat template, configurations and a model card; it appears when it is complete.
"""
EXAMPLE = """vora export runs/finetune --to exported
vora export runs/vora --to merged --merge --dtype bfloat16
vora export runs/lavin --to adapters --layout adapters"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora export`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('--to', required=True, metavar='DIR', help='folder to write; must not exist yet')
    parser.add_argument('--layout', choices=(*LAYOUTS, ADAPTERS), help='default: own; encoder for a vision encoder')
    parser.add_argument('--merge', action='store_true', help='fold the adapters into the weights')
    parser.add_argument('--dtype', choices=DTYPES, default=DTYPES[0],
                        help="of the weights; default keep: the checkpoint's widest, float32 after a merge")
    parser.add_argument('--base', default='', metavar='NAME',
                        help='peft, adapters: the base is this hub id or folder, and not written; vora: what '
                             'config.json calls the base language model')
    parser.add_argument('--max-shard-gb', type=float, default=4.0, metavar='N', help='size of a weights file, GiB; '
                        'default %(default)g')
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier export in DIR')
    parser.add_argument('--json', metavar='FILE', help='also write what was done, with seconds by phase; - prints it '
                                                       'instead of the text')


def run(args: argparse.Namespace) -> int:
    """Writes the folder; 0 on success. UserError on bad input."""
    if not args.max_shard_gb > 0:
        raise UserError(f'--max-shard-gb is {args.max_shard_gb:g}; it must be more than 0.')
    started, compiling = time.perf_counter(), _CompileSeconds()
    source = open_source(args.checkpoint, adapters_only=args.layout == ADAPTERS)
    opened = time.perf_counter() - started
    with tqdm.tqdm(unit='B', unit_scale=True, unit_divisor=1024, leave=False, disable=None, desc='weights') as bar:

        def on_bytes(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        done = _export_adapters(args, source) if args.layout == ADAPTERS else export(
            source.params, source.model, source.prompting, args.to, rule=source.rule, layout=args.layout, merge=args.merge,
            dtype=args.dtype, base=args.base, template=source.template, provenance=source.provenance,
            overwrite=args.overwrite, max_shard_bytes=int(args.max_shard_gb * 2**30),
            probe=source.probe, on_bytes=on_bytes)
    done.seconds.update(open=round(opened, 3), compiling=round(compiling.seconds, 3))
    _report(args, source, done)
    return 0


def _export_adapters(args: argparse.Namespace, source: Source) -> Exported:
    if args.merge:
        raise UserError('export: the layout `adapters` holds adapters as they are; leave out --merge, or take another '
                        'layout.')
    provenance = source.provenance
    config, _ = gin_config.load('Train', texts=[provenance.config_text])
    return export_adapters(source.params, config.method, config.stage, args.to, dtype=args.dtype, base=args.base,
                           provenance=provenance, overwrite=args.overwrite)


def _report(args: argparse.Namespace, source: Source, done: Exported) -> None:
    if args.json:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(source.params))
        text = json.dumps(dataclasses.asdict(done) | {'peak_rss_bytes': peak, 'parameter_bytes': parameters}, indent=1)
        if write_report(text, args.json):
            return
    print(f'{args.to}: layout {done.layout}, {done.num_parameters:,} parameters in {done.num_tensors} tensors, '
          f'{done.dtype}, {done.num_bytes / 2**20:,.1f} MiB')
    if done.dropped:
        print(f'left out, because only training needs them: {", ".join(done.dropped)}')
    for line in (*(done.report.lines() if done.report else ()), *done.notes):
        print(line)
    print(f'compare it with the checkpoint: vora verify {args.checkpoint} {args.to}')


class _CompileSeconds:
    """Counts what XLA spends on compilation, inside the other phases."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_) -> None:
        if event.startswith('/jax/core/compile/'):
            self.seconds += seconds
