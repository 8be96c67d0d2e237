"""Traces of chosen steps."""

import gzip
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from vora_jax.training.config import _check_profile
from vora_jax.training.log.profile import TRIGGER, Profile
from vora_jax.types import UserError


def run(profile, first, last):
    """Takes the steps first..last as the loop does, and looks for the trigger after each."""
    now = [jnp.ones((8, 8))]
    double = jax.jit(lambda x: x @ x / 8)
    for number in range(first, last + 1):
        with profile.step(number, now):
            now = [double(now[0])]
        profile.end(number, now)
        profile.look(number)
    profile.close(last)


def traced_steps(folder):
    """For each trace below the folder, the numbers of the steps in it."""
    found = []
    for path in sorted(folder.rglob('*.trace.json.gz')):
        events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
        found.append({int(event['args']['step_num']) for event in events if 'step_num' in event.get('args', {})})
    return found


def test_the_steps_asked_for_are_traced(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'vora_jax')
    run(Profile(tmp_path, (3, 5)), 1, 8)
    assert traced_steps(tmp_path / 'profile') == [{3, 4, 5}] and list(tmp_path.rglob('*.xplane.pb'))
    assert 'profile of steps 3 to 5' in caplog.text and f'tensorboard --logdir {tmp_path / "profile"}' in caplog.text


def test_the_end_of_the_run_and_a_trigger_file(tmp_path):
    run(Profile(tmp_path, (1, 5)), 4, 4)  # resumed after step 3, stopped after step 4
    assert traced_steps(tmp_path / 'profile') == [{4}]
    (tmp_path / 'now').mkdir()
    (tmp_path / 'now' / TRIGGER).touch()
    run(Profile(tmp_path / 'now'), 1, 9)
    assert traced_steps(tmp_path / 'now' / 'profile') == [{2, 3, 4}] and not (tmp_path / 'now' / TRIGGER).exists()


def test_nothing_is_traced_unasked(tmp_path):
    run(Profile(tmp_path), 1, 3)
    run(Profile(tmp_path, (1, 2)), 3, 5)
    assert not list(tmp_path.iterdir())


def test_steps_that_make_no_sense():
    _check_profile(())
    _check_profile((3, 3))
    for steps in ((3,), (4, 3), (0, 3), (1, 2, 3)):
        with pytest.raises(UserError, match=r'Train.profile_steps is .* such as \(10, 13\)'):
            _check_profile(steps)
