"""Decode on a GPU: ``flashkda::recurrent_kda_paged`` beside fla's kernel and the memory floor.

One token a sequence, K = V = 128, bf16 tokens, fp32 states in a pool, L2 norm, bounded gate and beta sigmoid in the
kernel. Each time is one call among many in one CUDA graph, on states that are rotated so that they never are in the
L2 cache (256 MiB in all). The floor reads and writes each state once at the speed of a copy.

    python benchmarks/bench_decode.py
"""

from __future__ import annotations

import torch
from common import capture, copy_gb_s, error, graph_us, version, write

import flashkda_ops
from flashkda_ops.reference import recurrent_kda_reference

K = V = 128
SHAPES = [(heads, sequences) for heads in (16, 32, 96) for sequences in (1, 8, 64, 256)]
OPTIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "lower_bound": -5.0,
    "state_v_first": True,
}


def fla_kernel():  # type: ignore[no-untyped-def]
    try:
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
    except ImportError:
        return None
    return fused_recurrent_kda_fwd


def main() -> None:
    torch.manual_seed(0)
    fla = fla_kernel()
    ceiling = copy_gb_s()
    rows = []
    print(
        "heads sequences |   floor |" + "".join(f" {name:>13} (x floor)  error |" for name in ("flashkda_ops", "fla"))
    )
    for heads, sequences in SHAPES:
        copies = min(128, max(1, -(-(256 << 20) // (sequences * heads * K * V * 4))))
        q, k, v, g = (torch.randn(sequences, 1, heads, K, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        beta = torch.randn(sequences, 1, heads, device="cuda", dtype=torch.bfloat16)
        gate = {"A_log": torch.rand(heads, device="cuda"), "dt_bias": torch.rand(heads, K, device="cuda")}
        pool = torch.randn(copies * sequences, heads, V, K, device="cuda")
        slots = [torch.randperm(sequences, device="cuda").int() + c * sequences for c in range(copies)]

        def ours(copy: int) -> torch.Tensor:
            return flashkda_ops.recurrent_kda_paged(q, k, v, g, beta, pool, slots[copy], **gate, **OPTIONS)  # noqa: B023

        def theirs(copy: int) -> torch.Tensor:
            return fla(
                q, k, v, g, beta, **gate, initial_state=pool, inplace_final_state=True, scale=K**-0.5,  # noqa: B023
                ssm_state_indices=slots[copy], **OPTIONS,  # noqa: B023
            )[0]  # fmt: skip

        impls = {"flashkda_ops": ours} | ({"fla": theirs} if fla is not None else {})
        states = pool[slots[0].long()]
        reference = recurrent_kda_reference(q, k, v, g, beta, **gate, initial_state=states, **OPTIONS)[0]
        errors = {}
        for name, call in impls.items():
            pool[slots[0].long()] = states
            errors[name] = error(call(0), reference)
        times = graph_us({name: capture(call, copies) for name, call in impls.items()}, copies)
        floor = 2 * sequences * heads * K * V * 4 / ceiling / 1e3
        line = f"{heads:5} {sequences:9} | {floor:7.1f} |"
        for name, (us, spread) in times.items():
            rows.append(
                {"heads": heads, "sequences": sequences, "tokens": 1, "impl": name, "graph_us": us, "spread": spread}
                | {"floor_us": floor, "error": errors[name]}
            )
            line += f" {us:13.1f} ({us / floor:7.2f}) {errors[name]:.1e} |"
        print(line)
    print(write("decode", rows, ceilings={"copy_gb_s": ceiling}, peers={"fla": version("fla-core")}))


if __name__ == "__main__":
    main()
