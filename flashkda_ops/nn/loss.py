"""Cross entropy behind a projection, a few rows of logits at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LinearCrossEntropyLoss"]


def _transformed(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses. Gradients are made beside it, one part after the other, so that logits never exist at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        parts: int,
        ignore_index: int,
        label_smoothing: float,
        logit_scale: float,
        logit_softcapping: float | None,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = x.new_zeros((), dtype=wide)
        dx: list[Tensor] = []
        dweight = torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for rows, labels in zip(x.tensor_split(parts), target.tensor_split(parts), strict=True):
            z = _transformed(F.linear(rows, weight, bias), logit_scale, logit_softcapping)
            log_p = F.log_softmax(z, -1)
            valid = (labels != ignore_index).unsqueeze(-1)
            label = labels.unsqueeze(-1).clamp(min=0)
            nll = -(1 - label_smoothing) * log_p.gather(-1, label)
            if label_smoothing:
                nll = nll - label_smoothing * log_p.mean(-1, keepdim=True)
            loss = loss + torch.where(valid, nll, 0).sum()
            d = log_p.exp() - label_smoothing / log_p.shape[-1]
            d = d - (1 - label_smoothing) * (torch.arange(d.shape[-1], device=d.device) == label)
            if logit_softcapping is not None:
                d = d * (1 - (z / logit_softcapping).square())
            d = torch.where(valid, d * logit_scale, 0)
            if dbias is not None:
                dbias = dbias + d.sum(0)
            d = d.to(x.dtype)
            dx.append(d @ weight.to(x.dtype))
            dweight = dweight + d.mT @ rows
        if dbias is not None and bias is not None:
            dbias = dbias.to(bias.dtype)
        ctx.save_for_backward(torch.cat(dx), dweight.to(weight.dtype), dbias)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if d is None else d * dloss.to(d.dtype) for d in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)


def _of_logits(loss: LinearCrossEntropyLoss, logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    z = _transformed(logits, loss.logit_scale, loss.logit_softcapping)
    return F.cross_entropy(
        z, target, ignore_index=loss.ignore_index, reduction=reduction, label_smoothing=loss.label_smoothing
    )


class LinearCrossEntropyLoss(nn.Module):
    """The fused linear cross entropy of fla; and without a weight, its cross entropy of logits.

    Args:
        ignore_index: the target of rows that do not count.
        label_smoothing: weight of the uniform distribution in the target.
        logit_scale, logit_softcapping: logits ``z`` become ``cap * tanh(scale * z / cap)``.
        num_chunks: in how many parts logits are made at most.
        reduction: ``"mean"`` over the rows that count, or ``"sum"``.
        use_l2warp: with a weight, add ``l2_penalty_factor / rows * max(z)`` to the gradient of a row's largest logit.
        l2_penalty_factor: see ``use_l2warp``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        logit_softcapping: float | None = None,
        num_chunks: int = 8,
        reduction: str = "mean",
        use_l2warp: bool = False,
        l2_penalty_factor: float = 1e-4,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {reduction}")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.logit_softcapping = logit_softcapping
        self.num_chunks = num_chunks
        self.reduction = reduction
        self.use_l2warp = use_l2warp
        self.l2_penalty_factor = l2_penalty_factor

    def __copy__(self) -> LinearCrossEntropyLoss:
        """fla's models copy their loss to change its reduction, and the compiler traces no copy but one spelled out."""
        return LinearCrossEntropyLoss(
            self.ignore_index, self.label_smoothing, self.logit_scale, self.logit_softcapping, self.num_chunks,
            self.reduction, self.use_l2warp, self.l2_penalty_factor,
        )  # fmt: skip

    def forward(self, x: Tensor, target: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The loss, fp32.

        Args:
            x: ``[..., hidden]``; without a weight the logits, ``[..., V]``.
            target: ``[...]``, in ``[0, V)`` or ``ignore_index``.
            weight: ``[V, hidden]``.
            bias: ``[V]``.
        """
        x, target = x.flatten(0, -2), target.flatten()
        if weight is None:
            return _of_logits(self, x, target, self.reduction)
        penalty = None
        if self.use_l2warp:  # its gradient needs every row's largest logit: these are made at once
            logits = F.linear(x, weight, bias)
            loss = _of_logits(self, logits, target, "sum")
            largest = logits.max(-1).values.to(loss.dtype)
            penalty = 0.5 * self.l2_penalty_factor / x.shape[0] * largest.square().sum()
        else:
            parts = min(self.num_chunks, -(-weight.shape[0] // x.shape[1]))
            loss = _LinearCrossEntropy.apply(
                x, weight, bias, target, parts, self.ignore_index, self.label_smoothing, self.logit_scale,
                self.logit_softcapping,
            )  # fmt: skip
        if self.reduction == "mean":
            loss = loss / (target != self.ignore_index).sum().clamp(min=1)
        return loss if penalty is None else loss + (penalty - penalty.detach())
