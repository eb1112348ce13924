"""The Kimi Delta Attention layer of fla, around the ops of this package."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashkda_ops import validation
from flashkda_ops.functional import chunk_kda, recurrent_kda_paged
from flashkda_ops.nn.norm import RMSNormGated
from flashkda_ops.nn.short_conv import ShortConvolution, validate_packing

__all__ = ["KimiDeltaAttention", "is_fla_layer"]


def is_fla_layer(module: nn.Module) -> bool:
    """Whether this is fla's layer, by name: fla is not imported for it."""
    return (type(module).__module__, type(module).__qualname__) == ("fla.layers.kda", "KimiDeltaAttention")


_States = tuple[Tensor | None, tuple[Tensor | None, ...]]


def _last_states(cache: Any, layer_idx: int | None) -> _States:
    """A layer's recurrent state and those of its convolutions, None where the cache has none."""
    none: _States = None, (None, None, None)
    if cache is None:
        return none
    if layer_idx is None:
        raise ValueError("layer_idx must be given to a layer that is called with past_key_values")
    if len(cache) <= layer_idx:
        return none
    last = cache[layer_idx]
    if last is None:  # of a cache of fla's that was reset
        return none
    state, conv_states = last["recurrent_state"], last["conv_state"] or none[1]
    if state is None or torch.compiler.is_compiling():
        return state, conv_states
    if torch.is_grad_enabled():  # the backward pass needs it as it is, and the cache may be updated where it is
        return state.clone(), conv_states
    if state.is_inference() and not torch.is_inference_mode_enabled():  # then nothing may update it in place
        return state.clone(), tuple(None if c is None else c.clone() for c in conv_states)
    return state, conv_states


