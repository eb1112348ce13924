"""Plain eager calls go past the dispatcher, and nobody can tell but by the time they take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Call, make_call, paged, requiring_grad
from torch import Tensor
from torch.autograd.forward_ad import dual_level
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import flashkda_ops
from flashkda_ops.integrations import flash_kda
from flashkda_ops.ops import chunk_kda, chunk_kda_backward, chunk_kda_paged, recurrent_kda_paged

Outputs = tuple[Tensor, ...]


def forward(call: Call) -> Outputs:
    o, state = flashkda_ops.chunk_kda(**call, output_final_state=True)
    return o, state


def training(call: Call) -> Outputs:
    call = requiring_grad(call)
    o, state = forward(call)
    (o.square().sum() + state.sum()).backward()
    return o, state, *(x.grad for x in call.values() if isinstance(x, Tensor))


def pool_of(call: Call) -> tuple[Call, Tensor]:
    pool = torch.linspace(-1, 1, 5 * 4 * 16 * 8, device=call["q"].device).view(5, 4, 16, 8)
    return paged(call, pool, torch.tensor([3, 1], device=call["q"].device)), pool


def prefill(call: Call) -> Outputs:
    call, pool = pool_of(call)
    return flashkda_ops.chunk_kda_paged(**call), pool


def decode(call: Call) -> Outputs:
    call, pool = pool_of(call)
    return flashkda_ops.recurrent_kda_paged(**call), pool


def recurrent(call: Call) -> Outputs:
    o, state = flashkda_ops.recurrent_kda(**call, output_final_state=True)
    return o, state


def drop_in(call: Call) -> Outputs:
    out, state = torch.empty_like(call["v"]), torch.empty(2, 4, 8, 16)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
    flash_kda.fwd(**{name: call[name] for name in names}, scale=0.25, out=out, final_state=state)
    return out, state


OPS: dict[Callable[[Call], Outputs], list[ModuleType]] = {
    forward: [chunk_kda],
    training: [chunk_kda, chunk_kda_backward],
    prefill: [chunk_kda_paged],
    decode: [recurrent_kda_paged],
    recurrent: [recurrent_kda_paged],
    drop_in: [flash_kda],
}


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[ModuleType]:
    """The modules whose ops are called through the dispatcher, as they are."""
    called = []
    for module in (chunk_kda, chunk_kda_backward, chunk_kda_paged, recurrent_kda_paged, flash_kda):

        def record(*args: Any, module: ModuleType = module, op: Any = module.op) -> Any:
            called.append(module)
            return op(*args)

        monkeypatch.setattr(module, "op", record)
    return called


def case(**options: Any) -> Call:
    return make_call(9, B=2, **options)


class Ignored(TorchDispatchMode):
    """Sees every op, changes none."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


class IgnoredFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def assert_same(actual: Outputs, expected: Outputs) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
        assert (x.requires_grad, x.is_inference(), x.stride()) == (y.requires_grad, y.is_inference(), y.stride())


@pytest.mark.parametrize(
    ("function", "context"),
    [(training, nullcontext)]
    + [(f, c) for f in OPS if f is not training for c in (nullcontext, torch.no_grad, torch.inference_mode)],
)
def test_a_plain_call_has_the_bits_of_the_op_without_the_dispatcher(
    function: Callable[[Call], Outputs],
    context: Callable[[], AbstractContextManager[None]],
    dispatched: list[ModuleType],
) -> None:
    with context():
        direct = function(case())
        assert not dispatched
        with Ignored():
            through_the_op = function(case())
    assert dispatched == OPS[function]
    assert_same(direct, through_the_op)


@pytest.mark.parametrize("function", OPS)
@pytest.mark.parametrize(
    "watcher",
    [Ignored, lambda: profile(activities=[ProfilerActivity.CPU]), dual_level],
    ids=["dispatch mode", "profiler", "forward mode"],
)
def test_whoever_watches_ops_sees_them(
    watcher: Callable[[], AbstractContextManager[Any]],
    function: Callable[[Call], Outputs],
    dispatched: list[ModuleType],
) -> None:
    with watcher():
        function(case())
    assert dispatched == OPS[function]


