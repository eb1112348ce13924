"""The example server under load: time to the first token, between tokens, of a request, and tokens a second.

The demo's model with random weights, served by ``examples/serve.py`` on loopback; the clients are a process of their
own. ``eager`` calls the model's functions as they are, ``compiled`` their compiled form at the sizes of the buckets,
``captured`` replays CUDA graphs of that. Three loads, the same for all:

* ``batch 1``: one sequence decoded through the runner, without HTTP.
* ``burst``: all requests at once; so this is throughput.
* ``poisson``: random arrivals at half of the rate that eager served the burst at.

    python benchmarks/bench_serving.py [--no-compile]

With ``--no-compile`` there is no ``compiled``, and ``captured`` replays CUDA graphs of the functions as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import torch
from aiohttp import web
from common import write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from engine import Engine, make_runner
from kda_lm import Config, KdaLM, serving_copy
from serve import make_app

from flashkda_ops.serving import GraphRunner

PREFILL_SEQUENCES = 8


@dataclass(frozen=True)
class Plan:
    """What one device serves."""

    model: Config
    batch_buckets: tuple[int, ...]
    token_buckets: tuple[int, ...]
    requests: int
    tokens: int  # the most of a request; between a quarter of that and that
    steps: int  # of decoding one sequence


CPU_PLAN = Plan(Config(128, 2, 4, 32, sequences=8), (1, 2, 4, 8), (64, 256), 64, 48, 100)
GPU_PLAN = Plan(
    Config(512, 4, 4, 128, sequences=32, dtype=torch.bfloat16), (1, 2, 4, 8, 16, 32), (128, 512), 192, 96, 300
)


class Arrival(NamedTuple):
    at: float  # seconds
    prompt: str
    tokens: int


class Sample(NamedTuple):
    """Of a request: seconds from its arrival to each of its tokens."""

    arrived: float
    tokens: list[float]


def arrivals(plan: Plan, rate: float | None) -> list[Arrival]:
    """All at once, or at ``rate`` requests a second on average."""
    rng, at, result = random.Random(0), 0.0, []
    for _ in range(plan.requests):
        at += 0.0 if rate is None else rng.expovariate(rate)
        prompt = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(8, 200)))
        result.append(Arrival(at, prompt, rng.randint(plan.tokens // 4, plan.tokens)))
    return result


def clients(url: str, load: list[Arrival]) -> list[Sample]:
    """Send each request at its time, and read its stream to the end. A process of its own runs this."""

    async def client(session: aiohttp.ClientSession, start: float, arrival: Arrival) -> Sample:
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        began, times = time.perf_counter(), []
        body = {"prompt": arrival.prompt, "max_tokens": arrival.tokens, "temperature": 0.6}
        async with session.post(url, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: "):
                    times.append(time.perf_counter() - began)
                    last = line
        end = json.loads(last.removeprefix(b"data: "))
        assert end == {"done": True, "tokens": arrival.tokens} and len(times) == arrival.tokens + 1
        return Sample(began - start, times[:-1])

    async def main() -> list[Sample]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            start = time.perf_counter() + 0.1
            return await asyncio.gather(*(client(session, start, arrival) for arrival in load))

    return asyncio.run(main())


def summary(samples: list[Sample]) -> dict[str, float]:
    gaps = [b - a for sample in samples for a, b in zip(sample.tokens, sample.tokens[1:], strict=False)]
    times = {
        "first_token": [sample.tokens[0] for sample in samples],
        "token": gaps,
        "latency": [sample.tokens[-1] for sample in samples],
    }
    seconds = max(s.arrived + s.tokens[-1] for s in samples) - min(s.arrived for s in samples)
    row = {"tokens_per_s": sum(len(sample.tokens) for sample in samples) / seconds, "seconds": seconds}
    for name, values in times.items():
        percentiles = statistics.quantiles(values, n=100, method="inclusive")
        row |= {f"{name}_p50_ms": 1e3 * percentiles[49], f"{name}_p99_ms": 1e3 * percentiles[98]}
    return row


async def under_load(runner: GraphRunner, plan: Plan, load: list[Arrival], pool: ProcessPoolExecutor) -> list[Sample]:
    engine = Engine(runner, prefill_tokens=plan.token_buckets[-1], prefill_sequences=PREFILL_SEQUENCES)
    app = web.AppRunner(make_app(engine, max_requests=plan.requests), handler_cancellation=True)
    await app.setup()
    try:
        await web.TCPSite(app, "127.0.0.1", 0).start()
        host, port = app.addresses[0][:2]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, clients, f"http://{host}:{port}/generate", load)
    finally:
        await app.cleanup()


def batch_1(runner: GraphRunner, steps: int) -> float:
    """Tokens a second of one sequence; each token stays on the device."""
    (slot,) = runner.pool.allocate()
    one = {"state_indices": torch.tensor([slot], dtype=torch.int32), "temperature": torch.zeros(1)}
    inputs = {name: x.to(runner.pool.device) for name, x in one.items()}
    token = runner.prefill(
        tokens=torch.arange(64).unsqueeze(0),
        cu_seqlens=torch.tensor([0, 64], dtype=torch.int32),
        has_initial_state=torch.tensor([False]),
        **one,
    )
    for warm_up in (True, False):
        token.tolist()  # waits for the device
        start = time.perf_counter()
        for _ in range(steps // 4 if warm_up else steps):
            token = runner.decode(tokens=token, **inputs)
    token.tolist()
    runner.pool.free([slot])
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-compile", action="store_true", help="no compiled form; capture the functions as they are")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the clients have the other core
    on_gpu = torch.cuda.is_available()
    plan = GPU_PLAN if on_gpu else CPU_PLAN
    with torch.device("cuda" if on_gpu else "cpu"):
        model = serving_copy(KdaLM(plan.model))

    impls = ["eager", *([] if args.no_compile else ["compiled"]), *(["captured"] if on_gpu else [])]
    rows: list[dict[str, Any]] = []
    c = plan.model
    extra: dict[str, Any] = {
        "model": f"{c.num_layers} layers, hidden size {c.hidden_size}, {c.num_heads} heads of {c.head_dim}, "
        f"{str(c.dtype).removeprefix('torch.')}, {c.sequences} slots"
    }
    rate = 0.0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        pool.submit(time.time).result()  # the process imports what it needs
        for impl in impls:
            eager = impl == "eager"
            runner = make_runner(
                model,
                batch_buckets=() if eager else plan.batch_buckets,
                token_buckets=() if eager else plan.token_buckets,
                prefill_sequences=PREFILL_SEQUENCES,
                compile=not eager and not args.no_compile,
            )
            start = time.perf_counter()
            if impl == "captured":
                report = runner.capture(progress=True)
                print(report)
                extra |= {
                    "capture_s": report.seconds,
                    "capture_mib": report.bytes / 2**20,
                    "graphs": len(report.graphs),
                }
            else:
                runner.warm_up(progress=True)
            print(f"{impl}: ready in {time.perf_counter() - start:.1f} s")
            row: dict[str, Any] = {"regime": "batch 1", "impl": impl, "tokens_per_s": batch_1(runner, plan.steps)}
            rows.append(row)
            print(f"{impl:>9} batch 1: {row['tokens_per_s']:8.0f} tokens/s")
            asyncio.run(under_load(runner, plan, arrivals(plan, None)[: plan.requests // 4], pool))  # warm-up
            for regime in ("burst", "poisson"):
                samples = asyncio.run(
                    under_load(runner, plan, arrivals(plan, rate if regime == "poisson" else None), pool)
                )
                row = {"regime": regime, "impl": impl, "requests": plan.requests, **summary(samples)}
                if not rate:
                    rate = 0.5 * plan.requests / row["seconds"]
                rows.append(row if regime == "burst" else row | {"rate": rate})
                print(
                    f"{impl:>9} {regime:>7}: {row['tokens_per_s']:8.0f} tokens/s; p50 / p99, ms: "
                    + ", ".join(
                        f"{name} {row[f'{key}_p50_ms']:.1f} / {row[f'{key}_p99_ms']:.1f}"
                        for name, key in (("first token", "first_token"), ("next", "token"), ("request", "latency"))
                    )
                )
            # At once: a run that is cut short leaves what it has.
            written = write("serving", rows, **extra)
    print(written)


if __name__ == "__main__":
    main()
