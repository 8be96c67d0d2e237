"""The original LaVIN code's numbers, from its own weights.

Computed once by luogen1996/LaVIN at dd0a1bf (torch 2.13, CPU, float32, dropout off) on tiny random weights: one adapter,
the bottleneck projector, and the forward pass and gradients of a whole training model on two rows with a picture and one
without. There padding is text that no other slot sees; here it is left out and not compared.

The released vision tower encodes an all-zero picture for a row without one. Its tokens go nowhere, and its states route
other rows only where it stands in the batch's first row, which is not so here. Our rows without a picture hold none; they
are compared so, and with the zero picture filled in among their patches.
"""
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import quick_jit, strict  # noqa: F401

from vora_jax import variants
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.names.layouts import CONVOLUTION, LEADING_1, SAME, TABLE, TRANSPOSED, Layout
from vora_jax.convert.names.name_map import Row, Table, from_foreign, joined, to_foreign
from vora_jax.convert.names.rows import linear_rows, norm_rows
from vora_jax.convert.names.tables.adapters import LAVIN_ADAPTERS
from vora_jax.data.images.patches import patchify
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.llm.decoder import LanguageModel
from vora_jax.llm.generate import empty_cache
from vora_jax.nn.modality_mixture import MixtureBranch, ModalityMixture
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.attention import attention
from vora_jax.params import combine, flatten, partition, unflatten
from vora_jax.training.losses import objective, totals
from vora_jax.types import ROUTE, VISION, KeyRange
from vora_jax.vision.encoder_frontend import EncoderFrontend, Projector
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

HERE = pathlib.Path(__file__).parent / 'lavin_golden'
# Bounds of outputs, of gradients relative to the largest of their tensor, and of gradients where that is no bound: 6 router
# tensors have cancelled to less than 5e-4. The originals' own rounding is up to 5.6e-5 of their largest value there (4e-10;
# found by a float64 run of the model here), while the gradients before the sum are about 0.1 in float32.
OUTPUTS, RELATIVE, CANCELLED = 5e-5, 2e-5, 1e-8
HEADS = 4  # of the language model

# Query and key kernels: theirs rotate the pairs (2 i, 2 i + 1) of a head, ours (i, i + H / 2).
ROTARY = Layout(lambda x: x.T.reshape(HEADS, 2, -1, len(x)).swapaxes(1, 2).reshape(-1, len(x)),
                lambda x, _: x.reshape(HEADS, -1, 2, x.shape[1]).swapaxes(1, 2).reshape(-1, x.shape[1]).T,
                lambda shape: shape[::-1])


def whole_model_table():
    """Meta's, OpenAI's and the adapters' names."""
    decoder, layer = 'decoder/layers/*/block/', 'layers.{layer}.'
    encoder, visual = 'frontend/encoder/', 'backbone.visual.'
    block, resblock = f'{encoder}blocks/*/block/', visual + 'transformer.resblocks.{layer}.'
    kernels = {'q_proj': ('attention.wq', ROTARY), 'k_proj': ('attention.wk', ROTARY),
               'v_proj': ('attention.wv', TRANSPOSED), 'o_proj': ('attention.wo', TRANSPOSED),
               'gate_proj': ('feed_forward.w1', TRANSPOSED), 'up_proj': ('feed_forward.w3', TRANSPOSED),
               'down_proj': ('feed_forward.w2', TRANSPOSED)}
    frozen = Table((
        Row('decoder/embedding', 'tok_embeddings.weight', SAME), Row('decoder/lm_head', 'output.weight', TRANSPOSED),
        Row('decoder/norm/scale', 'norm.weight', SAME),
        *(Row(f'{decoder}{ours}/kernel', f'{layer}{theirs}.weight', how) for ours, (theirs, how) in kernels.items()),
        Row(f'{decoder}attention_norm/scale', f'{layer}attention_norm.weight', SAME),
        Row(f'{decoder}mlp_norm/scale', f'{layer}ffn_norm.weight', SAME),
        Row(f'{encoder}patch_embed/kernel', f'{visual}conv1.weight', CONVOLUTION),
        Row(f'{encoder}patch_embed/cls', f'{visual}class_embedding', SAME),
        Row(f'{encoder}patch_embed/cls_position', f'{visual}positional_embedding', LEADING_1),
        Row(f'{encoder}patch_embed/positions', f'{visual}positional_embedding', TABLE),
        *norm_rows(f'{encoder}pre_norm', f'{visual}ln_pre'), *norm_rows(f'{encoder}norm', f'{visual}ln_post'),
        *norm_rows(f'{block}attention_norm', f'{resblock}ln_1'), *norm_rows(f'{block}mlp_norm', f'{resblock}ln_2'),
        *(Row(f'{block}{x}_proj/{leaf}', f'{resblock}attn.in_proj_{name}', how)
          for leaf, name, how in (('kernel', 'weight', TRANSPOSED), ('bias', 'bias', SAME)) for x in 'qkv'),
        *linear_rows(f'{block}o_proj', f'{resblock}attn.out_proj'), *linear_rows(f'{block}up_proj', f'{resblock}mlp.c_fc'),
        *linear_rows(f'{block}down_proj', f'{resblock}mlp.c_proj'),
    ), ignored=((f'{visual}proj', 'features are taken before it'),))
    return joined(frozen, LAVIN_ADAPTERS)


