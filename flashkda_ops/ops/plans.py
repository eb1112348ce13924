"""What follows from everything about a call but the addresses of its tensors: found once, kept for the calls like it.

A model calls an op with the same shapes, strides, dtypes and options layer after layer. Whether such a call is valid,
whether the kernels serve it, and what they are told but for addresses, takes longer to find out than to look up.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor

from flashkda_ops import cuda, padding, segments
from flashkda_ops.options import KdaOptions
from flashkda_ops.validation import Sizes, validate_state, validate_tokens

__all__ = ["Plan", "clear", "plan", "reason"]

_MOST = 1024


class Plan(NamedTuple):
    """Of a valid call: its sizes, its options, and what to launch where the kernels serve it.

    ``segments``: in how many the kernels take it, where sequences need not be left whole: without clusters of scans,
    and with. ``padded``: the kernels serve it with more channels, of zeros.
    """

    sizes: Sizes
    options: KdaOptions
    kernel: cuda.ChunkPlan | None
    segments: tuple[int, int]
    padded: bool = False


class _Call(NamedTuple):
    """What both directions of the chunk form take."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float | None
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    lower_bound: float | None
    state_v_first: bool


_plans: dict[Hashable, Plan] = {}


def clear() -> None:
    _plans.clear()


def plan(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], reading: cuda.Reading | None = None) -> Plan:
    """The plan of a call, from the tensors and the options of ``_Call``, and from what has been read of the tensors.
    Raises a ValueError where it is not valid."""
    if reading is None or reading[2] is None:  # else the extension has looked at the addresses
        cuda.require_addresses(tensors)
    key = (cuda.layouts(tensors, reading), options)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MOST:
            _plans.clear()
        found = _plans[key] = _make(_Call(*tensors, *options))  # type: ignore[arg-type]
    return found


def reason(tensors: tuple[Tensor | None, ...], sizes: Sizes) -> str | None:
    """Why the chunk kernels serve a valid call neither as it is nor with its heads filled up, or None if they do.

    Plans are made by it, and whoever has to say what is served before a call is made asks it too.
    """
    return cuda.chunk_kda_reason(*tensors, any_width=True) or padding.reason(sizes)  # type: ignore[arg-type]


def _make(call: _Call) -> Plan:
    cuda.require_addresses(call[:9])
    sizes = validate_tokens(call)
    validate_state("initial_state", call.initial_state, call.q, sizes, call.state_v_first)
    options = KdaOptions.of(call)
    served = call.q.is_cuda and reason(call[:9], sizes) is None
    if not served or padding.fits(sizes):
        return Plan(sizes, options, None, (1, 1), padded=served)
    kernel = cuda.chunk_plan(*call[:9], options, call.state_v_first)
    packed = call.cu_seqlens is not None
    without, with_clusters = (segments.of_call(sizes, packed=packed, clusters=clusters) for clusters in (False, True))
    return Plan(sizes, options, kernel, (without, with_clusters))
