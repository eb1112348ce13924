"""Which path a call takes on a GPU with kernels, found without one: the op's own body runs on fake tensors, up to the
launch of a kernel or to the first line of the portable path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DEFAULTS, DIFFERENTIABLE, Call, make_call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from flashkda_ops import cuda, portable
from flashkda_ops.ops import (
    chunk_kda,
    chunk_kda_backward,
    chunk_kda_paged,
    chunk_kda_transition,
    plans,
    recurrent_kda_paged,
)

KERNEL, PORTABLE = "kernel", "portable"
ROWS = 3


class _Taken(Exception):
    pass


def _takes(path: str) -> Callable[..., Any]:
    def taken(*args: Any, **kwargs: Any) -> None:
        raise _Taken(path)

    return taken


@contextmanager
def gpu_with_kernels() -> Iterator[None]:
    """Within, tensors are fake, those of ``device="cuda"`` are on a GPU that this build has kernels for, and calls end
    where their path is taken. Addresses are offsets, as of memory that is aligned."""
    extension = SimpleNamespace(cuda_archs="90a", cuda_version="13.0", cutlass_version="4.2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_load", lambda: (extension, "built for 90a with CUDA 13.0, CUTLASS 4.2.0"))
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(cuda, "_address", lambda name, x: 0 if x is None else x.storage_offset() * x.element_size())
        patch.setattr(cuda, "layouts", lambda tensors, reading=None: object())  # each call has a plan of its own
        patch.setattr(cuda, "chunk_plan", lambda *args: SimpleNamespace())
        for kernel in (
            "chunk_kda", "chunk_kda_backward", "chunk_kda_paged", "chunk_kda_transition", "recurrent_kda_paged",
        ):  # fmt: skip
            patch.setattr(cuda, kernel, _takes(KERNEL))
        for path in (*(name for name in portable.__all__ if "kda" in name), "initial_state_gradient"):
            patch.setattr(portable, path, _takes(PORTABLE))
        patch.setattr(chunk_kda_paged, "on_rows", lambda forward, *args: forward(_gathered(*args)))
        cuda.device_reason.cache_clear()
        plans.clear()
        try:
            with FakeTensorMode():
                yield
        finally:
            cuda.device_reason.cache_clear()
            plans.clear()


def _gathered(pool: Tensor, indices: Tensor, *args: Any) -> Tensor:
    """What is read of a pool: itself a sum of operators that take an index."""
    return torch.empty(indices.shape[0], *pool.shape[1:], device="cuda")


def call_on_gpu(T: int, **options: Any) -> Call:
    """As ``make_call``; within :func:`gpu_with_kernels`."""
    with unset_fake_temporarily():
        call = make_call(T, **options)
    return {
        name: torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
        for name, x in call.items()
    }


def pool(call: Call, aligned: bool = True) -> Tensor:
    K, V = call["q"].shape[3], call["v"].shape[3]
    shape = (ROWS, call["v"].shape[2], *((V, K) if call.get("state_v_first") else (K, V)))
    strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    # A torch that was built without CUDA does not take an index into a tensor of that device.
    return torch.empty(ROWS * strides[0] + 1, device="cuda").as_strided(shape, strides, 0 if aligned else 1)


def _backward(a: Call) -> Any:
    mask = [a.get(name) is not None for name in DIFFERENTIABLE]
    arguments = DEFAULTS | a | {"do": torch.empty_like(a["v"]), "dht": None, "output_mask": mask}
    return chunk_kda_backward.run(chunk_kda_backward.Arguments(**arguments))


def _transition(a: Call) -> Any:
    names = chunk_kda_transition.Arguments._fields
    arguments = chunk_kda_transition.Arguments(**{name: x for name, x in a.items() if name in names})
    return chunk_kda_transition.op._init_fn(*arguments)


_BODIES: dict[str, Callable[[Call], Any]] = {
    "chunk_kda": lambda a: chunk_kda.run(chunk_kda.Arguments(**a)),
    "chunk_kda_backward": _backward,
    "chunk_kda_transition": _transition,
    "chunk_kda_paged": lambda a: chunk_kda_paged.run(chunk_kda_paged.Arguments(**a)),
    "recurrent_kda_paged": lambda a: recurrent_kda_paged.run(recurrent_kda_paged.Arguments(**a)),
}
OPS = tuple(_BODIES)


def path_of(op: str, call: Call) -> str:
    """``KERNEL`` or ``PORTABLE``; within :func:`gpu_with_kernels`."""
    with pytest.raises(_Taken) as taken:
        _BODIES[op](call)
    return str(taken.value)
