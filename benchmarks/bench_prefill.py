"""Prefill on a GPU: ``flashkda_ops.chunk_kda`` beside its peers and the memory floor.

The shapes of ``shapes.json`` in three gate regimes: fast, slow (alpha near 1) and mixed (odd heads slow). K = V = 128,
bf16 tokens, L2 norm, bounded gate and beta sigmoid in the kernel, fp32 states in and out. A time is a median over
replays of a CUDA graph, implementations alternating; its calls rotate among inputs and outputs that together exceed the
L2 cache. Eager times start on an idle GPU. The floor moves each token and state once at the speed of a copy.

Besides the plain call: ``flashkda_ops (transformers)``, as the transformers library calls (fp32 gate and beta, both
activated; K-first state; q, k and v slices of one tensor), and ``flashkda_ops (batch_invariant)``.

    python benchmarks/bench_prefill.py [--shapes headline T1024_H4] [--regimes slow] [--impls flashkda_ops cudnn]
                                       [--fla H96_fixed H64_fixed] [--quick]

fla's autotuner takes minutes for a new number of heads: it runs on the shapes named by ``--fla``. ``--quick`` takes few
samples, checks no results and writes no file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import capture, copy_gb_s, error, gpu_us, graph_us, recurrence, version, write

import flashkda_ops
from flashkda_ops import cuda
from flashkda_ops.reference import log_decay

os.environ.setdefault("FLA_FLASH_KDA", "0")  # fla's own kernels, not flash_kda through fla

Call = dict[str, Any]
Shape = dict[str, Any]
Row = dict[str, Any]

D = 128
REGIMES = ("fast", "slow", "mixed")
SHAPES: list[Shape] = json.loads((Path(__file__).parent / "shapes.json").read_text())
DEVICE = "cuda"
ROTATED_BYTES = 150e6  # three times the L2 cache of an H100
REFERENCE_TOKENS = 8192  # of the longest sequence: the reference takes them one by one


def make_calls(shape: Shape, regime: str, copies: int) -> list[Call]:
    """The keyword arguments of ``copies`` calls."""
    tokens, heads, sequences = sum(shape["seq_lens"]), shape["heads"], len(shape["seq_lens"])
    slow_heads = {"fast": 0.0, "slow": 1.0, "mixed": torch.arange(heads, device=DEVICE).unsqueeze(1) % 2}[regime]
    ends = torch.tensor([0, *shape["seq_lens"]], device=DEVICE).cumsum(0)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=DEVICE, dtype=torch.bfloat16)

    return [
        {name: randn(1, tokens, heads, D) for name in ("q", "k", "v", "g")}
        | {
            "beta": randn(1, tokens, heads),
            "A_log": torch.rand(heads, device=DEVICE),
            "dt_bias": torch.rand(heads, D, device=DEVICE) - 8 * slow_heads,
            "initial_state": torch.randn(sequences, heads, D, D, device=DEVICE),
            "cu_seqlens": ends if sequences > 1 else None,
            "lower_bound": -5.0,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "state_v_first": True,
            "output_final_state": True,
        }
        for _ in range(copies)
    ]


def moved_bytes(shape: Shape) -> int:
    """q, k, v, g and o in 16 bits, beta, and the fp32 states in and out."""
    tokens, heads, sequences = sum(shape["seq_lens"]), shape["heads"], len(shape["seq_lens"])
    return tokens * heads * (5 * D + 1) * 2 + 2 * sequences * heads * D * D * 4


# Each takes the keyword arguments of a call to what makes that call and returns the output and the final state.
# Preparing arguments is not timed.


def ours(call: Call, **options: Any) -> Callable[[], Any]:
    return partial(flashkda_ops.chunk_kda, **call, **options)


def ours_transformers(call: Call) -> Callable[[], Any]:
    q, k, v = torch.cat([call[name].flatten(2) for name in "qkv"], -1).unflatten(-1, (-1, D)).chunk(3, -2)
    gate = {"use_gate_in_kernel": True, "lower_bound": call["lower_bound"]}
    return partial(
        flashkda_ops.chunk_kda, q, k, v, log_decay(call["g"].float(), call["A_log"], call["dt_bias"], **gate),
        call["beta"].float().sigmoid(), initial_state=call["initial_state"].mT.contiguous(), output_final_state=True,
        use_qk_l2norm_in_kernel=True, cu_seqlens=call["cu_seqlens"],
    )  # fmt: skip


def fla(call: Call) -> Callable[[], Any]:
    from fla.ops.kda import chunk_kda

    return partial(chunk_kda, **call, safe_gate=True)  # its fastest path, which a lower bound allows


def cudnn(call: Call, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    from cudnn.linear_attention.ops import kimi_delta_attention

    q, k, v, g, beta = (call[name][0] for name in ("q", "k", "v", "g", "beta"))
    ends = torch.tensor([0, len(q)], device=DEVICE) if call["cu_seqlens"] is None else call["cu_seqlens"]
    return partial(
        kimi_delta_attention, q, k, v, g.to(dtype), beta.to(dtype), ends.int(), initial_state=call["initial_state"],
        output_final_state=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=True,
        gate_lower_bound=call["lower_bound"], a_log=call["A_log"], dt_bias=call["dt_bias"],
    )  # fmt: skip


def flash_kda(call: Call) -> Callable[[], Any]:
    from flash_kda import fwd

    o, state = torch.empty_like(call["v"]), torch.empty_like(call["initial_state"])
    tokens = (call[name] for name in ("q", "k", "v", "g", "beta"))
    gate = (call["A_log"], call["dt_bias"], call["lower_bound"])
    run = partial(fwd, *tokens, D**-0.5, o, *gate, call["initial_state"], state, call["cu_seqlens"])
    return lambda: (run(), (o, state))[1]


TRANSFORMERS = "flashkda_ops (transformers)"
IMPLS: dict[str, Callable[[Call], Callable[[], Any]]] = {
    "flashkda_ops": ours,
    TRANSFORMERS: ours_transformers,
    "flashkda_ops (batch_invariant)": partial(ours, batch_invariant=True),
    "flash_kda": flash_kda,
    "cudnn": cudnn,
    "cudnn_bf16_g": partial(cudnn, dtype=torch.bfloat16),
    "fla": fla,
}
LABELS = {impl: impl.removeprefix("flashkda_ops (").removesuffix(")") for impl in IMPLS}
# Not captured: fla synchronises, and torch's allocator does not recover from a capture that failed.
EAGER_ONLY = ("fla",)
DISTRIBUTIONS = {"flash_kda": "flash_kda", "cudnn": "nvidia-cudnn-frontend", "fla": "fla-core"}


def package(impl: str) -> str:
    return impl.split(" ")[0].removesuffix("_bf16_g")


class Rotation:
    """Calls whose outputs live until they are called again: each writes memory of its own."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls
        self.outputs: list[Any] = [None] * len(calls)

    def one(self, i: int) -> None:
        self.outputs[i] = self.calls[i]()

    def all(self) -> None:
        for i in range(len(self.calls)):
            self.one(i)


