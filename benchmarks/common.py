"""What the benchmarks share: timing, the record of the environment, the results files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Calls = Mapping[str, Callable[[], object]]


def cpu_us(calls: Calls, *, runs: int, warmup: int = 2, inner: int = 1) -> dict[str, tuple[float, float]]:
    """Median microseconds of each call and their spread (interquartile range over median), calls alternating."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(warmup + runs):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if run >= warmup:
                samples[name].append((time.perf_counter() - start) * 1e6 / inner)
    return {name: _summary(times) for name, times in samples.items()}


def capture(call: Callable[[int], object], copies: int) -> torch.cuda.CUDAGraph:
    """One graph of ``call(0) .. call(copies - 1)``, warmed up eagerly first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for copy in range(min(copies, 2)):
            call(copy)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    return graph


def gpu_us(calls: Calls, inner: int, runs: int = 25) -> dict[str, tuple[float, float]]:
    """As :func:`cpu_us`, between events on the GPU; ``inner`` is what each entry does at once."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(5 + runs):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if run >= 5:
                samples[name].append(start.elapsed_time(end) * 1e3 / inner)
    return {name: _summary(times) for name, times in samples.items()}


def graph_us(graphs: Mapping[str, torch.cuda.CUDAGraph], copies: int, runs: int = 25) -> dict[str, tuple[float, float]]:
    """Median microseconds of one of the ``copies`` calls in each graph, replays of the graphs alternating."""
    return gpu_us({name: graph.replay for name, graph in graphs.items()}, copies, runs)


def _summary(times: Sequence[float]) -> tuple[float, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """``||x - reference|| / ||reference||`` in fp64."""
    return float((x.double() - reference).norm() / reference.norm())


def copy_gb_s() -> float:
    """What a large copy moves here, bytes read plus bytes written. Eager: in a graph it is a slower memcpy node."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * a.nbytes / statistics.median(times) / 1e3


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(bench: str, rows: list[dict[str, Any]], **extra: Any) -> Path:
    """Write ``results/<bench>-<gpu>.json``; a commit named by ``FLASHKDA_COMMIT`` stands in where there is no git."""
    commit, status = _output("git", "rev-parse", "--short=12", "HEAD"), _output("git", "status", "--porcelain")
    record: dict[str, Any] = {
        "bench": bench,
        "commit": commit or os.environ.get("FLASHKDA_COMMIT"),
        "dirty": bool(status),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        record["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        where = record["gpu"].removeprefix("NVIDIA ").split()[0].lower()
    else:
        record["cpu"], record["threads"] = _processor(), torch.get_num_threads()
        where = "cpu"
    record |= extra
    record["rows"] = rows
    path = Path(os.environ.get("OUT", RESULTS)) / f"{bench}-{where}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
