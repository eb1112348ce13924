"""How far the chunk kernels and fla's are from the recurrence in fp64, on the same bf16 inputs.

K = V = 128, with the fp32 initial and final state. Errors are ``||x - ref|| / ||ref||`` of the output and of the final
state, over the whole tensor and of the worst head; and of each gradient over the whole tensor, from random cotangents
of both, up to T = 16384.

    python benchmarks/bench_accuracy.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import error, recurrence, recurrence_gradients, use_first_configurations, version, write

import flashkda_ops

D = 128
Call = dict[str, Any]


def case(
    T: int = 2048,
    H: int = 8,
    *,
    shift: float = 0.0,
    every: int = 1,
    lower_bound: float | None = -5.0,
    noise: float | None = None,
    beta: float | None = None,
    allow_neg_eigval: bool = False,
) -> Call:
    """``shift`` moves the gate of every ``every``-th head; ``noise`` makes all keys one key plus noise."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    k = randn(1, T, H, D)
    if noise is not None:
        k = randn(1, 1, H, D) + noise * k
    heads = torch.arange(H, device="cuda") % every == every - 1
    call = {
        "q": randn(1, T, H, D).bfloat16(),
        "k": k.bfloat16(),
        "v": randn(1, T, H, D).bfloat16(),
        "g": randn(1, T, H, D).bfloat16(),
        "beta": (randn(1, T, H) if beta is None else torch.full((1, T, H), beta, device="cuda")).bfloat16(),
        "A_log": torch.rand(H, device="cuda"),
        "dt_bias": torch.rand(H, D, device="cuda") + shift * heads.unsqueeze(-1),
        "initial_state": randn(1, H, D, D),
    }
    return call | {
        "lower_bound": lower_bound,
        "allow_neg_eigval": allow_neg_eigval,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "state_v_first": True,
        "output_final_state": True,
    }


CASES: dict[str, dict[str, Any]] = {
    "fast gates": {},
    "slow gates": {"shift": -8.0},
    "mixed gates": {"shift": -8.0, "every": 2},
    "unbounded gate": {"lower_bound": None},
    "unbounded gate, slow": {"lower_bound": None, "shift": -8.0},
    "nearly parallel keys, fast gates": {"noise": 0.02, "beta": 4.0},
    "nearly parallel keys, slow gates": {"noise": 0.02, "beta": 4.0, "shift": -8.0},
    "T=16384, fast gates": {"T": 16384},
    "T=16384, slow gates": {"T": 16384, "shift": -8.0},
    "T=65536, fast gates": {"T": 65536},
    "T=65536, slow gates": {"T": 65536, "shift": -8.0},
    "alpha near 1, beta near 2": {"shift": -8.0, "beta": 6.0, "allow_neg_eigval": True},
}


LONGEST_GRADIENTS = 16384
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def fla_chunk_kda() -> Callable[..., Any] | None:
    try:
        from fla.ops.kda import chunk_kda
    except ImportError:
        return None
    use_first_configurations("fla")

    def with_flat_bias(*, dt_bias: torch.Tensor, **call: Any) -> Any:  # fla's backward returns a flat gradient
        return chunk_kda(**call, dt_bias=dt_bias.flatten(), safe_gate=call["lower_bound"] is not None)

    return with_flat_bias


def main() -> None:
    torch.manual_seed(0)
    fla = fla_chunk_kda()
    impls = {"flashkda_ops": flashkda_ops.chunk_kda} | ({"fla": fla} if fla is not None else {})
    rows = []
    for name, options in CASES.items():
        start = time.perf_counter()
        call = case(**options)
        expected = recurrence(call)
        do, dht = torch.randn_like(call["v"]), torch.randn_like(call["initial_state"])
        with_gradients = call["v"].shape[1] <= LONGEST_GRADIENTS
        expected_gradients = recurrence_gradients(call, do, dht) if with_gradients else {}
        for impl, function in impls.items():
            leaves = {name: call[name].detach().requires_grad_(with_gradients) for name in DIFFERENTIABLE}
            outputs = function(**call | leaves)[:2]
            o, state = (x.detach() for x in outputs)
            heads = range(o.shape[2])
            row = {
                "shape": name,
                "impl": impl,
                "error": error(o, expected[0]),
                "error_worst_head": max(error(o[:, :, h], expected[0][:, :, h]) for h in heads),
                "state_error": error(state, expected[1]),
                "state_error_worst_head": max(error(state[:, h], expected[1][:, h]) for h in heads),
            }
            if with_gradients:
                grads = torch.autograd.grad(outputs, list(leaves.values()), (do, dht))
                for argument, grad in zip(leaves, grads, strict=True):
                    row[f"d{argument}"] = error(grad, expected_gradients[argument])
            rows.append(row)
            values = " ".join(f"{value:.2e}" for value in list(row.values())[2:])
            print(f"{name:34} {impl:13} {values}  {time.perf_counter() - start:5.1f} s", flush=True)
        # At once: a run that is cut short leaves what it has.
        written = write("accuracy", rows, peers={"fla": version("fla-core")})
    print(written)


if __name__ == "__main__":
    main()
