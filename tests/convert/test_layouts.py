"""Each layout: its definition, both directions, NumPy and traced arrays alike."""
import jax
import numpy as np
import pytest

from vora_jax.convert.names import layouts

SHAPES = {'SAME': (3, 5), 'TRANSPOSED': (3, 5), 'CONVOLUTION': (2 * 2 * 3, 5), 'TABLE': (2, 3, 5),
          'BATCHED_TABLE': (2, 3, 5), 'LEADING_1': (5,), 'LEADING_2': (5,), 'POINTWISE': (3, 5),
          'GROUPED_POINTWISE': (2, 4, 5)}
FOREIGN = {'SAME': (3, 5), 'TRANSPOSED': (5, 3), 'CONVOLUTION': (5, 3, 2, 2), 'TABLE': (6, 5),
           'BATCHED_TABLE': (1, 6, 5), 'LEADING_1': (1, 5), 'LEADING_2': (1, 1, 5), 'POINTWISE': (5, 3, 1),
           'GROUPED_POINTWISE': (10, 4, 1)}


def test_all_are_tested():
    assert SHAPES.keys() == {name for name, value in vars(layouts).items() if isinstance(value, layouts.Layout)}


@pytest.mark.parametrize('name', SHAPES)
def test_both_directions(name):
    layout, shape = getattr(layouts, name), SHAPES[name]
    ours = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs = layout.export(ours)
    assert theirs.shape == layout.shape(shape) == FOREIGN[name]
    np.testing.assert_array_equal(layout.restore(theirs, shape), ours)
    np.testing.assert_array_equal(jax.jit(layout.export)(ours), theirs)
    np.testing.assert_array_equal(jax.jit(lambda x: layout.restore(x, shape))(theirs), ours)


def test_a_patch_kernel_is_a_convolution():
    ours = np.arange(2 * 2 * 3 * 5).reshape(2, 2, 3, 5)
    theirs = layouts.CONVOLUTION.export(ours.reshape(12, 5))
    for channel, row, col, out in ((2, 1, 0, 4), (0, 0, 1, 3)):
        assert theirs[out, channel, row, col] == ours[row, col, channel, out]


def test_kernels_are_convolutions_of_width_1():
    """The same sums as torch's, group by group."""
    torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
    rng = np.random.default_rng(0)
    x, whole, groups = rng.normal(size=(7, 6)), rng.normal(size=(6, 10)), rng.normal(size=(2, 3, 5))
    for ours, layout in ((whole, layouts.POINTWISE), (groups, layouts.GROUPED_POINTWISE)):
        num_groups = len(ours) if ours.ndim == 3 else 1
        split = x.reshape(7, num_groups, -1)
        wanted = np.einsum('tgi,gio->tgo', split, ours.reshape(num_groups, -1, ours.shape[-1])).reshape(7, 10)
        weight = torch.from_numpy(np.ascontiguousarray(layout.export(ours)))
        found = torch.nn.functional.conv1d(torch.from_numpy(x.T[None].copy()), weight, groups=num_groups)
        np.testing.assert_allclose(found[0].T.numpy(), wanted, rtol=0, atol=1e-12)  # measured 1.8e-15


@pytest.mark.parametrize('names', [('LEADING_1', 'TABLE'), ('LEADING_2', 'BATCHED_TABLE'), ('TRANSPOSED', 'TRANSPOSED')])
def test_pieces_of_one_tensor_agree_on_the_axis(names):
    pieces = [getattr(layouts, name) for name in names]
    assert len({piece.axis for piece in pieces}) == 1
    whole = np.concatenate([piece.export(np.zeros(SHAPES[name])) for piece, name in zip(pieces, names)], pieces[0].axis)
    assert whole.ndim == len(FOREIGN[names[0]])