def load(name, prefix=''):
    """{name without the prefix: array} of the golden file's arrays that have it."""
    with np.load(HERE / f'{name}.npz') as arrays:
        return {key[len(prefix):]: arrays[key] for key in arrays.files if key.startswith(prefix)}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    error = np.max(np.abs(np.asarray(ours) - theirs))
    assert error <= OUTPUTS, error


def same_gradient(ours, theirs, name):
    error = np.max(np.abs(np.asarray(ours) - theirs))
    assert error <= max(RELATIVE * np.max(np.abs(theirs)), CANCELLED), (name, error)


def test_the_adapter():
    golden, weights, gradients = (load('router_g2_s1_t10', prefix) for prefix in ('', 'w/', 'g/'))
    meta, x = json.loads(str(golden['meta'])), golden['x']
    mixture = ModalityMixture(meta['hidden_dim'], meta['groups'], meta['scale'], meta['t'])
    rows, slots, width = x.shape
    shapes = {'down_kernel': (width, 8), 'down_bias': (8,), 'router_kernel': (width, 2), 'router_bias': (2,),
              'up_0_kernel': (2, 4, width // 2), 'up_0_bias': (width,),
              'up_1_kernel': (2, 4, width // 2), 'up_1_bias': (width,)}
    place, name = 'decoder/layers/group_0/block/adapter_attention/', 'layers.0.adapter_attn.'
    shapes = {place + ours: (1, *shape) for ours, shape in shapes.items()}
    stacked = from_foreign({name + theirs: x for theirs, x in weights.items()}, shapes, LAVIN_ADAPTERS)
    params = {path.removeprefix(place): x[0] for path, x in stacked.items()}
    first = jnp.zeros((rows, slots), jnp.int32)
    everywhere = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (rows, slots))

    @jax.jit
    def call(params, x, route_slot=first, routes=None):
        context = SlotContext(KeyRange(None, None), route_slot=route_slot, write_slot=everywhere)
        return MixtureBranch(mixture).apply({'params': params}, x, context, routes)

    def loss(params, x):
        return jnp.sum(call(params, x)[0] * golden['gy'])

    memory = jnp.zeros((rows, slots + 1, 2), jnp.float32).at[:, slots].set(golden['fixed_weights'])
    y, routes = call(params, x, routes=memory)
    close(y, golden['y'])  # measured: 5e-7
    close(routes[:, 0], golden['routing'])
    # Weights that are given instead of computed are what decoding does with a slot that it has in its cache.
    close(call(params, x, jnp.full_like(first, slots), memory)[0], golden['y_fixed'])
    ours, of_x = quick_jit(jax.grad(loss, (0, 1)))(params, x)
    same_gradient(of_x, golden['grad_x'], 'x')  # measured: 1e-7
    ours = dict(to_foreign({place + path: x[None] for path, x in ours.items()}, shapes, LAVIN_ADAPTERS))
    assert len(ours) == len(gradients)
    for theirs, expected in gradients.items():
        same_gradient(ours[name + theirs], expected, theirs)  # measured: 1e-6


def test_the_bottleneck_projector():
    """In a front end whose encoder passes its pictures on unchanged: identity patches, all else zero."""
    golden, weights = load('visual_neck'), load('visual_neck', 'w/')
    hidden, features = weights['conv_A.weight'].shape
    rows, places, _ = golden['x'].shape
    embed = PatchEmbed(patch_size=4, width=features, table_rows=1, table_cols=1, norm=False, bias=False)
    projector = Projector(activation='silu', hidden_width=hidden)
    frontend = EncoderFrontend(Vit(embed, num_layers=1, mlp_width=4, num_heads=1), (0,), projector)
    module = frontend.module(golden['y'].shape[-1], attention, jnp.dtype('float32'))
    pixels = np.zeros((rows, places, 48), np.float32)
    pixels[..., :features] = golden['x']
    budgets = Budgets(places, places, 1, 48, 'float32')
    patches = stack([layout([[Picture(picture, 1, places)]], budgets) for picture in pixels]).patches
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), patches)['params'])
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(shapes).items()}
    params['encoder/patch_embed/kernel'] = np.eye(48, features, dtype=np.float32)
    shapes = {f'frontend/{path}': leaf.shape for path, leaf in params.items() if path.startswith('projector')}
    given = from_foreign({f'adapter_proj.{name}': x for name, x in weights.items()}, shapes, LAVIN_ADAPTERS)
    params |= {path.removeprefix('frontend/'): x for path, x in given.items()}
    close(quick_jit(module.apply)({'params': unflatten(params)}, patches), golden['y'])  # measured: 5e-7


