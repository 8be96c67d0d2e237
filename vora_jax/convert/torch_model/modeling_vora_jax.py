"""A vora_jax model in PyTorch, standing alone.

Loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; needs torch, transformers (4.50 or
newer) and Pillow. `model.answer(tokenizer, image, question)` answers; `model.prepare_inputs` makes the arguments of
`generate`. Pictures: vision_vora_jax.py and processing_vora_jax.py; layers: block_vora_jax.py and adapters_vora_jax.py.
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
from .adapters_vora_jax import Slots
from .block_vora_jax import Block, BlockShape, RMSNorm
from .configuration_vora_jax import VoraJaxConfig
from .processing_vora_jax import make_inputs, tokens_per_picture
from .vision_vora_jax import CueEnhancer, PatchEmbedding, Projector, VisionTransformer, window_means


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape = BlockShape(config.hidden_size, config.intermediate_size, config.num_attention_heads,
                           config.num_key_value_heads, config.head_dim, config.rms_norm_eps, qk_norm=config.qk_norm)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(shape, layer, *extras) for layer, extras in enumerate(config.layers()))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class VoraJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder that reads text and pictures in one sequence, each vector of a picture in a slot of its own."""

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
            taps, in_width = len(vision['taps']), vision['patch_embed']['width']
            if isinstance(vision['fusion'], dict):
                self.enhancer = CueEnhancer(vision['fusion'], taps, in_width)
            in_width *= taps if vision['fusion'] == 'channels' else 1
            self.projector = Projector(vision['projector'], in_width, width)
        elif vision:
            self.vision_embedding = PatchEmbedding(vision['patch_embed'], width)
        if config.route_token_id is not None:
            self.modality_embedding = nn.Embedding(2, width)
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
        """Logits [B, T, V]; a picture is one `image_token_id` for each of its vectors, patches in reading order.

        input_ids [B, T]; attention_mask [B, past + T], 0 in padding on either side. Where the configuration has a
        `route_token_id`, every row begins with it, behind padding: a slot that says whether the row has pictures.
        pixel_values: u8[B, P, patch_dim] the patches of each row's pictures in order, then padding.
        image_grid: [B, M, 2] rows and columns of each row's pictures in order, 0 where there is none.
        labels: [B, T] as input_ids, -100 where nothing is to be learned; slots of pictures and of routes never count.
        """
        (rows, length), device = input_ids.shape, input_ids.device
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()  # version 4 knows no argument `config`, and plain layers need none
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + length, dtype=torch.long, device=device)
        route_slot, is_route = self.find_route(input_ids, attention_mask, past)
        is_image, num_tokens = torch.zeros_like(is_route), None
        if pixel_values is not None:
            is_image = (input_ids == self.config.image_token_id) & ~is_route
            num_tokens = tokens_per_picture(self.config, image_grid)
            given, wanted = is_image.sum(1), num_tokens.sum(1)
            if not torch.equal(given, wanted):
                raise ValueError(f'image_grid makes {wanted.tolist()} slots of pictures a row, input_ids {given.tolist()}.')
        x = self.model.embed_tokens(input_ids.masked_fill(is_image | is_route, 0))
        if is_route.any():
            x = x.masked_scatter(is_route[..., None], self.modality_embedding(is_image.any(1).long()).to(x.dtype))
        if is_image.any():
            real = torch.arange(pixel_values.shape[1], device=device) < image_grid.prod(-1).sum(1, keepdim=True)
            x = x.masked_scatter(is_image[..., None], self.see(pixel_values[real], image_grid).to(x.dtype))
        visible = self.visible_keys(is_image, num_tokens, attention_mask, past, route_slot)
        position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        scopes = {'vision': is_image.nonzero(as_tuple=True), 'text': (~is_image & ~is_route).nonzero(as_tuple=True)}
        routes = None
        if route_slot is not None and past_key_values is not None:
            if not past:
                past_key_values.routes = {}  # an attribute of our own: what the hidden slot gave, for what is decoded later
            routes = past_key_values.routes
        slots = Slots(visible, rope_angles(position, self.config.head_dim, self.config.rope), scopes, route_slot, routes)
        for block in self.model.layers:
            x = block(x, slots, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.norm(x[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels.masked_fill(is_image | is_route, -100),
                                      vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def find_route(self, input_ids, attention_mask, past):
        """(i64[B] the slot that routes each row, the first behind padding, or None; bool[B, T] where it is)."""
        if self.config.route_token_id is None:
            return None, torch.zeros_like(input_ids, dtype=torch.bool)
        route_slot = attention_mask.long().argmax(1)
        is_route = torch.arange(past, past + input_ids.shape[1], device=input_ids.device) == route_slot[:, None]
        if (input_ids[is_route] != self.config.route_token_id).any():
            raise ValueError(f'A row of input_ids does not begin with route_token_id {self.config.route_token_id}; '
                             '`prepare_inputs` puts it there.')
        return route_slot, is_route

    def see(self, pixels, image_grid):
        """[Q, hidden_size]: the vectors of all pictures, one after the other; pixels [P, patch_dim] of their patches."""
        grids = [grid for grid in map(tuple, image_grid.flatten(0, 1).tolist()) if math.prod(grid)]
        pictures, vectors = pixels.split([math.prod(grid) for grid in grids]), [None] * len(grids)
        for grid in dict.fromkeys(grids):  # pictures of one size run together
            same = [index for index, other in enumerate(grids) if other == grid]
            for index, x in zip(same, self.see_equals(torch.stack([pictures[index] for index in same]), *grid)):
                vectors[index] = x
        return torch.cat(vectors)

    def see_equals(self, pixels, rows, cols):
        """[n, Q, hidden_size] of n pictures of one size, pixels [n, rows * cols, patch_dim]."""
        vision = self.config.vision
        if not vision.get('encoder'):
            return self.vision_embedding(pixels, rows, cols)
        blocks = self.vision_tower(pixels, rows, cols).blocks
        rule = self.config.vision_tokens
        chosen = slice(0, 1) if rule['select'] == 'cls' else slice(-rows * cols, None)
        levels = [blocks[tap][:, chosen] for tap in vision['taps']]
        if isinstance(vision['fusion'], dict):
            levels = [self.enhancer(levels, rows, cols)]
        if rule['pool'] > 1:
            levels = [window_means(level, rows, cols, rule['pool']) for level in levels]
        return self.projector(torch.cat(levels, dim=-1 if vision['fusion'] == 'channels' else 1))

    def visible_keys(self, is_image, num_tokens, attention_mask, past, route_slot=None):
        """bool[B, 1, T, past + T]: the keys that each slot sees, up to a `stop` of its own.

        Text sees what comes before it and itself. A picture's slots see their whole picture too, where the
        configuration says so. In a row of two words, a picture of 2 patches, and a word:

            a     x . . . .      stop 1
            b     x x . . .           2
            img   x x x x .           4
            img   x x x x .           4
            c     x x x x x           5

        The slot that routes a row is seen by none but itself. num_tokens: i64[B, M] slots of each row's pictures.
        """
        rule, (rows, length), device = self.config.vision_tokens, is_image.shape, is_image.device
        slot = torch.arange(past, past + length, device=device)
        stop = (slot + 1).repeat(rows, 1)
        if is_image.any() and rule['bidirectional']:
            if rule['join_adjacent']:  # up to the next slot that is none of a picture's
                text = torch.where(is_image, past + length, slot)
                end = text.flip(1).cummin(1).values.flip(1)[is_image]
            else:
                counts = num_tokens.flatten(0, 1)
                last = (counts.cumsum(0) - 1).repeat_interleave(counts)  # for each slot, its picture's last one
                end = stop[is_image] + last - torch.arange(len(last), device=device)
            stop = stop.masked_scatter(is_image, end)
        key = torch.arange(past + length, device=device)
        visible = (key < stop[..., None]) & attention_mask[:, None].bool()
        if route_slot is not None:
            visible &= key != route_slot[:, None, None]
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
