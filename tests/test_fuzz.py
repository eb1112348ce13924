"""Every op, over drawn calls, is the fp64 recurrence, keeps to its rows and gives the same bits again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import strategies
import torch
from helpers import DIFFERENTIABLE, TOKENS, Call, cotangents, error, reference, requiring_grad
from hypothesis import given
from hypothesis import strategies as st
from strategies import DEVICES, FAR, INDEX_DTYPES, Case, build, exact, same_bits, tolerance
from torch import Tensor

from flashkda_ops import chunk_kda, chunk_kda_paged, cuda, recurrent_kda, recurrent_kda_paged
from flashkda_ops.integrations import flash_kda
from flashkda_ops.portable import num_checkpoints

pytestmark = pytest.mark.fuzz
on_every_device = pytest.mark.parametrize("device", DEVICES)
Results = tuple[Tensor, ...]


def v_first(states: Tensor, case: Case) -> Tensor:
    return states if case.state_v_first else states.mT


def initial(call: Call, case: Case) -> Tensor | None:
    states = call.get("initial_state")
    return None if states is None else v_first(states, case)


def assert_repeats(function: Callable[[Call], Results], call: Call, results: Results) -> None:
    """The same bits from copies of the tensors, in memory that holds NaN before; and all tensors are as they were."""
    before = strategies.contiguous(call)
    with strategies.memory_poisoned():
        again = function(strategies.contiguous(call))
    assert all(same_bits(x, y) for x, y in zip(results, again, strict=True))
    assert all(same_bits(x, before[name]) for name, x in call.items() if isinstance(x, Tensor))


def safe_bounds(case: Case, device: str) -> Tensor:
    return torch.tensor([case.spans[0][1], *(end for _, _, end in case.spans)], device=device)


def assert_taken_as_safe(function: Callable[[Call], Results], call: Call, case: Case, results: Results) -> None:
    """A ``cu_seqlens`` that breaks the rules is taken as its running maximum within the tokens that there are."""
    if case.cu_seqlens is not None:
        safe = safe_bounds(case, call["v"].device)
        if safe.tolist() != list(case.cu_seqlens):
            assert all(same_bits(x, y) for x, y in zip(function(call | {"cu_seqlens": safe}), results, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Whole sequences
# ---------------------------------------------------------------------------------------------------------------------


@on_every_device
@given(data=st.data())
def test_prefill_is_the_recurrence(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True))
    interval = data.draw(st.sampled_from((None, None, 64, 32)))
    call, spans = build(case, device), case.spans

    @torch.no_grad()
    def run(call: Call) -> Results:
        if interval is None:
            return chunk_kda(**call, output_final_state=True)
        return chunk_kda(**call, output_final_state=True, return_intermediate_states=True, chunk_size=interval)

    results = o, state, *rest = run(call)
    assert o.is_contiguous() and state.is_contiguous()
    is_served = strategies.served(call) and interval is None
    offsets = [list(range(0, length, interval)) if interval else [] for length in case.lengths]
    after = torch.full((len(spans), max(map(len, offsets), default=0) + 1), -1)
    for n, (length, row) in enumerate(zip(case.lengths, offsets, strict=True)):
        after[n, : len(row) + 1] = torch.tensor([length, *row])
    expected = exact(call, spans, initial(call, case), after.to(device), clamped=is_served)
    allowed = tolerance(case, call, is_served)
    assert strategies.worst_output(o, expected, spans) < allowed.o
    final = v_first(state, case).unsqueeze(1)
    assert strategies.worst_state(final, expected.states[:, :1], expected.state_sizes[:, :1]) < allowed.state
    assert not strategies.outside(o, spans).any()
    for n, length in enumerate(case.lengths):
        if length == 0:
            given = call["initial_state"][n] if case.initial_state else torch.zeros_like(state[n])
            assert same_bits(state[n], given)
    if interval is not None:
        (states,) = rest
        NT = num_checkpoints(case.T, len(spans), interval, packed=case.cu_seqlens is not None)
        assert states.shape == (case.B, NT, *state.shape[1:])
        listed = v_first(states, case)
        if case.cu_seqlens is not None:
            rows = iter(listed[0])
            for n, row in enumerate(offsets):
                for c in range(len(row)):
                    want = expected.states[n, c + 1], expected.state_sizes[n, c + 1]
                    assert strategies.worst_state(next(rows), *want) < allowed.state
            assert not any(x.any() for x in rows)
        elif case.B and NT:
            assert strategies.worst_state(listed, expected.states[:, 1:], expected.state_sizes[:, 1:]) < allowed.state
    if device == "cpu" and not is_served and case.cu_seqlens is None and case.B:
        o_reference, state_reference = reference(call)
        assert error(expected.o.flatten(0, 1), o_reference.flatten(0, 1)) < 1e-9
        assert error(expected.states[:, 0], v_first(state_reference, case)) < 1e-9
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


@on_every_device
@given(data=st.data())
def test_the_recurrent_function_is_the_recurrence(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True, most_tokens=20, long=False))
    call = build(replace(case, batch_invariant=False), device)
    del call["batch_invariant"]

    @torch.no_grad()
    def run(call: Call) -> Results:
        return recurrent_kda(**call, output_final_state=True)

    results = o, state = run(call)
    expected, allowed = exact(call, case.spans, initial(call, case)), tolerance(case, call, False)
    assert strategies.worst_output(o, expected, case.spans) < allowed.o
    final = v_first(state, case).unsqueeze(1)
    assert strategies.worst_state(final, expected.states, expected.state_sizes) < allowed.state
    assert not strategies.outside(o, case.spans).any()
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


@on_every_device
@given(data=st.data())
def test_the_transition_takes_states_to_where_the_recurrence_takes_them(device: str, data: st.DataObject) -> None:
    case = replace(data.draw(strategies.cases(device, hostile=True)), initial_state=True)
    call = build(case, device)

    def run(call: Call) -> Results:
        names = ("q", "initial_state", "scale", "batch_invariant")
        return torch.ops.flashkda.chunk_kda_transition(**{name: x for name, x in call.items() if name not in names})

    results = M, B = run(call)
    is_served = strategies.served(call) and case.K == case.V == 128  # others are not filled up here
    M, B = M.double(), v_first(B, case).double()
    M = M if case.state_v_first else M.mT
    S = v_first(call["initial_state"], case).double()
    expected = exact(call, case.spans, S, clamped=is_served)
    # What the map gives is rounded in M, as much as S is large, and in B, as much as that is, though they may cancel.
    sizes = torch.maximum(expected.state_sizes[:, 0], (S @ M).flatten(2).norm(dim=-1) + B.flatten(2).norm(dim=-1))
    allowed = tolerance(case, call, is_served).state * (2.5 if is_served else 1)
    applied = (S @ M + B).to(results[1].dtype)
    assert strategies.worst_state(applied, expected.states[:, 0], sizes) < allowed
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


@on_every_device
@given(data=st.data())
def test_flash_kda_writes_what_the_recurrence_gives_and_nothing_beside(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True))
    case = replace(case, gate="bounded", beta="sigmoid", l2norm=True, state_v_first=True, speed="mixed")
    state_dtype = torch.promote_types(case.dtype, torch.float32)
    if case.dtype != torch.float64:
        state_dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    in_place, with_state = data.draw(st.booleans()), data.draw(st.booleans())
    where = data.draw(st.sampled_from(strategies.PLACES)), data.draw(st.sampled_from(strategies.PLACES))
    call = build(case, device)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound", "initial_state", "cu_seqlens")
    call = {name: call[name] for name in names if name in call} | {"scale": case.K**-0.5}
    if "initial_state" in call:
        call["initial_state"] = call["initial_state"].to(state_dtype)

    def run(call: Call) -> Results:
        call = dict(call)
        out = strategies.placed(torch.full_like(call["v"], torch.nan, memory_format=torch.contiguous_format), where[0])
        final = torch.full((len(case.spans), case.HV, case.V, case.K), torch.nan, device=device, dtype=state_dtype)
        if in_place and "initial_state" in call:
            final = call["initial_state"] = call["initial_state"].clone()
        else:
            final = strategies.placed(final, where[1])
        whole = [x if x._base is None else x._base for x in (out, final)]
        marks = [strategies.bits(x.clone()) for x in whole]
        given = final if with_state else None
        assert flash_kda.fwd(**call, out=out, final_state=given) is None
        # What lies around the outputs is as it was: with the outputs set back to what they held, all is.
        results = out.clone(), final.clone()
        if not in_place or "initial_state" not in call:
            out.fill_(torch.nan)
            final.fill_(torch.nan)
            assert all(torch.equal(strategies.bits(x), mark) for x, mark in zip(whole, marks, strict=True))
        return results if with_state else results[:1]

    results = run(call)
    full = call | {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    full |= {"allow_neg_eigval": False, "state_v_first": True}
    is_served = strategies.served(full | {"initial_state": None})
    expected = exact(full, case.spans, call.get("initial_state"), clamped=is_served)
    allowed = tolerance(case, full, is_served)
    assert strategies.worst_output(results[0], expected, case.spans) < allowed.o
    assert not strategies.outside(results[0], case.spans).any()
    if with_state:
        rounded = max(allowed.state, strategies.ROUNDED[state_dtype])
        final = results[1].unsqueeze(1)
        assert strategies.worst_state(final, expected.states, expected.state_sizes) < rounded
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


def gradients(function: Callable[[Call], Any], call: Call, names: Sequence[str], given: Sequence[Any]) -> Results:
    """Of the named arguments, from cotangents of the output and the final state, either absent."""
    leaves = requiring_grad(call, tuple(names))
    pairs = [(x, dx.to(x.dtype)) for x, dx in zip(function(leaves), given, strict=True) if dx is not None]
    pairs = [(x, dx) for x, dx in pairs if x.requires_grad]
    inputs = tuple(leaves[name] for name in names)
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)


GRADIENT_TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the portable path, by the dtype of the argument, where what is summed does not cancel."""


