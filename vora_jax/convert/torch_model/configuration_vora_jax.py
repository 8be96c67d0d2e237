"""The configuration of a vora_jax model."""
import pathlib
import sys
import types

from transformers import PretrainedConfig


class VoraJaxConfig(PretrainedConfig):
    """Sizes, as in Qwen2Config, and what makes the model see.

    rope: rotary positions, 'theta' and 'scaling': None or 'kind' ('linear' or 'llama3'), 'factor', 'low_freq_factor',
        'high_freq_factor', 'original_max_positions'. Of this name, because each version of transformers rewrites
        `rope_theta`, `rope_scaling` and `rope_parameters` in its own way.
    biases: linears with a bias in every layer.    qk_norm: queries and keys are normed in each head.
    layer_groups: consecutive layers, [{'num_layers', 'biases': names beyond those of every layer, 'adapters': {linear:
        [{'kind', 'scope', and its numbers, see AdaptedLinear}]}, 'mixtures': {'attention' or 'mlp': see ModalityMixture},
        'num_prompts': see Attention}]; [] where no layer has more than the others.
    vision: None in a text-only model, else 'patch_embed' and, where pictures pass an encoder, 'encoder', 'taps' (of its
        blocks), 'fusion' of these ('channels', 'tokens', or the settings of a CueEnhancer), 'projector', and the 'mixtures'
        of its blocks.
    vision_tokens: 'cls' (the encoder has a [cls] token), 'select' ('patch': a picture's patches become slots, 'cls': its
        [cls] token alone), 'pool' (side of the windows of patches that become one), 'tokens_per_place' (slots for each of
        these), 'bidirectional' (a picture's slots see all of it, else they are as causal as text), 'join_adjacent' (pictures
        with no text between them see each other), 'route_token' (each row begins with a slot that only routes).
    image_policy: how a picture is brought to whole patches: 'kind', 'min_patches', 'max_patches', 'side', 'color' (of
        padding), 'background' (under transparent pixels), 'tiles' (rows and columns of squares that it may be cut into).
    image_token_id: its place in `input_ids` is taken by one vector of a picture.
    route_token_id: None, or what every row of `input_ids` begins with: a slot of its own at position 0, whose vector says
        whether the row has pictures, and which no other slot sees. It may be `image_token_id`: its place tells.
    """

    model_type = 'vora_jax'
    keys_to_ignore_at_inference = ('past_key_values',)

    def __init__(self, vocab_size=0, hidden_size=0, intermediate_size=0, num_hidden_layers=0, num_attention_heads=1,
                 num_key_value_heads=1, head_dim=0, rope=None, rms_norm_eps=1e-6, biases=(), qk_norm=False,
                 tie_word_embeddings=False, layer_groups=(), vision=None, vision_tokens=None, image_policy=None,
                 image_token_id=None, route_token_id=None, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.rope = rope or {'theta': 10000.0, 'scaling': None}
        self.rms_norm_eps, self.biases, self.qk_norm = rms_norm_eps, list(biases), qk_norm
        self.layer_groups, self.vision, self.vision_tokens = list(layer_groups), vision, vision_tokens
        self.image_policy, self.image_token_id = image_policy, image_token_id
        self.route_token_id = route_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def layers(self):
        """For each layer, (names of linears with a bias, {linear: its adapters}, {site: its mixture}, its prompts)."""
        groups = self.layer_groups or [{'num_layers': self.num_hidden_layers, 'biases': [], 'adapters': {}, 'mixtures': {},
                                        'num_prompts': 0}]
        return [([*self.biases, *group['biases']], group['adapters'], group['mixtures'], group['num_prompts'])
                for group in groups for _ in range(group['num_layers'])]


# Transformers 4.50 runs these files as modules of a package named like their folder, and where that name has a dot
# ("llama-3.1") Python finds no such package for the relative imports of the others. This file is always the first.
if __package__ and __package__ not in sys.modules:
    package = types.ModuleType(__package__)
    package.__path__ = [str(pathlib.Path(__file__).parent)]
    sys.modules[__package__] = package
