"""What a layer keeps for its backward pass.

A layer's input is always kept. All else is computed again, except what a policy names; each policy keeps what the ones
before it keep, takes more memory and saves more work (28 layers of a 7B model with adapters of rank 1024, per token and
layer: bf16 bytes kept, share of the executed work that the step needs anyway):

    full        nothing                                                                   7 K    0.74
    attention   + the result of attention and its log-sum-exp: the kernel runs once;
                the states that distillation heads read                                16 K    0.75
    adapters    + the low-rank states x @ a                                              28 K    0.77
    no_mlp      + what the query, key and value layers give; the state after attention   44 K    0.80
    matmuls     + gate and up: no product is computed twice                             120 K    0.97
"""
from collections.abc import Callable
from typing import Literal

import jax

Remat = Literal['none', 'full', 'attention', 'adapters', 'no_mlp', 'matmuls']

# What each policy adds: names given by `jax.ad_checkpoint.checkpoint_name` where the values are made.
ADDED = {
    'full': (),
    'attention': ('attention_out', 'attention_log_sum', 'taught'),
    'adapters': ('low_rank',),
    'no_mlp': ('q_proj', 'k_proj', 'v_proj', 'attended'),
    'matmuls': ('gate_proj', 'up_proj'),
}

# Primitives that make a cut weight whole; a frozen one's gather is a call that is not differentiated.
GATHERS = ('all_gather', 'sharding_constraint', 'convert_element_type', 'custom_vjp_call')


def kept(remat: Remat) -> tuple[str, ...]:
    """The names of what a policy keeps.

    kept('adapters') gives ('attention_out', 'attention_log_sum', 'taught', 'low_rank').
    """
    policies = list(ADDED)
    return tuple(name for policy in policies[:policies.index(remat) + 1] for name in ADDED[policy])


def save_policy(remat: Remat) -> Callable:
    """The `jax.checkpoint` policy of a name. With 'none' all is kept but the weights that were gathered from other devices
    (and casts, which cost nothing): kept, they would be the whole model on each device."""
    if remat == 'none':
        return lambda primitive, *_, **__: primitive.name not in GATHERS
    return jax.checkpoint_policies.save_only_these_names(*kept(remat))
