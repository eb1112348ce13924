"""fla on the ops of this package: through its registry in eager calls, and what the compiler traces of its models."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_gpu import KERNEL, call_on_gpu, gpu_with_kernels, path_of, pool
from helpers import Call, error, make_call, paged, requiring_grad, use_first_configurations
from torch import Tensor, nn

pytest.importorskip("fla.models")
import fla.backends
import fla.layers.kda
import fla.modules
from fla.models.cache_utils import FLACache
from fla.models.kda import KDAConfig, KDAForCausalLM
from fla.ops.kda import chunk_kda as fla_chunk_kda
from fla.ops.kda import fused_recurrent_kda as fla_fused_recurrent_kda
from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
from fla_on_cpu import fla_on_cpu, greedy_tokens

from flashkda_ops import chunk_kda, recurrent_kda
from flashkda_ops.integrations import _known
from flashkda_ops.integrations import fla as integration
from flashkda_ops.integrations._signatures import Theirs
from flashkda_ops.nn import convert

LOG = "fla.backends"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def fla_as_found() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    integration.disable()
    torch._dynamo.reset()


def registries() -> list[Any]:
    functions = fla.backends._function_registries
    return [functions[fla.backends.unwrap(fla_chunk_kda)], fla.backends._operation_registries["kda"]]


def small_model(**options: Any) -> KDAForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "head_dim": 8, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 50}
    return KDAForCausalLM(KDAConfig(**{**sizes, "initializer_range": 0.2, **options}))


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# The backend
# ---------------------------------------------------------------------------------------------------------------------


def test_flas_function_trains_on_the_op_and_its_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    integration.enable()
    call = make_call(20, initial_state=True)
    results = []
    with caplog.at_level(logging.INFO, LOG):
        for function in (fla_chunk_kda, chunk_kda):
            given = requiring_grad(call)
            o, state = function(**given, output_final_state=True)
            (o.square().sum() + state.sum()).backward()
            results.append([o, state, *(x.grad for x in given.values() if isinstance(x, Tensor))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert "fla.ops.kda.chunk.chunk_kda -> flashkda_ops" in caplog.text


def test_flas_function_gives_the_results_of_its_naive_path() -> None:
    """With the state and the precomputed gate, which the layers do not use."""
    for gate, state_v_first in (("precomputed", False), ("unbounded", True), ("bounded", False)):
        call = make_call(20, gate=gate, initial_state=True, state_v_first=state_v_first, cu_seqlens=[0, 3, 20])
        call |= {"output_final_state": True}
        with fla_on_cpu():
            expected = fla_chunk_kda(**call)
            integration.enable()
            actual = fla_chunk_kda(**call)
            integration.disable()
        assert all(error(a, b) < 1e-5 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("initial_state", [False, True])
def test_flas_recurrent_function_decodes_on_the_op(
    T: int, initial_state: bool, caplog: pytest.LogCaptureFixture
) -> None:
    integration.enable()
    call = make_call(T, B=3, initial_state=initial_state, state_v_first=True)
    before = call["initial_state"].clone() if initial_state else None
    with caplog.at_level(logging.INFO, LOG):
        actual = fla_fused_recurrent_kda(**call, output_final_state=True)
    expected = recurrent_kda(**call, output_final_state=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert before is None or torch.equal(call["initial_state"], before)
    assert fla_fused_recurrent_kda(**call)[1] is None
    assert "kda.fused_recurrent_kda_fwd -> flashkda_ops" in caplog.text


def test_flas_recurrent_function_updates_a_pool_of_states_in_place() -> None:
    integration.enable()
    call = make_call(2, B=3, state_v_first=True)
    pool, out = torch.randn(9, 4, 8, 16), torch.empty(3, 2, 4, 8)
    rows = torch.tensor([[1, 4], [0, 5], [8, 2]])
    accepted = torch.tensor([2, 1, 1])
    start = pool[[4, 0, 8]].clone()
    kept = pool.clone()
    o, final = fused_recurrent_kda_fwd(
        **call, initial_state=pool, ssm_state_indices=rows, num_accepted_tokens=accepted, out=out
    )
    assert o is out and final is pool
    for token in (1, 2):
        call_until = {n: x[:, :token] if n in ("q", "k", "v", "g", "beta") else x for n, x in call.items()}
        expected, state = recurrent_kda(**call_until, initial_state=start, output_final_state=True)
        assert error(pool[rows[:, token - 1]], state) < 1e-6
    assert error(o, expected) < 1e-6
    untouched = [3, 6, 7]
    assert torch.equal(pool[untouched], kept[untouched])


def test_flas_recurrent_function_updates_the_rows_of_a_pool_or_all_states_in_place() -> None:
    integration.enable()
    call = make_call(1, B=2, state_v_first=True)
    for rows in (torch.tensor([3, 1]), None):
        pool = torch.randn(4 if rows is not None else 2, 4, 8, 16)
        picked = torch.tensor([0, 1]) if rows is None else rows
        expected = recurrent_kda(**call, initial_state=pool[picked], output_final_state=True)
        o, final = fused_recurrent_kda_fwd(**call, initial_state=pool, ssm_state_indices=rows)
        assert final is pool
        assert torch.equal(o, expected[0]) and torch.equal(pool[picked], expected[1])


def rejection(caplog: pytest.LogCaptureFixture, function: Any, call: Call) -> str:
    """What fla's log gives as the reason why its own function runs, which on the CPU fails."""
    integration.enable()
    with caplog.at_level(logging.INFO, LOG), pytest.raises(Exception):  # noqa: B017
        function(**call)
    lines = [r.getMessage() for r in caplog.records if "flashkda_ops rejected" in r.getMessage()]
    assert len(lines) == 1
    return lines[0].split("rejected: ")[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cp_context": object()}, "cp_context: another protocol than"),
        ({"return_intermediate_states": True}, "return_intermediate_states: fla's have another dtype"),
        ({"chunk_size": 16}, "chunk_size must be 32 or 64, got 16"),
        ({"lower_bound": -9.0}, "lower_bound must be in [-5, 0), got -9.0"),
        ({"lower_bound": None, "safe_gate": True}, "lower_bound must be given with safe_gate=True"),
        ({"initial_state": torch.zeros(1, 4, 16, 8, dtype=torch.bfloat16)}, "initial_state must be float32"),
        ({"transpose_state_layout": True, "initial_state": torch.zeros(1, 4, 16, 8)}, "initial_state must have shape"),
        ({"beta": torch.zeros(1, 5, 4, 8)}, "beta must have shape"),
        ({"use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": True}, "allow_neg_eigval=True requires"),
        ({"new_in_fla": 1}, "unexpected keyword argument"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_op_cannot_do_is_declined_with_a_reason(
    change: Call, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason in rejection(caplog, fla_chunk_kda, {**make_call(5), **change})


POOL = {"initial_state": torch.zeros(3, 4, 16, 8)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beta": torch.zeros(2, 5, 4, 8), "inplace_final_state": False}, "beta must have shape"),
        ({"new_in_fla": 1}, "unknown keywords: new_in_fla"),
        ({}, "inplace_final_state requires initial_state"),
        ({**POOL, "ssm_state_indices": torch.tensor([0, 1])}, "one slot a sequence is for one token a sequence"),
        ({**POOL, "ssm_state_indices": torch.zeros(2, 3, dtype=torch.int64)}, "state_indices must have a slot a token"),
        ({"initial_state": torch.zeros(3, 4, 16, 8), "inplace_final_state": False}, "initial_state must have shape"),
        (
            {**POOL, "ssm_state_indices": torch.tensor([0, 1]), "inplace_final_state": False},
            "ssm_state_indices requires inplace_final_state",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_decode_op_cannot_do_is_declined_with_a_reason(
    change: Call, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert reason in rejection(caplog, fused_recurrent_kda_fwd, {**make_call(5, B=2), **change})


def test_on_another_device_what_has_no_kernel_is_declined() -> None:
    integration.enable()
    call = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in make_call(1, initial_state=True).items()}
    backend = integration._Backend()
    for function in ("chunk_kda", "fused_recurrent_kda_fwd"):
        given = call if function == "chunk_kda" else {**call, "inplace_final_state": True}
        accepted, reason = backend.verify(function, **given)
        assert not accepted and ("CUDA" in reason or "device" in reason)
    accepted, reason = backend.verify("fused_recurrent_kda_fwd", **call, inplace_final_state=False)
    assert not accepted and "asks for a new one" in reason


CALLS_OF_FLA: list[dict[str, Any]] = [
    {},
    {"gate": "precomputed", "beta": "raw", "l2norm": False},
    {"initial_state": True, "state_v_first": True},
    {"cu_seqlens": [0, 3, 3, 7], "initial_state": True},
]


@pytest.mark.parametrize("options", CALLS_OF_FLA, ids=str)
def test_on_a_gpu_those_calls_are_accepted_that_kernels_serve(options: dict[str, Any]) -> None:
    integration.enable()
    backend = integration._Backend()
    with gpu_with_kernels():
        for K, V, dtype in itertools.product((32, 63, 64, 100, 128, 129), (63, 64, 128, 256), DTYPES):
            call = call_on_gpu(7, K=K, V=V, dtype=dtype, **options)
            accepted, reason = backend.verify("chunk_kda", **call)
            assert accepted == (path_of("chunk_kda", call) == KERNEL), (K, V, dtype)
            if not accepted:
                assert ("channels" in reason and f"K={K}, V={V}" in reason) or str(dtype) in reason


@pytest.mark.parametrize("v_first", [False, True])
def test_on_a_gpu_those_decode_calls_are_accepted_that_kernels_serve(v_first: bool) -> None:
    integration.enable()
    backend = integration._Backend()
    with gpu_with_kernels():
        for K, V, dtype, aligned in itertools.product((64, 128), (64, 128), DTYPES, (True, False)):
            call = call_on_gpu(1, K=K, V=V, dtype=dtype, state_v_first=v_first)
            states = pool(call, aligned)
            rows = torch.empty(1, dtype=torch.int32, device="cuda")
            of_fla = call | {"initial_state": states, "ssm_state_indices": rows}
            accepted, reason = backend.verify("fused_recurrent_kda_fwd", **of_fla)
            assert accepted == (path_of("recurrent_kda_paged", paged(call, states, rows)) == KERNEL)
            assert accepted or any(x in reason for x in ("K=V=128", str(dtype), "aligned"))


def test_the_backend_comes_before_flas_others_and_has_an_environment_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    integration.enable()
    for registry in registries():
        assert registry._get_sorted_backends()[0 if registry is registries()[0] else 1].backend_type == "flashkda_ops"
        assert registry._backends["flashkda_ops"].is_enabled()
    with fla_on_cpu():
        expected = fla_chunk_kda(**make_call(5))[0]
        monkeypatch.setenv("FLA_FLASHKDA_OPS", "0")
        assert not any(registry._backends["flashkda_ops"].is_enabled() for registry in registries())
        theirs = fla_chunk_kda(**make_call(5))[0]
    assert not torch.equal(theirs, expected) and error(theirs, expected) < 1e-5


def test_a_registry_that_is_switched_off_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fla.backends, "_DISPATCH_DISABLED", True)
    integration.enable()
    assert "FLA_DISABLE_BACKEND_DISPATCH=1: fla asks no backend" in caplog.text
    assert not any("flashkda_ops" in registry._backends for registry in registries())


def everything() -> list[Any]:
    """What enable() may change in fla."""
    found = [dict(registry._backends) for registry in registries()]
    found += [set(registry._logged) for registry in registries()]
    classes = (
        fla.layers.kda.KimiDeltaAttention, fla.modules.ShortConvolution, fla.modules.FusedRMSNormGated,
        fla.modules.RMSNorm, fla.modules.GatedMLP, fla.modules.FusedLinearCrossEntropyLoss,
        fla.modules.FusedCrossEntropyLoss, FLACache, KDAForCausalLM,
    )  # fmt: skip
    return found + [dict(vars(c)) for c in classes]


@pytest.mark.parametrize("compile", [False, True])
def test_disable_leaves_fla_as_it_was(compile: bool) -> None:
    before = everything()
    integration.enable(compile=compile)
    integration.enable()
    integration.enable(compile=compile)
    fla_chunk_kda(**make_call(5))
    assert everything() != before
    for _ in range(2):
        integration.disable()
        assert everything() == before
    integration.enable(compile=compile)
    assert everything() != before
    integration.disable()
    assert everything() == before


def test_disable_alone_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = everything()
    integration.disable()
    assert everything() == before and caplog.records == []


def plain_norm(
    self: Any, x: Tensor, residual: Any = None, prenorm: bool = False, residual_in_fp32: bool = False
) -> Any:
    return "fla's"


def test_a_wrapper_that_came_later_stays_and_ours_hands_its_calls_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    norm = fla.modules.RMSNorm(8)
    monkeypatch.setattr(fla.modules.RMSNorm, "forward", plain_norm)
    integration.enable(compile=True)
    ours = fla.modules.RMSNorm.forward

    @functools.wraps(ours)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    fla.modules.RMSNorm.forward = profiled
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.is_tensor(norm(torch.ones(2, 8)))
    integration.disable()
    assert fla.modules.RMSNorm.forward is profiled
    assert norm(torch.ones(2, 8)) == "fla's"
    (message,) = [record.getMessage() for record in caplog.records]
    assert "fla.modules.norm.layernorm.RMSNorm.forward is left as it is" in message
    assert f"profiled ({__file__}, line " in message and "wraps ours, which now hands its calls on" in message
    integration.enable(compile=True)
    assert fla.modules.RMSNorm.forward is profiled and torch.is_tensor(norm(torch.ones(2, 8)))


def test_a_backend_that_has_replaced_ours_stays_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    integration.enable()
    registry = registries()[0]
    ours = registry._backends["flashkda_ops"]

    class Wrapped(integration._Backend):
        pass

    try:
        fla.backends.register(fla_chunk_kda)(Wrapped)
        theirs = registry._backends["flashkda_ops"]
        integration.disable()
        assert registry._backends["flashkda_ops"] is theirs
        for backend in (ours, theirs):
            accepted, reason = backend.verify("chunk_kda", **make_call(5))
            assert not accepted and reason == "flashkda_ops.integrations.fla is disabled"
    finally:
        del registry._backends["flashkda_ops"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "fla's backend flashkda_ops is left as it is" in message and "Wrapped has replaced ours" in message


def test_a_registry_that_somebody_restored_gets_the_backend_again() -> None:
    with fla_on_cpu():
        integration.enable()
    assert not any("flashkda_ops" in registry._backends for registry in registries())
    integration.enable()
    assert all("flashkda_ops" in registry._backends for registry in registries())


# ---------------------------------------------------------------------------------------------------------------------
# A later fla
# ---------------------------------------------------------------------------------------------------------------------


def drifted(function: Any, *changes: inspect.Parameter, without: tuple[str, ...] = ()) -> Any:
    """A function of fla's with these parameters too, ahead of those with a default."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in without]
    at = next(i for i, p in enumerate(parameters) if p.default is not p.empty)

    def later(*args: Any, **kwargs: Any) -> Any:
        return "fla's"

    later.__module__, later.__qualname__ = function.__module__, function.__qualname__
    later.__signature__ = signature.replace(parameters=[*parameters[:at], *changes, *parameters[at:]])
    return later


def parameter(name: str, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def theirs(name: str, function: Any) -> Theirs:
    return Theirs(function, _known.FUNCTIONS[name], _known.CHUNK_KEYWORDS)


CHUNK, RECURRENT = "fla.ops.kda.chunk_kda", "fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd"


def test_a_new_parameter_of_flas_functions_is_reported_and_declined_where_it_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cap = parameter("cap", 1.0)
    monkeypatch.setattr(integration, "_CHUNK", theirs(CHUNK, drifted(fla_chunk_kda, cap)))
    monkeypatch.setattr(integration, "_RECURRENT", theirs(RECURRENT, drifted(fused_recurrent_kda_fwd, cap)))
    integration.enable()
    messages = [record.getMessage() for record in caplog.records]
    for message, name in zip(messages, ("chunk_kda", "fused_recurrent_kda_fwd"), strict=True):
        assert f"{name} is not the one of fla 0.6.0" in message
        assert "cap is new, 1.0 by default; cap comes where" in message
    backend, call = integration._Backend(), make_call(1, initial_state=True)
    tokens = [call.pop(name) for name in ("q", "k", "v", "g", "beta")]
    for function, options in (("chunk_kda", {}), ("fused_recurrent_kda_fwd", {"inplace_final_state": False})):
        assert backend.verify(function, *tokens, 1.0, **call, **options) == (True, None)
        accepted, reason = backend.verify(function, *tokens, 2.0, **call, **options)
        assert not accepted and reason == "cap is given, which flashkda_ops does not know"
    # Positional arguments go by fla's order, not by ours.
    expected = chunk_kda(*tokens, scale=0.5, **call)[0]
    assert torch.equal(backend.chunk_kda(*tokens, 1.0, 0.5, **call)[0], expected)


def test_another_default_of_flas_is_flas(monkeypatch: pytest.MonkeyPatch) -> None:
    later = drifted(fla_chunk_kda, parameter("output_final_state", True), without=("output_final_state",))
    monkeypatch.setattr(integration, "_CHUNK", theirs(CHUNK, later))
    integration.enable()
    assert integration._Backend().chunk_kda(**make_call(5))[1] is not None


def test_a_parameter_that_is_gone_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    later = drifted(fused_recurrent_kda_fwd, without=("num_accepted_tokens", "out"))
    monkeypatch.setattr(integration, "_RECURRENT", theirs(RECURRENT, later))
    integration.enable()
    call = make_call(1, initial_state=True) | {"inplace_final_state": False}
    assert integration._Backend().verify("fused_recurrent_kda_fwd", **call) == (True, None)


@pytest.mark.parametrize("which", ["_CHUNK", "_RECURRENT"])
def test_a_function_with_a_new_required_parameter_stays_flas(
    which: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, function = (CHUNK, fla_chunk_kda) if which == "_CHUNK" else (RECURRENT, fused_recurrent_kda_fwd)
    monkeypatch.setattr(integration, which, theirs(name, drifted(function, parameter("mask"))))
    integration.enable()
    has_backend = ["flashkda_ops" in registry._backends for registry in registries()]
    assert has_backend == [which != "_CHUNK", which != "_RECURRENT"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "mask is new and required" in message and message.endswith("It stays fla's")


def test_another_registry_of_flas_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fla.backends, "_function_registries")
    with pytest.raises(
        ImportError, match=r"registry of backends of fla 0\.6\.0, which is not the one that is installed"
    ):
        integration.enable(compile=True)
    assert not integration._registered and not integration._replaced.active
    assert "flashkda_ops" not in fla.backends._operation_registries["kda"]._backends


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (parameter("mask"), "forward: mask is new and required"),
        (parameter("mask", None), "forward: mask is new, None by default; mask comes where residual came"),
    ],
    ids=["required", "ahead of others"],
)
def test_a_module_whose_forward_takes_something_else_stays_flas(
    new: inspect.Parameter, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    later = drifted(fla.modules.RMSNorm.forward, new)
    monkeypatch.setattr(fla.modules.RMSNorm, "forward", later)
    integration.enable(compile=True)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "RMSNorm is not the one of fla 0.6.0" in message and reason in message
    assert fla.modules.RMSNorm.forward is later and message.endswith("It stays fla's")
    caplog.clear()
    assert type(convert(nn.Sequential(fla.modules.RMSNorm(8)))[0]) is fla.modules.RMSNorm
    assert f"0 stays fla's RMSNorm: {reason}" in caplog.text


def test_a_module_whose_forward_takes_something_more_is_traced_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def later(
        self: Any,
        x: Tensor,
        residual: Any = None,
        prenorm: Any = False,
        residual_in_fp32: Any = False,
        mask: Any = None,
    ) -> str:
        return "fla's"

    breaks: list[str] = []
    monkeypatch.setattr(fla.modules.RMSNorm, "forward", later)
    integration.enable(compile=True)
    assert "forward: mask is new, None by default. Calls that give what is new run on fla's" in caplog.text
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch._dynamo, "graph_break", breaks.append)
    norm, x = fla.modules.RMSNorm(8), torch.ones(2, 8)
    assert torch.is_tensor(norm(x)) and breaks == []
    assert norm(x, mask=1) == norm(x, None, False, False, 1) == "fla's"
    assert breaks == ["flashkda_ops: mask is not served", "flashkda_ops: 5 positional arguments are not served"]


def test_an_option_that_is_not_known_is_declined_where_it_is_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = fla.modules.RMSNorm.__init__

    def __init__(self: Any, *args: Any, zero_centered: bool = False, **kwargs: Any) -> None:
        known(self, *args, **kwargs)
        self.zero_centered = zero_centered

    signature = inspect.signature(known)
    new = inspect.Parameter("zero_centered", inspect.Parameter.KEYWORD_ONLY, default=False)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), new])  # type: ignore[attr-defined]
    monkeypatch.setattr(fla.modules.RMSNorm, "__init__", __init__)
    model = nn.Sequential(fla.modules.RMSNorm(8), fla.modules.RMSNorm(8, zero_centered=True))
    integration.enable(compile=True)
    assert "RMSNorm is not the one of fla 0.6.0 that flashkda_ops knows: option zero_centered is new" in caplog.text
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="zero_centered is True: an option that flashkda_ops does not"
    ):
        torch.compile(model[1], fullgraph=True, backend="eager")(torch.ones(2, 8))
    torch.compile(model[0], fullgraph=True, backend="eager")(torch.ones(2, 8))
    convert(model)
    assert type(model[0]) is not fla.modules.RMSNorm and type(model[1]) is fla.modules.RMSNorm
    assert "1 stays fla's RMSNorm: zero_centered is True" in caplog.text
    assert "fla's RMSNorm is not the one that flashkda_ops knows: option zero_centered is new, False" in caplog.text


GREEDY = {
    "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 9, dtype=torch.long)
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"safe_gate": True, "lower_bound": -5.0, "num_v_heads": 4}], ids=str)
def test_flas_model_trains_and_decodes_on_the_op(options: dict[str, Any]) -> None:
    model = small_model(**options)
    results = []
    for ours in (False, True):
        with fla_on_cpu():
            integration.enable() if ours else None
            model.train().zero_grad()
            loss = model(ids(), labels=ids()).loss
            loss.backward()
            model.eval()
            tokens = model.generate(ids(), **GREEDY) if ours else greedy_tokens(model, ids(), 5)
            results.append((loss.detach(), [p.grad.clone() for p in model.parameters()], tokens))
            integration.disable()
    assert error(results[1][0], results[0][0]) < 1e-6
    assert all(error(a, b) < 1e-4 for a, b in zip(results[1][1], results[0][1], strict=True))
    assert torch.equal(results[1][2], results[0][2])


# ---------------------------------------------------------------------------------------------------------------------
# What is traced
# ---------------------------------------------------------------------------------------------------------------------


def test_flas_layer_breaks_the_graph_without_us_and_nowhere_with_us() -> None:
    layer = fla.layers.kda.KimiDeltaAttention(24, head_dim=8, num_heads=2)
    x = torch.ones(1, 5, 24)
    with fla_on_cpu():
        assert torch._dynamo.explain(layer)(x).graph_break_count >= 3  # the convolutions, the op, the gated norm
        torch._dynamo.reset()
        integration.enable(compile=True)
        assert torch._dynamo.explain(layer)(x).graph_break_count == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_l2warp": True},
        {"fuse_cross_entropy": False},
        {"safe_gate": True, "lower_bound": -4.0, "num_v_heads": 4},
    ],
    ids=str,
)
def test_flas_model_trains_compiled_with_the_results_of_its_naive_path(options: dict[str, Any]) -> None:
    model = small_model(**options)
    if not model.config.fuse_cross_entropy:  # the compiler does not read attributes of one that is made in the graph
        model.criterion = nn.CrossEntropyLoss()
    with fla_on_cpu():
        expected = model(ids(), labels=ids()).loss
        expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    integration.enable(compile=True)
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(ids(), labels=ids()).loss
    actual.backward()
    assert error(actual.detach(), expected.detach()) < 1e-6
    assert all(error(p.grad, g) < 1e-4 for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_converted_model_trains_compiled_with_the_results_of_flas_naive_path() -> None:
    model = small_model()
    with fla_on_cpu():
        expected = model(ids(), labels=ids())
        expected.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    actual = torch.compile(convert(model), fullgraph=True, backend="aot_eager")(ids(), labels=ids())
    actual.loss.backward()
    assert error(actual.loss.detach(), expected.loss.detach()) < 1e-6
    assert all(error(p.grad, g) < 1e-4 for p, g in zip(model.parameters(), gradients, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["fla's cache", "a static cache"])
def test_flas_model_decodes_compiled_in_few_graphs(static: bool) -> None:
    model = small_model().eval()
    with fla_on_cpu():
        expected = model(ids(length=12)).logits
    integration.enable(compile=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    cache = integration.StaticCache(model, 2) if static else None
    out = compiled(ids(length=12)[:, :4], past_key_values=cache, use_cache=True)
    logits = [out.logits]
    for t in range(4, 12):
        out = compiled(ids(length=12)[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    assert error(torch.cat(logits, 1), expected) < 1e-5
    assert not static or out.past_key_values is cache
    # One for the prompt, one for all steps; fla's own counts its tokens in Python: one more.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (2 if static else 3)


def test_eager_calls_stay_flas() -> None:
    integration.enable(compile=True)
    norm = fla.modules.RMSNorm(8)
    calls = []

    def layer_norm_fwd(x: Tensor, **kwargs: Any) -> Any:
        calls.append(1)
        return x, None, x, x

    with fla_on_cpu():
        fla.backends.register(fla.modules.norm.layernorm.layer_norm_fwd)(layer_norm_fwd)
        norm(torch.ones(2, 8))
    assert calls == [1]


def test_what_cannot_be_traced_breaks_the_graph_with_a_reason_and_stays_right() -> None:
    model = small_model(lower_bound=-7.0).eval()
    integration.enable(compile=True)
    with torch.no_grad(), fla_on_cpu():
        expected = model(ids(), use_cache=False).logits
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"lower_bound is -7.0: the op takes \[-5, 0\)"):
            torch.compile(model, fullgraph=True, backend="eager")(ids(), use_cache=False)
        assert error(torch.compile(model, backend="eager")(ids(), use_cache=False).logits, expected) < 1e-5
    mlp = fla.modules.GatedMLP(4, hidden_act="powlu")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="hidden_act is powlu"):
        torch.compile(mlp, fullgraph=True, backend="eager")(torch.ones(2, 4))


def test_compiled_code_notices_that_fla_was_switched() -> None:
    norm = fla.modules.RMSNorm(8)
    compiled = torch.compile(lambda x: norm(x) + 1, fullgraph=True, backend="eager")
    for _ in range(2):
        integration.enable(compile=True)
        compiled(torch.ones(2, 8))
        integration.disable()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
            compiled(torch.ones(2, 8))


def test_an_unknown_keyword_of_a_module_is_left_to_fla() -> None:
    integration.enable(compile=True)
    conv = fla.modules.ShortConvolution(4, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cp_context is not served"):
        torch.compile(conv, fullgraph=True, backend="eager")(torch.ones(1, 2, 4), cp_context=None)


# ---------------------------------------------------------------------------------------------------------------------
# Caches, by the name that transformers had for them and by the one that it has
# ---------------------------------------------------------------------------------------------------------------------


def served_by(how: str, model: KDAForCausalLM) -> KDAForCausalLM:
    if how == "enable":
        integration.enable()
        return model
    return convert(model)


HOW = pytest.mark.parametrize("how", ["enable", "convert"])


@HOW
def test_a_static_cache_is_flas_cache_and_generates_flas_tokens(how: str) -> None:
    model = small_model().eval()
    with fla_on_cpu():
        expected = greedy_tokens(model, ids(), 5)
        model = served_by(how, model)
        cache = integration.StaticCache(model, 2)
        assert isinstance(cache, FLACache)
        assert torch.equal(model.generate(ids(), past_key_values=cache, **GREEDY), expected)
        assert torch.equal(model.generate(ids(), **GREEDY), expected)
    assert cache.get_seq_length() == ids().shape[1] + 4


@HOW
@torch.no_grad()
def test_a_cache_continues_under_both_names(how: str) -> None:
    model = small_model().eval()
    with fla_on_cpu():
        expected = model(ids()).logits[:, -1:]
        model = served_by(how, model)
        for name in ("past_key_values", "cache"):
            cache = model(ids()[:, :-1], use_cache=True).past_key_values
            out = model(ids()[:, -1:], use_cache=True, **{name: cache})
            assert error(out.logits, expected) < 1e-5 and out.past_key_values is cache


def test_the_name_cache_is_gone_with_the_integration() -> None:
    before = KDAForCausalLM.forward
    integration.enable()
    assert "cache" in inspect.signature(KDAForCausalLM.forward).parameters
    kept = KDAForCausalLM.forward
    integration.disable()
    assert KDAForCausalLM.forward is before
    given: list[Any] = []
    model = small_model().eval()
    model.model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    with fla_on_cpu(), torch.no_grad():
        kept(model, ids(), cache="a cache")
    assert given[0]["past_key_values"] is None and given[0]["cache"] == "a cache"  # as fla has it


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_converted_model_is_flas_and_is_copied_and_pickled(duplicate: Any) -> None:
    model = convert(small_model().eval())
    assert isinstance(model, KDAForCausalLM) and type(model).__name__ == "KDAForCausalLM"
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert torch.equal(twin.generate(ids(), **GREEDY), model.generate(ids(), **GREEDY))
    assert convert(twin) is twin and type(twin) is type(model)


def test_a_model_that_takes_both_names_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> None: ...

    monkeypatch.setattr(KDAForCausalLM, "forward", forward)
    integration.enable()
    assert KDAForCausalLM.forward is forward


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Linear(3, 3), "got Linear without any"),
        (nn.Sequential(nn.Linear(3, 3)), "got Sequential without any"),
        (nn.Sequential(type("Mine", (fla.modules.RMSNorm,), {})(8)), "got Sequential with a subclass of one, Mine"),
        (3, "model must be a torch.nn.Module, got int"),
        (KDAForCausalLM, "model must be a torch.nn.Module, got type"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_model_in_which_there_is_nothing_to_convert_is_an_error(model: Any, got: str) -> None:
    with pytest.raises(ValueError, match=r"^model must") as raised:
        convert(model)
    assert got in str(raised.value)


def test_a_model_that_was_converted_or_that_stays_flas_for_a_reason_is_none(caplog: pytest.LogCaptureFixture) -> None:
    model = convert(small_model())
    assert convert(model) is model and convert(model.model.layers[0].attn) is model.model.layers[0].attn
    assert caplog.records == []
    mlp = fla.modules.GatedMLP(4, hidden_act="powlu")
    assert convert(mlp) is mlp and "the model stays fla's GatedMLP: hidden_act is powlu" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU: against fla's Triton kernels, both measured by the model in fp32 on the CPU
# ---------------------------------------------------------------------------------------------------------------------


def gpu_model(**options: Any) -> tuple[KDAForCausalLM, KDAForCausalLM]:
    """In bf16 on the GPU, and the same parameters in fp32 on the CPU, converted."""
    use_first_configurations()
    sizes = {"hidden_size": 512, "head_dim": 128, "num_heads": 4, "num_hidden_layers": 4, "vocab_size": 1000}
    model = small_model(**sizes, initializer_range=0.02, **options).to("cuda", torch.bfloat16)
    return model, convert(copy.deepcopy(model).to("cpu", torch.float32))


def step(model: nn.Module, given: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(given, labels=given).loss
    loss.backward()
    owner = getattr(model, "_orig_mod", model)
    return loss.detach(), [p.grad.clone() for p in owner.parameters()]


def assert_as_close(ours: Tensor, theirs: Tensor, reference: Tensor) -> None:
    """Ours is as near to the reference as fla's, within what another order of 16-bit roundings makes."""
    assert error(ours.cpu(), reference) < 2 * error(theirs.cpu(), reference) + 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"safe_gate": True, "lower_bound": -5.0}], ids=str)
def test_compiled_training_on_the_gpu_gives_flas_results(options: dict[str, Any]) -> None:
    model, reference = gpu_model(**options)
    given = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(0))
    expected = step(reference, given)
    theirs = step(model, given.cuda())
    integration.enable(compile=True)
    ours = step(torch.compile(model, fullgraph=True), given.cuda())
    assert_as_close(ours[0], theirs[0], expected[0])
    for a, b, c in zip(ours[1], theirs[1], expected[1], strict=True):
        assert_as_close(a, b, c)


@pytest.mark.gpu
def test_eager_training_on_the_gpu_through_the_registry_gives_flas_results(caplog: pytest.LogCaptureFixture) -> None:
    model, reference = gpu_model()
    given = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(0))
    expected = step(reference, given)
    theirs = step(model, given.cuda())
    integration.enable()
    with caplog.at_level(logging.INFO, LOG):
        ours = step(model, given.cuda())
    assert "fla.ops.kda.chunk.chunk_kda -> flashkda_ops" in caplog.text
    assert_as_close(ours[0], theirs[0], expected[0])
    for a, b, c in zip(ours[1], theirs[1], expected[1], strict=True):
        assert_as_close(a, b, c)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("converted", [False, True])
