"""The papers' own adapter files through `vora import`, `train`, `export`, `verify`."""
import json
import pathlib

import numpy as np
import pytest
import tiny_pictures
from export_checkpoints import write
from tiny_folder import alone  # noqa: F401

from vora_jax.cli import gin_config
from vora_jax.cli.main import main
from vora_jax.params import flatten
from vora_jax.training import init_from
from vora_jax.training.checkpoints.checkpoint import open_checkpoint

torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")

PICTURES = '''
Data.image = @ImagePolicy()
ImagePolicy.kind = 'square_crop'
ImagePolicy.side = 16
PatchEmbed.cls_token = True
'''
SMALL = tiny_pictures.CONFIG.replace('vora.', '# ') + PICTURES
LLAVA = SMALL.replace('@vora()', '@llava()')
LORA = LLAVA.replace("'pretrain'", "'adapt'") + 'llava.adapter = @LowRank()\nLowRank.rank = 2\nLowRank.scale = 2.0\n'
LAVIN = SMALL.replace('@vora()', '@lavin()').replace("'pretrain'", "'finetune'")
LAVIN += 'lavin.taps = (0, 1)\nModalityMixture.rank = 4\n'
VCE = SMALL.replace('@vora()', '@vce_dual_lora()').replace("'pretrain'", "'finetune'")
VCE += 'vce_dual_lora.taps = (-1, -2)\nCueEnhancer.num_heads = 2\nCueEnhancer.num_points = 2\nDualLowRank.rank = 4\n'
BASE = SMALL.replace('@vora()', '@language_model()')
BASE = '\n'.join(line for line in BASE.splitlines() if not line.startswith(('PatchEmbed', 'Vit')))
ENCODER = SMALL.replace('@vora()', '@image_encoder()').replace("'pretrain'", "'frozen'")
ENCODER = '\n'.join(line for line in ENCODER.splitlines() if not line.startswith('LanguageModel'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    made = tiny_pictures.make(tmp_path_factory.mktemp('pictures'))
    for name, text in (('lavin', LAVIN), ('llava', LLAVA), ('lora', LORA), ('vce', VCE)):
        (made / f'{name}.gin').write_text(text.format(folder=made))
        write(made, name, text)
    write(made, 'base', BASE)
    write(made, 'encoder', ENCODER)
    return made


def trained(folder, name):
    """{path: array} of what the stage of a whole checkpoint trains."""
    opened = open_checkpoint(folder / name)
    config, _ = gin_config.load('Train', texts=[opened.config_text])
    from vora_jax.params import partition
    return flatten(partition(opened.params, config.method.stage(config.stage).trainable)[0])


@pytest.mark.parametrize(('name', 'files'), [
    ('lavin', ['checkpoint-0.pth']), ('llava', ['config.json', 'mm_projector.bin']), ('vce', ['adapter_weight.pth']),
    ('lora', ['adapter_config.json', 'adapter_model.safetensors', 'config.json', 'non_lora_trainables.bin'])])
def test_there_and_back(folder, name, files, tmp_path, capsys):
    out, partial, again = (str(tmp_path / kind) for kind in ('llava-lora', 'partial', 'again'))
    assert main(['export', str(folder / name), '--to', out, '--layout', 'adapters']) == 0
    told = capsys.readouterr().out
    assert 'layout adapters' in told and f'vora verify {folder / name} {out}' in told
    beside = ['README.md', 'vora_config.gin', 'vora_export.json']
    assert sorted(file.name for file in pathlib.Path(out).iterdir()) == sorted([*files, *beside])
    assert main(['verify', str(folder / name), out]) == 0
    assert 'tensors compared bit for bit (layout adapters, float32)' in capsys.readouterr().out

    result = tmp_path / 'import.json'
    assert main(['import', out, '--config', str(folder / f'{name}.gin'), '--to', partial, '--json', str(result)]) == 0
    assert 'these alone are no model' in capsys.readouterr().out
    wanted, found = trained(folder, name), flatten(open_checkpoint(partial).params)
    assert wanted.keys() == found.keys() and all(wanted[path].tobytes() == found[path].tobytes() for path in wanted)
    assert json.loads(result.read_text())['num_adapters'] == sum(array.size for array in wanted.values())

    assert main(['export', partial, '--to', again, '--layout', 'adapters']) == 0
    assert main(['verify', partial, again]) == 0 and main(['verify', str(folder / name), again]) == 0
    for file in files:
        if file.endswith(('.pth', '.bin')):
            first, second = (torch.load(pathlib.Path(place, file), weights_only=True) for place in (out, again))
            first, second = first.get('model', first), second.get('model', second)
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_part_is_no_model(folder, tmp_path, capsys):
    out, partial = str(tmp_path / 'out'), str(tmp_path / 'partial')
    assert main(['export', str(folder / 'lavin'), '--to', out, '--layout', 'adapters']) == 0
    assert main(['import', out, '--config', str(folder / 'lavin.gin'), '--to', partial]) == 0
    capsys.readouterr()
    for verb in (['generate', partial, 'what?'], ['eval', partial, '--data', str(folder / 'test.jsonl')],
                 ['export', partial, '--to', str(tmp_path / 'no')], ['merge', partial, '--to', str(tmp_path / 'no')]):
        assert main(verb) == 2
        told = capsys.readouterr().err
        assert 'parameters of imported adapters, but not the frozen weights they belong to' in told and told.count('\n') == 1


def test_with_its_base_it_is_whole(folder, tmp_path, capsys):
    """A language model, an encoder and adapters: every parameter where it belongs, and an answer."""
    out, whole = str(tmp_path / 'out'), str(tmp_path / 'whole')
    assert main(['export', str(folder / 'lavin'), '--to', out, '--layout', 'adapters']) == 0
    arguments = ['import', f'{out}/checkpoint-0.pth', '--config', str(folder / 'lavin.gin'), '--to', whole]
    capsys.readouterr()
    assert main([*arguments, '--init-from', str(folder / 'base')]) == 2
    told = capsys.readouterr().err
    assert 'leave' in told and 'frontend/encoder/' in told and told.count('\n') == 1
    bases = str(folder / 'base'), f'frontend/encoder={folder / "encoder"}:encoder'
    assert main([*arguments, '--init-from', bases[0], '--init-from', bases[1]]) == 0
    assert 'it is a whole model' in capsys.readouterr().out
    params, adapters = flatten(open_checkpoint(whole).params), trained(folder, 'lavin')
    parts = flatten(open_checkpoint(folder / 'base').params) | {
        f'frontend/{path}': array for path, array in flatten(open_checkpoint(folder / 'encoder').params).items()} | adapters
    assert params.keys() == parts.keys() == flatten(open_checkpoint(folder / 'lavin').params).keys()
    assert all((params[path] == parts[path]).all() for path in params)
    assert main(['generate', whole, 'what color?', '--image', str(folder / 'images/0.png'), '--max-new-tokens', '2']) == 0

    # Without writing the whole: a training run takes both.
    partial = str(tmp_path / 'partial')
    assert main([*arguments[:-1], partial]) == 0
    taken = init_from.take([*bases, partial], {path: np.empty(array.shape) for path, array in params.items()})
    assert taken.keys() == params.keys() and all((taken[path] == params[path]).all() for path in params)


def test_a_projector_for_a_later_stage(folder, tmp_path, capsys):
    out, partial = str(tmp_path / 'out'), str(tmp_path / 'partial')
    assert main(['export', str(folder / 'llava'), '--to', out, '--layout', 'adapters', '--dtype', 'bfloat16']) == 0
    capsys.readouterr()
    assert main(['import', f'{out}/mm_projector.bin', '--config', str(folder / 'lora.gin'), '--to', partial]) == 0
    told = capsys.readouterr().out
    assert 'parameters that are not there: decoder/layers' in told and 'there are frontend/projector_0/bias' in told
    assert {str(array.dtype) for array in flatten(open_checkpoint(partial).params).values()} == {'bfloat16'}
    assert main(['export', partial, '--to', str(tmp_path / 'no'), '--layout', 'adapters']) == 2
    assert 'the checkpoint does not fit the model: it misses' in capsys.readouterr().err


def test_bad_input_is_one_sentence(folder, tmp_path, capsys):
    out, to = str(tmp_path / 'out'), str(tmp_path / 'no')
    assert main(['export', str(folder / 'lavin'), '--to', out, '--layout', 'adapters']) == 0
    config = ['--config', str(folder / 'lavin.gin'), '--to', to]
    capsys.readouterr()
    for arguments, message in (
        (['import', f'{out}/checkpoint-0.pth', '--to', to], 'name their method and sizes with --config'),
        (['import', out, '--to', to, '--init-from', 'x'], '--init-from is of use only with --config'),
        (['import', out, '--to', to, '--gin.lavin.taps=(0,)'], '--gin is of use only with --config'),
        (['import', out, *config, '--template', 'chatml'], '--template is of use only without --config'),
        (['import', out, *config, '--gin.ModalityMixture.rank=8'], 'has other shapes of'),
        (['import', str(tmp_path / 'gone'), *config], 'gone does not exist'),
        (['import', str(folder), *config], 'holds no adapter files of lavin'),
        (['import', out, '--config', str(folder / 'vce.gin'), '--to', to], 'holds no adapter files of vce_dual_lora'),
        (['import', f'{out}/README.md', *config], 'README.md'),
        (['export', str(folder / 'lavin'), '--to', to, '--layout', 'adapters', '--merge'], 'leave out --merge'),
        (['export', str(folder / 'lavin'), '--to', to, '--layout', 'adapters', '--base', 'x'], 'leave out --base'),
        (['export', str(folder / 'base'), '--to', to, '--layout', 'adapters'], 'language_model has no adapter files'),
        (['export', str(folder / 'lavin'), '--to', out, '--layout', 'adapters'], 'exists already'),
    ):
        assert main(arguments) == 2, arguments
        told = capsys.readouterr().err
        assert message in told and told.count('\n') == 1, told
        assert not pathlib.Path(to).exists()
    assert main(['export', str(folder / 'lavin'), '--to', out, '--layout', 'adapters', '--overwrite']) == 0
