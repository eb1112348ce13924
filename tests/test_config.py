"""Which path a call takes, and why, is told before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashkda_ops
from flashkda_ops import cuda

OPS = ("chunk_kda", "chunk_kda_backward", "chunk_kda_transition", "chunk_kda_paged", "recurrent_kda_paged")


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
        "beta": torch.empty(3, 1, 4, **bf16), "state_pool": torch.empty(7, 4, 128, 128, device="meta"),
    }  # fmt: skip
    return call | changes


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"g": meta(3, 1, 4, 128, dtype=torch.float32)}, None),
        ({"state_pool": meta(7, 5, 128, 128, dtype=torch.float32)[:, :4]}, None),
        ({"q": meta(3, 1, 2, 64)}, "K=64"),
        ({"v": meta(3, 1, 4, 64)}, "V=64"),
        ({"state_pool": meta(7, 4, 128, 128)}, None),
        ({"q": meta(3, 1, 2, 128, dtype=torch.float32)}, "float32"),
        ({"state_pool": meta(7, 4 * 128 * 128 + 4)[:, 4:].unflatten(1, (4, 128, 128))}, "aligned"),
        ({"state_pool": meta(7, 4 * 128 * 128 + 3, dtype=torch.float32)[:, 3:].unflatten(1, (4, 128, 128))}, "aligned"),
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
        ({"state_pool": meta(7, 4, 128, 128)}, None),
        ({"state_pool": meta(7, 5, 128, 128, dtype=torch.float32)[:, :4]}, None),
        ({"v": meta(2, 70, 4, 64)}, "V=64"),
        ({"q": meta(2, 70, 2, 128, dtype=torch.float32)}, "float32"),
        ({"state_pool": meta(7, 4 * 128 * 128 + 4)[:, 4:].unflatten(1, (4, 128, 128))}, "aligned"),
        ({"state_pool": meta(2**31, 4, 128, 128)}, "32 bits"),
    ],
)
def test_the_chunk_kernel_works_on_a_pool_by_shape_and_dtype_alone(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str | None
) -> None:
    monkeypatch.setattr(cuda, "device_reason", lambda device: None)
    call = chunk_call(state_pool=meta(7, 4, 128, 128, dtype=torch.float32)) | changes
    pool = call.pop("state_pool")
    actual = cuda.chunk_kda_reason(**call) or cuda.chunk_kda_paged_reason(pool)
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
