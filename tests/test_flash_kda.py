"""``flash_kda.fwd`` by its signature gives what ``chunk_kda`` gives, and ``import flash_kda`` finds it."""

from __future__ import annotations

import functools
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
from flashkda_ops.integrations._replacements import Replacements


@pytest.fixture(autouse=True)
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, "flash_kda", raising=False)
    monkeypatch.setattr(flash_kda, "_replaced", Replacements(flash_kda._logger))
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
        (
            {"initial_state": torch.empty(2, 2, 16, 16, dtype=torch.float16)},
            "initial_state must be float32 or bfloat16",
        ),
        ({"lower_bound": 0.0}, r"lower_bound must be in \[-5, 0\)"),
        ({"lower_bound": None}, r"lower_bound must be a number in \[-5, 0\), got None"),
        ({"scale": None}, "scale must be a number, got None"),
        ({"scale": [1.0]}, "scale must be a number, got list"),
        ({"A_log": None}, "A_log must be a Tensor, got None"),
        ({"dt_bias": None}, "dt_bias must be a Tensor, got None"),
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


def theirs(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
):  # type: ignore[no-untyped-def]  # fmt: skip
    """FlashKDA's."""
    out.fill_(7)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A FlashKDA that this process has imported."""
    module = ModuleType("flash_kda")
    module.fwd = theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_kda", module)
    return module


def runs_on_ours(function: Any, **more: Any) -> bool:
    call, (o, _) = case()
    out = torch.empty_like(o)
    function(**call, out=out, **more)
    assert torch.equal(out, o) or bool((out == 7).all())
    return torch.equal(out, o)


def test_a_flash_kda_that_was_imported_before_is_served_and_given_back(real: ModuleType) -> None:
    for _ in range(2):
        flash_kda.install()
        flash_kda.install()
        assert sys.modules["flash_kda"] is real and runs_on_ours(real.fwd)
        assert inspect.signature(real.fwd) == inspect.signature(theirs)
        for _ in range(2):
            flash_kda.uninstall()
            assert sys.modules["flash_kda"] is real and real.fwd is theirs


def test_what_was_taken_out_of_it_meanwhile_hands_its_calls_on(real: ModuleType) -> None:
    flash_kda.install()
    from flash_kda import fwd

    assert runs_on_ours(fwd)
    flash_kda.uninstall()
    assert not runs_on_ours(fwd)
    flash_kda.install()
    assert runs_on_ours(fwd)


def wrap(module: ModuleType) -> Any:
    inner = module.fwd

    @functools.wraps(inner)
    def profiled(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)

    module.fwd = profiled  # type: ignore[attr-defined]
    return profiled


def test_a_wrapper_that_came_later_stays_and_is_reported(real: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    flash_kda.install()
    profiled = wrap(real)
    assert runs_on_ours(real.fwd)
    flash_kda.uninstall()
    flash_kda.uninstall()
    assert real.fwd is profiled and not runs_on_ours(real.fwd)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"flash_kda.fwd is left as it is: profiled ({__file__}, line ")
    assert message.endswith(") wraps ours, which now hands its calls on")
    flash_kda.install()
    assert real.fwd is profiled and runs_on_ours(real.fwd)


def test_a_wrapper_around_a_function_of_no_flash_kda_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    flash_kda.install()
    module = sys.modules["flash_kda"]
    wrap(module)
    flash_kda.install()
    assert sys.modules["flash_kda"] is module
    flash_kda.uninstall()
    assert "flash_kda" not in sys.modules
    (message,) = [record.getMessage() for record in caplog.records]
    assert (
        "flash_kda.fwd was replaced by profiled (" in message
        and "gone with the module that install() had made" in message
    )


def test_a_module_that_somebody_put_in_its_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_kda.install()
    other = ModuleType("flash_kda")
    monkeypatch.setitem(sys.modules, "flash_kda", other)
    flash_kda.uninstall()
    assert sys.modules["flash_kda"] is other
    with pytest.raises(ImportError, match=r"the flash_kda that is imported \(made by other code\) has no fwd"):
        flash_kda.install()


def test_a_flash_kda_that_was_imported_after_all_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody drops ours from sys.modules and imports FlashKDA, which is then served too."""
    flash_kda.install()
    real = ModuleType("flash_kda")
    real.fwd = theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_kda", real)
    flash_kda.install()
    assert runs_on_ours(real.fwd)
    monkeypatch.delitem(sys.modules, "flash_kda")  # which is no reason to leave ours in it
    flash_kda.uninstall()
    assert real.fwd is theirs and "flash_kda" not in sys.modules


def test_a_new_parameter_of_flash_kda_is_reported_and_left_to_it(
    real: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def later(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, cap=None, initial_state=None, **rest):  # type: ignore[no-untyped-def]
        out.fill_(7)

    real.fwd = later  # type: ignore[attr-defined]
    flash_kda.install()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "fwd of the FlashKDA that is imported is not the one that flashkda_ops knows: cap is new, None" in message
    assert message.endswith("What is not known is left to FlashKDA")
    assert runs_on_ours(real.fwd) and runs_on_ours(real.fwd, cap=None) and not runs_on_ours(real.fwd, cap=1)
    call, (o, final) = case()
    out, state = torch.empty_like(o), torch.empty_like(final)
    names = ("q", "k", "v", "g", "beta", "scale")
    positional = [*(call[name] for name in names), out, call["A_log"], call["dt_bias"], call["lower_bound"], None]
    real.fwd(*positional, call["initial_state"], final_state=state)  # by FlashKDA's order, not by ours
    assert torch.equal(out, o) and torch.equal(state, final)


def test_a_flash_kda_with_a_new_required_parameter_is_left_as_it_is(
    real: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def later(q, k, v, g, beta, scale, workspace, out, A_log, dt_bias, lower_bound):  # type: ignore[no-untyped-def]
        pass

    real.fwd = later  # type: ignore[attr-defined]
    flash_kda.install()
    assert real.fwd is later
    (message,) = [record.getMessage() for record in caplog.records]
    assert "workspace is new and required" in message and message.endswith("It is left as it is")
    flash_kda.uninstall()
    assert real.fwd is later and len(caplog.records) == 1


def test_fla_does_not_remember_whether_flash_kda_was_there() -> None:
    pytest.importorskip("fla.ops.kda")
    from fla.ops.kda.backends.flash_kda import FlashKDABackend

    for _ in range(2):
        assert not FlashKDABackend.is_available()
        flash_kda.install()
        assert FlashKDABackend.is_available()
        flash_kda.uninstall()


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
