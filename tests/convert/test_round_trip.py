"""Folders of `transformers`, read and written again, and computed with."""
import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_foreign import IMAGE_TOKEN, LLAVAS, LLMS, VITS, packed, pictures, read, write
from tiny_methods import METHODS
from tiny_model import quick_jit, strict  # noqa: F401
from tiny_models import make_any

from vora_jax import variants
from vora_jax.convert.export import own
from vora_jax.convert.export.exportable import exportable, folded, parameter_shapes
from vora_jax.convert.export.foreign_stream import stream
from vora_jax.convert.export.plan import Request
from vora_jax.convert.families.hf_config import llm_from_config, llm_to_config
from vora_jax.convert.families.own_layout import Prompting
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.families.vit_config import vit_table, vit_to_config
from vora_jax.convert.names.name_map import (
    alias_pairs,
    entries,
    foreign_shapes,
    from_foreign,
    match_names,
    renamed,
    to_foreign,
)
from vora_jax.params import unflatten
from vora_jax.vision.vit import VisionTransformer

pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
CASES = LLMS | VITS | LLAVAS
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}
TEXTS = ([5, 9, 33, 2, 71, 8, 8, 19, 4, 60, 1, 3, 27, 44, 90, 12, 6, 77, 21, 30, 2, 18, 55, 61], [80, 7, 7, 31])


