"""Position tables sampled on other grids."""
import numpy as np
import pytest
from tiny_model import quick_jit, strict  # noqa: F401

from vora_jax.ops.patches import sample_position_table

sample = quick_jit(sample_position_table)


def places(rows, cols):
    """(row, col, grid) of one picture of `rows x cols` patches."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    return row.astype(np.int16), col.astype(np.int16), np.tile(np.int32([rows, cols]), (rows * cols, 1))


@pytest.fixture(scope='module')
def table():
    return np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)


def test_the_native_grid_is_exact(table):
    sampled = sample(table, *places(4, 5))
    np.testing.assert_array_equal(np.asarray(sampled).reshape(4, 5, 3), table)


@pytest.mark.parametrize('grid', [(2, 3), (8, 10), (7, 4), (1, 1), (1, 13)])
def test_other_grids_equal_bilinear_interpolation(table, grid):
    torch = pytest.importorskip('torch', reason='needs the torch extra')
    image = torch.tensor(table).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, grid, mode='bilinear', align_corners=False)
    sampled = np.asarray(sample(table, *places(*grid))).reshape(*grid, 3)
    np.testing.assert_allclose(sampled, expected[0].permute(1, 2, 0).numpy(), atol=1e-6)  # measured 3e-7


def test_patches_of_several_pictures_are_independent(table):
    both = [np.concatenate(parts) for parts in zip(places(2, 3), places(8, 2))]
    alone = [np.asarray(sample(table, *places(*grid))) for grid in ((2, 3), (8, 2))]
    np.testing.assert_array_equal(sample(table, *both), np.concatenate(alone))


def test_empty_places_are_finite(table):
    empty = np.full(2, -1, np.int16), np.full(2, -1, np.int16), np.zeros((2, 2), np.int32)
    assert np.isfinite(sample(table, *empty)).all()
