"""Sequences cut in segments, on one device. Over ranks: ``test_context_parallel.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEFAULTS, DIFFERENTIABLE, Call, cotangents, error, graph_of, kernel_call, make_call
from torch import Tensor

from flashkda_ops import segments
from flashkda_ops.ops import chunk_kda, chunk_kda_backward
from flashkda_ops.validation import Sizes, validate_tokens


def arguments(call: Call, given: str = "both") -> chunk_kda_backward.Arguments:
    """Of the backward pass, with the cotangents that are given."""
    do, dht = cotangents(call)
    return chunk_kda_backward.Arguments(
        **DEFAULTS
        | call
        | {"do": do if given != "final state" else None, "dht": dht if given != "o" else None}
        | {"output_mask": [call.get(name) is not None for name in DIFFERENTIABLE]}
    )


def sizes(call: Call) -> Sizes:
    return validate_tokens(chunk_kda.Arguments(**call))


def assert_sums_to_A_log(call: Call, dg: Tensor, dA_log: Tensor) -> None:
    """The gate's derivatives by A_log and by g are of a ratio that g and dt_bias give: x = g + dt_bias for the bounded
    gate, a function of ``exp(A_log) x``; for the other, ``-exp(A_log) softplus(x)``, ``softplus(x) / sigmoid(x)``."""
    x = call["g"].double() + call["dt_bias"].double()
    ratio = x if call["lower_bound"] is not None else F.softplus(x) / x.sigmoid()
    terms = (dg.double() * ratio).transpose(1, 2).flatten(2)
    rounding = torch.finfo(dg.dtype).eps * terms.square().sum((0, 2)).sqrt()
    assert ((dA_log.double() - terms.sum((0, 2))).abs() < 4 * rounding + 1e-6 * terms.abs().sum((0, 2))).all()


@pytest.mark.parametrize("given", ["both", "o", "final state"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"B": 2, "initial_state": True},
        {"initial_state": True, "state_v_first": True, "gate": "unbounded", "beta": "negative eigenvalues"},
        {"cu_seqlens": [0, 5, 5, 30, 35]},
        {"cu_seqlens": [0, 5, 5, 30, 35], "initial_state": True, "state_v_first": True},
        {"cu_seqlens": [0, 37], "initial_state": True, "gate": "precomputed", "beta": "raw"},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [2, 5])
def test_segments_change_no_gradient(n: int, options: dict[str, Any], given: str) -> None:
    call = make_call(37, dtype=torch.float64, **options)
    a = arguments(call, given)
    expected = chunk_kda_backward.op(*a)
    results = chunk_kda_backward._in_segments(a, sizes(call), n)
    for name, x, y in zip(DIFFERENTIABLE, results, expected, strict=True):
        if call.get(name) is None:
            assert x is None
        else:
            assert x is not None and error(x, y) < 1e-11, name
    if call.get("use_gate_in_kernel"):
        grads = dict(zip(DIFFERENTIABLE, results, strict=True))
        assert_sums_to_A_log(call, grads["g"], grads["A_log"])


PACKED = [
    {"cu_seqlens": [0, 5, 5, 30, 35]},
    {"cu_seqlens": [2, 5, 30, 30], "initial_state": True, "state_v_first": True, "gate": "unbounded"},
    {"cu_seqlens": [0, 37], "initial_state": True, "gate": "precomputed", "beta": "negative eigenvalues"},
]


@pytest.mark.parametrize("options", PACKED, ids=str)
@pytest.mark.parametrize("n", [2, 5])
def test_segments_change_no_output(n: int, options: dict[str, Any]) -> None:
    call = make_call(37, dtype=torch.float64, **options)
    for output_final_state in (False, True):
        a = chunk_kda.Arguments(**call, output_final_state=output_final_state)
        (o, state, _), (o_expected, state_expected, _) = chunk_kda._in_segments(a, n), chunk_kda.run(a)
        assert error(o, o_expected) < 1e-11
        assert (state is None) == (not output_final_state)
        assert state is None or error(state, state_expected) < 1e-11


@pytest.mark.parametrize("seed", range(20))
def test_a_malformed_cu_seqlens_makes_pieces_in_bounds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    T, N, n = 37, 1 + seed % 5, 2 + seed % 4
    cu_seqlens = torch.randint(-20, 60, (N + 1,), generator=generator)
    layout = segments.layout(torch.empty(1, T, 1, 1), cu_seqlens, n)
    assert isinstance(layout, segments._Packed)
    for pieces in (layout.cu_seqlens, layout.parts):
        assert int(pieces.min()) >= 0 and int(pieces.max()) <= T and bool((pieces.diff() >= 0).all())


def malformed_call(seed: int) -> Call:
    """A packed call whose bounds decrease, lie outside of the tokens, begin late or end early."""
    T, N = 37, 1 + seed % 5
    bounds = torch.randint(-20, 60, (N + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    if seed % 3 == 0:  # well formed, but that they begin behind a cut
        bounds = [min(max(x, 15), T) for x in sorted(bounds)]
    return make_call(T, cu_seqlens=bounds, dtype=torch.float64, initial_state=True, seed=seed)


@pytest.mark.parametrize("seed", range(24))
def test_segments_read_a_malformed_cu_seqlens_as_whole_sequences_do(seed: int) -> None:
    call, n = malformed_call(seed), 2 + seed % 4
    a = chunk_kda.Arguments(**call, output_final_state=True)
    for x, y in zip(chunk_kda._in_segments(a, n)[:2], chunk_kda.run(a)[:2], strict=True):
        assert x is not None and y is not None and error(x, y) < 1e-11
    backward = arguments(call)
    expected = chunk_kda_backward.op(*backward)
    for x, y in zip(chunk_kda_backward._in_segments(backward, sizes(call), n), expected, strict=True):
        assert x is not None and error(x, y) < 1e-11


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state", "do", "dht"])
def test_what_one_sequence_holds_stays_in_it(name: str, poison: float) -> None:
    T, bounds = 48, [3, 7, 20, 22, 45]  # in 4 segments of 12 tokens: one sequence crosses a cut, another one two
    call = make_call(T, cu_seqlens=bounds, dtype=torch.float64, initial_state=True)
    clean = arguments(call)
    clean_outputs = chunk_kda._in_segments(chunk_kda.Arguments(**call, output_final_state=True), 4)[:2]
    clean_gradients = chunk_kda_backward._in_segments(clean, sizes(call), 4)
    for victim in range(len(bounds) - 1):
        x = getattr(clean, name).clone()
        if name in ("initial_state", "dht"):
            x[victim] = poison
        else:
            x[:, (bounds[victim] + bounds[victim + 1]) // 2] = poison
        poisoned = clean._replace(**{name: x})
        results = list(chunk_kda_backward._in_segments(poisoned, sizes(call), 4))
        pairs = [(r, c) for i, (r, c) in enumerate(zip(results, clean_gradients, strict=True)) if i not in (5, 6)]
        if name not in ("do", "dht"):
            a = chunk_kda.Arguments(**{**call, name: x}, output_final_state=True)
            pairs += zip(chunk_kda._in_segments(a, 4)[:2], clean_outputs, strict=True)
        for result, expected in pairs:
            assert result is not None and expected is not None
            for n in range(len(bounds) - 1):
                part = (n,) if result.shape[0] == len(bounds) - 1 else (0, slice(bounds[n], bounds[n + 1]))
                if n != victim:
                    assert error(result[part], expected[part]) < 1e-11


def test_only_long_sequences_of_few_heads_run_in_segments() -> None:
    def n(T: int, HV: int, N: int = 1, *, packed: bool = True, clusters: bool = True) -> int:
        return segments.of_call(Sizes(N=N, B=1, T=T, H=HV, HV=HV, K=128, V=128), packed=packed, clusters=clusters)

    assert [n(T, 16) for T in (4096, 32767, 32768, 131072, 1 << 20)] == [1, 1, 8, 8, 8]
    assert [n(131072, HV) for HV in (1, 4, 8, 16, 17, 64)] == [32, 32, 16, 8, 1, 1]
    assert [n(131072, 4, N) for N in (1, 2, 4, 5)] == [n(131072, HV) for HV in (4, 8, 16, 20)]
    assert [n(T, 4, packed=False) for T in (16384, 32768, 65536, 131072)] == [1, 1, 16, 16]
    assert [n(65536, HV, packed=False) for HV in (1, 4, 8, 9, 16)] == [16, 16, 8, 1, 1]
    assert [n(131072, HV, packed=False) for HV in (1, 4, 8, 12, 13, 16)] == [32, 16, 8, 5, 1, 1]
    assert [n(1 << 20, HV, packed=False) for HV in (12, 13)] == [5, 1]
    assert [n(65536, HV, packed=False, clusters=False) for HV in (4, 8, 9, 16, 17)] == [16, 8, 7, 4, 1]
    assert n(65535, 8, packed=False, clusters=False) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": [0, 9000, 31000]}, {"state_v_first": True, "H": 1}], ids=str)
def test_the_kernels_in_segments_are_as_close(options: dict[str, Any]) -> None:
    call = kernel_call(32768 if "cu_seqlens" in options else 65536, **{"H": 2, "HV": 2} | options)
    assert segments.of_call(sizes(call), packed="cu_seqlens" in options, clusters=True) >= 8
    a = arguments(call)
    expected = chunk_kda_backward.op(*a._replace(batch_invariant=True))
    results = chunk_kda_backward.op(*a)
    again = chunk_kda_backward.op(*a)
    # Not each: where segments forget, what comes back to one is what it is in a whole sequence.
    assert not all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    for name, x, y, z in zip(DIFFERENTIABLE, results, expected, again, strict=True):
        assert torch.equal(x, z), name
        if name != "A_log":
            assert error(x, y) < 1e-2, name
    # A_log's is a sum over all tokens and channels, which may cancel: it is to be that of the gradients checked above.
    grads = dict(zip(DIFFERENTIABLE, results, strict=True))
    assert_sums_to_A_log(call, grads["g"], grads["A_log"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"initial_state": False}, {"state_v_first": True, "gate": "unbounded"}, {"slow_heads": 2}], ids=str
)
def test_packed_outputs_in_segments_are_as_close(options: dict[str, Any]) -> None:
    call = kernel_call(32768, H=2, HV=2, cu_seqlens=[0, 9000, 9000, 31000], **options)
    a = chunk_kda.Arguments(**call, output_final_state=True)
    assert segments.of_call(sizes(call), packed=True, clusters=True) >= 8
    expected, results, again = (chunk_kda.op(*x) for x in (a._replace(batch_invariant=True), a, a))
    for x, y, z in zip(results[:2], expected[:2], again[:2], strict=True):
        assert torch.equal(x, z) and not torch.equal(x, y)
        assert error(x, y) < 1e-2
    assert (results[0][:, 31000:] == 0).all()


@pytest.mark.gpu
def test_captured_segments_replay_with_other_sequences() -> None:
    call = kernel_call(32768, H=2, HV=2, cu_seqlens=[0, 9000, 31000])
    a = chunk_kda.Arguments(**call, output_final_state=True)
    graph, results = graph_of(lambda: chunk_kda.op(*a))
    for cu_seqlens in ([0, 1, 32768], [0, 20000, 20000], [100, 4096, 8192], [0, -5, 40000], [7, 3, 1]):
        call["cu_seqlens"].copy_(torch.tensor(cu_seqlens))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, chunk_kda.op(*a), strict=True))
