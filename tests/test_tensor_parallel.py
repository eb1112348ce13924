"""The layer split by heads gives what it gives whole: outputs, gradients, and a step of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import error
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from world import World

from flashkda_ops.distributed import KimiDeltaAttentionParallel, tensor_parallel_plan
from flashkda_ops.nn import KimiDeltaAttention, StaticCache

OPTIONS: dict[str, Any] = {"hidden_size": 24, "head_dim": 8, "num_heads": 4, "num_v_heads": 8}


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


def layer(**changes: Any) -> KimiDeltaAttention:
    torch.manual_seed(0)
    return KimiDeltaAttention(**OPTIONS | changes).double()


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, OPTIONS["hidden_size"], generator=generator, dtype=torch.float64)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def split(**changes: Any) -> float:
    """The worst difference after two steps of an optimizer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected, model = layer(**changes), layer(**changes)
    parallelize_module(model, mesh, tensor_parallel_plan())
    assert model.A_log.shape == (OPTIONS["num_v_heads"] // mesh.size(),)
    assert model.state_dict().keys() == expected.state_dict().keys()
    worst = 0.0
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (expected, model)]
    for step in range(2):
        inputs = [tokens(step).requires_grad_() for _ in range(2)]
        outputs = [m(x)[0] for m, x in zip((expected, model), inputs, strict=True)]
        for o, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            o.square().sum().backward()
        worst = max(worst, error(outputs[1], outputs[0]), error(inputs[1].grad, inputs[0].grad))
        for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert x.placements == x.grad.placements, name
            worst = max(worst, error(whole(x.grad), y.grad))
        for optimizer in optimizers:
            optimizer.step()
    return max(worst, *(error(whole(x), y) for x, y in zip(model.parameters(), expected.parameters(), strict=True)))


def sequence_parallel() -> float:
    """Input and output split over tokens."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected, model = layer(), layer()
    parallelize_module(model, mesh, KimiDeltaAttentionParallel(input_layouts=Shard(1), output_layouts=Shard(1)))
    x = tokens().requires_grad_()
    part = tokens().chunk(mesh.size(), 1)[mesh.get_local_rank()].clone().requires_grad_()
    o, mine = expected(x)[0], model(part)[0]
    (o.square().sum()).backward()
    (mine.square().sum()).backward()
    rank = mesh.get_local_rank()
    pairs = [(mine, o.chunk(mesh.size(), 1)[rank]), (part.grad, x.grad.chunk(mesh.size(), 1)[rank])]
    pairs += [(whole(a.grad), b.grad) for a, b in zip(model.parameters(), expected.parameters(), strict=True)]
    return max(error(a, b) for a, b in pairs)


def with_fully_shard() -> float:
    """Data parallel on the other dimension of the mesh."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    expected, model = layer(), layer()
    parallelize_module(model, mesh["tp"], tensor_parallel_plan())
    fully_shard(model, mesh=mesh["dp"])
    inputs = [tokens(seed) for seed in range(mesh["dp"].size())]
    model(inputs[mesh["dp"].get_local_rank()])[0].square().sum().backward()
    (sum(expected(x)[0].square().sum() for x in inputs) / len(inputs)).backward()
    return max(error(whole(a.grad), b.grad) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@torch.no_grad()
def with_a_static_cache(sharded: bool, **changes: Any) -> float:
    """The worst difference of outputs and of this rank's states, of a prompt and three steps."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    expected, model = layer(**changes, layer_idx=0), layer(**changes, layer_idx=0)
    parallelize_module(model, mesh["tp"], tensor_parallel_plan())
    if sharded:
        fully_shard(model, mesh=mesh["dp"])
    caches, x = (StaticCache(expected, 2), StaticCache(model, 2)), tokens()
    worst = 0.0
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
        whole_o, o = (
            m(x[:, start:end], past_key_values=cache, use_cache=True)[0]
            for m, cache in zip((expected, model), caches, strict=True)
        )
        worst = max(worst, error(o, whole_o))
    rank = mesh["tp"].get_local_rank()
    for all_heads, mine in zip(*([*cache._tensors()][1:] for cache in caches), strict=True):
        worst = max(worst, error(mine, all_heads.chunk(2, 1)[rank]))
    return worst


def compiled() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = layer()
    parallelize_module(model, mesh, tensor_parallel_plan())
    eager, traced = tokens().requires_grad_(), tokens().requires_grad_()
    model(eager)[0].square().sum().backward()
    torch.compile(model, fullgraph=True, backend="aot_eager")(traced)[0].square().sum().backward()
    torch._dynamo.reset()
    return error(traced.grad, eager.grad)


def uneven() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError) as raised:
        parallelize_module(layer(num_heads=3, num_v_heads=3), mesh, tensor_parallel_plan())
    return str(raised.value)


@pytest.mark.parametrize("changes", [{}, {"conv_bias": True, "lower_bound": -5.0}, {"use_short_conv": False}], ids=str)
def test_a_split_layer_trains_as_the_whole_one(world: World, changes: dict[str, Any]) -> None:
    assert max(world.run(split, **changes)) < 1e-9


def test_input_and_output_may_be_slices_of_the_tokens(world: World) -> None:
    assert max(world.run(sequence_parallel)) < 1e-11


def test_it_composes_with_fully_shard(world: World) -> None:
    assert max(world.run(with_fully_shard)) < 1e-11


@pytest.mark.parametrize("changes", [{}, {"use_short_conv": False}], ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_static_cache_holds_the_heads_of_the_rank(world: World, sharded: bool, changes: dict[str, Any]) -> None:
    assert max(world.run(with_a_static_cache, sharded=sharded, **changes)) < 1e-11


@pytest.mark.parametrize("world", [2], indirect=True, ids="{} ranks".format)
def test_a_split_layer_compiles_to_one_graph(world: World) -> None:
    assert max(world.run(compiled)) < 1e-11


def test_heads_that_do_not_split_are_rejected(world: World) -> None:
    text = f"num_heads must be a multiple of the {world.size} ranks of the mesh, got 3"
    assert world.run(uneven) == [text] * world.size
