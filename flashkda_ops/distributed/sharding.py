"""Sharding rules of the ops for DTensors: over the batch of dense calls, and over heads.

Importing this module registers them. Arguments that are placed in some other way are redistributed, to the rule that
moves the least. What is one number a sequence, ``cu_seqlens`` first, is replicated in every rule.

A pool is updated in place, so it is never redistributed: the other arguments follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from flashkda_ops.ops import chunk_kda, chunk_kda_backward, chunk_kda_paged, chunk_kda_transition, recurrent_kda_paged

__all__: list[str] = []


_Outputs = Callable[[Any, "_Rule"], list[Placement]]


class _Rule(NamedTuple):
    """The dimension in which a rule splits each argument and output; those not named are replicated."""

    dims: dict[str, int]
    summed: tuple[str, ...] = ()  # replicated arguments whose gradient each rank has a part of

    def placement(self, name: str) -> Placement:
        return Shard(self.dims[name]) if name in self.dims else Replicate()

    def gradient(self, name: str) -> Placement:
        return Partial() if name in self.summed else self.placement(name)


_REPLICATED = _Rule({})
_BATCH = _Rule(
    dict.fromkeys(
        ("q", "k", "v", "g", "beta", "initial_state", "do", "dht", "o", "final_state", "states", "M", "B"), 0
    ),
    ("A_log", "dt_bias"),
)
_VALUE_HEADS = {
    **dict.fromkeys(("v", "g", "beta", "do", "o", "states"), 2),
    **dict.fromkeys(("initial_state", "dht", "final_state", "M", "B", "state_pool"), 1),
    **dict.fromkeys(("A_log", "dt_bias"), 0),
}
_HEADS = _Rule({**_VALUE_HEADS, "q": 2, "k": 2})
_ONE_KEY_HEAD = _Rule(_VALUE_HEADS, ("q", "k"))


def _splits_evenly(heads: int, mesh_shape: Sequence[int]) -> bool:
    """Whether ``heads`` split evenly over all dimensions of the mesh, and sets of them, that they are enough for.

    Uneven shards would part value heads from the query and key that they go with.
    """
    sizes = (prod(dims) for n in range(1, len(mesh_shape) + 1) for dims in combinations(mesh_shape, n))
    return all(heads % size == 0 for size in sizes if size <= heads)


def _over_batch_or_heads(a: Any) -> Iterator[_Rule]:
    H, HV, mesh_shape = a.k.shape[2], a.v.shape[2], a.k.mesh.shape
    yield _REPLICATED
    if a.cu_seqlens is None:
        yield _BATCH
    if _splits_evenly(H, mesh_shape):
        yield _HEADS
    if H == 1 and _splits_evenly(HV, mesh_shape):
        yield _ONE_KEY_HEAD


def _as_the_pool(a: Any) -> Iterator[_Rule]:
    placements, size = set(a.state_pool.placements), a.state_pool.mesh.size()
    H, HV = a.k.shape[2], a.v.shape[2]
    if placements == {Replicate()}:
        yield _REPLICATED
    elif placements != {Shard(1)}:
        raise ValueError(
            "state_pool must be replicated, or split by heads (Shard(1)), in all dimensions of its mesh, "
            f"got {a.state_pool.placements}"
        )
    elif H % size == 0:
        yield _HEADS
    elif H == 1 and HV % size == 0:
        yield _ONE_KEY_HEAD
    else:
        raise ValueError(f"state_pool must split into the heads of q, got {H} heads over a mesh of {size}")


def _register(name: str, arguments: Any, rules: Callable[[Any], Iterator[_Rule]], outputs: _Outputs) -> None:
    def sharding(*args: Any) -> list[tuple[list[Placement], list[Placement]]]:
        a = arguments(*args)
        tensors = [name for name, x in a._asdict().items() if hasattr(x, "placements")]
        return [(outputs(a, rule), [rule.placement(name) for name in tensors]) for rule in rules(a)]

    op = getattr(torch.ops.flashkda, name).default
    register_sharding(op)(sharding)
    # DTensor caches what it finds for an op by the placements of its tensors. For these ops that depends on options too
    # (which outputs there are, the layout of states), which it looks at from the first integer on, unless told so.
    propagator = DTensor._op_dispatcher.sharding_propagator
    first_option = next(i for i, x in enumerate(op._schema.arguments) if "Tensor" not in str(x.type))
    schema_info = RuntimeSchemaInfo(first_option, needs_pytree=True)
    propagator.register_op_strategy(op, propagator.op_strategy_funcs[op], schema_info)


def _named(*names: str) -> _Outputs:
    return lambda a, rule: [rule.placement(name) for name in names]


def _gradients(a: chunk_kda_backward.Arguments, rule: _Rule) -> list[Placement]:
    """As the arguments; those not asked for are empty tensors."""
    names = chunk_kda.Arguments._fields[:8]
    return [rule.gradient(name) if wanted else Replicate() for name, wanted in zip(names, a.output_mask, strict=True)]


for _name, _arguments, _rules, _outputs in (
    ("chunk_kda", chunk_kda.Arguments, _over_batch_or_heads, _named("o", "final_state", "states")),
    ("chunk_kda_backward", chunk_kda_backward.Arguments, _over_batch_or_heads, _gradients),
    ("chunk_kda_transition", chunk_kda_transition.Arguments, _over_batch_or_heads, _named("M", "B")),
    ("chunk_kda_paged", chunk_kda_paged.Arguments, _as_the_pool, _named("o")),
    ("recurrent_kda_paged", recurrent_kda_paged.Arguments, _as_the_pool, _named("o")),
):
    _register(_name, _arguments, _rules, _outputs)