@pytest.mark.parametrize("function", OPS)
def test_function_modes_see_the_ops_too(function: Callable[[Call], Outputs], dispatched: list[ModuleType]) -> None:
    with IgnoredFunctions():
        function(case())
    assert dispatched[:1] == OPS[function][:1]  # none is active inside of Tensor.backward, which one sees as a whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_is_the_op() -> None:
    call = case()
    traced = torch.jit.trace(lambda q: flashkda_ops.chunk_kda(**{**call, "q": q})[0], call["q"])
    assert "flashkda::chunk_kda" in str(traced.graph)


class Subclass(Tensor):
    pass


def left_behind(v: Tensor) -> Tensor:
    """v, in what ``torch.func.grad`` wraps its argument in."""
    wrapped = []
    torch.func.grad(lambda x: (wrapped.append(x), x.sum())[1])(v)
    return wrapped[0]


def training_of_q(call: Call) -> Outputs:
    call = requiring_grad(call, ("q",))
    forward(call)[0].square().sum().backward()
    return (call["q"].grad,)


@pytest.mark.parametrize(
    ("function", "op"), [(forward, chunk_kda), (training_of_q, chunk_kda), (decode, recurrent_kda_paged)]
)
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.as_subclass(Subclass),
        lambda v: torch.complex(torch.zeros_like(v), -v).conj().imag,  # v, its sign still to be changed
        left_behind,
    ],
    ids=["a subclass", "lazily negated", "left behind by a transform"],
)
def test_a_tensor_that_is_more_than_its_storage_goes_to_the_op(
    change: Callable[[Tensor], Tensor],
    function: Callable[[Call], Outputs],
    op: ModuleType,
    dispatched: list[ModuleType],
) -> None:
    call = case()
    expected = function(call)
    changed = change(call["v"])
    assert torch.equal(changed, call["v"])
    actual = function({**call, "v": changed})
    assert dispatched[0] is op
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("function", [forward, decode])
def test_a_meta_call_goes_to_the_fake(function: Callable[[Call], Outputs], dispatched: list[ModuleType]) -> None:
    outputs = function(make_call(9, B=2, device="meta"))
    assert dispatched == OPS[function]
    assert all(x.is_meta for x in outputs)


@pytest.mark.parametrize("function", [forward, training])
def test_autocast_needs_no_dispatcher_either(function: Callable[[Call], Outputs], dispatched: list[ModuleType]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        actual = function(case())
        assert chunk_kda not in dispatched
        with Ignored():
            assert_same(actual, function(case()))


def test_autocast_of_another_device_changes_nothing(dispatched: list[ModuleType]) -> None:
    expected = training(case())
    torch.set_autocast_enabled("xpu", True)
    try:
        actual = training(case())
    finally:
        torch.set_autocast_enabled("xpu", False)
    assert chunk_kda not in dispatched
    assert_same(actual, expected)


@pytest.mark.parametrize("function", [flashkda_ops.chunk_kda_paged, flashkda_ops.recurrent_kda_paged])
def test_a_pool_that_autograd_has_saved_must_not_change(function: Callable[..., Tensor]) -> None:
    call, pool = pool_of(case())
    scale = torch.ones((), requires_grad=True)
    loss = (pool * scale).sum()
    version = pool._version
    function(**call)
    assert pool._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_cotangent_reaches_the_backward_pass_in_the_dtype_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    run = chunk_kda_backward.run
    monkeypatch.setattr(chunk_kda_backward, "run", lambda a: (given.append(a.do), run(a))[1])
    call = requiring_grad(case(dtype=torch.bfloat16))
    o, _ = flashkda_ops.chunk_kda(**call)
    o.register_hook(lambda grad: grad * 2)
    torch.autograd.backward(o, torch.ones(o.shape, dtype=torch.float64))
    assert [x.dtype for x in given] == [torch.bfloat16] and given[0].shape == o.shape


def test_a_number_is_a_number_whatever_its_type() -> None:
    call = case()
    expected = flashkda_ops.chunk_kda(**{**call, "scale": 2.0, "lower_bound": -4.0})[0]
    for number in (int, torch.tensor):
        assert torch.equal(
            flashkda_ops.chunk_kda(**{**call, "scale": number(2), "lower_bound": number(-4)})[0], expected
        )
