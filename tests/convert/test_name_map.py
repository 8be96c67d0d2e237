"""The engine of the name map: both directions, exact errors."""
import jax.numpy as jnp
import numpy as np
import pytest

from vora_jax.convert.names.layouts import (
    BATCHED_TABLE,
    CONVOLUTION,
    LEADING_1,
    LEADING_2,
    SAME,
    TABLE,
    TRANSPOSED,
)
from vora_jax.convert.names.name_map import (
    Row,
    Table,
    alias_pairs,
    check,
    entries,
    foreign_shapes,
    from_foreign,
    joined,
    match_names,
    prefixed,
    renamed,
    to_foreign,
)
from vora_jax.types import UserError

WIDTH = 4
# Our shape by layout, from a random size n.
OURS = {SAME: lambda n: (n,), TRANSPOSED: lambda n: (WIDTH, n), CONVOLUTION: lambda n: (12, n), LEADING_1: lambda n: (n,),
        TABLE: lambda n: (2, n, WIDTH), BATCHED_TABLE: lambda n: (n, 2, WIDTH), LEADING_2: lambda n: (n,)}
PAIRS = ((LEADING_1, TABLE), (LEADING_2, BATCHED_TABLE), (TRANSPOSED, TRANSPOSED, TRANSPOSED), (SAME, SAME))


def random_model(seed):
    """(shapes, table): stacks of several groups, tensors alone and in pieces, adapters in some groups only."""
    rng = np.random.default_rng(seed)
    rows, shapes = [], {}

    def parameters(path, name):
        for index, layout in enumerate(OURS):
            yield [Row(f'{path}p{index}', f'{name}alone.{index}', layout)]
        for index, kinds in enumerate(PAIRS):
            yield [Row(f'{path}fused{index}/{part}', f'{name}fused.{index}', kind) for part, kind in enumerate(kinds)]

    def shape(layout):
        fixed = layout in (LEADING_1, LEADING_2)  # a [cls] position is as wide as its table
        return (WIDTH,) if fixed else OURS[layout](int(rng.integers(1, 6)))

    for group in parameters('top/', ''):
        rows += group
        shapes |= {row.path: shape(row.layout) for row in group}
    for stack in range(2):
        sizes = rng.integers(1, 4, rng.integers(1, 4))
        block, layer = f'stack{stack}/*/block/', f'stack{stack}.{{layer}}.'
        groups = list(parameters(block, layer))
        adapters = [Row(f'{block}q/adapter_#/{side}', f'{layer}lora_{side}.#', TRANSPOSED) for side in 'ab']
        rows += [*sum(groups, []), *adapters]
        for group in groups:
            for row in group:
                one = shape(row.layout)
                shapes |= {row.path.replace('*', f'group_{g}'): (int(size), *one) for g, size in enumerate(sizes)}
        for row in adapters:
            for number in range(rng.integers(0, 3)):
                shapes[row.path.replace('*', f'group_{len(sizes) - 1}').replace('#', str(number))] = (int(sizes[-1]), 3, 2)
    paths = list(shapes)
    rng.shuffle(paths)
    return {path: shapes[path] for path in paths}, Table(tuple(rows))


@pytest.mark.parametrize('seed', range(6))
def test_every_parameter_and_every_byte_is_used_once(seed):
    shapes, table = random_model(seed)
    found = entries(shapes, table)
    units = [(path, layer) for path, shape in shapes.items()
             for layer in (range(shape[0]) if 'group_' in path else [None])]
    assert sorted(map(str, units)) == sorted(str((entry.path, entry.layer)) for entry in found)
    filled = {name: np.zeros(shape, int) for name, shape in foreign_shapes(found).items()}
    for entry in found:
        filled[entry.name][entry.index] += 1
        assert filled[entry.name][entry.index].shape == entry.shape
    assert all((count == 1).all() for count in filled.values())


