"""Which path a call takes, and why, is told before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import KERNEL, OPS, call_on_gpu, gpu_with_kernels, path_of, pool
from helpers import Call, paged

import flashkda_ops
from flashkda_ops import cuda


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An install with kernels for compute capability 9.0, and a device of that kind in the first place."""
    extension = SimpleNamespace(cuda_archs="90a;100f", cuda_version="13.0", cutlass_version="4.2.0")
    monkeypatch.setattr(cuda, "_load", lambda: (extension, "built for 90a, 100f with CUDA 13.0, CUTLASS 4.2.0"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (8, 9))
    cuda.device_reason.cache_clear()
    yield
    cuda.device_reason.cache_clear()


def test_show_config_prints_the_versions_and_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    flashkda_ops.show_config()
    printed = capsys.readouterr().out
    assert flashkda_ops.__version__ in printed and torch.__version__ in printed
    assert cuda.extension_status()[1] in printed


def test_show_config_names_every_op_on_every_device(
    built: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model {device.index}")
    flashkda_ops.show_config()
    devices = capsys.readouterr().out.split("cuda:")[1:]
    assert len(devices) == 2
    for i, text in enumerate(devices):
        assert f"model {i}" in text and all(f"  {op}: " in text for op in OPS)
    assert "compute capability 8.9" not in devices[0] and "compute capability 8.9" in devices[1]


WIDTHS = (1, 63, 64, 127, 128, 129)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def what_show_config_says(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    flashkda_ops.show_config()
    lines = capsys.readouterr().out.split("cuda:0")[1].splitlines()[1:]
    return dict(line.strip().split(": ", 1) for line in lines)


def is_promised(text: str, K: int, V: int, dtype: torch.dtype) -> bool:
    """Whether a kernel is, by the widths and dtypes that are named first."""
    span, width = re.search(r"K and V of (\d+) to (\d+)", text), re.search(r"K = V = (\d+)", text)
    lowest, highest = span.groups() if span is not None else width.groups() * 2  # type: ignore[union-attr]
    tokens = re.search(r"(\w+) or (\w+) tokens", text)
    assert tokens is not None
    return int(lowest) <= min(K, V) and max(K, V) <= int(highest) and NAMES[dtype] in tokens.groups()


@pytest.mark.parametrize("op", OPS)
def test_what_show_config_says_of_widths_and_dtypes_is_what_runs(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    with gpu_with_kernels():
        text = what_show_config_says(capsys)[op]
        for K, V, dtype in itertools.product(WIDTHS, WIDTHS, NAMES):
            call = call_on_gpu(5, B=2, K=K, V=V, dtype=dtype)
            if op.endswith("paged"):
                if dtype == torch.float64:
                    continue  # whose pools are of another dtype
                call = paged(call, pool(call), torch.empty(2, dtype=torch.int32, device="cuda"))
                if op == "recurrent_kda_paged":
                    call["state_indices"] = call["state_indices"].unsqueeze(1).expand(2, 5)
            assert (path_of(op, call) == KERNEL) == is_promised(text, K, V, dtype), (K, V, dtype)


OPTIONS: list[dict[str, Any]] = [
    {"gate": "precomputed"},
    {"gate": "unbounded, no dt_bias", "beta": "negative eigenvalues", "l2norm": False},
    {"initial_state": True, "state_v_first": True},
    {"cu_seqlens": [0, 3, 3, 7], "initial_state": True, "HV": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("op", ["chunk_kda", "chunk_kda_backward"])
def test_no_option_keeps_a_call_from_the_chunk_kernels(op: str, options: dict[str, Any]) -> None:
    with gpu_with_kernels():
        for K, V in itertools.product((64, 100, 128), repeat=2):
            assert path_of(op, call_on_gpu(7, K=K, V=V, dtype=torch.bfloat16, **options)) == KERNEL


def test_intermediate_states_are_those_that_show_config_excludes(capsys: pytest.CaptureFixture[str]) -> None:
    with gpu_with_kernels():
        assert "without intermediate states" in what_show_config_says(capsys)["chunk_kda"]
        for K in (64, 128):
            call = call_on_gpu(64, K=K, V=K, dtype=torch.bfloat16)
            assert path_of("chunk_kda", call) == KERNEL != path_of("chunk_kda", call | {"checkpoint_interval": 32})


def with_checkpoints(call: Call) -> Call:
    offsets = torch.empty(1, 2, dtype=torch.int32, device="cuda")
    return call | {"checkpoint_offsets": offsets, "checkpoint_indices": offsets}


def test_pools_and_checkpoints_are_served_as_show_config_says(capsys: pytest.CaptureFixture[str]) -> None:
    with gpu_with_kernels():
        texts = what_show_config_says(capsys)
        in_place = "in place for K = V = 128 and rows aligned to 16 bytes, else on copies of rows, without checkpoints"
        assert in_place in texts["chunk_kda_paged"]
        assert "rows aligned to 16 bytes" in texts["recurrent_kda_paged"]
        for K, aligned in itertools.product((64, 128), (True, False)):
            tokens = call_on_gpu(1, K=K, V=K, dtype=torch.bfloat16)
            call = paged(tokens, pool(tokens, aligned), torch.empty(1, dtype=torch.int32, device="cuda"))
            is_in_place = K == 128 and aligned
            assert path_of("chunk_kda_paged", call) == KERNEL
            assert (path_of("chunk_kda_paged", with_checkpoints(call)) == KERNEL) == is_in_place
            assert (path_of("recurrent_kda_paged", call) == KERNEL) == is_in_place


def test_every_op_of_the_namespace_is_registered() -> None:
    assert all(hasattr(torch.ops.flashkda, op) for op in OPS)


def test_a_device_without_kernels_has_a_reason(built: None) -> None:
    assert cuda.device_reason(torch.device("cuda", 0)) is None
    assert "compute capability 8.9" in cuda.device_reason(torch.device("cuda", 1))
    assert "CUDA devices" in cuda.device_reason(torch.device("cpu"))


def decode_call(**changes: Any) -> dict[str, Any]:
    """A call that a decode kernel serves, on meta tensors: the decision reads no values."""
    bf16 = {"device": "meta", "dtype": torch.bfloat16}
    call = {
        "q": torch.empty(3, 1, 2, 128, **bf16), "k": torch.empty(3, 1, 2, 128, **bf16),
        "v": torch.empty(3, 1, 4, 128, **bf16), "g": torch.empty(3, 1, 4, 128, **bf16),
        "beta": torch.empty(3, 1, 4, **bf16), "state_pool": rows_of(7, 4, 128, 128),
    }  # fmt: skip
    return call | changes


def rows_of(*shape: int, dtype: torch.dtype = torch.float32, skipped: int = 0) -> torch.Tensor:
    """A pool, which has an address, ``skipped`` elements into each row of its memory."""
    rows, HV, K, V = shape
    return torch.empty(rows, HV * K * V + skipped, dtype=dtype)[:, skipped:].unflatten(1, (HV, K, V))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"g": meta(3, 1, 4, 128, dtype=torch.float32)}, None),
        ({"state_pool": rows_of(7, 5, 128, 128)[:, :4]}, None),
        ({"q": meta(3, 1, 2, 64)}, "K=64"),
        ({"v": meta(3, 1, 4, 64)}, "V=64"),
        ({"state_pool": rows_of(7, 4, 128, 128, dtype=torch.bfloat16)}, None),
        ({"q": meta(3, 1, 2, 128, dtype=torch.float32)}, "float32"),
        ({"state_pool": rows_of(7, 4, 128, 128, dtype=torch.bfloat16, skipped=4)}, "aligned"),
        ({"state_pool": rows_of(7, 4, 128, 128, skipped=3)}, "aligned"),
    ],
)
def test_the_decode_kernel_is_chosen_by_shape_and_dtype_alone(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str | None
) -> None:
    monkeypatch.setattr(cuda, "device_reason", lambda device: None)
    actual = cuda.recurrent_kda_paged_reason(**decode_call(**changes))
    assert actual is None if reason is None else reason in actual


def test_cpu_tensors_take_the_portable_path_for_a_reason() -> None:
    reason = cuda.recurrent_kda_paged_reason(**decode_call(q=torch.empty(3, 1, 2, 128, dtype=torch.bfloat16)))
    assert reason is not None and reason == cuda.device_reason(torch.device("cpu"))


def chunk_call(**changes: Any) -> dict[str, Any]:
    """A call that the chunk kernels serve, on meta tensors."""
    call = {
        "q": meta(2, 70, 2, 128), "k": meta(2, 70, 2, 128), "v": meta(2, 70, 4, 128), "g": meta(2, 70, 4, 128),
        "beta": meta(2, 70, 4), "A_log": None, "dt_bias": None, "initial_state": None, "cu_seqlens": None,
    }  # fmt: skip
    return call | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"g": meta(2, 70, 4, 128, dtype=torch.float32), "beta": meta(2, 70, 4, dtype=torch.float32)}, None),
        ({"initial_state": meta(2, 4, 128, 128, dtype=torch.float32)}, None),
        ({"q": meta(2, 70, 2, 64)}, "K=64"),
        ({"v": meta(2, 70, 4, 64)}, "V=64"),
        ({"q": meta(2, 70, 2, 128, dtype=torch.float32)}, "float32"),
        ({"initial_state": meta(2, 4, 128, 128)}, "bfloat16"),
        ({name: meta(2, 0, 4, 128) for name in "qkvg"}, "empty"),
    ],
)
def test_the_chunk_kernels_are_chosen_by_shape_and_dtype_alone(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str | None
) -> None:
    monkeypatch.setattr(cuda, "device_reason", lambda device: None)
    actual = cuda.chunk_kda_reason(**chunk_call(**changes))
    assert actual is None if reason is None else reason in actual


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"state_pool": rows_of(7, 4, 128, 128, dtype=torch.bfloat16)}, None),
        ({"state_pool": rows_of(7, 5, 128, 128)[:, :4]}, None),
        ({"v": meta(2, 70, 4, 64)}, "V=64"),
        ({"q": meta(2, 70, 2, 128, dtype=torch.float32)}, "float32"),
        ({"state_pool": rows_of(7, 4, 128, 128, dtype=torch.bfloat16, skipped=4)}, "aligned"),
        ({"state_pool": meta(2**31, 4, 128, 128)}, "32 bits"),
    ],
)
def test_the_chunk_kernel_works_on_a_pool_by_shape_and_dtype_alone(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str | None
) -> None:
    monkeypatch.setattr(cuda, "device_reason", lambda device: None)
    call = chunk_call(state_pool=rows_of(7, 4, 128, 128)) | changes
    state_pool = call.pop("state_pool")
    actual = cuda.chunk_kda_reason(**call) or cuda.chunk_kda_paged_reason(state_pool)
    assert actual is None if reason is None else reason in actual


