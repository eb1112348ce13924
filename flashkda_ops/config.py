"""What was built, and which path each op takes here."""

from __future__ import annotations

import torch

import flashkda_ops
from flashkda_ops import cuda

__all__ = ["show_config"]

_NO_KERNEL = "portable: no CUDA kernel yet"
_DECODE = (
    "CUDA kernel for K = V = 128, bf16 or fp16 tokens, an fp32 V-first pool and one token a sequence; else portable"
)


def show_config() -> None:
    """Print the versions, the extension's build, and which path each op takes on each device here, and why."""
    loaded, status = cuda.extension_status()
    print(f"flashkda_ops {flashkda_ops.__version__}, torch {torch.__version__}")
    print(f"extension: {status if loaded else 'none, ' + status}")
    print("cpu: every op takes the portable path (chunked PyTorch)")
    if not torch.cuda.is_available():
        print("cuda: no device here")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        reason = cuda.device_reason(device)
        print(f"{device} ({torch.cuda.get_device_name(device)}):")
        decode = _DECODE if reason is None else f"portable: {reason}"
        for op, path in (
            ("chunk_kda", _NO_KERNEL),
            ("chunk_kda_backward", _NO_KERNEL),
            ("chunk_kda_paged", _NO_KERNEL),
            ("recurrent_kda_paged", decode),
        ):
            print(f"  {op}: {path}")