def rounded(*cases):
    """In bfloat16 too, where float32 and other cases in bfloat16 already say much."""
    return [pytest.param(case, 'bfloat16', marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """(torch model in float64, what we read of its folder) of a case and dtype, once each."""
    @functools.cache
    def make(case, dtype='float32'):
        folder = tmp_path_factory.mktemp(case)
        return write(folder, CASES[case], dtype).double(), read(folder)
    return make


def close(ours, theirs, dtype, what):
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert ours.shape == theirs.shape and error <= TOLERANCE[dtype], f'{what}: {error:.1e}'


@pytest.mark.parametrize('case', CASES)
def test_there_and_back_keeps_every_bit(case, written):
    found, _, _, shapes, params, tensors = written(case, 'bfloat16')[1]
    theirs = {renamed(name, found.table): array for name, array in tensors.items()}
    assert len(theirs) == len(tensors)
    back = dict(to_foreign(params, shapes, found.table))
    assert back.keys() == theirs.keys()
    for name, array in back.items():
        assert array.dtype == theirs[name].dtype and array.flags.c_contiguous
        np.testing.assert_array_equal(array, theirs[name], name)
    assert {name: array.shape for name, array in back.items()} == foreign_shapes(entries(shapes, found.table))


@pytest.mark.parametrize('case', [*LLMS, *VITS])
def test_our_configuration_and_names_load_in_transformers(case, written, tmp_path):
    import torch
    import transformers
    model, (found, _, _, shapes, params, _) = written(case)
    part, = found.arguments.values()
    config = llm_to_config(part) if case in LLMS else vit_to_config(part)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    save_file(dict(to_foreign(params, shapes, found.table)), tmp_path / 'model.safetensors', {'format': 'pt'})
    kind = getattr(transformers, config['architectures'][0])
    again, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert all((value == state[name]).all() for name, value in again.state_dict().items())
    inputs = [torch.tensor([TEXTS[0]]) if case in LLMS else torch.from_numpy(pictures()).double().permute(0, 3, 1, 2)]
    with torch.no_grad():
        # The first output: logits, or the last hidden state; Mistral without a window comes back as a Llama.
        np.testing.assert_allclose(again.double().eval()(*inputs)[0], model(*inputs)[0], atol=1e-5)


@pytest.mark.parametrize('case, dtype', [(case, 'float32') for case in LLMS] + [
    ('qwen2', 'bfloat16'), *rounded('qwen3', 'llama3')])
def test_logits(case, dtype, written):
    import torch
    theirs, (_, _, model, _, params, _) = written(case, dtype)
    batch = packed([[list(text)] for text in TEXTS], None)
    logits = _logits(_in_dtype(model, dtype))(unflatten(params), batch)
    start = 0
    for text in TEXTS:
        with torch.no_grad():
            expected = theirs(torch.tensor([text])).logits[0]
        close(logits[start:start + len(text)], expected, dtype, case)
        start += len(text)


@pytest.mark.parametrize('case, dtype', [(case, 'float32') for case in VITS] + [
    ('siglip', 'bfloat16'), ('dinov2_gated', 'bfloat16'), *rounded('clip', 'aimv2')])
def test_features(case, dtype, written):
    theirs, (found, method, _, _, params, _) = written(case, dtype)
    compare_features(found, method, params, theirs, case, dtype)


def compare_features(found, method, params, theirs, case, dtype):
    """All blocks' outputs, the last output and the pooled vectors of three packed pictures."""
    vit, other = found.arguments['vit'], vars(theirs.config).get('is_native') or not case.startswith('aimv2')
    images = [*pictures(), *(pictures(1, (3, 5)) if other else ())]
    patches = packed([[image] for image in images], method.vision_tokens).patches
    encoder = VisionTransformer(vit, dtype=jnp.dtype(dtype))
    features = _jitted(encoder)(unflatten(params)['encoder'], patches)
    for index, image in enumerate(images):
        here = patches.image_id[0] == index
        expected = _torch_features(theirs, image)
        for layer, block in enumerate(expected['blocks']):
            close(features.blocks[layer, 0, here], block, dtype, f'{case}: image {index}, block {layer}')
        close(features.output[0, here], expected['output'], dtype, f'{case}: image {index}, output')
        if expected['pooled'] is not None:
            pooled = features.output[0, here][0] if vit.pool == 'none' else features.pooled[0, index]
            close(pooled, expected['pooled'], dtype, f'{case}: image {index}, pooled')


def _torch_features(model, image):
    """Outputs of the blocks, by hooks: `hidden_states` of some families end with the normed output."""
    import torch
    stack = next(module for name, module in model.named_modules() if name in ('encoder.layers', 'encoder.layer'))
    blocks = []
    hooks = [layer.register_forward_hook(lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out))
             for layer in stack]
    options = {}
    if image.shape[0] != image.shape[1] and model.config.model_type in ('clip_vision_model', 'siglip_vision_model'):
        options['interpolate_pos_encoding'] = True
    with torch.no_grad():
        out = model(torch.from_numpy(image).double().permute(2, 0, 1)[None], **options)
        output = out.last_hidden_state
        if model.config.model_type == 'clip_vision_model':
            output = model.post_layernorm(output)
    for hook in hooks:
        hook.remove()
    pooled = out.pooler_output
    return {'blocks': [block[0] for block in blocks], 'output': output[0], 'pooled': None if pooled is None else pooled[0]}


def test_features_of_apples_own_layout(written, tmp_path):
    """The same encoder under the names and fields of the first release (`trunk.*`, fused qkv, fc1 to fc3)."""
    for case, native in (('aimv2_headless', False), ('aimv2_native', True)):
        theirs, (*_, tensors), own = *written(case), {}
        with_biases = case == 'aimv2_headless'
        for name, to in (('patch_embed', 'patchifier.proj'), ('rms_norm', 'patchifier.norm')):
            for kind in ('weight', 'bias'):
                if f'embeddings.{name}.{kind}' in tensors:
                    own[f'preprocessor.{to}.{kind}'] = tensors[f'embeddings.{name}.{kind}']
        own['trunk.post_trunk_norm.weight'] = tensors['rms_norm.weight']
        if not native:
            own['preprocessor.pos_embed'] = tensors['embeddings.position_embedding.weight'][None]
        for layer in range(2):
            old, new = f'encoder.layers.{layer}.', f'trunk.blocks.{layer}.'
            own |= {f'{new}norm_{i}.weight': tensors[f'{old}rms_norm{i}.weight'] for i in (1, 2)}
            for kind in ('weight', 'bias')[:1 + with_biases]:
                own[f'{new}attn.qkv.{kind}'] = np.concatenate([tensors[f'{old}attention.{x}_proj.{kind}'] for x in 'qkv'])
                own[f'{new}attn.proj.{kind}'] = tensors[f'{old}attention.out_proj.{kind}']
                own |= {f'{new}mlp.{to}.{kind}': tensors[f'{old}ffn.{name}_proj.{kind}']
                        for name, to in (('gate', 'fc1'), ('down', 'fc2'), ('up', 'fc3'))}
        out = tmp_path / case
        out.mkdir()
        save_file(own, out / 'model.safetensors')
        config = {'model_type': 'aimv2', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
                  'num_attention_heads': 2, 'image_size': 28, 'patch_size': 7, 'rms_norm_eps': 1e-5,
                  'qkv_bias': with_biases, 'use_bias': with_biases, 'architectures': ['AIMv2Model']}
        (out / 'config.json').write_text(json.dumps(config))
        found, method, _, shapes, params, _ = read(out)
        back = dict(to_foreign(params, shapes, found.table))
        assert back.keys() == own.keys() and all((back[name] == own[name]).all() for name in own)
        assert found.arguments['vit'].patch_embed.positions == ('sincos' if native else 'bilinear')
        compare_features(found, method, params, theirs, case, 'float32')
        if native:  # a buffer of sines beside the weights is not read
            save_file(own | {'preprocessor.pos_embed': np.zeros((1, 16, 32), np.float32)}, out / 'model.safetensors')
            (out / 'config.json').write_text(json.dumps(config | {'is_native': True}))
            assert (read(out)[4]['encoder/patch_embed/kernel'] == params['encoder/patch_embed/kernel']).all()


@pytest.mark.parametrize('case, dtype', [(case, 'float32') for case in LLAVAS] + [('llava', 'bfloat16')])
def test_logits_of_pictures(case, dtype, written):
    import torch
    theirs, (_, method, model, _, params, _) = written(case, dtype)
    images, (text, more) = pictures(), TEXTS
    batch = packed([[list(more), images[0], list(text)], [images[1], list(more)]], method.vision_tokens)
    logits = _logits(_in_dtype(model, dtype))(unflatten(params), batch)
    start = 0
    for image, before, after in ((images[0], more, text), (images[1], [], more)):
        ids = [*before, *[IMAGE_TOKEN] * 16, *after]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids]), torch.from_numpy(image).double().permute(2, 0, 1)[None]).logits
        close(logits[start:start + len(ids)], expected[0], dtype, case)
        start += len(ids)


