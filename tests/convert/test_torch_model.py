"""The PyTorch twin gives the model's logits and answers."""
import ast
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file
from tiny_methods import METHODS
from tiny_models import (
    KINDS,
    make_any,
    make_questions,
    make_tokenizer,
    make_variety,
    prompting,
    rows,
)

from vora_jax import variants
from vora_jax.convert.export.to_hf import TORCH_MODEL, export
from vora_jax.convert.families.own_layout import Prompting, own_config
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.verify.comparison import load_folder, verify
from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.patches import fit_grid, load_pictures, patchify
from vora_jax.llm.generate import greedy
from vora_jax.types import TEXT
from vora_jax.vision.vit import VisionTransformer

torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")

EOS = 3
GOLDEN = pathlib.Path(__file__).parent / 'vora_golden'
# Parts that others in KINDS, `make_variety` and METHODS have too, put together once more.
AGAIN = ('llava', 'llava_lora', 'vora', 'vora_vision', 'kernels_on_patches', 'dual_on_llava')
EVERY_METHOD = [pytest.param(name, marks=pytest.mark.slow) if name in AGAIN else name for name in METHODS]
# Tests compile much and compute little.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('models')


@pytest.fixture(scope='module')
def tokenizer(folder):
    return make_tokenizer(folder)


@pytest.fixture(scope='module')
def exported(folder, tokenizer):
    """kind -> folder, each exported once."""
    made = set()

    def get(kind):
        if kind not in made:
            params, model, rule = make_any(kind)
            export(params, model, prompting(tokenizer), str(folder / kind), rule=rule)
            made.add(kind)
        return str(folder / kind)

    return get


@pytest.fixture(scope='module')
def asked(folder, tokenizer, exported):
    """kind -> (batch of the training code, torch model, its inputs for the same questions, in one padded batch)."""
    def get(kind):
        _, model, rule = make_any(kind)
        questions = make_questions(folder, model.vision is not None)
        batch, = rows(questions, tokenizer, model.vision is not None, rule=rule).batches(len(questions))
        torch_model, theirs = load_folder(exported(kind))
        return batch, torch_model.eval(), torch_model.prepare_inputs(theirs, *texts_and_pictures(questions))

    return get


def texts_and_pictures(questions):
    return ([question.text for question in questions],
            [[PIL.Image.open(image) for image in question.images] for question in questions])


def shipped(torch_model, name):
    """A module of the exported folder."""
    return sys.modules[f'{type(torch_model).__module__.rpartition(".")[0]}.{name}_vora_jax']


@pytest.mark.parametrize('kind', [*KINDS, *make_variety(), *EVERY_METHOD])
def test_logits_of_every_kind_of_model(kind, asked):
    """No, one and two pictures of several sizes, side by side or apart, in a batch that is padded on the left."""
    params, model, _ = make_any(kind)
    batch, torch_model, inputs = asked(kind)
    real = batch.modality > 0
    mask = inputs['attention_mask'].bool().numpy()
    assert not mask.all() and (mask.sum(1) == real.sum(1)).all()
    ids = np.where(batch.modality == TEXT, batch.tokens, torch_model.config.image_token_id)[real]
    np.testing.assert_array_equal(inputs['input_ids'].numpy()[mask], ids)
    hidden = np.asarray(quick_jit(lambda params: model.apply({'params': params}, batch).hidden)(params))
    ours = hidden[real] @ np.asarray(model.unembedding(params))
    with torch.no_grad():
        theirs = torch_model(**inputs).logits.numpy()[mask]
    assert ours.std() > 0.3
    assert np.abs(ours - theirs).max() < 2e-5  # measured 6e-6 at logits up to 4.7


@pytest.mark.parametrize(('state', 'case'), [('pretrain', 'img2_pad'), ('pretrain', 'text_only'),
                                             ('pretrain', 'two_images'), ('merged', 'img2_pad')])