def gradient_distance(name: str, actual: Tensor, expected: Tensor, case: Case, size: float) -> float:
    """Of the worst sequence, where the argument has tokens. One that has next to nothing is judged by the others.

    size: of what the gradient is a difference of.
    """
    assert torch.isfinite(actual).all(), name

    def distance(x: Tensor, y: Tensor, least: float) -> float:
        away = float((x.double() - y).norm()) - strategies.subnormal(x.dtype, x.numel())
        return max(away, 0.0) / max(float(y.norm()), least, 1e-300)

    if name not in TOKENS or case.T == 0:
        return distance(actual, expected, size)
    found, norm = [0.0], float(expected.norm())
    for span, length in zip(case.spans, case.lengths, strict=True):
        if length:
            (x,), (y,) = strategies.of_sequences(actual, [span]), strategies.of_sequences(expected, [span])
            found.append(distance(x, y, max(0.1 * norm * (length / (case.B * case.T)) ** 0.5, size)))
    return max(found)


def summand_sizes(
    call: Call, case: Case, grads: dict[str, Tensor], do: Tensor | None, dht: Tensor | None
) -> dict[str, float]:
    """The sizes of what gradients are differences of. Those of the gate are made of the products of ``q`` and of ``k``
    with theirs (``docs/backward.md``), which cancel where gates forget much; those of parameters are sums over tokens,
    too. That of the initial state is what gates leave of the others', less what the keys take out of it."""
    product = sum(float((call[name].double() * grads[name]).norm()) for name in "qk")
    slope, away = 1.0, 1.0
    if call.get("use_gate_in_kernel"):
        factor = 1.0 if call.get("A_log") is None else float(call["A_log"].double().exp().max())
        slope = factor * (1.0 if call["lower_bound"] is None else -call["lower_bound"] / 4)
        bias = 0.0 if call.get("dt_bias") is None else float(call["dt_bias"].abs().max())
        away = max(1.0, float(call["g"].abs().max()) + bias) if call["g"].numel() else 1.0
    tokens = call["q"].shape[:2].numel() ** 0.5
    sizes = {"g": product * slope, "dt_bias": product * slope * tokens, "A_log": product * slope * tokens * away}
    if "initial_state" in grads:
        ones = torch.ones(len(case.spans), case.HV, case.V, case.K, device=call["v"].device) * (case.V * case.K) ** -0.5
        left = exact(call | {"v": torch.zeros_like(call["v"])}, case.spans, ones)
        size = torch.zeros(len(case.spans), case.HV, dtype=torch.float64, device=ones.device)
        if dht is not None:
            size += left.state_sizes[:, 0] * dht.double().flatten(2).norm(dim=-1)
        if do is not None:
            for n, part in enumerate(strategies.of_sequences(do.double().norm(dim=-1), case.spans)):
                size[n] += (left.o_sizes[n, : part.shape[0]] * part).sum(0) * case.K**0.5
        sizes["initial_state"] = float(size.norm())
    return sizes


