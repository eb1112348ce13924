"""The ops on DTensors give what they give on plain tensors, however the arguments are placed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import DIFFERENTIABLE, TOKENS, Call, error, make_call, paged, requiring_grad
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from world import World

import flashkda_ops.distributed  # noqa: F401  (registers the rules)
from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda_paged

BATCH = dict.fromkeys((*TOKENS, "initial_state"), 0)
HEADS = {**dict.fromkeys(TOKENS, 2), "A_log": 0, "dt_bias": 0, "initial_state": 1, "state_pool": 1}
ONE_KEY_HEAD = {name: dim for name, dim in HEADS.items() if name not in ("q", "k")}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} ranks".format)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def a_mesh(dimensions: int = 1) -> DeviceMesh:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (size,) if dimensions == 1 else (size // 2, 2))


def placed(call: Call, mesh: DeviceMesh, placements: dict[str, list[Placement]]) -> Call:
    """The call on DTensors; replicated where not said otherwise."""
    return {
        name: distribute_tensor(x.clone(), mesh, placements.get(name, [Replicate()] * mesh.ndim))
        if isinstance(x, Tensor)
        else x
        for name, x in call.items()
    }


def whole(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)
    full = x.full_tensor()
    assert full.shape == x.shape
    return full


def worst(call: Call, mesh: DeviceMesh, placements: dict[str, list[Placement]]) -> float:
    """The error of outputs and gradients."""
    results = []
    for leaves in (requiring_grad(call), requiring_grad(placed(call, mesh, placements))):
        outputs = chunk_kda(**leaves, output_final_state=True)
        (outputs[0].square().sum() + outputs[1].square().sum()).backward()
        results.append([*outputs, *(leaves[name].grad for name in DIFFERENTIABLE if name in call)])
    return max(error(whole(actual), expected) for expected, actual in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# On each rank
# ---------------------------------------------------------------------------------------------------------------------


def split(dims: dict[str, int], options: dict[str, Any]) -> tuple[float, int]:
    """Placed as a rule has it: the error, and how many collectives the forward pass takes."""
    mesh = a_mesh()
    call = make_call(9, H=options.pop("H", 4), HV=8, dtype=torch.float64, initial_state=True, **options)
    placements: dict[str, list[Placement]] = {name: [Shard(dim)] for name, dim in dims.items() if name in call}
    arguments = placed(call, mesh, placements)
    with CommDebugMode() as communication:
        chunk_kda(**arguments, output_final_state=True)
    return worst(call, mesh, placements), communication.get_total_counts()


def placed_anyhow(seed: int, dimensions: int) -> float:
    choose, mesh = random.Random(seed), a_mesh(dimensions)
    packed = choose.random() < 0.5
    H, HV = choose.choice([(1, 4), (2, 4), (3, 6), (4, 8), (8, 8)])
    layout: dict[str, Any] = {"cu_seqlens": [0, 5, 5, 12]} if packed else {"B": 4}
    call = make_call(
        12, H=H, HV=HV, K=8, V=8, dtype=torch.float64, initial_state=True, state_v_first=choose.random() < 0.5, **layout
    )
    placements = {
        name: [choose.choice([Replicate(), *map(Shard, range(x.dim()))]) for _ in range(mesh.ndim)]
        for name, x in call.items()
        if isinstance(x, Tensor) and name != "cu_seqlens"
    }
    return worst(call, mesh, placements)


def options_after_options() -> None:
    """Every combination of what shapes the outputs, in one process: none is answered from the cache of another."""
    mesh = a_mesh()
    for final in (False, True, False):
        for v_first in (False, True):
            for interval in (0, 32):
                call = make_call(40, H=4, HV=4, B=2, state_v_first=v_first) | {
                    "output_final_state": final, "checkpoint_interval": interval,
                }  # fmt: skip
                expected = torch.ops.flashkda.chunk_kda(**call)
                actual = torch.ops.flashkda.chunk_kda(**placed(call, mesh, {n: [Shard(d)] for n, d in HEADS.items()}))
                for x, y in zip(actual, expected, strict=True):
                    assert x.shape == y.shape and torch.equal(whole(x), y)
    for names in (("q",), ("A_log", "v"), DIFFERENTIABLE):
        call = make_call(9, H=4, HV=4, B=2, initial_state=True)
        expected, actual = (
            requiring_grad(call, names),
            requiring_grad(placed(call, mesh, {n: [Shard(d)] for n, d in HEADS.items()}), names),
        )
        for leaves in (expected, actual):
            chunk_kda(**leaves)[0].square().sum().backward()
        for name in DIFFERENTIABLE:
            assert (actual[name].grad is None) == (name not in names)
            if name in names:
                assert error(whole(actual[name].grad), expected[name].grad) < 1e-5


def transition(dims: dict[str, int]) -> float:
    mesh = a_mesh()
    call = make_call(9, H=4, HV=8, B=4, dtype=torch.float64)
    del call["q"]
    results = []
    for leaves in (call, placed(call, mesh, {name: [Shard(dim)] for name, dim in dims.items() if name in call})):
        leaves = requiring_grad(leaves)
        outputs = torch.ops.flashkda.chunk_kda_transition(**leaves)
        (outputs[0].square().sum() + outputs[1].square().sum()).backward()
        results.append([*outputs, *(leaves[name].grad for name in DIFFERENTIABLE if name in call)])
    return max(error(whole(actual), expected) for expected, actual in zip(*results, strict=True))


def on_a_pool(pool: list[Placement], others: dict[str, list[Placement]], dimensions: int = 1, H: int = 4) -> float:
    """Prefill, then decode: outputs, and the pool that was left behind."""
    mesh, dtype = a_mesh(dimensions), torch.float64
    indices = torch.tensor([4, 0, -1])
    prompt = paged(
        make_call(20, H=H, HV=8, cu_seqlens=[0, 7, 12, 20], dtype=dtype), torch.zeros(6, 8, 16, 8).to(dtype), indices
    )
    token = paged(make_call(1, H=H, HV=8, B=3, dtype=dtype, seed=1), prompt["state_pool"], indices)
    placements = {**others, "state_pool": pool}
    expected = [chunk_kda_paged(**prompt | {"state_pool": (rows := prompt["state_pool"].clone())})]
    expected += [recurrent_kda_paged(**token | {"state_pool": rows}), rows]
    split_prompt = placed(prompt, mesh, placements)
    rows = split_prompt["state_pool"]
    actual = [chunk_kda_paged(**split_prompt)]
    actual += [recurrent_kda_paged(**placed(token, mesh, placements) | {"state_pool": rows}), rows]
    assert rows.placements == tuple(pool)
    return max(error(whole(x), y) for x, y in zip(actual, expected, strict=True))


def rejected(pool: list[Placement], H: int) -> str:
    with pytest.raises(RuntimeError) as raised:
        on_a_pool(pool, {}, H=H)
    return str(raised.value)


def compiled() -> float:
    mesh = a_mesh()
    call = make_call(9, H=4, HV=8, B=4)
    leaves = requiring_grad(placed(call, mesh, {name: [Shard(dim)] for name, dim in HEADS.items() if name in call}))
    plain = requiring_grad(call)

    def loss(call: Call) -> Tensor:
        return chunk_kda(**call)[0].square().sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves).backward()
    loss(plain).backward()
    torch._dynamo.reset()
    return max(error(whole(leaves[name].grad), plain[name].grad) for name in DIFFERENTIABLE if name in call)


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (BATCH, {"B": 4}),
        (HEADS, {"B": 2}),
        (HEADS, {"B": 2, "state_v_first": True}),
        (HEADS, {"cu_seqlens": [0, 2, 2, 9]}),
        (ONE_KEY_HEAD, {"H": 1}),
    ],
    ids=["batch", "heads", "heads, V first", "heads of packed sequences", "value heads of one key head"],
)
def test_a_call_placed_by_a_rule_communicates_nothing(
    world: World, dims: dict[str, int], options: dict[str, Any]
) -> None:
    for difference, collectives in world.run(split, dims, dict(options)):
        assert difference < 1e-12
        assert collectives == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_placement_is_redistributed_not_miscomputed(world: World, seed: int) -> None:
    assert max(world.run(placed_anyhow, seed, 1)) < 1e-12
    if world.size == 4:
        assert max(world.run(placed_anyhow, seed, 2)) < 1e-12


def test_no_call_is_answered_from_the_cache_of_another(world: World) -> None:
    world.run(options_after_options)


@pytest.mark.parametrize("dims", [BATCH, HEADS], ids=["batch", "heads"])
def test_transitions_split_as_the_calls_they_come_from(world: World, dims: dict[str, int]) -> None:
    assert max(world.run(transition, dims)) < 1e-12


@pytest.mark.parametrize(
    ("pool", "others"),
    [
        ([Shard(1)], {name: [Shard(dim)] for name, dim in HEADS.items()}),
        ([Shard(1)], {}),
        ([Replicate()], {name: [Shard(dim)] for name, dim in HEADS.items()}),
    ],
    ids=["all by heads", "the pool alone by heads", "all but the pool by heads"],
)
def test_pools_are_updated_where_they_are(world: World, pool: Any, others: Any) -> None:
    assert max(world.run(on_a_pool, pool, others)) < 1e-12


def test_pools_of_two_dimensions(world: World) -> None:
    if world.size == 4:
        assert max(world.run(on_a_pool, [Shard(1), Shard(1)], {}, 2)) < 1e-12


def test_a_pool_split_by_rows_is_rejected(world: World) -> None:
    for message in world.run(rejected, [Shard(0)], 4):
        assert message.startswith("state_pool must be replicated, or split by heads (Shard(1))")


def test_a_pool_split_further_than_the_key_heads_is_rejected(world: World) -> None:
    assert max(world.run(on_a_pool, [Shard(1)], {}, H=1)) < 1e-12  # but where there is one
    if world.size == 4:
        for message in world.run(rejected, [Shard(1)], 2):
            assert message.startswith("state_pool must split into the heads of q, got 2 heads over a mesh of 4")


@pytest.mark.parametrize("world", [2], indirect=True, ids="{} ranks".format)
def test_calls_on_dtensors_compile_to_one_graph(world: World) -> None:
    assert max(world.run(compiled)) < 1e-5
