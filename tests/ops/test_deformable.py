"""Deformable sampling against PyTorch's `grid_sample`, image by image."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import strict  # noqa: F401

from vora_jax.data.packing import Budgets, Picture, layout, stack
from vora_jax.method import VisionTokenRule
from vora_jax.ops.deformable import deformable_sample

LEVELS, HEADS, POINTS, WIDTH = 2, 3, 2, 5
torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")


GRIDS = [[(3, 4), (2, 5)], [(1, 1), (4, 4), (5, 3)], [(4, 2)]]


def with_images(cls):
    """Packed patches of images of different grids, and (row, first patch, rows, cols) of each."""
    rule, budgets = VisionTokenRule(1, cls), Budgets(40, 40, 3, 3, 'float32')
    batch = stack([layout([[Picture(np.zeros((rows * cols, 3), np.float32), rows, cols) for rows, cols in row]], budgets,
                          rule=rule) for row in GRIDS])
    images = [(row, int(np.flatnonzero(batch.patches.image_id[row] == image)[0]) + cls, *grid)
              for row, grids in enumerate(GRIDS) for image, grid in enumerate(grids)]
    return batch.patches, images


def samples(patches, spread, seed=0):
    """(values, col, row, weights): random places around each patch, also far outside."""
    rng = np.random.default_rng(seed)
    shape = *patches.row.shape, HEADS, LEVELS, POINTS
    own = (place.astype(np.float32)[..., None, None, None] for place in (patches.col, patches.row))
    places = [place + spread * rng.normal(size=shape) for place in own]
    values = rng.normal(size=(LEVELS, *patches.row.shape, HEADS, WIDTH))
    return [x.astype(np.float32) for x in (values, *places, rng.normal(size=shape))]


def ours(values, col, row, weights, patches):
    grid = np.take_along_axis(patches.grid, np.maximum(patches.image_id, 0)[..., None], axis=1)
    start = patches.key_stop - grid[..., 0] * grid[..., 1]
    return deformable_sample(values, start, grid, col, row, weights)


def by_grid_sample(values, col, row, weights, images):
    """The same in float64: {image: [patches, N, H]}."""
    results = []
    for batch_row, first, rows, cols in images:
        here = slice(first, first + rows * cols)
        heads = []
        for head in range(HEADS):
            total = 0.0
            for level in range(LEVELS):
                picture = values[level, batch_row, here, head].T.reshape(1, WIDTH, rows, cols)
                where = torch.stack([(2 * col[batch_row, here, head, level] + 1) / cols - 1,
                                     (2 * row[batch_row, here, head, level] + 1) / rows - 1], -1)
                sampled = torch.nn.functional.grid_sample(picture, where[None], align_corners=False, padding_mode='zeros')
                total = total + (sampled[0] * weights[batch_row, here, head, level]).sum(-1).T
            heads.append(total)
        results.append(torch.stack(heads, 1))
    return results


@pytest.mark.parametrize('spread', [0.7, 4.0], ids=['near', 'far'])
@pytest.mark.parametrize('cls', [False, True], ids=['patches', 'cls'])
def test_values_and_gradients_equal_grid_samples(cls, spread):
    patches, images = with_images(cls)
    inputs = samples(patches, spread)
    shape = *patches.row.shape, HEADS, WIDTH
    weight = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    mask = np.zeros(shape, np.float32)  # [cls] and empty places do not count
    for row, first, rows, cols in images:
        mask[row, first:first + rows * cols] = 1

    @jax.jit
    def run(*inputs):
        out, pull = jax.vjp(lambda *inputs: ours(*inputs, patches), *inputs)
        return out, pull(jnp.asarray(mask * weight))
    out, gradients = run(*inputs)
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = by_grid_sample(*leaves, images)
    torch.autograd.backward(expected, [torch.tensor(weight[row, first:first + rows * cols], dtype=torch.float64)
                                       for row, first, rows, cols in images])
    for (row, first, rows, cols), value in zip(images, expected):
        # Measured 7e-7, of values up to 5.
        np.testing.assert_allclose(out[row, first:first + rows * cols], value.detach(), atol=1e-5)
    for name, gradient, leaf in zip(('values', 'col', 'row', 'weights'), gradients, leaves):
        # Measured 1.7e-6, of values up to 22.
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5, err_msg=name)
        assert np.abs(gradient).max() > 0.5


def test_places_exactly_on_patches_and_absurdly_far_away():
    """The first step: offsets start as whole numbers, where a kink must go the way of `grid_sample`."""
    patches, images = with_images(True)
    values, col, row, weights = samples(patches, 2.0)
    col, row = np.round(col), np.round(row)
    col[..., 0, 0], row[..., 1, 1] = 3e12, -3e12
    inputs = values, col, row, weights

    def total(*inputs):
        out = ours(*inputs, patches)
        return sum(out[row, first:first + rows * cols].sum() for row, first, rows, cols in images)
    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*inputs)
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    sum(value.sum() for value in by_grid_sample(*leaves, images)).backward()
    # Places go to [-1, 1] and back exactly where the sides are powers of 2, else they may fall on the patch's other side.
    exact = [image for image in images if {*image[2:]} <= {1, 2, 4}]
    assert len(exact) == 3
    for name, gradient, leaf in zip(('values', 'col', 'row', 'weights'), gradients, leaves):
        assert np.isfinite(gradient).all()
        if name in ('values', 'weights'):
            np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5, err_msg=name)
            continue
        for row, first, rows, cols in exact:
            here = row, slice(first, first + rows * cols)
            np.testing.assert_allclose(gradient[here], leaf.grad[here], atol=1e-5, err_msg=name)
            assert not gradient[here][..., 0, 0].any() and not gradient[here][..., 1, 1].any()
