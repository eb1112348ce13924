"""Many calls, with other contents each, from several threads, beside captures, out of memory: none differs, none hangs.

Each case has a process of its own and a time limit, so that a hang or a crash is a failure of one case.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import DEFAULTS, DIFFERENTIABLE, TOKENS, Call, cotangents, graph_of, make_call, paged, random_cu_seqlens
from torch import Tensor
from world import CONTEXT

from flashkda_ops import chunk_kda, chunk_kda_paged, portable, recurrent_kda_paged, shared_chunks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Work = Callable[[], list[Tensor]]


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def _answer(connection: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    connection.send(None)
    try:
        function(*args)
        connection.send(None)
    except BaseException:
        connection.send(traceback.format_exc())
    os._exit(0)  # what is torn down may hang as well, which is another matter


def in_a_process(function: Callable[..., None], *args: Any, limit: float = 60.0) -> None:
    """Run a function that other processes can import, and fail where it raises, crashes or takes ``limit`` seconds."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(there, function, args), daemon=True)
    process.start()
    there.close()
    try:
        for step, seconds in (("begin", 60.0), ("end", limit)):
            if not here.poll(seconds):
                pytest.fail(f"{function.__name__} did not {step} within {seconds:g} s")
            failure = here.recv()
            if failure is not None:
                pytest.fail(failure, pytrace=False)
    except EOFError:
        process.join(5)
        pytest.fail(f"the process of {function.__name__} ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        here.close()


def _crash() -> None:
    os.kill(os.getpid(), 11)


def _fail() -> None:
    raise ArithmeticError("on purpose")


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (time.sleep, (60,), "sleep did not end within 0.5 s"),
        (_crash, (), "ended with exit code -11"),
        (_fail, (), "ArithmeticError: on purpose"),
    ],
    ids=["hang", "crash", "exception"],
)
def test_a_hang_a_crash_and_an_exception_are_failures(
    function: Callable[..., None], args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(pytest.fail.Exception, match=message):
        in_a_process(function, *args, limit=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Work
# ---------------------------------------------------------------------------------------------------------------------


def call_of(device: str, T: int, **options: Any) -> Call:
    """A call, on a GPU one that the kernels serve, on a CPU a short one."""
    if device == "cpu":
        return make_call(T, **{"initial_state": True} | options)
    return make_call(T, device=device, **{"K": 128, "V": 128, "dtype": torch.bfloat16, "initial_state": True} | options)


def forward_of(call: Call) -> Work:
    @torch.no_grad()
    def forward() -> list[Tensor]:
        return list(chunk_kda(**call, output_final_state=True))

    return forward


def backward_of(call: Call) -> Work:
    """The gradients of all arguments, by the op: what a captured training step runs."""
    do, dht = cotangents(call)
    mask = [call.get(name) is not None for name in DIFFERENTIABLE]
    arguments = DEFAULTS | call | {"do": do, "dht": dht, "output_mask": mask}
    return lambda: list(torch.ops.flashkda.chunk_kda_backward(**arguments))


def mixed_work(device: str, seed: int) -> list[Work]:
    """Functions that reach every way in which the ops split their work."""
    gpu = device != "cpu"
    shares = call_of(device, 2048 if gpu else 60, H=12 if gpu else 2, HV=12 if gpu else 2, slow_heads=0, seed=seed)
    segments = call_of(device, 2085 if gpu else 60, H=1, HV=1, slow_heads=1, seed=seed)
    ends = [0, 1000, 1000, 1017, 2900] if gpu else [0, 20, 20, 37, 50]
    packed = call_of(device, ends[-1] + 10, cu_seqlens=ends, seed=seed)
    token = call_of(device, 1, B=16 if gpu else 4, seed=seed)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).to(device)

    def serve() -> list[Tensor]:
        prompt, N = packed, len(ends) - 1
        pool = torch.ones(20, *token["initial_state"].shape[1:], device=device)
        pool[slots[:N]] = prompt["initial_state"]
        outputs = [chunk_kda_paged(**paged(prompt, pool, slots[:N]))]
        for _ in range(3):
            outputs.append(recurrent_kda_paged(**paged(token, pool, slots[: token["q"].shape[0]])))
        return [*outputs, pool]

    calls = (shares, segments, packed)
    return [*map(forward_of, calls), *map(backward_of, calls), serve]


def assert_same(results: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(x, y), f"{what}: result {i}"


def finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Replays
# ---------------------------------------------------------------------------------------------------------------------


def hostile_cu_seqlens(T: int, N: int, generator: torch.Generator) -> Tensor:
    entries = torch.tensor([0, 1, 17, T // 2, T, T + 5, -3, -(2**31), 2**31 - 1])
    return entries[torch.randint(len(entries), (N + 1,), generator=generator)]


def contents(steps: int, T: int, N: int, rows: int, device: str) -> dict[str, Tensor]:
    """What is put into the tensors of a captured call before each step: bounds, slots, counts of accepted tokens."""
    generator = torch.Generator().manual_seed(0)
    bounds = [(hostile_cu_seqlens if i % 4 == 3 else random_cu_seqlens)(T, N, generator) for i in range(steps)]
    slots = torch.rand(steps, rows + 4, generator=generator).argsort(1)[:, :N] - 2  # distinct, some outside of the pool
    tokens = torch.rand(steps, rows + 4, generator=generator).argsort(1)[:, : 2 * N].view(steps, N, 2) - 2
    accepted = torch.randint(0, 4, (steps, N), generator=generator)
    has = torch.rand(steps, N, generator=generator) < 0.7
    drawn = {"bounds": torch.stack(bounds).int(), "slots": slots.int(), "tokens": tokens.int()}
    drawn |= {"accepted": accepted.int(), "has": has}
    return {name: x.to(device) for name, x in drawn.items()}


def replays(device: str, steps: int, every: int, T: int, N: int, HV: int) -> None:
    """One graph of prefill, its gradients, prefill on a pool and decode, replayed with other bounds, slots and counts.

    Every so often its results are those of eager calls. On a CPU, where there are no graphs, the same is called twice.
    """
    rows = 4 * N
    call = call_of(device, T, cu_seqlens=[0] * (N + 1), HV=HV)
    call["cu_seqlens"] = call["cu_seqlens"].int()
    token = call_of(device, 2, B=N, HV=HV)
    start = torch.randn(rows, *call["initial_state"].shape[1:], generator=torch.Generator().manual_seed(1)).to(device)
    pool, drawn = start.clone(), contents(steps, T, N, rows, device)
    now = {name: x[0].clone() for name, x in drawn.items()}
    now["bounds"] = call["cu_seqlens"]
    prefill = paged(call, pool, now["slots"], has_initial_state=now["has"])
    several = paged(token, pool, now["tokens"], num_accepted_tokens=now["accepted"])
    forward, backward = forward_of(call), backward_of(call)

    @torch.no_grad()
    def step() -> list[Tensor]:
        pool.copy_(start)
        results = [*forward(), *backward(), chunk_kda_paged(**prefill), recurrent_kda_paged(**several)]
        if T <= 4096:  # token by token it takes long
            results.append(recurrent_kda_paged(**paged(call, pool, now["slots"])))
        return [*results, pool.clone()]

    if device == "cpu":
        results = step()

        def replay() -> None:
            for x, y in zip(results, step(), strict=True):
                x.copy_(y)
    else:
        graph, results = graph_of(step)
        replay = graph.replay
    for i in range(steps):
        for name, x in now.items():
            x.copy_(drawn[name][i])
        replay()
        if i % every == 0 or i == steps - 1:
            found = [x.clone() for x in results]
            what = f"replay {i} with cu_seqlens {call['cu_seqlens'].tolist()}"
            assert_same(found, step(), what)
            assert all(x.isfinite().all() for x in found), what
    finish(device)


REPLAYS = {
    "few tokens": (9500, 250, 300, 5, 4),
    "shares": (400, 40, 3000, 4, 4),
    "segments": (100, 20, 32768, 6, 2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REPLAYS)
def test_ten_thousand_replays_give_what_eager_calls_give(name: str) -> None:
    in_a_process(replays, "cuda", *REPLAYS[name])


def test_eager_calls_take_the_contents_of_replays() -> None:
    in_a_process(replays, "cpu", 24, 1, 40, 3, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Threads and streams
# ---------------------------------------------------------------------------------------------------------------------


def in_threads(count: int, function: Callable[[int], None]) -> None:
    """The function of 0, 1, ... in as many threads; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def calls_from_threads(device: str, calls: int) -> None:
    """Calls from 4 threads, each with inputs and on a stream of its own, in an order of its own."""
    work = [mixed_work(device, seed) for seed in range(4)]
    expected = [[function() for function in functions] for functions in work]
    finish(device)

    def thread(i: int) -> None:
        order = random.Random(i)
        with torch.cuda.stream(None if device == "cpu" else torch.cuda.Stream()):
            for call in range(calls // 4):
                n = order.randrange(len(work[i]))
                assert_same(work[i][n](), expected[i][n], f"call {call} of thread {i}, work {n}")

    in_threads(4, thread)
    finish(device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_calls_from_four_threads_give_the_bits_of_one(device: str) -> None:
    in_a_process(calls_from_threads, device, 1000 if device != "cpu" else 200)


def capture_beside_calls() -> None:
    """One stream is captured and replayed while another thread launches on another stream."""
    other, captured = mixed_work("cuda", 1), mixed_work("cuda", 2)
    expected_others = [function() for function in other]
    expected = [x for function in captured for x in function()]
    torch.cuda.synchronize()
    done = threading.Event()

    def launch() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not done.is_set():
                for n, function in enumerate(other):
                    assert_same(function(), expected_others[n], f"work {n} beside a capture")

    def capture() -> None:
        try:
            for _ in range(5):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    results = [x for function in captured for x in function()]
                for _ in range(20):
                    graph.replay()
                torch.cuda.current_stream().synchronize()
                assert_same(results, expected, "a replay beside other calls")
        finally:
            done.set()

    in_threads(2, lambda i: (capture, launch)[i]())
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_stream_is_captured_while_another_runs_calls() -> None:
    in_a_process(capture_beside_calls)


def calls_on_two_devices() -> None:
    """Calls on two devices in turn, whichever is current, give the same bits and leave the current device as it is."""
    work = [mixed_work(f"cuda:{i}", 0) for i in range(2)]
    expected = [[x.cpu() for x in function()] for function in work[0]]
    for i, n in itertools.product(range(20), range(len(expected))):
        torch.cuda.set_device(i % 2)
        results = [functions[n]() for functions in work]
        assert torch.cuda.current_device() == i % 2
        for device, found in enumerate(results):
            assert all(x.device.index == device for x in found)
            assert_same([x.cpu() for x in found], expected[n], f"work {n} on device {device}")


@pytest.mark.gpu
def test_two_devices_give_the_same_bits() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    in_a_process(calls_on_two_devices)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_calls(device: str, calls: int) -> None:
    """All of an op's kinds of calls, over and over: then as much memory is held as after the first few hundred."""
    work = mixed_work(device, 0)
    work += [forward_of(call_of(device, T, B=2)) for T in range(1, 40)]  # a plan each

    def run(count: int) -> None:
        for i in range(count):
            work[i % len(work)]()
        finish(device)
        gc.collect()

    def held() -> tuple[int, int, int]:
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), len(gc.get_objects())

    run(8 * len(work))
    before, resident_before = held(), resident()
    run(calls)
    allocated, reserved, objects = held()
    assert allocated == before[0], f"{allocated - before[0]} more bytes are allocated"
    assert reserved <= before[1], f"{reserved - before[1]} more bytes are reserved"
    assert objects - before[2] < calls // 20, f"{objects - before[2]} more objects"
    grown = resident() - resident_before
    assert grown < 2048 * calls, f"{grown} more bytes are resident"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the size of a process from /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_two_thousand_calls_leave_no_memory_behind(device: str) -> None:
    in_a_process(many_calls, device, 2000)


def out_of_memory() -> None:
    """Calls with less and less memory; after each that has too little, the next one with enough gives the same bits."""
    work = mixed_work("cuda", 0)
    expected = [function() for function in work]
    large = call_of("cuda", 8192, H=16, HV=16)
    large |= {name: large[name].repeat(8, *[1] * (large[name].dim() - 1)) for name in (*TOKENS, "initial_state")}
    pool = torch.zeros(8, 16, 128, 128, device="cuda")
    slots = torch.arange(8, device="cuda")

    prefill, train = forward_of(large), backward_of(large)

    def serve() -> list[Tensor]:
        return [chunk_kda_paged(**paged(large, pool, slots))]

    torch.cuda.synchronize()
    total, failures = torch.cuda.get_device_properties(0).total_memory, 0
    for spare in (0, 40, 100, 200, 300, 500, 700, 1000, 1500):  # MiB
        for function in (prefill, train, serve):
            gc.collect()
            torch.cuda.empty_cache()
            allocated = torch.cuda.memory_allocated()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare * 2**20) / total)
            try:
                function()
            except torch.cuda.OutOfMemoryError:
                failures += 1
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.synchronize()
            gc.collect()
            assert torch.cuda.memory_allocated() == allocated, f"{function.__name__} with {spare} MiB leaves memory"
            assert_same(work[failures % len(work)](), expected[failures % len(work)], f"after {function.__name__}")
    assert failures >= 6, f"only {failures} calls ran out of memory"


@pytest.mark.gpu
def test_a_call_without_memory_leaves_the_next_one_right() -> None:
    in_a_process(out_of_memory)


def interrupted_calls() -> None:
    """An exception from within a call, at each of its steps: inputs and pool are as they were, the next call right."""
    call = call_of("cpu", 130, H=4, HV=32, K=128, V=4, cu_seqlens=[0, 60, 60, 120])  # of two runs of chunks
    start, slots = torch.randn(5, *call["initial_state"].shape[1:]), torch.tensor([3, 0, 1])
    pool, forward, backward = start.clone(), forward_of(call), backward_of(call)
    before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}

    def serve() -> list[Tensor]:
        return [chunk_kda_paged(**paged(call, pool, slots))]

    functions = {forward: forward(), backward: backward(), serve: [*serve(), pool.clone()]}
    pool.copy_(start)
    steps = [
        (module, name)
        for module in (portable, shared_chunks)
        for name in ("prepare", "activate", "_scan", "_scan_forward", "_scan_backward")
        if hasattr(module, name)
    ]
    interrupted = {function: 0 for function in functions}
    for (module, name), at, function in itertools.product(steps, range(4), functions):
        original, calls = getattr(module, name), itertools.count()

        def step(*args: Any, original: Any = original, calls: Any = calls, at: int = at, **kwargs: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with mock.patch.object(module, name, step):
            try:
                function()
            except KeyboardInterrupt:
                interrupted[function] += 1
                assert torch.equal(pool, start), f"a pool after an exception from {name}"
        pool.copy_(start)
        assert all(torch.equal(call[x], y) for x, y in before.items())
        results = [*function(), *([pool.clone()] if function is serve else [])]
        assert_same(results, functions[function], f"after an exception from {name}")
        pool.copy_(start)
    assert min(interrupted.values()) >= 2, interrupted


def test_an_exception_within_a_call_leaves_the_next_one_right() -> None:
    in_a_process(interrupted_calls)
