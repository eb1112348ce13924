"""The decode kernel, through its op, and the portable path on a GPU."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import BETAS, GATES, TOKENS, Call, error, make_call, output_error, paged, reference
from torch import Tensor, nn

from flashkda_ops import chunk_kda, cuda, recurrent_kda_paged
from flashkda_ops.options import KdaOptions

pytestmark = pytest.mark.gpu

D = 128
INPUTS = (*TOKENS, "state_pool", "state_indices", "A_log", "dt_bias")


def decode_call(N: int, *, H: int = 2, HV: int = 4, spare_rows: int = 5, seed: int = 0, **options: Any) -> Call:
    """A call that the kernel serves, on a pool in a random order. ``initial_state`` holds the states in the pool."""
    call = make_call(
        1, B=N, H=H, HV=HV, K=D, V=D, initial_state=True, state_v_first=True, device="cuda", seed=seed,
        **{"dtype": torch.bfloat16, **options},
    )  # fmt: skip
    rows = N + spare_rows
    slots = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:N].to("cuda", torch.int32)
    pool = torch.full((rows, HV, D, D), torch.nan, device="cuda")
    pool[slots.long()] = call["initial_state"]
    return {**paged(call, pool, slots), "initial_state": call["initial_state"]}


def decode(call: Call) -> Tensor:
    """The op, where it takes the kernel."""
    names = inspect.signature(cuda.recurrent_kda_paged_reason).parameters
    assert cuda.recurrent_kda_paged_reason(**{name: call.get(name) for name in names}) is None
    return recurrent_kda_paged(**{name: x for name, x in call.items() if name != "initial_state"})


def states(call: Call) -> Tensor:
    return call["state_pool"][call["state_indices"].long()]


def cloned(call: Call) -> Call:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


def assert_accurate(call: Call) -> None:
    o = decode(call)
    expected = reference(call)
    assert error(o, expected[0], heads=2) < (4e-3 if o.dtype == torch.bfloat16 else 6e-4)
    assert error(states(call), expected[1], heads=1) < 3e-6


@pytest.mark.parametrize("N", [1, 3, 17, 64])
@pytest.mark.parametrize(("H", "HV"), [(16, 16), (4, 8), (2, 6)])
@pytest.mark.parametrize("slow", [0.0, 0.5, 1.0], ids=["fast gates", "mixed gates", "slow gates"])
def test_decode_follows_the_recurrence(slow: float, H: int, HV: int, N: int) -> None:
    assert_accurate(decode_call(N, H=H, HV=HV, slow_heads=int(slow * HV)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l2norm", [False, True])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_every_option_follows_the_recurrence(gate: str, beta: str, l2norm: bool, dtype: torch.dtype) -> None:
    assert_accurate(decode_call(5, gate=gate, beta=beta, l2norm=l2norm, dtype=dtype))


@pytest.mark.parametrize("wide", [("g",), ("beta",), ("g", "beta")])
def test_gates_may_be_fp32(wide: tuple[str, ...]) -> None:
    call = decode_call(5)
    assert_accurate({**call, **{name: call[name].float() for name in wide}})


@pytest.mark.parametrize("slow", [0.0, 0.5, 1.0], ids=["fast gates", "mixed gates", "slow gates"])
@pytest.mark.parametrize("N", [1, 32])
def test_the_error_is_no_worse_than_that_of_flash_linear_attention(N: int, slow: float) -> None:
    fla = pytest.importorskip("fla.ops.kda").fused_recurrent_kda
    call = decode_call(N, H=8, HV=16, slow_heads=int(16 * slow))
    expected = reference(call)
    options = {name: x for name, x in call.items() if name not in ("state_pool", "state_indices")}
    theirs = fla(**options, output_final_state=True)
    ours = decode(call), states(call)
    for actual, other, exact, heads in zip(ours, theirs, expected, (2, 1), strict=True):
        assert error(actual, exact) <= 1.1 * error(other, exact)
        assert error(actual, exact, heads) <= 1.1 * error(other, exact, heads)


# ---------------------------------------------------------------------------------------------------------------------
# Rows, strides and batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_slots_outside_the_pool_are_padding(index_dtype: torch.dtype) -> None:
    call = decode_call(6)
    rows = call["state_pool"].shape[0]
    live = torch.tensor([True, False, True, False, False, True], device="cuda")
    outside = torch.tensor([-1, -1, 0, rows, 2**31 - 1, 0], device="cuda")
    expected = reference(call)
    call["state_indices"] = torch.where(live, call["state_indices"], outside).to(index_dtype)
    for name in TOKENS:
        call[name][~live] = torch.nan
    before = call["state_pool"].clone()
    o = decode(call)
    assert not o[~live].any()
    slots = call["state_indices"][live].long()
    assert output_error((o[live], call["state_pool"][slots]), (expected[0][live], expected[1][live])) < 4e-3
    untouched = torch.ones(rows, dtype=torch.bool, device="cuda").index_fill_(0, slots, False)
    assert same_bits(call["state_pool"][untouched], before[untouched])


def test_strides_change_no_bit() -> None:
    call = decode_call(5)
    strided = cloned(call)
    parts = [call[name].flatten(2) for name in ("q", "k", "v")]
    fused = torch.cat(parts, -1).repeat(1, 3, 1)[:, 1:2].split([x.shape[-1] for x in parts], -1)
    strided |= {n: x.unflatten(-1, call[n].shape[2:]) for n, x in zip(("q", "k", "v"), fused, strict=True)}
    strided["g"] = torch.cat([call["g"], call["g"]], -1)[..., D:]
    strided["beta"] = call["beta"].repeat_interleave(2, -1)[..., ::2]
    wide = torch.full((call["state_pool"].shape[0], 2, *call["state_pool"].shape[1:]), torch.nan, device="cuda")
    wide[:, 1] = call["state_pool"]
    strided["state_pool"] = wide[:, 1]
    strided["state_indices"] = call["state_indices"].repeat_interleave(2)[::2]
    assert same_bits(decode(strided), decode(call))
    assert same_bits(strided["state_pool"], call["state_pool"])
    assert wide[:, 0].isnan().all()


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_layouts_that_need_a_copy_change_no_bit(name: str) -> None:
    call = decode_call(5)
    x = call[name]
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    copies = [cloned(call) | {name: other} for other in (unaligned, transposed)]
    expected = decode(call)
    for copy in copies:
        assert same_bits(decode(copy), expected) and same_bits(copy["state_pool"], call["state_pool"])


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    call = decode_call(33)
    batched = cloned(call)
    o = decode(batched)
    for n in (0, 7, 32):
        alone = cloned(call)
        alone |= {name: alone[name][n : n + 1] for name in (*TOKENS, "state_indices")}
        assert same_bits(decode(alone), o[n : n + 1])
        assert same_bits(states(alone), states(batched)[n : n + 1])


@pytest.mark.parametrize("rows_per_warp", [2, 4, 8])
def test_the_split_of_work_changes_no_bit(rows_per_warp: int) -> None:
    call = decode_call(9)
    again, o = cloned(call), torch.empty_like(call["v"])
    options = KdaOptions(D**-0.5, *(again.get(name, default) for name, default in KdaOptions._field_defaults.items()))
    given = (again.get(name) for name in INPUTS)
    cuda.recurrent_kda_paged(o, *given, options, rows_per_warp=rows_per_warp)
    assert same_bits(decode(call), o) and same_bits(call["state_pool"], again["state_pool"])


def test_no_sequences_and_no_rows_launch_nothing() -> None:
    call = decode_call(3)
    before = call["state_pool"].clone()
    nothing = {name: call[name][:0] for name in (*TOKENS, "state_indices")}
    assert decode({**call, **nothing}).shape == (0, 1, 4, D)
    assert same_bits(call["state_pool"], before)
    assert not decode({**call, "state_pool": call["state_pool"][:0]}).any()


def test_other_devices_are_rejected_by_name() -> None:
    call = decode_call(3)
    for name in INPUTS[1:]:
        with pytest.raises(ValueError, match=f"^{name} must be on cuda:0 as q is, got cpu$"):
            decode({**call, name: call[name].cpu()})


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs and the compiler
# ---------------------------------------------------------------------------------------------------------------------


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode(call)
    return graph, o


def refill(call: Call, new: Call) -> None:
    """Other contents in the same memory."""
    for name in INPUTS:
        call[name].copy_(new[name])


def test_a_captured_step_replays_with_other_contents() -> None:
    call = decode_call(6)
    graph, o = captured(call)
    for seed in (1, 2, 3):
        new = decode_call(6, seed=seed)
        new["state_indices"][seed] = -1
        refill(call, new)
        graph.replay()
        assert same_bits(decode(new), o) and same_bits(new["state_pool"], call["state_pool"])


def test_two_graphs_share_nothing() -> None:
    calls = [decode_call(4, seed=1), decode_call(7, seed=2)]
    eager = [cloned(call) for call in calls]
    graphs = [captured(call) for call in calls]
    for i in (0, 1, 1, 0, 0, 1):
        graphs[i][0].replay()
        expected = decode(eager[i])
        assert same_bits(graphs[i][1], expected)
    for call, other in zip(calls, eager, strict=True):
        assert same_bits(call["state_pool"], other["state_pool"])


FRESH_PROCESS = """
from test_decode_cuda import captured, cloned, decode, decode_call, same_bits
call = decode_call(5)
eager = cloned(call)
graph, o = captured(call)
graph.replay()
assert same_bits(o, decode(eager)) and same_bits(call["state_pool"], eager["state_pool"])
print("captured")
"""


def test_the_first_call_of_a_process_can_be_captured() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.stdout.strip() == "captured", process.stderr


def test_the_op_is_sound_on_cuda_tensors() -> None:
    call = {name: x for name, x in decode_call(3).items() if name != "initial_state"}
    call["state_pool"] = torch.randn_like(call["state_pool"])  # opcheck compares pools, and NaN with NaN is unequal
    torch.library.opcheck(torch.ops.flashkda.recurrent_kda_paged.default, (), call)


class DecodeStep(nn.Module):
    """A decode step with the states in a buffer."""

    state_pool: Tensor

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.register_buffer("state_pool", call["state_pool"].clone())
        self.options = {n: x for n, x in call.items() if n not in (*TOKENS, "state_pool", "state_indices")}
        del self.options["initial_state"]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_indices: Tensor) -> Tensor:
        return recurrent_kda_paged(q, k, v, g, beta, self.state_pool, state_indices, **self.options) * 2


def test_reduce_overhead_captures_a_pool_that_is_a_buffer() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    call = decode_call(4)
    eager, compiled = DecodeStep(call), DecodeStep(call)
    step = torch.compile(compiled, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(6):  # warm-up, recording, replays
            new = decode_call(4, seed=seed)
            tokens = [new[name] for name in TOKENS]
            slots = call["state_indices"].roll(seed)
            torch.compiler.cudagraph_mark_step_begin()
            assert same_bits(step(*tokens, slots), eager(*tokens, slots))
            assert same_bits(compiled.state_pool, eager.state_pool)
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The portable path on a GPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"B": 2}, {"cu_seqlens": [0, 3, 3, 60]}], ids=["dense", "packed"])
@pytest.mark.parametrize("gate", ["precomputed", "bounded", "unbounded"])
def test_the_portable_path_follows_the_recurrence(gate: str, layout: dict[str, Any]) -> None:
    call = make_call(70, K=64, V=64, gate=gate, initial_state=True, device="cuda", **layout)
    assert output_error(chunk_kda(**call, output_final_state=True), reference(call)) < 1e-5


def test_the_portable_path_replays_with_another_cu_seqlens() -> None:
    call = make_call(200, K=64, V=64, cu_seqlens=[0, 64, 64, 150], initial_state=True, device="cuda")
    tokens = [call[name].requires_grad_() for name in TOKENS]

    def step() -> tuple[Tensor, ...]:
        o, state = chunk_kda(**call, output_final_state=True)
        return o, state, *torch.autograd.grad((o, state), tokens, (torch.ones_like(o), torch.ones_like(state)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for bounds in ([0, 0, 0, 0], [0, 200, 200, 200], [0, 1, 2, 3], [0, 33, 97, 200]):
        call["cu_seqlens"].copy_(torch.tensor(bounds))
        graph.replay()
        for actual, expected in zip(outputs, step(), strict=True):
            assert error(actual, expected) < 1e-6
