"""The backward kernels, through the ops, against autograd through the fp64 reference and against the contract."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    BETAS,
    DEFAULTS,
    DIFFERENTIABLE,
    GATES,
    TOKENS,
    Call,
    cotangents,
    error,
    graph_of,
    kernel_call,
    random_cu_seqlens,
    reference,
    requiring_grad,
    use_first_configurations,
)
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flashkda_ops
from flashkda_ops import cuda

pytestmark = pytest.mark.gpu

TOLERANCE = 1.2e-2
"""Of the worst head. Operands are bf16, and so are the states and their gradients at the borders of tiles."""


def run(call: Call, do: Tensor | None, dht: Tensor | None, names: tuple[str, ...] = DIFFERENTIABLE) -> list[Tensor]:
    """The op, on a call that the kernels serve: one result an argument of ``DIFFERENTIABLE``."""
    arguments = [call.get(name) for name in (*DIFFERENTIABLE, "cu_seqlens")]
    assert cuda.chunk_kda_reason(*arguments) is None  # type: ignore[arg-type]
    mask = [name in names and call.get(name) is not None for name in DIFFERENTIABLE]
    return list(torch.ops.flashkda.chunk_kda_backward(**DEFAULTS | call, do=do, dht=dht, output_mask=mask))


def exact_gradients(call: Call, do: Tensor | None, dht: Tensor | None) -> dict[str, Tensor]:
    """Those of autograd through the fp64 reference."""
    leaves = {name: call[name].double().requires_grad_() for name in DIFFERENTIABLE if call.get(name) is not None}
    pairs = [(x, dx.double()) for x, dx in zip(reference(call | leaves), (do, dht), strict=True) if dx is not None]
    outputs, given = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), given, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def errors(call: Call, do: Tensor | None, dht: Tensor | None) -> dict[str, float]:
    """Of each gradient, in its worst head."""
    results = dict(zip(DIFFERENTIABLE, run(call, do, dht), strict=True))
    found = {}
    exact = exact_gradients(call, do, dht)
    for name, expected in exact.items():
        assert results[name].dtype == call[name].dtype
        assert results[name].isfinite().all(), name
        # beta has one number a token: too few to be judged by the head.
        heads = {"A_log": None, "beta": None, "dt_bias": 0 if expected.dim() == 2 else None, "initial_state": 1}.get(
            name, 2
        )
        found[name] = error(results[name], expected, heads)
        if name == "A_log":
            found[name] *= (expected.norm() / max(expected.norm(), shares_of_channels(call, exact["g"]).norm())).item()
    return found


def shares_of_channels(call: Call, dg: Tensor) -> Tensor:
    """What the gradient of A_log is a sum of, up to the gate's curvature. They have both signs, and cancel better than
    their rounding does."""
    g = call["g"].double()
    if call.get("dt_bias") is not None:
        g = g + call["dt_bias"].double().view(-1, dg.shape[-1])
    return (dg * g).sum((0, 1))


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_gradients_are_those_of_the_reference_in_every_mode(gate: str, beta: str) -> None:
    call = kernel_call(150, gate=gate, beta=beta)
    found = errors(call, *cotangents(call))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    "options",
    [
        {"T": 1, "H": 16, "HV": 16},
        {"T": 16},
        {"T": 64},
        {"T": 65},
        {"T": 37, "B": 3, "H": 5, "HV": 5},
        {"T": 1024, "H": 3, "HV": 3},
        {"T": 100, "H": 2, "HV": 6},
        {"T": 100, "H": 1, "HV": 8, "cu_seqlens": [0, 33, 100]},
        {"T": 100, "l2norm": False},
        {"T": 100, "state_v_first": True},
        {"T": 100, "initial_state": False},
        {"T": 200, "dtype": torch.float16},
        {"T": 200, "dtype": torch.float16, "gate": "unbounded", "state_v_first": True},
        {"T": 50, "B": 5, "H": 70, "HV": 70},
        {"T": 300, "cu_seqlens": [0, 100, 101, 133, 300]},
        {"T": 200, "cu_seqlens": [0, 0, 77, 77, 77, 180, 180]},
        {"T": 64, "cu_seqlens": list(range(65))},
        {"T": 700, "H": 64, "HV": 64, "cu_seqlens": [0, 100, 117, 317, 500, 700], "state_v_first": True},
        # Gradients begin beside the scans.
        {"T": 1100, "H": 10, "HV": 10},
        {"T": 1024, "B": 2, "H": 3, "HV": 6, "gate": "unbounded", "state_v_first": True},
        {"T": 1500, "H": 8, "HV": 8, "dtype": torch.float16, "initial_state": False},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_reference_in_every_shape(options: dict[str, Any]) -> None:
    call = kernel_call(**options)
    found = errors(call, *cotangents(call))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("present", ["do", "dht"])
@pytest.mark.parametrize("bounds", [None, [0, 33, 33, 100]])
def test_either_cotangent_may_be_absent(bounds: list[int] | None, present: str) -> None:
    call = kernel_call(100, cu_seqlens=bounds)
    do, dht = cotangents(call)
    found = errors(call, do if present == "do" else None, dht if present == "dht" else None)
    if present == "dht":
        assert not run(call, None, dht)[0].any()  # the state does not depend on q
        del found["q"]
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("names", [("g",), ("beta",), ("g", "beta")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_g_and_beta_may_be_fp32_and_then_so_are_their_gradients(names: tuple[str, ...], dtype: torch.dtype) -> None:
    call = kernel_call(100, dtype=dtype)
    call |= {name: call[name].float() for name in names}
    found = errors(call, *cotangents(call))
    assert max(found.values()) < TOLERANCE, found


def test_gradients_of_gate_parameters_have_their_shape_and_dtype() -> None:
    call = kernel_call(100)
    do, dht = cotangents(call)
    results = run(call, do, dht)
    flat = run(call | {"dt_bias": call["dt_bias"].flatten()}, do, dht)
    assert torch.equal(flat[6], results[6].flatten())
    half = {name: call[name].bfloat16() for name in ("A_log", "dt_bias")}
    narrow, wide = run(call | half, do, dht), run(call | {name: x.float() for name, x in half.items()}, do, dht)
    assert same_bits(narrow[5:7], [x.bfloat16() for x in wide[5:7]])


def regime(name: str, T: int, H: int, seed: int) -> Call:
    """A call whose options fla shares, in one of the regimes of gates and keys."""
    slow_heads = {"fast gates": 0, "mixed gates": H // 2, "unbounded, mixed gates": H // 2}.get(name, H)
    call = kernel_call(
        T, H=H, HV=H, slow_heads=slow_heads, gate="unbounded" if name.startswith("unbounded") else "bounded",
        beta="negative eigenvalues" if name.startswith("alpha near 1") else "sigmoid", seed=seed,
    )  # fmt: skip
    if name.startswith("nearly parallel keys"):
        generator = torch.Generator().manual_seed(1)
        k = torch.randn(1, 1, H, 128, generator=generator) + 0.02 * call["k"].float().cpu()
        call["k"] = k.to(call["k"])
        call["beta"] = torch.full_like(call["beta"], 4.0)
    if name.startswith("alpha near 1"):
        call["dt_bias"] -= 2
        call["beta"] = torch.full_like(call["beta"], 6.0)
    return call


def fla_chunk_kda() -> Callable[..., Any]:
    chunk_kda = pytest.importorskip("fla.ops.kda").chunk_kda
    use_first_configurations()
    return chunk_kda


def test_no_gradient_is_further_from_the_reference_than_1_1_times_flas() -> None:
    """All regimes in one test: fla's kernels take long to compile."""
    fla = fla_chunk_kda()

    def gradients(call: Call, seed: int) -> list[tuple[Tensor, ...]]:
        """Ours, fla's and the reference's, flat, of each argument."""
        do, dht = cotangents(call, seed)
        leaves = requiring_grad(call | {"dt_bias": call["dt_bias"].flatten()})
        outputs = fla(**leaves, output_final_state=True, safe_gate=call["lower_bound"] is not None)
        flas = torch.autograd.grad(outputs, [leaves[x] for x in DIFFERENTIABLE], (do, dht))
        of_all = zip(run(call, do, dht), flas, exact_gradients(call, do, dht).values(), strict=True)
        return [tuple(x.flatten() for x in grads) for grads in of_all]

    worse = {}
    for name, T, calls in (
        ("fast gates", 2048, 1),
        ("slow gates", 2048, 1),
        ("mixed gates", 2048, 1),
        ("unbounded, mixed gates", 2048, 1),
        ("nearly parallel keys, slow gates", 1024, 1),
        # A_log has one number a head, whose terms cancel here: what is left of their rounding differs several times
        # over from one set of 8 heads to another, in either implementation.
        ("alpha near 1, beta near 2", 1024, 8),
    ):
        found = [gradients(regime(name, T, 8, seed), 7 + seed) for seed in range(calls)]
        for argument, of_calls in zip(DIFFERENTIABLE, zip(*found, strict=True), strict=True):
            ours, theirs, exact = (torch.cat(grads) for grads in zip(*of_calls, strict=True))
            measured = error(ours, exact), error(theirs, exact)
            if not measured[0] <= 1.1 * measured[1]:
                worse[name, argument] = measured
    assert not worse


