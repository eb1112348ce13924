"""What a call of any of the ops says, apart from its states."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["Call", "KdaOptions"]


class Call(Protocol):
    """What the arguments of all ops have in common."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def g(self) -> Tensor: ...
    @property
    def beta(self) -> Tensor: ...
    @property
    def A_log(self) -> Tensor | None: ...
    @property
    def dt_bias(self) -> Tensor | None: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def use_qk_l2norm_in_kernel(self) -> bool: ...
    @property
    def use_gate_in_kernel(self) -> bool: ...
    @property
    def use_beta_sigmoid_in_kernel(self) -> bool: ...
    @property
    def allow_neg_eigval(self) -> bool: ...
    @property
    def lower_bound(self) -> float | None: ...


class KdaOptions(NamedTuple):
    """The options of the recurrence that are no tensors."""

    scale: float
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    lower_bound: float | None = None

    @classmethod
    def of(cls, call: Call) -> KdaOptions:
        """Those of a call, with the default ``scale`` filled in."""
        return cls(
            call.q.shape[-1] ** -0.5 if call.scale is None else call.scale,
            call.use_qk_l2norm_in_kernel,
            call.use_gate_in_kernel,
            call.use_beta_sigmoid_in_kernel,
            call.allow_neg_eigval,
            call.lower_bound,
        )
