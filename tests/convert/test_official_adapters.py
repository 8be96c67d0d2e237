"""The papers' own adapter files, both ways: exact names and shapes, bit for bit, and what is refused."""
import dataclasses
import json
import pathlib
import pickle
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from tiny_methods import METHODS, method_batch
from tiny_model import LLM, random_params

from vora_jax import variants
from vora_jax.convert.adapters.compare import compare_adapters
from vora_jax.convert.adapters.formats import adapted, looks_like_adapters
from vora_jax.convert.adapters.read import read_adapters
from vora_jax.convert.export.adapters import export_adapters
from vora_jax.convert.export.to_hf import read_record
from vora_jax.convert.names import name_map
from vora_jax.llm.decoder import LanguageModel
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.params import flatten, unflatten
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import Projector
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")

# LLM: width 16, 4 layers, queries 32, values 16 wide; encoder: width 12, 2 layers. See `tiny_model`.
LAVIN, LAVIN_STAGE = METHODS['lavin'][0], 'finetune'
VCE = METHODS['vce_dual_lora'][0]
LORA, PLAIN = METHODS['llava_lora'][0], METHODS['llava'][0]
STAGES = {'lavin': (LAVIN, 'finetune'), 'mm_projector': (PLAIN, 'pretrain'), 'lora': (LORA, 'adapt'),
          'vce': (VCE, 'pretrain'), 'dual_lora': (VCE, 'finetune')}


SEEN = []  # (method, stage, what), since tracing a model takes longer than all else here


def what_of(method, stage):
    for known, name, what in SEEN:
        if known is method and name == stage:
            return what
    SEEN.append((method, stage, adapted(method.name, method.stage(stage).model, method.stage(stage).trainable, 'test')))
    return SEEN[-1][2]


