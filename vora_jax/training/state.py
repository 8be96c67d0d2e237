"""What training changes: step, weights, optimizer.

Frozen weights live beside it: they have no gradient, no optimizer state and are never donated.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vora_jax.batch import Batch
from vora_jax.method import Stage
from vora_jax.ops.attention import Implementation
from vora_jax.params import flatten, partition, unflatten
from vora_jax.training import guard
from vora_jax.training import optimizer as optimizer_lib
from vora_jax.training.config import HowToGather, Optimizer
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.attend import make_attend
from vora_jax.training.mesh.gather import cut_axes, make_gather
from vora_jax.types import Array, Params


class State(NamedTuple):
    """step: i32[] optimizer steps done, also skipped ones.    trainable: f32 parameters.    opt_state: the optimizer's.
    health: what steps have looked like."""

    step: Array
    trainable: Params
    opt_state: Any
    health: guard.Health


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes and shardings of all that a run holds on its devices, before any of it exists.

    state, frozen: trees of `jax.ShapeDtypeStruct` with shardings.
    optimizer: the transformation whose state `state.opt_state` describes.
    """

    model: Any
    batch: Batch
    state: State
    frozen: Params
    optimizer: optax.GradientTransformation

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every parameter by path."""
        return flatten(self.state.trainable) | flatten(self.frozen)

    @property
    def state_shardings(self) -> State:
        return jax.tree.map(lambda s: s.sharding, self.state)

    @property
    def frozen_shardings(self) -> Params:
        return jax.tree.map(lambda s: s.sharding, self.frozen)


def plan(stage: Stage, config: Optimizer, batch: Batch, mesh: jax.sharding.Mesh, frozen_dtype: str,
         attention: Implementation = 'auto', how: HowToGather = 'compiler') -> Plan:
    """The plan of a stage for batches shaped like `batch` (arrays or shapes; its rows must divide over the
    mesh).

    Raises:
        UserError: a pattern matches no parameter, a dimension does not divide over the mesh, or `attention` cannot serve
            the model on it.
    """
    model = stage.model.clone(attend=make_attend(mesh, attention, how))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    # The key is drawn inside: nothing runs, so that the devices may be those of a topology.
    boxed = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), shapes)['params']
    places = flatten(sharding.param_shardings(boxed, mesh, cut_axes(how)))
    stacked = flatten(sharding.num_stacked(boxed))
    model = model.clone(gather=make_gather(places, stacked, _compute_dtype(model), how))
    trainable, frozen = partition(sharding.unbox(boxed), stage.trainable)

    def placed(tree: Params, dtype: Any) -> Params:
        return unflatten({
            path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=places[path])
            for path, leaf in flatten(tree).items()
        })

    trainable, frozen = placed(trainable, jnp.float32), placed(frozen, jnp.dtype(frozen_dtype))
    optimizer = optimizer_lib.create(config, trainable, stacked)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    own_places = jax.tree.map(lambda s: s.sharding, trainable)
    opt_places = sharding.like_params(opt_state, trainable, own_places, mesh)
    opt_state = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), opt_state, opt_places
    )
    everywhere = sharding.replicated(mesh)
    step, health = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere),
                                jax.eval_shape(lambda: (jnp.int32(0), guard.start())))
    return Plan(model, shapes, State(step, trainable, opt_state, health), frozen, optimizer)


def create(plan: Plan, seed: int, taken: dict[str, np.ndarray]) -> tuple[State, Params]:
    """(state at step 0, frozen weights): parameters from `taken` by path, the others drawn from the seed."""
    wanted = plan.params
    fresh = {path: shape for path, shape in wanted.items() if path not in taken}

    def initialise(key: Array) -> dict[str, Array]:
        batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), plan.batch)
        params = flatten(sharding.unbox(plan.model.init(key, batch)['params']))
        return {path: params[path].astype(shape.dtype) for path, shape in fresh.items()}

    flat: dict[str, Array] = {}
    if fresh:
        places = {path: shape.sharding for path, shape in fresh.items()}
        # It runs once: on CPUs that saves half of LLVM's work, for the same values.
        options = {'xla_backend_optimization_level': 1} if jax.default_backend() == 'cpu' else None
        flat = jax.jit(initialise, out_shardings=places, compiler_options=options)(jax.random.key(seed))
    flat |= {path: place(array, wanted[path]) for path, array in taken.items()}
    trainable = jax.tree.map(lambda path: flat[path], _paths(plan.state.trainable))
    frozen = jax.tree.map(lambda path: flat[path], _paths(plan.frozen))
    shardings = plan.state_shardings
    opt_state = jax.jit(plan.optimizer.init, out_shardings=shardings.opt_state)(trainable)
    step, health = jax.jit(lambda: (jnp.int32(0), guard.start()), out_shardings=(shardings.step, shardings.health))()
    return State(step, trainable, opt_state, health), frozen


def place(array: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """A host array on the devices, cast and cut as `shape` says; each process holds the whole array."""
    array = np.asarray(array)
    return jax.make_array_from_callback(
        shape.shape, shape.sharding, lambda index: array[index].astype(shape.dtype)
    )


def _compute_dtype(model: Any) -> jnp.dtype:
    llm = getattr(model, 'llm', None)
    return llm.dtype if llm else jnp.dtype('float32')


def _paths(tree: Params) -> Params:
    return unflatten({path: path for path in flatten(tree)})
