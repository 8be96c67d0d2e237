"""What a run would hold on a mesh of no devices."""
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from vora_jax.params import flatten, partition
from vora_jax.planning.abstract_batch import batch_shapes
from vora_jax.planning.memory import TEACHER, Held
from vora_jax.training.config import Train
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.gather import cut_axes


def parameter_shapes(config: Train) -> Any:
    """The tree of boxed shapes that `sharding.param_shardings` takes."""
    model = config.method.stage(config.stage).model
    batch = batch_shapes(dataclasses.replace(config, batch_rows=1, accumulation=1))
    return jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), batch)['params']


def held_on(config: Train, shapes: Any, mesh: Mapping[str, int], gather: str) -> tuple[Held, ...]:
    """What lives through a step on a mesh with these axis sizes; the optimizer has two copies of what is trained.

    shapes: `parameter_shapes` of the configuration.

    Raises:
        UserError: a dimension that the mesh does not divide.
    """
    abstract = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
    places = flatten(sharding.param_shardings(shapes, abstract, cut_axes(gather)))
    trainable, frozen = partition(sharding.unbox(shapes), config.method.stage(config.stage).trainable)
    frozen_size = {'float32': 4, 'bfloat16': 2}[config.frozen_dtype]
    found = []
    trained, rest = flatten(trainable), flatten(frozen)
    for path, leaf in [*trained.items(), *rest.items()]:
        axes = tuple((axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in places[path].spec)
        if path in trained:
            found += [Held(part, path, tuple(leaf.shape), 4, axes) for part in ('trainable', 'optimizer', 'optimizer')]
        else:
            part = 'teacher' if path.startswith(TEACHER) else 'frozen'
            found.append(Held(part, path, tuple(leaf.shape), frozen_size, axes))
    return tuple(found)