@pytest.mark.parametrize('seed', range(3))
def test_both_directions_are_inverse(seed):
    shapes, table = random_model(seed)
    rng = np.random.default_rng(seed)
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    tensors = dict(to_foreign(params, shapes, table))
    assert all(array.flags.c_contiguous for array in tensors.values())
    assert {name: array.shape for name, array in tensors.items()} == foreign_shapes(entries(shapes, table))
    back = from_foreign(tensors, shapes, table)
    assert back.keys() == params.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(back[path], leaf, path)
    theirs = {name: rng.normal(size=array.shape).astype(jnp.bfloat16) for name, array in tensors.items()}
    for name, array in to_foreign(from_foreign(theirs, shapes, table), shapes, table):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, theirs[name], name)
    assert {array.dtype for _, array in to_foreign(params, shapes, table, 'float16')} == {np.dtype(np.float16)}


TABLE_OF_TWO = Table(
    (Row('layers/*/block/q/kernel', 'model.layers.{layer}.qkv.weight', TRANSPOSED),
     Row('layers/*/block/k/kernel', 'model.layers.{layer}.qkv.weight', TRANSPOSED),
     Row('embedding', 'model.embed.weight', SAME), Row('lm_head', 'lm_head.weight', TRANSPOSED)),
    ignored=(('model.*.inv_freq', 'is computed'),), renames=((r'transformer\.', 'model.'),),
    aliases=(('lm_head.weight', 'model.embed.weight'),))
SHAPES_OF_TWO = {'embedding': (7, 2), 'lm_head': (2, 7),
                 'layers/group_0/block/q/kernel': (1, 2, 4), 'layers/group_1/block/q/kernel': (2, 2, 4),
                 'layers/group_0/block/k/kernel': (1, 2, 3), 'layers/group_1/block/k/kernel': (2, 2, 3)}
GIVEN = {'model.embed.weight': (7, 2), 'lm_head.weight': (7, 2),
         **{f'model.layers.{i}.qkv.weight': (7, 2) for i in range(3)}}


def test_layers_are_counted_over_all_groups_and_pieces_lie_side_by_side():
    found = {(entry.path, entry.layer): entry for entry in entries(SHAPES_OF_TWO, TABLE_OF_TWO)}
    last = found['layers/group_1/block/k/kernel', 1]
    assert (last.name, last.ours, last.shape, last.start) == ('model.layers.2.qkv.weight', (2, 3), (3, 2), 4)
    assert last.index == (slice(4, 7),)
    assert foreign_shapes(list(found.values())) == GIVEN


def test_a_table_inside_another_model():
    inner = prefixed(TABLE_OF_TWO, 'decoder/', 'llm.')
    assert inner.rows[2] == Row('decoder/embedding', 'llm.model.embed.weight', SAME)
    assert renamed('llm.transformer.embed.weight', inner) == 'llm.model.embed.weight'
    assert renamed('transformer.llm.transformer.x', inner) == 'transformer.llm.transformer.x'
    assert inner.ignored[0][0] == 'llm.model.*.inv_freq' and inner.aliases[0][1] == 'llm.model.embed.weight'
    both = joined(inner, TABLE_OF_TWO)
    assert len(both.rows) == 8 and len(both.renames) == 2
    shapes = SHAPES_OF_TWO | {f'decoder/{path}': shape for path, shape in SHAPES_OF_TWO.items()}
    assert foreign_shapes(entries(shapes, both)) == GIVEN | {f'llm.{name}': shape for name, shape in GIVEN.items()}


def test_names_in_a_folder():
    found = entries(SHAPES_OF_TWO, TABLE_OF_TWO)
    given = {name.replace('model.', 'transformer.'): shape for name, shape in GIVEN.items()}
    given['transformer.rotary.inv_freq'] = (3,)
    names, ignored = match_names(found, given, TABLE_OF_TWO, 'the folder')
    assert names == {name: name.replace('model.', 'transformer.') for name in GIVEN}
    assert ignored == [('transformer.rotary.inv_freq', 'is computed')]
    assert alias_pairs(found, given, TABLE_OF_TWO) == []
    with pytest.raises(UserError, match='both transformer.embed.weight and model.embed.weight, two spellings'):
        match_names(found, given | {'model.embed.weight': (7, 2)}, TABLE_OF_TWO, 'the folder')


