"""The original VoRA code's numbers, from its own weights.

Computed once by Hon-Wong/VoRA at f138756 (torch 2.13, transformers 4.50.3, CPU, float32) on tiny random weights. Left out
on purpose: what padding slots see (there they see all real keys, here none) and compute. `adjacent` has pictures with no
text between them, `small_wide` pictures of 2 x 6 patches: both show a quirk each.
"""
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_model import quick_jit

from vora_jax import variants
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.names.name_map import Table, from_foreign, to_foreign
from vora_jax.data.images.patches import patchify
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.llm.decoder import Decoder
from vora_jax.merge import merge
from vora_jax.method import Method, Stage
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import LayerGroup, Tap
from vora_jax.ops.key_range import dense_mask
from vora_jax.params import combine, flatten, partition, unflatten
from vora_jax.training.losses import objective, totals
from vora_jax.types import Params

HERE = pathlib.Path(__file__).parent / 'vora_golden'
IMAGE, IGNORED, PATCH = -200, -100, 14
MAX_PATCHES = 3 * 4 * 4  # in a row of any case
CASES = ('img2_pad', 'text_only', 'two_images', 'adjacent', 'small_wide')
# The teacher's number of heads stands in its own config.json, which a VoRA checkpoint does not hold.
TEACHER_HEADS = 4


class Imported(NamedTuple):
    method: Method
    stage: Stage
    model: VisionLanguageModel
    params: Params
    table: Table


@pytest.fixture(scope='module')
def golden():
    return load_file(HERE / 'cases.safetensors'), json.loads((HERE / 'report.json').read_text())


@pytest.fixture(scope='module')
def imported(golden):
    """Both checkpoints, recognised by their tensors."""
    states = {}
    for state in ('state_pretrain', 'state_merged'):
        tensors = load_file(HERE / f'{state}.safetensors')
        found = recognise(golden[1]['config'], {name: x.shape for name, x in tensors.items()}, teacher_heads=TEACHER_HEADS)
        method = getattr(variants, found.method)(**found.arguments)
        stage = method.stage(found.stage)
        params = unflatten(from_foreign(tensors, parameter_shapes(stage.model), found.table))
        states[state] = Imported(method, stage, stage.model, params, found.table)
    return states