@pytest.mark.parametrize('case, spell', [
    ('llava', lambda name: name.replace('vision_tower.', 'vision_tower.vision_model.')),  # transformers 4
    ('llava', lambda name: 'lm_head.weight' if 'lm_head' in name else  # 4.52 in memory
        f'model.{name.replace("language_model.model.", "language_model.").replace("tower.", "tower.vision_model.")}'),
    ('clip', lambda name: f'vision_model.{name}'), ('siglip', lambda name: f'vision_model.{name}'),
    ('aimv2', lambda name: f'vision_model.{name}'), ('dinov2', lambda name: f'dinov2.{name}')])
def test_other_spellings(case, spell, written):
    found, _, _, shapes, _, tensors = written(case, 'bfloat16')[1]
    given = {spell(name): array.shape for name, array in tensors.items()}
    assert given.keys() != tensors.keys()
    names, _ = match_names(entries(shapes, found.table), given, found.table, 'the folder')
    assert sorted(names.values()) == sorted(given)
    assert len(names) == len(given)


def test_a_head_beside_the_embedding_it_is_tied_to(written):
    found, _, _, shapes, _, tensors = written('qwen2_tied', 'bfloat16')[1]
    given = {name: array.shape for name, array in tensors.items()}
    pieces = entries(shapes, found.table)
    assert 'lm_head.weight' not in given and alias_pairs(pieces, given, found.table) == []
    given['lm_head.weight'] = (96, 32)
    assert match_names(pieces, given, found.table, 'the folder')[1] == []
    assert alias_pairs(pieces, given, found.table) == [('lm_head.weight', 'model.embed_tokens.weight')]


