"""The example server: streams over HTTP, requests that are cancelled, refused or wrong, an engine that fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

pytest.importorskip("aiohttp", reason="the example's HTTP library")

from aiohttp import ClientError, ClientSession
from aiohttp.test_utils import TestServer
from engine import Engine, Event, Request, make_runner
from kda_lm import Config, KdaLM
from serve import make_app


def make_engine(slots: int = 4) -> Engine:
    torch.manual_seed(0)
    model = KdaLM(Config(hidden_size=16, num_layers=1, num_heads=2, head_dim=4, sequences=slots)).requires_grad_(False)
    runner = make_runner(model, batch_buckets=(4,), token_buckets=(32,), prefill_sequences=2, validate=True)
    return Engine(runner, prefill_tokens=32, prefill_sequences=2)


def serving(client: Callable[[ClientSession], Awaitable[None]], engine: Engine, **options: int) -> None:
    """Run a client against the server of an engine."""

    async def main() -> None:
        server = TestServer(make_app(engine, **options))
        await server.start_server()
        try:
            async with ClientSession(server.make_url("/")) as session:
                await asyncio.wait_for(client(session), timeout=60)
        finally:
            await server.close()

    asyncio.run(main())


async def generate(session: ClientSession, **body: Any) -> list[dict[str, Any]]:
    async with session.post("/generate", json=body) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        lines = [line async for line in response.content if line.strip()]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


async def idle(session: ClientSession) -> dict[str, int]:
    """The server's counts, once it has nothing to do."""
    while True:
        async with session.get("/health") as response:
            counts: dict[str, int] = await response.json()
        if not counts["running"] and not counts["waiting"]:
            return counts
        await asyncio.sleep(0.01)


def test_streams_of_many_clients_are_those_of_each_alone() -> None:
    prompts, engine, expected = [f"def f{i}(" for i in range(12)], make_engine(), []
    for text in prompts:
        engine.submit(request := Request(text.encode(), 20))
        while engine.busy:
            engine.step()
        expected.append(bytes(request.tokens).decode(errors="replace"))

    async def client(session: ClientSession) -> None:
        answers = await asyncio.gather(*(generate(session, prompt=text, max_tokens=20) for text in prompts))
        for events, text in zip(answers, expected, strict=True):
            assert "".join(event["text"] for event in events[:-1]) == text
            assert events[-1] == {"done": True, "tokens": 20} and len(events) == 21
        assert (await idle(session))["free"] == 4

    serving(client, engine)


def test_a_client_that_goes_away_frees_its_slot() -> None:
    async def client(session: ClientSession) -> None:
        response = await session.post("/generate", json={"prompt": "a", "max_tokens": 4000})
        await response.content.readline()
        response.close()
        assert (await idle(session))["free"] == 4

    serving(client, make_engine())


def test_too_many_requests_are_refused() -> None:
    async def client(session: ClientSession) -> None:
        first = await session.post("/generate", json={"prompt": "a", "max_tokens": 4000})
        async with session.post("/generate", json={"prompt": "b"}) as second:
            assert second.status == 503 and second.headers["Retry-After"] == "1"
        first.close()
        await idle(session)
        assert len(await generate(session, prompt="b", max_tokens=3)) == 4

    serving(client, make_engine(), max_requests=1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode"),
        (b"[]", "the body must be a JSON object"),
        (b"{}", "prompt must be"),
        (b'{"prompt": ""}', "prompt must be"),
        (b'{"prompt": 3}', "prompt must be"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens must be"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature must be"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(body: bytes, message: str) -> None:
    async def client(session: ClientSession) -> None:
        async with session.post("/generate", data=body) as response:
            assert response.status == 400 and message in await response.text()

    serving(client, make_engine())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_leaves_no_client_waiting() -> None:
    class Failing(Engine):
        def step(self) -> list[Event]:
            if self.running and len(self.running[0].tokens) == 3:
                raise RuntimeError("out of memory, say")
            return super().step()

    runner = make_engine().runner

    async def client(session: ClientSession) -> None:
        async with session.post("/generate", json={"prompt": "a", "max_tokens": 100}) as response:
            with pytest.raises(ClientError):
                await response.read()
        async with session.post("/generate", json={"prompt": "a"}) as response:
            assert response.status == 500

    serving(client, Failing(runner, prefill_tokens=32, prefill_sequences=2))
