"""What the benchmarks share: timing, the record of the environment, the results files."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from flashkda_ops.reference import beta_activation, l2norm, log_decay, recurrent_kda_reference

RESULTS = Path(__file__).parent / "results"
Calls = Mapping[str, Callable[[], object]]


def cpu_us(
    calls: Calls, *, runs: int, warmup: int = 2, inner: int = 1, before: Callable[[], object] | None = None
) -> dict[str, tuple[float, float]]:
    """Median microseconds of each call and their spread (interquartile range over median), calls alternating, each time
    after a call of ``before``."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(warmup + runs):
        for name, call in calls.items():
            if before is not None:
                before()
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


def gpu_us(calls: Calls, inner: int, runs: int = 25, busy_cycles: int = 0) -> dict[str, tuple[float, float]]:
    """As :func:`cpu_us`, between events on the GPU; ``inner`` is what each entry does at once.

    The GPU first spins for ``busy_cycles``: what is launched in that time starts with no wait for the host.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(5 + runs):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if busy_cycles:
                torch.cuda._sleep(busy_cycles)
            start.record()
            call()
            end.record()
            end.synchronize()
            if run >= 5:
                samples[name].append(start.elapsed_time(end) * 1e3 / inner)
    return {name: _summary(times) for name, times in samples.items()}


def graph_us(graphs: Mapping[str, torch.cuda.CUDAGraph], copies: int, runs: int = 25) -> dict[str, tuple[float, float]]:
    """Median microseconds of one of the ``copies`` calls in each graph, replays of the graphs alternating."""
    return gpu_us({name: graph.replay for name, graph in graphs.items()}, copies, runs, busy_cycles=200_000)


def _summary(times: Sequence[float]) -> tuple[float, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """``||x - reference|| / ||reference||`` in fp64."""
    return float((x.double() - reference).norm() / reference.norm())


def recurrence(call: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``flashkda_ops.reference.recurrent_kda_reference`` of one row of tokens, fused gate, beta sigmoid and L2 norm,
    and V-first states, in fp64 on a GPU: token by token, with all sequences and heads in one product."""
    tokens = call["v"].shape[1]
    lengths = [tokens] if call.get("cu_seqlens") is None else call["cu_seqlens"].diff().tolist()
    N, H, STEPS = len(lengths), call["v"].shape[2], 256

    def by_step(x: torch.Tensor) -> torch.Tensor:  # [1, T, H, ...] to [steps, N * H, ...]
        padded = pad_sequence(x[0].split(lengths)).flatten(1, 2)
        return F.pad(padded, [0, 0] * (padded.dim() - 1) + [0, -len(padded) % STEPS])

    q, k, v, g, beta = (call[name].double() for name in ("q", "k", "v", "g", "beta"))
    g = log_decay(g, call["A_log"], call["dt_bias"], use_gate_in_kernel=True, lower_bound=call["lower_bound"])
    negative = call.get("allow_neg_eigval", False)
    beta = beta_activation(beta, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=negative)
    q, k = l2norm(q) * q.shape[-1] ** -0.5, l2norm(k)
    # Past the end of a sequence all are zero, which leaves its state as it is.
    q, k, v, alpha, beta = by_step(q), by_step(k), by_step(v), by_step(g).exp(), by_step(beta)
    S, o = call["initial_state"].flatten(0, 1).double(), torch.empty_like(v)
    static = [torch.zeros_like(x[:STEPS]) for x in (q, k, v, alpha, beta, o)]

    def steps() -> None:
        for qt, kt, vt, at, bt, ot in zip(*static, strict=True):
            S.mul_(at.unsqueeze(-2))
            u = bt.unsqueeze(-1) * (vt - (S @ kt.unsqueeze(-1)).squeeze(-1))
            S.baddbmm_(u.unsqueeze(-1), kt.unsqueeze(-2))
            ot.copy_((S @ qt.unsqueeze(-1)).squeeze(-1))

    start = S.clone()
    graph = capture(lambda _: steps(), 1)  # by launches alone, eight thousand tokens would take half a second
    S.copy_(start)
    for t in range(0, len(v), STEPS):
        for buffer, x in zip(static, (q, k, v, alpha, beta), strict=False):
            buffer.copy_(x[t : t + STEPS])
        graph.replay()
        o[t : t + STEPS] = static[-1]
    outputs = o.unflatten(1, (N, H)).unbind(1)
    o = torch.cat([x[:length] for x, length in zip(outputs, lengths, strict=True)])
    return o.unsqueeze(0), S.unflatten(0, (N, H))


def recurrence_gradients(call: Mapping[str, Any], do: torch.Tensor, dht: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all that :func:`recurrence` reads, of one sequence, by autograd through
    ``recurrent_kda_reference`` in fp64; a few hundred tokens' states are kept at a time."""
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    leaves = {name: call[name].double().requires_grad_() for name in names}
    keywords = inspect.signature(recurrent_kda_reference).parameters
    options = {name: x for name, x in call.items() if name in keywords and name not in names}

    def steps(state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate = {name: leaves[name] for name in ("A_log", "dt_bias")}
        return recurrent_kda_reference(*tokens, **gate, initial_state=state, **options)

    state, outputs = leaves["initial_state"], []
    for tokens in zip(*(leaves[name].split(256, 1) for name in names[:5]), strict=True):
        o, state = checkpoint(steps, state, *tokens, use_reentrant=False)
        outputs.append(o)
    given = (do.double(), dht.double())
    grads = torch.autograd.grad((torch.cat(outputs, 1), state), list(leaves.values()), given)
    return dict(zip(names, grads, strict=True))


def use_first_configurations(package: str) -> None:
    """Have the Triton kernels of an imported package skip autotuning: accuracy needs none of its minutes."""
    from triton.runtime.autotuner import Autotuner

    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == package]:
        for kernel in vars(module).values():
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn


def copy_gb_s() -> float:
    """What a large copy moves here, bytes read plus bytes written. Eager: in a graph it is a slower memcpy node."""
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    median, _ = gpu_us({"copy": lambda: b.copy_(a)}, inner=1)["copy"]
    return 2 * a.nbytes / median / 1e3


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


@functools.cache
def _commit() -> tuple[str | None, bool]:
    """The commit that is measured, and whether the tree has changes, which a result that is written would be one of."""
    if commit := os.environ.get("FLASHKDA_COMMIT"):
        return commit, False
    return _output("git", "rev-parse", "--short=12", "HEAD"), bool(_output("git", "status", "--porcelain"))


def write(bench: str, rows: list[dict[str, Any]], **extra: Any) -> Path:
    """Write ``results/<bench>-<gpu>.json``; ``FLASHKDA_COMMIT`` names the commit of an exported tree."""
    commit, dirty = _commit()
    record: dict[str, Any] = {
        "bench": bench,
        "commit": commit,
        "dirty": dirty,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        record["driver"] = _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
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
