"""``flash_kda.fwd`` by its signature gives what ``chunk_kda`` gives, and ``import flash_kda`` finds it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Call, make_call
from torch import Tensor

from flashkda_ops import chunk_kda, cuda
from flashkda_ops.integrations import flash_kda


@pytest.fixture(autouse=True)
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, "flash_kda", raising=False)
    yield
    flash_kda.uninstall()


def case(
    T: int = 70, K: int = 16, state: torch.dtype | None = torch.float32, **options: Any
) -> tuple[Call, tuple[Tensor, Tensor]]:
    """Arguments of ``fwd`` without its outputs, and what they should hold."""
    call = make_call(T, H=2, HV=2, K=K, V=K, initial_state=state is not None, state_v_first=True, **options)
    if state is not None:
        call["initial_state"] = call["initial_state"].to(state)
    rounded = call | ({"initial_state": call["initial_state"].float()} if state is not None else {})
    expected = chunk_kda(**rounded, output_final_state=True)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
    return {name: call[name] for name in names if name in call} | {"scale": K**-0.5}, expected


def test_the_signature_is_that_of_flash_kda() -> None:
    names = list(inspect.signature(flash_kda.fwd).parameters)
    assert names == [
        "q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", "initial_state", "final_state",
        "cu_seqlens",
    ]  # fmt: skip
    defaults = [p.default for p in inspect.signature(flash_kda.fwd).parameters.values()]
    assert defaults == [inspect.Parameter.empty] * 10 + [None] * 3


@pytest.mark.parametrize("layout", [{"B": 3}, {"cu_seqlens": [0, 5, 5, 66]}], ids=["dense", "packed"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_and_final_state_are_written(layout: dict[str, Any], state: torch.dtype | None, dtype: torch.dtype) -> None:
    call, (o, final) = case(state=state, dtype=dtype, **layout)
    out, final_state = torch.full_like(o, torch.nan), torch.full_like(final, torch.nan, dtype=state or torch.float32)
    assert flash_kda.fwd(**call, out=out, final_state=final_state) is None
    assert torch.equal(out, o) and torch.equal(final_state, final.to(final_state.dtype))
    flash_kda.fwd(**call, out=out.fill_(torch.nan))
    assert torch.equal(out, o)


def test_outputs_of_any_strides_are_written() -> None:
    call, (o, final) = case(B=2)
    out, final_state = torch.empty(*o.shape[:3], 32)[..., ::2], torch.empty_like(final).transpose(-1, -2)
    flash_kda.fwd(**call, out=out, final_state=final_state)
    assert torch.equal(out, o) and torch.equal(final_state, final)


def test_a_state_is_updated_in_place() -> None:
    call, (o, final) = case(B=2)
    out = torch.empty_like(o)
    flash_kda.fwd(**call, out=out, final_state=call["initial_state"])
    assert torch.equal(call["initial_state"], final) and torch.equal(out, o)


def test_no_gradient_is_recorded() -> None:
    call, (o, final) = case(B=2)
    call["q"].requires_grad_()
    out, final_state = torch.empty_like(o), torch.empty_like(final)
    flash_kda.fwd(**call, out=out, final_state=final_state)
    assert not out.requires_grad and not final_state.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.empty(2, 70, 2, 8)}, r"out must have shape \[B, T, HV, V\] = \[2, 70, 2, 16\]"),
        ({"out": torch.empty(2, 70, 2, 16, dtype=torch.float16)}, "out must be float32 where q is float32"),
        ({"out": torch.empty(2, 70, 2, 16, device="meta")}, "out must be on cpu as q is"),
        ({"final_state": torch.empty(3, 2, 16, 16)}, r"final_state must have shape \[N, HV, V, K\]"),
        ({"initial_state": torch.empty(2, 2, 16, 16, dtype=torch.float16)}, "initial_state must be float32 or bfloat16"),
        ({"lower_bound": 0.0}, r"lower_bound must be in \[-5, 0\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_names_its_argument(changes: dict[str, Any], message: str) -> None:
    call, (o, _) = case(B=2)
    with pytest.raises(ValueError, match=message):
        flash_kda.fwd(**{**call, "out": torch.empty_like(o), **changes})


def test_installed_it_is_what_import_finds() -> None:
    assert importlib.util.find_spec("flash_kda") is None
    flash_kda.install()
    flash_kda.install()
    import flash_kda as found

    assert found.fwd is flash_kda.fwd
    assert importlib.util.find_spec("flash_kda") is not None
    flash_kda.uninstall()
    flash_kda.uninstall()
    assert importlib.util.find_spec("flash_kda") is None
    assert "flash_kda" not in sys.modules


def test_a_flash_kda_that_was_imported_before_is_served_and_given_back() -> None:
    real = ModuleType("flash_kda")
    real.fwd = theirs = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    sys.modules["flash_kda"] = real
    try:
        flash_kda.install()
        flash_kda.install()
        assert sys.modules["flash_kda"] is real and real.fwd is flash_kda.fwd
        flash_kda.uninstall()
        assert sys.modules["flash_kda"] is real and real.fwd is theirs
    finally:
        sys.modules.pop("flash_kda")


def test_the_backend_of_fla_for_flash_kda_runs_on_it() -> None:
    pytest.importorskip("fla.ops.kda")
    from fla.ops.kda.backends.flash_kda import FlashKDABackend

    flash_kda.install()
    call = make_call(70, H=2, HV=2, K=128, V=128, dtype=torch.bfloat16, initial_state=True, state_v_first=True)
    call |= {"output_final_state": True, "safe_gate": True}
    backend = FlashKDABackend()
    with torch.inference_mode():
        accepted, reason = backend.chunk_kda_verifier(**call)
        assert accepted, reason
        for actual, expected in zip(backend.chunk_kda(**call), chunk_kda(**call), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, None], ids=str)
def test_on_a_gpu_the_kernel_writes_into_the_outputs(
    state: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, (o, final) = case(T=300, K=128, state=state, cu_seqlens=[0, 100, 280], dtype=torch.bfloat16, device="cuda")
    out, final_state = torch.full_like(o, torch.nan), torch.full_like(final, torch.nan, dtype=state or torch.float32)
    kernel, written = cuda.chunk_kda, []

    def recorded(plan: Any, o: Tensor, *args: Any, **options: Any) -> None:
        written.append(o.data_ptr())
        kernel(plan, o, *args, **options)

    monkeypatch.setattr(cuda, "chunk_kda", recorded)
    flash_kda.fwd(**call, out=out, final_state=final_state)
    assert len(written) == 1 and (written == [out.data_ptr()]) == (state != torch.bfloat16)
    assert torch.equal(out, o) and torch.equal(final_state, final.to(final_state.dtype))
