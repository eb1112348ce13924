// What every loader does: waits for a free stage, says what its chunk is, and has TMA bring the tiles.
#pragma once

#include <cuda.h>

#include "common/hopper.cuh"
#include "sm90/chunk_kda/pipeline.cuh"

namespace flashkda::chunk_kda {

// Where a chunk's tiles come from. v: of the values, or of the gradient of o.
struct Maps {
  const CUtensorMap* q;
  const CUtensorMap* k;
  const CUtensorMap* v;
  const CUtensorMap* g;
};

// The descriptors, before they are needed.
__device__ __forceinline__ void prefetch(const Maps& maps) {
  for (const CUtensorMap* map : {maps.q, maps.k, maps.v, maps.g}) {
    if (map) cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
  }
}

// kMostInFlight: of stages. At the start of a grid all blocks fill their rings, and the first stages would wait for the
// last ones.
template <typename L, int kMostInFlight = L::kStages>
struct Loader {
  uint32_t shared;
  ChunkInfo* infos;  // the first stage's
  Barriers barriers;
  Cursor<L::kStages> cursor{0};
  Cursor<L::kStages> in_flight{0};  // the first stage that is
  int count = 0;

  // Before a stage is filled.
  __device__ __forceinline__ void pace() {
    if constexpr (kMostInFlight < L::kStages) {
      if (count < kMostInFlight) {
        ++count;
        return;
      }
      mbarrier_wait(barriers.full(in_flight.stage), in_flight.parity);
      in_flight.advance(1);
    }
  }

  __device__ __forceinline__ ChunkInfo* next_info() const {
    mbarrier_wait_patiently(barriers.empty(cursor.stage), cursor.parity ^ 1);
    return reinterpret_cast<ChunkInfo*>(reinterpret_cast<char*>(infos) + cursor.stage * kFactorBytes);
  }

  // With no q where the map is null.
  __device__ __forceinline__ void load(const Maps& maps, int batch, int token, int head, int value_head,
                                       int first_half) {
    issue(maps, batch, token, head, value_head, first_half);
    arm(maps);
  }

  // The two steps of a load: the stage is full when the bytes have come and it is armed, which says how many they are.
  // Between the two there is time to write the ChunkInfo.
  __device__ __forceinline__ void arm(const Maps& maps) {
    const int q_tiles = L::kQueries && maps.q ? 2 : 0;
    mbarrier_arrive_expect_tx(barriers.full(cursor.stage),
                              (2 + q_tiles + L::kValueTiles + (L::kWideGate ? 4 : 2)) * kTileBytes);
    cursor.advance(1);
  }

  __device__ __forceinline__ void issue(const Maps& maps, int batch, int token, int head, int value_head,
                                        int first_half) {
    pace();
    const uint32_t full = barriers.full(cursor.stage);
    const uint32_t stage = shared + cursor.stage * L::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tma_load_4d(stage + kKeyOffset + half * 4096, maps.k, full, half * 64, token, head, batch);
      if (L::kQueries && maps.q)
        tma_load_4d(stage + kQueryOffset + half * 4096, maps.q, full, half * 64, token, head, batch);
    }
    if constexpr (L::kWideGate) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        tma_load_4d(stage + L::kGateOffset + quarter * kTileBytes, maps.g, full, quarter * 32, token, value_head,
                    batch);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tma_load_4d(stage + L::kGateOffset + half * kTileBytes, maps.g, full, half * 64, token, value_head, batch);
      }
    }
#pragma unroll
    for (int half = 0; half < L::kValueTiles; ++half) {
      tma_load_4d(stage + L::value_offset(half), maps.v, full, (first_half + half) * 64, token, value_head, batch);
    }
  }

  // A stage of an item that has no chunk.
  __device__ __forceinline__ void skip() {
    pace();
    mbarrier_arrive(barriers.full(cursor.stage));
    cursor.advance(1);
  }

  // The scan leaves at the first of these; every transform warp meets one.
  __device__ __forceinline__ void finish() {
    for (int i = 0; i < L::kTransformWarps; ++i) {
      next_info()->left = kStop;
      mbarrier_arrive(barriers.full(cursor.stage));
      cursor.advance(1);
    }
  }
};

}  // namespace flashkda::chunk_kda
