"""`vora generate`: answers a question in the terminal."""
import argparse
import json

from vora_jax.cli.opened_model import open_model
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.evaluation.tasks import answer
from vora_jax.types import UserError

HELP = """Answer a question about pictures, or about nothing but text, with greedy decoding.

The answer alone goes to standard output. Pictures take the places of `<image>` in the question, in order;
a question without `<image>` gets them in front.
"""
EXAMPLE = 'vora generate runs/finetune --image shape.png "what color is the shape?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora generate`."""
    parser.add_argument('checkpoint', metavar='CKPT', help='a workdir (latest step) or one step in it')
    parser.add_argument('question', help='the question')
    parser.add_argument('--image', action='append', default=[], metavar='FILE', help='a picture; repeatable')
    parser.add_argument('--max-new-tokens', type=int, default=64, metavar='N', help='at most; default 64')
    parser.add_argument('--json', action='store_true', help='print question, images, answer and step as JSON')


def run(args: argparse.Namespace) -> int:
    """Prints the answer; 0 on success. UserError on bad input."""
    if args.max_new_tokens < 1:
        raise UserError(f'--max-new-tokens is {args.max_new_tokens}; it must be at least 1.')
    opened = open_model(args.checkpoint)
    rows = PromptRows([Prompt(args.question, tuple(args.image))], opened.data, opened.rule, opened.tokenizer)
    text, = answer(opened.model, opened.params, rows, opened.tokenizer, batch_rows=1,
                   max_new_tokens=args.max_new_tokens)
    if args.json:
        row = {'question': args.question, 'images': args.image, 'answer': text, 'step': opened.step}
        text = json.dumps(row, ensure_ascii=False)
    print(text)
    return 0