def test_logits_of_the_original_vora_code(state, case):
    """The numbers of test_vora_golden.py, from the original's own tensors: only their names differ from ours."""
    from vora_jax.convert.torch_model.modeling_vora_jax import VoraJaxConfig, VoraJaxForCausalLM
    cases, report = load_file(GOLDEN / 'cases.safetensors'), json.loads((GOLDEN / 'report.json').read_text())
    tensors = load_file(GOLDEN / f'state_{state}.safetensors')
    found = recognise(report['config'], {name: x.shape for name, x in tensors.items()}, teacher_heads=4)
    method = getattr(variants, found.method)(**found.arguments)
    own = own_config(method.stage(found.stage).model, method.vision_tokens, Prompting('', 0))
    config = VoraJaxConfig(**own, image_token_id=-200)
    torch_model = VoraJaxForCausalLM(config).eval()
    torch_model.load_state_dict({re.sub(r'(lora_[AB])', r'\1.0', name.removeprefix('llm.')): torch.from_numpy(x)
                                 for name, x in tensors.items() if not name.startswith('aux_vision.')})
    frames = iter(cases[f'{case}/frames'])
    ids, labels, pixels, grids = [], [], [], []
    for row, mask in enumerate(cases[f'{case}/attention_mask'] > 0):
        row_ids, row_labels = (cases[f'{case}/{name}'][row][mask] for name in ('input_ids', 'labels'))
        repeats = np.where(row_ids == -200, 16, 1)  # of 4 x 4 patches
        ids.append(torch.from_numpy(row_ids.repeat(repeats)).long())
        labels.append(torch.from_numpy(row_labels.repeat(repeats)).long())
        pictures = [patchify(next(frames).transpose(1, 2, 0), 14) for token in row_ids if token == -200]
        pixels.append(torch.from_numpy(np.concatenate([np.zeros((0, 588), np.float32), *pictures])))
        grids.append(torch.full((len(pictures), 2), 4))
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(row) for row in ids])
    with torch.no_grad():
        out = torch_model(pad(ids), mask, pad(pixels), pad(grids), labels=pad(labels, padding_value=-100))
    golden = cases[f'{case}/logits' if state == 'pretrain' else f'{state}/{case}/logits']
    assert np.abs(out.logits.numpy() - golden)[mask.bool().numpy()].max() < 1e-5  # measured 2e-6
    if state == 'pretrain':
        assert abs(out.loss.item() - report['meta'][case]['metrics']['llm_loss']) < 1e-5


@pytest.mark.parametrize('kind', ['clip', 'dino', 'siglip', 'aimv2'])
def test_features_of_an_encoder(kind, asked):
    """All that the encoder computes, also the norm and the pooling that its language model does not read."""
    params, model, _ = make_any(kind)
    batch, torch_model, inputs = asked(kind)
    vit, encoder = model.vision.encoder, params['frontend']['encoder']
    ours = quick_jit(lambda encoder: VisionTransformer(vit).apply({'params': encoder}, batch.patches))(encoder)
    for row, image in np.argwhere(batch.patches.grid[..., 0] > 0):
        place = batch.patches.image_id[row] == image
        pixels = torch.from_numpy(batch.patches.pixels[row][place & (batch.patches.row[row] >= 0)])
        grid = batch.patches.grid[row, image].tolist()
        with torch.no_grad():
            output, blocks, pooled = torch_model.vision_tower(pixels[None], *grid)
        np.testing.assert_allclose(output[0], ours.output[row][place], atol=1e-5)
        np.testing.assert_allclose(blocks[1][0], ours.blocks[1, row][place], atol=1e-5)
        if vit.pool == 'none':
            assert pooled is None
        else:
            np.testing.assert_allclose(pooled[0], ours.pooled[row, image], atol=1e-5)


@pytest.mark.parametrize('kind', ['all', 'merged', *EVERY_METHOD])
def test_verify_finds_nothing(kind, exported, folder, tokenizer):
    """Also the answers to a batch of prompts of different lengths."""
    params, model, rule = make_any(kind)
    questions = make_questions(folder, True)
    batches = rows(questions, tokenizer, True, rule=rule).batches(6)
    found = verify(params, model, exported(kind), questions, batches, eos_id=EOS, rule=rule, max_new_tokens=6,
                   tolerance=1e-4)
    assert found.problems == [] and found.left_out == []
    assert found.num_prompts == found.same_answers + found.near_ties == len(questions)
    assert 0 < found.max_abs_logit_diff < 1e-4  # measured 4e-6 at logits up to 5


def test_answers_are_those_of_our_greedy_generation(asked, folder):
    params, model, _ = make_any('clip')
    batch, torch_model, inputs = asked('clip')
    ours = np.asarray(greedy(model, params, batch, max_new_tokens=6, eos_id=EOS))
    length = inputs['input_ids'].shape[1]
    output = torch_model.generate(**inputs, max_new_tokens=6)[:, length:].numpy()
    for row in range(len(ours)):
        stop = (output[row].tolist() + [EOS]).index(EOS)
        np.testing.assert_array_equal(output[row, :stop], ours[row, :stop])
    beams = torch_model.generate(**inputs, max_new_tokens=4, num_beams=2)  # repeats rows, pictures with them
    assert beams.shape[0] == len(ours)
    _, theirs = load_folder(torch_model.config._name_or_path)
    texts, pictures = texts_and_pictures(make_questions(folder, True))
    single = torch_model.answer(theirs, pictures[4], texts[4], max_new_tokens=6)
    assert single == theirs.decode(output[4], skip_special_tokens=True)
    assert torch_model.answer(theirs, None, texts[0], max_new_tokens=2) is not None


