"""Serving: a pool of slots, a runner of padded buckets, and an engine on both that never mixes up two sequences."""

from __future__ import annotations

import random
import runpy
import subprocess
import sys
from collections import OrderedDict, deque
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine import Engine, Request, make_runner
from kda_lm import Config, KdaLM
from torch import Tensor, nn

from flashkda_ops import chunk_kda_paged, recurrent_kda_paged, validation
from flashkda_ops.serving import GraphRunner, PoolExhausted, StatePool

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODELS = [  # device, head dimension, dtype: on the portable path, and by the kernels
    ("cpu", 16, torch.float32),
    pytest.param("cuda", 16, torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", 128, torch.bfloat16, marks=pytest.mark.gpu),
]
DRAFTS = 3


class TableModel(nn.Module):
    """Attention alone: a token's inputs are rows of tables, so no matrix product rounds by the size of its batch."""

    state_pool: Tensor

    def __init__(self, device: str = "cpu", K: int = 16, dtype: torch.dtype = torch.float32, slots: int = 12) -> None:
        super().__init__()
        generator, H, vocabulary = torch.Generator().manual_seed(0), 2, 64
        shapes = [(H, K)] * 4 + [(H,)]  # q, k, v, g, beta
        tables = [torch.randn(vocabulary, *shape, generator=generator).to(device, dtype) for shape in shapes]
        self.tables = nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in tables)
        self.register_buffer("state_pool", torch.randn(slots, H, K, K, generator=generator).to(device))
        self.options: dict[str, Any] = {
            "use_gate_in_kernel": True,
            "use_qk_l2norm_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "lower_bound": -5.0,
            "state_v_first": True,
        }

    def decode(self, tokens: Tensor, state_indices: Tensor, num_accepted_tokens: Tensor | None = None) -> Tensor:
        inputs = [table[tokens.view(len(tokens), -1)] for table in self.tables]
        o = recurrent_kda_paged(
            *inputs, self.state_pool, state_indices, num_accepted_tokens=num_accepted_tokens, **self.options
        )
        return o.view(*tokens.shape, *o.shape[2:])

    def prefill(
        self, tokens: Tensor, cu_seqlens: Tensor, state_indices: Tensor, has_initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output of each sequence's last token, and its length."""
        o = chunk_kda_paged(
            *[table[tokens] for table in self.tables], self.state_pool, state_indices, cu_seqlens=cu_seqlens,
            has_initial_state=has_initial_state, batch_invariant=True, **self.options,
        )  # fmt: skip
        return o[0, cu_seqlens[1:] - 1], cu_seqlens.diff()

    def runner(self, capture: bool = True, **options: Any) -> GraphRunner:
        options = {"batch_buckets": (1, 4, 8), "token_buckets": (8, 32), "prefill_sequences": 3, **options}
        runner = GraphRunner(self.decode, self.prefill, StatePool({"recurrent": self.state_pool}), **options)
        if capture:
            runner.capture()
        return runner


def assert_same(actual: Tensor, expected: Tensor, K: int) -> None:
    """The same bits, but on the portable path of a GPU: cuBLAS takes another kernel for another number of products."""
    if actual.is_cuda and K < 128:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(actual, expected)


SPECULATIVE = {
    "tokens": torch.zeros(DRAFTS + 1, dtype=torch.int64),
    "state_indices": torch.full((DRAFTS + 1,), -1, dtype=torch.int32),
    "num_accepted_tokens": torch.tensor(1, dtype=torch.int32),
}


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_inputs(n: int, slots: list[int], seed: int) -> dict[str, Tensor]:
    tokens = torch.randint(64, (n,), generator=torch.Generator().manual_seed(seed))
    return {"tokens": tokens, "state_indices": int32(*slots[:n])}


def prompt(*lengths: int, slots: list[int], fresh: bool = True) -> dict[str, Tensor]:
    return {
        "tokens": torch.arange(sum(lengths)).unsqueeze(0) % 64,
        "cu_seqlens": int32(0, *torch.tensor(lengths).cumsum(0).tolist()),
        "state_indices": int32(*slots),
        "has_initial_state": torch.full((len(lengths),), not fresh),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The engine: many requests, few slots
# ---------------------------------------------------------------------------------------------------------------------


def language_model(device: str, slots: int = 8) -> KdaLM:
    """In fp64, where another batch's rounding is too small to choose another token."""
    torch.manual_seed(0)
    config = Config(hidden_size=16, num_layers=1, num_heads=2, head_dim=4, sequences=slots, dtype=torch.float64)
    return KdaLM(config).double().requires_grad_(False).to(device)


def make_engine(model: KdaLM, prefill_tokens: int = 24) -> Engine:
    """With slots poisoned as they are freed, and slots checked at every call."""
    runner = make_runner(model, batch_buckets=(1, 4, 8), token_buckets=(8, 24), prefill_sequences=4, validate=True)
    runner.capture()
    return Engine(runner, prefill_tokens=prefill_tokens, prefill_sequences=4)


def finish(engine: Engine) -> None:
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        assert steps < 1000


def alone(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    request = Request(prompt, max_tokens)
    engine.submit(request)
    finish(engine)
    return request.tokens


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_requests_get_the_tokens_that_each_gets_alone(device: str) -> None:
    rng, longest = random.Random(0), 8
    model = language_model(device)
    engine = make_engine(model)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(60)]
    expected = [alone(engine, p, longest) for p in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 30

    engine = make_engine(model)
    which = [rng.randrange(len(prompts)) for _ in range(1000)]
    requests = [Request(prompts[i], rng.randint(1, longest)) for i in which]
    arrivals, users = deque(requests), dict.fromkeys(range(engine.pool.slots), 0)
    steps = 0
    while arrivals or engine.busy:
        for _ in range(min(rng.choice((0, 0, 1, 3, 8)), len(arrivals))):
            engine.submit(arrivals.popleft())
        for request in [*engine.running, *engine.waiting]:
            if rng.random() < 0.01:
                request.cancelled = True
        before = {request.slot for request in engine.running if not request.cancelled}
        events = engine.step()
        for request in engine.running:
            users[request.slot] += request.slot not in before
        assert all(not event.request.cancelled for event in events)
        steps += 1
        assert steps < 3000

    for i, request in zip(which, requests, strict=True):
        assert request.tokens == expected[i][: len(request.tokens)]
        assert request.cancelled or len(request.tokens) == request.max_tokens
    assert 50 < sum(request.cancelled for request in requests) < 500
    assert min(users.values()) > 20
    assert engine.pool.available == engine.pool.slots
    assert all(state.isnan().all() for state in engine.pool.states.values())  # the last of them left nothing


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_read_in_parts_gives_the_tokens_of_one_read_at_once(device: str) -> None:
    model, text = language_model(device), [*range(40, 130)]
    whole, in_parts = make_engine(model, prefill_tokens=100), make_engine(model, prefill_tokens=7)
    assert alone(whole, text, 6) == alone(in_parts, text, 6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_shared_prefix_is_read_once_and_copied(device: str) -> None:
    model = language_model(device)
    engine = make_engine(model)
    prefix, rest = [*range(30)], [[1, 2, 3], [4], [5, 6]]
    expected = [alone(engine, prefix + r, 5) for r in rest]
    (cached,) = engine.pool.allocate()
    temperature = torch.zeros(1)
    engine.runner.prefill(**prompt(30, slots=[cached]), temperature=temperature)
    for r, tokens in zip(rest, expected, strict=True):
        request = Request(prefix + r, 5)
        (request.slot,) = engine.pool.allocate()
        engine.pool.copy(cached, request.slot)
        request.prefilled = len(prefix)
        engine.running.append(request)
        finish(engine)
        assert request.tokens == tokens


# ---------------------------------------------------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "K", "dtype"), MODELS)
def test_every_batch_size_and_any_slots_give_the_bits_of_a_call_without_buckets(
    device: str, K: int, dtype: torch.dtype
) -> None:
    bucketed, plain = (TableModel(device, K, dtype) for _ in range(2))
    runner, eager = bucketed.runner(), plain.runner(batch_buckets=(), token_buckets=())
    rng = random.Random(0)
    for round in range(2):
        for n in range(1, 10):  # 9 is above the largest bucket
            slots = rng.sample(range(12), 12)
            inputs = decode_inputs(n, slots, seed=10 * round + n)
            assert_same(runner.decode(**inputs), eager.decode(**inputs), K)
            assert_same(bucketed.state_pool, plain.state_pool, K)
            lengths = [rng.randrange(n + 1) for _ in range(n % 4)]
            if sum(lengths):
                inputs = prompt(*lengths, slots=slots[: len(lengths)], fresh=round == 0)
                used = torch.tensor(lengths, device=device) > 0
                for actual, expected in zip(runner.prefill(**inputs), eager.prefill(**inputs), strict=True):
                    assert_same(actual[used], expected[used], K)
                assert_same(bucketed.state_pool, plain.state_pool, K)


@pytest.mark.parametrize(("device", "K", "dtype"), MODELS)
def test_inputs_may_be_on_the_host_or_on_the_device(device: str, K: int, dtype: torch.dtype) -> None:
    host, there = (TableModel(device, K, dtype) for _ in range(2))
    on_host, on_device = host.runner(), there.runner()
    for n in (3, 8, 9):
        inputs = decode_inputs(n, [*range(12)], seed=n)
        moved = {name: x.to(device) for name, x in inputs.items()}
        assert torch.equal(on_host.decode(**inputs), on_device.decode(**moved))
    inputs = prompt(4, 9, slots=[2, 7])
    moved = {name: x.to(device) for name, x in inputs.items()}
    for a, b in zip(on_host.prefill(**inputs), on_device.prefill(**moved), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(host.state_pool, there.state_pool)


@pytest.mark.parametrize("device", DEVICES)
def test_calls_above_the_largest_bucket_run_as_they_are(device: str) -> None:
    model = TableModel(device)
    sizes: list[tuple[int, ...]] = []

    def decode(tokens: Tensor, state_indices: Tensor) -> Tensor:
        sizes.append(tuple(tokens.shape))
        return model.decode(tokens, state_indices)

    def prefill(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append((inputs["tokens"].shape[1], len(inputs["state_indices"])))
        return model.prefill(**inputs)

    pool = StatePool({"recurrent": model.state_pool})
    runner = GraphRunner(decode, prefill, pool, batch_buckets=(2, 4), token_buckets=(8, 16), prefill_sequences=2)
    for n, expected in ((0, 2), (1, 2), (2, 2), (3, 4), (4, 4), (5, 5)):
        assert len(runner.decode(**decode_inputs(n, [*range(12)], seed=0))) == n
        assert sizes.pop() == (expected,)
    for lengths, size in (((3,), (8, 2)), ((4, 4), (8, 2)), ((9,), (16, 2)), ((17,), (17, 1)), ((1, 1, 1), (3, 3))):
        last, counted = runner.prefill(**prompt(*lengths, slots=[*range(len(lengths))]))
        assert len(last) == len(lengths) and counted.tolist() == [*lengths]
        assert sizes.pop() == size


@pytest.mark.parametrize(("device", "K", "dtype"), MODELS)
def test_warm_up_and_capture_leave_every_state_as_it_is(
    device: str, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The device's free memory is also that of whatever else runs there: here every look finds 1 MiB less.
    free = count(1 << 30, -(1 << 20))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 1 << 40))
    model = TableModel(device, K, dtype)
    before = model.state_pool.clone()
    report = model.runner(capture=False).capture()
    assert torch.equal(model.state_pool, before)
    on_gpu = device == "cuda"
    expected = [("prefill", 32), ("prefill", 8), ("decode", 8), ("decode", 4), ("decode", 1)]
    assert [(graph.phase, graph.size) for graph in report.graphs] == (expected if on_gpu else [])
    assert [graph.bytes for graph in report.graphs] == [1 << 20] * len(report.graphs)
    assert report.bytes == len(report.graphs) << 20
    assert report.seconds > 0 and str(report).startswith("5 graphs" if on_gpu else "no graphs")


def test_progress_is_a_bar_with_tqdm_and_lines_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TableModel().runner(capture=False)
    runner.capture()
    assert capsys.readouterr().err == ""
    runner.capture(progress=True)
    assert "5/5" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    runner.warm_up(progress=True)
    assert capsys.readouterr().err.splitlines()[::4] == ["warm up 1/5: prefill 32", "warm up 5/5: decode 1"]


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_stay_what_they_are_after_further_calls(device: str) -> None:
    runner = TableModel(device).runner()
    kept = [runner.decode(**decode_inputs(n, [*range(12)], seed=n)) for n in (3, 4, 1)]
    kept += runner.prefill(**prompt(5, 2, slots=[0, 1]))
    copies = [x.clone() for x in kept]
    for n in (8, 3, 1):
        runner.decode(**decode_inputs(n, [*range(12)], seed=10 + n))
        runner.prefill(**prompt(n, slots=[n]))
    assert all(torch.equal(x, copy) for x, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize(("device", "K", "dtype"), MODELS)
@pytest.mark.parametrize("captured", [False, True])
def test_accepting_any_number_of_drafts_gives_the_state_of_plain_decoding(
    captured: bool, device: str, K: int, dtype: torch.dtype
) -> None:
    """Round by round each of three sequences drafts three tokens, of which 0 to 3 are accepted."""
    N, width, rng = 3, DRAFTS + 1, random.Random(0)
    plain, speculative = TableModel(device, K, dtype, slots=N), TableModel(device, K, dtype, slots=N * width + 1)
    one_by_one = plain.runner()
    runner = speculative.runner(capture=captured, decode_padding=SPECULATIVE, validate=True)
    slots = [runner.pool.allocate(width) for _ in range(N)]
    for n in range(N):
        speculative.state_pool[slots[n][0]] = plain.state_pool[n]
    accepted = [1] * N  # the token before the drafts is none
    for round in range(8):
        tokens = torch.randint(64, (N, width), generator=torch.Generator().manual_seed(round))
        o = runner.decode(tokens=tokens, state_indices=int32(*slots), num_accepted_tokens=int32(*accepted))
        accepted = [1 + (round + n) % width if round < width else rng.randint(1, width) for n in range(N)]
        for t in range(width):
            still = [n for n in range(N) if t < accepted[n]]
            if still:
                expected = one_by_one.decode(tokens=tokens[still, t], state_indices=int32(*still))
                assert_same(o[still, t], expected, K)
        for n in range(N):
            assert_same(speculative.state_pool[slots[n][accepted[n] - 1]], plain.state_pool[n], K)


def test_checked_mode_names_a_bad_count_of_accepted_tokens() -> None:
    runner = TableModel().runner(decode_padding=SPECULATIVE, validate=True)
    inputs = {"tokens": torch.zeros(1, DRAFTS + 1).long(), "state_indices": int32(runner.pool.allocate(DRAFTS + 1))}
    runner.decode(**inputs, num_accepted_tokens=int32(DRAFTS + 1))
    for bad in (-1, DRAFTS + 2):
        message = rf"num_accepted_tokens must be in \[1, 4\], or 0 for padding, got {bad}"
        with pytest.raises(ValueError, match=message):
            runner.decode(**inputs, num_accepted_tokens=int32(bad))


@pytest.mark.parametrize("device", DEVICES)
def test_a_count_of_no_accepted_tokens_marks_padding_in_checked_mode_too(device: str) -> None:
    model = TableModel(device)
    runner = model.runner(decode_padding=SPECULATIVE, validate=True)
    slots = [runner.pool.allocate(DRAFTS + 1) for _ in range(2)]
    tokens = torch.arange(3 * (DRAFTS + 1)).view(3, -1)
    before = model.state_pool.clone()
    rows = int32(*slots, [-1] * (DRAFTS + 1))
    for last in (0, 1, 7, -2):  # of the sequence that has no slots, whatever the count
        o = runner.decode(tokens=tokens, state_indices=rows, num_accepted_tokens=int32(1, 0, last))
        assert o[0].any() and not o[1:].any()
        changed = (model.state_pool != before).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == sorted(slots[0])


def test_the_convolution_of_the_example_leaves_a_sequence_without_accepted_tokens_as_it_is() -> None:
    model = language_model("cpu", slots=6)
    slots, cold = torch.arange(6).view(2, 3), torch.tensor(0.0)
    model.prefill(torch.tensor([[7, 8, 9, 10]]), int32(0, 2, 4), int32(0, 3), cold)
    before = {name: state.clone() for name, state in model.states().items()}
    for accepted in (0, -1, 4):
        model.decode(torch.ones(2, 3).long(), slots, cold, int32(1, accepted))
        for name, state in model.states().items():
            changed = (state[:6] != before[name][:6]).flatten(1).any(1)
            assert changed[:3].any() and not changed[3:].any()


def test_the_convolution_of_the_example_decodes_speculatively_too() -> None:
    plain = language_model("cpu", slots=2)
    speculative = language_model("cpu", slots=2 * 3)
    slots, text = torch.arange(6).view(2, 3), torch.tensor([[7, 8, 9], [10, 11, 12]])
    cold = torch.tensor(0.0)
    for model, rows in ((plain, [0, 1]), (speculative, [0, 3])):
        model.prefill(text.view(1, -1), int32(0, 3, 6), int32(*rows), cold)
    accepted = int32(1, 1)
    for round in range(4):
        tokens = torch.randint(256, (2, 3), generator=torch.Generator().manual_seed(round))
        guesses = speculative.decode(tokens, slots, cold, accepted)
        accepted = int32(1 + round % 3, 3 - round % 3)
        for t in range(3):
            still = [n for n in range(2) if t < accepted[n]]
            if still:
                assert torch.equal(plain.decode(tokens[still, t], int32(*still), cold), guesses[still, t])
        at = slots.gather(1, accepted.long().unsqueeze(1) - 1).squeeze(1)
        for a, b in zip(plain.states().values(), speculative.states().values(), strict=True):
            torch.testing.assert_close(a, b[at], rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runners_do_not_disturb_each_other(device: str) -> None:
    """Interleaved, on two streams where there are streams."""

    def calls(runner: GraphRunner, seed: int) -> list[Any]:
        steps: list[Any] = []
        for i in range(12):
            inputs = decode_inputs(1 + (seed + i) % 8, [(seed + i + j) % 12 for j in range(12)], seed=seed + i)
            steps.append(lambda inputs=inputs: runner.decode(**inputs))
            packed = prompt(1 + i, 3, slots=[i % 12, (i + 5) % 12])
            steps.append(lambda packed=packed: runner.prefill(**packed)[0])
        return steps

    expected, states = [], []
    for seed in (0, 100):
        model = TableModel(device)
        expected.append([step() for step in calls(model.runner(), seed)])
        states.append(model.state_pool)
    models = [TableModel(device) for _ in range(2)]
    both = [calls(model.runner(), seed) for model, seed in zip(models, (0, 100), strict=True)]
    if device == "cpu":
        results = [[first(), second()] for first, second in zip(*both, strict=True)]
    else:
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for pair in zip(*both, strict=True):
            results.append([])
            for stream, step in zip(streams, pair, strict=True):
                with torch.cuda.stream(stream):
                    results[-1].append(step())
        torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(pair[i], e) for pair, e in zip(results, expected[i], strict=True))
        assert torch.equal(models[i].state_pool, states[i])


@pytest.mark.parametrize("device", DEVICES)
def test_slots_outside_the_pool_are_padding_to_the_runner_too(device: str) -> None:
    model = TableModel(device)
    before = model.state_pool.clone()
    inputs = decode_inputs(3, [5, 99, -1], seed=0)
    o = model.runner().decode(**inputs)
    assert o[0].any() and not o[1:].any()
    changed = (model.state_pool != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("through", ["validate=True", "FLASHKDA_CHECK=1"])
def test_checked_mode_names_bad_slots_before_anything_runs(
    through: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TableModel(device)
    if through == "FLASHKDA_CHECK=1":
        monkeypatch.setattr(validation, "CHECK_VALUES", True)
    runner = model.runner(validate=through == "validate=True")
    held = runner.pool.allocate(3)
    assert held == [0, 1, 2]
    before = model.state_pool.clone()
    for slots, message in (
        ([0, 1, 0], "each slot once, got 0 2 times"),
        ([0, 7, 1], "got 7, which is free"),
        ([0, 12, 1], "got 12, which is not one of the 12 slots"),
        ([0, -2, 1], "got -2, which is not one of the 12 slots"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.decode(**decode_inputs(3, slots, seed=0))
        with pytest.raises(ValueError, match=message):
            runner.prefill(**prompt(1, 2, 3, slots=slots))
    with pytest.raises(ValueError, match="cu_seqlens must never decrease"):
        runner.prefill(**{**prompt(3, slots=[0]), "cu_seqlens": int32(0, -3)})
    assert torch.equal(model.state_pool, before)
    runner.decode(**decode_inputs(3, [0, -1, 2], seed=0))
    assert not torch.equal(model.state_pool, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "decode takes the inputs tokens, state_indices, got state_indices"),
        ({"temperature": torch.zeros(3)}, "decode takes the inputs tokens, state_indices, got"),
        ({"tokens": torch.zeros(3, 1, dtype=torch.int64)}, r"tokens must have shape \[sequences\], got \[3, 1\]"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, "tokens must have 3 entries for 3 state_indices, got 4"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, "tokens must be int64, got int32"),
        ({"state_indices": torch.zeros(3)}, "state_indices must be int32, got float32"),
        ({"state_indices": [0, 1, 2]}, "state_indices must be a tensor, got a list"),
    ],
)
@pytest.mark.parametrize("validate", [False, True])
def test_inputs_of_decode_that_do_not_fit_are_named(change: dict[str, Any], message: str, validate: bool) -> None:
    inputs = {**decode_inputs(3, [0, 1, 2], seed=0), **change}
    with pytest.raises(ValueError, match=message):
        runner = TableModel().runner(capture=False, validate=validate)
        runner.decode(**{name: x for name, x in inputs.items() if x is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(7, dtype=torch.int64)}, r"tokens must have shape \[1, tokens\], got \[7\]"),
        ({"cu_seqlens": int32(0, 7)}, "cu_seqlens must have 3 entries for 2 state_indices, got 2"),
        ({"has_initial_state": torch.tensor([True])}, "has_initial_state must have 2 entries for 2 state_indices"),
        ({"cu_seqlens": [0, 3, 7]}, "cu_seqlens must be a tensor, got a list"),
        ({"cu_seqlens": int32()}, "cu_seqlens must have 3 entries for 2 state_indices, got 0"),
    ],
)
@pytest.mark.parametrize("validate", [False, True])
def test_inputs_of_prefill_that_do_not_fit_are_named(change: dict[str, Any], message: str, validate: bool) -> None:
    with pytest.raises(ValueError, match=message):
        TableModel().runner(capture=False, validate=validate).prefill(**{**prompt(3, 4, slots=[0, 1]), **change})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x.sum(), r"decode must return a row a sequence, 4 of them, got shape \[\]"),
        (lambda x: {"logits": x, "loss": x[:1]}, r"decode must return a row a sequence, 4 of them, got shape \[1\]"),
        (lambda x: None, "decode must return tensors, or tuples, lists and dicts of them, got a NoneType"),
        (lambda x: (x, "text"), "decode must return tensors, .* got a str"),
        (lambda x: {"logits": x, "cache": object()}, "decode must return tensors, .* got a object"),
        (lambda x: x.tolist(), "decode must return tensors, .* got a int"),
    ],
    ids=range(6),
)
def test_functions_must_return_a_row_a_sequence(returned: Any, message: str) -> None:
    model = TableModel()
    pool = StatePool({"recurrent": model.state_pool})
    runner = GraphRunner(lambda **inputs: returned(inputs["tokens"]), model.prefill, pool, batch_buckets=(4,))
    for n in (2, 4):
        with pytest.raises(ValueError, match=message):
            runner.decode(**decode_inputs(n, [*range(12)], seed=0))
    for call in (runner.capture, runner.warm_up):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message.replace("4 of them", "6 of them")):  # above the largest bucket
        runner.decode(**decode_inputs(6, [*range(12)], seed=0))


class Pair(NamedTuple):
    first: Tensor
    second: dict[str, Tensor]


@pytest.mark.parametrize("device", DEVICES)
def test_functions_may_return_what_models_return(device: str) -> None:
    model = TableModel(device)
    pool = StatePool({"recurrent": model.state_pool})

    def decode(tokens: Tensor, state_indices: Tensor) -> Any:
        o = model.decode(tokens, state_indices)
        return OrderedDict(o=o, nested=[Pair(tokens, {"twice": 2 * tokens}), (state_indices,)])

    runner = GraphRunner(decode, model.prefill, pool, batch_buckets=(4,), token_buckets=())
    runner.capture()
    for n in (3, 4, 7):
        inputs = decode_inputs(n, [*range(12)], seed=0)
        out = runner.decode(**inputs)
        pair, (slots,) = out["nested"]
        assert type(out) is OrderedDict and type(pair) is Pair and out["o"].shape[0] == n
        assert pair.first.tolist() == inputs["tokens"].tolist() and slots.tolist() == inputs["state_indices"].tolist()
        assert pair.second["twice"].tolist() == (2 * inputs["tokens"]).tolist()


def test_outputs_of_transformers_are_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = TableModel()
    pool = StatePool({"recurrent": model.state_pool})

    def decode(tokens: Tensor, state_indices: Tensor) -> Any:
        return outputs.CausalLMOutputWithPast(logits=model.decode(tokens, state_indices))

    out = GraphRunner(decode, model.prefill, pool, batch_buckets=(4,)).decode(**decode_inputs(3, [0, 1, 2], seed=0))
    assert type(out) is outputs.CausalLMOutputWithPast and out.logits.shape[0] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Ambient modes: a default device or dtype, inference mode
# ---------------------------------------------------------------------------------------------------------------------

MODES: dict[str, Any] = {"inference mode": torch.inference_mode, "meta": lambda: torch.device("meta")}
IMPORT = """
import torch
with {mode}:
    import flashkda_ops.nn, flashkda_ops.serving, flashkda_ops.distributed
    from flashkda_ops.integrations import flash_kda
def tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        for y in x.values():
            yield from tensors(y)
    elif isinstance(x, (list, tuple, set)):
        for y in x:
            yield from tensors(y)
import sys
held = [name for name, module in sys.modules.items() if name.startswith("flashkda_ops") for _ in tensors(vars(module))]
print(*held)
from flashkda_ops.serving import GraphRunner, StatePool
pool = StatePool({{"x": torch.zeros(4, 1)}})
runner = GraphRunner(lambda tokens, state_indices: tokens + 1, lambda **inputs: inputs["state_indices"], pool)
print(runner.decode(tokens=torch.tensor([1, 2]), state_indices=torch.tensor([0, 1]).int()).tolist())
"""


@pytest.mark.parametrize("mode", ["torch.device('meta')", "torch.inference_mode()"])
def test_the_package_may_be_imported_under_a_mode_and_holds_no_tensor(mode: str) -> None:
    run = [sys.executable, "-c", IMPORT.format(mode=mode)]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["", "[2, 3]"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_runner_may_be_made_under_any_mode_and_used_under_another(mode: Any, device: str) -> None:
    results = []
    for made, used in ((nullcontext, nullcontext), (mode, nullcontext), (nullcontext, mode), (mode, mode)):
        model = TableModel(device)
        with made():
            runner = model.runner(validate=True)
        runner.pool.allocate(12)
        decoded, prompts = decode_inputs(3, [5, 1, 8], seed=0), prompt(4, 9, slots=[2, 7])
        with used():
            outputs = [runner.decode(**decoded), *runner.prefill(**prompts), *runner.prefill(**prompts)]
            runner.pool.copy(2, 3)
            runner.pool.free([1])
        results.append([*outputs, model.state_pool.clone()])
    for result in results[1:]:
        assert all(torch.equal(actual, expected) for actual, expected in zip(result, results[0], strict=True))


@pytest.mark.gpu
def test_a_runner_takes_inputs_of_the_host_under_a_default_device() -> None:
    runner, inputs = TableModel("cuda").runner(), decode_inputs(3, [5, 1, 8], seed=0)
    with torch.device("cuda"):
        runner.decode(**inputs)


@pytest.mark.gpu
def test_what_is_captured_under_autocast_replays_outside_of_it() -> None:
    """A cast of a parameter, which autocast keeps until it ends, is no memory for a graph to read."""
    linear = nn.Linear(256, 256, device="cuda")
    pool = StatePool({"none": torch.zeros(8, 1, device="cuda")})
    table = torch.randn(64, 256, device="cuda")
    options: dict[str, Any] = {"batch_buckets": (4,), "token_buckets": ()}
    runner = GraphRunner(lambda tokens, state_indices: linear(table[tokens]), lambda **_: None, pool, **options)
    inputs = decode_inputs(4, [0, 1, 2, 3], seed=0)
    expected = linear(table[inputs["tokens"].cuda()]).bfloat16()

    def assert_right(actual: Tensor) -> None:
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)

    with torch.autocast("cuda", torch.bfloat16):
        linear(table)  # leaves a cast of the weight
        runner.capture()
        assert_right(linear(table[inputs["tokens"].cuda()]))  # not by a cast that the graph alone makes
        assert_right(runner.decode(**inputs))
    memory = [torch.full((256, 256), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(64)]
    assert_right(runner.decode(**inputs))
    assert all(x.isnan().all() for x in memory)


FAILING_CAPTURE = """
import torch
from flashkda_ops.serving import GraphRunner, StatePool
pool = StatePool({"x": torch.zeros(4, 1, device="cuda")})
decode = lambda tokens, state_indices: tokens * int(state_indices.max())
runner = GraphRunner(decode, lambda **inputs: inputs["state_indices"], pool, batch_buckets=(2,), token_buckets=())
before = torch.cuda.current_stream()
try:
    runner.capture()
except RuntimeError as error:
    print(str(error).splitlines()[0])
print(torch.cuda.current_stream() == before, torch.ones(2, device="cuda").sum().item())
"""


@pytest.mark.gpu
def test_a_function_that_cannot_be_captured_is_named() -> None:
    """In a process of its own: torch is not as it was after a capture that failed."""
    run = [sys.executable, "-c", FAILING_CAPTURE]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith(
        "decode cannot be captured at 2: it may not read values on the host or wait for the device"
    )
    assert lines[1] == "True 2.0"


def test_states_that_were_made_in_inference_mode_say_so_outside_of_it() -> None:
    with torch.inference_mode():
        model = TableModel()
    message = "states must be made outside of torch.inference_mode, or used under it, got recurrent"
    runner = model.runner(capture=False)
    (slot,) = runner.pool.allocate()
    calls = (
        runner.capture,
        lambda: runner.decode(**decode_inputs(1, [slot], seed=0)),
        lambda: runner.prefill(**prompt(3, slots=[slot])),
        lambda: runner.pool.copy(slot),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
        with torch.inference_mode():
            call()


@pytest.mark.parametrize("padding", [torch.zeros((), device="meta"), 0.0])
def test_padding_without_values_is_named(padding: Any) -> None:
    what = "a tensor on the meta device" if isinstance(padding, Tensor) else "a float"
    for argument in ("decode_padding", "prefill_padding"):
        with pytest.raises(ValueError, match=f"{argument} must hold tensors with values, got {what} for heat"):
            TableModel().runner(capture=False, **{argument: {"heat": padding}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_buckets": (4, 2)}, r"batch_buckets must be positive and ascending, got \[4, 2\]"),
        ({"token_buckets": (0, 8)}, r"token_buckets must be positive and ascending, got \[0, 8\]"),
        ({"prefill_sequences": 0}, "prefill_sequences must be positive, got 0"),
    ],
)
def test_buckets_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableModel().runner(**options)


def test_the_usage_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "usage_serving.py"))
    assert "9 slots requested, 8 of 8 are free" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The pool
# ---------------------------------------------------------------------------------------------------------------------


def make_pool(slots: int = 4, **options: Any) -> StatePool:
    states = {"recurrent": torch.ones(slots, 2, 3), "convolution": torch.ones(slots, 5, dtype=torch.bfloat16)}
    return StatePool({**states, "position": torch.ones(slots, dtype=torch.int64)}, **options)


def test_a_full_pool_says_so_and_takes_no_slot() -> None:
    pool = make_pool()
    taken = pool.allocate(3)
    assert sorted(taken) == [0, 1, 2] and pool.available == 1
    with pytest.raises(PoolExhausted, match="2 slots requested, 1 of 4 are free") as raised:
        pool.allocate(2)
    assert (raised.value.requested, raised.value.available, pool.available) == (2, 1, 1)
    pool.free(taken[:1])
    assert sorted(pool.allocate(2)) == [0, 3]
    assert pool.allocate(0) == []
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        pool.allocate(-1)


def test_slots_that_are_not_held_cannot_be_freed_or_copied() -> None:
    pool = make_pool()
    first, second = pool.allocate(2)
    for bad, message in ((3, "got 3, which is free"), (4, "got 4, which is not one of the 4"), (-1, "got -1")):
        with pytest.raises(ValueError, match=message):
            pool.free([first, bad])
        with pytest.raises(ValueError, match=message):
            pool.copy(first, bad)
        with pytest.raises(ValueError, match=message):
            pool.copy(bad, first)
    with pytest.raises(ValueError, match=f"slots must be distinct, got {second} 2 times"):
        pool.free([first, second, second])
    assert pool.available == 2


SLOTS_OF_TYPES: dict[str, Any] = {
    "int64": lambda slots: torch.tensor(slots),
    "int32": lambda slots: torch.tensor(slots, dtype=torch.int32),
    "tensors": lambda slots: [torch.tensor(slot) for slot in slots],
    "numpy": lambda slots: torch.tensor(slots).numpy(),
    "a generator": iter,
}


@pytest.mark.parametrize("of", SLOTS_OF_TYPES.values(), ids=SLOTS_OF_TYPES)
def test_slots_may_be_integers_of_any_type(of: Any) -> None:
    pool = make_pool()
    slots = pool.allocate(4)
    pool.states["position"][slots[0]] = 7
    pool.copy(*of(slots[:2]))
    assert pool.states["position"][slots[1]] == 7
    pool.free(of(slots[1:]))
    assert pool.available == 3
    with pytest.raises(ValueError, match=f"slots must be allocated, got {slots[1]}, which is free"):
        pool.free(of([slots[0], slots[1]]))
    with pytest.raises(ValueError, match=f"slots must be distinct, got {slots[0]} 2 times"):
        pool.free(of([slots[0], slots[0]]))
    again = pool.allocate(3)
    assert sorted([slots[0], *again]) == [0, 1, 2, 3] and all(type(slot) is int for slot in again)


@pytest.mark.parametrize("slots", [[0.0], ["0"], [None], torch.zeros(1), torch.zeros(1, 1).long(), torch.tensor(0)])
def test_slots_that_are_no_integers_are_named(slots: Any) -> None:
    pool = make_pool()
    pool.allocate(1)
    with pytest.raises(ValueError, match="slots must be integers, got"):
        pool.free(slots)
    with pytest.raises(ValueError, match=r"count must be an integer, got 1\.5"):
        pool.allocate(1.5)  # type: ignore[arg-type]
    assert pool.available == 3


def test_a_copy_is_of_every_state_and_of_no_other_slot() -> None:
    pool = make_pool()
    a, b, c, d = pool.allocate(4)
    for state in pool.states.values():
        state[a], state[d] = 7, 9
    pool.copy(a, b, c)
    for state in pool.states.values():
        assert all((state[slot] == 7).all() for slot in (a, b, c)) and (state[d] == 9).all()


def test_freed_slots_are_poisoned_in_checked_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for checked in (False, True):
        monkeypatch.setattr(validation, "CHECK_VALUES", checked)
        pool = make_pool()
        held, freed = pool.allocate(2)
        pool.free([freed])
        assert pool.states["recurrent"][freed].isnan().all() == checked
        assert pool.states["convolution"][freed].isnan().all() == checked
        assert (pool.states["position"][freed] == 0) == checked
        assert all((state[held] == 1).all() for state in pool.states.values())


def test_states_must_agree_on_their_slots() -> None:
    with pytest.raises(ValueError, match="states must name at least one tensor"):
        StatePool({})
    with pytest.raises(ValueError, match=r"one device, got b \[4, 2\] on cpu beside a \[3, 2\] on cpu"):
        StatePool({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match=r"one device, got b \[3\] on meta beside a \[3, 2\] on cpu"):
        StatePool({"a": torch.zeros(3, 2), "b": torch.zeros(3, device="meta")})
    with pytest.raises(ValueError, match="states must be tensors, got a list for b"):
        StatePool({"a": torch.zeros(3, 2), "b": [1, 2, 3]})  # type: ignore[dict-item]
