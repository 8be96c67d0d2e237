"""Every matrix product of a training step.

Read from the model's dataclasses: which products there are, on how many rows, which of their gradients are computed, and
which products remat computes again. The tests hold the sums to the products in the step's own jaxpr.
"""
from typing import Any, NamedTuple

from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import Adapter, ModalityKernel
from vora_jax.nn.block import BlockShape
from vora_jax.nn.remat import ADDED
from vora_jax.nn.stack import LayerGroup
from vora_jax.training.flops.statistics import Area, BatchStatistics, Count
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import Vit

# Each policy also keeps what those before it keep.
POLICIES = (*ADDED, 'none')


class Product(NamedTuple):
    """One kind of product.

    macs: multiply-adds of a row.    rows: how many there are, over all layers.
    backward, backward_computed: products of the same size that its gradients need, and take.
    remade: how often remat computes it again.
    """

    part: str
    macs: float
    rows: Count
    backward: float = 0
    backward_computed: float = 0
    remade: float = 0


class Trained(NamedTuple):
    """paths: of the parameters that are trained."""

    paths: frozenset[str]

    def within(self, *prefixes: str) -> bool:
        """True where anything is trained at or below one of these paths."""
        return any(path == prefix or path.startswith(prefix + '/') for path in self.paths for prefix in prefixes)


class Stack(NamedTuple):
    """What the products of a stack of blocks have in common; `parts` of base, adapters and attention.

    context_rows: slots by scope of an adapter.
    """

    shape: BlockShape
    slots: Count
    area: Area
    parts: tuple[str, str, str]
    context_rows: dict[str, Count]
    micro_batches: float = 1


def model_products(model: Any, paths: frozenset[str], statistics: BatchStatistics, remat: str | None) -> list[Product]:
    """The products of a step in the order in which they run."""
    trained = Trained(paths)
    if not isinstance(model, VisionLanguageModel):  # a classifier of pictures
        products, _ = _vit(model.vit, 'encoder', trained, statistics, model.vit.num_layers,
                           ('encoder', 'encoder', 'encoder_attention'))
        images = statistics.images.computed / statistics.rows
        pooling = _product('pooling', model.vit.width * images, statistics.places, True, False)
        return [*products, pooling, _product('head', model.vit.width * model.vocab_size, statistics.targets, True,
                                             trained.within('head'))]
    llm, remat = model.llm, remat or model.llm.remat
    products, moves = _frontend(model.vision, llm.width, trained, statistics)
    moves |= trained.within('decoder/embedding', 'modality_embedding')
    if model.distillation is not None:
        teacher, last = model.distillation.teacher, max(model.distillation.blocks) + 1
        products += _vit(teacher, 'teacher', trained, statistics, last, ('teacher',) * 3)[0]
    rows = {'all': statistics.slots, 'vision': statistics.vision,
            'text': Count(statistics.text.needed, statistics.slots.computed)}
    stack = Stack(llm.block_shape, statistics.slots, statistics.attention, ('base', 'adapters', 'attention'), rows,
                  statistics.micro_batches)
    for index, group in enumerate(model.groups):
        path = f'decoder/layers/group_{index}'
        side = group.side and model.distillation is not None
        leaving = side and model.distillation.pairing == 'output_to_output'
        moves |= trained.within(f'{path}/block')
        active = moves or side and trained.within(f'{path}/side')
        products += _group(stack, group, f'{path}/block', trained, moves, remat if active else 'none', leaving,
                           group.num_layers)
        if side:
            head = llm.width * model.distillation.teacher.width
            products.append(_product('distillation_heads', head, statistics.vision.times(group.num_layers),
                                     moves or trained.within(f'{path}/side/norm'), trained.within(f'{path}/side/kernel'),
                                     active and remat != 'none'))
    head = 'decoder/embedding' if llm.tied_head else 'decoder/lm_head'
    products.append(_product('head', llm.width * llm.vocab_size, statistics.targets, moves or trained.within('decoder/norm'),
                             trained.within(head)))
    return products


def _product(part: str, macs: float, rows: Count, d_input: bool, d_kernel: bool, remade: bool = False) -> Product:
    """x @ kernel; its gradients are as large as it is."""
    return Product(part, macs, rows, d_input + d_kernel, d_input + d_kernel, remade)


