"""What `verify` must find."""
import json
import sys

import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_model, make_questions, make_tokenizer, prompting, rows

from vora_jax.convert.export.to_hf import export, read_record
from vora_jax.convert.verify.comparison import load_folder, verify
from vora_jax.types import UserError

EOS = 3


@pytest.fixture
def made(tmp_path):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    tokenizer = make_tokenizer(tmp_path)
    params, model = make_model('merged')
    export(params, model, prompting(tokenizer), str(tmp_path / 'out'))
    questions = make_questions(tmp_path, True)[:3]
    return params, model, tmp_path / 'out', questions, rows(questions, tokenizer, True)


def run(made, **settings):
    params, model, folder, questions, batches = made
    return verify(params, model, str(folder), questions, batches.batches(3), eos_id=EOS, max_new_tokens=3, **settings)


def change_weights(folder, change):
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def test_one_changed_bit(made):
    def change(tensors):
        tensors['model.norm.weight'].view('int32')[0] ^= 1

    change_weights(made[2], change)
    found = run(made)
    assert found.problems == ['tensors that differ (1): model.norm.weight']
    assert found.worst_tensor == 'model.norm.weight' and 0 < found.max_abs_tensor_diff < 1e-6


def test_a_missing_tensor(made):
    change_weights(made[2], lambda tensors: tensors.pop('model.norm.weight'))
    found = run(made)
    assert found.problems == ['tensors that are not in the folder (1): model.norm.weight']
    assert 'logits were not compared' in found.left_out[0]


def test_other_code(made):
    # transformers keeps the modules of a folder by its name; an earlier test has loaded one called `out`.
    folder = made[2].rename(made[2].with_name('other_code'))
    made, code = (*made[:2], folder, *made[3:]), folder / 'modeling_vora_jax.py'
    changed = code.read_text().replace("exponents = torch.arange(0", "exponents = 0.5 + torch.arange(0")
    assert changed != code.read_text()
    code.write_text(changed)
    found = run(made)
    assert any('logits' in problem for problem in found.problems) and found.max_abs_logit_diff > 1e-3
    assert found.worst.startswith("'")


def test_other_tokens_and_other_pictures(made):
    config = json.loads((made[2] / 'config.json').read_text())
    config['image_policy']['max_patches'] = 6
    (made[2] / 'config.json').write_text(json.dumps(config))
    template = made[2] / 'chat_template.jinja'
    assert run(made).problems == ["'what is this?' becomes other token ids or other pixels"]
    template.write_text(template.read_text().replace('assistant', 'model'))
    assert len(run(made).problems) == 3


def test_bfloat16_is_held_to_the_same_tolerance(made, tmp_path):
    params, model, folder, *_ = made
    export(params, model, prompting(str(tmp_path / 'tokenizer')), str(folder), dtype='bfloat16', overwrite=True)
    found = run(made)
    assert (found.problems, found.dtype) == ([], 'bfloat16')


def test_no_export(tmp_path):
    pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    with pytest.raises(UserError, match='is not a folder that `vora export` wrote'):
        load_folder(str(tmp_path))


@pytest.mark.parametrize('record', ['{}', '[]', '{"layout": "gone", "merged": false, "dtype": "float32", "base": ""}'])
def test_a_damaged_record(tmp_path, record):
    (tmp_path / 'vora_export.json').write_text(record)
    with pytest.raises(UserError, match='not as `vora export` writes it'):
        read_record(tmp_path)


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(UserError, match=r"install them with pip install 'vora_jax\[torch\]'"):
        load_folder(str(tmp_path))
    tokenizer, (params, model) = make_tokenizer(tmp_path), make_model('text_only')
    export(params, model, prompting(tokenizer), str(tmp_path / 'out'))
    found = verify(params, model, str(tmp_path / 'out'), [], [], eos_id=EOS)
    assert found.problems == [] and found.tensors == 29 and 'only tensors were compared' in found.left_out[0]