# ---------------------------------------------------------------------------------------------------------------------
# Rows and sequences
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
@pytest.mark.parametrize("bounds", [[0, 50, 130, 170], [20, 84, 84, 170], [30, 31, 31, 31]])
@pytest.mark.parametrize("H", [1, 4])
def test_padding_rows_have_zero_gradients_and_leak_nothing(H: int, bounds: list[int], gate: str) -> None:
    call = kernel_call(200, H=H, gate=gate, cu_seqlens=bounds)
    do, dht = cotangents(call)
    expected = run(call, do, dht)
    poisoned = {name: call[name].clone() for name in TOKENS} | {"do": do.clone()}
    for x in poisoned.values():
        x[:, : bounds[0]] = torch.nan
        x[:, bounds[-1] :] = torch.inf
    do = poisoned.pop("do")
    actual = run(call | poisoned, do, dht)
    assert same_bits(actual, expected)
    for x in actual[:5]:
        assert not x[:, : bounds[0]].any() and not x[:, bounds[-1] :].any()
        assert x[:, bounds[0] : bounds[-1]].any()


def test_rows_of_one_sequence_never_leak_into_another() -> None:
    call = kernel_call(200, cu_seqlens=[0, 50, 130, 200])
    do, dht = cotangents(call)
    expected = run(call, do, dht)
    poisoned = {name: call[name].clone() for name in TOKENS}
    for x in (*poisoned.values(), do):
        x[:, 50:130] = torch.nan
    actual = run(call | poisoned, do, dht)
    kept = [*range(50), *range(130, 200)]
    assert all(torch.equal(a[:, kept], b[:, kept]) for a, b in zip(actual[:5], expected[:5], strict=True))
    assert torch.equal(actual[7][[0, 2]], expected[7][[0, 2]])


