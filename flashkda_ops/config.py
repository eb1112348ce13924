"""What was built, and which path each op takes here."""

from __future__ import annotations

import torch

import flashkda_ops
from flashkda_ops import cuda
from flashkda_ops.padding import NARROWEST, WIDTH

__all__ = ["show_config"]

_TOKENS = "bf16 or fp16 tokens"
_WIDE = f"K = V = {WIDTH}"
_CHUNK = f"for K and V of {NARROWEST} to {WIDTH}, {_TOKENS}"
_COPIES = f"on copies filled up to {WIDTH} where they have fewer"
_KERNELS = {
    "chunk_kda": f"CUDA kernel {_CHUNK}, without intermediate states; {_COPIES}",
    "chunk_kda_backward": f"CUDA kernels {_CHUNK}; {_COPIES}",
    "chunk_kda_transition": f"CUDA kernel for {_WIDE}, {_TOKENS}",
    "chunk_kda_paged": (
        f"the kernel of chunk_kda, {_CHUNK}; on the pool in place for {_WIDE} and rows aligned to 16 bytes, else on "
        "copies of rows, without checkpoints"
    ),
    "recurrent_kda_paged": f"CUDA kernels for {_WIDE}, {_TOKENS}, rows aligned to 16 bytes",
}


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
        for op, kernel in _KERNELS.items():
            path = f"{kernel} (else the portable path)" if reason is None else f"portable path: {reason}"
            print(f"  {op}: {path}")
