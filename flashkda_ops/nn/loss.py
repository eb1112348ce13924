"""Cross entropy behind a projection, a few rows of logits at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashkda_ops import validation

__all__ = ["LinearCrossEntropyLoss"]

_IGNORED = -100  # no class, whatever ignore_index is


class _Formula(NamedTuple):
    """What a row's loss is, of its logits and its label."""

    ignore_index: int
    label_smoothing: float
    logit_scale: float
    logit_softcapping: float | None

    def rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits after scale and cap, in fp32 at least; and the labels, _IGNORED where the row does not count.

        A label that is no class makes its row NaN, so that its loss and its gradients are: any number there would be
        that of another class. The index itself is one that may be looked up.
        """
        counts = labels != self.ignore_index
        is_class = (labels >= 0) & (labels < logits.shape[-1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        scale = torch.full_like(labels, self.logit_scale, dtype=wide).masked_fill(counts & ~is_class, torch.nan)
        z = logits.to(wide) * scale.unsqueeze(-1)
        if self.logit_softcapping is not None:
            z = self.logit_softcapping * torch.tanh(z / self.logit_softcapping)
        return z, torch.where(is_class, labels, 0).masked_fill(~counts, _IGNORED)

    def of_logits(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        z, labels = self.rows(logits, labels)
        return F.cross_entropy(
            z, labels, ignore_index=_IGNORED, reduction=reduction, label_smoothing=self.label_smoothing
        )

    def of_parts(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        parts: int,
        wanted: tuple[bool, bool, bool] = (False, False, False),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The sum of the losses, and its gradients for x, weight and bias where wanted.

        They are made together, one part of the rows after the other, so that logits never exist at once.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = x.new_zeros((), dtype=wide)
        dx: list[Tensor] = []
        dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        dbias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        for rows, labels in zip(x.tensor_split(parts), target.tensor_split(parts), strict=True):
            z, labels = self.rows(F.linear(rows, weight, bias), labels)
            counts, label = (labels != _IGNORED).unsqueeze(-1), labels.unsqueeze(-1).clamp(min=0)
            log_p = F.log_softmax(z, -1)
            nll = -(1 - self.label_smoothing) * log_p.gather(-1, label)
            if self.label_smoothing:
                nll = nll - self.label_smoothing * log_p.mean(-1, keepdim=True)
            loss = loss + torch.where(counts, nll, 0).sum()
            if not any(wanted):
                continue
            d = log_p.exp() - self.label_smoothing / log_p.shape[-1]
            is_label = torch.arange(d.shape[-1], device=d.device) == label
            d = d - (1 - self.label_smoothing) * is_label.to(d.dtype)  # in whatever dtype is the default
            if self.logit_softcapping is not None:
                d = d * (1 - (z / self.logit_softcapping).square())
            d = torch.where(counts, d * self.logit_scale, 0)
            if dbias is not None:
                dbias = dbias + d.sum(0)
            d = d.to(x.dtype)
            if wanted[0]:
                dx.append(d @ weight.to(x.dtype))
            if dweight is not None:
                dweight = dweight + d.mT @ rows
        return (
            loss,
            torch.cat(dx) if wanted[0] else None,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None or bias is None else dbias.to(bias.dtype),
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses. Its gradients are made beside it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, parts: int, formula: _Formula
    ) -> Tensor:
        loss, *grads = formula.of_parts(x, weight, bias, target, parts, tuple(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True. What is compiled cannot be differentiated twice anyway, and says so.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "LinearCrossEntropyLoss with a weight has no second derivative: its gradients are made in the forward "
                "pass. Without a weight, of logits, it has one"
            )
        return (*(None if d is None else d * dloss.to(d.dtype) for d in ctx.saved_tensors), None, None, None)


class LinearCrossEntropyLoss(nn.Module):
    """The fused linear cross entropy of fla; and without a weight, its cross entropy of logits.

    A label that is neither a class nor ``ignore_index`` makes the loss NaN, and with it the gradients of its own row of
    ``x`` and those of ``weight`` and ``bias``: no label is taken for another, and nothing is read on the host. So it is
    on every device, eager and compiled, with and without a weight; ``F.cross_entropy`` raises on the CPU, and on a GPU
    fails an assertion after which no call works. ``FLASHKDA_CHECK=1`` makes eager calls raise, naming the label.

    Only the gradients that are asked for are computed: none under ``torch.no_grad``, no weight's for a frozen head.
    With a weight there is no second derivative.

    Args:
        ignore_index: the target of rows that do not count.
        label_smoothing: weight of the uniform distribution in the target, in [0, 1].
        logit_scale, logit_softcapping: logits ``z`` become ``cap * tanh(scale * z / cap)``.
        num_chunks: in how many parts logits are made at most.
        reduction: ``"mean"`` over the rows that count, or ``"sum"``.
        use_l2warp: with a weight, add ``l2_penalty_factor / rows * max(z)`` to the gradient of a row's largest logit.
        l2_penalty_factor: see ``use_l2warp``.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    # An object of fla's cross entropy of logits, whose class convert has exchanged for this one, has none of its own.
    num_chunks = 8
    use_l2warp = False
    l2_penalty_factor = 1e-4

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
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if num_chunks < 1:
            raise ValueError(f"num_chunks must be positive, got {num_chunks}")
        if logit_softcapping == 0:
            raise ValueError("logit_softcapping must be None (no cap) or a number other than 0, got 0")
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
        copied = LinearCrossEntropyLoss(
            self.ignore_index, self.label_smoothing, self.logit_scale, self.logit_softcapping, self.num_chunks,
            "mean", self.use_l2warp, self.l2_penalty_factor,
        )  # fmt: skip
        copied.reduction = self.reduction  # an object of fla's may also have none
        return copied

    def forward(self, x: Tensor, target: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The loss, fp32 (fp64 where ``x`` is).

        Args:
            x: ``[..., hidden]``; without a weight the logits, ``[..., V]``.
            target: as many labels as ``x`` has rows, of any integer dtype, in ``[0, V)`` or ``ignore_index``.
            weight: ``[V, hidden]``.
            bias: ``[V]``; with a weight alone.

        Returns:
            The loss, 0-dimensional. Where no row counts, the mean is 0 with a weight, as fla's, and NaN without.

        Raises:
            ValueError: naming the argument that is not as described.
        """
        LinearCrossEntropyLoss._validate(self, x, target, weight, bias)  # self may be an object of fla's class
        x, target = x.flatten(0, -2), target.flatten().long()
        formula = _Formula(self.ignore_index, self.label_smoothing, self.logit_scale, self.logit_softcapping)
        if weight is None:
            return formula.of_logits(x, target, self.reduction)
        penalty = None
        if self.use_l2warp:  # its gradient needs every row's largest logit: these are made at once
            logits = F.linear(x, weight, bias)
            loss = formula.of_logits(logits, target, "sum")
            largest = logits.max(-1).values.to(loss.dtype)
            penalty = 0.5 * self.l2_penalty_factor / max(x.shape[0], 1) * largest.square().sum()
        else:
            parts = min(self.num_chunks, -(-weight.shape[0] // x.shape[1]))
            needs_gradient = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            # What torch.func transforms is the plain formula, which has all derivatives.
            transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
            if torch.is_grad_enabled() and needs_gradient and not transformed:
                loss = _LinearCrossEntropy.apply(x, weight, bias, target, parts, formula)
            else:
                loss = formula.of_parts(x, weight, bias, target, parts)[0]
        if self.reduction == "mean":
            loss = loss / (target != self.ignore_index).sum().clamp(min=1)
        return loss if penalty is None else loss + (penalty - penalty.detach())

    def _validate(self, x: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        row = "V" if weight is None else "hidden"
        if x.dim() < 2 or x.shape[-1] == 0:
            raise ValueError(f"x must have shape [..., {row}], {row} at least 1, got {list(x.shape)}")
        if target.numel() != x.shape[:-1].numel():
            raise ValueError(
                f"target must have a label for each row of x, got shape {list(target.shape)} for x {list(x.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
            raise ValueError(f"target must hold labels of an integer dtype, got {str(target.dtype)[6:]}")
        if weight is None:
            if bias is not None:
                raise ValueError("bias must be None without a weight: x holds the logits")
        elif weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"weight must have shape [V, hidden] = [V, {x.shape[-1]}], V at least 1, got {list(weight.shape)}"
            )
        elif bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
        classes = x.shape[-1] if weight is None else weight.shape[0]
        has_values = not torch.compiler.is_compiling() and type(target) is Tensor and not target.is_meta
        if has_values and validation.checks_values(False, target):
            for label in target.flatten().tolist():
                if label != self.ignore_index and not 0 <= label < classes:
                    raise ValueError(
                        f"target must be in [0, {classes}), or ignore_index = {self.ignore_index}, got {label}"
                    )
