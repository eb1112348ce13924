"""The demo's train step on a GPU, optimizer included: eager, compiled with ``fullgraph=True``, and captured in a CUDA
graph whose ``cu_seqlens`` change at every replay; beside the same model around fla's eager layer.

The model, sizes and data are those of ``examples/train_and_generate.py``. First every variant trains for ``--steps``
steps from the same weights on the same batches, once with each learning rate, and its loss curve is held against that
of the eager kernels, as means of 50 steps: 1e-3 captured and compiled, 2e-2 for the portable path. Compiled, Inductor
rounds bf16 intermediates in other places than eager does, and training amplifies any rounding, the more the higher the
learning rate, whatever the ops. So the compiled step is held to 1e-3 with those rates with which the eager curve itself
stays within half of that when one of its weights is an ulp off. Then the speeds are taken, variants alternating, of
all but the portable path and the one an ulp off, which are here for their curves.

    python benchmarks/bench_train_step.py [--impls flashkda_ops "flashkda_ops (captured)"] [--steps 300]
                                          [--lr 1e-3 1e-4]

fla's autotuner takes minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
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
from train_and_generate import (
    GPU_PLAN,
    Batch,
    CapturedStep,
    Moments,
    make_train_step,
    packed,
    schedule,
    standard_library,
)

DEVICE = torch.device("cuda")
STEPS_PER_SAMPLE = 10
CURVE_WINDOW = 50
AN_ULP_OFF, PORTABLE = "flashkda_ops (an ulp off)", "flashkda_ops (portable)"
FOR_THEIR_CURVES = (AN_ULP_OFF, PORTABLE)
CURVE_LIMITS = {
    AN_ULP_OFF: float("inf"),
    "flashkda_ops (captured)": 1e-3,
    "flashkda_ops (compiled)": 1e-3,
    "flashkda_ops (compiled, captured)": 1e-3,
    PORTABLE: 2e-2,
}
IMPLS = ("flashkda_ops", *CURVE_LIMITS, "fla")
LEARNING_RATES = (GPU_PLAN.lr, 3e-4, 1e-4)

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
    if impl != PORTABLE:
        yield
        return
    plans.clear()
    with mock.patch.object(cuda, "chunk_kda_reason", lambda *arguments, **options: "for comparison"):
        yield
    plans.clear()


class Training:
    """A variant's model, and its step. What has been compiled and captured serves every run."""

    def __init__(self, impl: str) -> None:
        torch.manual_seed(0)
        config = GPU_PLAN.model
        with DEVICE:
            self.model = KdaLM(config)
            if impl == "fla":
                for block in self.model.layers:
                    block.attn = FlaAttention(config)
        if impl == AN_ULP_OFF:
            with torch.no_grad():  # an ulp of the activations, in which the model computes
                next(self.model.layers.parameters()).view(-1)[0].mul_(1 + torch.finfo(config.dtype).eps)
        self.moments = Moments.of(self.model)
        self._parameters = [p.detach().clone() for p in self.model.parameters()]
        self._captures = "captured" in impl or impl in FOR_THEIR_CURVES  # captured, curves are the same

        def compile(fn: Step) -> Step:
            return torch.compile(fn, fullgraph=True, dynamic=False) if "compiled" in impl else fn

        self.step = make_train_step(self.model, self.moments, compile)

    def start_anew(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), self._parameters)
        for moments in self.moments:
            torch._foreach_zero_(moments)

    def losses(self, inputs: list[tuple[Tensor, ...]]) -> list[float]:
        """Of a run from its first weights."""
        if self._captures and not isinstance(self.step, CapturedStep):
            self.step(*inputs[0])
            self.step = CapturedStep(self.step, *inputs[0])
        self.start_anew()
        return [float(loss) for loss in [self.step(*x) for x in inputs]]


def greatest_difference(a: list[float], b: list[float]) -> float:
    """Of the means of every 50 steps of two loss curves."""
    starts = range(0, len(a), CURVE_WINDOW)
    return max(abs(fmean(a[i : i + CURVE_WINDOW]) - fmean(b[i : i + CURVE_WINDOW])) for i in starts)