@on_every_device
@given(data=st.data())
def test_gradients_are_those_of_the_recurrence(device: str, data: st.DataObject) -> None:
    values = ("random", "zeros", "one key", "beta at its ends", "huge")
    case = data.draw(strategies.cases(device, hostile=True, most_tokens=90, sequences=4, values=values))
    # What rounding or underflow leaves of a gradient is not held to anything: of a gate at its ends, of a norm of one
    # number.
    if case.speed == "ends" and case.gate != "precomputed":
        case = replace(case, speed="mixed")
    if case.K == 1:
        case = replace(case, l2norm=False)
    call = build(case, device)
    present = [name for name in DIFFERENTIABLE if name in call]
    if case.beta != "raw" and case.values in ("one key", "beta at its ends"):
        present.remove("beta")  # nor that of a sigmoid at its ends
    names = data.draw(st.one_of(st.just(present), st.lists(st.sampled_from(present), min_size=1, unique=True)))
    absent = data.draw(st.sampled_from((None, None, 0, 1)))
    place = data.draw(st.sampled_from(strategies.PLACES))
    given = [None if i == absent else strategies.placed(x, place) for i, x in enumerate(cotangents(call, case.seed))]

    def run(call: Call) -> Results:
        return gradients(lambda leaves: chunk_kda(**leaves, output_final_state=True), call, names, given)

    def exactly(call: Call, names: Sequence[str] = present, dtype: torch.dtype = torch.float64) -> Results:
        """By autograd through the recurrence, or where that takes too long, by the portable path."""
        call = call | {name: call[name].to(dtype) for name in DIFFERENTIABLE if name in call}
        if case.cu_seqlens is not None:
            call["cu_seqlens"] = safe_bounds(case, device)
        if case.T > 300:
            return gradients(lambda leaves: chunk_kda(**leaves, output_final_state=True), call, names, given)
        return gradients(lambda leaves: reference({**leaves, "dtype": dtype}), call, names, given)

    results, expected = run(call), dict(zip(present, exactly(call), strict=True))
    is_served = strategies.served(call)
    sizes = summand_sizes(call, case, expected, *given)
    for name, x in zip(names, results, strict=True):
        assert x.shape == call[name].shape and x.dtype == call[name].dtype, name
        if name in TOKENS:
            assert not strategies.outside(x, case.spans).any(), name
        if expected[name].numel() and expected[name].abs().max() > torch.finfo(x.dtype).max:
            continue  # of keys that are zero and have a norm: their gradients grow by 1e3
        size = 0.25 * sizes.get(name, 0.0)
        away = gradient_distance(name, x, expected[name], case, size)
        allowed = max(GRADIENT_TOLERANCES[x.dtype], tolerance(case, call, False).state)
        if is_served:
            allowed = 0.1 if case.values in ("one key", "beta at its ends") else 1.2e-2
        if away >= allowed:  # where terms cancel, rounding anywhere else is as far off; chunks of one key cancel more
            moved = rounded_otherwise(exactly, call, name, expected[name], case, is_served)
            allowed = max(allowed, (16 if case.has_one_key else 4) * moved)
        assert away < allowed, (name, away, allowed)
    if "initial_state" in names and given[1] is not None:
        for n, length in enumerate(case.lengths):
            if length == 0:
                assert torch.equal(results[names.index("initial_state")][n], given[1][n])
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


