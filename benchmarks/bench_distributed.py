"""KDA over the GPUs of a node beside one of them: context parallel, and tensor parallel over heads.

One long row, K = V = 128, bf16 tokens, L2 norm, bounded gate and beta sigmoid in the kernel, in the gate regimes of
``bench_prefill.py``. A time is a median over runs, each the slowest rank's between two barriers; implementations
alternate. ``graph_us`` is of replays of a CUDA graph, which holds the exchange too; ``eager_us`` starts on idle GPUs.
``error`` is the difference to one GPU, of the output (forward) and the worst gradient (forward + backward), as graphs
leave them.

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
    split = {name: call[name].chunk(size, dim)[rank].contiguous() for name in (*TOKENS, "o") if name in call}
    if dim == 2:
        split |= {name: call[name].chunk(size)[rank].contiguous() for name in ("A_log", "dt_bias") if name in call}
    return {**call, **split}


def leaves_of(call: Call) -> Call:
    return {**call, **{name: call[name].detach().requires_grad_() for name in LEAVES}}


@torch.no_grad()
def forward(function: Callable[..., Any], call: Call) -> Call:
    return {"o": function(**call)[0]}


def forward_backward(function: Callable[..., Any], call: Call) -> Call:
    o = function(**call)[0]
    grads = torch.autograd.grad(o, [call[name] for name in LEAVES], call["v"].detach())
    return dict(zip(LEAVES, grads, strict=True))


def captured(call: Callable[[], Call]) -> tuple[Callable[[], None], Call]:
    """A replay of the call, and what it returns."""
    results: Call = {}
    return capture(lambda _: results.update(call()), 1).replay, results


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


def worst_difference(one: Call, mode: str, results: Call) -> float:
    """The worst rank's and tensor's difference to one GPU's results."""
    expected = parts(one, 1 if mode == "context_parallel" else 2)
    found = []
    for name, x in results.items():
        if mode == "context_parallel" and name in ("A_log", "dt_bias"):
            x = x.clone()
            dist.all_reduce(x)
        found.append(error(x, expected[name].double()))
    worst = torch.tensor(found, device=x.device).amax()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


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
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
        dist.init_process_group("nccl", device_id=gpu)
    else:
        dist.init_process_group("gloo")
    tokens = options.tokens or (131072 if device == "cuda" else 256)
    head_dim = 128 if device == "cuda" else 16
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    parallel = partial(context_parallel_chunk_kda, mesh=group, check_ranks=False)

    rows = []
    for regime in options.regimes:
        whole = leaves_of(make_call(tokens, options.heads, head_dim, regime, device))
        by_tokens, by_heads = leaves_of(parts(whole, 1)), leaves_of(parts(whole, 2))
        for direction, take in (("forward", forward), ("forward_backward", forward_backward)):
            calls: dict[str, Callable[[], Call]] = {
                "one": partial(take, flashkda_ops.chunk_kda, whole),
                "context_parallel": partial(take, parallel, by_tokens),
                "tensor_parallel": partial(take, flashkda_ops.chunk_kda, by_heads),
            }
            times = {"eager_us": slowest_us(calls, device, options.runs)}
            if device == "cuda" and not options.eager:
                graphs = {mode: captured(call) for mode, call in calls.items()}
                times["graph_us"] = slowest_us({m: replay for m, (replay, _) in graphs.items()}, device, options.runs)
                results = {mode: x for mode, (_, x) in graphs.items()}
                del graphs
            else:
                results = {mode: call() for mode, call in calls.items()}
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
                if mode != "one":
                    row["error"] = worst_difference(results["one"], mode, results[mode])
                rows.append(row)
                if rank == 0:
                    print({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    if rank == 0 and device == "cuda":
        print(write("distributed", rows, ranks=size))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