def test_an_empty_sequence_passes_the_gradient_of_its_state_through() -> None:
    call = kernel_call(100, cu_seqlens=[0, 0, 60, 60, 100, 100])
    do, dht = cotangents(call)
    assert torch.equal(run(call, do, dht)[7][[0, 2, 4]], dht[[0, 2, 4]])
    assert not run(call, do, None)[7][[0, 2, 4]].any()


def test_without_a_single_token_all_but_the_gradient_of_the_state_is_zero() -> None:
    call = kernel_call(100, cu_seqlens=[0, 0, 0])
    do, dht = cotangents(call)
    *zeros, dh0 = run(call, do, dht)
    assert torch.equal(dh0, dht) and not any(x.any() for x in zeros)


@pytest.mark.parametrize(
    "cu", [[0, 50, 30, 100], [-5, 40, 1000, 2000], [90, 10, 5, 100], [300, 200, 100, 0], [-3, -2, -1, -1]]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_malformed_cu_seqlens_is_taken_as_its_clamped_running_maximum(cu: list[int], dtype: torch.dtype) -> None:
    call = kernel_call(100, cu_seqlens=cu)
    call["cu_seqlens"] = call["cu_seqlens"].to(dtype)
    safe = torch.tensor(cu, device="cuda").clamp(0, 100).cummax(0).values
    do, dht = cotangents(call)
    assert same_bits(run(call, do, dht), run(call | {"cu_seqlens": safe}, do, dht))


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("H", [8, 10, 12, 24])
def test_gradients_that_begin_beside_the_scans_wait_for_their_states(
    monkeypatch: pytest.MonkeyPatch, H: int, clusters: bool
) -> None:
    monkeypatch.setattr(cuda, "may_use_clusters", lambda: clusters)
    call = kernel_call(2100, H=H, HV=H)
    do, dht = cotangents(call)
    # Those of a packed call begin behind its scans.
    one_after_the_other = run(call | {"cu_seqlens": torch.tensor([0, 2100], device="cuda")}, do, dht)
    for _ in range(10):
        torch.full((1 << 28,), torch.nan, device="cuda")  # where the workspace will lie
        assert same_bits(run(call, do, dht), one_after_the_other)
    graph, grads = graph_of(lambda: run(call, do, dht))
    for _ in range(10):
        graph.replay()
        assert same_bits(grads, one_after_the_other)


def test_any_strides_give_the_same_bits() -> None:
    call = kernel_call(90, B=2)
    do, dht = cotangents(call)
    expected = run(call, do, dht)
    for view in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack((x, x), -1)[..., 0],  # last dimension strided
        lambda x: torch.cat((x[..., :3], x), -1)[..., 3:],  # unaligned
    ):
        assert same_bits(run(call | {name: view(call[name]) for name in TOKENS}, view(do), dht), expected)
    assert same_bits(run(call, do, dht.mT.contiguous().mT), expected)