def lavin_names(width, layers, rank, image_width, image_layers, neck):
    """{name: shape} as LaVIN's training writes them, spelled out from its checkpoints."""
    shapes = {}
    for prefix, count, size in (('layers.', layers, width),
                                ('backbone.visual.transformer.resblocks.', image_layers, image_width)):
        for layer in range(count):
            for name, shape in (('conv_A.weight', (rank, size, 1)), ('conv_A.bias', (rank,)),
                                ('conv_B.weight', (size, rank // 2, 1)), ('conv_B.bias', (size,)),
                                ('conv_D.weight', (size, rank // 2, 1)), ('conv_D.bias', (size,)),
                                ('expert_weights.weight', (2, size)), ('expert_weights.bias', (2,))):
                shapes[f'{prefix}{layer}.adapter_attn.{name}'] = shape
    return shapes | {'adapter_proj.conv_A.weight': (neck, image_width), 'adapter_proj.conv_A.bias': (neck,),
                     'adapter_proj.conv_B.weight': (width, neck), 'adapter_proj.conv_B.bias': (width,),
                     'adapter_modality_embedding.weight': (2, width)}


def projector_names(prefix, image_width, width):
    return {f'{prefix}0.weight': (width, image_width), f'{prefix}0.bias': (width,), f'{prefix}2.weight': (width, width),
            f'{prefix}2.bias': (width,)}


def lora_names(rank):
    sizes = {'self_attn.q_proj': (16, 32), 'self_attn.k_proj': (16, 16), 'self_attn.v_proj': (16, 16),
             'self_attn.o_proj': (32, 16), 'mlp.gate_proj': (16, 24), 'mlp.up_proj': (16, 24), 'mlp.down_proj': (24, 16)}
    return {f'base_model.model.model.layers.{layer}.{name}.lora_{side}.weight': shape
            for layer in range(4) for name, (wide, out) in sizes.items()
            for side, shape in (('A', (rank, wide)), ('B', (out, rank)))}


def vce_names(width, heads, levels, points, prefix='model.mm_projector.VCE_module.'):
    places = heads * levels * points
    linears = {'sampling_offsets': 2 * places, 'attention_weights': places, 'value_proj': width, 'output_proj': width}
    return ({f'{prefix}cross_attn.{name}.weight': (out, width) for name, out in linears.items()}
            | {f'{prefix}cross_attn.{name}.bias': (out,) for name, out in linears.items()}
            | {f'{prefix}{norm}.{name}': (width,) for norm in ('query_norm', 'feat_norm', 'norm')
               for name in ('weight', 'bias')})


def dual_lora_names(rank):
    return {f'base_model.model.model.layers.{layer}.self_attn.{linear}.{name}': shape
            for layer in range(4) for linear, out in (('q_proj', 32), ('v_proj', 16))
            for name, shape in (('lora_A0.weight', (rank, 16)), ('lora_T.weight', (rank, 16)),
                                ('lora_B0.weight', (out, rank)), ('lora_layer_norm.weight', (rank,)),
                                ('lora_layer_norm.bias', (rank,)))}


SEEING = vce_names(12, 3, 2, 2) | projector_names('model.mm_projector.mm_projector_llava.', 12, 16)
FILES = {  # {case: {file: (key of the dict, {name: shape})}}
    'lavin': {'checkpoint-3.pth': ('model', lavin_names(16, 4, 4, 12, 2, 6))},
    'mm_projector': {'mm_projector.bin': ('', projector_names('model.mm_projector.', 12, 16))},
    'lora': {'adapter_model.bin': ('', lora_names(3)),
             'non_lora_trainables.bin': ('', projector_names('base_model.model.model.mm_projector.', 12, 16))},
    'vce': {'adapter_weight.pth': ('', SEEING)},
    'dual_lora': {'adapter_weight.pth': ('', dual_lora_names(4) | {f'base_model.model.{name}': shape
                                                                   for name, shape in SEEING.items()})},
}


def draw(shapes, dtype=torch.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.normal(size=shape)).to(dtype) for name, shape in shapes.items()}


def write(folder, case, dtype=torch.float32, rename=lambda name: name):
    """The made-up files of a case; their tensors by name."""
    folder.mkdir()
    everything = {}
    for file, (key, shapes) in FILES[case].items():
        tensors = draw(shapes, dtype, len(file))
        everything |= tensors
        tensors = {rename(name): tensor for name, tensor in tensors.items()}
        torch.save({key: tensors, 'epoch': 3} if key else tensors, folder / file)
    if case == 'lora':
        (folder / 'adapter_config.json').write_text(json.dumps({'peft_type': 'LORA', 'r': 3, 'lora_alpha': 6}))
    return everything


def stored(folder):
    """{name: tensor} of all files of adapters in a folder."""
    from safetensors.torch import load_file
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in ('.pth', '.bin'):
            content = torch.load(file, weights_only=True)
            found |= content.get('model', content)
        elif file.suffix == '.safetensors':
            found |= load_file(file)
    return found


@pytest.mark.parametrize(('case', 'dtype'), [*((case, torch.float32) for case in FILES), ('lora', torch.bfloat16),
                                             ('vce', torch.float16), ('mm_projector', torch.bfloat16)], ids=str)
def test_file_to_parameters_to_file(tmp_path, case, dtype):
    method, stage = STAGES[case]
    tensors = write(tmp_path / 'given', case, dtype)
    given = read_adapters(tmp_path / 'given', what_of(method, stage))
    assert (given.num_tensors, given.absent, given.ignored) == (len(tensors), (), ())
    assert given.params.keys() == what_of(method, stage).shapes.keys()
    done = export_adapters(unflatten(given.params), method, stage, str(tmp_path / 'llava-lora'))
    again = stored(tmp_path / 'llava-lora')
    assert again.keys() == tensors.keys() and done.num_tensors == len(tensors)
    assert all(again[name].dtype == dtype and torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert done.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert done.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    record = read_record(tmp_path / 'llava-lora')
    found = compare_adapters(unflatten(given.params), method.stage(stage).model, tmp_path / 'llava-lora', record)
    assert (found.problems, found.tensors) == ([], len(tensors))


def test_values_land_where_they_belong(tmp_path):
    """Not only there and back: single tensors of each layout, written out."""
    tensors = write(tmp_path / 'lavin', 'lavin')
    params = read_adapters(tmp_path / 'lavin', what_of(LAVIN, LAVIN_STAGE)).params
    block = 'decoder/layers/group_0/block/adapter_attention/'
    down, up = (tensors[f'layers.2.adapter_attn.conv_{name}.weight'].numpy() for name in 'AD')
    np.testing.assert_array_equal(params[block + 'down_kernel'][2], down[..., 0].T)
    for group in range(2):  # output channels 8 g .. 8 g + 8 read inner channels 2 g, 2 g + 1
        np.testing.assert_array_equal(params[block + 'up_1_kernel'][2, group], up[8 * group:8 * group + 8, :, 0].T)
    tensors = write(tmp_path / 'dual', 'dual_lora')
    params = read_adapters(tmp_path / 'dual', what_of(VCE, 'finetune')).params
    np.testing.assert_array_equal(
        params['decoder/layers/group_0/block/v_proj/adapter_0/task'][3],
        tensors['base_model.model.model.layers.3.self_attn.v_proj.lora_T.weight'].numpy().T)
    np.testing.assert_array_equal(params['frontend/enhancer/norm_levels/bias'],
                                  tensors['base_model.model.model.mm_projector.VCE_module.feat_norm.bias'].numpy())


@pytest.mark.parametrize(('case', 'rename'), [
    ('lavin', lambda name: f'module.{name}'), ('mm_projector', lambda name: f'base_model.model.{name}'),
    ('mm_projector', lambda name: name.removeprefix('model.')), ('vce', lambda name: f'base_model.model.{name}'),
    ('dual_lora', lambda name: name.removeprefix('base_model.model.')), ('dual_lora', lambda name: f'module.{name}'),
    ('lora', lambda name: name.removeprefix('base_model.model.'))])
def test_prefixes_of_wrappers_are_tolerated(tmp_path, case, rename):
    method, stage = STAGES[case]
    write(tmp_path / 'plain', case)
    write(tmp_path / 'renamed', case, rename=rename)
    plain, renamed = (read_adapters(tmp_path / name, what_of(method, stage)).params for name in ('plain', 'renamed'))
    assert plain.keys() == renamed.keys() and all((plain[path] == renamed[path]).all() for path in plain)


CLIP_L = Vit(PatchEmbed(14, width=1024, table_rows=16, table_cols=16, cls_token=True), num_layers=24, mlp_width=4096,
             num_heads=16)


@pytest.mark.parametrize(('width', 'mlp_width', 'layers', 'count'), [(4096, 11008, 32, 3_781_296),
                                                                     (5120, 13824, 40, 5_390_080)])
def test_the_names_of_lavin_at_7b_and_13b(width, mlp_width, layers, count):
    """As its checkpoints list them; nothing is computed."""
    llm = LanguageModel(32000, layers, width, mlp_width, width // 128, width // 128, 128)
    what = what_of(variants.lavin(llm, CLIP_L), 'finetune')
    found = name_map.foreign_shapes(name_map.entries(what.shapes, what.table))
    wanted = lavin_names(width, layers, 8, 1024, 24, 128)
    assert found == wanted and sum(int(np.prod(shape)) for shape in wanted.values()) == count


def test_the_names_of_dual_lora_at_7b():
    llm = LanguageModel(32000, 32, 4096, 11008, 32, 32, 128)
    embed = dataclasses.replace(CLIP_L.patch_embed, table_rows=24, table_cols=24)
    method = variants.vce_dual_lora(llm, dataclasses.replace(CLIP_L, patch_embed=embed), Projector())
    what = what_of(method, 'finetune')
    found = name_map.foreign_shapes(name_map.entries(what.shapes, what.table))
    assert found['model.layers.31.self_attn.q_proj.lora_A0.weight'] == (32, 4096)
    assert sum(int(np.prod(shape)) for name, shape in found.items() if 'lora_' in name) == 25_169_920
    cues = {name: shape for name, shape in found.items() if 'VCE_module' in name}
    assert cues == vce_names(1024, 16, 4, 4) and sum(int(np.prod(shape)) for shape in cues.values()) == 2_892_544


def test_the_names_of_a_run_of_lavins_code():
    """The state dict of its own (tiny) model, kept beside the golden numbers."""
    with np.load(pathlib.Path(__file__).parent / 'lavin_golden' / 'lavin_train.npz') as golden:
        wanted = {name.removeprefix('w/'): golden[name] for name in golden.files
                  if name.startswith('w/') and 'adapter' in name}
    encoder = Vit(PatchEmbed(14, width=32, table_rows=2, table_cols=2, cls_token=True), 8, 128, 4)
    method = variants.lavin(LanguageModel(61, 3, 32, 96, 4, 4, 8), encoder, Projector(activation='silu', hidden_width=6),
                            ModalityMixture(), taps=(3, 7))
    what = what_of(method, 'finetune')
    found = name_map.foreign_shapes(name_map.entries(what.shapes, what.table))
    assert found == {name: array.shape for name, array in wanted.items()} and len(found) == 93
    params = name_map.from_foreign(wanted, what.shapes, what.table)
    again = dict(name_map.to_foreign(params, what.shapes, what.table))
    assert all((again[name] == array).all() for name, array in wanted.items())


class Evil:
    def __reduce__(self):
        return (open, ('ran', 'w'))


def test_a_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': draw(lavin_names(16, 4, 4, 12, 2, 6)), 'args': Evil()}, 'evil.pth')
    with pytest.raises(UserError, match=r'could run code .*open.*; save its dict of tensors alone'):
        read_adapters(tmp_path / 'evil.pth', what_of(LAVIN, 'finetune'))
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match='plain.pth is not loaded|plain.pth cannot be read'):
        read_adapters(tmp_path / 'plain.pth', what_of(LAVIN, 'finetune'))
    assert not (tmp_path / 'ran').exists()


def test_what_training_scripts_save_beside_the_tensors(tmp_path):
    """Optimizer, epoch and the namespace of arguments, as LaVIN's does."""
    import argparse
    content = {'model': draw(lavin_names(16, 4, 4, 12, 2, 6)), 'epoch': 14, 'scaler': {'scale': 65536.0},
               'optimizer': {'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 9e-3}]},
               'args': argparse.Namespace(batch_size=4, output_dir='out', visual_adapter_type='router')}
    torch.save(content, tmp_path / 'checkpoint-14.pth')
    given = read_adapters(tmp_path, what_of(LAVIN, 'finetune'))
    assert given.files == (tmp_path / 'checkpoint-14.pth',)
    assert any("route_images_by = 'own'" in note for note in given.notes) and 'temperature (10)' in given.notes[0]


def changed(tmp_path, change, case='lavin'):
    file, (key, shapes), = next(iter(FILES[case].items()))
    tensors = draw(shapes)
    change(tensors)
    torch.save({key: tensors} if key else tensors, tmp_path / file)
    return read_adapters(tmp_path / file, what_of(*STAGES[case]))


@pytest.mark.parametrize(('change', 'message'), [
    (lambda t: t.pop('layers.1.adapter_attn.conv_B.bias'), 'misses layers.1.adapter_attn.conv_B.bias'),
    (lambda t: t.update({'layers.9.adapter_attn.conv_A.bias': torch.ones(4)}),
     'has unexpected layers.9.adapter_attn.conv_A.bias'),
    (lambda t: t.update({'adapter_modality_embedding.weight': torch.ones(3, 16)}),
     r'other shapes of adapter_modality_embedding.weight \(\[3, 16\] instead of \[2, 16\]\)'),
    (lambda t: t.update({'layers.0.adapter_attn.conv_D.weight': torch.ones(16, 1, 1)}),
     r'\[16, 1, 1\] instead of \[16, 2, 1\]'),
    (lambda t: t['adapter_proj.conv_A.bias'].fill_(float('nan')), 'holds NaN or infinity in frontend/projector_0/bias'),
    (lambda t: t.update({'adapter_proj.conv_A.bias': torch.ones(6, dtype=torch.int8)}), 'is of dtype int8'),
    (lambda t: t.clear(), 'holds no dict of tensors'),
])
def test_what_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        changed(tmp_path, change)


def test_a_projector_is_a_part_of_any_stage_of_llava(tmp_path):
    write(tmp_path / 'given', 'mm_projector')
    for method, stage in ((LORA, 'adapt'), (PLAIN, 'finetune')):
        given = read_adapters(tmp_path / 'given' / 'mm_projector.bin', what_of(method, stage))
        assert sorted(given.params) == [f'frontend/projector_{layer}/{name}' for layer in (0, 1)
                                        for name in ('bias', 'kernel')]
        assert any('adapter_0' in path or path == 'decoder/embedding' for path in given.absent)


def test_lora_folders(tmp_path):
    write(tmp_path / 'given', 'lora')
    what, config = what_of(LORA, 'adapt'), tmp_path / 'given' / 'adapter_config.json'
    with pytest.raises(UserError, match='give the folder'):
        read_adapters(tmp_path / 'given' / 'adapter_model.bin', what)
    config.write_text(json.dumps({'r': 3, 'lora_alpha': 3}))
    with pytest.raises(UserError, match=r'scale the adapters by 1, LowRank.scale is 2; set it to 1'):
        read_adapters(tmp_path / 'given', what)
    config.write_text(json.dumps({'r': 3, 'lora_alpha': 2 * 3**0.5, 'use_rslora': True}))
    given = read_adapters(tmp_path / 'given', what)
    with pytest.raises(UserError, match='has no LowRank adapters'):
        read_adapters(tmp_path / 'given', what_of(PLAIN, 'pretrain'))
    (tmp_path / 'given' / 'non_lora_trainables.bin').unlink()
    with pytest.raises(UserError, match='give the LoRA folder whole'):
        read_adapters(tmp_path / 'given', what)
    export_adapters(unflatten(given.params), LORA, 'adapt', str(tmp_path / 'out'), base='lmsys/vicuna-7b-v1.5')
    written = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
    assert (written['r'], written['lora_alpha'], written['base_model_name_or_path']) == (3, 6.0, 'lmsys/vicuna-7b-v1.5')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (config['mm_projector_type'], config['mm_vision_select_layer']) == ('mlp2x_gelu', -2)
    assert 'only if its name holds `llava` and `lora`' in (tmp_path / 'out' / 'README.md').read_text()


def test_quirks_of_the_released_enhancer_are_told(tmp_path):
    def untrained(tensors):
        for name in tensors:
            if '.VCE_module.norm.' in name:
                tensors[name].fill_(float(name.endswith('weight')))

    assert 'set CueEnhancer.final_norm = False and CueEnhancer.anchor = -1' in changed(tmp_path, untrained, 'vce').notes[0]
    assert not changed(tmp_path, lambda tensors: None, 'vce').notes
    frontend = VCE.stage('pretrain').model.vision
    fusion = dataclasses.replace(frontend.fusion, final_norm=False, anchor=-1)
    method = variants.vce_dual_lora(LLM, frontend.encoder, frontend.projector, fusion, taps=frontend.taps)
    given = read_adapters(tmp_path / 'adapter_weight.pth', what_of(method, 'pretrain'))
    norm = 'model.mm_projector.VCE_module.norm.'
    assert [name for name, _ in given.ignored] == [f'{norm}weight', f'{norm}bias']
    assert 'drops it' in given.ignored[0][1] and not any('norm_out' in path for path in given.params)
    notes = ' '.join(export_adapters(unflatten(given.params), method, 'pretrain', str(tmp_path / 'out')).notes)
    assert 'so the file has no `VCE_module.norm`' in notes and 'query_layer' not in notes
    assert not any('VCE_module.norm.' in name for name in stored(tmp_path / 'out'))
    given = changed(tmp_path, untrained, 'vce')
    notes = ' '.join(export_adapters(unflatten(given.params), VCE, 'pretrain', str(tmp_path / 'other')).notes)
    assert 'assign its result there' in notes and 'set query_layer there' in notes


def test_what_has_no_adapter_files(tmp_path):
    params, folder = {}, str(tmp_path / 'out')
    with pytest.raises(UserError, match='export: vora has no adapter files of its own, only lavin, llava, vce_du'):
        export_adapters(params, METHODS['vora'][0], 'pretrain', folder)
    with pytest.raises(UserError, match=r'no place for all that this stage trains \(decoder/'):
        export_adapters(params, PLAIN, 'finetune', folder)
    with pytest.raises(UserError, match='no place for all that this stage trains'):
        export_adapters(params, METHODS['dual_on_llava'][0], 'adapt', folder)
    with pytest.raises(UserError, match='the checkpoint does not fit the model: it misses'):
        export_adapters(params, LAVIN, 'finetune', folder)
    with pytest.raises(UserError, match='act on all slots'):
        frontend = PLAIN.stage('pretrain').model.vision
        method = variants.llava(LLM, frontend.encoder, frontend.projector, adapter=LowRank(3, 2.0, scope='vision'))
        export_adapters(params, method, 'adapt', folder)
    assert not (tmp_path / 'out').exists()
    assert not looks_like_adapters(tmp_path) and not looks_like_adapters(tmp_path / 'gone')


def test_a_changed_file_is_found(tmp_path):
    tensors = write(tmp_path / 'given', 'lavin')
    given = read_adapters(tmp_path / 'given', what_of(LAVIN, 'finetune'))
    params, model = unflatten(given.params), LAVIN.stage('finetune').model
    export_adapters(params, LAVIN, 'finetune', str(tmp_path / 'out'))
    file, record = tmp_path / 'out' / 'checkpoint-0.pth', read_record(tmp_path / 'out')
    name = 'layers.1.adapter_attn.conv_B.weight'
    tensors[name][5, 1, 0] += 0.25
    torch.save({'model': tensors}, file)
    found = compare_adapters(params, model, tmp_path / 'out', record)
    assert found.problems == ['parameters that differ (1): decoder/layers/group_0/block/adapter_attention/up_0_kernel']
    assert found.max_abs_tensor_diff == pytest.approx(0.25) and found.worst_tensor.endswith('up_0_kernel')
    del tensors[name]
    torch.save({'model': tensors}, file)
    problem, = compare_adapters(params, model, tmp_path / 'out', record).problems
    assert re.search('misses ' + re.escape(name), problem)


def test_a_projector_of_one_layer(tmp_path):
    frontend = PLAIN.stage('pretrain').model.vision
    method = variants.llava(LLM, frontend.encoder, Projector(num_layers=1))
    tensors = draw({'model.mm_projector.weight': (16, 12), 'model.mm_projector.bias': (16,)})
    torch.save(tensors, tmp_path / 'mm_projector.bin')
    params = read_adapters(tmp_path, what_of(method, 'pretrain')).params
    assert sorted(params) == ['frontend/projector_0/bias', 'frontend/projector_0/kernel'] and looks_like_adapters(tmp_path)
    export_adapters(unflatten(params), method, 'pretrain', str(tmp_path / 'out'))
    again = stored(tmp_path / 'out')
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_without_torch(tmp_path, monkeypatch):
    write(tmp_path / 'given', 'vce')
    what = what_of(VCE, 'pretrain')
    params = unflatten(read_adapters(tmp_path / 'given', what).params)
    monkeypatch.setitem(sys.modules, 'torch', None)
    for call in (lambda: read_adapters(tmp_path / 'given', what),
                 lambda: export_adapters(params, VCE, 'pretrain', str(tmp_path / 'out'))):
        with pytest.raises(UserError, match=r"not installed; install it with pip install 'vora_jax\[torch\]'"):
            call()
    assert not (tmp_path / 'out').exists()


def test_dtypes_that_differ_are_written_as_the_widest(tmp_path):
    write(tmp_path / 'given', 'vce')
    params = read_adapters(tmp_path / 'given', what_of(VCE, 'pretrain')).params
    mixed = params | {'frontend/projector_0/bias': params['frontend/projector_0/bias'].astype(ml_dtypes.bfloat16)}
    assert export_adapters(unflatten(mixed), VCE, 'pretrain', str(tmp_path / 'out')).dtype == 'float32'
    assert export_adapters(unflatten(mixed), VCE, 'pretrain', str(tmp_path / 'half'), dtype='float16').dtype == 'float16'
    assert {tensor.dtype for tensor in stored(tmp_path / 'half').values()} == {torch.float16}
    assert flatten(unflatten(mixed)).keys() == mixed.keys()


@pytest.mark.parametrize('changes', [{'pool': 2}, {'taps': (0, 1)}], ids=str)
def test_what_the_released_projector_cannot_be_fed_is_told(changes, tmp_path):
    frontend = PLAIN.stage('pretrain').model.vision
    method = variants.llava(LLM, frontend.encoder, frontend.projector, **changes)
    model = method.stage('pretrain').model
    with pytest.raises(UserError, match='takes one level of its encoder, a token for each patch'):
        export_adapters(random_params(model, method_batch('llava')), method, 'pretrain', str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()