@pytest.mark.parametrize('kind', [*KINDS, *make_variety(), *EVERY_METHOD])
def test_a_cache_changes_nothing(kind, asked):
    _, torch_model, inputs = asked(kind)
    settings = {'max_new_tokens': 5, 'min_new_tokens': 5, 'output_logits': True, 'return_dict_in_generate': True}
    cached, uncached = (torch_model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-5, rtol=0)
    torch.testing.assert_close(cached.sequences, uncached.sequences)


@pytest.mark.parametrize('kind', ['all', 'quirks', 'dino', 'lavin', 'routed'])
def test_padding_side_changes_nothing(kind, asked):
    _, torch_model, inputs = asked(kind)
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


@pytest.mark.parametrize(('dtype', 'tolerance'), [('bfloat16', 0.08), ('float16', 0.012)])
def test_half_precision(dtype, tolerance, asked):
    for kind in ('several', 'dino', 'siglip', 'causal', 'lavin', 'llavit', 'vce_dual_lora'):
        _, torch_model, inputs = asked(kind)
        rounded = torch_model.to(getattr(torch, dtype))
        with torch.no_grad():
            half = rounded(**inputs).logits
            exact = rounded.float()(**inputs).logits  # of the rounded weights
        assert half.dtype == getattr(torch, dtype)
        real = inputs['attention_mask'].bool()
        error = (half.float() - exact)[real].abs().max() / exact[real].abs().max()
        assert error < tolerance  # measured 0.04 and 0.004, on tiny models with large random weights


def test_loss_and_kept_logits(asked):
    _, torch_model, inputs = asked('clip')
    labels = inputs['input_ids'].masked_fill(inputs['attention_mask'] == 0, -100)
    with torch.no_grad():
        out = torch_model(**inputs, labels=labels)
        kept = torch_model(**inputs, logits_to_keep=3).logits
        some = torch_model(**inputs, logits_to_keep=torch.tensor([0, 7])).logits
    torch.testing.assert_close(kept, out.logits[:, -3:])
    torch.testing.assert_close(some, out.logits[:, [0, 7]])
    labels = labels.masked_fill(labels == torch_model.config.image_token_id, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, loss)


def test_what_depends_on_the_batch_is_compared_one_by_one(folder, tokenizer):
    params, model, rule = make_any('lavin')
    table, = model.vision.mixtures
    quirk = ((table[0], dataclasses.replace(table[1], route_by='first_row')),)
    model = model.clone(vision=dataclasses.replace(model.vision, mixtures=quirk))
    done = export(params, model, prompting(tokenizer), str(folder / 'first_row'), rule=rule)
    assert 'routes each prompt by itself' in done.notes[1]
    questions = make_questions(folder, True)[1:5]
    batches = rows(questions, tokenizer, True, rule=rule).batches(4)
    found = verify(params, model, str(folder / 'first_row'), questions, batches, eos_id=EOS, rule=rule, max_new_tokens=3,
                   tolerance=1e-4)
    assert found.problems == [] and found.num_prompts == found.same_answers + found.near_ties == 4
    assert len(found.left_out) == 1 and 'each prompt is a batch of its own' in found.left_out[0]


def test_the_slot_that_routes(asked):
    """It is the first behind padding, knows of pictures, is seen by no other slot, and survives beams."""
    _, torch_model, inputs = asked('lavin')
    ids, mask = inputs['input_ids'], inputs['attention_mask']
    first = mask.argmax(1)
    assert (ids[torch.arange(len(ids)), first] == torch_model.config.route_token_id).all()
    with torch.no_grad():
        logits = torch_model(**inputs, labels=ids).logits
        vectors = torch_model.modality_embedding.weight
        vectors += torch.tensor([[0.0], [1.0]])
        changed = (torch_model(**inputs).logits != logits).any(-1)
        vectors -= torch.tensor([[0.0], [1.0]])
    with_pictures = (inputs['image_grid'].sum((1, 2)) > 0)
    assert changed[with_pictures].sum(1).gt(1).all() and not changed[~with_pictures].any()
    beams = [torch_model.generate(**inputs, max_new_tokens=3, num_beams=2, use_cache=use) for use in (True, False)]
    torch.testing.assert_close(*beams)
    with pytest.raises(ValueError, match='does not begin with route_token_id'):
        torch_model(ids[:, 1:], mask[:, 1:])


