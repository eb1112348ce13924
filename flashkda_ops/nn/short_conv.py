"""Causal depthwise convolution over time, in plain PyTorch: what a compiler fuses, on any device, with its state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashkda_ops import validation

__all__ = ["ShortConvolution", "validate_packing"]


def validate_packing(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """The bounds of sequences that are packed in the one row of ``x [1, T, D]``."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of shape [N + 1], got a {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1], N at least 1, got {list(cu_seqlens.shape)}")
    validation.require_dtype("cu_seqlens", cu_seqlens, validation.INDEX_DTYPES)
    validation.require_device("cu_seqlens", cu_seqlens, x, lead=name)
    if x.shape[0] != 1:
        raise ValueError(f"{name} must have a batch size of 1 with cu_seqlens, got {x.shape[0]}")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# Every index that follows from cu_seqlens is clamped: malformed bounds give wrong rows, and never a failed assertion on
# the device, after which no call works.


def _convolve(x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Sum of ``weight[:, W - 1 - j]`` times the input ``j`` tokens back, in fp32 at least."""
    T, W = x.shape[1], weight.shape[1]
    dtype = _wide(x)
    taps = weight.to(dtype).unbind(1)
    if cu_seqlens is None:
        past = x.new_zeros(x.shape[0], W - 1, x.shape[2]) if state is None else state[:, :, 1:].mT.to(x.dtype)
        history = torch.cat((past, x), 1)
        return sum((history[:, j : j + T].to(dtype) * taps[j] for j in range(1, W)), history[:, :T].to(dtype) * taps[0])
    token = torch.arange(T, device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    position = token - cu_seqlens[sequence]
    history = F.pad(x, (0, 0, W - 1, 0))
    y = x.to(dtype) * taps[W - 1]
    for back in range(1, W):
        tap: Tensor | int = 0  # what lies before the start of the sequence
        if state is not None:
            # Rows past the last sequence read the state of the last one: what becomes of them is not used.
            column = (W - back + position).clamp(0, W - 1)
            tap = state[sequence.clamp(max=state.shape[0] - 1), :, column].to(x.dtype)
        inside = (position >= back).unsqueeze(-1)
        y = y + torch.where(inside, history[:, W - 1 - back : W - 1 - back + T], tap).to(dtype) * taps[W - 1 - back]
    return y


def _final_state(x: Tensor, W: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last ``W`` inputs of each sequence, ``[N, D, W]``, the newest last."""
    if cu_seqlens is None:
        past = x.new_zeros(x.shape[0], W, x.shape[2]) if state is None else state.mT.to(x.dtype)
        return torch.cat((past, x), 1)[:, -W:].mT.contiguous()
    if x.shape[1] == 0:
        return x.new_zeros(cu_seqlens.shape[0] - 1, x.shape[2], W) if state is None else state.to(x.dtype, copy=True)
    window = torch.arange(W, device=x.device, dtype=cu_seqlens.dtype)
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    row = end - W + window
    past = x.new_zeros(())
    if state is not None:
        column = (window + end - start).clamp(0, W - 1)  # the state moves on by the length of the sequence
        past = state.to(x.dtype).gather(2, column.unsqueeze(1).expand(-1, x.shape[2], -1).long()).mT
    return torch.where((row >= start).unsqueeze(-1), x[0, row.clamp(0, x.shape[1] - 1)], past).mT.contiguous()


class ShortConvolution(nn.Conv1d):
    """The short convolution of fla: its parameters, arguments and state, in plain PyTorch.

    Args:
        hidden_size: channels ``D``.
        kernel_size: taps ``W``.
        bias: add a bias.
        activation: ``"silu"`` (``"swish"``) or None.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ("silu", "swish", None):
            raise ValueError(f"activation must be silu, swish or None, got {activation}")
        super().__init__(
            hidden_size, hidden_size, kernel_size, padding=kernel_size - 1, groups=hidden_size, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.hidden_size = hidden_size
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        *,
        active: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution of ``x``, and the state after it.

        Args:
            x: ``[B, T, D]``.
            residual: ``[B, T, D]``, added to the result.
            mask: ``[B, T]``, multiplied with ``x``, of which nothing is read where it is 0; not with ``cu_seqlens``.
            cache: ``[N, D, W]``, the last ``W`` inputs of each sequence, the newest last; zeros by default.
            output_final_state: return the state. That of a dense batch of one token a sequence, without autograd, is
                ``cache``, updated in place.
            cu_seqlens: ``[N + 1]``, as :func:`flashkda_ops.chunk_kda` takes them.
            chunk_indices: accepted for fla's callers; nothing needs it.
            active: ``[N]`` bool, where the cache is updated in place: the others' states stay as they are.

        Returns:
            ``[B, T, D]`` in the dtype of ``x`` (computed in fp32); ``[N, D, W]`` or None.

        Raises:
            ValueError: naming the argument that is not as described.
        """
        weight = self.weight.squeeze(1)
        D, W = weight.shape
        if x.dim() != 3 or x.shape[2] != D:
            raise ValueError(f"x must have shape [B, T, D] = [B, T, {D}], got {list(x.shape)}")
        validate_packing("x", x, cu_seqlens)
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cache is not None and cache.shape != (sequences, D, W):
            raise ValueError(f"cache must have shape [N, D, W] = {[sequences, D, W]}, got {list(cache.shape)}")
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("mask must be None with cu_seqlens")
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask must have shape [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
            mask = mask.unsqueeze(-1)
            x = torch.where(mask != 0, x * mask, 0)  # NaN where the mask is 0 stays there
        y = _convolve(x, weight, cache, cu_seqlens)
        state = None
        if output_final_state:
            state = _final_state(x, weight.shape[1], cache, cu_seqlens)
            if cache is not None and cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled():
                state = cache.copy_(state if active is None else torch.where(active[:, None, None], state, cache))
        if self.bias is not None:
            y = y + self.bias
        if self.activation is not None:
            y = F.silu(y)
        if residual is not None:
            y = y + residual
        return y.to(x.dtype), state
