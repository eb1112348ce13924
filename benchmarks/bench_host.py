"""Host time of one eager call, from the Python function down to the op: needs no GPU.

The op's body is replaced by one that only allocates its outputs, so what is left is what a call costs on the host.

    python benchmarks/bench_host.py
"""

from __future__ import annotations

from unittest import mock

import torch
from common import cpu_us, write

import flashkda_ops
from flashkda_ops import portable


def allocate_only(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, **_):  # type: ignore[no-untyped-def]
    B, HV, V = v.shape[0], *v.shape[2:]
    return torch.empty_like(v), v.new_empty(B, HV, q.shape[-1], V, dtype=torch.float32), None


def no_gradients(do, dht, *inputs, state_v_first):  # type: ignore[no-untyped-def]
    return portable.Gradients(*(None if x is None else torch.empty_like(x) for x in inputs[:8]))


def main() -> None:
    q, k, v, g = (torch.randn(1, 64, 4, 64, dtype=torch.bfloat16) for _ in range(4))
    beta = torch.rand(1, 64, 4, dtype=torch.bfloat16)
    A_log, dt_bias = torch.rand(4), torch.rand(256)
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g, beta, A_log, dt_bias)]

    def function(q, k, v, g, beta, A_log, dt_bias):  # type: ignore[no-untyped-def]
        return flashkda_ops.chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0, **options)[0]

    def op(q, k, v, g, beta, A_log, dt_bias):  # type: ignore[no-untyped-def]
        call = torch.ops.flashkda.chunk_kda.default
        return call(q, k, v, g, beta, A_log, dt_bias, None, None, None, False, True, True, True, False, -5.0)[0]

    inputs = (q, k, v, g, beta, A_log, dt_bias)
    do = torch.randn_like(v)

    def without_grad(call):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            call(*inputs)

    calls = {
        "an empty torch op (torch.empty_like)": lambda: torch.empty_like(v),
        "torch.ops.flashkda.chunk_kda, no grad": lambda: without_grad(op),
        "flashkda_ops.chunk_kda, no grad": lambda: without_grad(function),
        "torch.ops.flashkda.chunk_kda, training": lambda: op(*leaves),
        "flashkda_ops.chunk_kda, training": lambda: function(*leaves),
        "torch.ops.flashkda.chunk_kda, training + backward": lambda: torch.autograd.grad(op(*leaves), leaves, do),
        "flashkda_ops.chunk_kda, training + backward": lambda: torch.autograd.grad(function(*leaves), leaves, do),
    }
    with (
        mock.patch.object(portable, "chunk_kda", allocate_only),
        mock.patch.object(portable, "chunk_kda_backward", no_gradients),
    ):
        times = cpu_us(calls, runs=40, warmup=5, inner=200)
    rows = []
    for impl, (us, spread) in times.items():
        rows.append({"impl": impl, "host_us": us, "spread": spread})
        print(f"{impl:52} {us:7.1f} us  spread {spread:.2f}")
    print(write("host", rows))


if __name__ == "__main__":
    main()
