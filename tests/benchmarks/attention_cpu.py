"""The `xla` attention on CPU, forward and backward, against dense attention with a boolean mask.

    export JAX_PLATFORMS=cpu
    python tests/benchmarks/attention_cpu.py --slots 4096 --runs 9
    python tests/benchmarks/attention_cpu.py --batch 2 --heads 16 --kv-heads 4 --head-dim 128 --dtype bfloat16

Rows of packed samples (see `packed`). The sides take turns, all on as many threads as there are cores: `xla`,
`jax.nn.dot_product_attention` and, where it is installed, torch's `scaled_dot_product_attention`. Prints for each the
median time of a call, its ratio to `xla` in the same turn (median and quartiles), the largest relative difference of its
results to those of `xla`, and the temporary memory of the compiled call.
"""
import argparse
import os
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.bench.random_batch import Description, draw
from vora_jax.ops.attention import attention
from vora_jax.ops.key_range import dense_mask
from vora_jax.types import KeyRange


def packed(seed: int, rows: int, num_slots: int) -> KeyRange:
    """The rows that `vora bench attention` draws by default: images see themselves whole, text is causal."""
    return draw(Description(), rows, num_slots, seed).key_range


def with_gradients(attend) -> Callable:
    """(q, k, v, mask, d_out) -> (out, (d_q, d_k, d_v)), compiled."""
    def run(q, k, v, mask, d_out):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
        return out, pull(d_out)
    return jax.jit(run)


def ours(q, k, v, key_range):
    return attention(q, k, v, key_range, implementation='xla')


def dense(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def torch_call(q, k, v, mask, d_out) -> Callable[[], tuple]:
    """One call of torch's attention with gradients, on the same arrays; ImportError without torch."""
    import torch
    torch.set_num_threads(os.cpu_count())
    kind = getattr(torch, q.dtype.name)
    q, k, v, d_out = (torch.from_numpy(np.array(x, np.float32)).to(kind).swapaxes(1, 2).contiguous()
                      for x in (q, k, v, d_out))
    mask, is_grouped = torch.from_numpy(np.array(mask))[:, None], q.shape[1] > k.shape[1]

    def call():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=is_grouped)
        # As f32, which NumPy can take: bf16 gradients cost one small copy.
        return out, [x.swapaxes(1, 2).float() for x in torch.autograd.grad(out, inputs, d_out)]
    return call


def sides(args) -> Iterator[tuple[str, Callable, str]]:
    """(name, call, MiB of temporary memory) of each."""
    key_range = KeyRange(*map(jnp.asarray, packed(args.seed, args.batch, args.slots)))
    mask = dense_mask(key_range, args.slots)
    print(f'{args.slots} slots, {float(mask.mean()):.3f} of the scores are seen')
    rng, shape = np.random.default_rng(args.seed), (args.batch, args.slots)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(*shape, heads, args.head_dim)), args.dtype)
                      for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads))
    # Dense softmax of no score at all is NaN: a query of padding sees itself there, and has no cotangent.
    seen = mask.any(-1)
    mask, d_out = mask | (~seen[..., None] & jnp.eye(args.slots, dtype=bool)), d_out * seen[..., None, None]
    for name, attend, limits in (('xla', ours, key_range), ('dot_product_attention', dense, mask)):
        run = with_gradients(attend).lower(q, k, v, limits, d_out).compile()
        memory = f'{run.memory_analysis().temp_size_in_bytes / 2**20:.0f}'
        yield name, lambda run=run, limits=limits: jax.block_until_ready(run(q, k, v, limits, d_out)), memory
    try:
        yield 'torch', torch_call(q, k, v, mask, d_out), '-'
    except ImportError:
        print('torch is not installed: its side is left out')


def difference(results, expected) -> float:
    """The largest difference of the gradients, relative to the largest value of each."""
    pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(results, expected)]
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--slots', type=int, default=4096)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--kv-heads', type=int, default=8)
    parser.add_argument('--head-dim', type=int, default=64)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--runs', type=int, default=9)
    args = parser.parse_args()
    calls = list(sides(args))
    gradients = [call()[1] for _, call, _ in calls]
    differences = [difference(x, gradients[0]) for x in gradients]
    seconds = np.zeros((args.runs, len(calls)))
    for turn in range(args.runs):
        for side, (_, call, _) in enumerate(calls):
            time.sleep(0.05)  # the threads of the side before stop spinning
            started = time.perf_counter()
            call()
            seconds[turn, side] = time.perf_counter() - started
    print(f'{"side":24}{"median ms":>10}{"ratio to xla":>14}{"quartiles":>15}{"difference":>12}{"temporary MiB":>15}')
    for (name, _, memory), times, apart in zip(calls, seconds.T, differences):
        low, middle, high = np.quantile(times / seconds[:, 0], (0.25, 0.5, 0.75))
        spread = f'{low:.2f} - {high:.2f}'
        print(f'{name:24}{np.median(times) * 1e3:10.0f}{middle:14.2f}{spread:>15}{apart:12.1e}{memory:>15}')


if __name__ == '__main__':
    main()