def host_us(call: Callable[[], Any], runs: int = 40) -> float:
    """Median time until an eager call returns. The launches of ``runs`` calls do not fill the queue."""
    times = []
    torch.cuda.synchronize()
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def measure(shape: Shape, regime: str, impls: Iterable[str], runs: int, check: bool) -> dict[str, Row]:
    torch.manual_seed(0)
    copies = -(-int(ROTATED_BYTES) // moved_bytes(shape))
    arguments = make_calls(shape, regime, copies)
    expected = recurrence(arguments[0]) if check and max(shape["seq_lens"]) <= REFERENCE_TOKENS else None
    rows: dict[str, Row] = {}
    eager: dict[str, Callable[[], object]] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for impl in impls:
        row = rows[impl] = {"shape": shape["name"], "regime": regime, "impl": impl}
        try:
            calls = Rotation([IMPLS[impl](x) for x in arguments])
            calls.all()
            if expected is not None:
                o, state = calls.outputs[0]
                row["error"] = error(o.view_as(expected[0]), expected[0])
                row["state_error"] = error(state.mT if impl == TRANSFORMERS else state, expected[1])
                del o, state
            calls.outputs[0] = None
            torch.cuda.reset_peak_memory_stats()
            calls.one(0)
            scratch = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            row["scratch_mib"] = round(scratch / 2**20, 2)
            if package(impl) == "flashkda_ops":
                row["host_us"] = round(host_us(calls.calls[0]), 1)
            torch.cuda.synchronize()
        except Exception as failure:  # a peer may decline a shape in any way
            row["failed"] = f"{type(failure).__name__}: {failure}"[:200]
            continue
        eager[impl] = calls.all
        if impl not in EAGER_ONLY:
            try:
                graphs[impl] = capture(calls.one, copies)
            except Exception as failure:
                row["not_captured"] = f"{type(failure).__name__}: {failure}"[:200]
    del expected
    for key, times in (("graph_us", graph_us(graphs, copies, runs)), ("eager_us", gpu_us(eager, copies, runs))):
        for impl, (us, spread) in times.items():
            rows[impl][key] = round(us, 2)
            rows[impl].setdefault("spread", round(spread, 4))  # of the replays where there are any
    return rows


def ratio(row: Row, to: Row) -> float | None:
    """How many times as long as ``to``: graph replays, or both eager where one of them has no graph."""
    key = next((key for key in ("graph_us", "eager_us") if key in row and key in to), None)
    return None if key is None else row[key] / to[key]


def line(rows: dict[str, Row], floor: float) -> str:
    cells, failures = [], ""
    for impl, row in rows.items():
        us = row.get("graph_us", row.get("eager_us"))
        against = us and (us / floor if impl == "flashkda_ops" else ratio(row, rows.get("flashkda_ops", {})))
        host = f" {row.get('host_us', 0):3.0f}" if impl == "flashkda_ops" else ""
        cells.append((f"{us:9.1f}" if us else "   failed") + (f" {against:5.2f}" if against else " " * 6) + host)
        failures += f"\n    {impl}: {row['failed']}" if "failed" in row else ""
        failures += f"\n    {impl}, eager: {row['not_captured']}" if "not_captured" in row else ""
    return " |".join(cells) + failures


def summary(rows: Sequence[Row]) -> str:
    """By group and regime: times over the floor, and of the others over ours: geometric mean, least, greatest."""
    lines = []
    for group in ("headline", "tensor_parallel", "long"):
        names = {shape["name"] for shape in SHAPES if shape["group"] == group}
        for regime in REGIMES:
            found = [row for row in rows if row["shape"] in names and row["regime"] == regime]
            base = {row["shape"]: row for row in found if row["impl"] == "flashkda_ops" and "failed" not in row}
            cells = []
            for impl in dict.fromkeys(row["impl"] for row in found):
                pairs = [(row, base[row["shape"]]) for row in found if row["impl"] == impl and row["shape"] in base]
                if impl == "flashkda_ops":
                    values = [row["graph_us"] / row["floor_us"] for row, _ in pairs if "graph_us" in row]
                else:
                    values = [value for row, to in pairs if (value := ratio(row, to)) is not None]
                if values:
                    mean = statistics.geometric_mean(values)
                    cells.append(f"{impl} {mean:.2f} ({min(values):.2f} .. {max(values):.2f})")
            lines += [f"{group} {regime}: " + ", ".join(cells)] if cells else []
    plain = {(row["shape"], row["regime"]): row for row in rows if row["impl"] == "flashkda_ops"}
    for row in rows:
        against = ratio(row, plain.get((row["shape"], row["regime"]), {}))
        if package(row["impl"]) != "flashkda_ops" and against is not None and against < 1:
            lines.append(f"behind {row['impl']}: {row['shape']} {row['regime']}, {against:.2f}")
    checked = [row for row in rows if "error" in row]
    for impl in dict.fromkeys(row["impl"] for row in checked):
        o, state = (max(row[key] for row in checked if row["impl"] == impl) for key in ("error", "state_error"))
        lines.append(f"greatest error, {impl}: {o:.2e}, state {state:.2e}")
    return "\n".join(lines)


def named(names: Sequence[str]) -> list[Shape]:
    """The shapes of these names and groups."""
    known = {shape[key] for shape in SHAPES for key in ("name", "group")}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no shape or group {unknown[0]} in shapes.json")
    return [shape for shape in SHAPES if shape["name"] in names or shape["group"] in names]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill beside its peers", epilog="A shape is a name or a group.")
    parser.add_argument("--shapes", nargs="+", default=[shape["name"] for shape in SHAPES], metavar="SHAPE")
    parser.add_argument("--regimes", nargs="+", default=REGIMES, choices=REGIMES)
    parser.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS, metavar="IMPL", help=", ".join(IMPLS))
    parser.add_argument("--fla", nargs="+", default=[], metavar="SHAPE", help="where fla runs: minutes a head count")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if reason := cuda.device_reason(torch.device(DEVICE, 0)):
        sys.exit(f"flashkda_ops has no kernels here: {reason}")
    shapes, with_fla = named(args.shapes), {shape["name"] for shape in named(args.fla)}
    impls = [impl for impl in IMPLS if impl in args.impls and (impl != "fla" or with_fla)]
    if missing := [impl for impl in impls if importlib.util.find_spec(package(impl)) is None]:
        print("not importable:", ", ".join(missing))
        impls = [impl for impl in impls if impl not in missing]

    ceiling = copy_gb_s()
    print(
        f"A copy moves {ceiling:.0f} GB/s. Microseconds, and over the floor (flashkda_ops, host time) or flashkda_ops."
    )
    widths = {impl: 19 if impl == "flashkda_ops" else 15 for impl in impls}
    print("shape            gates   floor |" + " |".join(f"{LABELS[impl]:>{width}}" for impl, width in widths.items()))
    peers = {peer: version(distribution) for peer, distribution in DISTRIBUTIONS.items()}
    rows: list[Row] = []
    written = None
    try:
        with torch.no_grad():
            for shape in shapes:
                floor = moved_bytes(shape) / ceiling / 1e3
                here = [impl for impl in impls if impl != "fla" or shape["name"] in with_fla]
                for regime in args.regimes:
                    results = measure(shape, regime, here, 5 if args.quick else 25, not args.quick)
                    rows += [row | {"floor_us": round(floor, 2)} for row in results.values()]
                    print(f"{shape['name']:16} {regime:5} {floor:7.1f} |{line(results, floor)}", flush=True)
                    if not args.quick:  # a run that is cut short leaves what there is
                        written = write("prefill", rows, ceilings={"copy_gb_s": round(ceiling)}, peers=peers)
                torch.cuda.empty_cache()  # what the graphs held
    finally:  # a peer that broke the device leaves what was measured before it
        print(summary(rows))
        if written:
            print(written)


if __name__ == "__main__":
    main()