def _frontend(config: Any, width: int, trained: Trained, statistics: BatchStatistics) -> tuple[list[Product], bool]:
    """(products, whether what comes out has a gradient)."""
    if config is None:
        return [], False
    if isinstance(config, PatchFrontend):
        embed, path = config.patch_embed, 'frontend/patch_embed'
        return [_product('patch_embedding', embed.patch_size**2 * 3 * embed.width, statistics.places, False,
                         trained.within(f'{path}/kernel')),
                _product('patch_embedding', embed.width * width, statistics.places, trained.within(path),
                         trained.within('frontend/out_proj'))], trained.within('frontend')
    encoder = config.encoder
    last = max(tap % encoder.num_layers for tap in config.taps) + 1
    products, moves = _vit(encoder, 'frontend/encoder', trained, statistics, last,
                           ('encoder', 'encoder_adapters', 'encoder_attention'), config.mixtures)
    features = encoder.width * (len(config.taps) if config.fusion == 'channels' else 1)
    if isinstance(config.fusion, CueEnhancer):
        products += _enhancer(config, trained, statistics, moves)
        moves |= trained.within('frontend/enhancer')
    return products + _projector(config, features, width, trained, statistics, moves), moves or trained.within('frontend')


def _enhancer(config: EncoderFrontend, trained: Trained, statistics: BatchStatistics, moves: bool) -> list[Product]:
    width, levels, path = config.encoder.width, len(config.taps), 'frontend/enhancer'
    samples = config.fusion.num_heads * levels * config.fusion.num_points

    def linear(name: str, features: int, rows: Count, *below: str) -> Product:
        return _product('enhancer', width * features, rows, moves or trained.within(*(f'{path}/{one}' for one in below)),
                        trained.within(f'{path}/{name}/kernel'))

    below = 'norm_query', 'norm_levels', 'value_proj', 'offset_proj', 'weight_proj'
    return [linear('value_proj', width, statistics.places.times(levels), 'norm_levels'),
            linear('offset_proj', 2 * samples, statistics.places, 'norm_query'),
            linear('weight_proj', samples, statistics.places, 'norm_query'),
            linear('out_proj', width, statistics.places, *below)]


def _projector(config: EncoderFrontend, features: int, width: int, trained: Trained, statistics: BatchStatistics,
               moves: bool) -> list[Product]:
    """It runs at every place; what vision tokens read of it is needed."""
    places = statistics.places if config.select == 'patch' else statistics.images
    rows, products = Count(statistics.vision.needed, places.computed * config.tokens_per_place), []
    for layer in range(config.projector.num_layers):
        path = f'frontend/projector_{layer}'
        out = width if layer == config.projector.num_layers - 1 else config.projector.hidden_width or width
        products.append(_product('projector', features * out, rows, moves, trained.within(f'{path}/kernel')))
        moves, features = moves or trained.within(path), out
    return products


def _vit(vit: Vit, path: str, trained: Trained, statistics: BatchStatistics, last: int, parts: tuple[str, str, str],
         mixtures: tuple = ()) -> tuple[list[Product], bool]:
    """(products of an encoder whose first `last` blocks are read, whether these have a gradient)."""
    embed = vit.patch_embed
    first = _product(parts[0], embed.patch_size**2 * 3 * embed.width, statistics.places, False,
                     trained.within(f'{path}/patch_embed/kernel'))
    moves = trained.within(f'{path}/patch_embed', f'{path}/pre_norm', f'{path}/blocks')
    stack = Stack(vit.block_shape, statistics.places, statistics.image_attention, parts, {})
    group = LayerGroup(vit.num_layers, mixtures=mixtures)
    return [first, *_group(stack, group, f'{path}/blocks/group_0/block', trained, moves, 'none', False, last)], moves


