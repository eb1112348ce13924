"""The portable path on a CPU: forward beside fla's naive recurrence, forward + backward, and their error.

python benchmarks/bench_portable.py
"""

from __future__ import annotations

import torch
from common import cpu_us, error, version, write

import flashkda_ops
from flashkda_ops.reference import recurrent_kda_reference


def naive_recurrent_kda():  # type: ignore[no-untyped-def]
    """fla's loop over tokens, or None where fla is not installed."""
    try:
        from fla.ops.kda.naive import naive_recurrent_kda
    except ImportError:
        return None
    return naive_recurrent_kda


def main() -> None:
    torch.manual_seed(0)
    T, H, D = 2048, 4, 64
    q, k, v = (torch.randn(1, T, H, D) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.rand(1, T, H)
    rows = []
    for regime, shift in (("fast", 0.0), ("slow", -8.0)):
        g = -5 * torch.sigmoid(torch.randn(1, T, H, D) + shift)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g, beta)]

        def train(leaves: list[torch.Tensor] = leaves) -> None:
            o, _ = flashkda_ops.chunk_kda(*leaves)
            torch.autograd.grad(o, leaves, v)

        calls = {"flashkda_ops": lambda g=g: flashkda_ops.chunk_kda(q, k, v, g, beta)}
        naive = naive_recurrent_kda()
        if naive is not None:
            calls["fla naive_recurrent_kda"] = lambda g=g, naive=naive: naive(q, k, v, g, beta)
        train()  # malloc learns sizes as they are freed: without this the first regime pays page faults at every call
        times = cpu_us(calls, runs=20, inner=10) | cpu_us({"flashkda_ops, forward + backward": train}, runs=20)
        reference = recurrent_kda_reference(q, k, v, g, beta)[0]
        for impl, (us, spread) in times.items():
            row = {
                "shape": f"T={T} H={H} K=V={D} fp32",
                "regime": regime,
                "impl": impl,
                "eager_us": us,
                "spread": spread,
            }
            if impl in calls:
                row["error"] = error(calls[impl]()[0], reference)  # type: ignore[index]
            rows.append(row)
            print(f"{regime:5} {impl:34} {us / 1e3:8.2f} ms  spread {spread:.2f}")
    print(write("portable", rows, peers={"fla": version("fla-core")}))


if __name__ == "__main__":
    main()
