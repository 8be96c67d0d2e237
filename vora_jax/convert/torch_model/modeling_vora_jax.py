"""A vora_jax model in PyTorch, standing alone.

Loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; needs torch, transformers (4.50 or
newer) and Pillow. `model.answer(tokenizer, image, question)` answers; `model.prepare_inputs` makes the arguments of
`generate`. Pictures: vision_vora_jax.py and processing_vora_jax.py; layers: block_vora_jax.py.
"""
import math
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

# Version 4 ships along only those files that this one imports itself.
from .block_vora_jax import Block, BlockShape, RMSNorm, Slots
from .configuration_vora_jax import VoraJaxConfig
from .processing_vora_jax import make_inputs
from .vision_vora_jax import PatchEmbedding, Projector, VisionTransformer


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape = BlockShape(config.hidden_size, config.intermediate_size, config.num_attention_heads,
                           config.num_key_value_heads, config.head_dim, config.rms_norm_eps, qk_norm=config.qk_norm)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(shape, layer, *extras) for layer, extras in enumerate(config.layers()))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class VoraJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder that reads text and pictures in one sequence, each patch of a picture in a slot of its own."""

    config_class = VoraJaxConfig
    base_model_prefix = 'model'
    # Transformers 5 reads the pairs, version 4 the names of the tied tensors, which are the keys.
    _tied_weights_keys: ClassVar = {'lm_head.weight': 'model.embed_tokens.weight'}
    _no_split_modules: ClassVar = ['Block', 'PatchEmbedding']
    _auto_class = 'AutoModelForCausalLM'  # so that `save_pretrained` copies these files, which version 4 does not by itself
    _supports_sdpa = True
    _supports_cache_class = True  # version 4 hands out a DynamicCache only where this is said

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        vision, width = config.vision, config.hidden_size
        if vision and vision.get('encoder'):
            self.vision_tower = VisionTransformer(vision, config.vision_tokens['cls'])
            self.projector = Projector(vision['projector'], len(vision['taps']) * vision['patch_embed']['width'], width)
        elif vision:
            self.vision_embedding = PatchEmbedding(vision['patch_embed'], width)
        self.post_init()

    def _init_weights(self, module):
        """For tensors that a checkpoint lacks; norms, biases of norms and the like keep what their classes give them."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    # Version 4 finds these by convention in models of its own only.
    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid=None, past_key_values=None,
                labels=None, use_cache=False, logits_to_keep=0, **kwargs):
        """Logits [B, T, V]; a picture is one `image_token_id` for each of its patches, in reading order.

        input_ids [B, T]; attention_mask [B, past + T], 0 in padding on either side.
        pixel_values: u8[B, P, patch_dim] the patches of each row's pictures in order, then padding.
        image_grid: [B, M, 2] rows and columns of each row's pictures in order, 0 where there is none.
        labels: [B, T] as input_ids, -100 where nothing is to be learned; slots of pictures never count.
        """
        (rows, length), device = input_ids.shape, input_ids.device
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()  # version 4 knows no argument `config`, and plain layers need none
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + length, dtype=torch.long, device=device)
        is_image = torch.zeros_like(input_ids, dtype=torch.bool)
        if pixel_values is not None:
            is_image = input_ids == self.config.image_token_id
            sizes = image_grid.prod(-1).sum(1)
            if not torch.equal(is_image.sum(1), sizes):
                raise ValueError(f'image_grid has {sizes.tolist()} patches a row, input_ids {is_image.sum(1).tolist()}.')
        x = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))
        if is_image.any():
            real = torch.arange(pixel_values.shape[1], device=device) < sizes[:, None]
            x = x.masked_scatter(is_image[..., None], self.see(pixel_values[real], image_grid).to(x.dtype))
        visible = self.visible_keys(is_image, image_grid, attention_mask, past)
        position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        slots = Slots(visible, rope_angles(position, self.config.head_dim, self.config.rope), is_image[..., None])
        for block in self.model.layers:
            x = block(x, slots, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.norm(x[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels.masked_fill(is_image, -100),
                                      vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def see(self, pixels, image_grid):
        """[P, hidden_size]: the vectors of all pictures' patches, pixels [P, patch_dim], one after the other."""
        grids = [grid for grid in map(tuple, image_grid.flatten(0, 1).tolist()) if math.prod(grid)]
        pictures, vectors = pixels.split([math.prod(grid) for grid in grids]), [None] * len(grids)
        for grid in dict.fromkeys(grids):  # pictures of one size run together
            same = [index for index, other in enumerate(grids) if other == grid]
            for index, x in zip(same, self.see_equals(torch.stack([pictures[index] for index in same]), *grid)):
                vectors[index] = x
        return torch.cat(vectors)

    def see_equals(self, pixels, rows, cols):
        """[n, rows * cols, hidden_size] of n pictures of one size, pixels [n, rows * cols, patch_dim]."""
        if not self.config.vision.get('encoder'):
            return self.vision_embedding(pixels, rows, cols)
        blocks = self.vision_tower(pixels, rows, cols).blocks
        x = torch.cat([blocks[tap] for tap in self.config.vision['taps']], dim=-1)
        return self.projector(x[:, -rows * cols:])  # without the [cls] token

    def visible_keys(self, is_image, image_grid, attention_mask, past):
        """bool[B, 1, T, past + T]: the keys that each slot sees, up to a `stop` of its own.

        Text sees what comes before it and itself. A picture's patches see their whole picture too, where the
        configuration says so. In a row of two words, a picture of 2 patches, and a word:

            a     x . . . .      stop 1
            b     x x . . .           2
            img   x x x x .           4
            img   x x x x .           4
            c     x x x x x           5
        """
        rule, (rows, length), device = self.config.vision_tokens, is_image.shape, is_image.device
        slot = torch.arange(past, past + length, device=device)
        stop = (slot + 1).repeat(rows, 1)
        if is_image.any() and rule['bidirectional']:
            if rule['join_adjacent']:  # up to the next slot that is no patch
                text = torch.where(is_image, past + length, slot)
                end = text.flip(1).cummin(1).values.flip(1)[is_image]
            else:
                counts = image_grid.flatten(0, 1).prod(-1)
                last = (counts.cumsum(0) - 1).repeat_interleave(counts)  # for each patch, its picture's last one
                end = stop[is_image] + last - torch.arange(len(last), device=device)
            stop = stop.masked_scatter(is_image, end)
        key = torch.arange(past + length, device=device)
        visible = (key < stop[..., None]) & attention_mask[:, None].bool()
        return (visible | (key == slot[:, None]))[:, None]  # padding sees itself: no row of the softmax is empty

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
        inputs = make_inputs(self.config, tokenizer, questions, images)
        return {name: value.to(self.device) for name, value in inputs.items()}

    @torch.no_grad()
    def answer(self, tokenizer, image, question, max_new_tokens=64, **kwargs):
        """The greedy answer to a question about a PIL image, a list of them, or None; kwargs go to `generate`."""
        inputs = self.prepare_inputs(tokenizer, [question], [image])
        output = self.generate(**inputs, **{'max_new_tokens': max_new_tokens, 'do_sample': False, **kwargs})
        return tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)


def rope_angles(position, head_dim, rope):
    """(cos, sin), each f32[B, 1, T, head_dim / 2], of position [B, T]; rope: the configuration's."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    frequencies, scaling = 1.0 / rope['theta'] ** exponents, rope['scaling']
    if scaling and scaling['kind'] == 'linear':
        frequencies = frequencies / scaling['factor']
    elif scaling:  # llama3: long waves are stretched, short ones kept
        turns = scaling['original_max_positions'] * frequencies / (2 * math.pi)
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / scaling['factor'] + kept * frequencies
    angle = (position.float()[..., None] * frequencies)[:, None]
    return angle.cos(), angle.sin()
