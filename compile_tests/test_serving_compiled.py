"""A runner of compiled functions: its buckets are the only sizes they see, and few compilations serve them all."""

from __future__ import annotations

import torch
from kda_lm import Config, KdaLM
from torch._dynamo.testing import CompileCounterWithBackend

from flashkda_ops.serving import GraphRunner, StatePool


def test_two_compilations_of_decode_and_one_of_prefill_serve_every_bucket_and_size() -> None:
    torch.manual_seed(0)
    model = KdaLM(Config(hidden_size=16, num_layers=1, num_heads=2, head_dim=4, sequences=8)).requires_grad_(False)
    counters = {name: CompileCounterWithBackend("eager") for name in ("decode", "prefill")}
    decode, prefill = (
        torch.compile(getattr(model, name), fullgraph=True, dynamic=True, backend=counter)
        for name, counter in counters.items()
    )
    heat = {"temperature": torch.tensor(0.0)}
    options = {"batch_buckets": (1, 2, 3, 8), "token_buckets": (5, 16, 40), "prefill_sequences": 3}
    runner = GraphRunner(
        decode, prefill, StatePool(model.states()), decode_padding=heat, prefill_padding=heat, **options
    )
    runner.capture()
    frames = {name: counter.frame_count for name, counter in counters.items()}
    assert frames == {"decode": 2, "prefill": 1}  # of decode one for a batch of 1
    for n in range(1, 9):
        slots = {"state_indices": torch.randperm(8)[:n].int(), "temperature": torch.zeros(n)}
        runner.decode(tokens=torch.arange(n), **slots)
    for lengths in ([3], [4, 1], [9, 2, 4], [16], [1, 30]):
        n, cu_seqlens = len(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
        slots = {"state_indices": torch.arange(n).int(), "temperature": torch.zeros(n)}
        has = torch.ones(n, dtype=torch.bool)
        runner.prefill(
            tokens=torch.zeros(1, sum(lengths)).long(), cu_seqlens=cu_seqlens, has_initial_state=has, **slots
        )
    assert {name: counter.frame_count for name, counter in counters.items()} == frames
