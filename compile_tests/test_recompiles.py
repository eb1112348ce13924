"""One compiled callable serves every T, N and cu_seqlens: once with ``mark_dynamic``, twice with ``dynamic=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Decoder, Layer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

# No size is equal to another in the first call, so that none are tied.
PACKED = [
    (37, [0, 5, 11, 11, 30]),
    (40, [0, 40, 40]),
    (64, [0, 1, 2, 3, 64]),
    (65, [0, 32, 33, 65]),
    (3, [0, 1, 3]),
    (130, [0, 0, 0, 100]),
    (33, [3, 30, 33]),
    (7, [0, 1, 2, 3, 4, 5, 6, 7]),
    (96, [0, 32, 64, 96]),
    (2, [0, 0, 2]),
]
DENSE = [(3, 37), (2, 40), (5, 64), (4, 65), (6, 3), (7, 130), (8, 33), (9, 7), (10, 96), (11, 2)]


def compiled(module: nn.Module, dynamic: bool | None = None) -> tuple[Callable[..., Tensor], Callable[[], int]]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic), lambda: counter.frame_count


def packed_inputs(T: int, bounds: list[int], *, mark: bool = False) -> tuple[Tensor, Tensor]:
    x, cu_seqlens = torch.randn(1, T, 12), torch.tensor(bounds, dtype=torch.int32)
    if mark:
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
    return x, cu_seqlens


def dense_inputs(B: int, T: int, *, mark: bool = False) -> tuple[Tensor]:
    x = torch.randn(B, T, 12)
    if mark:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
    return (x,)


def serve(layer: nn.Module, callable: Callable[..., Tensor], inputs: tuple[Any, ...], *, training: bool) -> None:
    actual, expected = callable(*inputs), layer(*inputs)
    assert torch.equal(actual, expected)
    if training:
        actual.sum().backward()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("make", "sizes"), [(packed_inputs, PACKED), (dense_inputs, DENSE)], ids=["packed", "dense"])
@pytest.mark.parametrize(("mark", "most"), [(True, 1), (False, 2)], ids=["mark_dynamic", "dynamic=True"])
def test_one_compiled_callable_serves_differing_sequence_counts_and_lengths(
    mark: bool, most: int, make: Callable[..., Any], sizes: list[Any], training: bool
) -> None:
    layer = Layer().requires_grad_(training)
    callable, count = compiled(layer, dynamic=None if mark else True)
    for size in sizes:
        serve(layer, callable, make(*size, mark=mark), training=training)
    assert count() <= most


@pytest.mark.parametrize(
    ("make", "one"), [(packed_inputs, (1, [0, 0, 1])), (packed_inputs, (20, [0, 20])), (dense_inputs, (1, 50))]
)
def test_a_size_of_one_costs_at_most_one_more(make: Callable[..., Any], one: tuple[Any, ...]) -> None:
    sizes = PACKED if make is packed_inputs else DENSE
    layer = Layer().requires_grad_(False)
    callable, count = compiled(layer)
    for size in sizes[:3]:
        serve(layer, callable, make(*size, mark=True), training=False)
    assert count() == 1
    for size in (one, sizes[3], one, *sizes[4:]):
        serve(layer, callable, make(*size), training=False)
    assert count() <= 2


def test_decoding_serves_any_batch_with_one_compilation() -> None:
    decoder = Decoder(rows=40).requires_grad_(False)
    callable, count = compiled(decoder)
    for N in (5, 2, 33, 7):
        x, slots = torch.randn(N, 1, 12), torch.randperm(40)[:N]
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(slots, 0)
        before = decoder.state_pool.clone()
        actual, pool = callable(x, slots), decoder.state_pool.clone()
        decoder.state_pool.copy_(before)
        assert torch.equal(actual, decoder(x, slots)) and torch.equal(pool, decoder.state_pool)
    assert count() == 1


def test_the_values_of_cu_seqlens_are_not_guarded() -> None:
    layer = Layer().requires_grad_(False)
    callable, count = compiled(layer, dynamic=False)
    for bounds in ([0, 3, 3, 40], [0, 0, 0, 0], [0, 10, 20, 30], [5, 6, 7, 8]):
        serve(layer, callable, packed_inputs(40, bounds), training=False)
    assert count() == 1
