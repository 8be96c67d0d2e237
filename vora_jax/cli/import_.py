"""`vora import`: a Hugging Face folder as a checkpoint."""
import argparse
import json
import pathlib
import signal
import tempfile
import time
from typing import Any

import jax
import tqdm

from vora_jax import variants
from vora_jax.cli.config_text import config_text
from vora_jax.cli.import_adapters import import_adapters, report
from vora_jax.cli.imported_data import Guess, copy_tokenizer_files, guess_template, imported_data
from vora_jax.cli.processes import join_processes
from vora_jax.convert import from_hf
from vora_jax.convert.adapters.formats import looks_like_adapters
from vora_jax.convert.families.recognise import Recognised, recognise
from vora_jax.convert.files.safetensors_files import open_folder
from vora_jax.convert.names import name_map
from vora_jax.data.fake import fake_batch
from vora_jax.data.text.special_tokens import read_json
from vora_jax.data.text.templates import find_template
from vora_jax.method import Method
from vora_jax.params import count, flatten, unflatten
from vora_jax.training.checkpoints import checkpoint
from vora_jax.training.config import Mesh, Train
from vora_jax.training.mesh import sharding
from vora_jax.types import UserError

HELP = """Read a Hugging Face folder (weights in safetensors, config.json), or adapters, as a checkpoint.

Language models: Qwen2, Qwen2.5, Qwen3, Llama, Vicuna, SmolLM, Mistral. Encoders: CLIP, SigLIP, AIMv2, DINOv2. Whole
models: LLaVA-1.5, VoRA, and what `vora export` writes. Every tensor is used, or named with the reason why it is not.
The weights keep their dtype. A training run starts from the result with --init-from.

With --config, the files of adapters that the papers' own code writes: LaVIN's checkpoint-N.pth, LLaVA's mm_projector.bin
and LoRA folders, adapter_weight.pth of VCE + Dual-LoRA. CONFIG names method, sizes and stage; the file must hold exactly
what that stage trains (mm_projector.bin: the projector of any stage). The result holds the adapters alone, and a training
run takes them as one of its --init-from; with --init-from here it is a whole model, to be evaluated or exported.
"""
EXAMPLE = """vora import SmolLM2-135M-Instruct --to runs/smollm2
vora import aimv2-huge-patch14-448 --to runs/aimv2
vora import checkpoint-20.pth --config configs/lavin/science_qa_7b.gin --to runs/adapters
vora import checkpoint-20.pth --config configs/lavin/science_qa_7b.gin --to runs/whole \\
    --init-from runs/llama --init-from frontend/encoder=runs/clip:encoder"""


_COMPILATION = ('/jax/core/compile/jaxpr_to_mlir_module_duration', '/jax/core/compile/backend_compile_duration')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `vora import`."""
    parser.add_argument('folder', metavar='DIR', help='the Hugging Face folder; with --config also a file')
    parser.add_argument('--to', required=True, metavar='W', help='workdir to write; must not hold a run yet')
    parser.add_argument('--dtype', choices=('keep', 'float32', 'bfloat16', 'float16'), default='keep',
                        help="of the weights; keep, the default, takes the files'")
    parser.add_argument('--template', metavar='NAME', help="chat template; otherwise the folder's own is recognised")
    parser.add_argument('--config', metavar='CONFIG', help='.gin file of the stage that trained the adapters in DIR; with '
                        'it, --gin.NAME=VALUE sets values')
    parser.add_argument('--init-from', action='append', default=[], metavar='CKPT', dest='init_from',
                        help='with --config: the weights beside the adapters, as in `vora train` (repeatable)')
    parser.add_argument('--teacher-heads', type=int, metavar='N', help='attention heads of the teacher inside an unmerged '
                        'VoRA checkpoint, which its files do not tell; default width / 128')
    parser.add_argument('--json', metavar='FILE', help='write what was done, with seconds, to this file')


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint; 0 on success. UserError on bad input."""
    source, dtype = pathlib.Path(args.folder), None if args.dtype == 'keep' else args.dtype
    files = [args.config] * bool(args.config) + list(args.gin_files)
    for flag, given, wanted in (('--init-from', args.init_from, True), ('--gin', args.gin_bindings, True),
                                ('--template', args.template, False), ('--teacher-heads', args.teacher_heads, False)):
        if given and bool(files) != wanted:
            raise UserError(f'{flag} is of use only with{"" if wanted else "out"} --config; correct one of '
                            'them.')
    with join_processes():
        # JAX keeps SIGTERM for a last checkpoint, but a half-done import is worth none.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if files:
            done = import_adapters(source, args.to, files, args.gin_bindings, args.init_from, dtype)
        else:
            done = import_folder(source, args.to, dtype, args.template, args.teacher_heads)
        if jax.process_index() == 0:
            print(report(done) if files else _report(done))
            if args.json:
                _write_json(args.json, done)
    return 0