def test_an_expanded_cotangent_is_read_right() -> None:
    call = kernel_call(90)
    do, _ = cotangents(call)
    one = do[:, :1, :1, :1].expand_as(do)
    assert same_bits(run(call, one, None), run(call, one.contiguous(), None))


def test_the_layout_of_states_is_only_a_layout() -> None:
    call = kernel_call(200, cu_seqlens=[0, 70, 200])
    do, dht = cotangents(call)
    expected = run(call, do, dht)
    turned = call | {"initial_state": call["initial_state"].mT.contiguous(), "state_v_first": True}
    *actual, dh0 = run(turned, do, dht.mT.contiguous())
    assert same_bits([*actual, dh0.mT], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Only what is asked for, always the same
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [*((name,) for name in DIFFERENTIABLE), ("q", "k"), TOKENS, ("A_log", "initial_state"), ()], ids=str
)
@pytest.mark.parametrize("bounds", [None, [0, 33, 100, 180]])
def test_gradients_asked_for_alone_have_the_same_bits(bounds: list[int] | None, names: tuple[str, ...]) -> None:
    call = kernel_call(200, cu_seqlens=bounds)
    do, dht = cotangents(call)
    for name, alone, full in zip(DIFFERENTIABLE, run(call, do, dht, names), run(call, do, dht), strict=True):
        assert torch.equal(alone, full) if name in names else alone.numel() == 0, name


@pytest.mark.parametrize(
    "options",
    [
        {"T": 700, "H": 24, "HV": 24, "cu_seqlens": [0, 100, 117, 317, 500, 700]},
        {"T": 4096, "H": 2, "HV": 4},
        {"T": 512, "B": 3, "H": 16, "HV": 64, "gate": "unbounded"},
    ],
    ids=str,
)
def test_the_same_bits_on_every_run(options: dict[str, Any]) -> None:
    call = kernel_call(**options)
    do, dht = cotangents(call)
    first = run(call, do, dht)
    assert all(same_bits(run(call, do, dht), first) for _ in range(10))


def test_a_batch_invariant_sequence_has_the_gradients_it_has_alone() -> None:
    call = kernel_call(700, H=24, HV=24, cu_seqlens=[0, 100, 117, 317, 500, 700]) | {"batch_invariant": True}
    do, dht = cotangents(call)
    together = run(call, do, dht)
    alone = {**call, **{name: call[name][:, 117:317] for name in TOKENS}}
    alone |= {"initial_state": call["initial_state"][2:3], "cu_seqlens": None}
    results = run(alone, do[:, 117:317], dht[2:3])
    assert same_bits(results[:5], [x[:, 117:317] for x in together[:5]])
    assert torch.equal(results[7], together[7][2:3])