def _validate_mask(mask: Tensor, x: Tensor) -> None:
    B, T, _ = x.shape
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor of shape [B, S], got a {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(
            f"attention_mask must have shape [B, S] with B = {B} and S at least T = {T}, as hidden_states has, "
            f"got {list(mask.shape)}"
        )
    validation.require_device("attention_mask", mask, x, lead="hidden_states")


class _Packing(NamedTuple):
    """A padded batch as one row of sequences, padding last: the shape of the batch, whatever the mask says."""

    destination: Tensor  # [B * T], of each token of the batch
    order: Tensor  # [B * T], its inverse
    cu_seqlens: Tensor  # [B + 1]

    @classmethod
    def of(cls, mask: Tensor) -> _Packing:
        """Of a mask ``[B, T]``."""
        real = mask.flatten()
        tokens = real.cumsum(0)
        padding = torch.cumsum(~real, 0)
        destination = torch.where(real, tokens, real.sum() + padding) - 1
        order = torch.empty_like(destination).scatter_(
            0, destination, torch.arange(real.shape[0], device=mask.device, dtype=destination.dtype)
        )
        return cls(destination, order, F.pad(mask.sum(1).cumsum(0), (1, 0)))

    def pack(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[1, B * T, D]``."""
        return x.flatten(0, 1).index_select(0, self.order).unsqueeze(0)

    def unpack(self, x: Tensor, like: Tensor) -> Tensor:
        """Back to ``[B, T, D]``. The rows of padding are zero, as the op leaves them."""
        return x.squeeze(0).index_select(0, self.destination).view(like.shape)


class KimiDeltaAttention(nn.Module):
    """Kimi Delta Attention (Kimi Linear, arXiv:2510.26692) as ``fla.layers.kda.KimiDeltaAttention`` has it.

    Takes fla's arguments, has its parameters under its names, loads its state dict and gives its outputs; in plain
    PyTorch around the ops, so that it compiles to one graph and runs on any device.

    Args:
        hidden_size: size of the input and the output.
        expand_v: ``V`` over ``K``.
        head_dim: ``K``.
        num_heads: query and key heads ``H``.
        num_v_heads: value heads ``HV``, a multiple of ``H``; ``H`` by default.
        mode: ``"chunk"`` or ``"fused_recurrent"``, for fla's callers: the op is chosen by the call.
        use_short_conv: convolve q, k and v.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        safe_gate: initialise ``A_log`` for the bounded gate, and require ``lower_bound``.
        lower_bound: of the log decay, in ``[-5, 0)``; the unbounded gate by default.
        conv_size: taps of the convolutions.
        conv_bias: add a bias in them.
        layer_idx: position in a cache.
        norm_eps: of the output norm.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        **kwargs: object,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be positive, got {num_heads}")
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        head_v_dim = int(head_dim * expand_v)
        if not math.isclose(head_dim * expand_v, head_v_dim, rel_tol=1e-5):
            raise ValueError(f"expand_v must make head_dim * expand_v an integer, got {head_dim} * {expand_v}")
        if num_v_heads < 1 or num_v_heads % num_heads != 0:
            raise ValueError(f"num_v_heads must be a multiple of num_heads = {num_heads}, got {num_v_heads}")
        if mode not in ("chunk", "fused_recurrent"):
            raise ValueError(f"mode must be chunk or fused_recurrent, got {mode}")
        if safe_gate and lower_bound is None:
            raise ValueError("lower_bound must be given with safe_gate=True")
        if lower_bound is not None and not -5 <= lower_bound < 0:
            raise ValueError(f"lower_bound must be in [-5, 0), got {lower_bound}")
        self.mode = mode
        self.allow_neg_eigval = allow_neg_eigval
        self.safe_gate = safe_gate
        self.lower_bound = lower_bound
        self.hidden_size = hidden_size
        self.expand_v = expand_v
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.conv_bias = conv_bias
        self.head_dim = self.head_k_dim = head_dim
        self.head_v_dim = head_v_dim
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.key_dim = num_heads * head_dim
        self.value_dim = num_v_heads * head_v_dim
        self.gate_dim = num_v_heads * head_dim
        self.layer_idx = layer_idx

        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(self.value_dim, conv_size, conv_bias)
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, head_v_dim, bias=False), nn.Linear(head_v_dim, self.gate_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        A = torch.ones(num_v_heads) if safe_gate else torch.empty(num_v_heads).uniform_(1, 16)
        self.A_log = nn.Parameter(A.log())
        # The inverse of softplus at time constants from 1e-3 to 1e-1.
        dt = torch.exp(torch.empty(self.gate_dim).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, head_v_dim, bias=False), nn.Linear(head_v_dim, self.value_dim, bias=True)
        )
        self.o_norm = RMSNormGated(head_v_dim, eps=norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """The layer's output, None for fla's callers, and the cache.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: ``[B, S]``, 0 for padding: its last ``T`` columns are used. Padding may be anywhere; the
                output is zero there.
            past_key_values: fla's cache, or a :class:`flashkda_ops.nn.StaticCache`: what the layer reads its states
                from and, with ``use_cache``, leaves them in. Without autograd, a call with one token a sequence updates
                them in place.
            use_cache: update the cache.
            output_attentions: accepted for fla's callers.
            cu_seqlens: (in ``kwargs``) ``[N + 1]``, packed sequences in a batch of one row, as
                :func:`flashkda_ops.chunk_kda` takes them; ``attention_mask`` is not used then.

        Raises:
            ValueError: naming the argument that is not as described.
        """
        x, cu_seqlens = hidden_states, kwargs.get("cu_seqlens")
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            shape = f"[B, T, hidden_size] = [B, T, {self.hidden_size}]"
            raise ValueError(f"hidden_states must have shape {shape}, got {list(x.shape)}")
        validate_packing("hidden_states", x, cu_seqlens)
        if attention_mask is not None and cu_seqlens is None:
            _validate_mask(attention_mask, x)
        B, T, _ = x.shape
        state, conv_states = _last_states(past_key_values, self.layer_idx)
        sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is not None and state.shape[0] != sequences:
            raise ValueError(
                "past_key_values must hold as many states as the batch has sequences, "
                f"got a batch of {sequences} and a cache of {state.shape[0]}"
            )
        # One token each on states that are there: these are updated where they are.
        in_place = T == 1 and cu_seqlens is None and use_cache and state is not None and not torch.is_grad_enabled()
        in_place = in_place and B > 0
        active = packing = None
        # Padding may hold anything, NaN too: the gradients of the weights are products with it.
        if cu_seqlens is not None:
            real = torch.arange(T, device=x.device) < cu_seqlens[-1]
            x = torch.where(real.unsqueeze(-1), x, 0)
        elif attention_mask is not None and B > 0:
            mask = attention_mask[:, attention_mask.shape[1] - T :].bool()
            x = torch.where(mask.unsqueeze(-1), x, 0)
            if in_place:
                active = mask.squeeze(1)
            else:
                packing = _Packing.of(mask)
                x, cu_seqlens = packing.pack(x), packing.cu_seqlens

        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            options = {"output_final_state": use_cache, "cu_seqlens": cu_seqlens, "active": active}
            q, conv_q = self.q_conv1d(q, cache=conv_states[0], **options)
            k, conv_k = self.k_conv1d(k, cache=conv_states[1], **options)
            v, conv_v = self.v_conv1d(v, cache=conv_states[2], **options)
            conv_states = (conv_q, conv_k, conv_v)
        else:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        tokens = (
            q.unflatten(-1, (-1, self.head_k_dim)),
            k.unflatten(-1, (-1, self.head_k_dim)),
            v.unflatten(-1, (-1, self.head_v_dim)),
            self.f_proj(x).unflatten(-1, (-1, self.head_k_dim)),
            self.b_proj(x),
        )
        kda: dict[str, Any] = {
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "lower_bound": self.lower_bound,
            "state_v_first": True,
        }
        if in_place:
            rows = torch.arange(B, device=x.device, dtype=torch.int32)
            if active is not None:
                rows = torch.where(active, rows, -1)  # out of range: neither read nor written
            assert state is not None
            o = recurrent_kda_paged(*tokens, state, rows, **kda)
        else:
            o, state = chunk_kda(
                *tokens, initial_state=state, output_final_state=bool(use_cache), cu_seqlens=cu_seqlens, **kda
            )[:2]
        if past_key_values is not None and use_cache:
            past_key_values.update(
                recurrent_state=state,
                conv_state=conv_states if self.use_short_conv else None,
                layer_idx=self.layer_idx,
                offset=T,
            )
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)))
        o = self.o_proj(o.flatten(2))
        if packing is not None:
            o = packing.unpack(o, hidden_states)
        return o, None, past_key_values