def test_it_can_be_trained_further(exported):
    torch_model, theirs = load_folder(exported('all'))
    inputs = torch_model.prepare_inputs(theirs, ['is it red?'], [PIL.Image.new('RGB', (12, 16), 'red')])
    torch_model.train()(**inputs, labels=inputs['input_ids']).loss.backward()
    weights = dict(torch_model.named_parameters())
    assert {name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()} == set()


def test_misuse_is_told(exported):
    torch_model, theirs = load_folder(exported('all'))
    picture = PIL.Image.new('RGB', (8, 8))
    with pytest.raises(ValueError, match='1 images do not fit the question'):
        torch_model.prepare_inputs(theirs, ['<image><image>?'], [picture])
    inputs = torch_model.prepare_inputs(theirs, ['what?'], [picture])
    with pytest.raises(ValueError, match=r'image_grid makes \[6\] slots of pictures a row, input_ids \[4\]'):
        torch_model(**inputs | {'image_grid': torch.tensor([[[2, 3]]])})
    blind, text = load_folder(exported('text_only'))
    with pytest.raises(ValueError, match='1 images do not fit'):
        blind.prepare_inputs(text, ['what?'], [picture])


POLICIES = [ImagePolicy(24), ImagePolicy(40, 20), ImagePolicy(kind='square_pad', side=12, color=(9, 99, 200)),
            ImagePolicy(kind='square_crop', side=12), ImagePolicy(kind='square_stretch', side=12)]


@pytest.mark.parametrize('policy', POLICIES)
def test_pictures_are_read_as_in_training(policy, exported, tmp_path):
    code = shipped(load_folder(exported('all'))[0], 'processing')
    rng = np.random.default_rng(0)
    pictures = {mode: PIL.Image.fromarray(rng.integers(0, 256, (19, 33, bands), np.uint8).squeeze(), mode)
                for mode, bands in (('RGB', 3), ('RGBA', 4), ('L', 1), ('LA', 2))}
    pictures['P'] = pictures['RGB'].convert('P')
    pictures['I;16'] = PIL.Image.fromarray(rng.integers(0, 65536, (19, 33)).astype(np.uint16))
    pictures['square'], pictures['small'] = pictures['RGB'].resize((12, 12)), pictures['RGB'].resize((3, 5))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    for mode, picture in pictures.items():
        file = str(tmp_path / f'{mode.replace(";", "")}.png')
        picture.save(file, exif=turned)
        ours, = load_pictures(file, 4, policy)
        patches, grid = code.to_patches(PIL.Image.open(file), 4, dataclasses.asdict(policy))
        assert grid == (ours.rows, ours.cols), mode
        np.testing.assert_array_equal(patches.numpy(), ours.pixels, mode)


def test_grids_are_those_of_training(exported):
    code, rng = shipped(load_folder(exported('all'))[0], 'processing'), np.random.default_rng(0)
    for _ in range(3000):
        height, width, size, least = (int(x) for x in rng.integers(1, (900, 900, 33, 20)))
        most = least + int(rng.integers(0, 300))
        assert code.fit_grid(height, width, size, least, most) == fit_grid(height, width, size, ImagePolicy(most, least))


@pytest.mark.parametrize('name', ['my export, v1.0 (\u00fc) + 2', '0.5', 'a.b-c'])
def test_a_folder_of_any_name_loads(name, exported, tmp_path, monkeypatch):
    shutil.copytree(exported('text_only'), tmp_path / name)
    monkeypatch.chdir(tmp_path / name)
    for path in (str(tmp_path / name), f'{tmp_path / name}/', '.'):
        torch_model, theirs = load_folder(path)
        assert torch_model.answer(theirs, None, 'what?', max_new_tokens=2) is not None


@pytest.mark.parametrize('kind', ['dino', 'llama'])
def test_saved_again_it_is_complete(kind, exported, tmp_path):
    torch_model, theirs = load_folder(exported(kind))
    torch_model.resize_token_embeddings(310)
    for part in (torch_model, theirs):
        part.save_pretrained(tmp_path)
    again, _ = load_folder(str(tmp_path))
    assert again.lm_head.weight.shape[0] == again.model.embed_tokens.weight.shape[0] == again.config.vocab_size == 310
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (kind == 'llama')
    for name, tensor in torch_model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_the_shipped_files_need_torch_transformers_and_pillow_only():
    for file in TORCH_MODEL.glob('*_vora_jax.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            assert {name.partition('.')[0] for name in names} <= {
                'torch', 'transformers', 'numpy', 'PIL', *sys.stdlib_module_names}, file
    assert len(list(TORCH_MODEL.glob('*_vora_jax.py'))) == len(list(pathlib.Path(TORCH_MODEL).glob('*.py'))) - 1
