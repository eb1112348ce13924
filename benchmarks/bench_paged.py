"""Prefill on the rows of a pool, on a GPU: ``chunk_kda_paged`` beside gathering the rows, prefill and scattering them.

K = V = 128, bf16 tokens, packed, L2 norm, bounded gate and beta sigmoid in the kernel, V-first states; half of the
sequences have no initial state. A time is a median over replays of a CUDA graph, whose calls rotate among inputs, rows
and outputs that together exceed the L2 cache. ``gathered`` is the same op kept from its kernel on pools: PyTorch's
kernels move the rows around the kernel of ``chunk_kda``; with checkpoints, around the portable path. The floor moves
each token and each state that is read or written once, at the speed of a copy.

    python benchmarks/bench_paged.py
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from common import capture, copy_gb_s, graph_us, write

from flashkda_ops import chunk_kda_paged, cuda

D = 128
ROTATED_BYTES = 150e6  # three times the L2 cache of an H100
OPTIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "lower_bound": -5.0,
    "state_v_first": True,
}
# Parts of prompts, whole prompts, and parts beside sequences that decode.
BATCHES = {
    "1 x 2048": [2048],
    "4 x 512": [512] * 4,
    "16 x 128": [128] * 16,
    "64 x 32": [32] * 64,
    "2 x 992, 64 x 1": [992] * 2 + [1] * 64,
}
CASES = [(batch, heads, torch.float32, 0) for heads in (32, 8) for batch in BATCHES]
CASES += [(batch, 32, torch.bfloat16, 0) for batch in BATCHES]
CASES += [(batch, 32, torch.float32, 128) for batch in ("1 x 2048", "4 x 512")]


class Case:
    """The calls of one batch, each on tokens and rows of its own, and what one of them has to move."""

    def __init__(self, lengths: list[int], heads: int, pool_dtype: torch.dtype, every: int) -> None:
        N, T = len(lengths), sum(lengths)
        has_initial_state = torch.arange(N, device="cuda") % 2 == 0
        kept = [list(range(every, length + 1, every)) if every else [] for length in lengths]
        states = N + int(has_initial_state.sum()) + sum(map(len, kept))
        self.bytes = T * heads * (5 * D + 1) * 2 + states * heads * D * D * pool_dtype.itemsize
        self.copies = -(-int(ROTATED_BYTES) // self.bytes)
        rows = N + N * max(map(len, kept))
        self.pool = torch.randn(self.copies * rows, heads, D, D, device="cuda", dtype=pool_dtype)
        common: dict[str, Any] = {
            "A_log": torch.rand(heads, device="cuda"),
            "dt_bias": torch.rand(heads, D, device="cuda"),
            "cu_seqlens": torch.tensor([0, *lengths], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32),
            "has_initial_state": has_initial_state,
        }
        if every:
            common["checkpoint_offsets"] = torch.tensor(kept, device="cuda", dtype=torch.int32)
        self.calls = []
        for copy in range(self.copies):
            slots = torch.randperm(rows, device="cuda", dtype=torch.int32) + copy * rows
            call = {x: torch.randn(1, T, heads, D, device="cuda", dtype=torch.bfloat16) for x in ("q", "k", "v", "g")}
            call["beta"] = torch.randn(1, T, heads, device="cuda", dtype=torch.bfloat16)
            call |= common | OPTIONS | {"state_pool": self.pool, "state_indices": slots[:N]}
            if every:
                call["checkpoint_indices"] = slots[N:].view(N, -1)
            self.calls.append(call)

    def kernel(self, copy: int) -> torch.Tensor:
        return chunk_kda_paged(**self.calls[copy])

    def gathered(self, copy: int) -> torch.Tensor:
        with mock.patch.object(cuda, "chunk_kda_paged_reason", return_value="gathered"):
            return chunk_kda_paged(**self.calls[copy])


def main() -> None:
    torch.manual_seed(0)
    if reason := cuda.device_reason(torch.device("cuda", 0)):
        raise SystemExit(f"flashkda_ops has no kernels here: {reason}")
    ceiling = copy_gb_s()
    rows = []
    print("batch            heads pool     checkpoints |  floor |  kernel (x floor) | gathered (x kernel)")
    for batch, heads, pool_dtype, every in CASES:
        case = Case(BATCHES[batch], heads, pool_dtype, every)
        impls = {"flashkda_ops": case.kernel, "gathered": case.gathered}
        times = graph_us({name: capture(call, case.copies) for name, call in impls.items()}, case.copies)
        floor, pool = case.bytes / ceiling / 1e3, str(pool_dtype).removeprefix("torch.")
        about = {"batch": batch, "heads": heads, "pool": pool, "checkpoint_every": every}
        for name, (us, spread) in times.items():
            rows.append(about | {"impl": name, "graph_us": us, "spread": spread, "floor_us": floor})
        (ours, _), (other, _) = times["flashkda_ops"], times["gathered"]
        line = f"{batch:16} {heads:5} {pool:8} {every or '':>11} | {floor:6.1f} | {ours:7.1f} ({ours / floor:5.2f})"
        print(f"{line} | {other:8.1f} ({other / ours:5.2f})", flush=True)
    print(write("paged", rows, ceilings={"copy_gb_s": ceiling}))


if __name__ == "__main__":
    main()
