"""The demo's train step on a GPU, optimizer included: eager, compiled with ``fullgraph=True``, and captured in a CUDA
graph whose ``cu_seqlens`` change at every replay; beside the same model around fla's eager layer.

The model, sizes and data are those of ``examples/train_and_generate.py``. First every variant trains for ``--steps``
steps from the same weights on the same batches, and its loss curve is held against that of the eager kernels, as means
of 50 steps: 1e-3 captured, 2e-2 for the portable path. Compiled, Inductor rounds bf16 intermediates in other places
than eager does, and training amplifies that, whatever the ops: about as far as an eager curve moves from weights of
which one is an ulp off. So the compiled kernels are held to 1e-3 where all activations but the op's are fp32. Then the
speeds are taken, variants alternating, of all but the portable path and those that are here for their curves.

    python benchmarks/bench_train_step.py [--impls flashkda_ops "flashkda_ops (captured)"] [--steps 300]

fla's autotuner takes minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from common import cpu_us, version, write
from torch import Tensor, nn

from flashkda_ops import cuda
from flashkda_ops.ops import plans

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from kda_lm import Config, KdaLM, Sequences
from train_and_generate import GPU_PLAN, Batch, CapturedStep, make_train_step, packed, schedule, standard_library

DEVICE = torch.device("cuda")
STEPS_PER_SAMPLE = 10
CURVE_WINDOW = 50
AN_ULP_OFF, PORTABLE, FP32 = "an ulp off", "portable", "fp32 activations"
NO_LIMIT = float("inf")
CURVE_LIMITS = {
    f"flashkda_ops ({AN_ULP_OFF})": NO_LIMIT,
    "flashkda_ops (compiled)": NO_LIMIT,
    "flashkda_ops (captured)": 1e-3,
    "flashkda_ops (compiled, captured)": NO_LIMIT,
    f"flashkda_ops ({PORTABLE})": 2e-2,
    f"flashkda_ops ({FP32})": NO_LIMIT,
    f"flashkda_ops ({FP32}, {AN_ULP_OFF})": NO_LIMIT,
    f"flashkda_ops ({FP32}, compiled)": 1e-3,
    f"flashkda_ops ({FP32}, captured)": 1e-3,
    f"flashkda_ops ({FP32}, compiled, captured)": 1e-3,
}
IMPLS = ("flashkda_ops", *CURVE_LIMITS, "fla")

Step = Callable[..., Tensor]


class FlaAttention(nn.Module):
    """fla's layer in the place of ``KimiDeltaAttention``: the same sizes, gates, norms and convolutions."""

    def __init__(self, config: Config) -> None:
        from fla.layers import KimiDeltaAttention

        super().__init__()
        self.layer = KimiDeltaAttention(
            config.hidden_size, head_dim=config.head_dim, num_heads=config.num_heads, conv_size=config.conv_size,
            safe_gate=True, lower_bound=-5.0,
        )  # fmt: skip

    def forward(self, x: Tensor, s: Sequences) -> Tensor:
        with torch.autocast(x.device.type, x.dtype):
            return self.layer(x, cu_seqlens=s.cu_seqlens)[0]


def without_empty_sequences(batch: Batch) -> Batch:
    """For fla, whose outputs are undefined past the last sequence."""
    ends = batch.cu_seqlens.unique_consecutive().long()
    ends[-1] = batch.tokens.shape[1]
    return batch._replace(cu_seqlens=ends)


@contextmanager
def on_path(impl: str) -> Iterator[None]:
    """Where the calls of ``impl`` run: ops taken to the portable path for the comparison, or as they are."""
    if PORTABLE not in impl:
        yield
        return
    plans.clear()
    with mock.patch.object(cuda, "chunk_kda_reason", lambda *arguments: "for comparison"):
        yield
    plans.clear()


def make_step(impl: str) -> Step:
    torch.manual_seed(0)
    config = GPU_PLAN.model
    if FP32 in impl:
        config = replace(config, dtype=torch.float32, op_dtype=config.dtype)
    with DEVICE:
        model = KdaLM(config)
        if impl == "fla":
            for block in model.layers:
                block.attn = FlaAttention(config)

    if AN_ULP_OFF in impl:
        with torch.no_grad():  # an ulp of the activations, in which the model computes
            next(model.layers.parameters()).view(-1)[0].mul_(1 + torch.finfo(config.dtype).eps)

    def compile(fn: Step) -> Step:
        return torch.compile(fn, fullgraph=True, dynamic=False) if "compiled" in impl else fn

    return make_train_step(model, compile)