# ---------------------------------------------------------------------------------------------------------------------
# In training
# ---------------------------------------------------------------------------------------------------------------------


def forward(call: Call) -> tuple[Tensor, Tensor]:
    o, state = flashkda_ops.chunk_kda(**call, output_final_state=True)
    return o, state


def trained(call: Call, function: Callable[[Call], tuple[Tensor, Tensor]] = forward) -> list[Tensor]:
    """Gradients of a training step, by autograd."""
    leaves = requiring_grad(call)
    return list(torch.autograd.grad(function(leaves), [leaves[x] for x in DIFFERENTIABLE], cotangents(call)))


LAYOUTS: dict[str, dict[str, Any]] = {"dense": {"B": 2}, "packed": {"cu_seqlens": [0, 3, 3, 60]}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_through_the_kernels(layout: str) -> None:
    call = kernel_call(70, **LAYOUTS[layout])
    expected = run(call, *cotangents(call))
    assert same_bits(trained(call), expected)
    assert same_bits(
        trained(call, lambda leaves: torch.ops.flashkda.chunk_kda(**leaves, output_final_state=True)[:2]), expected
    )


def test_the_first_cuda_call_of_a_thread_may_be_a_backward_pass() -> None:
    call = kernel_call(70)
    given = cotangents(call)
    expected = run(call, *given)
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(run(call, *given)))
    thread.start()
    thread.join()
    assert same_bits(found[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
def test_both_ops_are_sound_on_cuda_tensors(gate: str, layout: str) -> None:
    call = kernel_call(70, gate=gate, **LAYOUTS[layout])
    do, dht = cotangents(call)
    torch.library.opcheck(torch.ops.flashkda.chunk_kda.default, (), requiring_grad(call) | {"output_final_state": True})
    mask = [call.get(name) is not None for name in DIFFERENTIABLE]
    arguments = DEFAULTS | call | {"do": do, "dht": dht, "output_mask": mask}
    torch.library.opcheck(torch.ops.flashkda.chunk_kda_backward.default, (), arguments)


def save_kda(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kda = op is torch.ops.flashkda.chunk_kda.default
    return CheckpointPolicy.MUST_SAVE if kda else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_changes_no_gradient(layout: str) -> None:
    call = kernel_call(70, **LAYOUTS[layout])
    expected = trained(call)

    def plain(leaves: Call) -> Any:
        return checkpoint(forward, leaves, use_reentrant=False)

    def selective(leaves: Call) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, save_kda)
        return checkpoint(forward, leaves, use_reentrant=False, context_fn=contexts)

    assert same_bits(trained(call, plain), expected)
    assert same_bits(trained(call, selective), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_autograd_gives_the_same_gradients(layout: str) -> None:
    call = kernel_call(70, **LAYOUTS[layout])
    expected = trained(call)
    leaves, given = requiring_grad(call), cotangents(call)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def step() -> None:
        torch.autograd.backward(forward(leaves), given)

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    assert same_bits([leaves[name].grad for name in DIFFERENTIABLE], expected)


@pytest.mark.parametrize(("replays", "T", "N", "HV"), [(50, 1024, 6, 8), (1000, 128, 5, 2)])
def test_a_captured_training_step_replays_with_any_sequences(replays: int, T: int, N: int, HV: int) -> None:
    generator = torch.Generator().manual_seed(0)
    call = requiring_grad(kernel_call(T, HV=HV, cu_seqlens=[0] + [T] * N))
    do, dht = cotangents(call)
    leaves = [call[name] for name in DIFFERENTIABLE]

    def step() -> list[Tensor]:
        outputs = forward(call)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, (do, dht))]

    graph, results = graph_of(step)
    tokens = [call[name].detach() for name in TOKENS]
    for _ in range(replays):
        cu = random_cu_seqlens(T, N, generator)
        call["cu_seqlens"].copy_(cu)
        for x in (*tokens, do):
            x.normal_()
            x[:, int(cu[-1]) :] = torch.nan
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        assert torch.stack([torch.eq(a, b).all() for a, b in zip(results, step(), strict=True)]).all(), cu