def import_folder(source: pathlib.Path, to: str, dtype: str | None = None, template: str | None = None,
                  teacher_heads: int | None = None) -> dict[str, Any]:
    """What was done, as plain values; see `HELP`.

    Raises:
        UserError: bad input; then nothing that looks complete is left.
    """
    clock = _Clock()
    checkpoint.raise_if_used(to)
    config, asked = _config(source), template and find_template(template).name
    with tempfile.TemporaryDirectory() as tokenizer, open_folder(source) as folder:
        given = {name: info.shape for name, info in folder.tensors.items()}
        found = recognise(config, given, _preprocessor(source), teacher_heads=teacher_heads,
                          where=str(source / 'config.json'))
        # The tokenizer beside an encoder is that of its text side.
        has_tokenizer = found.method != 'image_encoder' and copy_tokenizer_files(source, pathlib.Path(tokenizer))
        guess = Guess(asked, 'as asked') if asked else Guess('chatml', 'of no use without a tokenizer')
        if has_tokenizer and not asked:
            guess = guess_template(pathlib.Path(tokenizer), found.hints.get('template'))
        run_config, text = _configure(found, str(pathlib.Path(to) / 'tokenizer') if has_tokenizer else '', guess)
        targets = parameter_targets(run_config.method, run_config.stage)
        entries = name_map.entries({path: leaf.shape for path, leaf in targets.items()}, found.table)
        names, ignored = name_map.match_names(entries, given, found.table, str(source))
        aliases = name_map.alias_pairs(entries, given, found.table)
        from_hf.check_equal(folder, aliases)
        clock.lap('check')
        with tqdm.tqdm(total=sum(folder.tensors[name].num_bytes for name in names.values()), unit='B', unit_scale=True,
                       leave=False, disable=None) as bar:
            def on_read(num_bytes: int, seconds: float) -> None:
                bar.update(num_bytes)
                clock.seconds['read'] += seconds

            params = from_hf.load(folder, entries, names, targets, dtype, on_read)
            jax.block_until_ready(params)
        clock.lap('convert', without='read')
        checkpoint.write_checkpoint(to, unflatten(params), text, tokenizer if has_tokenizer else '', origin='import')
        clock.lap('write')
    ignored += [(name, f'equal to {other}') for name, other in aliases]
    return {
        'folder': str(source), 'workdir': to, 'family': found.family, 'method': found.method, 'stage': found.stage,
        'parameters': count(params), 'tensors': len(names), 'bytes': sum(leaf.nbytes for leaf in params.values()),
        'dtypes': sorted({str(leaf.dtype) for leaf in params.values()}), 'ignored': [list(pair) for pair in ignored],
        'tokenizer': has_tokenizer, 'template': guess.name, 'template_reason': guess.reason,
        'image': found.hints.get('image'), 'seconds': clock.seconds,
    }