def test_a_tied_head_may_be_there():
    shapes = {path: shape for path, shape in SHAPES_OF_TWO.items() if path != 'lm_head'}
    found = entries(shapes, TABLE_OF_TWO)
    names, ignored = match_names(found, GIVEN, TABLE_OF_TWO, 'the folder')
    assert 'lm_head.weight' not in names and ignored == []
    assert alias_pairs(found, GIVEN, TABLE_OF_TWO) == [('lm_head.weight', 'model.embed.weight')]


def test_a_parameter_without_a_foreign_name_is_told():
    with pytest.raises(UserError, match='no name in a Hugging Face folder: layers/group_0/block/q/scale'):
        entries(SHAPES_OF_TWO | {'layers/group_0/block/q/scale': (1, 3)}, TABLE_OF_TWO)


def test_missing_and_unexpected_parameters_are_listed():
    params = {path: jnp.zeros(shape) for path, shape in SHAPES_OF_TWO.items() if path != 'embedding'}
    with pytest.raises(UserError, match='the checkpoint .* misses embedding; it has unexpected extra'):
        list(to_foreign(params | {'extra': jnp.zeros(3)}, SHAPES_OF_TWO, TABLE_OF_TWO))


def layers(count, first=0):
    return {f'm.layers.{i}.q.weight': (4, 2) for i in range(first, count)}


FULL = {'m.embed.weight': (9, 2), 'lm_head.weight': (9, 2), **layers(3)}


@pytest.mark.parametrize('given, message', [
    ({'m.embed.weight': (9, 2), **layers(3)},
     r'misses lm_head.weight \(the head seems to be tied to the embedding: set tie_word_embeddings to true'),
    ({f'llm.{name}': shape for name, shape in FULL.items()}, r"\(all names begin with 'llm.' there\)"),
    ({name.removeprefix('m.').removeprefix('lm_'): shape for name, shape in FULL.items()},
     'no name fits: this is another family of models than config.json says'),
    ({name: shape[::-1] for name, shape in FULL.items()},
     r'm.embed.weight \(\[2, 9\] instead of \[9, 2\]\).*\(their dimensions are swapped: were they saved as \[in, out\]\?\)'),
    (FULL | {'m.layers.0.q.lora_A.weight': (1, 2)}, 'these are adapters that the configuration does not name'),
    (FULL | layers(5), r'm.layers.4.q.weight \(the configuration has 3 layers, the weights 5\)'),
    ({'lm_head.weight': (9, 2)}, r'nothing called m\.\* is there'),
    ({name: shape for name, shape in FULL.items() if '1' not in name}, 'some layers are not complete'),
    ({name: (*shape[:-1], 3) for name, shape in FULL.items()}, 'a size that config.json gives as 2 is 3 in the weights'),
    ({name.replace('embed', 'tokens'): shape for name, shape in FULL.items()}, 'was m.embed.weight renamed to m.tokens.wei'),
])
def test_what_does_not_fit_is_listed_with_a_guess(given, message):
    check(FULL, FULL, 'the folder')
    with pytest.raises(UserError, match=message) as error:
        check(FULL, given, 'the folder')
    assert str(error.value).startswith('the folder does not fit the model: it ')


def test_adapters_that_were_merged():
    expected = FULL | {'m.layers.0.q.lora_A.weight': (1, 2)}
    with pytest.raises(UserError, match='the configuration names adapters that are not there: were they merged already'):
        check(expected, FULL, 'the folder')


def test_long_lists_are_shortened():
    with pytest.raises(UserError) as error:
        check(FULL | layers(30), {}, 'the folder')
    assert 'and 24 more' in str(error.value) and len(str(error.value)) < 500
