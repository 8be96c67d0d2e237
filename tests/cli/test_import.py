"""`vora import`, through the command line."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folder
import tiny_run
from orbax.checkpoint.experimental import v1 as ocp
from tiny_folder import alone  # noqa: F401

from vora_jax.cli import gin_config, import_
from vora_jax.cli import main as cli
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.params import flatten
from vora_jax.training import init_from, state
from vora_jax.training.checkpoints import checkpoint
from vora_jax.training.checkpoints.checkpoint import open_checkpoint
from vora_jax.types import UserError

UP = 'model.layers.1.mlp.up_proj.weight'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    train_sentencepiece(['what color is the shape? red', 'a blue circle'], str(folder), 300)
    return folder / 'tokenizer.model'


def run(folder, to, *more):
    return cli.main(['import', str(folder), '--to', str(to), *more])


def test_a_run_starts_from_an_imported_language_model(tmp_path):
    wanted = tiny_folder.write_folder(tmp_path / 'hf', 'qwen2', 'float16')
    assert run(tmp_path / 'hf', tmp_path / 'w') == 0
    arguments = {'llm': tiny_folder.found('qwen2').arguments['llm'], 'patch_embed': tiny_run.EMBED,
                 'teacher': tiny_run.VIT, 'rank': 2, 'num_adapted_layers': 2}  # other layer groups than the language model's
    shapes = import_.parameter_targets(import_.variants.vora(**arguments), 'pretrain')
    taken = init_from.take([str(tmp_path / 'w')], shapes)
    assert set(shapes) - set(taken) == {path for path in shapes if 'decoder/' not in path or '/side/' in path
                                        or '/adapter_' in path}
    path = 'decoder/layers/group_{}/block/q_proj/kernel'
    whole = np.concatenate([taken[path.format(group)] for group in range(3) if path.format(group) in taken])
    assert (whole == wanted[path.format(0)]).all()
    placed = state.place(taken['decoder/embedding'], shapes['decoder/embedding'])
    assert placed.dtype == jnp.float32 and (np.asarray(placed) == wanted['decoder/embedding']).all()


def refused(folder, to, capsys, *more):
    """The one sentence that refuses; nothing that looks complete is left, and nothing blocks a retry."""
    assert run(folder, to, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith('vora: ') and error.count('\n') == 1 and 'Traceback' not in error
    assert checkpoint.step_numbers(to) == []
    if to.exists():
        with pytest.raises(UserError):
            open_checkpoint(to)
    return error


def spoil(name, index, value):
    def change(tensors):
        tensors[name][index] = value
        return tensors
    return change


@pytest.mark.parametrize('name', ['qwen2', 'llama3', 'llava'])
def test_a_language_model_is_imported_and_answers(tmp_path, capsys, tokenizer, name):
    wanted = tiny_folder.write_folder(tmp_path / 'hf', name, 'float16', max_shard_bytes=8000)
    shutil.copy(tokenizer, tmp_path / 'hf')
    assert run(tmp_path / 'hf', tmp_path / 'w', '--json', str(tmp_path / 'done.json')) == 0
    out = capsys.readouterr().out
    template = {'qwen2': 'chatml', 'llama3': 'chatml', 'llava': 'vicuna_v1'}[name]
    assert f'chat template: {template}' in out and f'vora generate {tmp_path / "w"}' in out
    opened = open_checkpoint(tmp_path / 'w')
    assert opened.metadata.origin == 'import' and (tmp_path / 'w/tokenizer/tokenizer.model').is_file()
    assert {path: x.tobytes() for path, x in flatten(opened.params).items()} == {
        path: x.tobytes() for path, x in wanted.items()}
    config, text = gin_config.load('Train', texts=[opened.config_text])
    assert text == opened.config_text and config.data.template == template
    found = tiny_folder.found(name)
    assert config.method == getattr(import_.variants, found.method)(**found.arguments)
    done = json.loads((tmp_path / 'done.json').read_text())
    assert done['parameters'] == sum(x.size for x in wanted.values()) and done['dtypes'] == ['float16']
    assert set(done['seconds']) == {'check', 'read', 'convert', 'write', 'compile'}
    assert min(done['seconds'].values()) >= 0
    if name != 'llava':  # Vicuna's template needs a tokenizer with </s>
        assert cli.main(['generate', str(tmp_path / 'w'), 'what color?', '--max-new-tokens', '3']) == 0


@pytest.mark.parametrize('name', ['aimv2', 'clip'])
def test_an_encoder_needs_no_tokenizer_and_becomes_a_teacher(tmp_path, capsys, name):
    wanted = tiny_folder.write_folder(tmp_path / 'hf', name)
    (tmp_path / 'hf/tokenizer.json').write_text('of the text side')
    assert run(tmp_path / 'hf', tmp_path / 'w') == 0
    out = capsys.readouterr().out
    assert f'--init-from teacher={tmp_path / "w"}:encoder' in out and 'chat template' not in out
    assert open_checkpoint(tmp_path / 'w').tokenizer_dir == '' and not (tmp_path / 'w/tokenizer').exists()
    shapes = {path.replace('encoder/', 'teacher/', 1): x for path, x in wanted.items()}
    taken = init_from.take([f'teacher={tmp_path / "w"}:encoder'], shapes)
    assert all((taken[path] == x).all() for path, x in shapes.items()) and len(taken) == len(shapes)
    assert cli.main(['generate', str(tmp_path / 'w'), 'what?']) == 2
    assert 'does not generate text' in capsys.readouterr().err


def test_the_dtype_can_be_chosen(tmp_path):
    wanted = tiny_folder.write_folder(tmp_path / 'hf', 'qwen3')
    assert run(tmp_path / 'hf', tmp_path / 'w', '--dtype', 'bfloat16') == 0
    for path, array in flatten(open_checkpoint(tmp_path / 'w').params).items():
        assert array.dtype == jnp.bfloat16 and (array == wanted[path].astype(jnp.bfloat16)).all()


def test_what_is_not_used_is_named(tmp_path, capsys):
    def more(tensors):
        tied = {'lm_head.weight': tensors['model.embed_tokens.weight']}
        return tensors | tied | {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(2, np.float32)}

    tiny_folder.write_folder(tmp_path / 'hf', 'llama3', change=more)
    assert run(tmp_path / 'hf', tmp_path / 'w') == 0
    out = capsys.readouterr().out
    assert 'not used: lm_head.weight (equal to model.embed_tokens.weight)' in out and 'inv_freq' in out
    tiny_folder.write_folder(tmp_path / 'other', 'llama3', change=lambda tensors: tensors | {
        'lm_head.weight': tensors['model.embed_tokens.weight'] + 1})
    assert 'lm_head.weight differs from' in refused(tmp_path / 'other', tmp_path / 'v', capsys)


def test_a_workdir_with_a_run_is_left_alone(tmp_path, capsys):
    tiny_folder.write_folder(tmp_path / 'hf', 'llama')
    assert run(tmp_path / 'hf', tmp_path / 'w') == 0
    before = open_checkpoint(tmp_path / 'w')
    assert run(tmp_path / 'hf', tmp_path / 'w') == 2
    assert 'already holds a run' in capsys.readouterr().err
    assert open_checkpoint(tmp_path / 'w').metadata == before.metadata


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, capsys, value):
    tiny_folder.write_folder(tmp_path / 'hf', 'llama', change=spoil(UP, (0, 0), value))
    assert UP in refused(tmp_path / 'hf', tmp_path / 'w', capsys)


@pytest.mark.parametrize('change, told', [
    (lambda tensors: {key.replace('layers.1.mlp.up', 'layers.1.mlp.upp'): x for key, x in tensors.items()},
     f'was {UP} renamed to model.layers.1.mlp.upp_proj.weight'),
    (lambda tensors: tensors | {UP: np.ascontiguousarray(tensors[UP].T)}, 'dimensions are swapped'),
    (lambda tensors: {key: x for key, x in tensors.items() if 'layers.2.' not in key}, 'the configuration has 3 layers'),
])
def test_names_and_shapes_that_do_not_fit(tmp_path, capsys, change, told):
    tiny_folder.write_folder(tmp_path / 'hf', 'llama', change=change)
    assert told in refused(tmp_path / 'hf', tmp_path / 'w', capsys)


def test_damaged_folders(tmp_path, capsys):
    hf, to = tmp_path / 'hf', tmp_path / 'w'
    tiny_folder.write_folder(hf, 'llama', max_shard_bytes=8000)
    shards = sorted(hf.glob('*.safetensors'))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    assert f'{shards[1]} is truncated' in refused(hf, to, capsys)
    shards[1].unlink()
    assert f'misses 1 of {len(shards)} shards' in refused(hf, to, capsys)
    shards[1].write_bytes(whole)
    config = (hf / 'config.json').read_text()
    (hf / 'config.json').write_text(config.replace('"llama"', '"mamba"'))
    assert "model_type 'mamba' is not supported" in refused(hf, to, capsys)
    (hf / 'config.json').write_text('{')
    assert 'config.json is not JSON' in refused(hf, to, capsys)
    (hf / 'config.json').unlink()
    assert 'holds no config.json' in refused(hf, to, capsys)
    assert f'{tmp_path / "nowhere"} does not exist' in refused(tmp_path / 'nowhere', to, capsys)
    (hf / 'config.json').write_text(config)
    assert 'Data.template \'nothing\' is unknown' in refused(hf, to, capsys, '--template', 'nothing')
    assert not to.exists()
    assert run(hf, to) == 0


def test_a_folder_of_pickles(tmp_path, capsys):
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf/config.json').write_text(json.dumps(tiny_folder.CONFIGS['llama']))
    (tmp_path / 'hf/pytorch_model.bin').write_bytes(b'x')
    assert 'pytorch_model.bin only; save it as safetensors' in refused(tmp_path / 'hf', tmp_path / 'w', capsys)


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    tiny_folder.write_folder(tmp_path / 'hf', 'llama')

    def full(folder, *_, **__):
        folder.mkdir(parents=True)
        (folder / 'half').write_bytes(b'x')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ocp, 'save_checkpointables', full)
        assert 'the disk is full' in refused(tmp_path / 'hf', tmp_path / 'w', capsys)
        assert not list((tmp_path / 'w/steps').iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda _: os.terminal_size((0, 0)) and type('', (), {'free': 10}))
        assert '10 are free' in refused(tmp_path / 'hf', tmp_path / 'w', capsys)
    assert run(tmp_path / 'hf', tmp_path / 'w') == 0


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_import_leaves_nothing_that_looks_complete(tmp_path, tokenizer, number):
    """It is killed when all is written but the checksum file."""
    tiny_folder.write_folder(tmp_path / 'hf', 'llama')
    shutil.copy(tokenizer, tmp_path / 'hf')
    # A shell that starts the tests in the background makes them, and what they start, ignore Ctrl-C.
    script = ('import os, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler);'
              'from vora_jax.training.checkpoints import checksum; from vora_jax.cli.main import main;'
              f'checksum.commit = lambda folder: os.kill(os.getpid(), {int(number)}) or time.sleep(20);'
              f'sys.exit(main(["import", {str(tmp_path / "hf")!r}, "--to", {str(tmp_path / "w")!r}]))')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    assert checkpoint.step_numbers(tmp_path / 'w') == []
    with pytest.raises(UserError, match='without a finished step'):
        open_checkpoint(tmp_path / 'w')
    assert run(tmp_path / 'hf', tmp_path / 'w') == 0
    assert open_checkpoint(tmp_path / 'w').metadata.origin == 'import'