def rounded_otherwise(
    exactly: Callable[..., Results], call: Call, name: str, expected: Tensor, case: Case, is_served: bool
) -> float:
    """How far a gradient moves where the recurrence is computed in fp32, or for the kernels, where tokens change by
    what their operands are rounded by: the root of the mean square of three ways."""
    dtype, step = (torch.float64, 2.0**-9) if is_served else (torch.float32, 2.0**-24)
    generator = torch.Generator().manual_seed(case.seed)
    moved = []
    for _ in range(3):
        changed = dict(call)
        for token in TOKENS:
            x = call[token].double()
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
            changed[token] = torch.where(x == -torch.inf, x, x * (1 + step * noise))
        (result,) = exactly(changed, [name], dtype)
        moved.append(float((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)))
    in_fp64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    mean = (sum(x * x for x in moved) / len(moved)) ** 0.5
    return mean * in_fp64 if case.dtype == torch.float64 else mean


# ---------------------------------------------------------------------------------------------------------------------
# Pools
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Rows in memory that holds NaN around them, and which of them a call is told of."""

    rows: int
    slots: tuple[int, ...]
    dtype: torch.dtype
    place: str
    index_dtype: torch.dtype

    def make(self, case: Case, device: str) -> Tensor:
        """All of the memory."""
        return torch.full((self.offset(case) + (self.rows + 1) * self.stride(case),), torch.nan, dtype=self.dtype).to(
            device
        )

    def stride(self, case: Case) -> int:
        return case.HV * case.K * case.V * (2 if self.place == "strided" else 1)

    def offset(self, case: Case) -> int:
        return self.stride(case) + (1 if self.place == "offset" else 0)

    def view(self, memory: Tensor, case: Case) -> Tensor:
        shape = (case.HV, case.V, case.K) if case.state_v_first else (case.HV, case.K, case.V)
        part = memory[self.offset(case) :][: self.rows * self.stride(case)].view(self.rows, self.stride(case))
        return part[:, : case.HV * case.K * case.V].unflatten(1, shape)

    def indices(self, values: Any, device: str) -> Tensor:
        return torch.tensor(values, dtype=self.index_dtype, device=device)

    def has(self, slot: int) -> bool:
        return 0 <= slot < self.rows


@st.composite
def pools(draw: Any, case: Case, wanted: int) -> Pool:
    """A pool, and ``wanted`` slots of it in any order, some of them no slots of it."""
    index_dtype = draw(st.sampled_from(INDEX_DTYPES))
    rows = 0 if draw(st.integers(0, 19)) == 19 else wanted + draw(st.integers(1, 3))
    order = [*draw(st.permutations(range(rows))), *[-1] * wanted][:wanted]
    far = st.sampled_from((*FAR[index_dtype], rows))
    slots = [draw(far) if draw(st.integers(0, 4)) == 4 else slot for slot in order]
    dtypes = [torch.float64] if case.dtype == torch.float64 else [torch.float32, torch.bfloat16]
    place = draw(st.sampled_from(("dense", "strided", "offset")))
    return Pool(rows, tuple(slots), draw(st.sampled_from(dtypes)), place, index_dtype)


def with_rows(call: Call, case: Case, pool: Pool, slots: Sequence[int], device: str, has: Any = None) -> Tensor:
    """The memory of a pool whose rows ``slots`` hold the initial states of the call, and whose others are NaN, also
    those of sequences that have none."""
    memory = pool.make(case, device)
    view = pool.view(memory, case)
    for n, slot in enumerate(slots):
        if pool.has(slot) and (has is None or has[n]):
            view[slot] = call["initial_state"][n].to(pool.dtype)
    return memory


def clear_padding(call: Call, case: Case, slots: Sequence[int], pool: Pool) -> None:
    """The tokens of sequences without a slot are NaN, which nobody is to read."""
    for name in TOKENS:
        if case.expanded is None or case.expanded[0] != name:
            for slot, part in zip(slots, strategies.of_sequences(call[name], case.spans), strict=True):
                if not pool.has(slot):
                    part.fill_(torch.nan)


def on_pool(function: Callable[..., Tensor], pool: Pool, case: Case, memory: Tensor) -> Callable[[Call], Results]:
    """The function on a copy of the pool: its output, and all of that memory behind it."""

    @torch.no_grad()
    def run(call: Call) -> Results:
        copy = memory.clone()
        return function(**call, state_pool=pool.view(copy, case)), copy

    return run


def assert_rows(
    memory: Tensor, before: Tensor, pool: Pool, case: Case, written: dict[int, tuple[Tensor, Tensor]], allowed: float
) -> None:
    """The rows that were to be written are near to what they were to hold, and nothing else has changed."""
    after = pool.view(memory, case)
    for slot, (state, size) in written.items():
        assert strategies.worst_state(v_first(after[slot], case), state, size) < allowed, slot
    back = memory.clone()
    for slot in written:
        pool.view(back, case)[slot] = pool.view(before, case)[slot]
    assert same_bits(back, before)


@on_every_device
@given(data=st.data())
def test_paged_prefill_updates_the_rows_it_names(device: str, data: st.DataObject) -> None:
    case = replace(data.draw(strategies.cases(device, hostile=True, most_tokens=100)), initial_state=True)
    call, spans, N = build(case, device), case.spans, len(case.spans)
    checkpoints = data.draw(st.sampled_from((0, 0, 1, 3)))
    pool = data.draw(pools(case, N * (1 + checkpoints)))
    slots, targets = pool.slots[:N], [pool.slots[N + n * checkpoints :][:checkpoints] for n in range(N)]
    has = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=N, max_size=N)))
    after = torch.tensor(case.lengths).view(N, 1)
    extra: Call = {"state_indices": pool.indices(slots, device)}
    if has is not None:
        extra["has_initial_state"] = torch.tensor(has, dtype=torch.bool, device=device)
    if checkpoints:
        offset = st.one_of(strategies.lengths(100), st.sampled_from(FAR[pool.index_dtype]))
        row = st.lists(offset, min_size=checkpoints, max_size=checkpoints)
        offsets = data.draw(st.lists(row, min_size=N, max_size=N))
        extra["checkpoint_offsets"] = pool.indices(offsets, device).view(N, checkpoints)
        extra["checkpoint_indices"] = pool.indices(targets, device).view(N, checkpoints)
        after = torch.cat((after, torch.tensor(offsets).view(N, checkpoints)), 1)
    memory = with_rows(call, case, pool, slots, device, has)
    clear_padding(call, case, slots, pool)
    call |= extra
    del call["initial_state"]
    run = on_pool(chunk_kda_paged, pool, case, memory)
    o, rows = results = run(call)

    starts = torch.zeros(N, case.HV, case.V, case.K, dtype=torch.float64, device=device)
    for n, slot in enumerate(slots):
        if pool.has(slot) and (has is None or has[n]):
            starts[n] = v_first(pool.view(memory, case)[slot], case).double()
    is_served = strategies.served(call)
    if checkpoints and not (pool.place != "offset" and case.K == case.V == 128):
        is_served = False
    expected = exact(call, spans, starts, after.to(device), clamped=is_served)
    allowed = tolerance(case, call, is_served)
    written = {}
    for n, slot in enumerate(slots):
        if not pool.has(slot):
            expected.o[n] = expected.o_sizes[n] = 0
            continue
        if case.lengths[n]:
            written[slot] = expected.states[n, 0], expected.state_sizes[n, 0]
        for c, target in enumerate(targets[n]):
            if pool.has(target) and 1 <= offsets[n][c] <= case.lengths[n]:
                written[target] = expected.states[n, c + 1], expected.state_sizes[n, c + 1]
    assert strategies.worst_output(o, expected, spans) < allowed.o
    assert not strategies.outside(o, spans).any()
    assert_rows(rows, memory, pool, case, written, allowed.state + strategies.ROUNDED[pool.dtype])
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


@on_every_device
@given(data=st.data())
def test_decode_updates_the_rows_it_names(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True, most_tokens=9, long=False))
    case = replace(case, initial_state=True)
    call, spans, N = build(case, device), case.spans, len(case.spans)
    pool = data.draw(pools(case, N))
    memory = with_rows(call, case, pool, pool.slots, device)
    clear_padding(call, case, pool.slots, pool)
    call["state_indices"] = pool.indices(pool.slots, device)
    for name in ("initial_state", "batch_invariant"):
        del call[name]
    run = on_pool(recurrent_kda_paged, pool, case, memory)
    o, rows = results = run(call)

    starts = torch.zeros(N, case.HV, case.V, case.K, dtype=torch.float64, device=device)
    for n, slot in enumerate(pool.slots):
        if pool.has(slot):
            starts[n] = v_first(pool.view(memory, case)[slot], case).double()
    expected, allowed = exact(call, spans, starts), tolerance(case, call, False)
    if cuda.recurrent_kda_paged_reason(*(call[name] for name in TOKENS), pool.view(memory, case)) is None:
        allowed = allowed._replace(state=max(3e-6, 0.3 * allowed.state))  # the kernel keeps to the recurrence itself
    written = {}
    for n, slot in enumerate(pool.slots):
        if not pool.has(slot):
            expected.o[n] = expected.o_sizes[n] = 0
        elif case.lengths[n]:
            written[slot] = expected.states[n, 0], expected.state_sizes[n, 0]
    assert strategies.worst_output(o, expected, spans) < allowed.o
    assert not strategies.outside(o, spans).any()
    assert_rows(rows, memory, pool, case, written, allowed.state + strategies.ROUNDED[pool.dtype])
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


@on_every_device
@given(data=st.data())
def test_a_slot_a_token_gives_the_bits_of_decoding_one_token_after_the_other(device: str, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(device, hostile=True, most_tokens=5, long=False, sequences=4))
    case = replace(case, initial_state=True)
    call, spans, N = build(case, device), case.spans, len(case.spans)
    width = (
        data.draw(st.integers(1, 6)) if case.cu_seqlens is not None else max(1, case.T) + data.draw(st.integers(0, 2))
    )
    pool = data.draw(pools(case, N * width))
    slots = [pool.slots[n * width :][:width] for n in range(N)]
    count = st.one_of(st.integers(1, width), st.sampled_from((0, width + 1, *FAR[pool.index_dtype])))
    accepted = data.draw(st.one_of(st.none(), st.lists(count, min_size=N, max_size=N)))
    first = [1] * N if accepted is None else accepted
    read = [row[count - 1] if 1 <= count <= width else -1 for row, count in zip(slots, first, strict=True)]
    memory = with_rows(call, case, pool, read, device)
    clear_padding(call, case, read, pool)
    call["state_indices"] = pool.indices(slots, device).view(N, width)
    if accepted is not None:
        call["num_accepted_tokens"] = pool.indices(accepted, device)
    for name in ("initial_state", "batch_invariant"):
        del call[name]
    run = on_pool(recurrent_kda_paged, pool, case, memory)
    o, rows = results = run(call)

    expected, expected_o = memory.clone(), torch.zeros_like(o)
    single = {name: x for name, x in call.items() if name not in ("num_accepted_tokens", "cu_seqlens")}
    for n, (row, start, end) in enumerate(spans):
        if not pool.has(read[n]):
            continue
        state = pool.view(memory, case)[read[n]].clone().unsqueeze(0)
        for t in range(start, end):
            token = {name: call[name][row : row + 1, t : t + 1] for name in TOKENS}
            slot = {"state_pool": state, "state_indices": torch.zeros(1, dtype=torch.int32, device=device)}
            expected_o[row, t] = recurrent_kda_paged(**{**single, **token, **slot})[0, 0]
            if t - start < width and pool.has(slots[n][t - start]):
                pool.view(expected, case)[slots[n][t - start]] = state[0]
    view = pool.view(memory, case)
    if device == "cpu" or cuda.recurrent_kda_paged_reason(*(call[name] for name in TOKENS), view) is None:
        assert same_bits(o, expected_o) and same_bits(rows, expected)
    else:  # cuBLAS chooses an algorithm by how many products there are
        assert error(o, expected_o) < 1e-5 + 2 * strategies.ROUNDED[case.dtype]
        assert torch.equal(rows.isnan(), expected.isnan())
        assert error(rows.nan_to_num(), expected.nan_to_num()) < 1e-5 + 2 * strategies.ROUNDED[pool.dtype]
    assert_repeats(run, call, results)
    assert_taken_as_safe(run, call, case, results)


@on_every_device
@given(data=st.data())
def test_indices_of_any_values_touch_no_byte_outside_the_pool(device: str, data: st.DataObject) -> None:
    """Slots named twice, counts and offsets of any size: what the rows hold is the caller's error, and theirs alone."""
    case = data.draw(strategies.cases(device, hostile=True, most_tokens=20, packed=True, long=False))
    call, N = build(replace(case, initial_state=False), device), len(case.spans)
    index_dtype = data.draw(st.sampled_from(INDEX_DTYPES))
    rows = data.draw(st.integers(0, 4))
    pool = Pool(rows, (), torch.float64 if case.dtype == torch.float64 else torch.float32, "strided", index_dtype)
    memory = pool.make(case, device)
    pool.view(memory, case).fill_(1.0)
    entry = st.one_of(st.integers(-2, rows + 2), st.sampled_from(FAR[index_dtype]))

    def drawn(*shape: int) -> Tensor:
        size = 1
        for x in shape:
            size *= x
        return pool.indices(data.draw(st.lists(entry, min_size=size, max_size=size)), device).view(shape)

    width = data.draw(st.integers(1, 4))
    calls: list[tuple[Callable[..., Tensor], Call]] = [
        (chunk_kda_paged, {}),
        (chunk_kda_paged, {"checkpoint_offsets": drawn(N, width), "checkpoint_indices": drawn(N, width)}),
        (recurrent_kda_paged, {}),
        (recurrent_kda_paged, {"state_indices": drawn(N, width), "num_accepted_tokens": drawn(N)}),
    ]
    for function, extra in calls:
        extra = {"state_indices": drawn(N)} | extra
        given = call | extra if function is chunk_kda_paged else {**call, **extra}
        if function is recurrent_kda_paged:
            given.pop("batch_invariant")
        o, after = on_pool(function, pool, case, memory)(given)
        assert not strategies.outside(o, case.spans).any()
        pool.view(after, case).fill_(1.0)
        assert same_bits(after, memory)