def batch_of(case, cases, rule, padded=False):
    """The case's samples as rows of our own packing, at the case's length or at that of all cases."""
    ids, labels, mask = (cases[f'{case}/{name}'] for name in ('input_ids', 'labels', 'attention_mask'))
    grid = tuple(side // PATCH for side in cases[f'{case}/frames'].shape[2:])
    frames, rows, length = iter(cases[f'{case}/frames']), [], cases[f'{case}/targets'].shape[1]
    if padded:
        length = max(cases[f'{name}/targets'].shape[1] for name in CASES)
    patches = MAX_PATCHES if padded else 3 * grid[0] * grid[1]
    budgets = Budgets(length, patches, 3, 3 * PATCH**2, 'float32')
    for row in range(len(ids)):
        segment = []
        for token, label in zip(ids[row][mask[row] > 0].tolist(), labels[row][mask[row] > 0].tolist()):
            if token == IMAGE:
                pixels = patchify(next(frames).transpose(1, 2, 0), PATCH)
                segment.append(Picture(pixels, *grid))
            else:
                segment.append(Text([token], label != IGNORED))
        rows.append(layout([segment], budgets, rule=rule))
    return stack(rows)


@pytest.mark.parametrize('case', CASES)
def test_masks_and_targets(case, golden, imported):
    cases, method = golden[0], imported['state_pretrain'].method
    batch = batch_of(case, cases, method.vision_tokens)
    length, real = batch.tokens.shape[1], batch.modality > 0
    allowed = np.unpackbits(cases[f'{case}/allowed'], axis=-1, count=length).astype(bool)
    np.testing.assert_array_equal(np.asarray(dense_mask(batch.key_range, length))[real], allowed[real])
    shifted = np.where(batch.loss_mask > 0, batch.targets, IGNORED)[:, :-1]
    np.testing.assert_array_equal(shifted, cases[f'{case}/targets'][:, 1:])


@pytest.fixture(scope='module')
def states(imported):
    """Compiled (params, batch) -> embeddings, states leaving each layer, hidden, logits."""
    model = imported['state_pretrain'].model
    groups = tuple(LayerGroup(group.num_layers, group.adapters, True, group.biases) for group in model.groups)

    @quick_jit
    def run(params, batch):
        x = model.apply({'params': params}, batch, method='embed')
        hidden, _, leaving = Decoder(model.llm, groups, lambda: Tap(name='tap')).apply(
            {'params': params['decoder']}, x, batch.positions, SlotContext(batch.key_range, batch.modality), None, ())
        return x, leaving, hidden, hidden @ model.unembedding(params)

    return run


@pytest.mark.parametrize('case', CASES)
def test_hidden_states_and_logits(case, golden, imported, states):
    cases, state = golden[0], imported['state_pretrain']
    batch = batch_of(case, cases, state.method.vision_tokens, padded=True)
    length = cases[f'{case}/targets'].shape[1]
    real = batch.modality[:, :length] > 0
    assert not batch.modality[:, length:].any()
    x, leaving, hidden, logits = (np.asarray(value)[..., :length, :] for value in states(state.params, batch))
    for index, ours in enumerate((x, *leaving[:-1], hidden)):
        theirs = cases[f'{case}/hidden_{index}']
        assert np.max(np.abs(ours - theirs)[real]) <= 1e-5, index  # measured: 3e-6
    assert np.max(np.abs(logits - cases[f'{case}/logits'])[real]) <= 1e-5


@pytest.fixture(scope='module')
def losses(imported):
    """Compiled (trainable, frozen, batch) -> (loss, its parts), gradients."""
    state = imported['state_pretrain']

    def loss(trainable, frozen, batch):
        return objective(state.model, combine(frozen, trainable), batch, totals(batch), state.stage.distill_weight)

    return quick_jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('case', CASES)
def test_losses_and_gradients(case, golden, imported, losses):
    (cases, report), state = golden, imported['state_pretrain']
    batch, metrics = batch_of(case, cases, state.method.vision_tokens, padded=True), report['meta'][case]['metrics']
    trainable, frozen = partition(state.params, state.stage.trainable)
    (total, parts), gradients = losses(trainable, frozen, batch)
    np.testing.assert_allclose(parts['lm_loss'], metrics['llm_loss'], rtol=0, atol=1e-5)
    np.testing.assert_allclose(total, metrics['total_loss'], rtol=0, atol=1e-5)
    for layer, value in enumerate(np.asarray(parts['distill_layers'])):
        np.testing.assert_allclose(value, metrics[f'loss_aux_layer_{layer}'], rtol=0, atol=1e-5)

    expected = {key.partition('/grad/')[2]: x for key, x in cases.items() if key.startswith(f'{case}/grad/')}
    if not expected:
        return
    everywhere = flatten(state.params) | flatten(gradients)
    shapes = {path: leaf.shape for path, leaf in everywhere.items()}
    ours = dict(to_foreign(everywhere, shapes, state.table))
    assert set(report['trainable_pretrain']) >= set(expected)
    for name in report['trainable_pretrain']:
        if name not in expected:  # text only: the original has no gradient at all there
            assert not ours[name].any(), name
            continue
        scale = np.max(np.abs(expected[name]))
        assert np.max(np.abs(ours[name] - expected[name])) <= 1e-4 * scale, name


def test_what_is_trained_is_what_the_original_trains(golden, imported):
    state = imported['state_pretrain']
    trained = flatten(partition(state.params, state.stage.trainable)[0])
    assert sum(leaf.size for leaf in trained.values()) == 67296
    flat = flatten(state.params)
    marked = {path: np.full(leaf.shape, path in trained) for path, leaf in flat.items()}
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    names = [name for name, array in to_foreign(marked, shapes, state.table) if array.all()]
    assert sorted(names) == sorted(golden[1]['trainable_pretrain'])


def test_the_merged_checkpoint(golden, imported):
    cases, state = golden[0], imported['state_merged']
    assert not any('/adapter_' in path for path in flatten(state.params))
    batch = batch_of('img2_pad', cases, state.method.vision_tokens)

    def logits(params):
        return state.model.apply({'params': params}, batch).hidden @ state.model.unembedding(params)

    ours = np.asarray(quick_jit(logits)(state.params))
    assert np.max(np.abs(ours - cases['merged/img2_pad/logits'])[batch.modality > 0]) <= 1e-5


def test_merging_here_equals_merging_there(golden, imported):
    pretrain, theirs = imported['state_pretrain'], flatten(imported['state_merged'].params)
    merged, model = merge(pretrain.params, pretrain.model)
    assert model == imported['state_merged'].model
    for path, array in flatten(merged).items():
        np.testing.assert_allclose(array, theirs[path], rtol=0, atol=1e-6, err_msg=path)
