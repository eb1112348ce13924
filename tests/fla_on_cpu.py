"""fla's own layers on the CPU: each Triton entry point that a KDA model reaches gets a PyTorch implementation, through
fla's own registry. What runs around them is fla's code, so this is the reference that the drop-ins are compared with.

The sequences are walked one by one, token windows are cut out one by one: slow, and nothing here shares a line or an
idea with what is tested. Gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import fla.backends
import torch
import torch.nn.functional as F
from fla.modules.activations import ops as activations
from fla.modules.causal_conv1d import ops as conv
from fla.modules.fused_cross_entropy import ops as cross_entropy
from fla.modules.fused_linear_cross_entropy import ops as linear_cross_entropy
from fla.modules.norm import fused_norm_gate, layernorm
from fla.ops.kda import chunk
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from torch import Tensor

ENTRY_POINTS: dict[Callable[..., Any], Callable[..., Any]] = {}


def serves(entry_point: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorator(implementation: Callable[..., Any]) -> Callable[..., Any]:
        ENTRY_POINTS[entry_point] = implementation
        return implementation

    return decorator


def sequences(cu_seqlens: Tensor | None, batch: int, tokens: int) -> list[tuple[int, slice]]:
    """Row and tokens of each sequence."""
    if cu_seqlens is None:
        return [(b, slice(0, tokens)) for b in range(batch)]
    return [(0, slice(a, b)) for a, b in pairwise(cu_seqlens.tolist())]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        given = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(function(*leaves), given, dy, allow_unused=True))
    return [None if x is None else next(grads) for x in leaves]


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence
# ---------------------------------------------------------------------------------------------------------------------


def kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    lower_bound: float | None = None, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None, dt_bias: Tensor | None = None, **ignored: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """fla's naive gate and recurrence."""
    if use_gate_in_kernel and lower_bound is not None:
        g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    elif use_gate_in_kernel:
        g = naive_kda_gate(g, A_log, dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    if use_qk_l2norm_in_kernel:
        q, k = (x.float() * (x.float().square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    outputs, states = [], []
    for n, (b, tokens) in enumerate(sequences(cu_seqlens, q.shape[0], q.shape[1])):
        state = None if initial_state is None else initial_state[n : n + 1]
        if state is not None and state_v_first:
            state = state.transpose(-1, -2)
        o, state = naive_recurrent_kda(
            *(x[b : b + 1, tokens] for x in (q, k, v, g, beta)), scale, state, output_final_state=True
        )
        outputs.append(o)
        states.append(state.transpose(-1, -2) if state_v_first else state)
    o = torch.cat(outputs, 0 if cu_seqlens is None else 1)
    return o, torch.cat(states).contiguous() if output_final_state else None


ENTRY_POINTS[chunk.chunk_kda] = kda


# ---------------------------------------------------------------------------------------------------------------------
# The short convolution: the state holds the last W inputs of a sequence, [N, D, W]
# ---------------------------------------------------------------------------------------------------------------------


def histories(x: Tensor, state: Tensor | None, W: int, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The inputs of each sequence behind its state, ``[D, W + tokens]``."""
    result = []
    for n, (b, tokens) in enumerate(sequences(cu_seqlens, x.shape[0], x.shape[1])):
        past = x.new_zeros(x.shape[-1], W) if state is None else state[n]
        result.append(torch.cat((past, x[b, tokens].T), 1))
    return result


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, **options: Any) -> Tensor:
    W, outputs = weight.shape[1], []
    for history in histories(x, state, W, options["cu_seqlens"]):
        windows = [history[:, t + 1 : t + 1 + W] for t in range(history.shape[1] - W)]
        y = [(window.float() * weight.float()).sum(1) for window in windows]
        outputs.append(torch.stack(y) if y else x.new_zeros(0, x.shape[-1], dtype=torch.float32))
    y = torch.cat(outputs).view(*x.shape)
    if bias is not None:
        y = y + bias.float()
    if options["activation"] is not None:
        y = F.silu(y)
    return y.to(x.dtype)


@serves(conv.causal_conv1d_fwd)
def conv_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, initial_state: Tensor | None = None,
    output_final_state: bool = False, activation: str | None = None, cu_seqlens: Tensor | None = None, **ignored: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    y = convolution(x, weight, bias, initial_state, activation=activation, cu_seqlens=cu_seqlens)
    if residual is not None:
        y = y + residual
    W, state = weight.shape[1], None
    if output_final_state:
        state = torch.stack([history[:, -W:] for history in histories(x, initial_state, W, cu_seqlens)])
    return y, state


@serves(conv.causal_conv1d_bwd)
def conv_bwd(
    x: Tensor, dy: Tensor, dht: Tensor | None, weight: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, initial_state: Tensor | None = None, activation: str | None = None,
    cu_seqlens: Tensor | None = None, **ignored: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert dht is None and residual is None
    dx, dw, db, dh = gradients(
        lambda *inputs: convolution(*inputs, activation=activation, cu_seqlens=cu_seqlens),
        [x, weight, bias, initial_state],
        dy,
    )
    return dx, dw, db, None, dh


@serves(conv.causal_conv1d_update)
def conv_update(
    x: Tensor, cache: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    shape, x = x.shape, x.reshape(-1, 1, x.shape[-1])
    y, state = conv_fwd(x, weight, bias, None, cache, True, activation)
    cache.copy_(state)
    return (y.view(shape) if residual is None else y.view(shape) + residual), cache


# ---------------------------------------------------------------------------------------------------------------------
# Norms, activations, losses
# ---------------------------------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor | None, eps: float | Tensor) -> Tensor:
    y = x.float() / (x.float().square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.float()


def rstd_of(x: Tensor, eps: float) -> Tensor:
    return (x.float().square().mean(-1) + eps).rsqrt()


def eps_of(x: Tensor, rstd: Tensor) -> Tensor:
    """The backward entry points are not given it."""
    return (rstd.pow(-2) - x.float().square().mean(-1)).unsqueeze(-1)


@serves(layernorm.layer_norm_fwd)
def norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None, is_rms_norm: bool = False, num_groups: int = 1,
) -> tuple[Tensor, None, Tensor, Tensor]:  # fmt: skip
    assert is_rms_norm and num_groups == 1 and bias is None
    total, stored = x.float(), x.dtype
    if residual is not None:
        total, residual_dtype = total + residual.float(), residual.dtype
    if residual_dtype is not None:
        stored = residual_dtype
    return rms(total, weight, eps).to(x.dtype), None, rstd_of(total, eps), total.to(stored)


@serves(layernorm.layer_norm_bwd)
def norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: None, rstd: Tensor, dres: Tensor | None = None,
    has_residual: bool = False, is_rms_norm: bool = False, x_dtype: torch.dtype | None = None, num_groups: int = 1,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert is_rms_norm and num_groups == 1 and bias is None
    eps = eps_of(x, rstd)
    dx, dw = gradients(lambda x, weight: rms(x, weight, eps), [x, weight], dy.float())
    if dres is not None:
        dx = dx + dres
    return dx.to(x_dtype), dw, None, dx.to(x.dtype) if has_residual else None


def gated_rms(x: Tensor, g: Tensor, weight: Tensor, eps: float | Tensor) -> Tensor:
    return rms(x, weight, eps) * g.float().sigmoid()


@serves(fused_norm_gate.layer_norm_gated_fwd)
def gated_norm_fwd(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, activation: str, eps: float,
    residual: Tensor | None = None, residual_dtype: torch.dtype | None = None, is_rms_norm: bool = False,
) -> tuple[Tensor, None, Tensor, Tensor]:  # fmt: skip
    assert is_rms_norm and bias is None and residual is None and residual_dtype is None and activation == "sigmoid"
    return gated_rms(x, g, weight, eps).to(x.dtype), None, rstd_of(x, eps), x


@serves(fused_norm_gate.layer_norm_gated_bwd)
def gated_norm_bwd(
    dy: Tensor, x: Tensor, g: Tensor, weight: Tensor, bias: None, activation: str, eps: float, mean: None,
    rstd: Tensor, **ignored: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dx, dg, dw = gradients(lambda x, g, weight: gated_rms(x, g, weight, eps), [x, g, weight], dy.float())
    return dx, dg, dw, None, None


@serves(activations.swiglu_fwd)
def swiglu_fwd(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    return (x.float() * x.float().sigmoid() * y.float()).to(x.dtype)


@serves(activations.swiglu_fwdbwd)
def swiglu_fwdbwd(
    x: Tensor, y: Tensor, g: Tensor, use_weight: bool = False, output_contiguous: bool = False
) -> tuple[Tensor | None, ...]:
    grads = gradients(swiglu_fwd, [x, y], g)
    return (*grads, swiglu_fwd(x, y)) if use_weight else tuple(grads)


@serves(cross_entropy.cross_entropy_fwd)
def cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float = 0.0, logit_scale: float = 1.0,
    logit_softcapping: float | None = None, process_group: None = None,
) -> tuple[Tensor, Tensor, Tensor, int, int]:  # fmt: skip
    assert label_smoothing == 0.0 and logit_scale == 1.0 and logit_softcapping is None
    loss = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="none")
    return loss, torch.zeros_like(loss), logits.float().logsumexp(-1), logits.shape[1], 0


@serves(cross_entropy.cross_entropy_bwd)
def cross_entropy_bwd(
    logits: Tensor, target: Tensor, lse: Tensor, dloss: Tensor, ignore_index: int, inplace_backward: bool,
    **ignored: Any,
) -> Tensor:  # fmt: skip
    dlogits = (logits.float() - lse.unsqueeze(-1)).exp() - F.one_hot(target.clamp(min=0), logits.shape[1])
    dlogits = torch.where((target != ignore_index).unsqueeze(-1), dlogits * dloss.unsqueeze(-1), 0).to(logits.dtype)
    return logits.copy_(dlogits) if inplace_backward else dlogits


@serves(linear_cross_entropy.fused_linear_cross_entropy_bwd)
def linear_cross_entropy_bwd(do: Tensor, dx: Tensor, dw: Tensor, db: Tensor | None) -> tuple[Tensor | None, ...]:
    return dx * do, dw * do, None if db is None else db * do


class RecurrentOnCPU(fla.backends.BaseBackend):
    """``fused_recurrent_kda`` calls an entry point of fla's registry for the operation kda."""

    backend_type = "cpu"

    def fused_recurrent_kda_fwd(
        self, *args: Any, inplace_final_state: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        assert not inplace_final_state
        return kda(*args, **kwargs)


@contextmanager
def fla_on_cpu() -> Iterator[None]:
    """Within, the entry points above run on the CPU; after, fla's registry is as it was."""
    functions = fla.backends._function_registries
    registries = [functions[fla.backends.unwrap(f)] for f in ENTRY_POINTS]
    registries.append(fla.backends._operation_registries["kda"])
    before = [dict(registry._backends) for registry in registries]
    try:
        for entry_point, implementation in ENTRY_POINTS.items():
            fla.backends.register(entry_point)(implementation)
        fla.backends.register("kda")(RecurrentOnCPU)
        yield
    finally:
        for registry, backends in zip(registries, before, strict=True):
            registry._backends = backends


@torch.no_grad()
def greedy_tokens(model: Any, ids: Tensor, tokens: int, mask: Tensor | None = None) -> Tensor:
    """What ``generate`` returns, by a whole forward pass for each token: from no cache, whose name transformers has
    changed."""
    for _ in range(tokens):
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids
