"""An HTTP server that streams from the demo's model, with continuous batching.

    python examples/train_and_generate.py   # leaves weights in examples/out/model.pt
    python examples/serve.py
    curl -N localhost:8000/generate -d '{"prompt": "def __init__(self, ", "max_tokens": 100, "temperature": 0.6}'

The answer is a stream of server-sent events, ``{"text": ...}`` for each byte or piece of a character that is complete,
and ``{"done": true, "tokens": ...}`` at the end. A client that goes away frees its slot at the next step.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import json
import queue
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from aiohttp import web
from engine import Engine, Event, Request, make_runner
from kda_lm import Config, KdaLM, serving_copy

from flashkda_ops import show_config

WEIGHTS = Path(__file__).parent / "out" / "model.pt"
MAX_PROMPT, MAX_TOKENS, MAX_BODY = 4096, 4096, 1 << 16


class Overloaded(RuntimeError):
    """More requests wait than the server takes."""


class Stopped(RuntimeError):
    """The engine does not run any more."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped")


class Server:
    """The engine on a thread of its own, and the streams that its tokens go to.

    Requests cross to that thread through a queue, and the events of a step come back to the event loop in one call.
    A request's body must have come after ``body_timeout`` seconds.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 256, body_timeout: float = 10.0) -> None:
        self.engine, self.max_requests, self.body_timeout = engine, max_requests, body_timeout
        self.streams: dict[Request, asyncio.Queue[Event | None]] = {}  # of the event loop
        self._arrivals: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._loop, self._stopped = asyncio.get_running_loop(), False
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()

    async def close(self) -> None:
        self._arrivals.put(None)
        await asyncio.to_thread(self._thread.join)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Submit a request; its events as they come. Leaving the iteration cancels it."""
        if self._stopped:
            raise Stopped
        if len(self.streams) >= self.max_requests:
            raise Overloaded
        self.streams[request] = asyncio.Queue()
        self._arrivals.put(request)
        try:
            while True:
                event = await self.streams[request].get()
                if event is None:
                    raise Stopped
                yield event
                if event.last:
                    return
        finally:
            request.cancelled = True  # of no effect on one that has ended
            del self.streams[request]

    def _run(self) -> None:
        try:
            while True:
                while not self.engine.busy or not self._arrivals.empty():
                    request = self._arrivals.get()  # waits where there is nothing to do
                    if request is None:
                        return
                    self.engine.submit(request)
                if events := self.engine.step():
                    self._loop.call_soon_threadsafe(self._deliver, events)
        finally:  # whatever ended it: nobody is left waiting
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                self._loop.call_soon_threadsafe(self._stop)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if event.request in self.streams:
                self.streams[event.request].put_nowait(event)

    def _stop(self) -> None:
        self._stopped = True
        for stream in self.streams.values():
            stream.put_nowait(None)


SERVER = web.AppKey("server", Server)


