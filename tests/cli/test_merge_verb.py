"""`vora merge` of scopes that become kernels, and its refusals."""
import numpy as np
import tiny_pictures
from export_checkpoints import write

from vora_jax.cli import gin_config
from vora_jax.cli.main import main
from vora_jax.merge import merge
from vora_jax.nn.block import LINEARS
from vora_jax.params import flatten
from vora_jax.training.checkpoints.checkpoint import open_checkpoint


def test_the_command_merges_a_vision_scope(tmp_path, capsys):
    folder = tiny_pictures.make(tmp_path)
    checkpoint = write(folder, 'vision', tiny_pictures.CONFIG + "vora.scope = 'vision'\n")
    assert main(['merge', checkpoint, '--to', str(folder / 'merged')]) == 0
    assert '14 adapters folded' in capsys.readouterr().out
    before, after = open_checkpoint(checkpoint), open_checkpoint(str(folder / 'merged'))
    config, _ = gin_config.load('Train', texts=[after.config_text])
    assert config.stage == 'finetune'
    stage = config.method.stage('pretrain')
    expected, model = merge(before.params, stage.model)
    assert model == config.method.stage('finetune').model
    assert {path.split('/')[-3] for path in flatten(after.params) if '/adapter_0/' in path} == set(LINEARS)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(after.params)[path], leaf, err_msg=path)


def test_the_command_tells_why_it_cannot(tmp_path, capsys):
    folder = tiny_pictures.make(tmp_path)
    for name, text, message in (
        ('dual', 'vora.adapter = @DualLowRank()\n', 'DualLowRank multiplies'),
        ('words', "vora.scope = 'text'\n", "scope 'text' cannot be folded"),
    ):
        checkpoint = write(folder, name, tiny_pictures.CONFIG + text)
        assert main(['merge', checkpoint, '--to', str(folder / 'no')]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count('\n') == 1 and not (folder / 'no').exists()
