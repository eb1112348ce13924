"""What the host decides about the kernels: a function of shapes and the number of multiprocessors, in plain C++."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import test_shares_cuda

CSRC = Path(__file__).parent.parent / "csrc"
CHUNK, SMS = 16, 132
WHOLE, MAPS_AHEAD, MAPS_FIRST = range(3)

# Reads the arguments of `plan` a line, and writes what it returns.
PROGRAM = """
#include <cstdio>
#include "sm90/chunk_kda_fwd/config.h"
int main() {
  long sequences, heads, tokens, packed, one_segment, sms, pool, checkpoints;
  while (std::scanf("%ld %ld %ld %ld %ld %ld %ld %ld", &sequences, &heads, &tokens, &packed, &one_segment, &sms, &pool,
                    &checkpoints) == 8) {
    const auto p = flashkda::chunk_kda_fwd::plan(sequences, heads, tokens, packed, one_segment, sms, pool, checkpoints);
    const long long fields[] = {
        p.scans, p.segments, p.segment_chunks, p.grid, int(p.cut), p.transition_grid, p.shares_grid, p.share, p.pieces,
        p.warm_up, (long long)p.shares.words, (long long)p.shares.words_end, (long long)p.shares.pieces,
        (long long)p.pool_offset, (long long)p.workspace_bytes};
    for (long long field : fields) std::printf("%lld ", field);
    std::puts("");
  }
}
"""

FIELDS = [
    "scans",
    "segments",
    "segment_chunks",
    "grid",
    "cut",
    "transition_grid",
    "shares_grid",
    "share",
    "pieces",
    "warm_up",
    "words",
    "words_end",
    "packed_pieces",
    "pool",
    "bytes",
]

Plans = Callable[[list[tuple[int, ...]]], list[dict[str, int]]]


# The same of the backward pass; then whether its blocks take each tile once, and in the order in which they are ready.
BACKWARD_PROGRAM = """
#include <algorithm>
#include <cstdio>
#include <vector>
#include "sm90/chunk_kda_bwd/config.h"
int main() {
  long batch, heads, tokens, packed, sms;
  while (std::scanf("%ld %ld %ld %ld %ld", &batch, &heads, &tokens, &packed, &sms) == 5) {
    const auto p = flashkda::chunk_kda_bwd::plan(batch, batch, heads, heads, tokens, packed, sms);
    const int images = p.tiles * heads, tiles = p.tiles_per_sequence;
    bool once = true, ordered = true;
    if (!packed && images < 100000) {
      std::vector<int> taken(images);
      for (int block = 0; block < p.gradient_grid; ++block) {
        int last = 0;
        for (auto walk = p.order.walk(block, p.gradient_grid, images); walk.is_left(); walk.advance()) {
          const int image = p.order.image(walk.position, tiles, batch, heads), tile = image / heads % tiles;
          const int ready = std::max(tile, tiles - 1 - tile);
          once &= image >= 0 && image < images && ++taken[image] == 1;
          ordered &= p.order.early_blocks == 0 || ready >= last;
          last = ready;
        }
      }
      for (int times : taken) once &= times == 1;
    }
    const long long fields[] = {
        tiles, p.scans, p.scan_grid, p.scan_cluster, p.gradient_grid, p.order.early_blocks, p.order.early_positions,
        images, (long long)p.workspace.arrivals, (long long)p.workspace.bytes, once, ordered};
    for (long long field : fields) std::printf("%lld ", field);
    std::puts("");
  }
}
"""

BACKWARD_FIELDS = [
    "tiles_per_sequence",
    "scans",
    "scan_grid",
    "scan_cluster",
    "gradient_grid",
    "early_blocks",
    "early_positions",
    "images",
    "arrivals",
    "bytes",
    "once",
    "ordered",
]


def compiled(program: str, fields: list[str], folder: Path) -> Plans:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = folder / "plans"
    command = [compiler, "-std=c++17", f"-I{CSRC}", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=program, text=True, check=True)

    def plan(calls: list[tuple[int, ...]]) -> list[dict[str, int]]:
        text = "\n".join(" ".join(map(str, call)) for call in calls)
        lines = subprocess.run([path], input=text, text=True, check=True, capture_output=True).stdout.splitlines()
        return [dict(zip(fields, map(int, line.split()), strict=True)) for line in lines]

    return plan


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return compiled(PROGRAM, FIELDS, tmp_path_factory.mktemp("forward"))


@pytest.fixture(scope="module")
def backward_plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return compiled(BACKWARD_PROGRAM, BACKWARD_FIELDS, tmp_path_factory.mktemp("backward"))


TOKENS = [0, 1, 16, 17, 100, 300, 512, 1024, 3000, 4096, 8192, 131072, 1 << 24]
HEADS = [1, 2, 4, 6, 12, 16, 24, 33, 64, 66, 67, 96, 200]


def test_every_plan_covers_the_call_and_fits(plans: Plans) -> None:
    calls = list(product([1, 3, 40], HEADS, TOKENS, [0, 1], [0], [SMS, 20], [0, 1], [0]))
    for (N, H, T, packed, _, sms, pool, _), p in zip(calls, plans(calls), strict=True):
        heads, chunks = N * H, max(1, -(-T // CHUNK))
        assert p["segments"] * p["segment_chunks"] >= chunks > (p["segments"] - 1) * p["segment_chunks"]
        blocks = (3 - p["scans"]) * heads * p["segments"]
        assert 1 <= p["grid"] <= sms and (p["grid"] == blocks or blocks > sms or packed)
        assert (p["cut"] == WHOLE) == (p["segments"] == 1) and not (packed and p["segments"] > 1)
        assert (p["transition_grid"] > 0) == (p["cut"] == MAPS_AHEAD)
        if not packed:  # R and B of each segment but the last, at most a tenth of q, k, v and g
            maps = heads * (p["segments"] - 1) * (2 * 2 * 128 * 128 + 8 * 512)
            assert maps <= heads * chunks * CHUNK * 4 * 128 * 2 / 10 and maps <= p["bytes"]
        if p["cut"] == MAPS_FIRST:  # an item a block, which wait for each other
            assert p["scans"] == 1 and p["grid"] == blocks
        if p["shares_grid"]:
            assert 2 * heads <= sms and p["shares_grid"] <= sms and 1 <= p["warm_up"] < chunks
            assert packed or p["shares_grid"] == heads * p["pieces"]
            assert packed or p["segments"] > 1 or (p["scans"] == 1 and chunks >= 30)
            assert packed or p["pieces"] * p["share"] >= chunks > (p["pieces"] - 1) * p["share"]
            assert p["words"] % 16 == 0 and p["words_end"] - p["words"] == 4 * (5 + 2 * heads)
            assert p["packed_pieces"] % 16 == 0 and p["packed_pieces"] >= p["words_end"]
            assert p["bytes"] >= p["packed_pieces"] + (32 * sms if packed else 0)
        if pool and (p["segments"] > 1 or p["shares_grid"]):  # copies of the initial states
            assert p["pool"] % 16 == 0 and p["bytes"] == p["pool"] + heads * 4 * 128 * 128


def test_calls_that_may_not_be_cut_are_not(plans: Plans) -> None:
    invariant = list(product([1, 3], HEADS, TOKENS, [0, 1], [1], [SMS], [0, 1], [0]))
    checkpoints = list(product([1, 3], HEADS, TOKENS, [0, 1], [0], [SMS], [1], [4]))
    for p in plans(invariant + checkpoints):
        assert (p["cut"], p["segments"], p["shares_grid"]) == (WHOLE, 1, 0)


def test_few_heads_take_the_chip(plans: Plans) -> None:
    calls = [
        (1, H, T, 0, 0, SMS, 0, 0) for H, T in ((12, 2048), (8, 4096), (16, 8192), (4, 1024), (24, 8192), (16, 512))
    ]
    for (_, _, T, *_), p in zip(calls, plans(calls), strict=True):
        assert p["shares_grid"] >= 0.9 * SMS and (p["segments"] > 1) == (T > 1024)
    packed = [(4, 12, 8192, 1, 0, SMS, 0, 0), (1, 32, 2048, 1, 0, SMS, 1, 0)]
    assert all(p["shares_grid"] == SMS for p in plans(packed))
    for p in plans([(1, 64, 8192, 0, 0, SMS, 0, 0), (2, 33, 2048, 0, 0, SMS, 0, 0)]):  # two pieces a head
        assert p["pieces"] == 2 and p["segments"] == 1
    many = [(1, 67, 8192, 0, 0, SMS, 0, 0), (1, 96, 8192, 0, 0, SMS, 0, 0), (8, 64, 8192, 1, 0, SMS, 0, 0)]
    short = [(1, 64, 512, 0, 0, SMS, 0, 0), (1, 16, 256, 0, 0, SMS, 0, 0)]
    assert all(p["shares_grid"] == 0 for p in plans(many + short))


def test_the_tests_of_shares_have_them(plans: Plans) -> None:
    calls = []
    for options in test_shares_cuda.SHAPES.values():
        cu_seqlens = options.get("cu_seqlens")
        N = options.get("B", 1) if cu_seqlens is None else len(cu_seqlens) - 1
        calls.append((N, options.get("HV", 4), options["T"], int(cu_seqlens is not None), 0, SMS, 0, 0))
    planned = plans(calls)
    assert all(p["shares_grid"] > 0 for p in planned)
    assert {p["cut"] for p in planned} == {WHOLE, MAPS_AHEAD, MAPS_FIRST}  # what comes after


def test_gradients_begin_beside_scans_that_leave_blocks_idle(backward_plans: Plans) -> None:
    calls = list(product([1, 3], HEADS, [t for t in TOKENS if t > 0], [0, 1], [SMS, 20]))
    for (_, _, _, packed, sms), p in zip(calls, backward_plans(calls), strict=True):
        assert p["once"] and p["ordered"]
        if not p["early_blocks"]:
            assert p["early_positions"] == 0 and p["scan_cluster"] == 1
            continue
        assert p["scan_cluster"] == 16 and p["scan_grid"] % 16 == 0
        # One item a block of the scans, which tells of its tiles. All of these run, or gradients would wait for ever.
        assert not packed and p["scans"] == 1 and p["scan_grid"] + p["early_blocks"] == sms == p["gradient_grid"]
        assert 0 < p["early_positions"] <= p["images"]
        assert p["arrivals"] % 128 == 0 and p["arrivals"] + 16 * p["images"] <= p["bytes"]
    for p in backward_plans(
        [(1, 16, 4096, 0, SMS), (1, 12, 2048, 0, SMS), (1, 24, 8192, 0, SMS), (2, 4, 4096, 0, SMS)]
    ):
        assert p["early_blocks"] > 0
    for p in backward_plans([(1, 64, 8192, 0, SMS), (1, 16, 512, 0, SMS), (1, 16, 4096, 1, SMS)]):
        assert p["early_blocks"] == 0
