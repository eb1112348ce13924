"""The portable path on a CPU: forward beside fla's naive recurrence, forward + backward, and their error; packed calls
of many sequences beside dense ones of as many tokens, which is printed alone.

python benchmarks/bench_portable.py
"""

from __future__ import annotations

import torch
from common import Calls, cpu_us, error, version, write

import flashkda_ops
from flashkda_ops.reference import recurrent_kda_reference


def naive_recurrent_kda():  # type: ignore[no-untyped-def]
    """fla's loop over tokens, or None where fla is not installed."""
    try:
        from fla.ops.kda.naive import naive_recurrent_kda
    except ImportError:
        return None
    return naive_recurrent_kda


def many_sequences(K: int, V: int, T: int = 1024, H: int = 2) -> None:
    """Prints how many times a dense call's time packed ones take. Calls with states have as many in the dense call."""

    def tokens(B: int, T: int) -> list[torch.Tensor]:
        q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
        return [q, k, torch.randn(B, T, H, V), -torch.rand(B, T, H, K), torch.rand(B, T, H)]

    def calls(x: list[torch.Tensor], cu_seqlens: torch.Tensor | None) -> Calls:
        N = x[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        pool, slots = torch.zeros(N, H, K, V), torch.arange(N)
        leaves = [t.clone().requires_grad_() for t in x]

        def train() -> None:
            torch.autograd.grad(flashkda_ops.chunk_kda(*leaves, cu_seqlens=cu_seqlens)[0], leaves, x[2])

        return {
            "forward": lambda: flashkda_ops.chunk_kda(*x, cu_seqlens=cu_seqlens),
            "forward + backward": train,
            "prefill": lambda: flashkda_ops.chunk_kda_paged(*x, pool, slots, cu_seqlens=cu_seqlens),
            "decode": lambda: flashkda_ops.recurrent_kda_paged(*x, pool, slots, cu_seqlens=cu_seqlens),
            "transition": lambda: torch.ops.flashkda.chunk_kda_transition(*x[1:], cu_seqlens=cu_seqlens),
        }

    row, rows = tokens(1, T), tokens(T, 1)
    dense, states = calls(row, None), calls(rows, None)
    bounds = {
        f"1 of {T} and {T - 2} empty": torch.tensor([0, *[T] * (T - 1)]),
        f"{T} of 1": torch.arange(T + 1),
        f"{T // 8} of 8": torch.arange(0, T + 1, 8),
        f"{T // 64} of 64": torch.arange(0, T + 1, 64),
    }
    for name, cu_seqlens in bounds.items():
        packed = calls(row, cu_seqlens)
        for op, call in packed.items():
            times = cpu_us({"packed": call, "dense": dense[op], "states": states[op]}, runs=15)
            packed_us, dense_us, states_us = (times[key][0] for key in ("packed", "dense", "states"))
            print(
                f"K={K:3} V={V:3} {name:24} {op:18} {packed_us / 1e3:8.2f} ms, {packed_us / dense_us:5.1f} times one "
                f"dense row, {packed_us / states_us:5.1f} times {T} rows of one token"
            )


def main() -> None:
    torch.manual_seed(0)
    for K, V in ((16, 8), (64, 64)):
        many_sequences(K, V)
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
