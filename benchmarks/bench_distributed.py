"""KDA over the GPUs of a node beside one of them: context parallel, and tensor parallel over heads.

One long row, K = V = 128, bf16 tokens, L2 norm, bounded gate and beta sigmoid in the kernel, in the gate regimes of
``bench_prefill.py``. A time is a median over runs, each the slowest rank's between two barriers; implementations
alternate. ``graph_us`` is of replays of a CUDA graph, which holds the exchange too; ``eager_us`` starts on idle GPUs.
``error`` is the difference to one GPU, of the output (forward) and the worst gradient (forward + backward).

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py [--tokens 131072] [--heads 16] [--regimes fast slow]
                                                                [--eager]

``--eager`` takes no graphs. Without GPUs it runs with gloo in a small size, and writes no file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from common import capture, error, write
from torch import Tensor

import flashkda_ops
from flashkda_ops.distributed import context_parallel_chunk_kda

Call = dict[str, Any]
TOKENS = ("q", "k", "v", "g", "beta")
LEAVES = (*TOKENS, "A_log", "dt_bias")
REGIMES = {"fast": 0.0, "slow": -8.0}


def make_call(tokens: int, heads: int, head_dim: int, regime: str, device: str) -> Call:
    """The whole row, the same on all ranks."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    return {
        **{name: randn(1, tokens, heads, head_dim) for name in TOKENS[:4]},
        "beta": randn(1, tokens, heads),
        "A_log": torch.rand(heads, generator=generator, device=device),
        "dt_bias": torch.rand(heads, head_dim, generator=generator, device=device) + REGIMES[regime],
        "lower_bound": -5.0,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }


def parts(call: Call, dim: int) -> Call:
    """This rank's tokens (``dim`` 1) or heads (``dim`` 2)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    split = {name: call[name].chunk(size, dim)[rank].contiguous() for name in TOKENS}
    if dim == 2:
        split |= {name: call[name].chunk(size)[rank].contiguous() for name in ("A_log", "dt_bias")}
    return {**call, **split}


def leaves_of(call: Call) -> Call:
    return {**call, **{name: call[name].detach().requires_grad_() for name in LEAVES}}


def forward(function: Callable[..., Any], call: Call) -> Tensor:
    return function(**call)[0]


def forward_backward(function: Callable[..., Any], call: Call) -> tuple[Tensor, ...]:
    o = function(**call)[0]
    return torch.autograd.grad(o, [call[name] for name in LEAVES], call["v"].detach())


def slowest_us(calls: dict[str, Callable[[], object]], device: str, runs: int) -> dict[str, tuple[float, float]]:
    """Median of each call over runs of its slowest rank, and the spread (interquartile range over median)."""
    samples = torch.zeros(len(calls), runs, dtype=torch.float64, device=device)
    for run in range(-2, runs):
        for i, call in enumerate(calls.values()):
            if device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if run >= 0:
                samples[i, run] = (time.perf_counter() - start) * 1e6
    dist.all_reduce(samples, dist.ReduceOp.MAX)
    result = {}
    for name, times in zip(calls, samples.tolist(), strict=True):
        low, median, high = statistics.quantiles(times, n=4)
        result[name] = (median, (high - low) / median)
    return result


def errors(whole: Call, by_tokens: Call, by_heads: Call, parallel: Callable[..., Any]) -> dict[str, dict[str, float]]:
    """Differences to one GPU, the worst rank's."""
    o, grads = forward(flashkda_ops.chunk_kda, whole), forward_backward(flashkda_ops.chunk_kda, whole)
    found = {}
    for mode, call, function, dim in (
        ("context_parallel", by_tokens, parallel, 1),
        ("tensor_parallel", by_heads, flashkda_ops.chunk_kda, 2),
    ):
        expected = parts({**whole, "o": o, **dict(zip(LEAVES, grads, strict=True))}, dim)
        actual = dict(zip(LEAVES, forward_backward(function, call), strict=True))
        if dim == 1:
            for name in ("A_log", "dt_bias"):
                dist.all_reduce(actual[name])
        expected_o = o.chunk(dist.get_world_size(), dim)[dist.get_rank()]
        worst = [
            error(forward(function, call).detach(), expected_o.detach().double()),
            max(error(actual[name], expected[name].double()) for name in LEAVES),
        ]
        worst_of_all = torch.tensor(worst, device=o.device)
        dist.all_reduce(worst_of_all, dist.ReduceOp.MAX)
        found[mode] = dict(zip(("forward", "forward_backward"), worst_of_all.tolist(), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    tokens = options.tokens or (131072 if device == "cuda" else 256)
    head_dim = 128 if device == "cuda" else 16
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    parallel = partial(context_parallel_chunk_kda, mesh=group, check_ranks=False)

    rows = []
    for regime in options.regimes:
        whole = leaves_of(make_call(tokens, options.heads, head_dim, regime, device))
        by_tokens, by_heads = leaves_of(parts(whole, 1)), leaves_of(parts(whole, 2))
        difference = errors(whole, by_tokens, by_heads, parallel)
        for direction, take in (("forward", forward), ("forward_backward", forward_backward)):
            calls: dict[str, Callable[[], object]] = {
                "one": partial(take, flashkda_ops.chunk_kda, whole),
                "context_parallel": partial(take, parallel, by_tokens),
                "tensor_parallel": partial(take, flashkda_ops.chunk_kda, by_heads),
            }
            if direction == "forward":
                calls = {mode: torch.no_grad()(call) for mode, call in calls.items()}
            times = {"eager_us": slowest_us(calls, device, options.runs)}
            if device == "cuda" and not options.eager:
                graphs = {mode: capture(lambda _, call=call: call(), 1) for mode, call in calls.items()}
                times["graph_us"] = slowest_us({m: g.replay for m, g in graphs.items()}, device, options.runs)
                del graphs
            for mode in calls:
                row: dict[str, Any] = {
                    "shape": f"T{tokens}_H{options.heads}",
                    "regime": regime,
                    "impl": "flashkda_ops",
                    "mode": mode,
                    "direction": direction,
                    "ranks": 1 if mode == "one" else size,
                }
                for kind, of_modes in times.items():
                    row[kind], row["spread"] = of_modes[mode]
                    row[f"times_one_{kind.removesuffix('_us')}"] = of_modes["one"][0] / of_modes[mode][0]
                if mode in difference:
                    row["error"] = difference[mode][direction]
                rows.append(row)
                if rank == 0:
                    print({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    if rank == 0 and device == "cuda":
        print(write("distributed", rows, ranks=size))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