def train(impl: str, inputs: Iterator[tuple[Tensor, ...]]) -> tuple[Step, list[float]]:
    """The step after it has consumed the inputs, and the losses."""
    first = next(inputs)
    step = make_step(impl)
    losses = [step(*first)]
    if "captured" in impl:
        step = CapturedStep(step, *first)
    losses += [step(*x) for x in inputs]
    return step, [float(loss) for loss in losses]


def greatest_difference(a: list[float], b: list[float], window: int) -> float:
    """Of the means of every ``window`` steps of two loss curves."""
    starts = range(0, len(a), window)
    return max(abs(fmean(a[i : i + window]) - fmean(b[i : i + window])) for i in starts)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's train step")
    parser.add_argument("--impls", nargs="+", default=IMPLS, choices=IMPLS, metavar="IMPL", help=", ".join(IMPLS))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if reason := cuda.device_reason(torch.device(DEVICE.type, 0)):
        sys.exit(f"flashkda_ops has no kernels here: {reason}")

    plan = replace(GPU_PLAN, steps=args.steps)
    batches = list(islice(packed(standard_library()[0], plan, DEVICE, seed=0), plan.steps))
    scalars = [torch.tensor([schedule(i, plan), i + 1.0], device=DEVICE).unbind() for i in range(plan.steps)]
    inputs = {"fla": [(*without_empty_sequences(batch), *x) for batch, x in zip(batches, scalars, strict=True)]}
    ours = [(*batch, *x) for batch, x in zip(batches, scalars, strict=True)]

    rows: dict[str, dict[str, object]] = {}
    samples: dict[str, Callable[[], None]] = {}
    curves: dict[str, list[float]] = {}
    apart: list[str] = []
    for impl in args.impls:
        with on_path(impl):
            step, curves[impl] = train(impl, iter(inputs.get(impl, ours)))
        rows[impl] = {"impl": impl, "first_loss": curves[impl][0], "last_loss": curves[impl][-1]}
        more = cycle(inputs.get(impl, ours))

        def sample(step: Step = step, more: Iterator[tuple[Tensor, ...]] = more) -> None:
            for x in islice(more, STEPS_PER_SAMPLE):
                step(*x)
            torch.cuda.synchronize()

        if not any(word in impl for word in (AN_ULP_OFF, PORTABLE, FP32)):
            samples[impl] = sample
        print(f"{impl:42} loss {curves[impl][0]:.4f} to {curves[impl][-1]:.4f}", flush=True)
        eager = f"flashkda_ops ({FP32})" if FP32 in impl else "flashkda_ops"
        if impl in CURVE_LIMITS and impl != eager and eager in curves:
            of_means, of_steps = (
                greatest_difference(curves[impl], curves[eager], window) for window in (CURVE_WINDOW, 1)
            )
            rows[impl] |= {"loss_difference": of_means, "loss_difference_at_a_step": of_steps}
            print(f"{'':42} within {of_means:.1e} of eager's curve, a step within {of_steps:.1e}", flush=True)
            if not of_means <= CURVE_LIMITS[impl]:
                apart.append(f"{impl}: {of_means:.1e}, at most {CURVE_LIMITS[impl]:.0e}")

    for impl, (us, spread) in cpu_us(samples, runs=20).items():
        speed = STEPS_PER_SAMPLE * plan.tokens_per_step / us * 1e6
        rows[impl] |= {"step_us": round(us / STEPS_PER_SAMPLE, 1), "tokens_s": round(speed), "spread": round(spread, 4)}
        print(f"{impl:42} {us / STEPS_PER_SAMPLE:9.0f} us a step, {speed:12,.0f} tokens/s")
    print(write("train_step", list(rows.values()), peers={"fla": version("fla-core")}))
    if apart:
        sys.exit("loss curves apart: " + "; ".join(apart))


if __name__ == "__main__":
    main()