def too_far(rates: Sequence[float], differences: dict[str, list[float]]) -> list[str]:
    """Curves further than their limit from the eager one, by the learning rates."""
    ulp = differences.get(AN_ULP_OFF, [0.0] * len(rates))
    found = []
    for impl, values in differences.items():
        limit = CURVE_LIMITS[impl]
        steady = [2 * x <= limit for x in ulp] if "compiled" in impl else [True] * len(rates)
        if not any(steady):
            found.append(f"{impl}: no learning rate with which an ulp moves the curve by less than {limit / 2:.0e}")
        found += [
            f"{impl}, learning rate {lr:.0e}: {x:.1e}, at most {limit:.0e}"
            for lr, x, held in zip(rates, values, steady, strict=True)
            if held and not x <= limit
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's train step")
    parser.add_argument("--impls", nargs="+", default=IMPLS, choices=IMPLS, metavar="IMPL", help=", ".join(IMPLS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", nargs="+", type=float, default=LEARNING_RATES, metavar="LR", help="the schedule's peak")
    args = parser.parse_args()
    if reason := cuda.device_reason(torch.device(DEVICE.type, 0)):
        sys.exit(f"flashkda_ops has no kernels here: {reason}")

    plans_by_rate = {lr: replace(GPU_PLAN, steps=args.steps, lr=lr) for lr in args.lr}
    plan = plans_by_rate[args.lr[0]]
    batches = list(islice(packed(standard_library()[0], plan, DEVICE, seed=0), plan.steps))

    def inputs(impl: str, lr: float) -> list[tuple[Tensor, ...]]:
        """Of each step: the batch, the learning rate and the number of the step."""
        found = map(without_empty_sequences, batches) if impl == "fla" else batches
        rates = [torch.tensor([schedule(i, plans_by_rate[lr]), i + 1.0], device=DEVICE) for i in range(plan.steps)]
        return [(*batch, *x.unbind()) for batch, x in zip(found, rates, strict=True)]

    rows: dict[str, dict[str, object]] = {}
    samples: dict[str, Callable[[], None]] = {}
    curves: dict[str, list[list[float]]] = {}
    differences: dict[str, list[float]] = {}
    for impl in args.impls:
        training = Training(impl)
        with on_path(impl):
            curves[impl] = [training.losses(inputs(impl, lr)) for lr in args.lr]
        rows[impl] = {"impl": impl, "lr": args.lr, "last_loss": [fmean(x[-CURVE_WINDOW:]) for x in curves[impl]]}
        print(f"{impl:42} loss " + " ".join(f"{x:.4f}" for x in rows[impl]["last_loss"]), flush=True)
        if impl in CURVE_LIMITS and "flashkda_ops" in curves:
            pairs = zip(curves[impl], curves["flashkda_ops"], strict=True)
            differences[impl] = rows[impl]["loss_difference"] = [greatest_difference(*pair) for pair in pairs]
            print(f"{'':42} within " + " ".join(f"{x:.1e}" for x in differences[impl]), flush=True)
        more = cycle(inputs(impl, args.lr[-1]))

        def sample(step: Step = training.step, more: Iterator[tuple[Tensor, ...]] = more) -> None:
            for x in islice(more, STEPS_PER_SAMPLE):
                step(*x)
            torch.cuda.synchronize()

        if impl not in FOR_THEIR_CURVES:
            samples[impl] = sample

    for impl, (us, spread) in cpu_us(samples, runs=20).items():
        speed = STEPS_PER_SAMPLE * plan.tokens_per_step / us * 1e6
        rows[impl] |= {"step_us": round(us / STEPS_PER_SAMPLE, 1), "tokens_s": round(speed), "spread": round(spread, 4)}
        print(f"{impl:42} {us / STEPS_PER_SAMPLE:9.0f} us a step, {speed:12,.0f} tokens/s")
    print(write("train_step", list(rows.values()), peers={"fla": version("fla-core")}))
    if apart := too_far(args.lr, differences):
        sys.exit("loss curves apart: " + "; ".join(apart))


if __name__ == "__main__":
    main()