@pytest.fixture(scope='module')
def whole():
    """(golden arrays, stage, parameters, {path: shape}, table, rule) of the training model."""
    golden, table = load('lavin_train'), whole_model_table()
    meta = json.loads(str(golden['meta']))
    vit, width = meta['vit'], meta['dim']
    llm = LanguageModel(meta['vocab'], meta['n_layers'], width, meta['ffn'], HEADS, HEADS, width // HEADS,
                        norm_eps=meta['norm_eps'])
    grid = vit['image'] // vit['patch']
    embed = PatchEmbed(vit['patch'], vit['width'], grid, grid, norm=False, bias=False, cls_token=True)
    encoder = Vit(embed, vit['layers'], 4 * vit['width'], vit['heads'], 1e-5, 'layer', 'gelu_quick',
                  ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj'), pre_norm=True)
    method = variants.lavin(
        llm, encoder, Projector(activation='silu', hidden_width=meta['hidden_proj']),
        ModalityMixture(meta['adapter_dim'], meta['groups'], meta['scale'], meta['t']),
        taps=tuple(range(vit['every'] - 1, vit['layers'], vit['every'])), route_images_by='first_row')
    stage = method.stage('finetune')
    shapes = parameter_shapes(stage.model)
    params = unflatten(from_foreign(load('lavin_train', 'w/'), shapes, table))
    return golden, stage, params, shapes, table, method.vision_tokens


def batch_of(golden, rule, zero_pictures=False):
    """The golden's examples as rows of our own packing: a prefix and the picture come after BOS, padding is left out.

    zero_pictures: rows without a picture have an all-zero one among their patches (and nothing of it in their slots).
    """
    def size(part):
        return len(part.ids) if isinstance(part, Text) else rule.num_tokens(part.rows, part.cols)

    length = golden['examples'].shape[1]
    side = golden['images'].shape[-1] // rule.patch_size
    budgets = Budgets(length, rule.num_places(side, side), 1, 3 * rule.patch_size**2, 'float32')
    rows = []
    for ids, labels, image, seen in zip(*(golden[name] for name in ('examples', 'labels', 'images', 'indicators'))):
        prefix = golden['prefix_img' if seen else 'prefix_nonimg'].tolist()
        picture = Picture(patchify(image.transpose(1, 2, 0), rule.patch_size), side, side)
        segment = [Text(ids[:1].tolist()), Text(prefix)] + [picture] * int(seen)
        segment += [Text([token], bool(label)) for token, label in zip(ids[1:].tolist(), labels[1:].tolist()) if token]
        while rule.route_token + sum(map(size, segment)) > length:  # the original cuts what does not fit
            segment.pop()
        row = layout([segment], budgets, rule=rule)
        if zero_pictures and not seen:
            row = row._replace(patches=layout([[picture]], budgets, rule=rule).patches)
            assert not row.patches.pixels.any()
        rows.append(row)
    return stack(rows)


def test_rows_are_laid_out_alike(whole):
    """The modality slot is first and hidden, the picture's tokens come after BOS and prefix, and answers are learned."""
    golden, *_, rule = whole
    batch = batch_of(golden, rule)
    real = batch.modality > 0
    assert (batch.modality[:, 0] == ROUTE).all() and batch.tokens[:, 0].tolist() == golden['indicators'].tolist()
    assert not batch.route_slot[real].any() and (batch.key_start[:, 1:][real[:, 1:]] == 1).all()
    assert np.argwhere(batch.modality == VISION).tolist() == [[0, 5], [0, 6], [2, 5], [2, 6]]
    assert batch.tokens[1, 1:7].tolist() == [1, *golden['prefix_nonimg']]
    for row, labels in enumerate(golden['labels']):
        learned = batch.targets[row][batch.loss_mask[row] > 0]
        assert learned.tolist() == labels[labels > 0][:len(learned)].tolist()
    assert batch.loss_mask.sum(1).tolist() == [8, 6, 11]


def test_the_picture_tokens(whole):
    """Each patch is routed as the one in the same place of row 0; row 1 has the original's zero picture or nothing."""
    golden, stage, params, *_, rule = whole

    @quick_jit
    def tokens(params, patches):
        return stage.model.apply({'params': params}, patches, method=lambda model, patches: model.frontend(patches))

    close(tokens(params, batch_of(golden, rule, zero_pictures=True).patches), golden['image_embeds'])  # measured: 7e-6
    without = tokens(params, batch_of(golden, rule).patches)
    close(without[::2], golden['image_embeds'][::2])


def test_the_whole_model(whole):
    """Hidden states, logits, routing of every layer, loss, and the gradients of all that is trained."""
    golden, stage, params, shapes, table, rule = whole
    model = stage.model
    trainable, frozen = partition(params, stage.trainable)
    theirs = load('lavin_train', 'g/')
    assert len(theirs) == 93
    trained = {path: np.full(shape, path in flatten(trainable)) for path, shape in shapes.items()}
    assert {name for name, array in to_foreign(trained, shapes, table) if array.all()} == theirs.keys()

    @quick_jit
    def states(params, batch):
        slots = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None], batch.tokens.shape)
        context = SlotContext(batch.key_range, batch.modality, write_slot=slots, route_slot=batch.route_slot)
        x = model.apply({'params': params}, batch, method='embed')
        hidden, cache = model.apply({'params': params}, x, batch.positions, context, empty_cache(model, *slots.shape),
                                    method='decode')
        return hidden, jnp.dot(hidden, model.unembedding(params)), cache.routes['attention'][:, :, 0]

    @quick_jit
    def loss(trainable, frozen, batch):
        def total(trainable):
            return objective(model, combine(frozen, trainable), batch, totals(batch), stage.distill_weight)[0]
        return jax.value_and_grad(total)(trainable)

    for batch in (batch_of(golden, rule, zero_pictures) for zero_pictures in (False, True)):
        hidden, logits, routing = states(params, batch)
        real = batch.modality > 0
        close(hidden[real], golden['hidden'][real])  # measured: 6e-6
        close(logits[real], golden['logits'][real])
        close(routing, golden['routing'])
        value, gradients = loss(trainable, frozen, batch)
        assert abs(value - golden['loss']) <= 1e-6  # measured: 5e-7
        ours = {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()} | flatten(gradients)
        ours = dict(to_foreign(ours, shapes, table))
        for name, expected in theirs.items():
            same_gradient(ours[name], expected, name)  # measured: 1.3e-5 relative; 6e-9 where cancelled
