"""Tokens a second of fla's KDA language model: train step and decode, as fla has it and on this project's ops.

``KDAForCausalLM`` of flash-linear-attention, 4 layers, hidden size 512, 4 heads of 128, bf16. Implementations:

- ``fla``: eager; ``fla compiled``: by ``torch.compile``, which breaks the graph at fla's kernels;
- ``enable()``: eager, the ops through fla's registry of backends; on a GPU decode steps stay fla's, which returns new
  states;
- ``enable(compile=True)`` and ``convert``: one graph, ``fullgraph=True``; decoded from a static cache in a CUDA graph.

A train step is forward, backward and a fused AdamW. Implementations are measured one after the other, since fla is
switched in between; each time is a whole step with its host time. On a CPU, where fla's kernels do not run, the last
two run at a small size.

    python benchmarks/bench_model.py [--impls "enable(compile=True)" convert] [--runs 20]
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from common import cpu_us, gpu_us, version, write
from fla.models.cache_utils import Cache
from fla.models.kda import KDAConfig, KDAForCausalLM
from torch._dynamo.utils import counters

from flashkda_ops.integrations import fla
from flashkda_ops.nn import convert

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SIZES: dict[str, int] = (
    {"hidden_size": 512, "head_dim": 128, "num_heads": 4, "num_hidden_layers": 4, "vocab_size": 32000}
    if ON_GPU
    else {"hidden_size": 64, "head_dim": 16, "num_heads": 2, "num_hidden_layers": 1, "vocab_size": 100}
)
TRAIN = [(8, 2048)] if ON_GPU else [(2, 64)]  # sequences and tokens of each
DECODE = [1, 64] if ON_GPU else [2]  # sequences
PROMPT, STEPS = (128, 16) if ON_GPU else (8, 2)  # tokens before the first step; steps that are timed together
COMPILER = "inductor" if ON_GPU else "aot_eager"
IMPLS = ("fla", "fla compiled", "enable()", "enable(compile=True)", "convert")


def make_model(impl: str) -> KDAForCausalLM:
    """The same parameters for each implementation, and fla switched to it."""
    torch._dynamo.reset()
    counters.clear()
    fla.disable()
    torch.manual_seed(0)
    model = KDAForCausalLM(KDAConfig(**SIZES, safe_gate=True, lower_bound=-5.0)).to(DEVICE, torch.bfloat16)
    if impl.startswith("enable"):
        fla.enable(compile=impl != "enable()")
    return convert(model) if impl == "convert" else model


def compiled(impl: str, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    if impl in ("fla", "enable()"):
        return function
    if impl == "fla compiled":
        return torch.compile(function, backend=COMPILER)
    return torch.compile(function, fullgraph=True, backend=COMPILER, **options)


def measure(call: Callable[[], object], runs: int) -> tuple[float, float]:
    timer = gpu_us if ON_GPU else cpu_us
    return timer({"": call}, inner=1, runs=runs)[""]


def train(impl: str, sequences: int, tokens: int, runs: int) -> dict[str, Any]:
    model = make_model(impl).train()
    ids = torch.randint(0, SIZES["vocab_size"], (sequences, tokens), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = compiled(impl, lambda ids: model(ids, labels=ids).loss)
    first = loss_of(ids).item()

    def step() -> None:
        loss_of(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    if ON_GPU:
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    us, spread = measure(step, runs)
    rate = sequences * tokens / us * 1e6
    times = {"step_us": us, "spread": spread, "tokens_per_s": rate}
    return {"phase": "train", "tokens": tokens, **times, "peak_gib": peak, "loss": first}


@torch.no_grad()
def decode(impl: str, sequences: int, runs: int) -> dict[str, Any]:
    model = make_model(impl).eval()
    ours = impl in ("enable(compile=True)", "convert")
    cache = fla.StaticCache(model, sequences) if ours else Cache()
    ids = torch.randint(0, SIZES["vocab_size"], (sequences, PROMPT), device=DEVICE)
    prompt = torch.compile(model, fullgraph=True, backend=COMPILER) if ours and not ON_GPU else model
    token = prompt(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    def next_token(token: torch.Tensor) -> torch.Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)

    step = compiled(impl, next_token, **({"mode": "reduce-overhead"} if ON_GPU else {}))

    def steps() -> None:
        x = token
        for _ in range(STEPS):
            x = step(x).clone()

    us, spread = measure(steps, runs)
    times = {"step_us": us / STEPS, "spread": spread, "tokens_per_s": sequences * STEPS / us * 1e6}
    return {"phase": "decode", "tokens": 1, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20 if ON_GPU else 3)
    impls = IMPLS if ON_GPU else IMPLS[3:]
    parser.add_argument("--impls", nargs="+", default=impls, choices=impls, metavar="IMPL", help=", ".join(impls))
    args = parser.parse_args()
    rows = []
    print("phase   sequences  tokens  implementation            step, us   tokens/s  breaks")
    for impl in args.impls:
        cases = [("train", train, shape) for shape in TRAIN] + [("decode", decode, (n,)) for n in DECODE]
        for phase, function, shape in cases:
            try:
                row = {"impl": impl, "sequences": shape[0], **function(impl, *shape, args.runs)}  # type: ignore[operator]
            except Exception as problem:
                if impl != "fla compiled":
                    raise
                print(f"{phase:7} {shape[0]:9}          {impl}: {type(problem).__name__}: {problem}")
                continue
            row["graph_breaks"] = sum(counters["graph_break"].values())
            rows.append(row)
            print(
                f"{phase:7} {row['sequences']:9} {row['tokens']:7}  {impl:22} {row['step_us']:11.1f} "
                f"{row['tokens_per_s']:10.0f} {row['graph_breaks']:7}"
            )
            gc.collect()
    fla.disable()
    print(write("model", rows, sizes=SIZES, peers={"fla": version("flash-linear-attention")}))


if __name__ == "__main__":
    main()