async def read_body(http: web.Request) -> bytes:
    if (charset := http.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise web.HTTPUnsupportedMediaType(text=f"the body must be JSON in UTF-8, got charset {charset}\n")
    try:
        return await asyncio.wait_for(http.read(), http.app[SERVER].body_timeout)
    except asyncio.TimeoutError:
        refused: web.HTTPException = web.HTTPRequestTimeout(text="the body did not come in time\n")
    except web.RequestPayloadError:
        refused = web.HTTPBadRequest(text="the body is not encoded as its headers say\n")
    refused.force_close()  # nothing more is read from this client
    raise refused


def parse(body: bytes) -> object:
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the body must be JSON in UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the body must be JSON: {error}") from None
    except (ValueError, RecursionError):  # Python's limits to the digits of a number, and to lists in lists
        raise ValueError("the body must be JSON without very long numbers or very deep lists") from None


def encode(prompt: object) -> bytes:
    try:
        data = prompt.encode() if isinstance(prompt, str) else b""
    except UnicodeEncodeError:
        raise ValueError("prompt must be text, got half of a surrogate pair") from None
    if not 0 < len(data) <= MAX_PROMPT:
        raise ValueError(f"prompt must be a string of 1 to {MAX_PROMPT} bytes")
    return data


def is_number(value: object, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


async def read_request(http: web.Request) -> Request:
    """The body's JSON as a request, or a status of 4xx with what is wrong."""
    body = await read_body(http)
    try:
        fields = parse(body)
        if not isinstance(fields, dict):
            raise ValueError("the body must be a JSON object")
        prompt, max_tokens = encode(fields.get("prompt")), fields.get("max_tokens", 100)
        temperature = fields.get("temperature", 0.0)
        if not is_number(max_tokens, int) or not 0 < max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens must be an integer in [1, {MAX_TOKENS}]")
        if not is_number(temperature, int, float) or not 0 <= temperature <= 10:
            raise ValueError("temperature must be a number in [0, 10]")
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from None
    return Request(prompt, max_tokens, float(temperature))


async def generate(http: web.Request) -> web.StreamResponse:
    request = await read_request(http)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    async with contextlib.aclosing(http.app[SERVER].stream(request)) as events:
        try:
            async for event in events:
                if not response.prepared:  # now it is known that the request was taken
                    await response.prepare(http)
                piece = text.decode(bytes([event.token]), final=event.last)
                await send(response, {"text": piece})
        except Overloaded:
            raise web.HTTPServiceUnavailable(headers={"Retry-After": "1"}, text="too many requests\n") from None
        except Stopped as stopped:
            if response.prepared:  # the stream ends early, and so without its last event
                raise
            raise web.HTTPInternalServerError(text=f"{stopped}\n") from None
    await send(response, {"done": True, "tokens": len(request.tokens)})
    await response.write_eof()
    return response


async def send(response: web.StreamResponse, message: dict[str, object]) -> None:
    await response.write(f"data: {json.dumps(message)}\n\n".encode())


async def health(http: web.Request) -> web.Response:
    engine = http.app[SERVER].engine
    counts = {"running": len(engine.running), "waiting": len(engine.waiting)}
    return web.json_response({**counts, "slots": engine.pool.slots, "free": engine.pool.available})


def make_app(engine: Engine, **options: float) -> web.Application:
    """The application; ``options`` are those of :class:`Server`."""

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        app[SERVER] = Server(engine, **options)
        yield
        await app[SERVER].close()

    app = web.Application(client_max_size=MAX_BODY)
    app.cleanup_ctx.append(lifespan)
    app.add_routes([web.post("/generate", generate), web.get("/health", health)])
    return app


def load(path: Path, device: torch.device, slots: int) -> KdaLM:
    """The model that ``train_and_generate.py`` left, with its own number of slots."""
    saved = torch.load(path, map_location=device, weights_only=True)
    with device:
        model = KdaLM(Config(**{**saved["config"], "sequences": slots}))
    model.load_state_dict(saved["weights"])
    return serving_copy(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="of train_and_generate.py (examples/out/model.pt)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--slots", type=int, default=32, help="sequences that are served at once (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the model's functions too")
    args = parser.parse_args()
    if args.slots < 1:
        parser.error(f"--slots must be positive, got {args.slots}")
    if not args.weights.is_file():
        parser.error(f"no weights at {args.weights}: run train_and_generate.py first")
    show_config()
    model = load(args.weights, torch.device(args.device), args.slots)
    prefill_tokens, prefill_sequences = 1024, 8
    runner = make_runner(
        model,
        batch_buckets=[n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < args.slots] + [args.slots],
        token_buckets=(64, 256, prefill_tokens),
        prefill_sequences=prefill_sequences,
        compile=args.compile,
    )
    print(runner.capture(progress=True))
    engine = Engine(runner, prefill_tokens=prefill_tokens, prefill_sequences=prefill_sequences)
    # A client that goes away cancels its handler, and so its request.
    web.run_app(make_app(engine), host=args.host, port=args.port, handler_cancellation=True)


if __name__ == "__main__":
    main()
