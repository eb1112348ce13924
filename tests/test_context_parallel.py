"""Context parallel gives what one process gives, wherever the sequences lie over the ranks."""

from __future__ import annotations

import datetime
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from helpers import (
    DIFFERENTIABLE,
    TOKENS,
    Call,
    error,
    graph_of,
    kernel_call,
    make_call,
    random_cu_seqlens,
    requiring_grad,
)
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from world import World

from flashkda_ops import chunk_kda, segments, validation
from flashkda_ops.distributed import context_parallel_chunk_kda, context_parallel_halo

EXACT, ROUNDING = (torch.float64, 1e-11), (torch.float32, 1e-5)


@pytest.fixture(scope="module", params=[1, 2, 4, 8], ids="{} ranks".format)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.close()


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[World]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    world = World(2, "nccl")
    yield world
    world.close()


# ---------------------------------------------------------------------------------------------------------------------
# On each rank
# ---------------------------------------------------------------------------------------------------------------------


def part(call: Call, start: int, end: int, rows: int | None = None) -> Call:
    """The tokens from ``start`` to ``end``, followed by rubbish up to ``rows``."""
    local = {**call}
    for name in TOKENS:
        x = call[name][:, start:end]
        padding = x.new_full((x.shape[0], (rows or x.shape[1]) - x.shape[1], *x.shape[2:]), torch.nan)
        local[name] = torch.cat((x, padding), 1)
    return local


