"""Calls of the ops with known contents, the fp64 reference of a call, and how far a result is from it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashkda_ops.reference import recurrent_kda_reference

Call = dict[str, Any]
"""Keyword arguments that the Python functions, the ops and the reference share."""

TOKENS = ("q", "k", "v", "g", "beta")
DIFFERENTIABLE = (*TOKENS, "A_log", "dt_bias", "initial_state")

GATES = ("precomputed", "bounded", "bounded, no A_log", "bounded, no dt_bias", "unbounded", "unbounded, no dt_bias")
BETAS = ("raw", "sigmoid", "negative eigenvalues")


def make_call(
    T: int,
    *,
    B: int = 1,
    H: int = 2,
    HV: int = 4,
    K: int = 16,
    V: int = 8,
    gate: str = "bounded",
    beta: str = "sigmoid",
    l2norm: bool = True,
    dtype: torch.dtype = torch.float32,
    cu_seqlens: list[int] | None = None,
    initial_state: bool = False,
    state_v_first: bool = False,
    slow_heads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Call:
    """Random tokens whose gates are slow in the first value heads (half of them by default) and fast in the others."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def cast(x: Tensor, to: torch.dtype = dtype) -> Tensor:
        return x.to(device, to)

    wide = torch.promote_types(dtype, torch.float32)
    q, k = randn(B, T, H, K), randn(B, T, H, K)
    if not l2norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    slow = torch.zeros(HV, K, dtype=torch.float64)
    slow[: HV // 2 if slow_heads is None else slow_heads] = -6.0
    g, raw_beta = randn(B, T, HV, K), randn(B, T, HV)
    call: Call = {
        "q": cast(q),
        "k": cast(k),
        "v": cast(randn(B, T, HV, V)),
        "g": cast(g if gate != "precomputed" else -torch.nn.functional.softplus(g + slow)),
        "beta": cast(raw_beta if beta != "raw" else raw_beta.sigmoid()),
        "use_qk_l2norm_in_kernel": l2norm,
        "use_beta_sigmoid_in_kernel": beta != "raw",
        "allow_neg_eigval": beta == "negative eigenvalues",
    }
    if gate != "precomputed":
        call["use_gate_in_kernel"] = True
        call["lower_bound"] = -5.0 if gate.startswith("bounded") else None
        if not gate.endswith("no A_log"):
            call["A_log"] = cast(0.3 * randn(HV), wide)
        if not gate.endswith("no dt_bias"):
            call["dt_bias"] = cast(slow + 0.1 * randn(HV, K), wide)
    if cu_seqlens is not None:
        call["cu_seqlens"] = torch.tensor(cu_seqlens, device=device)
    if initial_state:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        call["initial_state"] = cast(randn(N, HV, V, K) if state_v_first else randn(N, HV, K, V), wide)
    if state_v_first:
        call["state_v_first"] = True
    return call


def kernel_call(T: int, **options: Any) -> Call:
    """A call on a GPU that the chunk kernels serve."""
    options = {"K": 128, "V": 128, "dtype": torch.bfloat16, "device": "cuda", "initial_state": True} | options
    return make_call(T, **options)


def random_cu_seqlens(T: int, N: int, generator: torch.Generator) -> Tensor:
    """``N`` sequences of any lengths, empty ones among them, that end anywhere in ``T`` tokens."""
    end = int(torch.randint(0, T + 1, (), generator=generator))
    cuts = torch.randint(0, end + 1, (N - 1,), generator=generator).sort().values
    return torch.cat((torch.tensor([0]), cuts, torch.tensor([end])))


_REFERENCE_ARGS = frozenset(inspect.signature(recurrent_kda_reference).parameters)


def reference(call: Call) -> tuple[Tensor, Tensor]:
    """Output and final state of a call in fp64, token by token."""
    return recurrent_kda_reference(**{name: x for name, x in call.items() if name in _REFERENCE_ARGS})


def paged(call: Call, state_pool: Tensor, state_indices: Tensor, **changes: Any) -> Call:
    """The same call with its states in a pool."""
    call = {name: x for name, x in call.items() if name != "initial_state"}
    return {**call, "state_pool": state_pool, "state_indices": state_indices, **changes}


def rows(call: Call, start: int, end: int | None = None) -> Call:
    """The call on tokens ``start`` to ``end`` of every sequence of a dense batch."""
    return {**call, **{name: call[name][:, start:end] for name in TOKENS}}


DEFAULTS = {
    "A_log": None, "dt_bias": None, "initial_state": None, "cu_seqlens": None, "scale": None,
    "use_gate_in_kernel": False, "lower_bound": None, "state_v_first": False, "batch_invariant": False,
}  # fmt: skip
"""What a call may leave out of the arguments of ``flashkda::chunk_kda_backward``."""


def cotangents(call: Call, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Random ones of the output and the final state, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    v, K, cu_seqlens = call["v"], call["q"].shape[3], call.get("cu_seqlens")
    N, (HV, V) = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, v.shape[2:]
    state = (N, HV, V, K) if call.get("state_v_first") else (N, HV, K, V)
    do, dht = (torch.randn(shape, generator=generator).bfloat16() for shape in (v.shape, state))
    return do.to(v.device, v.dtype), dht.to(v.device, torch.promote_types(v.dtype, torch.float32))


Result = TypeVar("Result")


def graph_of(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of ``function``, and what its replays write to. A call on another stream comes first, as it must."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def requiring_grad(call: Call, names: tuple[str, ...] = DIFFERENTIABLE) -> Call:
    """The call with leaves of their own, as far as it has them, in place of the named arguments."""
    return {**call, **{name: call[name].detach().clone().requires_grad_() for name in names if name in call}}


def error(actual: Tensor, expected: Tensor, heads: int | None = None) -> float:
    """``||actual - expected|| / ||expected||``: of the whole tensor, or of the worst head where it is worse."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = actual - expected
    parts = [(difference, expected)]
    if heads is not None:
        parts += zip(difference.unbind(heads), expected.unbind(heads), strict=True)
    return max((float(d.norm() / e.norm().clamp_min(1e-30)) for d, e in parts), default=0.0)


def output_error(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The worse of the errors of an output and a state."""
    return max(error(actual[0], expected[0], heads=2), error(actual[1], expected[1], heads=1))


def use_first_configurations(package: str = "fla") -> None:
    """Have the Triton kernels of an imported package skip autotuning: results need none of its minutes."""
    Autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == package]:
        for kernel in vars(module).values():
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn
