"""A vora_jax model in PyTorch, standing alone.

Loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; needs torch, transformers and Pillow.
`model.answer(tokenizer, image, question)` answers; `model.prepare_inputs` makes the arguments of `generate`.
"""
import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class VoraJaxConfig(PretrainedConfig):
    """Sizes, as in Qwen2Config, and what makes it see.

    adapters: consecutive layers, [{'num_layers': n, 'linears': {name: [{'rank', 'scale', 'scope'}]}}]; [] without any.
    vision: patch_size, width, table_rows, table_cols, norm_eps, mean, std, min_patches, max_patches; None: text only.
    image_token_id: its place in `input_ids` is taken by one patch.
    """

    model_type = 'vora_jax'

    def __init__(self, vocab_size=0, hidden_size=0, intermediate_size=0, num_hidden_layers=0, num_attention_heads=1,
                 num_key_value_heads=1, head_dim=0, rope_parameters=None, rms_norm_eps=1e-6, attention_bias=False,
                 tie_word_embeddings=False, adapters=(), vision=None, image_token_id=None, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.rope_parameters = rope_parameters or {'rope_type': 'default', 'rope_theta': 10000.0}
        self.rms_norm_eps, self.attention_bias = rms_norm_eps, attention_bias
        self.adapters, self.vision, self.image_token_id = list(adapters), vision, image_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def layer_adapters(self):
        """For each layer, {linear: its adapters}."""
        table = [group['linears'] for group in self.adapters for _ in range(group['num_layers'])]
        return table or [{}] * self.num_hidden_layers


class RMSNorm(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight


class AdaptedLinear(nn.Linear):
    """A linear layer plus `scale * B(A(x))` of each adapter, on the slots of its scope."""

    def __init__(self, in_features, out_features, bias, adapters):
        super().__init__(in_features, out_features, bias=bias)
        self.adapters = adapters
        if adapters:
            self.lora_A = nn.ModuleList(nn.Linear(in_features, adapter['rank'], bias=False) for adapter in adapters)
            self.lora_B = nn.ModuleList(nn.Linear(adapter['rank'], out_features, bias=False) for adapter in adapters)

    def forward(self, x, is_image):
        y = super().forward(x)
        for index, adapter in enumerate(self.adapters):
            adapted = y + self.lora_B[index](self.lora_A[index](x) * adapter['scale'])
            if adapter['scope'] != 'all':
                adapted = torch.where(is_image if adapter['scope'] == 'vision' else ~is_image, adapted, y)
            y = adapted
        return y


class Attention(nn.Module):
    def __init__(self, config, layer, adapters):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        width, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = AdaptedLinear(width, heads, bias, adapters.get('q_proj', ()))
        self.k_proj = AdaptedLinear(width, kv_heads, bias, adapters.get('k_proj', ()))
        self.v_proj = AdaptedLinear(width, kv_heads, bias, adapters.get('v_proj', ()))
        self.o_proj = AdaptedLinear(heads, width, False, adapters.get('o_proj', ()))

    def forward(self, x, angles, visible, cache, is_image):
        q, k, v = (linear(x, is_image).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (z.repeat_interleave(self.groups, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(y.transpose(1, 2).flatten(2), is_image)


def rotate(x, cos, sin):
    """Rotary positions on x [B, heads, T, head_dim]; cos and sin [B, 1, T, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, config, adapters):
        super().__init__()
        inner, outer = config.intermediate_size, config.hidden_size
        self.gate_proj = AdaptedLinear(outer, inner, False, adapters.get('gate_proj', ()))
        self.up_proj = AdaptedLinear(outer, inner, False, adapters.get('up_proj', ()))
        self.down_proj = AdaptedLinear(inner, outer, False, adapters.get('down_proj', ()))

    def forward(self, x, is_image):
        return self.down_proj(F.silu(self.gate_proj(x, is_image)) * self.up_proj(x, is_image), is_image)


class Block(nn.Module):
    def __init__(self, config, layer, adapters):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, adapters)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, adapters)

    def forward(self, x, angles, visible, cache, is_image):
        x = x + self.self_attn(self.input_layernorm(x), angles, visible, cache, is_image)
        return x + self.mlp(self.post_attention_layernorm(x), is_image)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, *layer) for layer in enumerate(config.layer_adapters()))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class VisionEmbedding(nn.Module):
    """Patches of bytes to language-model vectors: linear, norm, position, linear."""

    def __init__(self, vision, width):
        super().__init__()
        self.vision = vision
        size, inner = vision['patch_size'], vision['width']
        self.patchifier = nn.ModuleDict({'proj': nn.Conv2d(3, inner, size, stride=size),
                                         'norm': RMSNorm(inner, vision['norm_eps'])})
        self.pos_embed = nn.Parameter(torch.zeros(1, vision['table_rows'] * vision['table_cols'], inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, pixels, place, grid):
        """pixels u8[P, patch_dim] in (row, column, channel) order; place [P, 2] in a picture of grid [P, 2] patches."""
        size, kernel = self.vision['patch_size'], self.patchifier['proj'].weight
        mean, std = (torch.tensor(self.vision[name], device=pixels.device) for name in ('mean', 'std'))
        pixels = (pixels.unflatten(-1, (size, size, 3)).float() / 255.0 - mean) / std
        x = self.patchifier['proj'](pixels.permute(0, 3, 1, 2).to(kernel.dtype)).flatten(1)
        return self.out_proj(self.patchifier['norm'](x) + self.positions(place, grid).to(x.dtype))

    def positions(self, place, grid):
        """The position table resized to each picture's grid: bilinear, half-pixel centres."""
        table = self.pos_embed.float().view(self.vision['table_rows'], self.vision['table_cols'], -1)
        sizes = torch.tensor(table.shape[:2], device=place.device)
        centre = ((place.float() + 0.5) * (sizes / grid.float()) - 0.5).clamp(min=0).minimum(sizes - 1.0)
        low = centre.floor().long()
        high = (low + 1).minimum(sizes - 1)
        (top, left), (bottom, right) = low.unbind(-1), high.unbind(-1)
        down, across = (centre - low)[..., None].unbind(1)
        upper = table[top, left] * (1 - across) + table[top, right] * across
        lower = table[bottom, left] * (1 - across) + table[bottom, right] * across
        return upper * (1 - down) + lower * down


class VoraJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder that reads text and patches in one sequence; a picture's patches all see each other."""

    config_class = VoraJaxConfig
    base_model_prefix = 'model'
    _tied_weights_keys: ClassVar = {'lm_head.weight': 'model.embed_tokens.weight'}
    _no_split_modules: ClassVar = ['Block', 'VisionEmbedding']
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.vision:
            self.vision_embedding = VisionEmbedding(config.vision, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid=None, past_key_values=None,
                labels=None, use_cache=False, logits_to_keep=0, **kwargs):
        """Logits [B, T, V]; a picture is one `image_token_id` for each of its patches, in reading order.

        input_ids [B, T]; attention_mask [B, past + T], 0 in padding on either side.
        pixel_values: u8[B, P, patch_dim] the patches of each row's pictures in order, then padding.
        image_grid: [B, M, 2] rows and columns of each row's pictures in order, 0 where there is none.
        """
        (rows, length), device = input_ids.shape, input_ids.device
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + length, dtype=torch.long, device=device)
        slot = torch.arange(past, past + length, device=device)
        stop = (slot + 1).repeat(rows, 1)
        is_image = torch.zeros_like(input_ids, dtype=torch.bool)
        if pixel_values is not None:
            is_image = input_ids == self.config.image_token_id
        x = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None:
            place, grid, left = patch_places(image_grid)
            sizes = image_grid.prod(-1).sum(1)
            if not torch.equal(is_image.sum(1), sizes):
                raise ValueError(f'image_grid has {sizes.tolist()} patches a row, input_ids {is_image.sum(1).tolist()}.')
            stop[is_image] += left - 1
            real = torch.arange(pixel_values.shape[1], device=device) < sizes[:, None]
            x[is_image] = self.vision_embedding(pixel_values[real], place, grid)
        key = torch.arange(past + length, device=device)
        visible = (key < stop[..., None]) & attention_mask[:, None].bool()
        visible = (visible | (key == slot[:, None]))[:, None]  # padding sees itself: no row of the softmax is empty
        position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
        angle = (position.float()[..., None] * (1.0 / self.config.rope_parameters['rope_theta'] ** exponent))[:, None]
        for block in self.model.layers:
            x = block(x, (angle.cos(), angle.sin()), visible, past_key_values, is_image[..., None])
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.norm(x)[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, image_grid=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get('past_key_values') is None or inputs['past_key_values'].get_seq_length() == 0:
            inputs.update(pixel_values=pixel_values, image_grid=image_grid)
        return inputs

    def prepare_inputs(self, tokenizer, questions, images=None):
        """Arguments of `generate` and `forward`, on the model's device, padded on the left.

        questions: texts; `<image>` marks where a picture goes, else each gets a line of its own in front.
        images: for each question a PIL image, a list of them, or None.
        """
        ids, pixels, grids = [], [], []
        for question, pictures in zip(questions, images or [None] * len(questions), strict=True):
            pictures = pictures if isinstance(pictures, (list, tuple)) else [pictures] if pictures else []
            if '<image>' not in question:
                question = '<image>\n' * len(pictures) + question
            if question.count('<image>') != len(pictures) or (pictures and not self.config.vision):
                raise ValueError(f'{len(pictures)} images do not fit the question {question!r} of this model.')
            text = tokenizer.apply_chat_template([{'role': 'user', 'content': question}], tokenize=False,
                                                 add_generation_prompt=True)
            patches = [to_patches(picture, self.config.vision) for picture in pictures]
            first, *chunks = (tokenizer(chunk, add_special_tokens=False)['input_ids'] for chunk in text.split('<image>'))
            for (picture, _), chunk in zip(patches, chunks):
                first += [self.config.image_token_id] * len(picture) + chunk
            ids.append(torch.tensor(first))
            if self.config.vision:
                empty = torch.zeros(0, 3 * self.config.vision['patch_size'] ** 2, dtype=torch.uint8)
                pixels.append(torch.cat([empty, *(picture for picture, _ in patches)]))
                grids.append(torch.tensor([grid for _, grid in patches], dtype=torch.long).view(-1, 2))
        inputs = {'input_ids': nn.utils.rnn.pad_sequence(ids, True, tokenizer.pad_token_id, 'left'),
                  'attention_mask': nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True, 0, 'left')}
        if any(map(len, grids)):
            inputs['pixel_values'] = nn.utils.rnn.pad_sequence(pixels, True)
            inputs['image_grid'] = nn.utils.rnn.pad_sequence(grids, True)
        return {name: value.to(self.device) for name, value in inputs.items()}

    @torch.no_grad()
    def answer(self, tokenizer, image, question, max_new_tokens=64, **kwargs):
        """The greedy answer to a question about a PIL image, a list of them, or None; kwargs go to `generate`."""
        inputs = self.prepare_inputs(tokenizer, [question], [image])
        output = self.generate(**inputs, **{'max_new_tokens': max_new_tokens, 'do_sample': False, **kwargs})
        return tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)


def patch_places(image_grid):
    """(place [P, 2], grid [P, 2], left [P]) of all patches of image_grid [B, M, 2]; left: patches to a picture's end."""
    grids = image_grid.flatten(0, 1)
    counts = grids.prod(-1)
    picture = torch.arange(len(grids), device=grids.device).repeat_interleave(counts)
    index = torch.arange(len(picture), device=grids.device) - (counts.cumsum(0) - counts)[picture]
    columns = grids[picture, 1]
    return torch.stack([index // columns, index % columns], dim=-1), grids[picture], counts[picture] - index


def to_patches(image, vision):
    """(u8[rows * cols, patch_dim], (rows, cols)): a PIL image at its own aspect ratio, in whole patches."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # 16 and 32 bit grey
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray((deep / 257 if deep.max() > 255 else deep).clip(0, 255).astype(np.uint8))
    elif 'A' in image.getbands() or 'transparency' in image.info:
        above = image.convert('RGBA')
        image = Image.new('RGBA', above.size, 'white')
        image.alpha_composite(above)
    image, size = image.convert('RGB'), vision['patch_size']
    rows, cols = fit_grid(image.height, image.width, size, vision['min_patches'], vision['max_patches'])
    if image.size != (cols * size, rows * size):
        image = image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    patches = np.array(image).reshape(rows, size, cols, size, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(patches.reshape(rows * cols, -1).copy()), (rows, cols)


def fit_grid(height, width, size, least, most):
    """(rows, cols): least to most patches of `size` pixels for a picture of these pixels, near its aspect ratio."""
    rows, cols = max(1, round(height / size)), max(1, round(width / size))
    area = height * width / size**2
    if rows * cols > most:
        shrink = math.sqrt(most / area)
        rows, cols = (max(1, math.floor(side / size * shrink)) for side in (height, width))
        rows, cols = min(rows, most // min(cols, most)), min(cols, most)  # a strip stuck at one patch on one side
    elif rows * cols < least:
        grow = math.sqrt(least / area)
        rows, cols = (math.ceil(side / size * grow) for side in (height, width))
        if rows * cols > most:
            rows, cols = min(rows, most), max(1, most // min(rows, most))
    return rows, cols
