"""`vora export`: a checkpoint as a PyTorch folder."""
import argparse

from vora_jax.cli.opened_model import OpenedModel, open_model
from vora_jax.convert.to_hf import DTYPES, Prompting, export
from vora_jax.data.templates import find_template

HELP = """Write a checkpoint as a PyTorch / Hugging Face folder.

The folder holds weights, configuration, tokenizer, chat template and the model's own code; it loads with
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) and needs nothing of vora_jax. Adapters that were not
merged stay adapters; what served training only (teacher, distillation heads) is left out.
"""
EXAMPLE = 'vora export runs/finetune --to exported'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora export`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('--to', required=True, metavar='DIR', help='folder to write; must not exist yet')
    parser.add_argument('--dtype', choices=DTYPES, default=DTYPES[0], help='of the weights; default %(default)s')
    parser.add_argument('--overwrite', action='store_true', help='replace an earlier export in DIR')


def run(args: argparse.Namespace) -> int:
    """Writes the folder; 0 on success. UserError on bad input."""
    opened = open_model(args.checkpoint)
    done = export(opened.params, opened.model, prompting(opened), args.to, dtype=args.dtype, overwrite=args.overwrite)
    print(f'{args.to}: {done.num_parameters:,} parameters in {done.num_tensors} tensors, {args.dtype}, '
          f'{done.num_bytes / 2**20:,.1f} MiB')
    if done.dropped:
        print(f'left out, because only training needs them: {", ".join(done.dropped)}')
    print(f'compare it with the checkpoint: vora verify {args.checkpoint} {args.to}')
    return 0


def prompting(opened: OpenedModel) -> Prompting:
    """How this checkpoint's prompts are made."""
    data, template = opened.data, find_template(opened.data.template)
    most = min(data.image.max_patches, data.max_patches)  # a picture must also fit a row
    return Prompting(data.tokenizer, template.end_id(opened.tokenizer), template.system,
                     min(data.image.min_patches, most), most)
