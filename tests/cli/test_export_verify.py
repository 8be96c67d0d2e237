"""`vora merge`, `export` and `verify` on tiny checkpoints."""
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pictures

from vora_jax.cli import gin_config
from vora_jax.cli.main import main
from vora_jax.convert.exportable import smallest_batch
from vora_jax.params import flatten, unflatten
from vora_jax.training.checkpoint import open_checkpoint, write_checkpoint

TAGGER = '\n'.join(line for line in tiny_pictures.CONFIG.replace('@vora()', '@image_tagger()').splitlines()
                   if not line.startswith(('LanguageModel', 'vora'))) + '\nimage_tagger.vocab_size = 300\n'


def write(folder: pathlib.Path, name: str, config_text: str) -> str:
    """A checkpoint of random weights; adapters are random too."""
    config, text = tiny_pictures.config(folder, config_text)
    model = config.method.stage(config.stage).model
    rng = np.random.default_rng(0)
    if hasattr(model, 'llm'):
        shapes = flatten(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), smallest_batch(model))['params']))
    else:
        shapes = {'head': jnp.zeros((12, 300))}
    params = unflatten({path: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32)
                        for path, leaf in shapes.items()})
    write_checkpoint(folder / name, params, text, str(folder / 'tokenizer'), origin='test')
    return str(folder / name)


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
    assert '14 adapters folded' in told and 'largest change of a weight' in told and 'layer' in told
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
    vision = write(folder, 'vision', tiny_pictures.CONFIG + "vora.scope = 'vision'\n")
    for arguments, message in (
        (['export', tagger, '--to', str(folder / 'no')], 'does not generate text'),
        (['export', str(folder / 'nothing'), '--to', str(folder / 'no')], 'nothing does not exist'),
        (['export', adapted, '--to', str(folder / 'images')], 'exists already'),
        (['verify', adapted, str(folder / 'images')], 'is not a folder that `vora export` wrote'),
        (['verify', adapted, str(folder / 'images'), '--num', '0'], '--num is 0'),
        (['verify', adapted, str(folder / 'images'), '--data', str(folder / 'gone.jsonl')], 'gone.jsonl'),
        (['merge', text, '--to', str(folder / 'no')], "'pretrain' of language_model, which has nothing to merge"),
        (['merge', vision, '--to', str(folder / 'no')], "scope 'vision' cannot be folded"),
        (['merge', adapted, '--to', adapted], 'already holds a run'),
    ):
        assert main(arguments) == 2, arguments
        told = capsys.readouterr()
        assert message in told.err and told.err.startswith('vora: ') and told.err.count('\n') == 1, told.err
    assert not (folder / 'no').exists()
