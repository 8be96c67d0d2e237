"""`vora merge`, `export` and `verify` on tiny checkpoints."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest
import tiny_pictures
from export_checkpoints import ADAPTED, CLIP, TAGGER, write

from vora_jax.cli import gin_config
from vora_jax.cli.main import main
from vora_jax.params import flatten
from vora_jax.training.checkpoints.checkpoint import open_checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_pictures.make(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def adapted(folder):
    return write(folder, 'adapted', tiny_pictures.CONFIG + 'LanguageModel.activation_dtype = "bfloat16"\n')


def test_merge_export_verify(folder, adapted, capsys):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    merged = str(folder / 'merged')
    assert main(['merge', adapted, '--to', merged]) == 0
    told = capsys.readouterr().out
    assert '14 adapters folded; largest change of a weight' in told and 'model.layers.' in told
    assert 'rounding weights to bfloat16 changes them by at most' in told and 'logits of the probe prompts' in told
    config, _ = gin_config.load('Train', texts=[open_checkpoint(merged).config_text])
    assert config.stage == 'finetune' and 'adapter' not in ' '.join(flatten(open_checkpoint(merged).params))

    for checkpoint, out in ((adapted, str(folder / 'out_adapted')), (merged, str(folder / 'out_merged'))):
        assert main(['export', checkpoint, '--to', out]) == 0
        told = capsys.readouterr().out
        assert ('left out, because only training needs them' in told) == (checkpoint == adapted)
        result = folder / 'verify.json'
        code = main(['verify', checkpoint, out, '--data', str(folder / 'test.jsonl'), '--num', '5',
                     '--json', str(result), '--max-new-tokens', '4'])
        assert (code, capsys.readouterr().out.splitlines()[-1]) == (0, 'equal')
        found = json.loads(result.read_text())
        assert found['num_prompts'] == 5 == found['same_answers'] + found['near_ties']
        assert found['max_abs_logit_diff'] <= 1e-4 and found['tensors'] > 20

    prepared = str(folder / 'prepared')
    assert main(['prepare', 'rows', str(folder / 'test.jsonl'), '--to', prepared, '--workers', '0']) == 0
    for data in (prepared, f'file://{folder}/test.jsonl'):  # pictures that have no name which torch could open
        assert main(['verify', merged, out, '--data', data, '--num', '2', '--max-new-tokens', '2']) == 0
    capsys.readouterr()
    assert main(['verify', merged, out, '--data', str(folder / 'gone.jsonl')]) == 2
    assert 'gone.jsonl' in capsys.readouterr().err
    # The folders are each other's twins in what they compute, not in what they hold.
    assert main(['verify', merged, str(folder / 'out_adapted'), '--num', '2', '--max-new-tokens', '2']) == 1
    assert 'tensors that are not in the checkpoint (28): model.layers.0' in capsys.readouterr().err


def test_made_up_prompts_of_a_text_model(folder, capsys):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    checkpoint, out = write(folder, 'text', tiny_pictures.TEXT_CONFIG), str(folder / 'out_text')
    assert main(['export', checkpoint, '--to', out, '--dtype', 'bfloat16']) == 0
    capsys.readouterr()
    assert main(['verify', checkpoint, out, '--num', '3', '--json', '-', '--max-new-tokens', '3']) == 0
    assert json.loads(capsys.readouterr().out)['dtype'] == 'bfloat16'


def test_bad_input_is_one_sentence(folder, adapted, capsys):
    tagger = write(folder, 'tagger', TAGGER)
    text = write(folder, 'plain', tiny_pictures.TEXT_CONFIG)
    words = write(folder, 'words', tiny_pictures.CONFIG + "vora.scope = 'text'\n")
    for arguments, message in (
        (['export', tagger, '--to', str(folder / 'no'), '--layout', 'own'], 'does not generate text'),
        (['export', text, '--to', str(folder / 'no'), '--layout', 'llava'], 'needs a vision encoder'),
        (['export', text, '--to', str(folder / 'no'), '--merge'], 'has no adapters to merge'),
        (['export', text, '--to', str(folder / 'no'), '--max-shard-gb', '0'], '--max-shard-gb is 0'),
        (['verify', text, str(folder / 'gone')], 'gone is not a folder that `vora export` wrote'),
        (['verify', adapted, str(folder / 'out_images'), '--teacher', str(folder / 'gone')], 'gone holds no config.json'),
        (['export', str(folder / 'nothing'), '--to', str(folder / 'no')], 'nothing does not exist'),
        (['export', adapted, '--to', str(folder / 'images')], 'exists already'),
        (['verify', adapted, str(folder / 'images')], 'is not a folder that `vora export` wrote'),
        (['verify', adapted, str(folder / 'images'), '--num', '0'], '--num is 0'),
        (['merge', text, '--to', str(folder / 'no')], 'there is nothing to merge'),
        (['merge', words, '--to', str(folder / 'no')], "scope 'text' cannot be folded"),
        (['merge', adapted, '--to', adapted], 'already holds a run'),
    ):
        assert main(arguments) == 2, arguments
        told = capsys.readouterr()
        assert message in told.err and told.err.startswith('vora: ') and told.err.count('\n') == 1, told.err
    assert not (folder / 'no').exists()


@pytest.mark.parametrize(('name', 'config', 'layout', 'more'), [
    # What differs between these two and the others is below the command: convert/test_export_layouts.py has both.
    pytest.param('layouts_adapted', ADAPTED, 'vora', (), marks=pytest.mark.slow),
    pytest.param('layouts_adapted', ADAPTED, 'peft', (), marks=pytest.mark.slow),
    ('layouts_adapted', ADAPTED, 'llm', ('--dtype', 'bfloat16')), ('layouts_clip', CLIP, 'llava', ()),
    ('layouts_tagger', TAGGER.replace('PatchEmbed.width', 'PatchEmbed.norm_eps = 1e-5\nPatchEmbed.width'), None, ())])
def test_every_layout(name, config, layout, more, folder, capsys):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    if layout == 'peft':
        pytest.importorskip('peft', reason='needs pip install peft')
    checkpoint = str(folder / name) if (folder / name).exists() else write(folder, name, config)
    out, result = str(folder / f'out_{name}_{layout}'), folder / 'export.json'
    chosen = ['--layout', layout] if layout else []
    assert main(['export', checkpoint, '--to', out, *chosen, *more, '--json', str(result)]) == 0
    told = capsys.readouterr().out
    done = json.loads(result.read_text())
    assert done['layout'] == (layout or 'encoder') and {'open', 'weights', 'compiling'} <= done['seconds'].keys()
    assert f'layout {done["layout"]}, {done["num_parameters"]:,} parameters' in told
    assert ('adapters folded' in told) == ('of the probe prompts' in told) == (layout == 'llm')
    code = main(['verify', checkpoint, out, '--num', '3', '--max-new-tokens', '3'])
    told = capsys.readouterr()
    assert (code, told.out.splitlines()[-1]) == (0, 'equal'), told
    expected = 'largest difference of features' if layout is None else '3 prompts: largest logit difference'
    assert expected in told.out
    assert 'configuration: `vora_config.gin`' in (pathlib.Path(out) / 'README.md').read_text()
    # It is an export, so it may be replaced; by another layout too.
    assert main(['export', checkpoint, '--to', out, *chosen]) == 2
    assert 'exists already; choose another folder or pass --overwrite' in capsys.readouterr().err
    assert main(['export', checkpoint, '--to', out, *chosen, '--overwrite']) == 0


def test_killed_while_writing(folder, adapted, capsys):
    """kill -9 leaves nothing under the final name, and the next try works and clears up."""
    out = folder / 'out_killed'
    script = f'''
        import os, signal
        from vora_jax.convert.export import to_hf
        from vora_jax.cli.main import main
        stream = to_hf.stream

        def killing(*arguments):
            for number, item in enumerate(stream(*arguments)):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield item

        to_hf.stream = killing
        main(['export', {adapted!r}, '--to', {str(out)!r}])
    '''
    ended = subprocess.run([sys.executable, '-c', textwrap.dedent(script)], capture_output=True, env=dict(os.environ))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists() and list(folder.glob('.out_killed.*'))
    assert main(['export', adapted, '--to', str(out)]) == 0
    assert (out / 'config.json').is_file() and not list(folder.glob('.out_killed.*'))