def test_configurations_give_themselves_again(written):
    for case in LLMS:
        llm = written(case, 'bfloat16')[1][0].arguments['llm']
        assert llm_from_config(llm_to_config(llm)) == llm, case
    for case in VITS:
        found = written(case, 'bfloat16')[1][0]
        vit = found.arguments['vit']
        assert vit_to_config(vit)['model_type'] and set(vit_table(vit).rows) == {
            row._replace(path=row.path.removeprefix('encoder/')) for row in found.table.rows}


@pytest.mark.parametrize('kind, merged', [*((kind, False) for kind in METHODS), ('vora_vision', True)])
def test_the_own_layout_comes_back_bit_for_bit(kind, merged):
    """Every method; a merged adapter of vision slots comes back as kernels of theirs."""
    params, model, rule = make_any(kind)
    what = exportable(params, model)
    what = folded(what) if merged else what
    plan = own.plan(Request(what, 'float32', Prompting('', 3), rule, image_token_id=300))
    content = plan.parts['']
    tensors = {name: np.array(array) for name, array in stream(content, 'float32')}
    given = {name: array.shape for name, array in tensors.items()}
    found = recognise(json.loads(json.dumps(content.files['config.json'])), given)
    method = getattr(variants, found.method)(**found.arguments)
    again = method.stage(found.stage).model
    assert (again.llm, again.vision, again.route_token, _layers(again)) == (
        what.model.llm, what.model.vision, what.model.route_token, _layers(what.model))
    assert again.distillation is None and method.vision_tokens == dataclasses.replace(rule, cls=method.vision_tokens.cls)
    shapes = parameter_shapes(again)
    names, left = match_names(entries(shapes, found.table), given, found.table, 'the folder')
    assert not left and sorted(names.values()) == sorted(given)
    back = from_foreign({name: tensors[given] for name, given in names.items()}, shapes, found.table)
    expected = _flat_layers(what.params)
    found_layers = _flat_layers(back)
    assert found_layers.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found_layers[path], leaf, path, strict=True)


def _layers(model):
    return [(dict(group.adapters), set(group.biases), dict(group.mixtures), group.prompts) for group in model.groups
            for _ in range(group.num_layers)]


def _flat_layers(params):
    """{path, layers counted over all groups: array}."""
    flat, groups = {}, {}
    for path, leaf in params.items():
        if path.startswith('decoder/layers/group_'):
            groups.setdefault(int(path.split('/')[2][6:]), {})[path.split('/', 3)[3]] = leaf
        else:
            flat[path] = np.asarray(leaf)
    at = 0
    for _, leaves in sorted(groups.items()):
        num_layers, = {leaf.shape[0] for leaf in leaves.values()}
        for layer in range(num_layers):
            flat |= {f'{at + layer}/{name}': np.asarray(leaf[layer]) for name, leaf in leaves.items()}
        at += num_layers
    return flat


def _in_dtype(model, dtype):
    return model.clone(llm=dataclasses.replace(model.llm, activation_dtype=dtype))


def _logits(model):
    """Compiled (params, batch of one row) -> f[S, V]."""
    def run(params, batch):
        hidden = model.apply({'params': params}, batch).hidden[0]
        return hidden.astype(jnp.float32) @ model.unembedding(params).astype(jnp.float32)
    return quick_jit(run)


def _jitted(encoder):
    return quick_jit(lambda params, patches: encoder.apply({'params': params}, patches))