# ---------------------------------------------------------------------------------------------------------------------
# NaN and infinities
# ---------------------------------------------------------------------------------------------------------------------


@on_every_device
@given(data=st.data())
def test_what_is_not_finite_stays_in_its_sequence(device: str, data: st.DataObject) -> None:
    """The others have the bits that they have beside a finite one; and NaN in is NaN out."""
    case = data.draw(strategies.cases(device, most_tokens=80, values=("random",), speeds=("mixed", "slow", "fast")))
    case = replace(case, initial_state=True, expanded=None, B=max(case.B, 2) if case.cu_seqlens is None else 1)
    live = [n for n, length in enumerate(case.lengths) if length]
    if not live:
        return
    call, spans, N = build(case, device), case.spans, len(case.spans)
    do, dht = cotangents(call)
    call |= {"do": do, "dht": dht}
    victim = data.draw(st.sampled_from(live))
    name = data.draw(st.sampled_from((*TOKENS, "initial_state", "do", "dht")))
    value = data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    row, start, end = spans[victim]
    at, head = data.draw(st.integers(start, end - 1)), data.draw(st.integers(0, case.HV - 1))
    poisoned = strategies.contiguous(call)
    of_states = name in ("initial_state", "dht")
    index = (victim, head) if of_states else (row, at, head // (case.HV // case.H) if name in "qk" else head)
    poisoned[name][index] = value

    def parts(call: Call) -> list[list[Tensor]]:
        """Of each sequence all that is its own."""
        leaves = requiring_grad({x: y for x, y in call.items() if x not in ("do", "dht")}, (*TOKENS, "initial_state"))
        results = o, state = chunk_kda(**leaves, output_final_state=True)
        inputs = [leaves[x] for x in (*TOKENS, "initial_state")]
        *of_tokens, of_initial = torch.autograd.grad(results, inputs, (call["do"], call["dht"]))
        found = [[*x] for x in zip(*(strategies.of_sequences(x, spans) for x in (o, *of_tokens)), strict=True)]
        for n in range(N):
            found[n] += [state[n], of_initial[n]]
        plain = {x: y for x, y in call.items() if x not in ("do", "dht", "initial_state")}
        slots = torch.arange(N, device=device).flip(0)
        pool = call["initial_state"].flip(0).contiguous()
        with torch.no_grad():
            o = chunk_kda_paged(**plain, state_pool=pool, state_indices=slots)
            for n, part in enumerate(strategies.of_sequences(o, spans)):
                found[n] += [part, pool[N - 1 - n]]
            del plain["batch_invariant"]
            pool = call["initial_state"].flip(0).contiguous()
            if max(case.lengths) <= 300:
                o = recurrent_kda_paged(**plain, state_pool=pool, state_indices=slots)
                for n, part in enumerate(strategies.of_sequences(o, spans)):
                    found[n] += [part, pool[N - 1 - n]]
        return [[x.detach() for x in row] for row in found]

    clean, dirty = parts(call), parts(poisoned)
    for n in range(N):
        if n != victim:
            assert all(same_bits(x, y) for x, y in zip(dirty[n], clean[n], strict=True)), (n, name)
    if value != value and name not in ("do", "dht"):
        o = dirty[victim][0]
        first = 0 if name == "initial_state" else at - start
        assert o[first, head].isnan().all(), name
