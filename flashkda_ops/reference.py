"""Kimi Delta Attention as its definition reads: one token after the other, in the inputs' own precision or better.

This is what every other path is tested against. It is differentiable by autograd, runs in any floating dtype (fp64
included) on any device, and reads ``cu_seqlens`` on the host; it is not meant to be fast.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["beta_activation", "l2norm", "log_decay", "recurrent_kda_reference"]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x * rsqrt(sum(x^2) + eps)`` over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def log_decay(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    use_gate_in_kernel: bool,
    lower_bound: float | None,
) -> Tensor:
    """The log decay of each token and key channel, from ``g [..., HV, K]``.

    * precomputed (``use_gate_in_kernel=False``): ``g`` itself;
    * bounded (``lower_bound`` given): ``lower_bound * sigmoid(exp(A_log) * (g + dt_bias))``;
    * unbounded: ``-exp(A_log) * softplus(g + dt_bias)``.
    """
    if not use_gate_in_kernel:
        return g
    z = g if dt_bias is None else g + dt_bias.to(g.dtype).view(g.shape[-2:])
    a = None if A_log is None else A_log.to(g.dtype).exp().unsqueeze(-1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(z if a is None else a * z)
    assert a is not None
    return -a * F.softplus(z)


def beta_activation(beta: Tensor, *, use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> Tensor:
    """``beta`` as given, or ``sigmoid(beta)``, or ``2 * sigmoid(beta)`` with ``allow_neg_eigval``."""
    if not use_beta_sigmoid_in_kernel:
        return beta
    return torch.sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)


def recurrent_kda_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The KDA recurrence (Kimi Linear, arXiv:2510.26692), token by token.

    For each value head, with the state ``S [V, K]``::

        S_t = S_{t-1} diag(exp(g_t)) + u_t k_t^T,    u_t = beta_t (v_t - S_{t-1} diag(exp(g_t)) k_t)
        o_t = scale * S_t q_t

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; value head ``j`` reads the query and key of head ``j // (HV // H)``.
        g: ``[B, T, HV, K]``, see :func:`log_decay`.
        beta: ``[B, T, HV]``, see :func:`beta_activation`.
        A_log: ``[HV]``. dt_bias: ``[HV, K]`` or ``[HV * K]``.
        initial_state: ``[N, HV, K, V]``, or ``[N, HV, V, K]`` with ``state_v_first``.
        cu_seqlens: ``[N + 1]``; with it ``B`` is 1. Rows outside ``[cu_seqlens[0], cu_seqlens[-1])`` give zeros.
        scale: defaults to ``K ** -0.5``.
        dtype: the precision of the computation.

    Returns:
        ``o [B, T, HV, V]`` and the final state, laid out as ``initial_state``, both in ``dtype``.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q * scale, k))
    alpha = log_decay(g, A_log, dt_bias, use_gate_in_kernel=use_gate_in_kernel, lower_bound=lower_bound).exp()
    beta = beta_activation(
        beta, use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval
    )

    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in pairwise(bounds)]

    rows: dict[tuple[int, int], Tensor] = {}
    states = []
    for n, (b, start, end) in enumerate(spans):
        if initial_state is None:
            S = v.new_zeros(HV, V, K)
        else:
            S = initial_state[n].to(dtype)
            S = S if state_v_first else S.transpose(-1, -2)
        for t in range(start, end):
            S = S * alpha[b, t].unsqueeze(-2)
            u = beta[b, t].unsqueeze(-1) * (v[b, t] - torch.einsum("hvk,hk->hv", S, k[b, t]))
            S = S + u.unsqueeze(-1) * k[b, t].unsqueeze(-2)
            rows[b, t] = torch.einsum("hvk,hk->hv", S, q[b, t])
        states.append(S if state_v_first else S.transpose(-1, -2))

    zero = v.new_zeros(HV, V)
    o = [rows.get((b, t), zero) for b in range(B) for t in range(T)]
    o_all = torch.stack(o).view(B, T, HV, V) if o else v.new_zeros(B, T, HV, V)
    shape = (0, HV, V, K) if state_v_first else (0, HV, K, V)
    return o_all, torch.stack(states) if states else v.new_zeros(shape)
