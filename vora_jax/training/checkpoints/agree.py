"""What processes tell each other without devices.

Through the coordination service of `jax.distributed`, so that a background thread may use it while the devices
compute, and every wait ends: a collective of the devices has no timeout. One process alone talks to nobody.
"""
import collections
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the coordination service's client has no public name

from vora_jax.types import TryAgain, UserError

SECONDS = 600  # a process that tells nothing for so long is lost; a dead one ends the run much earlier by its heartbeat

_TIMES: collections.Counter[str] = collections.Counter()  # a key is used once: later uses of a topic get a number


def collect(topic: str, text: str, seconds: float = SECONDS) -> list[str]:
    """What every process tells about a topic, by process, at the first one; [] at the others, which do not wait.

    Called by all processes, equally often for each topic.

    Raises:
        TimeoutError: a process told nothing in time.
    """
    if jax.process_count() == 1:
        return [text]
    key = _key('collect', topic)
    if jax.process_index() != 0:
        _client().key_value_set(f'{key}/{jax.process_index()}', text)
        return []
    others = [_wait(f'{key}/{process}', topic, process, seconds) for process in range(1, jax.process_count())]
    _client().key_value_delete(f'{key}/')
    return [text, *others]


def announce(topic: str, text: str, seconds: float = SECONDS) -> str:
    """What the first process tells, at all of them. Called by all processes; `text` of the others is not read.

    Raises:
        TimeoutError: the first process told nothing in time.
    """
    if jax.process_count() == 1:
        return text
    key = _key('announce', topic)
    if jax.process_index() == 0:
        _client().key_value_set(key, text)
        return text
    return _wait(key, topic, 0, seconds)


def decide(topic: str, choose: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `choose` gives at the first process (JSON values), at all of them: file systems may show them unlike things.
    Called by all processes.

    Raises:
        UserError, TryAgain: as `choose` at the first process, at all of them.
        TimeoutError: the first process told nothing in time.
    """
    if jax.process_count() == 1:
        return choose()
    told = {}
    if jax.process_index() == 0:
        try:
            told = {'value': choose()}
        except (UserError, TryAgain) as error:
            told = {type(error).__name__: str(error)}
    told = json.loads(announce(topic, json.dumps(told), seconds))
    for kind in (UserError, TryAgain):
        if kind.__name__ in told:
            raise kind(told[kind.__name__])
    return told['value']


def _key(kind: str, topic: str) -> str:
    name = f'vora_jax/{kind}/{topic}'
    _TIMES[name] += 1
    return f'{name}#{_TIMES[name]}'


def _wait(key: str, topic: str, process: int, seconds: float) -> str:
    try:
        return _client().blocking_key_value_get(key, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        raise TimeoutError(f'process {process} told nothing about {topic} in {seconds:g} seconds') from None


def _client() -> Any:
    return distributed.global_state.client
