"""`vora import` and `vora export` against `cp` and `sync`.

    python tests/benchmarks/import_export.py --dtype bfloat16 --gib 2.8 --runs 5

Makes a synthetic Llama folder, then alternates a copy of it, an import and an export. Prints seconds without start-up
and compilation, medians and their ratio to the copy, and the peak of resident memory beyond the parameters.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np

from vora_jax.convert.families.hf_config import llm_to_config
from vora_jax.convert.files.safetensors_files import write_shards
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.llm.decoder import LanguageModel

WIDTH, MLP_WIDTH, VOCAB, KV_WIDTH = 2048, 5632, 32000, 512
LAYER = {'input_layernorm': (WIDTH,), 'post_attention_layernorm': (WIDTH,), 'self_attn.q_proj': (WIDTH, WIDTH),
         'self_attn.k_proj': (KV_WIDTH, WIDTH), 'self_attn.v_proj': (KV_WIDTH, WIDTH), 'self_attn.o_proj': (WIDTH, WIDTH),
         'mlp.gate_proj': (MLP_WIDTH, WIDTH), 'mlp.up_proj': (MLP_WIDTH, WIDTH), 'mlp.down_proj': (WIDTH, MLP_WIDTH)}


def make_folder(folder: pathlib.Path, dtype: str, gib: float) -> None:
    """A Llama of about this size, all of its weights random."""
    kind, shapes = np.dtype(dtype), {'model.embed_tokens': (VOCAB, WIDTH), 'lm_head': (VOCAB, WIDTH), 'model.norm': (WIDTH,)}
    size = sum(int(np.prod(shape)) for shape in LAYER.values()) * kind.itemsize
    layers = max(1, round((gib * 2**30 - 2 * VOCAB * WIDTH * kind.itemsize) / size))
    shapes |= {f'model.layers.{layer}.{name}': shape for layer in range(layers) for name, shape in LAYER.items()}
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02
    folder.mkdir()
    write_shards(folder, ((f'{name}.weight', np.resize(noise, shape).astype(kind)) for name, shape in shapes.items()),
                 [(f'{name}.weight', kind, shape) for name, shape in shapes.items()], 1 << 30)
    llm = LanguageModel(VOCAB, layers, WIDTH, MLP_WIDTH, 16, 4, 128)
    (folder / 'config.json').write_text(json.dumps(llm_to_config(llm, dtype)))
    train_sentencepiece([string.printable], str(folder), 370)


def run(verb: str, source: pathlib.Path, to: pathlib.Path) -> tuple[float, float]:
    """(seconds without start and compilation, peak of resident memory beyond the parameters in GiB) of one command."""
    shutil.rmtree(to, ignore_errors=True)
    os.sync()
    report = to.parent / 'report.json'
    more = ['--layout', 'llm'] if verb == 'export' else []
    process = subprocess.Popen([sys.executable, '-m', 'vora_jax.cli.main', verb, str(source), '--to', str(to), '--json',
                                str(report), *more], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f'vora {verb} failed')
    done = json.loads(report.read_text())
    seconds = sum(value for name, value in done['seconds'].items() if not name.startswith('compil'))
    num_bytes = done.get('bytes') or done['num_bytes']
    compilation = done['seconds'].get('compile', done['seconds'].get('compiling', 0.0))
    return seconds - compilation, (usage.ru_maxrss * 1024 - num_bytes) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='bfloat16')
    parser.add_argument('--gib', type=float, default=2.8)
    parser.add_argument('--runs', type=int, default=5)
    args = parser.parse_args()
    times: dict[str, list[float]] = {'cp': [], 'import': [], 'export': []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        make_folder(folder / 'source', args.dtype, args.gib)
        for _ in range(args.runs):
            os.sync()
            started = time.perf_counter()
            subprocess.run(f'cp -r {folder}/source {folder}/copy && sync', shell=True, check=True)
            times['cp'].append(time.perf_counter() - started)
            shutil.rmtree(folder / 'copy')
            for verb, source, to in (('import', 'source', 'workdir'), ('export', 'workdir', 'exported')):
                seconds, extra = run(verb, folder / source, folder / to)
                times[verb].append(seconds)
                print(f'{verb}: {seconds:.1f} s, cp and sync {times["cp"][-1]:.1f} s, {extra:.2f} GiB beyond the parameters')
    copy = statistics.median(times['cp'])
    for verb in ('import', 'export'):
        median = statistics.median(times[verb])
        print(f'{args.dtype} {verb}: median {median:.1f} s, {median / copy:.1f} x cp and sync ({copy:.1f} s)')


if __name__ == '__main__':
    main()