def prefill_workspace(sequences: int, heads: int, tokens: int, *, packed: bool = False, **pool: Any) -> int:
    loaded, status = cuda.extension_status()
    if not loaded:
        pytest.skip(status)
    return cuda._forward_workspace_bytes(sequences, heads, tokens, packed, False, 132, **pool)


def test_calls_on_a_pool_copy_initial_states_where_sequences_are_cut_alone() -> None:
    for sequences, heads, tokens, packed, copies in [
        (2, 4, 1024, False, 8),
        (2, 4, 40, False, 0),
        (2, 96, 1024, False, 0),
        (2, 4, 1024, True, 8),
        (2, 4, 40, True, 0),
        (2, 96, 1024, True, 0),
    ]:
        plain = prefill_workspace(sequences, heads, tokens, packed=packed)
        size = prefill_workspace(sequences, heads, tokens, packed=packed, has_pool=True)
        assert 0 <= size - plain - copies * 128 * 128 * 4 < 16


def test_checkpoints_are_listed_in_the_workspace_and_leave_one_segment() -> None:
    assert prefill_workspace(2, 4, 1024, has_pool=True, checkpoints=5) == 2 * 5 * 8
    packed = prefill_workspace(3, 4, 40, packed=True)
    for tokens in (40, 1024):
        size = prefill_workspace(3, 4, tokens, packed=True, has_pool=True, checkpoints=5)
        assert 0 <= size - packed - 3 * 5 * 8 < 16


