"""The cue enhancer against a transcription in PyTorch."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import quick_jit, strict  # noqa: F401

from vora_jax.data.packing import Budgets, Picture, layout, stack
from vora_jax.method import VisionTokenRule
from vora_jax.params import count, flatten, unflatten
from vora_jax.vision.cue_enhancer import CueEnhancer, CueEnhancerModule

WIDTH, LEVELS = 12, 3
GRIDS = [[(3, 4), (2, 5)], [(1, 1), (4, 4)]]
BUDGETS = Budgets(40, 30, 2, 3, 'float32')
SMALL = CueEnhancer(num_heads=3, num_points=2, norm_eps=1e-6)


def packed(grids, cls):
    """`Patches` of rows of empty pictures of these grids."""
    rule = VisionTokenRule(1, cls)
    return stack([layout([[Picture(np.zeros((rows * cols, 3), np.float32), rows, cols) for rows, cols in row]], BUDGETS,
                         rule=rule) for row in grids]).patches


def images(patches, cls):
    """(row, slice of its patches, rows, cols) of each image."""
    for row, grids in enumerate(patches.grid):
        for image, (rows, cols) in enumerate(grids.tolist()):
            if rows:
                first = int(np.flatnonzero(patches.image_id[row] == image)[0]) + cls
                yield row, slice(first, first + rows * cols), rows, cols


def random_case(config, patches, seed=0):
    """(levels, parameters), none of them zero; offsets reach over the pictures' borders."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=(LEVELS, *patches.row.shape, WIDTH)).astype(np.float32)
    shapes = jax.eval_shape(CueEnhancerModule(config).init, jax.random.key(0), list(levels), patches)['params']
    params = {path: rng.normal(size=leaf.shape) / (WIDTH**0.5 if path.endswith('kernel') else 1) + path.endswith('scale')
              for path, leaf in flatten(nn.unbox(shapes)).items()}
    return levels, unflatten({path: leaf.astype(np.float32) for path, leaf in params.items()})


