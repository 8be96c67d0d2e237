"""How long a save of a large state holds training up."""
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vora_jax.training.checkpoints import workdir
from vora_jax.training.checkpoints.record import Record
from vora_jax.training.checkpoints.writer import Writer

WIDTH, LAYERS, ROWS = 2048, 20, 1024  # 1.0 GB with both moments; a step of some seconds


def train_step(weights, moments):
    """A step of Adam on a stack of matrices."""
    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))

    def loss(weights):
        hidden = x
        for kernel in weights.values():
            hidden = jnp.tanh(hidden @ kernel)
        return (hidden**2).mean()

    gradient = jax.grad(loss)(weights)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
    second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, moments[1], gradient)
    change = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), first, second)
    return jax.tree.map(lambda w, c: w - 1e-3 * c, weights, change), (first, second)


@pytest.mark.slow
def test_a_save_of_a_gigabyte_stalls_training_by_less_than_two_steps(tmp_path):
    """Measured on two cores shared with others: steps of 2.4 to 7.5 s, the call 0.07 to 0.10 s, committed after 7.8 to 8.6
    s, stalls of -0.2, 0.8 and 0.6 steps."""
    step = jax.jit(train_step, donate_argnums=(0, 1))
    weights = {f'layer_{i}': jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) / WIDTH**0.5 for i in range(LAYERS)}
    moments = tuple(jax.tree.map(jnp.zeros_like, weights) for _ in range(2))
    assert sum(x.nbytes for x in jax.tree.leaves((weights, moments))) > 1e9

    def timed() -> float:
        nonlocal weights, moments
        start = time.perf_counter()
        weights, moments = jax.block_until_ready(step(weights, moments))
        return time.perf_counter() - start

    timed()  # compiles
    usual = [timed() for _ in range(5)]
    stalls, writer = [], Writer(tmp_path, 2)
    for number in (1, 2, 3):
        start, during = time.perf_counter(), []
        writer.save(Record(number, ''), weights, moments)
        call = time.perf_counter() - start
        while not during or number not in workdir.step_numbers(tmp_path):
            during.append(timed())
            writer.check()
        usual += [timed() for _ in range(2)]
        writer.wait()
        stalls.append((call + sum(during) - len(during) * np.median(usual)) / np.median(usual))
    print(f'step {np.median(usual):.2f} s; stalls in steps: {np.round(stalls, 2)}')
    assert np.median(stalls) < 2, stalls