class _Clock:
    """Seconds by kind of work; compilation, which lies inside the others, also by itself."""

    def __init__(self):
        self.seconds = {'check': 0.0, 'read': 0.0, 'convert': 0.0, 'write': 0.0, 'compile': 0.0}
        self._last = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def lap(self, name: str, without: str = '') -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._last - self.seconds.get(without, 0.0)
        self._last = now

    def _on_event(self, event: str, seconds: float, **_: Any) -> None:
        if event in _COMPILATION:
            self.seconds['compile'] += seconds


def _config(source: pathlib.Path) -> dict[str, Any]:
    """The content of config.json."""
    if not source.exists():
        raise UserError(f'{source} does not exist; correct the path.')
    if looks_like_adapters(source):
        raise UserError(f'{source} holds adapters, not a model; name their method and sizes with --config CONFIG.gin.')
    if not (source / 'config.json').is_file():
        raise UserError(f'{source} holds no config.json; give a Hugging Face folder, with all of its files.')
    return read_json(source / 'config.json')


def _preprocessor(source: pathlib.Path) -> dict[str, Any] | None:
    """How the folder says pictures are prepared; None where it does not."""
    return read_json(source / 'preprocessor_config.json') or read_json(source / 'processor_config.json').get(
        'image_processor')


def _configure(found: Recognised, tokenizer: str, guess: Guess) -> tuple[Train, str]:
    """(configuration, its text) of the model that was recognised."""
    rule = getattr(variants, found.method)(**found.arguments).vision_tokens
    data = imported_data(found.hints, rule, tokenizer, guess.name)
    return config_text(found.method, found.stage, found.arguments, data)


def parameter_targets(method: Method, stage: str) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and sharding} of all parameters, over as many devices as divide them."""
    model, rule = method.stage(stage).model, method.vision_tokens
    batch = fake_batch(1, 8, 4, rule.patch_size if rule else 1, 8, 1, seed=0, text_only=rule is None)
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)['params']
    shapes, devices = flatten(sharding.unbox(boxed)), jax.devices()
    for number in range(len(devices), 0, -1):
        try:
            places = flatten(sharding.param_shardings(boxed, sharding.make_mesh(Mesh(), devices[:number])))
            break
        except UserError:
            if number == 1 or jax.process_count() > 1:
                raise
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path]) for path, leaf in shapes.items()}


def _write_json(file: str, done: dict[str, Any]) -> None:
    try:
        pathlib.Path(file).write_text(json.dumps(done, indent=1) + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'--json: {file} cannot be written ({error.strerror}), but the import is done.') from error


def _report(done: dict[str, Any]) -> str:
    seconds, to = done['seconds'], done['workdir']
    lines = [f'{to}: {done["family"]}, {done["parameters"]:,} parameters from {done["tensors"]} tensors, '
             f'{", ".join(done["dtypes"])}, {done["bytes"] / 2**20:,.1f} MiB; '
             f'{seconds["read"] + seconds["convert"]:.1f} s to read, {seconds["write"]:.1f} s to write']
    reasons: dict[str, list[str]] = {}
    for name, reason in done['ignored']:
        reasons.setdefault(reason, []).append(name)
    lines += [f'not used: {names[0]}{f" and {len(names) - 1} more" if len(names) > 1 else ""} ({reason})'
              for reason, names in reasons.items()]
    if done['tokenizer']:
        lines.append(f'chat template: {done["template"]} ({done["template_reason"]}; another: --template NAME)')
    if done['image']:
        side = f', {done["image"]["side"]} x {done["image"]["side"]} pixels' if 'side' in done['image'] else ''
        lines.append(f'pictures: {done["image"].get("kind", "native")}{side}')
    if done['method'] == 'image_encoder':
        lines.append(f'start from it: vora train CONFIG --init-from teacher={to}:encoder')
    elif done['tokenizer']:
        picture = '' if done['method'] == 'language_model' else '--image FILE '
        lines.append(f'ask it: vora generate {to} {picture}"..."')
    else:
        lines.append(f'it has no tokenizer; start from it: vora train CONFIG --init-from {to}')
    return '\n'.join(lines)