TILE = 64
STATE_BYTES, SUM_BYTES = 2 * 128 * 128, 4 * (128 + 1)


@pytest.mark.parametrize(("setting", "initialized", "expected"), [
    ("", False, True), ("", True, False), ("0", False, False), ("1", True, True),
])  # fmt: skip
def test_scans_are_clusters_only_where_no_other_rank_may_wait_for_them(
    monkeypatch: pytest.MonkeyPatch, setting: str, initialized: bool, expected: bool
) -> None:
    monkeypatch.setattr(cuda, "CLUSTERS", setting)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialized)
    assert cuda.may_use_clusters() is expected


def backward_workspace(T: int, *, B: int = 1, N: int | None = None, H: int = 2, HV: int = 2) -> int:
    loaded, status = cuda.extension_status()
    if not loaded:
        pytest.skip(status)
    return cuda._backward_workspace_bytes(B, B if N is None else N, H, HV, T, N is not None, 132)


@pytest.mark.parametrize("T", [1, 64, 65, 8192])
def test_the_backward_workspace_is_two_states_and_the_partial_sums_of_every_tile(T: int) -> None:
    tiles = 3 * -(-T // TILE)
    size = backward_workspace(T, B=3)
    if T == 8192:  # gradients begin beside the scans
        size -= 16 * 2 * tiles
    assert 0 <= size - tiles * 2 * (2 * STATE_BYTES + SUM_BYTES) < 4 * 128


@pytest.mark.parametrize("lengths", [[1] * 64, [0, 0, 200], [65, 65, 65, 5], [64, 64], [1, 63, 64, 65, 127, 128, 0]])
def test_the_backward_workspace_has_room_for_the_tiles_of_any_sequences(lengths: list[int]) -> None:
    tiles = sum(-(-length // TILE) for length in lengths)
    assert backward_workspace(sum(lengths), N=len(lengths)) >= tiles * 2 * (2 * STATE_BYTES + SUM_BYTES)


def test_grouped_value_heads_need_fp32_gradients_of_q_and_k_for_each() -> None:
    assert backward_workspace(100, H=2, HV=6) - backward_workspace(100, H=6, HV=6) == 2 * 100 * 6 * 128 * 4


def test_the_backward_workspace_grows_linearly_with_the_tokens() -> None:
    dense = [backward_workspace(T, H=40, HV=40) for T in (1024, 2048, 4096)]
    assert dense[2] - dense[1] == 2 * (dense[1] - dense[0])


def forward_workspace(T: int, heads: int, *, sequences: int = 1, packed: bool = False, one: bool = False) -> int:
    loaded, status = cuda.extension_status()
    if not loaded:
        pytest.skip(status)
    return cuda._forward_workspace_bytes(sequences, heads, T, packed, one, 132)


def share_words(heads: int) -> int:
    """The bytes of what blocks in shares count in, in whole 16 bytes."""
    return (4 * (5 + 2 * heads) + 15) // 16 * 16


def test_only_dense_calls_of_few_heads_take_memory_for_segments() -> None:
    assert forward_workspace(8192, 16) > 0
    assert forward_workspace(8192, 96) == forward_workspace(8192, 16, sequences=6) == 0
    assert forward_workspace(8192, 16, one=True) == forward_workspace(64, 4) == 0
    assert forward_workspace(40, 16, sequences=4, packed=True) < 200  # the plan
    pieces = 132 * 32  # and of calls in shares, one a block
    assert forward_workspace(8192, 16, sequences=4, packed=True) < 200 + share_words(64) + pieces


@pytest.mark.parametrize("heads", [1, 4, 12, 16, 32, 48, 66])
@pytest.mark.parametrize("T", [17, 512, 2048, 8192, 131072, 2**20])
def test_the_maps_of_a_call_take_a_tenth_of_its_tokens_at_most(T: int, heads: int) -> None:
    map_bytes = 2 * 128 * 128 + (2 * 128 * 128 + 8 * 512) + 8  # R, B with its exponents, two words
    size = forward_workspace(T, heads)
    maps, rest = divmod(size, map_bytes)
    assert rest == 0 or rest == -maps * map_bytes % 16 + share_words(heads)
    tokens = -(-T // 16) * 16 * heads * 4 * 128 * 2
    assert maps * (map_bytes - 8) <= min(tokens / 10, 14e6)
