"""The PyTorch twin gives the model's logits and answers."""
import dataclasses
import sys

import numpy as np
import PIL.Image
import pytest
from tiny_models import (
    KINDS,
    make_model,
    make_questions,
    make_tokenizer,
    prompting,
    rows,
)

from vora_jax.convert.to_hf import export
from vora_jax.convert.verify import load_folder, verify
from vora_jax.data.config import ImagePolicy
from vora_jax.data.image import fit_grid, load_picture
from vora_jax.llm.generate import greedy

torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")

EOS = 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('models')


@pytest.fixture(scope='module')
def tokenizer(folder):
    return make_tokenizer(folder)


@pytest.fixture(scope='module')
def exported(folder, tokenizer):
    """kind -> (params, model, folder), each exported once."""
    made = {}

    def get(kind):
        if kind not in made:
            params, model = make_model(kind)
            export(params, model, prompting(tokenizer), str(folder / kind))
            made[kind] = params, model, str(folder / kind)
        return made[kind]

    return get


@pytest.mark.parametrize('kind', KINDS)
def test_tensors_logits_and_answers_agree(kind, exported, folder, tokenizer):
    params, model, out = exported(kind)
    questions = make_questions(folder, model.vision is not None)
    batches = rows(questions, tokenizer, model.vision is not None).batches(4)
    found = verify(params, model, out, questions, batches, eos_id=EOS, max_new_tokens=6, tolerance=1e-4)
    assert found.problems == []
    assert found.num_prompts == found.same_answers + found.near_ties == len(questions)
    assert 0 < found.max_abs_logit_diff < 1e-4  # measured 4e-6 at logits up to 5


def test_answers_are_those_of_our_greedy_generation(exported, folder, tokenizer):
    params, model, out = exported('vision')
    questions = make_questions(folder, True)
    batch, = rows(questions, tokenizer, True).batches(len(questions))
    ours = np.asarray(greedy(model, params, batch, max_new_tokens=6, eos_id=EOS))
    torch_model, theirs = load_folder(out)
    pictures = [[PIL.Image.open(image) for image in question.images] for question in questions]
    texts = [question.text for question in questions]
    inputs = torch_model.prepare_inputs(theirs, texts, pictures)
    assert not inputs['attention_mask'][0, 0]  # the batch is padded
    output = torch_model.generate(**inputs, max_new_tokens=6)[:, inputs['input_ids'].shape[1]:].numpy()
    for row in range(len(questions)):
        stop = (output[row].tolist() + [EOS]).index(EOS)
        np.testing.assert_array_equal(output[row, :stop], ours[row, :stop])
    uncached = torch_model.generate(**inputs, max_new_tokens=6, use_cache=False)[:, inputs['input_ids'].shape[1]:]
    np.testing.assert_array_equal(uncached, output)
    beams = torch_model.generate(**inputs, max_new_tokens=4, num_beams=2)  # repeats rows, pictures with them
    assert beams.shape[0] == len(questions)
    single = torch_model.answer(theirs, pictures[4], texts[4], max_new_tokens=6)
    assert single == theirs.decode(output[4], skip_special_tokens=True)
    assert torch_model.answer(theirs, None, texts[0], max_new_tokens=2) is not None


def test_padding_side_changes_nothing(exported, folder, tokenizer):
    torch_model, theirs = load_folder(exported('all')[2])
    questions = make_questions(folder, True)[2:4]
    pictures = [PIL.Image.open(question.images[0]) for question in questions]
    inputs = torch_model.prepare_inputs(theirs, [question.text for question in questions], pictures)
    with torch.no_grad():
        left = torch_model(**inputs).logits
        for row, mask in enumerate(inputs['attention_mask']):
            shift = -int((mask == 0).sum())
            for name in ('input_ids', 'attention_mask'):
                inputs[name][row] = inputs[name][row].roll(shift)
            left[row] = left[row].roll(shift, 0)
        right = torch_model(**inputs).logits
    real = inputs['attention_mask'].bool()
    torch.testing.assert_close(right[real], left[real], atol=1e-5, rtol=0)


def test_it_can_be_trained_further(exported, folder):
    torch_model, theirs = load_folder(exported('all')[2])
    inputs = torch_model.prepare_inputs(theirs, ['is it red?'], [PIL.Image.new('RGB', (12, 16), 'red')])
    torch_model(**inputs, labels=inputs['input_ids']).loss.backward()
    weights = dict(torch_model.named_parameters())
    assert {name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()} == set()


def test_misuse_is_told(exported):
    torch_model, theirs = load_folder(exported('all')[2])
    picture = PIL.Image.new('RGB', (8, 8))
    with pytest.raises(ValueError, match='1 images do not fit the question'):
        torch_model.prepare_inputs(theirs, ['<image><image>?'], [picture])
    inputs = torch_model.prepare_inputs(theirs, ['what?'], [picture])
    with pytest.raises(ValueError, match=r'image_grid has \[6\] patches a row, input_ids \[4\]'):
        torch_model(**inputs | {'image_grid': torch.tensor([[[2, 3]]])})
    blind, text = load_folder(exported('text_only')[2])
    with pytest.raises(ValueError, match='1 images do not fit'):
        blind.prepare_inputs(text, ['what?'], [picture])


def test_pictures_are_read_as_in_training(exported, tmp_path):
    torch_model, _ = load_folder(exported('all')[2])
    code = sys.modules[type(torch_model).__module__]
    rng = np.random.default_rng(0)
    pictures = {mode: PIL.Image.fromarray(rng.integers(0, 256, (19, 33, bands), np.uint8).squeeze(), mode)
                for mode, bands in (('RGB', 3), ('RGBA', 4), ('L', 1), ('LA', 2))}
    pictures['P'] = pictures['RGB'].convert('P')
    pictures['I;16'] = PIL.Image.fromarray(rng.integers(0, 65536, (19, 33)).astype(np.uint16))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    for mode, picture in pictures.items():
        file = str(tmp_path / f'{mode.replace(";", "")}.png')
        picture.save(file, exif=turned)
        ours = load_picture(file, 4, ImagePolicy(24))
        patches, grid = code.to_patches(PIL.Image.open(file), torch_model.config.vision)
        assert grid == (ours.rows, ours.cols), mode
        np.testing.assert_array_equal(patches.numpy(), ours.pixels, mode)
    for _ in range(3000):
        height, width, size, least = (int(x) for x in rng.integers(1, (900, 900, 33, 20)))
        most = least + int(rng.integers(0, 300))
        assert code.fit_grid(height, width, size, least, most) == fit_grid(height, width, size, ImagePolicy(most, least))


def test_a_model_with_another_setting_is_caught(exported, folder, tokenizer):
    params, model, out = exported('merged')
    other = model.clone(llm=dataclasses.replace(model.llm, rope_theta=9000.0))
    questions = make_questions(folder, True)
    batches = rows(questions, tokenizer, True).batches(8)
    found = verify(params, other, out, questions, batches, eos_id=EOS, max_new_tokens=2)
    assert any('differ by' in problem for problem in found.problems)