def _group(stack: Stack, group: LayerGroup, path: str, trained: Trained, moves: bool, remat: str, leaving: bool,
           last: int) -> list[Product]:
    """The products of a group of blocks.

    moves: whether it has a backward pass.    last: how many of its layers are read.
    leaving: a side module reads the state that leaves a layer: its last product is made again too, unless that is kept.
    """
    shape, layers, kept = stack.shape, (last, group.num_layers), POLICIES.index(remat)
    base, adapted, attended = stack.parts
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {'q_proj': (shape.width, q_width), 'k_proj': (shape.width, kv_width), 'v_proj': (shape.width, kv_width),
             'o_proj': (q_width, shape.width), 'gate_proj': (shape.width, shape.mlp_width),
             'up_proj': (shape.width, shape.mlp_width), 'down_proj': (shape.mlp_width, shape.width)}
    if shape.activation != 'silu_gated':
        del sizes['gate_proj']
    products = []
    for name, (fan_in, fan_out) in sizes.items():
        # Its output is made again until a policy keeps it; that of the block's last product is read by nobody else.
        again = kept < {'gate_proj': 4, 'up_proj': 4, 'down_proj': 1 if leaving else 0}.get(name, 3)
        adapters = dict(group.adapters).get(name, ())
        replaced = [stack.context_rows[adapter.scope].needed for adapter in adapters if isinstance(adapter, ModalityKernel)]
        rows = stack.slots._replace(needed=stack.slots.needed - sum(replaced)).times(*layers)
        products.append(_product(base, fan_in * fan_out, rows, moves, trained.within(f'{path}/{name}/kernel'), again))
        for index, adapter in enumerate(adapters):
            rows = stack.context_rows[adapter.scope].times(*layers)
            products += _adapter(adapted, adapter, fan_in, fan_out, rows, f'{path}/{name}/adapter_{index}', trained, moves,
                                 kept, again)
    for site, mixture in group.mixtures:
        inner, where = mixture.rank * shape.width, f'{path}/adapter_{site}'
        up = inner / mixture.num_groups
        sizes = [('down_kernel', inner), *((f'up_{expert}_kernel', up) for expert in range(mixture.num_experts))]
        sizes += [('router_kernel', shape.width * mixture.num_experts)] if mixture.num_experts > 1 else []
        products += [_product(adapted, macs, stack.slots.times(*layers), moves, trained.within(f'{where}/{name}'),
                              remat != 'none') for name, macs in sizes]
    if group.prompts is not None:
        products += _prompts(stack, group, path, trained, moves, kept)
    computed = stack.area.backward_products / 2
    products.append(Product(attended, 2 * q_width, stack.area.pairs.times(*layers), 2.5 * moves, computed * moves, kept < 1))
    return products


def _adapter(part: str, adapter: Adapter, fan_in: int, fan_out: int, rows: Count, path: str, trained: Trained, moves: bool,
             kept: int, again: bool) -> list[Product]:
    if isinstance(adapter, ModalityKernel):
        return [_product(part, fan_in * fan_out, rows, moves, trained.within(f'{path}/kernel'), again)]
    low = [_product(part, fan_in * adapter.rank, rows, moves, trained.within(f'{path}/{name}'), kept < 2)
           for name in ('a', 'task') if name == 'a' or not hasattr(adapter, 'fold')]
    return [*low, _product(part, adapter.rank * fan_out, rows, moves, trained.within(f'{path}/b'), again)]


def _prompts(stack: Stack, group: LayerGroup, path: str, trained: Trained, moves: bool, kept: int) -> list[Product]:
    """Keys and values of the prompts, and the attention to them, which is dense; adapters on them are left out."""
    number, shape = group.prompts.num_prompts, stack.shape
    of_prompts = trained.within(f'{path}/adapter_prompts/prompts')
    keys = of_prompts or trained.within(f'{path}/k_proj', f'{path}/v_proj')
    rows = Count(*(number * group.num_layers * stack.micro_batches,) * 2)
    products = [_product(stack.parts[1], shape.width * shape.num_kv_heads * shape.head_dim, rows, of_prompts,
                         trained.within(f'{path}/{name}/kernel'), kept < 3) for name in ('k_proj', 'v_proj')]
    backward = (2.5 if keys else 1.5) * moves
    pairs = stack.slots.times(number * group.num_layers)
    width = 2 * shape.num_heads * shape.head_dim
    return [*products, Product(stack.parts[2], width, pairs, backward, backward, kept < 1)]

