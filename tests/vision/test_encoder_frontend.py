"""Encoder front ends: selection, fusion, projector, numbering."""
import dataclasses
import math

import numpy as np
import pytest
from tiny_methods import CLS, ENCODER
from tiny_model import TEACHER, quick_jit, random_params, strict  # noqa: F401

from vora_jax.data.packing import Budgets, Picture, layout, stack
from vora_jax.method import VisionTokenRule
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.ops.attention import attention
from vora_jax.types import UserError
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.vit import VisionTransformer

BUDGETS = Budgets(slots=70, patches=26, images=4, patch_dim=CLS.patch_size**2 * 3)
GRIDS = [[(2, 3), (3, 4), (1, 1)], [(1, 2)]]
WIDTH = 7


def packed(rule):
    """(batch, its pictures as (row, number, rows, cols, first place))."""
    rng, pictures, rows = np.random.default_rng(0), [], []
    for row, grids in enumerate(GRIDS):
        place, parts = 0, []
        for number, (height, width) in enumerate(grids):
            pixels = rng.integers(0, 256, (height * width, BUDGETS.patch_dim)).astype(np.uint8)
            parts.append(Picture(pixels, height, width))
            pictures.append((row, number, height, width, place))
            place += rule.num_places(height, width)
        rows.append(layout([parts], BUDGETS, rule=rule))
    return stack(rows), pictures


def project(params, projector, x):
    """One vector through the projector, in float64."""
    for layer in range(projector.num_layers):
        if layer:
            x = np.array([v / (1 + math.exp(-v)) if projector.activation == 'silu' else v * 0.5 * (1 + math.erf(v / 2**0.5))
                          for v in x])
        own = params[f'projector_{layer}']
        assert ('bias' in own) == projector.bias
        x = x @ own['kernel'].astype(np.float64) + own.get('bias', 0)
    return x


def run(frontend, batch):
    """(parameters, outputs, the encoder's block outputs)."""
    module = frontend.module(WIDTH, attention, np.float32)
    params = random_params(module, batch.patches)
    encoder = VisionTransformer(frontend.encoder, mixtures=frontend.mixtures)

    @quick_jit
    def both(params, patches):
        return module.apply({'params': params}, patches), encoder.apply({'params': params['encoder']}, patches).blocks
    return params, *map(np.asarray, both(params, batch.patches))


@pytest.mark.parametrize('select', ['patch', 'cls'])
@pytest.mark.parametrize('fusion', ['channels', 'tokens'])
def test_outputs_are_numbered_as_the_token_rule_says(select, fusion):
    """Against a loop over images, kinds and places, with the numbers of `VisionTokenRule.sources`."""
    projector = Projector(activation='silu', hidden_width=5) if select == 'cls' else Projector()
    frontend = EncoderFrontend(ENCODER, (1, -2, 1), projector, select, fusion)
    kinds = 3 if fusion == 'tokens' else 1
    assert frontend.tokens_per_place == kinds
    rule = VisionTokenRule(CLS.patch_size, True, select=select, tokens_per_place=kinds)
    batch, pictures = packed(rule)
    params, outputs, blocks = run(frontend, batch)
    assert outputs.shape == (2, rule.max_tokens(BUDGETS.patches, BUDGETS.images), WIDTH)
    assert params['projector_0']['kernel'].shape == (ENCODER.width * 3 // kinds, 5 if select == 'cls' else WIDTH)

    token = [0, 0]
    for row, number, rows, cols, first in pictures:
        places = [first] if select == 'cls' else [first + 1 + patch for patch in range(rows * cols)]
        taps = [blocks[1], blocks[0], blocks[1]]
        vectors = [np.concatenate([tap[row, place] for tap in taps]) for place in places] if fusion == 'channels' else [
            tap[row, place] for tap in taps for place in places]  # all places of a tap, then those of the next
        sources = rule.sources(rows, cols, first, number)
        assert len(sources) == len(vectors) == rule.num_tokens(rows, cols)
        for source, vector in zip(sources, vectors):
            assert batch.vision_source[row, token[row]] == source
            expected = project(params, projector, vector.astype(np.float64))
            np.testing.assert_allclose(outputs[row, source], expected, atol=2e-5)
            token[row] += 1
    assert token == (batch.vision_slot >= 0).sum(1).tolist()


@pytest.mark.parametrize('projector', [Projector(1, False), Projector(3, hidden_width=4)], ids=['linear', 'three'])
def test_encoders_without_cls_and_other_projectors(projector):
    frontend = EncoderFrontend(TEACHER, (-1,), projector)
    rule = VisionTokenRule(CLS.patch_size)
    batch, pictures = packed(rule)
    params, outputs, blocks = run(frontend, batch)
    for row, number, rows, cols, first in pictures:
        for place, source in zip(range(first, first + rows * cols), rule.sources(rows, cols, first, number), strict=True):
            expected = project(params, projector, blocks[-1][row, place].astype(np.float64))
            np.testing.assert_allclose(outputs[row, source], expected, atol=2e-5)


@pytest.mark.parametrize('frontend', [
    EncoderFrontend(ENCODER, (0, 1)),
    EncoderFrontend(ENCODER, (0, 1), select='cls', fusion='tokens', mixtures=(('attention', ModalityMixture(4)),)),
    EncoderFrontend(ENCODER, (1, 0), fusion=CueEnhancer(3, 2))], ids=['channels', 'cls', 'cues'])
def test_a_picture_changes_its_own_outputs_only(frontend):
    rule = VisionTokenRule(CLS.patch_size, True, select=frontend.select, tokens_per_place=frontend.tokens_per_place)
    batch, pictures = packed(rule)
    module = frontend.module(WIDTH, attention, np.float32)
    params = random_params(module, batch.patches)
    call = quick_jit(lambda patches: module.apply({'params': params}, patches))
    _, number, rows, cols, first = pictures[1]
    pixels = batch.patches.pixels.copy()
    pixels[0, first + 1:first + 1 + rows * cols] ^= 255
    changed = np.asarray(call(batch.patches._replace(pixels=pixels))) != np.asarray(call(batch.patches))
    for row, other, *grid, first in pictures:
        for source in rule.sources(*grid, first, other):
            assert changed[row, source].any() == ((row, other) == (0, number))


@pytest.mark.parametrize('changes,message', [
    ({'taps': (2,)}, r'taps = \(2,\) are not blocks of an encoder of 2 layers'), ({'taps': (-3,)}, 'are not blocks'),
    ({'taps': ()}, 'are not blocks'), ({'encoder': TEACHER, 'select': 'cls'}, r"needs an encoder with a \[cls\] token"),
    ({'fusion': CueEnhancer(num_heads=5)}, r'num_heads \(5\)'),
    ({'fusion': CueEnhancer(num_heads=3), 'select': 'cls'}, 'needs patches'),
    ({'fusion': CueEnhancer(num_heads=3, anchor=1)}, 'anchor = 1 is not one of 1 taps')], ids=str)
def test_mistakes_are_told_in_a_sentence(changes, message):
    with pytest.raises(UserError, match=message) as told:
        dataclasses.replace(EncoderFrontend(ENCODER), **changes)
    assert '\n' not in str(told.value) and str(told.value).endswith('.')
