"""Foreign tensors onto the devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folder
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax import variants
from vora_jax.cli.import_ import parameter_targets
from vora_jax.convert import from_hf
from vora_jax.convert.files.safetensors_files import open_folder, write_shards
from vora_jax.convert.names import name_map
from vora_jax.convert.names.layouts import TRANSPOSED
from vora_jax.convert.names.name_map import Entry
from vora_jax.types import UserError


def load(folder, name, **options):
    found = tiny_folder.found(name)
    method = getattr(variants, found.method)(**found.arguments)
    targets = parameter_targets(method, found.stage)
    with open_folder(folder) as opened:
        entries = name_map.entries({path: leaf.shape for path, leaf in targets.items()}, found.table)
        given = {key: info.shape for key, info in opened.tensors.items()}
        names, _ = name_map.match_names(entries, given, found.table, 'folder')
        return from_hf.load(opened, entries, names, targets, **options), targets


@pytest.mark.parametrize('name', tiny_folder.CONFIGS)
def test_every_family_is_loaded_bit_for_bit_onto_its_shards(tmp_path, name):
    wanted = tiny_folder.write_folder(tmp_path, name, 'bfloat16')
    params, targets = load(tmp_path, name)
    assert set(params) == set(wanted)
    for path, array in params.items():
        assert array.dtype == jnp.bfloat16 and array.sharding.is_equivalent_to(targets[path].sharding, array.ndim)
        assert np.asarray(array).tobytes() == wanted[path].tobytes(), path


@pytest.mark.parametrize('stored, dtype', [('float16', None), ('float32', None), ('bfloat16', 'float32'),
                                           ('float32', 'bfloat16'), ('float16', 'bfloat16')])
def test_dtypes_are_kept_or_cast(tmp_path, stored, dtype):
    wanted = tiny_folder.write_folder(tmp_path, 'qwen2', stored, max_shard_bytes=4000)
    seen = []
    params, _ = load(tmp_path, 'qwen2', dtype=dtype, on_read=lambda count, seconds: seen.append((count, seconds)))
    for path, array in params.items():
        assert np.asarray(array).tobytes() == wanted[path].astype(jnp.dtype(dtype or stored)).tobytes()
    assert sum(count for count, _ in seen) == sum(x.nbytes for x in wanted.values())
    assert all(seconds > 0 for _, seconds in seen)


def test_a_stack_takes_the_widest_dtype_of_its_layers_and_float64_becomes_float32(tmp_path):
    def mix(tensors):
        return {key: array.astype({'1': np.float32, '2': np.float64}.get(key.split('.')[2], array.dtype)
                                  if 'q_proj' in key else array.dtype) for key, array in tensors.items()}

    tiny_folder.write_folder(tmp_path, 'llama', 'float16', mix)
    params, _ = load(tmp_path, 'llama')
    assert {path.split('/')[4] for path, x in params.items() if x.dtype == jnp.float32} == {'q_proj'}


def test_a_device_gets_its_own_part_only(tmp_path):
    """Cut over 4 devices: every part is read once, and no more than parts."""
    kernels = np.random.default_rng(0).standard_normal((3, 8, 12)).astype(np.float32)
    write_shards(tmp_path, [(f'w{i}', kernels[i]) for i in range(3)], [(f'w{i}', np.dtype('f4'), (8, 12)) for i in range(3)],
                 1 << 20)
    mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    target = jax.ShapeDtypeStruct((3, 12, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, 'a', 'b')))
    entries = [Entry('w', layer, f'w{layer}', (12, 8), TRANSPOSED) for layer in range(3)]
    sizes = []
    with open_folder(tmp_path) as folder:
        read = folder.read
        folder.read = lambda *a: sizes.append((part := read(*a)).shape) or part
        params = from_hf.load(folder, entries, {f'w{i}': f'w{i}' for i in range(3)}, {'w': target})
    assert sizes == [(4, 6)] * 12
    assert (np.asarray(params['w']) == kernels.swapaxes(1, 2)).all() and params['w'].sharding == target.sharding


def test_pieces_of_one_tensor_are_read_where_they_lie(tmp_path):
    fused = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    write_shards(tmp_path, [('qkv', fused)], [('qkv', fused.dtype, fused.shape)], 1 << 20)
    mesh = jax.make_mesh((2,), ('a',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    target = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P(None, 'a')))
    entries = [Entry(name, None, 'qkv', (8, 4), TRANSPOSED, 4 * index) for index, name in enumerate('qkv')]
    with open_folder(tmp_path) as folder:
        params = from_hf.load(folder, entries, {'qkv': 'qkv'}, dict.fromkeys('qkv', target))
    assert all((np.asarray(params[name]) == fused[4 * i:4 * i + 4].T).all() for i, name in enumerate('qkv'))


@pytest.mark.parametrize('value, dtype, told', [
    (np.nan, None, 'NaN or infinity: model.layers.1'), (-np.inf, None, 'NaN or infinity: model.layers.1'),
    (1e5, 'float16', 'NaN or infinity as float16: model.layers.1')])
def test_what_is_not_finite_is_named(tmp_path, value, dtype, told):
    def spoil(tensors):
        tensors['model.layers.1.mlp.up_proj.weight'][-1, -1] = value
        return tensors

    tiny_folder.write_folder(tmp_path, 'llama', change=spoil)
    with pytest.raises(UserError, match=told):
        load(tmp_path, 'llama', dtype=dtype)


def test_quantised_weights_are_refused(tmp_path):
    tiny_folder.write_folder(tmp_path, 'llama', change=lambda tensors: {
        key: array.astype(np.int8) if 'up_proj' in key else array for key, array in tensors.items()})
    with pytest.raises(UserError, match='up_proj.weight is of dtype int8'):
        load(tmp_path, 'llama')


def test_aliases_must_be_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(from_hf, '_PIECE_BYTES', 100)
    one = np.arange(60, dtype=np.float32).reshape(20, 3)
    other = one.copy()
    other[-1, -1] = 7
    tensors = {'a': one, 'same': one, 'other': other, 'half': one.astype(np.float16)}
    write_shards(tmp_path, tensors.items(), [(key, x.dtype, x.shape) for key, x in tensors.items()], 1 << 20)
    with open_folder(tmp_path) as folder:
        from_hf.check_equal(folder, [('same', 'a')])
        for name in ('other', 'half'):
            with pytest.raises(UserError, match=f'{name} differs from a'):
                from_hf.check_equal(folder, [(name, 'a')])
