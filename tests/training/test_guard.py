"""Steps that are refused change nothing."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import quick_jit

from vora_jax.cli import gin_config
from vora_jax.training import guard, loop
from vora_jax.training.checkpoints import checkpoint
from vora_jax.training.config import Guard
from vora_jax.training.config_changes import first_difference
from vora_jax.types import UserError

judge = quick_jit(guard.judge, static_argnums=3)


def run(seen, max_sigmas):
    """(which (loss, gradient norm) pairs are taken, the health after them)."""
    health, taken = guard.start(), []
    for loss, norm in seen:
        ok, health = judge(health, jnp.float32(loss), jnp.float32(norm), max_sigmas)
        taken.append(bool(ok))
    return taken, health


def reference(seen, max_sigmas):
    """`run` in float64, written as loops."""
    taken, mean, variance = [], [0.0, 0.0], [0.0, 0.0]
    for pair in seen:
        count = sum(taken)
        limits = [m + max_sigmas * v**0.5 + 1e-5 * abs(m) for m, v in zip(mean, variance)]
        high = max_sigmas and count >= guard.WARM_UP and any(x > limit for x, limit in zip(pair, limits))
        taken.append(bool(np.isfinite(pair).all() and not high))
        if taken[-1]:
            weight = 1 / min(count + 1, guard.MEMORY)
            variance = [(1 - weight) * (v + weight * (x - m)**2) for x, m, v in zip(pair, mean, variance)]
            mean = [m + weight * (x - m) for x, m in zip(pair, mean)]
    return taken, mean, variance


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 3.0, 6.0]), st.integers(1, 150))
def test_judging_equals_a_reference(seed, max_sigmas, count):
    rng = np.random.default_rng(seed)
    seen = rng.gamma(3.0, size=(count, 2)) * np.where(rng.random((count, 1)) < 0.05, 30.0, 1.0)
    seen[rng.random((count, 2)) < 0.03] = rng.choice([np.nan, np.inf, -np.inf])
    taken, health = run(seen, max_sigmas)
    expected, mean, variance = reference(seen, max_sigmas)
    assert taken == expected and health.taken == sum(taken)
    np.testing.assert_allclose(health.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(health.variance, variance, rtol=1e-4, atol=1e-6)


def test_a_spike_is_skipped_and_a_fall_is_not():
    calm = [(2 + 0.1 * (i % 3), 1 - 0.1 * (i % 3)) for i in range(guard.WARM_UP)]
    for number, (spike, falls) in enumerate([((9.0, 1.0), (0.1, 1.0)), ((2.0, 9.0), (2.0, 0.0))]):
        assert run([*calm, spike, falls], 4.0)[0][-2:] == [False, True], number
        assert run([*calm[1:], spike], 4.0)[0][-1]  # warming up
        assert run([*calm, spike], 0.0)[0][-1]
    assert all(run([(2.0, 3.0)] * 60, 1.0)[0])  # no deviation at all


@pytest.fixture(scope='module')
def pretrain():
    """(batch, state, step) of a method on 2 x 4 devices; a step takes a copy of the state."""
    batch = tiny_run.batch()
    batch = batch._replace(patches=batch.patches._replace(pixels=batch.patches.pixels.astype(np.float32) / 255))
    _, state, frozen, step = tiny_run.start(tiny_run.vora().stage('pretrain'), batch, (2, 4, 1))
    return batch, state, lambda batch, now: step(jax.tree.map(jnp.copy, now), frozen, batch)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def damage(array, where, value, rng):
    """A copy with this value in one of the places."""
    array = array.copy()
    array[tuple(rng.choice(np.argwhere(where)))] = value
    return array


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('part', ['pixels', 'loss_mask'])
@pytest.mark.parametrize('value', [np.nan, np.inf], ids=str)
def test_a_step_that_is_not_finite_changes_only_its_number(pretrain, part, value, seed):
    good, state, step = pretrain
    rng, patches = np.random.default_rng(seed), good.patches
    if part == 'pixels':
        bad = good._replace(patches=patches._replace(pixels=damage(patches.pixels, patches.image_id >= 0, value, rng)))
    else:
        bad = good._replace(loss_mask=damage(good.loss_mask, good.modality == 1, value, rng))
    state, metrics = step(good, state)
    assert metrics['skipped_steps'] == 0 and state.health.taken == 1
    after, metrics = step(bad, state)
    assert metrics['skipped_steps'] == 1 and not np.isfinite(metrics['grad_norm'])
    assert after.step == 2 and bits(after[1:]) == bits(state[1:])
    # It goes on as if nothing had been: only dropout, which is off, hangs on the step's number.
    (later, _), (whole, _) = step(good, after), step(good, state)
    assert bits(later[1:]) == bits(whole[1:]) and later.step == 3


def test_no_loss_of_precision_where_zeros_have_signs():
    old = {'a': jnp.array([-0.0, 0.0, 1e-42, np.nan], jnp.float32), 'b': jnp.int32(3)}
    new = {'a': jnp.array([np.nan, 1, 2, 3], jnp.float32), 'b': jnp.int32(4)}
    for ok, wanted in ((False, old), (True, new)):
        assert bits(quick_jit(guard.choose)(jnp.bool_(ok), new, old)) == bits(wanted)


def metrics(*skipped, loss=np.nan):
    return [{'skipped_steps': np.int32(one), 'loss': np.float32(loss), 'grad_norm': np.float32(1)} for one in skipped]


def test_too_many_in_a_row_end_the_run():
    streak = guard.Streak(3)
    assert streak.read(5, metrics(1, 1, 0, 1, 1)) is None and streak.number == 2
    error = streak.read(7, metrics(1, 0))
    assert 'steps 4 to 6 were all skipped' in str(error) and 'loss nan' in str(error)
    assert streak.number == 0 and streak.read(9, metrics(0, 1)) is None and streak.number == 1


def test_what_is_skipped_is_part_of_the_run():
    @dataclasses.dataclass(frozen=True)
    class Train:
        guard: Guard

    assert first_difference(Train(Guard()), Train(Guard(max_skips=3))) is None
    assert first_difference(Train(Guard()), Train(Guard(max_sigmas=3.0))).path == 'Train.guard.max_sigmas'


def train(gin_file, workdir, *bindings):
    config, text = gin_config.load('Train', [str(gin_file)], bindings)
    return loop.train(config, text, str(workdir), lambda text: gin_config.load('Train', texts=[text])[0])


def test_a_diverged_run_ends_and_its_last_good_state_is_saved_once(tmp_path):
    gin_file = tiny_run.write_text_run(tmp_path, **{
        'Train.batch_rows': 8, 'Guard.max_skips': 4, 'Optimizer.learning_rate': 1e30, 'Train.log_every': 5})
    for first, left in ((2, 5), (6, 5)):  # the second run learns nothing: it leaves the checkpoints alone
        with pytest.raises(UserError, match=f'steps {first} to {first + 3} were all skipped.*Step {left} is saved'):
            train(gin_file, tmp_path / 'run')
        assert checkpoint.step_numbers(tmp_path / 'run') == [left]
    assert not (tmp_path / 'run' / 'summary.json').exists()
    opened = checkpoint.open_checkpoint(tmp_path / 'run')
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(opened.params))


def test_a_resumed_run_remembers_what_steps_looked_like(tmp_path):
    gin_file = tiny_run.write_text_run(tmp_path, **{  # losses stay where they are, so that some are high
        'Train.batch_rows': 8, 'Guard.max_sigmas': 0.5, 'Optimizer.learning_rate': 1e-6})
    count = guard.WARM_UP + 6
    for steps in (guard.WARM_UP - 2, count):
        assert train(gin_file, tmp_path / 'broken', f'Train.steps={steps}')
    assert train(gin_file, tmp_path / 'whole', f'Train.steps={count}', 'Guard.max_skips=20')
    ends = [checkpoint.load_as_numpy(checkpoint.step_folder(tmp_path / name, count), 'optimizer')
            for name in ('broken', 'whole')]
    assert bits(ends[0]) == bits(ends[1])
    taken = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(ends[0]) if 'taken' in str(path))
    assert guard.WARM_UP <= taken < count
