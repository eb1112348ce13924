"""Training on a GPU: forward, backward and both of ``flashkda_ops.chunk_kda`` beside its peers.

K = V = 128, bf16 tokens, L2 norm, bounded gate and beta sigmoid in the kernel, no initial or final state, in the gate
regimes of ``bench_prefill.py``; gradients of q, k, v, g, beta, A_log and dt_bias. ``cudnn`` and ``flashkda_ops
(plain)`` take q and k normalised, g and beta activated, both fp32: cuDNN's backward does none of that on Hopper, and
applying it and its derivatives is not timed.

Medians, implementations alternating; each call moves more than the L2 cache holds. ``fwd_us``, ``bwd_us`` and
``fwd_bwd_us`` are eager, on an idle GPU, so what the host takes to launch counts; ``*_gpu_us`` starts with the launches
queued. ``peak_gib`` is the most memory that forward + backward take above the inputs, gradients included. The floor
moves each token, output and gradient once at the speed of a copy.

    python benchmarks/bench_training.py [--shapes T4096_H16] [--regimes slow] [--impls flashkda_ops fla] [--quick]

fla's autotuner takes minutes a number of heads. ``--quick`` takes few samples and writes no file.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from bench_prefill import DEVICE, DISTRIBUTIONS, REGIMES, Call, D, Row, Shape, make_calls, named, package
from common import copy_gb_s, gpu_us, version, write
from torch import Tensor

import flashkda_ops
from flashkda_ops import cuda
from flashkda_ops.reference import l2norm, log_decay

SHAPES = ("H64_fixed", "H64_1024x8", "T4096_H16")
LEAVES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
QUEUED_CYCLES = 16_000_000  # about 9 ms, in which any of these calls has been launched: fla's take up to 6

# Each takes the keyword arguments of a call to its leaves and to what returns the output from them.
Trained = tuple[list[Tensor], Callable[[], Tensor]]


def leaves_of(call: Call) -> list[Tensor]:
    return [x.requires_grad_() for name in LEAVES if (x := call.get(name)) is not None]


def ours(call: Call) -> Trained:
    return leaves_of(call), lambda: flashkda_ops.chunk_kda(**call)[0]


def plain(call: Call) -> Call:
    """The call with its norms, gate and sigmoid applied."""
    gate = {"use_gate_in_kernel": True, "lower_bound": call["lower_bound"]}
    return {
        "q": l2norm(call["q"].float()).bfloat16(),
        "k": l2norm(call["k"].float()).bfloat16(),
        "v": call["v"].clone(),
        "g": log_decay(call["g"].float(), call["A_log"], call["dt_bias"], **gate),
        "beta": call["beta"].float().sigmoid(),
        "cu_seqlens": call["cu_seqlens"],
    }


def ours_plain(call: Call) -> Trained:
    return ours(plain(call))


def cudnn(call: Call) -> Trained:
    from cudnn.linear_attention.ops import kimi_delta_attention

    call = plain(call)
    ends = torch.tensor([0, call["q"].shape[1]], device=DEVICE) if call["cu_seqlens"] is None else call["cu_seqlens"]
    leaves, ends = [call[name][0].requires_grad_() for name in ("q", "k", "v", "g", "beta")], ends.int()
    return leaves, lambda: kimi_delta_attention(*leaves, ends)[0].unsqueeze(0)


def fla(call: Call) -> Trained:
    from fla.ops.kda import chunk_kda

    call = call | {"dt_bias": call["dt_bias"].flatten()}
    return leaves_of(call), lambda: chunk_kda(**call, safe_gate=True)[0]  # its fastest path


IMPLS: dict[str, Callable[[Call], Trained]] = {
    "flashkda_ops": ours,
    "flashkda_ops (plain)": ours_plain,
    "fla": fla,
    "cudnn": cudnn,
}


def training_call(shape: Shape, regime: str) -> Call:
    (call,) = make_calls(shape, regime, 1)
    return call | {"initial_state": None, "output_final_state": False}


def moved_bytes(shape: Shape) -> tuple[int, int]:
    """Forward: q, k, v, g, o in 16 bits and beta; backward: q, k, v, g, beta, their gradients, and that of o."""
    token_heads = sum(shape["seq_lens"]) * shape["heads"]
    return token_heads * (5 * D + 1) * 2, token_heads * (9 * D + 2) * 2


def peak_bytes(step: Callable[[], Sequence[Tensor]]) -> int:
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def backward(o: Tensor, leaves: Sequence[Tensor], do: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(o, leaves, do, retain_graph=True)


def measure(shape: Shape, regime: str, impls: Iterable[str], runs: int) -> dict[str, Row]:
    torch.manual_seed(0)
    call = training_call(shape, regime)
    do = torch.randn_like(call["v"])
    rows: dict[str, Row] = {}
    calls: dict[str, dict[str, Callable[[], Any]]] = {"fwd": {}, "bwd": {}, "fwd_bwd": {}}
    for impl in impls:
        row = rows[impl] = {"shape": shape["name"], "regime": regime, "impl": impl}
        try:
            leaves, forward = IMPLS[impl]({k: x.clone() if isinstance(x, Tensor) else x for k, x in call.items()})

            def step(forward: Callable[[], Tensor] = forward, leaves: list[Tensor] = leaves) -> Sequence[Tensor]:
                return torch.autograd.grad(forward(), leaves, do)

            row["peak_gib"] = round(peak_bytes(step) / 2**30, 3)
            o = forward()
            calls["bwd"][impl] = partial(backward, o, leaves, do)
            calls["bwd"][impl]()
            torch.cuda.synchronize()
        except Exception as failure:  # a peer may decline a shape in any way
            row["failed"] = f"{type(failure).__name__}: {failure}"[:200]
            calls["bwd"].pop(impl, None)
            continue
        calls["fwd"][impl], calls["fwd_bwd"][impl] = forward, step
    for what, of_impls in calls.items():
        for key, cycles in ((f"{what}_us", 0), (f"{what}_gpu_us", QUEUED_CYCLES)):
            for impl, (us, spread) in gpu_us(of_impls, 1, runs, busy_cycles=cycles).items():
                rows[impl][key] = round(us, 1)
                rows[impl]["spread"] = round(max(spread, rows[impl].get("spread", 0.0)), 4)
    return rows


def line(row: Row) -> str:
    if "failed" in row:
        return f"{row['impl']:21} {row['failed']}"
    cells = [f"{row[f'{what}_us']:9.0f} {row[f'{what}_gpu_us']:7.0f}" for what in ("fwd", "bwd", "fwd_bwd")]
    return f"{row['impl']:21}" + " |".join(cells) + f" | {row['peak_gib']:6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training beside its peers")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="SHAPE", help="of shapes.json")
    parser.add_argument("--regimes", nargs="+", default=REGIMES, choices=REGIMES)
    parser.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS, metavar="IMPL", help=", ".join(IMPLS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if reason := cuda.device_reason(torch.device(DEVICE, 0)):
        sys.exit(f"flashkda_ops has no kernels here: {reason}")
    impls = [impl for impl in IMPLS if impl in args.impls]
    if missing := [impl for impl in impls if importlib.util.find_spec(package(impl)) is None]:
        print("not importable:", ", ".join(missing))
        impls = [impl for impl in impls if impl not in missing]

    ceiling = copy_gb_s()
    print(f"A copy moves {ceiling:.0f} GB/s. Microseconds, eager and with the launches queued; GiB above the inputs.")
    print(f"{'':21}{'forward':>17} |{'backward':>17} |{'both':>17} |   peak")
    peers = {peer: version(DISTRIBUTIONS[peer]) for peer in ("fla", "cudnn")}
    rows: list[Row] = []
    for shape in named(args.shapes):
        floors = [moved / ceiling / 1e3 for moved in moved_bytes(shape)]
        for regime in args.regimes:
            print(f"{shape['name']} {regime}, floor {floors[0]:.0f} and {floors[1]:.0f}", flush=True)
            results = measure(shape, regime, impls, 5 if args.quick else 25)
            for row in results.values():
                rows.append(row | {"fwd_floor_us": round(floors[0], 2), "bwd_floor_us": round(floors[1], 2)})
                print(line(row), flush=True)
            if not args.quick:  # a run that is cut short leaves what there is
                written = write("training", rows, ceilings={"copy_gb_s": round(ceiling)}, peers=peers)
            torch.cuda.empty_cache()
    if not args.quick:
        print(written)


if __name__ == "__main__":
    main()
