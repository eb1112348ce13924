"""The example server: streams over HTTP, requests that are cancelled, refused or wrong, an engine that fails."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("aiohttp", reason="the example's HTTP library")

from aiohttp import ClientError, ClientSession
from aiohttp.test_utils import TestServer
from engine import Engine, Event, Request, make_runner
from kda_lm import Config, KdaLM
from serve import make_app

CONFIG = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "head_dim": 4}


def make_engine(slots: int = 4) -> Engine:
    torch.manual_seed(0)
    model = KdaLM(Config(**CONFIG, sequences=slots)).requires_grad_(False)
    runner = make_runner(model, batch_buckets=(4,), token_buckets=(32,), prefill_sequences=2, validate=True)
    return Engine(runner, prefill_tokens=32, prefill_sequences=2)


def serving(client: Callable[[ClientSession], Awaitable[None]], engine: Engine, **options: float) -> None:
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


PROMPT = "prompt must be a string of 1 to 4096 bytes"
TOKENS = "max_tokens must be an integer in [1, 4096]"
TEMPERATURE = "temperature must be a number in [0, 10]"
DEEP = "the body must be JSON without very long numbers or very deep lists"


def field(name: str, value: bytes) -> bytes:
    return b'{"prompt": "a", "%s": %s}' % (name.encode(), value)


BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the body must be JSON: Expecting value"),
    "half an object": (b"{", "the body must be JSON: Expecting property name"),
    "no UTF-8": (b"\xff", "the body must be JSON in UTF-8: 'utf-8' codec can't decode"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "the body must be JSON in UTF-8"),
    "a list": (b"[]", "the body must be a JSON object"),
    "a number": (b"3", "the body must be a JSON object"),
    "null": (b"null", "the body must be a JSON object"),
    "lists in lists": (b"[" * 30_000, DEEP),
    "lists in lists that end": (b"[" * 30_000 + b"]" * 30_000, DEEP),
    "objects in objects": (b'{"a":' * 10_000, DEEP),
    "lists in a field": (field("more", b"[" * 30_000), DEEP),
    "an integer of 5000 digits": (field("max_tokens", b"9" * 5000), DEEP),
    "no prompt": (b"{}", PROMPT),
    "an empty prompt": (b'{"prompt": ""}', PROMPT),
    "a number as prompt": (b'{"prompt": 3}', PROMPT),
    "a list as prompt": (b'{"prompt": ["a"]}', PROMPT),
    "a long prompt": (json.dumps({"prompt": "a" * 4097}).encode(), PROMPT),
    "a prompt of long characters": (json.dumps({"prompt": "\u20ac" * 1366}).encode(), PROMPT),
    "half of a surrogate pair": (b'{"prompt": "a\\ud800"}', "prompt must be text, got half of a surrogate pair"),
    "no tokens": (field("max_tokens", b"0"), TOKENS),
    "fewer than no tokens": (field("max_tokens", b"-1"), TOKENS),
    "too many tokens": (field("max_tokens", b"4097"), TOKENS),
    "tokens of 400 digits": (field("max_tokens", b"9" * 400), TOKENS),
    "infinitely many tokens": (field("max_tokens", b"1e400"), TOKENS),
    "tokens as a float": (field("max_tokens", b"3.0"), TOKENS),
    "tokens as a string": (field("max_tokens", b'"3"'), TOKENS),
    "tokens as a bool": (field("max_tokens", b"true"), TOKENS),
    "tokens as null": (field("max_tokens", b"null"), TOKENS),
    "a word as temperature": (field("temperature", b'"hot"'), TEMPERATURE),
    "a bool as temperature": (field("temperature", b"true"), TEMPERATURE),
    "null as temperature": (field("temperature", b"null"), TEMPERATURE),
    "an object as temperature": (field("temperature", b"{}"), TEMPERATURE),
    "a high temperature": (field("temperature", b"10.1"), TEMPERATURE),
    "a temperature below 0": (field("temperature", b"-1"), TEMPERATURE),
    "a temperature of 400 digits": (field("temperature", b"9" * 400), TEMPERATURE),
    "NaN": (field("temperature", b"NaN"), TEMPERATURE),
    "infinity": (field("temperature", b"Infinity"), TEMPERATURE),
}


def test_bad_bodies_are_told_what_is_wrong() -> None:
    async def client(session: ClientSession) -> None:
        for name, (body, message) in BODIES.items():
            for compress in ("gzip", None):
                async with session.post("/generate", data=body, compress=compress) as response:
                    text = await response.text()
                    assert response.status == 400 and message in text and text.count("\n") == 1, (name, text)
        assert len(await generate(session, prompt="a", max_tokens=2)) == 3

    serving(client, make_engine())


def test_unusual_requests_that_are_right_are_served() -> None:
    right: dict[str, bytes] = {
        "a byte order mark": b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 2}',
        "a zero": b'{"prompt": "\\u0000", "max_tokens": 2}',
        "a surrogate pair": b'{"prompt": "\\ud83d\\ude00", "max_tokens": 2}',
        "the longest prompt, escaped": b'{"prompt": "' + b"\\u0061" * 4096 + b'", "max_tokens": 2}',
        "a field that is not known": b'{"prompt": "a", "max_tokens": 2, "more": [[1]]}',
        "the lowest temperature": field("temperature", b'5e-324, "max_tokens": 2'),
    }

    async def pieces(body: bytes) -> Any:
        for i in range(0, len(body), 7 if len(body) < 100 else 5000):
            yield body[i : i + (7 if len(body) < 100 else 5000)]

    async def client(session: ClientSession) -> None:
        for name, body in right.items():
            for data in (body, pieces(body)):  # the second in chunks
                async with session.post("/generate", data=data) as response:
                    assert response.status == 200 and b'"tokens": 2' in await response.read(), name

    serving(client, make_engine())


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /generate HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(chunks: bytes) -> bytes:
    return b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


def of_charset(charset: str) -> tuple[bytes, int, str]:
    header = f"Content-Type: application/json; charset={charset}"
    return post(b'{"prompt": "a"}', header), 415, f"the body must be JSON in UTF-8, got charset {charset}"


RAW: dict[str, tuple[bytes, int, str]] = {  # what no client library would send; words where they are the server's own
    "a charset that is none": of_charset("no-such-charset"),
    "a charset of Python's": of_charset("undefined"),
    "a charset that is no text": of_charset("hex"),
    "another charset": of_charset("utf-16"),
    "a charset in parts": (post(b"{}", "Content-Type: a/b; charset*0=ut; charset*1=f9"), 415, "got charset utf9"),
    "a content type that is none": (post(b"{}", "Content-Type: ;;;=\xff\xfe"), 400, PROMPT),
    "UTF-8 by name": (post(b"{}", "Content-Type: application/json; charset=UTF8"), 400, PROMPT),
    "a large body": (post(b'{"prompt": "' + b"a" * 70_000 + b'"}'), 413, "Maximum request body size 65536 exceeded"),
    "a large chunk": (chunked(b"20000\r\n" + b"a" * 0x20000 + b"\r\n0\r\n\r\n"), 413, "size 65536 exceeded"),
    "a large body, compressed": (
        post(gzip.compress(b" " * 10_000_000), "Content-Encoding: gzip"), 413, "size 65536 exceeded"
    ),
    "no gzip": (post(b"garbage", "Content-Encoding: gzip"), 400, "the body is not encoded as its headers say"),
    "no deflate": (post(b"\xff\xff", "Content-Encoding: deflate"), 400, "the body is not encoded as its headers say"),
    "half a gzip": (post(gzip.compress(b"{}" * 99)[:-9], "Content-Encoding: gzip"), 400, "the body"),
    "a coding that is none": (post(b"{}", "Content-Encoding: none-such"), 400, PROMPT),
    "a chunk without a size": (chunked(b"zz\r\nabc\r\n0\r\n\r\n"), 400, ""),
    "a chunk of less than nothing": (chunked(b"-5\r\nabc\r\n0\r\n\r\n"), 400, ""),
    "two lengths": (post(b"{}", "Transfer-Encoding: chunked"), 400, ""),
    "no length": (b"POST /generate HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "the body must be JSON"),
    "a length of less than nothing": (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400, ""
    ),
    "an expectation": (post(b"{}", "Expect: the-unexpected"), 417, ""),
    "another method": (b"GET /generate HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, ""),
    "another path": (b"POST /other HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 404, ""),
    "a body that never comes": (post(b"{}")[:-1].replace(b": 2", b": 50"), 408, "the body did not come in time"),
    "a chunk that never comes": (chunked(b"5\r\n{"), 408, "the body did not come in time"),
}  # fmt: skip


def test_whatever_is_sent_is_answered_by_a_status_of_4xx_and_a_reason() -> None:
    async def answer(port: int, sent: bytes) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            return (head + await reader.readexactly(int(lengths[0].split(b":")[1]))).decode()
        finally:
            writer.close()

    async def client(session: ClientSession) -> None:
        base = session._base_url
        assert base is not None and base.port is not None
        for name, (sent, status, message) in RAW.items():
            text = await asyncio.wait_for(answer(base.port, sent), timeout=20)
            assert text.split()[1] == str(status) and message in text, (name, text)
        assert len(await generate(session, prompt="a", max_tokens=2)) == 3
        assert (await idle(session))["free"] == 4

    serving(client, make_engine(), body_timeout=0.3)


def test_the_server_as_it_is_started_answers_and_stops(tmp_path: Path) -> None:
    """As a process of its own, with weights as train_and_generate.py leaves them."""
    saved = {"config": {**CONFIG, "sequences": 1}, "weights": KdaLM(Config(**CONFIG, sequences=1)).state_dict()}
    torch.save(saved, tmp_path / "model.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "examples" / "serve.py"
    command = [sys.executable, script, "--weights", tmp_path / "model.pt", "--device", "cpu", "--slots", "2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parent)}
    server = subprocess.Popen(
        [*map(str, command), "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )

    async def main() -> None:
        async with ClientSession(f"http://127.0.0.1:{port}") as session:
            while True:
                try:
                    async with session.get("/health") as response:
                        assert (await response.json())["slots"] == 2
                        break
                except ClientError:
                    assert server.poll() is None
                    await asyncio.sleep(0.1)
            assert len(await generate(session, prompt="a", max_tokens=3)) == 4
            async with session.post("/generate", data=b"[" * 30_000) as response:
                assert response.status == 400

    try:
        asyncio.run(asyncio.wait_for(main(), timeout=100))
    finally:
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=30)
    assert server.returncode == 0 and b"Traceback" not in output
    assert (
        b"--slots must be positive, got 0"
        in subprocess.run([*map(str, command[:-1]), "0"], capture_output=True, env=environment, check=False).stderr
    )


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
            assert response.status == 500 and await response.text() == "the engine has stopped\n"

    serving(client, Failing(runner, prefill_tokens=32, prefill_sequences=2))