def differences(call: Call, offsets: list[int], mesh: Any, rows: int | None = None, **options: Any) -> float:
    """The worst error on this rank of outputs, final states and gradients, against one process.

    ``rows`` is the capacity of each rank; without it ranks have as many rows as tokens.
    """
    rank = dist.get_rank()
    whole = requiring_grad(call)
    expected = chunk_kda(**whole, output_final_state=True)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in expected]
    torch.autograd.backward(expected, cotangents)

    start, end = offsets[rank : rank + 2]
    local = requiring_grad(part(call, start, end, rows))
    o, state = context_parallel_chunk_kda(**local, **options, mesh=mesh, output_final_state=True)
    do = part({name: cotangents[0] for name in TOKENS}, start, end, rows)["q"]
    torch.autograd.backward([o, state], [do, cotangents[1]])

    worst = 0.0

    def compare(actual: Tensor, wanted: Tensor) -> None:
        nonlocal worst
        if wanted.any() or actual.any():
            difference = error(actual, wanted) if wanted.any() else torch.inf
            assert difference >= 0  # a number
            worst = max(worst, difference)

    def summed(x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    compare(o[:, : end - start], expected[0][:, start:end])
    compare(summed(state), expected[1])
    for name in DIFFERENTIABLE:
        if name in TOKENS:
            compare(local[name].grad[:, : end - start], whole[name].grad[:, start:end])
            assert not local[name].grad[:, end - start :].any()
        elif name in call:
            compare(summed(local[name].grad), whole[name].grad)
    assert not o[:, end - start :].any()
    return worst


def even(T: int) -> list[int]:
    size = dist.get_world_size()
    return [rank * (T // size) for rank in range(size + 1)]


def dense(dtype: torch.dtype, **options: Any) -> float:
    call = make_call(48, B=2, initial_state=True, dtype=dtype, **options)
    return differences(call, even(48), dist.group.WORLD)


def dense_uneven(dtype: torch.dtype) -> float:
    """Ranks of any number of tokens, two of them of none where there are enough."""
    size = dist.get_world_size()
    cuts = sorted(random.Random(3).choices(range(70), k=max(0, size - 3)))
    offsets = [0, *cuts, *[70] * (size - len(cuts))]
    call = make_call(70, B=2, dtype=dtype, initial_state=True)
    return differences(call, offsets, dist.group.WORLD)


def packed(bounds: list[int], dtype: torch.dtype, **options: Any) -> float:
    call = make_call(80, cu_seqlens=bounds, dtype=dtype, **options)
    return differences(call, even(80), dist.group.WORLD)


def random_slices(seed: int, dtype: torch.dtype) -> float:
    """Sequences and ranks that begin anywhere: empty ones of both, and padding behind both."""
    choose, size = random.Random(seed), dist.get_world_size()
    T, N = 90, choose.choice([1, 3, 9])
    bounds = [0, *sorted(choose.choices(range(T + 1), k=N))]
    offsets = [0, *sorted(choose.choices(range(T + 1), k=size - 1)), T]
    rows = max(b - a for a, b in pairwise(offsets)) + choose.choice([0, 3])
    call = make_call(
        T, cu_seqlens=bounds, dtype=dtype, initial_state=choose.random() < 0.5, state_v_first=choose.random() < 0.5
    )
    return differences(call, offsets, dist.group.WORLD, rows, rank_offsets=torch.tensor(offsets, dtype=torch.int32))


def over_two_dimensions(dtype: torch.dtype, **options: Any) -> float:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2))
    call = make_call(48, initial_state=True, dtype=dtype, **options)
    return differences(call, even(48), mesh)


def in_segments(n: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function where a rank's tokens are cut in so many segments, however few they are."""
    original = segments.count
    segments.count = lambda heads, T, *, packed: n
    try:
        return function(*args, **kwargs)
    finally:
        segments.count = original


def layouts(name: str, dtype: torch.dtype, **options: Any) -> float:
    T = 48 * dist.get_world_size()
    chosen: dict[str, Any] = {
        "one row": {"B": 1},
        "rows": {"B": 2},
        "one sequence": {"cu_seqlens": [0, T]},
        "sequences": {"cu_seqlens": [0, 5, T // 2 + 7, T // 2 + 30, T - 2]},
        # with 3 segments of 16 tokens: a start and an end between two of them, with empty sequences there
        "sequences where segments meet": {"cu_seqlens": [0, 16, 16, 32, T // 2 + 16, T // 2 + 16, T - 16]},
    }
    call = make_call(T, initial_state=True, dtype=dtype, **chosen[name], **options)
    return differences(call, even(T), dist.group.WORLD)


def rows_apart(dtype: torch.dtype) -> float:
    """Rows of tokens that do not lie behind each other."""
    size = dist.get_world_size()
    call = make_call(10 * size, B=3, dtype=dtype, initial_state=True)
    return differences(call, even(10 * size), dist.group.WORLD, rows=10)


def under_autocast() -> float:
    """As in bf16 without it, gates and maps in fp32."""
    T = 12 * dist.get_world_size()
    call, start = make_call(T), 12 * dist.get_rank()
    local = part(call, start, start + 12)
    leaves = requiring_grad(local), requiring_grad({**local, **{name: local[name].bfloat16() for name in "qkv"}})
    with torch.autocast("cpu", torch.bfloat16):
        outputs = context_parallel_chunk_kda(**leaves[0], mesh=dist.group.WORLD, output_final_state=True)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    expected = context_parallel_chunk_kda(**leaves[1], mesh=dist.group.WORLD, output_final_state=True)
    torch.autograd.backward(expected, [torch.ones_like(x) for x in expected])
    assert outputs[0].dtype == torch.bfloat16 and outputs[1].dtype == torch.float32
    grads = ((leaves[0][name].grad, leaves[1][name].grad.to(leaves[0][name])) for name in (*TOKENS, "A_log"))
    return max(error(x, y) for x, y in (*zip(outputs, expected, strict=True), *grads))


def within_ranks() -> bool:
    """Whether a sequence that a rank holds alone has the bits it has by itself."""
    size, rank = dist.get_world_size(), dist.get_rank()
    bounds = [bound for r in range(size) for bound in (40 * r + 5, 40 * r + 35)]
    call = part(make_call(40 * size, cu_seqlens=[0, *bounds, 40 * size]), 40 * rank, 40 * rank + 40)
    o, _ = context_parallel_chunk_kda(**call, mesh=dist.group.WORLD, batch_invariant=True)
    alone = part({name: x for name, x in call.items() if name != "cu_seqlens"}, 5, 35)
    return torch.equal(o[:, 5:35], chunk_kda(**alone, batch_invariant=True)[0])


def compiled(**options: Any) -> float:
    """The difference that one graph for two calls, forward and backward, makes."""
    size, mesh = dist.get_world_size(), init_device_mesh("cpu", (dist.get_world_size(),))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(call: Call) -> Tensor:
        o, state = context_parallel_chunk_kda(**call, mesh=mesh, output_final_state=True)
        return o.sum() + state.square().sum()

    compiled_step = torch.compile(step, fullgraph=True, backend=counter)
    worst = 0.0
    for seed in range(2):
        call = make_call(40 * size, initial_state=True, seed=seed, **options)
        if seed == 1 and "cu_seqlens" in call:
            call["cu_seqlens"] = call["cu_seqlens"] // 2
        start = 40 * dist.get_rank()
        eager, traced = (requiring_grad(part(call, start, start + 40)) for _ in range(2))
        step(eager).backward()
        compiled_step(traced).backward()
        worst = max(worst, *(error(traced[name].grad, eager[name].grad) for name in DIFFERENTIABLE))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    return worst


def halo() -> float:
    size, rank = dist.get_world_size(), dist.get_rank()
    row = torch.arange(2.0 * 5 * size * 3).view(2, 5 * size, 3)
    x = row[:, 5 * rank : 5 * rank + 5].clone().requires_grad_()
    before = context_parallel_halo(x, 2, dist.group.WORLD)
    expected = row[:, 5 * rank - 2 : 5 * rank] if rank else torch.zeros(2, 2, 3)
    assert torch.equal(before, expected)
    before.backward(torch.full_like(before, 1.0 + rank))
    expected = torch.zeros_like(x)
    if rank < size - 1:
        expected[:, 3:] = 2.0 + rank
    return error(x.grad, expected)


def on_gpus(options: dict[str, Any]) -> float:
    call = kernel_call(2 * 4096, **options)
    assert segments.count(call["v"].shape[0] * 4, 4096, packed=call.get("cu_seqlens") is not None) == 4
    return differences(call, even(2 * 4096), dist.group.WORLD)


def replayed() -> list[float]:
    """What replays of a captured step, forward and backward, with other sequences differ by from eager steps."""
    T, rank, generator = 4096, dist.get_rank(), torch.Generator().manual_seed(0)
    whole = kernel_call(2 * T, cu_seqlens=[0] * 5 + [2 * T], state_v_first=True)
    local = requiring_grad(part(whole, 0, T))
    offsets = torch.tensor([0, T, 2 * T], device="cuda")
    leaves = [local[name] for name in DIFFERENTIABLE]
    do, dht = torch.randn_like(local["v"]), torch.randn_like(local["initial_state"])

    def step() -> list[Tensor]:
        outputs = context_parallel_chunk_kda(
            **local, mesh=dist.group.WORLD, rank_offsets=offsets, output_final_state=True
        )
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, (do, dht))]

    graph, results = graph_of(step)
    worst = []
    for _ in range(5):
        border = int(torch.randint(1, T, (), generator=generator))
        offsets.copy_(torch.tensor([0, border, border + T]))
        local["cu_seqlens"].copy_(random_cu_seqlens(border + T, 5, generator))
        start, end = (0, border) if rank == 0 else (border, border + T)
        with torch.no_grad():
            for name in TOKENS:
                local[name][:, : end - start].copy_(whole[name][:, start:end])
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        worst += [error(x, y) if y.any() else float(x.abs().amax()) for x, y in zip(results, step(), strict=True)]
    return worst


class Exchanged(TorchDispatchMode):
    """The bytes that this rank gives to each all-gather."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.bytes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def exchanged(**options: Any) -> list[int]:
    call = requiring_grad(make_call(16, H=2, HV=4, K=16, V=8, **options))
    with Exchanged() as exchanged:
        o, _ = context_parallel_chunk_kda(**call, mesh=dist.group.WORLD, check_ranks=False)
        o.sum().backward()
    return exchanged.bytes


def message_of(call: Call, mesh: Any = None, **options: Any) -> str | None:
    """What this rank's call raises."""
    try:
        context_parallel_chunk_kda(**{**call, **options}, mesh=mesh or dist.group.WORLD)
    except ValueError as e:
        return str(e)
    return None


def on_last_rank(
    changes: dict[str, Any], options: dict[str, Any] | None = None, base: dict[str, Any] | None = None
) -> str | None:
    """The last rank makes its call by other arguments of ``make_call``, or with other options."""
    arguments = {"T": 16, **(base or {"B": 2})}
    if dist.get_rank() < dist.get_world_size() - 1:
        return message_of(make_call(**arguments))
    return message_of(make_call(**arguments | changes), **(options or {}))


def error_of(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def wrongly_on_last_rank(change: str) -> str | None:
    """The last rank makes a call that ends in all kinds of errors; what each rank raises."""
    call: Call = make_call(16, **{"cu_seqlens": [0, 5, 30]} if change == "a list of offsets" else {"B": 2})

    def function(**changes: Any) -> None:
        context_parallel_chunk_kda(**{**call, **changes}, mesh=dist.group.WORLD)

    if dist.get_rank() < dist.get_world_size() - 1:
        return error_of(function)
    if change == "a tangent":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(call["v"], torch.ones_like(call["v"]))
            return error_of(lambda: function(v=dual))
    if change == "torch.func":
        return error_of(lambda: torch.func.vmap(lambda v: function(v=v))(torch.stack([call["v"]] * 2)))
    changes: dict[str, dict[str, Any]] = {
        "a list": {"cu_seqlens": [0, 16]},
        "a list of offsets": {"rank_offsets": [0, 16, 32]},
        "no tokens": {"q": None},
        "an array": {"k": call["k"].numpy()},
        "a text": {"scale": "1.0"},
        "a scale to learn": {"scale": torch.ones((), requires_grad=True)},
        "a shape": {"v": call["v"][:, 1:]},
    }
    return error_of(lambda: function(**changes[change]))


def badly_without_check_of_ranks() -> str | None:
    lower_bound = 3.0 if dist.get_rank() == dist.get_world_size() - 1 else -5.0
    return message_of(make_call(16), lower_bound=lower_bound, check_ranks=False, validate=True)


def with_checked_values_on_one_rank() -> str | None:
    validation.CHECK_VALUES = dist.get_rank() == 0
    try:
        return message_of(make_call(16, cu_seqlens=[0, 16]))
    finally:
        validation.CHECK_VALUES = False


def halo_on_last_rank(change: str) -> str | None:
    x, size = torch.zeros(2, 5, 3), 2
    if dist.get_rank() == dist.get_world_size() - 1:
        x, size = {
            "length": (torch.zeros(2, 9, 3), 2),
            "width": (torch.zeros(2, 5, 4), 2),
            "dimensions": (torch.zeros(2, 5), 2),
            "dtype": (x.double(), 2),
            "size": (x, 3),
            "gradient": (x.requires_grad_(), 2),
            "too few tokens": (x[:, :1], 2),
            "no tensor": (x.tolist(), 2),
            "no number": (x, "2"),
        }[change]
    return error_of(lambda: context_parallel_halo(x, size, dist.group.WORLD))


NAN_BOUNDS = [0, 5, 9, 16, 40, 44, 48]  # of 12 tokens a rank on 4: the fourth sequence begins on rank 1 and ends on 3


def beside_nan(sequence: int, mesh_shape: tuple[int, ...], **options: Any) -> list[str]:
    """What of the other sequences' outputs, final states and gradients on this rank is not that of a clean run, and
    where a NaN or an infinity was put into the sequence."""
    start, rank, mesh = NAN_BOUNDS[sequence], dist.get_rank(), init_device_mesh("cpu", mesh_shape)
    whole = make_call(48, cu_seqlens=NAN_BOUNDS, initial_state=True, **options)
    generator = torch.Generator().manual_seed(2)
    for name, like in (("do", "v"), ("dht", "initial_state")):
        whole[name] = torch.randn(whole[like].shape, generator=generator)

    def results(call: Call) -> dict[str, Tensor]:
        call = {name: x[:, 12 * rank : 12 * rank + 12] if name in (*TOKENS, "do") else x for name, x in call.items()}
        do, dht = call.pop("do"), call.pop("dht")
        call = requiring_grad(call)
        outputs = context_parallel_chunk_kda(**call, mesh=mesh, output_final_state=True)
        torch.autograd.backward(outputs, [do, dht])
        grads = {f"gradient of {name}": call[name].grad for name in (*TOKENS, "initial_state")}
        return {"o": outputs[0].detach(), "final state": outputs[1].detach(), **grads}

    at = torch.arange(12 * rank, 12 * rank + 12)
    tokens = (at < start) | (at >= NAN_BOUNDS[sequence + 1])
    sequences = torch.arange(len(NAN_BOUNDS) - 1) != sequence
    clean, differing = results(whole), []
    assert all(x.isfinite().all() for x in clean.values())
    for place in (*TOKENS, "initial_state", "do", "dht"):
        for value in (torch.nan, torch.inf):
            bad = {**whole, place: whole[place].clone()}
            if place in ("initial_state", "dht"):
                bad[place][sequence] = value
            else:
                bad[place][0, start + 1 : start + 3] = value
            for name, x in results(bad).items():
                kept = (sequences,) if name in ("final state", "gradient of initial_state") else (slice(None), tokens)
                if not torch.equal(x[kept], clean[name][kept]):
                    differing.append(f"{name} for a {value} in {place}")
    return differing


def changed_in_place(**options: Any) -> float:
    """What a change of the outputs in place does to the gradients, beside a change in new tensors."""
    gradients = []
    for in_place in (False, True):
        call = requiring_grad(part(make_call(24, initial_state=True, **options), *even(24)[dist.get_rank() :][:2]))
        outputs = context_parallel_chunk_kda(**call, mesh=dist.group.WORLD, output_final_state=True)
        outputs = [x.mul_(2) if in_place else x * 2 for x in outputs]
        sum(x.square().sum() for x in outputs).backward()
        gradients.append([call[name].grad for name in DIFFERENTIABLE])
    return max(error(x, y) for x, y in zip(*gradients, strict=True))


def with_another_mesh() -> str | None:
    """A mesh of the same group whose ranks are in another order."""
    ranks = list(range(dist.get_world_size()))
    reverse = dist.get_rank() == 0
    mesh = init_device_mesh("cpu", (len(ranks),))
    other = torch.distributed.device_mesh.DeviceMesh("cpu", ranks[::-1], _init_backend=False)
    other._dim_group_names = mesh._dim_group_names
    return message_of(make_call(16), other if reverse else mesh)


def with_gradients_on_one_rank() -> str | None:
    call = make_call(16)
    return message_of(requiring_grad(call) if dist.get_rank() == 0 else call)


def with_values(cu_seqlens: list[list[int]], rank_offsets: list[int] | None = None) -> str | None:
    call = make_call(16, cu_seqlens=cu_seqlens[min(dist.get_rank(), len(cu_seqlens) - 1)])
    offsets = None if rank_offsets is None else torch.tensor(rank_offsets)
    return message_of(call, rank_offsets=offsets, validate=True)


def dying(rank: int) -> str:
    if dist.get_rank() == rank:
        os._exit(1)
    try:
        context_parallel_chunk_kda(**make_call(16), mesh=dist.group.WORLD)
    except RuntimeError as e:
        return type(e).__name__ + ": " + str(e)
    return "nothing raised"


def hanging(seconds: float) -> str:
    """The last rank never comes; the others wait for it in a group of that timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds), backend="gloo")
    if dist.get_rank() == dist.get_world_size() - 1:
        return "absent"
    try:
        context_parallel_chunk_kda(**make_call(16), mesh=group)
    except RuntimeError as e:
        return str(e)
    return "nothing raised"


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"state_v_first": True}, {"gate": "unbounded"}, {"gate": "precomputed", "beta": "raw", "l2norm": False}],
    ids=str,
)
def test_dense_rows_over_ranks(world: World, options: dict[str, Any]) -> None:
    assert max(world.run(dense, torch.float64, **options)) < 1e-11


@pytest.mark.parametrize(("dtype", "tolerance"), [EXACT, ROUNDING], ids=str)
def test_dense_rows_over_ranks_of_any_number_of_tokens(world: World, dtype: torch.dtype, tolerance: float) -> None:
    assert max(world.run(dense_uneven, dtype)) < tolerance


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 80],  # more ranks than sequences
        [0, 10, 20, 40, 80],  # sequences that start where ranks do
        [0, 1, 1, 1, 33, 50, 50, 79, 80, 80],
        [0, 5, 5, 11],  # most ranks hold padding alone
        [0, 0, 0],  # no token at all
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"initial_state": True, "state_v_first": True}], ids=str)
def test_packed_sequences_start_end_and_span_ranks_anywhere(
    world: World, bounds: list[int], options: dict[str, Any]
) -> None:
    assert max(world.run(packed, bounds, torch.float64, **options)) < 1e-11


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_over_random_slices(world: World, seed: int) -> None:
    assert max(world.run(random_slices, seed, torch.float64)) < 1e-11


@pytest.mark.parametrize("layout", ["one row", "rows", "one sequence", "sequences", "sequences where segments meet"])
@pytest.mark.parametrize(
    ("segments", "options"), [(3, {}), (8, {"state_v_first": True, "gate": "precomputed"})], ids=str
)
def test_segments_of_a_rank_change_nothing(world: World, segments: int, layout: str, options: dict[str, Any]) -> None:
    assert max(world.run(in_segments, segments, layouts, layout, torch.float64, **options)) < 1e-11


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_over_random_slices_in_segments(world: World, seed: int) -> None:
    assert max(world.run(in_segments, 2 + seed, random_slices, 5 + seed, torch.float64)) < 1e-11


def test_segments_of_ranks_of_any_number_of_tokens(world: World) -> None:
    assert max(world.run(in_segments, 4, dense_uneven, torch.float64)) < 1e-11


def test_rows_that_do_not_lie_behind_each_other_are_cut_too(two: World) -> None:
    assert max(two.run(in_segments, 3, rows_apart, torch.float64)) < 1e-11


def test_segments_fill_a_gpu_once_and_are_not_short() -> None:
    def n(heads: int, T: int, packed: bool) -> int:
        return segments.count(heads, T, packed=packed)

    assert [n(16, T, True) for T in (0, 2047, 2048, 8192, 65536, 1 << 30)] == [1, 1, 2, 8, 8, 8]
    assert [n(heads, 1 << 20, True) for heads in (1, 12, 66, 67, 500)] == [132, 11, 2, 1, 1]
    # Of dense rows, in blocks of halves.
    assert [n(16, T, False) for T in (0, 2047, 2048, 8192, 65536, 1 << 30)] == [1, 1, 2, 4, 4, 4]
    assert [n(heads, 1 << 20, False) for heads in (1, 12, 33, 34, 500)] == [66, 5, 2, 1, 1]


def test_other_dtypes_differ_by_their_rounding(world: World) -> None:
    for dtype, tolerance in (ROUNDING, (torch.bfloat16, 2e-3)):
        assert max(world.run(dense, dtype)) < tolerance
        assert max(world.run(packed, [0, 7, 30, 77], dtype)) < tolerance
        assert max(world.run(in_segments, 3, packed, [0, 7, 30, 77], dtype)) < tolerance


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("options", [{}, {"B": 2}, {"cu_seqlens": [0, 3, 20, 24]}], ids=str)
def test_outputs_may_be_changed_in_place(two: World, options: dict[str, Any], segments: int) -> None:
    assert max(two.run(in_segments, segments, changed_in_place, **options)) == 0


def test_autocast_leaves_the_maps_in_fp32(two: World) -> None:
    assert max(two.run(under_autocast)) == 0


def test_with_batch_invariance_only_ranks_cut_sequences(two: World) -> None:
    assert all(two.run(in_segments, 3, within_ranks))


@pytest.mark.parametrize("options", [{"B": 2}, {"cu_seqlens": [0, 3, 45, 48]}], ids=str)
def test_a_mesh_of_two_dimensions_is_a_row_of_ranks(world: World, options: dict[str, Any]) -> None:
    if world.size == 1:
        return
    assert max(world.run(over_two_dimensions, torch.float64, **options)) < 1e-11
    assert max(world.run(in_segments, 3, over_two_dimensions, torch.float64, **options)) < 1e-11


@pytest.mark.parametrize(
    ("options", "maps"), [({"B": 3}, 3), ({"cu_seqlens": [0, 5, 9, 30, 32]}, 1)], ids=["dense rows", "packed sequences"]
)
def test_forward_and_backward_each_exchange_one_map_a_head(two: World, options: dict[str, Any], maps: int) -> None:
    expected = maps * 4 * (16 * 16 + 16 * 8) * 4  # maps, heads, numbers, bytes
    assert two.run(exchanged, **options) == [[expected, expected]] * 2
    assert two.run(in_segments, 3, exchanged, **options) == [[expected, expected]] * 2


def test_the_halo_is_the_end_of_the_rank_before(world: World) -> None:
    assert max(world.run(halo)) == 0


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("sequence", [0, 2, 3], ids=["within a rank", "over two ranks", "over three ranks"])
@pytest.mark.parametrize("segments", [1, 3], ids="{} segments".format)
def test_a_nan_stays_in_its_sequence(four: World, segments: int, sequence: int, mesh_shape: tuple[int, ...]) -> None:
    options = {"gate": "precomputed", "beta": "raw", "l2norm": False, "state_v_first": segments > 1}
    assert four.run(in_segments, segments, beside_nan, sequence, mesh_shape, **options) == [[]] * 4


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("options", [{"B": 1}, {"B": 3}, {"cu_seqlens": [0, 2, 50, 77]}], ids=str)
def test_it_compiles_to_one_graph_for_all_values(two: World, options: dict[str, Any], segments: int) -> None:
    assert max(two.run(in_segments, segments, compiled, **options)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"B": 2, "state_v_first": True}, {"cu_seqlens": [0, 1000, 2048, 6000, 8190]}], ids=str
)
def test_two_gpus_give_what_one_gives(two_gpus: World, options: dict[str, Any]) -> None:
    assert max(two_gpus.run(on_gpus, options)) < 1.2e-2


@pytest.mark.gpu
def test_a_captured_step_of_two_gpus_replays_with_other_sequences(two_gpus: World) -> None:
    for differences in two_gpus.run(replayed):
        assert all(difference < 1e-5 for difference in differences)


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({"H": 4}, {}, "size H must be the same on all ranks of the mesh, got by rank: [2, 4]"),
        ({"K": 8}, {}, "size K must be the same on all ranks of the mesh, got by rank: [16, 8]"),
        ({"B": 1}, {}, "size B must be the same on all ranks of the mesh, got by rank: [2, 1]"),
        (
            {"dtype": torch.float64},
            {},
            "dtype of q must be the same on all ranks of the mesh, got by rank: [torch.float32, torch.float64]",
        ),
        ({"initial_state": True}, {}, "dtype of initial_state must be the same on all ranks"),
        ({}, {"scale": 2.0}, "options must be the same on all ranks"),
        ({"B": 1, "cu_seqlens": [0, 16]}, {}, "dtype of cu_seqlens must be the same on all ranks"),
    ],
    ids=str,
)
def test_calls_that_do_not_go_together_raise_on_every_rank(
    two: World, changes: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    for message in two.run(on_last_rank, changes, options):
        assert message is not None and message.startswith(text)


def test_bad_arguments_of_one_rank_raise_on_every_rank(two: World) -> None:
    others, own = two.run(on_last_rank, {}, {"lower_bound": 3.0})
    assert own == "lower_bound must be in [-5, 0), got 3.0"
    assert others == "arguments must be valid on all ranks of the mesh, got an error on rank 1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("a list", "ValueError: cu_seqlens must be a Tensor or None, got list"),
        ("a list of offsets", "ValueError: rank_offsets must be a Tensor or None, got list"),
        ("no tokens", "ValueError: q must be a Tensor, got None"),
        ("an array", "ValueError: k must be a Tensor, got ndarray"),
        ("a text", "ValueError: scale must be a number or None, got str"),
        ("a scale to learn", "ValueError: scale and lower_bound must be numbers"),
        ("a shape", "ValueError: v must have shape"),
        ("a tangent", "NotImplementedError: context_parallel_chunk_kda has no forward-mode derivative"),
        ("torch.func", "RuntimeError: context_parallel_chunk_kda must not be under the transforms of torch.func"),
    ],
)
def test_whatever_one_rank_raises_all_ranks_raise(two: World, change: str, text: str) -> None:
    others, own = two.run(wrongly_on_last_rank, change)
    assert own is not None and own.startswith(text)
    assert others == "ValueError: arguments must be valid on all ranks of the mesh, got an error on rank 1"


def test_a_check_of_values_is_a_check_of_ranks_first(two: World) -> None:
    others, own = two.run(badly_without_check_of_ranks)
    assert own == "lower_bound must be in [-5, 0), got 3.0"
    assert others == "arguments must be valid on all ranks of the mesh, got an error on rank 1"


def test_values_that_are_checked_on_one_rank_alone_raise_on_every_rank(two: World) -> None:
    text = "check of values must be the same on all ranks of the mesh, got by rank: [1, 0]"
    assert two.run(with_checked_values_on_one_rank) == [text] * 2


@pytest.mark.parametrize("mesh", [None, "cp", 3])
def test_what_is_no_mesh_is_named(mesh: Any) -> None:
    text = f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}"
    with pytest.raises(ValueError, match=text):
        context_parallel_chunk_kda(**make_call(16), mesh=mesh)
    with pytest.raises(ValueError, match=text):
        context_parallel_halo(torch.zeros(2, 5, 3), 2, mesh)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ("length", (None, None)),
        ("width", ("size of dimension 2 of x must be the same on all ranks of the mesh, got by rank: [3, 4]",) * 2),
        (
            "dimensions",
            ("number of dimensions of x must be the same on all ranks of the mesh, got by rank: [3, 2]",) * 2,
        ),
        (
            "dtype",
            ("dtype of x must be the same on all ranks of the mesh, got by rank: [torch.float32, torch.float64]",) * 2,
        ),
        ("size", ("size must be the same on all ranks of the mesh, got by rank: [2, 3]",) * 2),
        ("gradient", ("need of gradients must be the same on all ranks of the mesh, got by rank: [0, 1]",) * 2),
        (
            "too few tokens",
            (
                "arguments must be valid on all ranks of the mesh, got an error on rank 1",
                "size must be in [1, T = 1], got 2",
            ),
        ),
        (
            "no tensor",
            (
                "arguments must be valid on all ranks of the mesh, got an error on rank 1",
                "x must be a Tensor, got list",
            ),
        ),
        (
            "no number",
            (
                "arguments must be valid on all ranks of the mesh, got an error on rank 1",
                "size must be an int, got str",
            ),
        ),
    ],
)
def test_halos_that_do_not_go_together_raise_on_every_rank(
    two: World, change: str, texts: tuple[str | None, str | None]
) -> None:
    assert two.run(halo_on_last_rank, change) == [None if text is None else f"ValueError: {text}" for text in texts]


def test_ranks_of_different_lengths_of_a_packed_row_need_offsets(two: World) -> None:
    text = "size T must be the same on all ranks of the mesh, got by rank: [16, 8]"
    assert two.run(on_last_rank, {"T": 8}, base={"B": 1, "cu_seqlens": [0, 20]}) == [text] * 2
    assert two.run(on_last_rank, {"T": 8}, base={"B": 2}) == [None] * 2


def test_different_meshes_raise_on_every_rank(two: World) -> None:
    for message in two.run(with_another_mesh):
        assert message is not None and message.startswith("mesh must be the same on all ranks")


def test_gradients_on_one_rank_alone_raise_on_every_rank(two: World) -> None:
    for message in two.run(with_gradients_on_one_rank):
        assert message is not None and message.startswith("need of gradients must be the same on all ranks")


@pytest.mark.parametrize(
    ("cu_seqlens", "rank_offsets", "text"),
    [
        (
            [[0, 5, 32], [0, 6, 32]],
            None,
            "cu_seqlens must be the same on all ranks, got [0, 5, 32] on rank 0 and [0, 6",
        ),
        ([[0, 5, 33]], None, "cu_seqlens must end at or before T = 32, got 33"),
        ([[0, 5, 4]], None, "cu_seqlens must never decrease, got 5 then 4"),
        ([[0, 5, 32]], [0, 3, 20], "rank_offsets must give rank 1 from 0 to T = 16 tokens, got 17"),
        ([[0, 5, 32]], [1, 3, 5], "rank_offsets must start at 0, got 1"),
    ],
    ids=str,
)
def test_checked_calls_reject_malformed_values_on_every_rank(
    two: World, cu_seqlens: list[list[int]], rank_offsets: list[int] | None, text: str
) -> None:
    for message in two.run(with_values, cu_seqlens, rank_offsets):
        assert message is not None and message.startswith(text)


def test_a_rank_that_hangs_surfaces_within_the_timeout(two: World) -> None:
    start = time.monotonic()
    message, _ = two.run(hanging, 1.0)
    assert "imed out" in message or "timeout" in message.lower(), message
    assert time.monotonic() - start < 10


def test_a_rank_that_dies_surfaces_as_an_error_of_torch() -> None:
    world = World(2)
    try:
        message, _ = world.run(dying, 1, lost=1)
        assert "closed by peer" in message or "reset by peer" in message, message
    finally:
        world.close()