def test_compiled_prefill_and_decode_on_the_gpu_give_flas_results(mode: str, converted: bool) -> None:
    model, reference = (m.eval() for m in gpu_model())
    given = torch.randint(0, 1000, (2, 80), generator=torch.Generator().manual_seed(0))
    expected = reference(given, use_cache=False).logits
    theirs = model(given.cuda(), use_cache=False).logits
    if converted:
        convert(model)
    else:
        integration.enable(compile=True)
    cache = integration.StaticCache(model, 2)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(2):  # the second time from graphs that were captured in the first
        cache.reset()
        logits = [compiled(given[:, :72].cuda(), past_key_values=cache, use_cache=True).logits.clone()]
        for t in range(72, 80):
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(given[:, t : t + 1].cuda(), past_key_values=cache, use_cache=True)
            logits.append(out.logits.clone())
        assert_as_close(torch.cat(logits, 1), theirs, expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@torch.no_grad()
def test_eager_generation_on_the_gpu_with_a_mask_gives_flas_logits() -> None:
    model = gpu_model()[0].eval()
    given = torch.randint(0, 1000, (2, 20), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(given)
    mask[0, :7] = 0
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    call |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(given, **call)
    integration.enable()
    through_registry = model.generate(given, **call)
    integration.disable()
    converted = convert(model).generate(given, **call)
    for actual in (through_registry, converted):
        assert error(actual.logits[0], expected.logits[0]) < 3e-2