def transcription(params, levels, rows, cols, config):
    """One image, [levels, patches, width] in float64: arXiv 2411.12787, and Deformable DETR's attention."""
    torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    functional = torch.nn.functional

    def norm(name, x):
        return functional.layer_norm(x, (WIDTH,), params[f'{name}/scale'], params[f'{name}/bias'], config.norm_eps)

    def linear(name, x):
        return functional.linear(x, params[f'{name}/kernel'].T, params[f'{name}/bias'])

    anchor, heads, points = levels[config.anchor], config.num_heads, config.num_points
    query = norm('norm_query', anchor)
    value = linear('value_proj', norm('norm_levels', levels)).reshape(LEVELS, rows * cols, heads, -1)
    offset = linear('offset_proj', query).reshape(-1, heads, LEVELS, points, 2)
    weight = linear('weight_proj', query).reshape(-1, heads, LEVELS * points).softmax(-1).reshape(-1, heads, LEVELS, points)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing='ij')
    centre = torch.stack([(x.flatten() + 0.5) / cols, (y.flatten() + 0.5) / rows], -1)
    place = centre[:, None, None, None] + offset / torch.tensor([cols, rows])
    total = torch.zeros(rows * cols, heads, WIDTH // heads, dtype=torch.float64)
    for head in range(heads):
        for level in range(LEVELS):
            picture = value[level, :, head].T.reshape(1, -1, rows, cols)
            sampled = functional.grid_sample(picture, 2 * place[None, :, head, level] - 1, align_corners=False,
                                             padding_mode='zeros')[0]
            total = total.index_add(1, torch.tensor([head]), (sampled * weight[:, head, level]).sum(-1).T[:, None])
    out = anchor + linear('out_proj', total.reshape(-1, WIDTH))
    return norm('norm_out', out) if config.final_norm else out


@pytest.mark.parametrize('config,cls', [
    (SMALL, True), (dataclasses.replace(SMALL, anchor=-1, final_norm=False, norm_eps=1e-3), False),
], ids=['paper', 'released'])
def test_values_and_gradients_equal_a_transcription(config, cls):
    torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    patches = packed(GRIDS, cls)
    levels, params = random_case(config, patches)
    cotangent = np.zeros(levels.shape[1:], np.float32)  # of patches only: nothing is said of [cls] and empty places
    for row, here, _, _ in images(patches, cls):
        cotangent[row, here] = np.random.default_rng(row).normal(size=cotangent[row, here].shape)

    @quick_jit
    def run(params, levels):
        def enhanced(params, levels):
            return CueEnhancerModule(config).apply({'params': params}, list(levels), patches)
        out, pull = jax.vjp(enhanced, params, levels)
        return out, *pull(cotangent)
    out, d_params, d_levels = run(params, levels)

    leaves = {path: torch.tensor(leaf, dtype=torch.float64, requires_grad=True) for path, leaf in flatten(params).items()}
    deep = torch.tensor(levels, dtype=torch.float64, requires_grad=True)
    for row, here, rows, cols in images(patches, cls):
        expected = transcription(leaves, deep[:, row, here], rows, cols, config)
        close(out[row, here], expected.detach())
        expected.backward(torch.tensor(cotangent[row, here], dtype=torch.float64))
    close(d_levels, deep.grad)
    assert flatten(d_params).keys() == leaves.keys() and ('norm_out/scale' in leaves) == config.final_norm
    for path, gradient in flatten(d_params).items():
        close(gradient, leaves[path].grad, path)
        assert np.abs(gradient).max() > 0.05, path


def close(a, b, name=''):
    error = np.abs(np.asarray(a) - b.numpy()).max() / max(1.0, np.abs(b.numpy()).max())
    assert error <= 1e-5, (name, error)


def test_packed_images_give_what_single_ones_do(cls=True):
    patches = packed(GRIDS, cls)
    levels, params = random_case(SMALL, patches)
    run = quick_jit(lambda levels, patches: CueEnhancerModule(SMALL).apply({'params': params}, list(levels), patches))
    together = np.asarray(run(levels, patches))
    for row, here, rows, cols in images(patches, cls):
        alone = packed([[(rows, cols)]], cls)
        (_, there, _, _), = images(alone, cls)
        single = np.zeros((LEVELS, 1, *levels.shape[2:]), np.float32)
        single[:, 0, there] = levels[:, row, here]
        # The same arithmetic, in products of another shape.
        np.testing.assert_allclose(run(single, alone)[0, there], together[row, here], atol=2e-6)


def test_the_first_values_are_those_of_deformable_detr():
    """Offsets do not depend on the query, directions spread by max-norm, weights are uniform."""
    config, patches = CueEnhancer(), packed(GRIDS, True)
    levels = [jnp.zeros((*patches.row.shape, 32), jnp.float32)] * 4
    params = flatten(nn.unbox(quick_jit(CueEnhancerModule(config).init)(jax.random.key(3), levels, patches)['params']))
    for name in ('offset_proj/kernel', 'weight_proj/kernel', 'weight_proj/bias', 'value_proj/bias', 'out_proj/bias'):
        assert not params[name].any(), name
    offsets = np.asarray(params['offset_proj/bias']).reshape(16, 4, 4, 2)
    for head in range(16):
        angle = 2 * np.pi * head / 16
        direction = np.array([np.cos(angle), np.sin(angle)])
        direction /= np.abs(direction).max()
        for level in range(4):
            for point in range(4):
                np.testing.assert_allclose(offsets[head, level, point], direction * (point + 1), atol=1e-5)
    np.testing.assert_allclose(offsets[:3, 2, 1], [[2, 0], [2, 2 * np.tan(np.pi / 8)], [2, 2]], atol=1e-5)
    for name in ('value_proj/kernel', 'out_proj/kernel'):  # Xavier uniform
        bound = (6 / (32 + 32))**0.5
        assert 0.97 * bound < np.abs(params[name]).max() <= bound, name


def test_the_paper_counts_its_parameters():
    patches = packed(GRIDS, True)
    levels = [jax.ShapeDtypeStruct((*patches.row.shape, 1024), jnp.float32)] * 4
    shapes = jax.eval_shape(CueEnhancerModule(CueEnhancer()).init, jax.random.key(0), levels, patches)['params']
    assert count(shapes) == 2_892_544
