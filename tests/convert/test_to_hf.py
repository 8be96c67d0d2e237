"""Exported folders: complete, atomic, honest errors."""
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import make_model, make_tokenizer, prompting

from vora_jax.convert.export.exportable import exportable
from vora_jax.convert.export.to_hf import Provenance, export
from vora_jax.convert.families.own_names import OWN
from vora_jax.convert.names.name_map import from_foreign
from vora_jax.types import UserError
from vora_jax.vision.token_classifier import TokenClassifier
from vora_jax.vision.vit import Vit


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


def test_the_folder_is_complete_and_holds_the_weights(tmp_path, tokenizer):
    params, model = make_model('all')
    provenance = Provenance('vora', 'pretrain', 7, ('runs/base',), 'abc123', ('data/a.jsonl',), 'Train.steps = 7')
    done = export(params, model, prompting(tokenizer, system='be brief'), str(tmp_path / 'out'), provenance=provenance)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'README.md', 'adapters_vora_jax.py', 'block_vora_jax.py', 'chat_template.jinja', 'config.json',
        'configuration_vora_jax.py', 'generation_config.json', 'model.safetensors', 'modeling_vora_jax.py',
        'processing_vora_jax.py', 'special_tokens_map.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json',
        'vision_vora_jax.py', 'vora_config.gin', 'vora_export.json']
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert done.dropped == ('the distillation heads', 'the teacher')
    tensors = load_file(tmp_path / 'out' / 'model.safetensors')
    what = exportable(params, model)
    assert (done.num_tensors, done.num_bytes) == (len(tensors), sum(x.nbytes for x in tensors.values()))
    assert done.num_parameters == sum(x.size for x in what.params.values())
    for path, leaf in from_foreign(tensors, what.shapes, OWN).items():
        np.testing.assert_array_equal(leaf, what.params[path])
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['image_policy']['max_patches'] == 24
    card = (tmp_path / 'out' / 'README.md').read_text()
    for line in ("print(model.answer(tokenizer, Image.open('picture.png'), 'your question'))", '- runs/base',
                 '- method: vora', '- hash of the data: abc123', '- data: data/a.jsonl', '- step: 7',
                 '- configuration: `vora_config.gin`'):
        assert line in card.splitlines(), card
    assert (tmp_path / 'out' / 'vora_config.gin').read_text() == 'Train.steps = 7'
    assert set(done.seconds) == {'check', 'tokenizer', 'weights', 'report', 'finish'}


def test_shards_and_dtype(tmp_path, tokenizer):
    params, model = make_model('text_only')
    export(params, model, prompting(tokenizer), str(tmp_path / 'out'), dtype='bfloat16', max_shard_bytes=6000)
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    files = sorted(set(index['weight_map'].values()))
    assert len(files) > 2 and files == sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
    tensors = {name: x for file in files for name, x in load_file(tmp_path / 'out' / file).items()}
    assert tensors.keys() == index['weight_map'].keys()
    assert index['metadata']['total_size'] == sum(x.nbytes for x in tensors.values())
    assert {str(x.dtype) for x in tensors.values()} == {'bfloat16'}


def test_an_existing_folder_is_kept(tmp_path, tokenizer):
    params, model = make_model('text_only')
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'mine.txt').write_text('mine')
    with pytest.raises(UserError, match='out exists already; choose another folder or pass --overwrite'):
        export(params, model, prompting(tokenizer), str(out))
    with pytest.raises(UserError, match='is no export of vora_jax, so it is not overwritten'):
        export(params, model, prompting(tokenizer), str(out), overwrite=True)
    assert (out / 'mine.txt').read_text() == 'mine'


def test_an_earlier_export_is_replaced_on_request(tmp_path, tokenizer):
    params, model = make_model('text_only')
    export(params, model, prompting(tokenizer), str(tmp_path / 'out'))
    (tmp_path / 'out' / 'old.txt').write_text('')
    export(params, model, prompting(tokenizer), str(tmp_path / 'out'), overwrite=True)
    assert not (tmp_path / 'out' / 'old.txt').exists() and len(list(tmp_path.iterdir())) == 1


def test_a_failed_export_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    params, model = make_model('text_only')

    def full(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr('vora_jax.convert.export.to_hf.write_shards', full)
    with pytest.raises(KeyboardInterrupt):
        export(params, model, prompting(tokenizer), str(tmp_path / 'out'))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told(tmp_path, tokenizer):
    params, model = make_model('text_only')
    with pytest.raises(UserError, match='a TokenClassifier does not generate text, so it has no layout `own`'):
        export(params, TokenClassifier(Vit(), 300), prompting(tokenizer), str(tmp_path / 'out'), layout='own')
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        export(params, model, prompting(tokenizer), str(tmp_path / 'out'), dtype='int8')
    with pytest.raises(UserError, match='the checkpoint does not fit the model: it misses decoder/norm/scale'):
        export({'decoder': {k: v for k, v in params['decoder'].items() if k != 'norm'}}, model, prompting(tokenizer),
               str(tmp_path / 'out'))
    with pytest.raises(UserError, match='holds no tokenizer.model, tokenizer.json'):
        export(params, model, prompting(str(tmp_path)), str(tmp_path / 'out'))
    assert list(tmp_path.iterdir()) == []
