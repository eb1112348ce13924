"""Decode on a GPU: ``flashkda::recurrent_kda_paged`` beside fla's kernel and the memory floor.

K = V = 128, bf16 tokens, states in a pool (V-first unless said otherwise), L2 norm, bounded gate and beta sigmoid in
the kernel. Each time is one call among many in one CUDA graph, on states that are rotated so that they never are in the
L2 cache (256 MiB in all). The floor reads and writes states, as often as the form has to, at the speed of a copy.

    python benchmarks/bench_decode.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import capture, copy_gb_s, error, graph_us, version, write

import flashkda_ops
from flashkda_ops.reference import recurrent_kda_reference

K = V = 128
OPTIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "lower_bound": -5.0,
}


class Form(NamedTuple):
    """What a call does with its states."""

    name: str
    tokens: int = 1  # of each sequence; a packed one's most
    packed: bool = False  # sequences of 0 to `tokens` tokens, or of 1
    slots: str = "one"  # a sequence; "each" token; "replay": the state after the accepted tokens of the last call
    state_v_first: bool = True


DECODE = Form("decode")
FORMS = [
    DECODE,
    Form("decode, K-first", state_v_first=False),
    Form("decode, packed", packed=True),
    *(Form("last state", tokens) for tokens in (2, 4, 8)),
    Form("last state, packed", 8, packed=True),
    *(Form("a state a token", tokens, slots="each") for tokens in (2, 4, 8)),
    Form("replay", 8, slots="replay"),
]
CASES = [(DECODE, heads, sequences, torch.float32) for heads in (16, 32, 96) for sequences in (1, 8, 64, 256)]
CASES += [(form, 32, sequences, torch.float32) for form in FORMS[1:] for sequences in (1, 64)]
CASES += [(DECODE, 32, sequences, torch.bfloat16) for sequences in (1, 8, 64, 256)]
CASES += [(form, 32, 64, torch.bfloat16) for form in FORMS[1:]]


class Case:
    """The calls of one form, each on a set of states of its own, and what one of them has to move."""

    def __init__(self, form: Form, heads: int, sequences: int, pool_dtype: torch.dtype) -> None:
        N, T = sequences, form.tokens
        lengths = (torch.arange(N) + 5) % (T + 1) if form.packed and T > 1 else torch.full((N,), T)
        B, length = (1, int(lengths.sum())) if form.packed else (N, T)
        q, k, v, g = (torch.randn(B, length, heads, K, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        beta = torch.randn(B, length, heads, device="cuda", dtype=torch.bfloat16)
        gate = {"A_log": torch.rand(heads, device="cuda"), "dt_bias": torch.rand(heads, K, device="cuda")}
        self.call: dict[str, Any] = {"q": q, "k": k, "v": v, "g": g, "beta": beta} | gate | OPTIONS
        self.call["state_v_first"] = form.state_v_first
        if form.packed:
            self.call["cu_seqlens"] = torch.cat((torch.zeros(1), lengths.cumsum(0))).to("cuda", torch.int32)

        state_bytes = heads * K * V * pool_dtype.itemsize
        writes = lengths if form.slots == "each" else lengths.clamp(max=1)
        self.bytes = int(writes.sum() + lengths.clamp(max=1).sum()) * state_bytes
        rows = N * T if form.slots == "each" else N
        self.copies = min(128, max(1, -(-(256 << 20) // (rows * state_bytes))))
        self.pool = torch.randn(self.copies * rows, heads, V, K, device="cuda", dtype=pool_dtype)
        self.slots = [torch.randperm(rows, device="cuda").int() + copy * rows for copy in range(self.copies)]
        self.accepted = None
        if form.slots != "one":
            self.accepted = 1 + torch.arange(N, device="cuda", dtype=torch.int32) % min(T, 4)
            column = self.accepted.long().unsqueeze(1) - 1
        if form.slots == "each":
            self.slots = [slots.view(N, T) for slots in self.slots]
            self.start = self.slots[0].gather(1, column).squeeze(1).long()
        elif form.slots == "replay":
            self.start = self.slots[0].long()
            self.slots = [s.new_full((N, T), -1).scatter_(1, column, s.unsqueeze(1)) for s in self.slots]
        else:
            self.slots = [slots.sort().values if T > 1 else slots for slots in self.slots]
            self.start = self.slots[0].long()
        # For several tokens and a slot a sequence, fla's kernel takes dense states and returns new ones, in fp32.
        self.dense = form.slots == "one" and T > 1
        self.fla_serves = form.slots != "replay" and not (self.dense and pool_dtype != torch.float32)

    def ours(self, copy: int) -> torch.Tensor:
        return flashkda_ops.recurrent_kda_paged(
            **self.call, state_pool=self.pool, state_indices=self.slots[copy], num_accepted_tokens=self.accepted
        )

    def fla(self, copy: int) -> torch.Tensor:
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

        states: dict[str, Any] = {"initial_state": self.pool, "ssm_state_indices": self.slots[copy]}
        states["num_accepted_tokens"] = self.accepted
        if self.dense:
            states = {"initial_state": self.pool.view(self.copies, -1, *self.pool.shape[1:])[copy]}
            states |= {"output_final_state": True, "inplace_final_state": False}
        return fused_recurrent_kda_fwd(**self.call, **states, scale=K**-0.5, out=torch.empty_like(self.call["v"]))[0]

    def errors(self, impls: dict[str, Callable[[int], torch.Tensor]]) -> dict[str, float]:
        states = self.pool[self.start]
        expected = recurrent_kda_reference(**self.call, initial_state=states)[0]
        errors = {}
        for name, call in impls.items():
            self.pool[self.start] = states
            errors[name] = error(call(0), expected)
        return errors


def main() -> None:
    torch.manual_seed(0)
    peers = {"fla": version("fla-core")}
    ceiling = copy_gb_s()
    rows = []
    print(f"{'form':20} pool     heads sequences | floor |  flashkda_ops (x floor)  error | fla (x floor)  error")
    for form, heads, sequences, pool_dtype in CASES:
        case = Case(form, heads, sequences, pool_dtype)
        impls = {"flashkda_ops": case.ours} | ({"fla": case.fla} if peers["fla"] and case.fla_serves else {})
        errors = case.errors(impls)
        times = graph_us({name: capture(call, case.copies) for name, call in impls.items()}, case.copies)
        floor, pool = case.bytes / ceiling / 1e3, str(pool_dtype).removeprefix("torch.")
        about = {"form": form.name, "pool": pool, "heads": heads, "sequences": sequences, "tokens": form.tokens}
        line = f"{form.name:18} {form.tokens} {pool:8} {heads:5} {sequences:9} | {floor:7.1f} |"
        for name, (us, spread) in times.items():
            rows.append(about | {"impl": name, "graph_us": us, "spread": spread, "floor_us": floor})
            rows[-1]["error"] = errors[name]
            line += f" {us:8.1f} ({us / floor:5.2f}) {errors[name]:.1e} |"
        print(line)
    print(write("decode", rows, ceilings={"copy_gb_s": ceiling}, peers=peers))


if __name__ == "__main__":
    main()
