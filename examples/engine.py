"""Continuous batching: requests join and leave at every step of one loop, each with a slot of the state pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from kda_lm import KdaLM

from flashkda_ops.serving import GraphRunner, PoolExhausted, StatePool


@dataclass(eq=False)
class Request:
    """A prompt to continue by ``max_tokens`` tokens. ``cancelled`` may be set at any time, by any thread."""

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    cancelled: bool = False
    # The engine's:
    slot: int = -1
    prefilled: int = 0  # tokens of the prompt that the state has seen
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.prompt or self.max_tokens < 1:
            raise ValueError("a request needs a prompt of at least one token, and at least one token to generate")


class Event(NamedTuple):
    """A token of a request; ``last`` ends it. A request that was cancelled has none from the next step on."""

    request: Request
    token: int
    last: bool


class Engine:
    """One :meth:`step` is at most one call of prefill and one of decode, and one wait for their tokens.

    Prompts are read in parts of up to ``prefill_tokens`` tokens a step, so that a long one delays the others' next
    tokens by a bounded time; the state carries over from part to part.
    """

    def __init__(self, runner: GraphRunner, *, prefill_tokens: int, prefill_sequences: int) -> None:
        self.runner, self.pool = runner, runner.pool
        self.prefill_tokens, self.prefill_sequences = prefill_tokens, prefill_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Event]:
        """Advance every running request; returns what came of it."""
        self._drop_cancelled()
        self._admit()
        decoding = [r for r in self.running if r.tokens]
        outputs, receivers = [], []
        parts = self._parts()
        if parts:
            outputs.append(self._prefill(parts))
            receivers += [request if end == len(request.prompt) else None for request, end in parts]
        if decoding:
            outputs.append(self._decode(decoding))
            receivers += decoding
        for request, end in parts:
            request.prefilled = end
        if not outputs:
            return []
        events = []
        for request, token in zip(receivers, torch.cat(outputs).tolist(), strict=True):
            if request is not None:  # else: in the middle of its prompt
                request.tokens.append(token)
                events.append(Event(request, token, len(request.tokens) == request.max_tokens))
        self._leave([event.request for event in events if event.last])
        return events

    def _drop_cancelled(self) -> None:
        self.waiting = deque(r for r in self.waiting if not r.cancelled)
        self._leave([r for r in self.running if r.cancelled])

    def _leave(self, requests: list[Request]) -> None:
        self.pool.free(r.slot for r in requests)
        self.running = [r for r in self.running if r not in requests]

    def _admit(self) -> None:
        """In the order of arrival, as long as there are slots."""
        while self.waiting:
            try:
                (slot,) = self.pool.allocate()
            except PoolExhausted:
                return  # the others wait until a request leaves
            request = self.waiting.popleft()
            request.slot = slot
            self.running.append(request)

    def _parts(self) -> list[tuple[Request, int]]:
        """The prompts to read in this step, and up to which token."""
        parts: list[tuple[Request, int]] = []
        budget = self.prefill_tokens
        for request in self.running:
            if budget == 0 or len(parts) == self.prefill_sequences:
                break
            if not request.tokens:
                end = min(len(request.prompt), request.prefilled + budget)
                parts.append((request, end))
                budget -= end - request.prefilled
        return parts

    def _prefill(self, parts: list[tuple[Request, int]]) -> torch.Tensor:
        tokens = [token for request, end in parts for token in request.prompt[request.prefilled : end]]
        ends = accumulate((end - request.prefilled for request, end in parts), initial=0)
        requests = [request for request, _ in parts]
        return self.runner.prefill(
            tokens=torch.tensor([tokens]),
            cu_seqlens=torch.tensor([*ends], dtype=torch.int32),
            has_initial_state=torch.tensor([request.prefilled > 0 for request in requests]),
            **_of_each(requests),
        )

    def _decode(self, requests: list[Request]) -> torch.Tensor:
        return self.runner.decode(tokens=torch.tensor([r.tokens[-1] for r in requests]), **_of_each(requests))


def _of_each(requests: list[Request]) -> dict[str, torch.Tensor]:
    return {
        "state_indices": torch.tensor([r.slot for r in requests], dtype=torch.int32),
        "temperature": torch.tensor([r.temperature for r in requests]),
    }


def make_runner(
    model: KdaLM,
    *,
    batch_buckets: Sequence[int],
    token_buckets: Sequence[int],
    prefill_sequences: int,
    compile: bool = False,
    validate: bool = False,
) -> GraphRunner:
    """A runner of the model's functions on a pool of its own states."""
    decode, prefill = model.decode, model.prefill
    if compile:  # one compilation each, and one for a batch of 1
        decode, prefill = (torch.compile(f, fullgraph=True, dynamic=True) for f in (decode, prefill))
    greedy = {"temperature": torch.tensor(0.0)}
    return GraphRunner(
        decode, prefill, StatePool(model.states(), validate=validate), batch_buckets=batch_buckets,
        token_buckets=token_buckets, prefill_sequences=prefill_sequences, decode_padding=greedy,
        prefill_padding=greedy, validate=validate,
    )  # fmt: skip
