"""What calls on a GPU wait for, share and leave alone; memory that is not as torch allocates it; values at the edge."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    DEFAULTS,
    DIFFERENTIABLE,
    TOKENS,
    Call,
    cotangents,
    error,
    kernel_call,
    paged,
    reference,
    requiring_grad,
)
from occupied import Occupant
from torch import Tensor

from flashkda_ops import chunk_kda, chunk_kda_paged, cuda, recurrent_kda, recurrent_kda_paged
from flashkda_ops.ops import chunk_kda_backward

pytestmark = pytest.mark.gpu

PACKED = [0, 1000, 1001, 3000]
FORWARD: dict[str, dict[str, Any]] = {
    "warm-started pieces": {"T": 4096, "slow_heads": 0},
    "segments": {"T": 4096, "slow_heads": 4},
    "segments of 12 heads": {"T": 2048, "H": 12, "HV": 12, "slow_heads": 12},
    "packed": {"T": 3000, "cu_seqlens": PACKED, "slow_heads": 0},
    "packed, slow": {"T": 3000, "cu_seqlens": PACKED, "slow_heads": 4},
    "many heads": {"T": 512, "B": 4, "H": 32, "HV": 32},
}
BACKWARD: dict[str, dict[str, Any]] = {
    "few heads": {"T": 2048},
    "packed": {"T": 2000, "cu_seqlens": [0, 900, 2000]},
    "grouped": {"T": 1500, "H": 2, "HV": 6},
    "many heads": {"T": 256, "B": 2, "H": 32, "HV": 32},
}


def forward(call: Call) -> list[Tensor]:
    with torch.no_grad():
        o, state = chunk_kda(**call, output_final_state=True)
    assert state is not None
    return [o, state]


def backward(call: Call) -> list[Tensor]:
    do, dht = cotangents(call)
    mask = [call.get(name) is not None for name in DIFFERENTIABLE]
    a = chunk_kda_backward.Arguments(**DEFAULTS | call | {"do": do, "dht": dht, "output_mask": mask})
    return [grad for grad, wanted in zip(chunk_kda_backward.op(*a), mask, strict=True) if wanted]


def slots(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def pool_of(call: Call, rows: int, seed: int = 3) -> Tensor:
    shape = call["initial_state"].shape[1:]
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, *shape, generator=generator, device="cuda")


def serve(call: Call, decode_call: Call) -> list[Tensor]:
    """Prefill with a checkpoint and decode on one pool."""
    pool, N = pool_of(call, 6), len(call["initial_state"])
    at, rows = slots(*range(50, 50 + N)).view(N, 1), slots(*[4] + [-1] * (N - 1)).view(N, 1)
    prefill = paged(call, pool, slots(*range(N)), checkpoint_offsets=at, checkpoint_indices=rows)
    step = paged(decode_call, pool, slots(*range(len(decode_call["q"]))))
    return [chunk_kda_paged(**prefill), recurrent_kda_paged(**step), pool]


def equal(results: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Beside another kernel
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def occupant() -> Occupant:
    return Occupant()


def assert_ends_on_few_multiprocessors(occupant: Occupant, function: Callable[[], list[Tensor]]) -> None:
    expected = function()
    for free in (40, 5, 1):
        ended, results = occupant.beside(function, free)
        assert ended, f"it waits for multiprocessors that another kernel holds, with {free} free"
        assert equal(results, expected), f"other bits on {free} multiprocessors"


@pytest.mark.parametrize("form", FORWARD)
@pytest.mark.parametrize("gate", ["bounded", "unbounded"])
def test_prefill_ends_on_one_free_multiprocessor(occupant: Occupant, form: str, gate: str) -> None:
    call = kernel_call(**{"H": 4, "HV": 4, "gate": gate} | FORWARD[form])
    assert_ends_on_few_multiprocessors(occupant, lambda: forward(call))


@pytest.mark.parametrize("form", BACKWARD)
def test_backward_without_clusters_ends_on_one_free_multiprocessor(
    occupant: Occupant, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "CLUSTERS", "0")
    call = kernel_call(**{"H": 4, "HV": 4} | BACKWARD[form])
    assert_ends_on_few_multiprocessors(occupant, lambda: backward(call))


def test_serving_ends_on_one_free_multiprocessor(occupant: Occupant) -> None:
    call = kernel_call(600, H=4, HV=4, cu_seqlens=[0, 100, 350, 600], state_v_first=True)
    step = kernel_call(1, B=3, H=4, HV=4, state_v_first=True)
    assert_ends_on_few_multiprocessors(occupant, lambda: serve(call, step))


def test_a_launch_into_a_full_queue_lets_other_threads_run(occupant: Occupant) -> None:
    step = kernel_call(1, B=4, H=2, HV=2, state_v_first=True)
    arguments = paged(step, pool_of(step, 4), slots(0, 1, 2, 3))
    with torch.cuda.stream(occupant.stream):
        recurrent_kda_paged(**arguments)
    occupant.hold(1)
    began, ran_after = time.monotonic(), []

    def other() -> None:
        time.sleep(0.5)
        ran_after.append(time.monotonic() - began)
        occupant.released.fill_(1)

    thread = threading.Thread(target=other)
    thread.start()
    with torch.cuda.stream(occupant.stream):  # a queue has room for some 1,000 launches
        for _ in range(2600):
            recurrent_kda_paged(**arguments)
    thread.join()
    occupant.release()
    assert ran_after[0] < 2, f"a thread that slept for 0.5 s ran after {ran_after[0]:.1f} s"


# ---------------------------------------------------------------------------------------------------------------------
# Green contexts: some multiprocessors of a device
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def green_context() -> Iterator[Any]:
    module = pytest.importorskip("torch.cuda.green_contexts")
    torch.zeros(1, device="cuda")
    try:
        context = module.GreenContext.create(num_sms=16, device_id=0)
    except RuntimeError as e:
        pytest.skip(f"no green contexts here: {e}")
    yield context


def current_context() -> int | None:
    context = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def test_a_green_context_computes_the_same_bits(green_context: Any) -> None:
    call = kernel_call(2048, H=4, HV=4)
    packed = kernel_call(300, H=4, HV=4, cu_seqlens=[0, 100, 300])
    work = [lambda: forward(call), lambda: forward(packed), lambda: backward(call), lambda: backward(packed)]
    expected = [run() for run in work]  # clusters of 16 blocks have room out here
    torch.cuda.synchronize()
    green_context.set_context()
    try:
        results = [run() for run in work]
        torch.cuda.synchronize()
    finally:
        green_context.pop_context()
    for x, y in zip(results, expected, strict=True):
        assert equal(x, y)
    assert all(equal(run(), y) for run, y in zip(work, expected, strict=True)), "the calls after it"


def test_a_threads_first_call_leaves_its_context_current(green_context: Any) -> None:
    call, found = kernel_call(64, B=2), []

    def run() -> None:
        torch.zeros(1, device="cuda")
        green_context.set_context()
        before = current_context()
        forward(call)
        found.append(current_context() == before)
        torch.cuda.synchronize()
        green_context.pop_context()
        found.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def moved(x: Tensor, elements: int) -> Tensor:
    """The same numbers, as DLPack brings them: without an offset into a storage, from an address so far on."""
    flat = torch.zeros(x.numel() + elements, device=x.device, dtype=x.dtype)
    return torch.from_dlpack(flat[elements:].view(x.shape).copy_(x))


@pytest.mark.parametrize("elements", [1, 3])
@pytest.mark.parametrize("name", [*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens"])
def test_tensors_may_begin_at_any_element(name: str, elements: int) -> None:
    call = kernel_call(150, cu_seqlens=[0, 20, 150])
    off = {**call, name: moved(call[name], elements)}
    assert off[name].data_ptr() % 16 != 0 and off[name].storage_offset() == 0
    assert equal(forward(off), forward(call))
    assert equal(backward(off), backward(call))


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("elements", [1, 4])
def test_pools_may_begin_at_any_element(elements: int, state_v_first: bool) -> None:
    call = kernel_call(100, B=2, state_v_first=state_v_first)
    step = kernel_call(1, B=2, state_v_first=state_v_first)
    pool = pool_of(call, 4)
    off = moved(pool, elements)
    assert off.data_ptr() % 16 == 4 * elements % 16
    rows = slots(3, 1)
    results = [[f(**paged(c, x, rows)) for f, c in ((chunk_kda_paged, call), (recurrent_kda_paged, step))] + [x]
               for x in (off, pool)]  # fmt: skip
    for x, y in zip(*results, strict=True):
        assert error(x, y) < 1e-2


@pytest.mark.parametrize("name", ["state_indices", "num_accepted_tokens", "cu_seqlens"])
def test_indices_may_begin_at_any_element(name: str) -> None:
    call = kernel_call(6, cu_seqlens=[0, 2, 6], state_v_first=True)
    indices = slots(0, 1, 2, 3, 4, 5, 6, 7).view(2, 4)
    for dtype in (torch.int32, torch.int64):
        pools = [pool_of(call, 8), pool_of(call, 8)]
        arguments = [paged(call, pool, indices.to(dtype), num_accepted_tokens=slots(2, 4).to(dtype)) for pool in pools]
        arguments[0][name] = moved(arguments[0][name].contiguous(), 1)
        assert torch.equal(*(recurrent_kda_paged(**a) for a in arguments)) and torch.equal(*pools)


def test_a_tensor_that_is_not_aligned_to_its_elements_is_an_error() -> None:
    call = kernel_call(32, cu_seqlens=[0, 10, 32])
    wide = moved(torch.zeros(6, device="cuda", dtype=torch.int32), 1).view(torch.int64)
    assert wide.data_ptr() % 8 == 4
    with pytest.raises(ValueError, match="cu_seqlens must be aligned to its elements of 8 bytes"):
        forward({**call, "cu_seqlens": wide})


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("name", [*TOKENS, "A_log", "dt_bias", "initial_state", "cu_seqlens"])
def test_freed_storage_is_an_error(name: str, offset: int) -> None:
    call = kernel_call(150, cu_seqlens=[0, 20, 150])
    forward(call)  # its plan is known
    x = torch.cat((call[name].flatten().new_zeros(offset), call[name].flatten()))
    freed = {**call, name: x[offset:].view(call[name].shape)}
    x.untyped_storage().resize_(0)
    message = f"{name} must have storage"
    with pytest.raises(ValueError, match=message):
        forward(freed)
    with pytest.raises(ValueError, match=message):
        backward(freed)
    if name != "initial_state":
        with pytest.raises(ValueError, match=message):
            chunk_kda_paged(**paged(freed, pool_of(call, 4), slots(1, 0)))
        with pytest.raises(ValueError, match=message):
            recurrent_kda_paged(**paged(freed, pool_of(call, 4), slots(1, 0)))
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["state_pool", "state_indices"])
def test_a_pool_without_storage_is_an_error(name: str) -> None:
    call = kernel_call(3, B=2)
    arguments = paged(call, pool_of(call, 4), slots(1, 0))
    arguments[name].untyped_storage().resize_(0)
    for op in (chunk_kda_paged, recurrent_kda_paged):
        with pytest.raises(ValueError, match=f"{name} must have storage"):
            op(**arguments)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", TOKENS)
def test_zeros_that_are_stored_nowhere_are_zeros(name: str) -> None:
    call = kernel_call(150)
    zeros = {**call, name: torch._efficientzerotensor(call[name].shape, device="cuda", dtype=call[name].dtype)}
    assert equal(forward(zeros), forward({**call, name: torch.zeros_like(call[name])}))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every allocation of torch holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.use_deterministic_algorithms(before)


BOUNDS = {
    "late": [7, 20, 60], "early end": [0, 20, 60], "late, early end": [9, 20, 50], "decreasing": [0, 40, 10],
    "decreasing inside": [0, 30, 12, 70], "beyond": [0, 200, 300], "negative": [-5, 10, -9], "none": [64, 64, 64],
    "wide": [0, 2**31 - 1, -(2**31)],
}  # fmt: skip


@pytest.mark.parametrize("bounds", BOUNDS)
def test_every_row_is_written_whatever_the_bounds(bounds: str, poisoned_memory: None) -> None:
    call = kernel_call(70, state_v_first=True, cu_seqlens=BOUNDS[bounds])
    cu = call["cu_seqlens"].clamp(0, 70).cummax(0).values
    well_formed = {**call, "cu_seqlens": cu}
    o, state = forward(call)
    assert equal([o, state], forward(well_formed)) and o.isfinite().all() and state.isfinite().all()
    assert not o[:, : cu[0]].any() and not o[:, cu[-1] :].any()
    for x, y in zip(backward(call), backward(well_formed), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
    N = len(cu) - 1
    a_sequence = slots(*range(N))
    a_token = torch.full((N, 80), -1, device="cuda", dtype=torch.int32)
    a_token[:, 0] = a_sequence
    for op, rows in ((chunk_kda_paged, a_sequence), (recurrent_kda_paged, a_sequence), (recurrent_kda_paged, a_token)):
        pools = [pool_of(call, 5), pool_of(call, 5)]
        results = [op(**paged(c, pool, rows)) for c, pool in zip((call, well_formed), pools, strict=True)]
        assert torch.equal(*results) and torch.equal(*pools) and results[0].isfinite().all()
        assert not results[0][:, : cu[0]].any() and not results[0][:, cu[-1] :].any()


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize("form", ["whole", *FORWARD])
def test_a_gate_that_is_nan_shows_in_the_output(form: str, gate: str) -> None:
    options = {"T": 100, "B": 40, "H": 4, "HV": 4} if form == "whole" else {"H": 4, "HV": 4} | FORWARD[form]
    call = kernel_call(gate=gate, **options)
    T = call["q"].shape[1]
    for wide in (False, True):
        g = call["g"].float() if wide else call["g"].clone()
        at = T // 2 + 3
        g[0, at, 1, 17] = torch.nan
        o, _ = forward({**call, "g": g})
        assert o[0, at, 1].isnan().all(), "at its token"
        others = torch.arange(call["v"].shape[2], device="cuda") != 1
        assert o[:, :, others].isfinite().all(), "other heads"


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
def test_a_gate_that_is_nan_shows_in_gradients_and_in_decode(gate: str) -> None:
    call = kernel_call(200, B=2, H=2, HV=2, gate=gate)
    call["g"][0, 100, 1, 17] = torch.nan
    grads = dict(zip([n for n in DIFFERENTIABLE if n in call], backward(call), strict=True))
    for name in ("q", "k", "v", "g", "beta"):
        assert grads[name][0, 100, 1].isnan().any(), name
        assert grads[name][1].isfinite().all() and grads[name][0, :, 0].isfinite().all(), name
    for T in (1, 3):
        step = kernel_call(T, B=2, H=2, HV=2, gate=gate)
        step["g"][0, 0, 1, 17] = torch.nan
        pool = pool_of(step, 2)
        o = recurrent_kda_paged(**paged(step, pool, slots(0, 1)))
        assert o[0, 0, 1].isnan().all() and pool[0, 1].isnan().any()
        assert o[1].isfinite().all() and o[0, :, 0].isfinite().all() and pool[1].isfinite().all()


@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-20, 300.0])
@pytest.mark.parametrize("options", [{}, {"H": 1, "HV": 3}, {"K": 64, "V": 96}], ids=str)
def test_any_scale_has_its_gradients(scale: float, l2norm: bool, options: dict[str, Any]) -> None:
    call = kernel_call(150, **{"B": 2, "l2norm": l2norm} | options) | {"scale": scale}
    leaves = requiring_grad(call)
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in call.items()}
    wide_leaves = requiring_grad(wide)
    do, dht = cotangents(call)
    names = [name for name in DIFFERENTIABLE if name in call]
    o, state = chunk_kda(**leaves, output_final_state=True)
    expected = torch.autograd.grad(reference(wide_leaves), [wide_leaves[n] for n in names], (do.double(), dht.double()))
    for name, x, y in zip(names, torch.autograd.grad((o, state), [leaves[n] for n in names], (do, dht)), expected,
                          strict=True):  # fmt: skip
        assert x.isfinite().all(), name
        if y.abs().max() > 1e-6:
            assert error(x, y) < (8e-2 if name in ("A_log", "dt_bias") else 4e-2), name
        else:
            assert x.abs().max() < 1e-3, name


@pytest.mark.parametrize("name", ["v", "initial_state", "do", "dht"])
def test_nan_of_one_packed_sequence_reaches_no_other_in_segments(name: str) -> None:
    T = 32768
    bounds = [0, T // 5, T // 2, T - 400, T]
    call = kernel_call(T, H=2, HV=2, cu_seqlens=bounds)
    do, dht = cotangents(call)
    base = DEFAULTS | call | {"do": do, "dht": dht, "output_mask": [True] * 8}
    for victim in range(4):
        x = base[name].clone()
        if name in ("initial_state", "dht"):
            x[victim] = torch.nan
        else:
            x[:, (bounds[victim] + bounds[victim + 1]) // 2] = torch.nan
        results = list(chunk_kda_backward.op(*chunk_kda_backward.Arguments(**base | {name: x})))
        results = [r for i, r in enumerate(results) if i not in (5, 6)]
        if name in call:
            results += forward({**call, name: x})
        for result in results:
            for n in range(4):
                if n != victim:
                    part = result[n] if result.shape[0] == 4 else result[0, bounds[n] : bounds[n + 1]]
                    assert part.isfinite().all(), f"from sequence {victim} to {n}"


@pytest.mark.parametrize(
    "bounds", [[8192, 32768], [-5, 32768], [0, 32777], [0, 16384, 8192], [32768, 16384, 0]], ids=str
)
def test_malformed_bounds_in_segments_are_read_as_whole_sequences_are(bounds: list[int]) -> None:
    call = kernel_call(32768, H=2, HV=2, cu_seqlens=bounds)
    whole = {**call, "batch_invariant": True}
    for x, y in zip(forward(call) + backward(call)[:5], forward(whole) + backward(whole)[:5], strict=True):
        assert x.isfinite().all() and error(x, y) < 1e-2


def test_recurrent_kda_writes_every_row(poisoned_memory: None) -> None:
    call = kernel_call(40, cu_seqlens=[5, 11, 30])
    o, state = recurrent_kda(**call, output_final_state=True)
    expected = reference(call)
    assert state is not None and error(o, expected[0]) < 1e-2 and error(state, expected[1]) < 1e-2
    assert not o[:, :5].any() and not o[:, 30:].any()
