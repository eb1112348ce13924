"""Host time of one eager call, from the Python function down to the op.

On a GPU: until the call returns, launches included, of calls so small that the GPU keeps up; prefill of most shapes is
one launch, of a few heads up to three. Without a GPU the ops' bodies are replaced by some that only allocate their
outputs: what is left is what a call costs above the kernels.

    python benchmarks/bench_host.py
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
from common import cpu_us, write

import flashkda_ops
from flashkda_ops import portable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, D, SEQUENCES = 2, 128, 2


def allocate_only(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options, **_):  # type: ignore[no-untyped-def]
    B, HV, V = v.shape[0], *v.shape[2:]
    return torch.empty_like(v), v.new_empty(B, HV, q.shape[-1], V, dtype=torch.float32), None


def no_gradients(do, dht, *inputs, state_v_first):  # type: ignore[no-untyped-def]
    return portable.Gradients(*(None if x is None else torch.empty_like(x) for x in inputs[:8]))


def no_step(q, k, v, *rest, state_v_first):  # type: ignore[no-untyped-def]
    return torch.empty_like(v)


def main() -> None:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    def inputs_of(T: int, H: int) -> tuple[torch.Tensor, ...]:
        parameters = torch.rand(H, device=DEVICE), torch.rand(H * D, device=DEVICE)
        return (*(randn(1, T, H, D) for _ in range(4)), randn(1, T, H), *parameters)

    def leaves_of(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return [x.clone().requires_grad_() for x in inputs]

    inputs = q, k, v, g, beta, A_log, dt_bias = inputs_of(64, H)
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    leaves = leaves_of(inputs)
    do = torch.randn_like(v)
    tokens = [x[:, :SEQUENCES].transpose(0, 1).contiguous() for x in (q, k, v, g, beta)]
    pool = torch.zeros(SEQUENCES, H, D, D, device=DEVICE)
    slots = torch.arange(SEQUENCES, device=DEVICE, dtype=torch.int32)

    def function(q, k, v, g, beta, A_log, dt_bias):  # type: ignore[no-untyped-def]
        return flashkda_ops.chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0, **options)[0]

    def op(q, k, v, g, beta, A_log, dt_bias):  # type: ignore[no-untyped-def]
        call = torch.ops.flashkda.chunk_kda.default
        return call(q, k, v, g, beta, A_log, dt_bias, None, None, None, False, True, True, True, False, -5.0)[0]

    def decode():  # type: ignore[no-untyped-def]
        call = flashkda_ops.recurrent_kda_paged
        return call(*tokens, pool, slots, A_log, dt_bias, lower_bound=-5.0, **options)

    def decode_op():  # type: ignore[no-untyped-def]
        call = torch.ops.flashkda.recurrent_kda_paged.default
        return call(*tokens, pool, slots, A_log, dt_bias, None, None, None, True, True, True, False, -5.0)

    calls = {
        "an empty torch op (torch.empty_like)": lambda: torch.empty_like(v),
        "torch.ops.flashkda.chunk_kda, no grad": lambda: op(*inputs),
        "flashkda_ops.chunk_kda, no grad": lambda: function(*inputs),
        "torch.ops.flashkda.chunk_kda, training": lambda: op(*leaves),
        "flashkda_ops.chunk_kda, training": lambda: function(*leaves),
        "torch.ops.flashkda.chunk_kda, training + backward": lambda: torch.autograd.grad(op(*leaves), leaves, do),
        "flashkda_ops.chunk_kda, training + backward": lambda: torch.autograd.grad(function(*leaves), leaves, do),
        "torch.ops.flashkda.recurrent_kda_paged": decode_op,
        "flashkda_ops.recurrent_kda_paged": decode,
    }
    if DEVICE == "cuda":
        more = inputs_of(1024, 4)
        more_leaves = leaves_of(more)
        calls |= {
            "flashkda_ops.chunk_kda, no grad, three launches": lambda: function(*more),
            "flashkda_ops.chunk_kda, training, three launches": lambda: function(*more_leaves),
        }
    with ExitStack() as replaced:
        if DEVICE == "cpu":
            bodies = {
                "chunk_kda": allocate_only, "chunk_kda_backward": no_gradients, "recurrent_kda_paged": no_step,
            }  # fmt: skip
            for name, body in bodies.items():
                replaced.enter_context(mock.patch.object(portable, name, body))
        # What is launched in 40 calls does not fill the queue, in which it would wait.
        before = torch.cuda.synchronize if DEVICE == "cuda" else None
        times = cpu_us(calls, runs=100, warmup=5, inner=40, before=before)
    rows = []
    for impl, (us, spread) in times.items():
        rows.append({"impl": impl, "host_us": us, "spread": spread})
        print(f"{impl:52} {us:7.1f} us  spread {spread:.2f}")
    print(write("host", rows))


if __name__ == "__main__":
    main()
