"""Names of Qwen2, Qwen3, Llama, Mistral."""
from vora_jax.convert.names.layouts import SAME, TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table
from vora_jax.nn.block import LINEARS

# {our linear: its name under a decoder layer}.
LINEAR_NAMES = {linear: f'{"self_attn" if linear[0] in "qkvo" else "mlp"}.{linear}' for linear in LINEARS}
BLOCK, LAYER = 'decoder/layers/*/block/', 'model.layers.{layer}.'

DECODER = Table(
    rows=(
        Row('decoder/embedding', 'model.embed_tokens.weight', SAME),
        *(Row(BLOCK + path, LAYER + name, layout)
          for linear, module in LINEAR_NAMES.items()
          for path, name, layout in ((f'{linear}/kernel', f'{module}.weight', TRANSPOSED),
                                     (f'{linear}/bias', f'{module}.bias', SAME))),
        Row(BLOCK + 'q_norm/scale', LAYER + 'self_attn.q_norm.weight', SAME),
        Row(BLOCK + 'k_norm/scale', LAYER + 'self_attn.k_norm.weight', SAME),
        Row(BLOCK + 'attention_norm/scale', LAYER + 'input_layernorm.weight', SAME),
        Row(BLOCK + 'mlp_norm/scale', LAYER + 'post_attention_layernorm.weight', SAME),
        Row('decoder/norm/scale', 'model.norm.weight', SAME),
        Row('decoder/lm_head', 'lm_head.weight', TRANSPOSED),
    ),
    ignored=(('model.layers.*.self_attn.rotary_emb.inv_freq', 'rotary frequencies follow from the configuration'),
             ('model.rotary_emb.inv_freq', 'rotary frequencies follow from the configuration')),
    aliases=(('lm_head.weight', 'model.embed_tokens.weight'),),
)
