// The states at the borders of tiles, from both ends of every sequence: the pipeline of chunk_kda/pipeline.cuh, where
// an item is a (sequence, value head) and a direction.
//
// Forward, the states as prefill computes them, without o:
//
//   W  = c (V n_k - Kd S^T)
//   U  = A W
//   S' = S d + U^T Kr
//
// In reverse, their gradients. With dO' = dO scale / n_q:
//
//   E  = Kr dS'^T + P^T dO'          (n_k times the gradient of U)
//   D  = c A^T E                     (that of W over n_k)
//   dS = dS' d + dO'^T Qd - D^T Kd
//
// Everything is transposed. Lifts (kLift) are in Kd, Qd and P; c and dO' carry their inverse.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "common/hopper.cuh"
#include "common/launch.h"
#include "sm90/chunk_kda/loader.cuh"
#include "sm90/chunk_kda/pipeline.cuh"
#include "sm90/chunk_kda/state.cuh"
#include "sm90/chunk_kda/tensor_map.h"
#include "sm90/chunk_kda/transform.cuh"
#include "sm90/chunk_kda_bwd/config.h"
#include "sm90/chunk_kda_bwd/launch.h"

namespace flashkda::chunk_kda_bwd {

using namespace chunk_kda;

// A warp's 16 rows of V of an image, on their way out: two halves of K.
constexpr int kHalfImageBytes = 16 * 128;
constexpr int kImageBytes = 2 * kHalfImageBytes;

struct StateArguments {
  CUtensorMap q, k, v, g, d_o;
  ChunkKdaBwdParams p;
  char* plan;               // of a packed call
  const int* tile_offsets;  // of a packed call
  int tiles_per_sequence;   // of a dense call
  char* states;
  char* state_gradients;
  int* arrivals;  // as WorkspaceLayout has them; null where nobody waits for them
};

// ---- loader

struct StateItem {
  int batch;
  int sequence;
  int value_head;
  int part;
  bool reverse;
  int chunks;  // to scan
  int token;   // of the first one
  int left;    // tokens of the sequence from there on
  int tile;    // the first border: the one before it where the scan goes forward, behind it in reverse
};

// Halves of heads or heads, in both directions.
__device__ __forceinline__ int items_of(const StateArguments& arguments, int scans) {
  return 2 * (3 - scans) * arguments.p.sequences * arguments.p.value_heads;
}

// False where there is nothing to do.
template <int kScans>
__device__ __forceinline__ bool read_item(const StateArguments& arguments, int index, StateItem& item) {
  const ChunkKdaBwdParams& p = arguments.p;
  constexpr int kHalves = 3 - kScans;
  item.part = index % kHalves;
  index /= kHalves;
  int begin = 0, length = int(p.tokens), first_tile;
  if (p.cu_seqlens) {
    // Longest first.
    const int rank = index / (2 * p.value_heads);
    index -= rank * 2 * p.value_heads;
    item.reverse = index < p.value_heads;
    item.value_head = item.reverse ? index : index - p.value_heads;
    const PackedSequence packed = packed_sequence(arguments.plan, p.sequences, rank);
    item.sequence = packed.index;
    item.batch = 0;
    begin = packed.begin;
    length = packed.length;
    first_tile = arguments.tile_offsets[item.sequence];
  } else {
    // The way back takes longer.
    const int heads = p.sequences * p.value_heads;
    item.reverse = index < heads;
    if (!item.reverse) index -= heads;
    item.sequence = item.batch = index / p.value_heads;
    item.value_head = index - item.sequence * p.value_heads;
    first_tile = item.sequence * arguments.tiles_per_sequence;
  }
  const int tiles = (length + kTile - 1) / kTile;
  if (item.reverse) {
    item.chunks = (length + kChunk - 1) / kChunk;
    const int last = max(item.chunks - 1, 0) * kChunk;
    item.token = begin + last;
    item.left = length - last;
    item.tile = first_tile + tiles - 1;
    // Behind the first tile's border there is only the initial state's gradient.
    if (!p.d_initial_state) item.chunks = tiles > 1 ? item.chunks - kTileChunks : 0;
    return tiles > 0 || p.d_initial_state;
  }
  // No border behind the last tile.
  item.chunks = max(tiles - 1, 0) * kTileChunks;
  item.token = begin;
  item.left = length;
  item.tile = first_tile;
  return tiles > 0 && p.of_tokens();
}

template <typename L>
__device__ void load_states(const StateArguments& arguments, uint32_t shared, ChunkInfo* infos, Barriers barriers) {
  const ChunkKdaBwdParams& p = arguments.p;
  const int items = items_of(arguments, L::kScans);
  const int group = p.value_heads / p.heads;
  int* ticket = reinterpret_cast<int*>(arguments.plan);
  Loader<L> loader{shared, infos, barriers};

  cudaGridDependencySynchronize();  // the plan
  for (int index = blockIdx.x, next; index < items; index = next) {
    next = p.cu_seqlens ? int(gridDim.x) + atomicAdd(ticket, 1) : index + int(gridDim.x);
    StateItem item;
    if (!read_item<L::kScans>(arguments, index, item)) continue;
    const Maps maps{item.reverse ? &arguments.q : nullptr, &arguments.k, item.reverse ? &arguments.d_o : &arguments.v,
                    &arguments.g};
    const int head = item.value_head / group;
    const float* start = item.reverse ? p.d_final_state : p.initial_state;
    if (start && item.part == 0) {
      const int64_t state = (int64_t(item.sequence) * p.value_heads + item.value_head) * (kHeadDim * kHeadDim);
      cute::SM90_BULK_COPY_G2S::PREFETCH::copy(start + state, kHeadDim * kHeadDim * 4);
    }
    const int step = item.reverse ? -kChunk : kChunk;
    for (int chunk = 0; chunk < max(item.chunks, 1); ++chunk) {
      ChunkInfo* info = loader.next_info();
      const int token = item.token + chunk * step;
      info->token = token;
      info->batch = item.batch;
      info->value_head = item.value_head;
      info->sequence = item.sequence;
      info->left = item.chunks > 0 ? item.left - chunk * step : 0;
      info->part = item.part;
      info->flags = item.reverse ? kReverse : 0;
      info->chunks = item.chunks;
      info->tile = item.tile;
      if (item.chunks > 0) {
        loader.load(maps, item.batch, token, head, item.value_head, item.part);
      } else {
        loader.skip();
      }
    }
  }
  loader.finish();
}

// ---- scan

// Images of a block's one item that are written, a word for each warp of the scan.
template <typename L>
__device__ __forceinline__ uint32_t images_written(uint32_t shared) {
  return shared + L::kOutput + L::kAllOutputBytes - 16;
}

// Tells of images, behind the scan, which is not to wait for its own fences. One warp.
template <typename L>
__device__ void announce_images(const StateArguments& arguments, uint32_t shared) {
  StateItem item = {};
  const bool has_item =
      int(blockIdx.x) < items_of(arguments, L::kScans) && read_item<L::kScans>(arguments, blockIdx.x, item);
  const int tiles = has_item ? arguments.tiles_per_sequence : 0;
  const int64_t step = int64_t(item.reverse ? -1 : 1) * arguments.p.value_heads * kArrivals;
  int* word = arguments.arrivals + (int64_t(item.tile) * arguments.p.value_heads + item.value_head) * kArrivals +
              (item.reverse ? 2 : 0) + item.part;
  for (int tile = threadIdx.x % 32; tile < tiles; tile += 32) word[tile * step] = 0;
  __threadfence();
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  cudaTriggerProgrammaticLaunchCompletion();  // the gradients, behind those of all blocks, may wait for these words
  for (int done = 0; done < tiles;) {
    const int4 written = load_acquire_shared_4(images_written<L>(shared));
    const int upto = min(min(written.x, written.y), min(written.z, written.w));
    for (; done < upto; ++done, word += step) store_release(word, 1);
    __nanosleep(200);
  }
}

template <typename T, typename L>
__device__ void scan_states(const StateArguments& arguments, uint32_t shared, Barriers barriers) {
  using cute::SM90::GMMA::Major;
  using cute::SM90::GMMA::ScaleOut;
  const ChunkKdaBwdParams& p = arguments.p;
  const int warpgroup = threadIdx.x / 128;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  const int pair = lane % 4 * 2;

  // This warp's 16 tokens x 16 columns of the value tile, for transposing ldmatrix; its part of an image, for stmatrix.
  const int matrix_token = lane % 8 + lane / 16 * 8;
  uint32_t v_matrix = shared + kValueOffset + warpgroup * kTileBytes + matrix_token * 128 +
                      ((uint32_t(warp * 2 + lane / 8 % 2) ^ (matrix_token % 8)) << 4);
  const uint32_t image = shared + L::kOutput + threadIdx.x / 32 * kImageBytes;
  uint32_t image_matrix = image + lane % 16 * 128 + (uint32_t((lane / 16) ^ (lane % 8)) << 4);
  uint32_t pair_factors = shared + L::kFactors + pair * 4;
  uint32_t pair_decays = shared + L::kFactors + kDecayOffset + lane % 4 * 16;
  keep(v_matrix);
  keep(image_matrix);
  keep(pair_factors);
  keep(pair_decays);

  float state[2][32];  // of K, halves
  uint32_t copy[32];
  Cursor<L::kStages> cursor(0);
  mbarrier_wait(barriers.ready(0), 0);
  for (;;) {
    const uint32_t info = shared + L::kFactors + cursor.stage * kFactorBytes + kChunkInfoOffset;
    const uint4 where = load_shared<uint4>(info);
    const uint4 what = load_shared<uint4>(info + offsetof(ChunkInfo, left));
    if (int(what.x) == kStop) break;
    const uint2 borders = load_shared<uint2>(info + offsetof(ChunkInfo, chunks));
    const int chunks = int(borders.x);
    const bool reverse = what.w & kReverse;
    const int column = (int(what.y) + warpgroup) * 64 + warp * 16;  // of V, this warp's first
    const int64_t matrix = (int64_t(where.w) * p.value_heads + where.z) * (kHeadDim * kHeadDim);
    const int64_t first = matrix + first_element(p.state_v_first, column + lane / 4, pair);
    const float* start = reverse ? p.d_final_state : p.initial_state;
    if (start) {
      load_state(state, start + first, p.state_v_first);
    } else {
#pragma unroll
      for (int i = 0; i < 64; ++i) state[i / 32][i % 32] = 0.f;
    }

    char* border = (reverse ? arguments.state_gradients : arguments.states) +
                   (int64_t(borders.y) * p.value_heads + where.z) * kStateBytes + column * 128;
    const int64_t border_step = (reverse ? -1 : 1) * int64_t(p.value_heads) * kStateBytes;
    [[maybe_unused]] int images = 0;
    // Those stored so far are there.
    const auto announce = [&] {
      bulk_store_wait_written();
      if (images > 0) store_release_shared(images_written<L>(shared) + warp * 4, images);
    };
    const auto store_image = [&] {
      if (lane == 0) {
        if (L::kScans == 1 && arguments.arrivals) {
          announce();
          ++images;
        } else {
          bulk_store_wait();
        }
      }
      __syncwarp();
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const uint32_t (&fragment)[4] = *reinterpret_cast<const uint32_t (*)[4]>(copy + 4 * m);
        stmatrix_x4(m / 4 * kHalfImageBytes + (image_matrix ^ uint32_t(m % 4 * 32)), fragment);
      }
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (lane == 0) {
        bulk_store(border, image, kHalfImageBytes);
        bulk_store(border + kStateBytes / 2, image + kHalfImageBytes, kHalfImageBytes);
      }
      border += border_step;
    };

    // dO'^T, an operand: as it lies in shared memory, with the factors of its tokens, and as it is multiplied.
    struct RawGradient {
      uint32_t bits[4];
      float2 scale[2];
    };
    const auto load_d_o = [&] {
      RawGradient raw;
      const uint32_t factors = pair_factors + cursor.stage * kFactorBytes;
      ldmatrix_x4_trans(raw.bits, v_matrix + cursor.stage * L::kStageBytes);
      raw.scale[0] = load_shared<float2>(factors + kOutputScaleOffset);
      raw.scale[1] = load_shared<float2>(factors + kOutputScaleOffset + 32);
      return raw;
    };
    uint32_t d_o[4];
    const auto scale_d_o = [&](const RawGradient& raw) {
      float x[8];
      unpack(x, raw.bits, T{});
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d_o[i] = pack_bf16(x[2 * i] * raw.scale[i / 2].x, x[2 * i + 1] * raw.scale[i / 2].y);
      }
    };
    const auto pack = [](uint32_t (&packed)[4], const float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    };
    const auto pack_scaled = [](uint32_t (&packed)[4], const float (&x)[8], const float2(&scale)[2]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) packed[i] = pack_bf16(x[2 * i] * scale[i / 2].x, x[2 * i + 1] * scale[i / 2].y);
    };
    const auto load_half_decays = [&](float4(&d)[4], int half) {
      load_decays(d, pair_decays + cursor.stage * kFactorBytes, half);
    };

    // With one scan its chain binds, so all loads for the next chunk leave together while the last products run. With
    // two the transform does, and loads close to their use measured better.
    constexpr bool kLoadAhead = L::kScans == 1;

    // The tiles and the system of the chunk at the cursor, as operands. Made a chunk ahead, beside other work: between
    // WARPGROUP.ARRIVE and the first product every address would be waited for.
    cute::GmmaDescriptor tiles, system;
    const uint32_t in_block = address_in_block(shared);
    const auto find_operands = [&](bool contract_rows) {
      const uint32_t solve = in_block + L::kFactors + cursor.stage * kFactorBytes + kSolveOffset;
      tiles = swizzled_128b(in_block + cursor.stage * L::kStageBytes);
      system = contract_rows ? mn_major_plain(solve, 32) : k_major_plain(solve, 32);
      keep(tiles.reg32_[0]);
      keep(system.reg32_[0]);
    };

    if (chunks > 0) copy_and_decay(state, copy, pair_decays + cursor.stage * kFactorBytes);
    if (chunks == 0) {
      mbarrier_arrive(barriers.empty(cursor.stage));
      cursor.advance(1);
    } else if (reverse) {
      scale_d_o(load_d_o());
      find_operands(true);
      for (int left = chunks; left > 0; --left) {
        const uint32_t column_scale = pair_factors + cursor.stage * kFactorBytes + kColumnScaleOffset;
        const uint32_t empty = barriers.empty(cursor.stage);
        cursor.advance(1);
        float e[8], d[8];
        uint32_t packed[4];
        cute::warpgroup_arrive();
        wgmma<Major::MN>(e, d_o, moved(system, 16 * 16), ScaleOut::Zero);
        multiply_copy(e, copy, moved(tiles, L::kGateOffset), kTileBytes, ScaleOut::One);
        cute::warpgroup_commit_batch();
        wgmma<Major::MN>(state[0], d_o, moved(tiles, kQueryOffset));
        wgmma<Major::MN>(state[1], d_o, moved(tiles, kQueryOffset + 4096));
        cute::warpgroup_commit_batch();
        if (left % kTileChunks == 0 || left == chunks) store_image();
        cute::warpgroup_wait<1>();

        pack(packed, e);
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] = e[i];
        cute::warpgroup_arrive();
        wgmma<Major::MN>(d, packed, system);
        cute::warpgroup_commit_batch();
        const float2 c[2] = {load_shared<float2>(column_scale), load_shared<float2>(column_scale + 32)};
        cute::warpgroup_wait<0>();

        pack_scaled(packed, d, c);
        cute::warpgroup_arrive();
        wgmma<Major::MN>(state[0], packed, moved(tiles, kKeyOffset));
        cute::warpgroup_commit_batch();
        wgmma<Major::MN>(state[1], packed, moved(tiles, kKeyOffset + 4096));
        cute::warpgroup_commit_batch();
        if (left > 1) {
          mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
          float4 d0[4], d1[4];
          const RawGradient raw = load_d_o();
          if constexpr (!kLoadAhead) scale_d_o(raw);
          load_half_decays(d0, 0);
          if constexpr (kLoadAhead) load_half_decays(d1, 1);
          cute::warpgroup_wait<1>();
          copy_and_decay(state, copy, 0, d0);
          if constexpr (kLoadAhead) scale_d_o(raw);
          if constexpr (!kLoadAhead) load_half_decays(d1, 1);
          find_operands(true);
          cute::warpgroup_wait<0>();
          copy_and_decay(state, copy, 1, d1);
        } else {
          cute::warpgroup_wait<0>();
        }
        __syncwarp();
        mbarrier_arrive(empty);
      }
    } else {
      find_operands(false);
      for (int left = chunks; left > 0; --left) {
        const uint32_t factors = pair_factors + cursor.stage * kFactorBytes;
        const uint32_t v_address = v_matrix + cursor.stage * L::kStageBytes;
        const uint32_t empty = barriers.empty(cursor.stage);
        cursor.advance(1);
        float w[8], u[8];
        uint32_t packed[4];
        cute::warpgroup_arrive();
        multiply_copy(w, copy, moved(tiles, kKeyOffset), 4096, ScaleOut::Zero);
        cute::warpgroup_commit_batch();
        if (left % kTileChunks == 0) store_image();
        uint32_t v_bits[4];
        ldmatrix_x4_trans(v_bits, v_address);
        const float2 v_scale[2] = {load_shared<float2>(factors + kValueScaleOffset),
                                   load_shared<float2>(factors + kValueScaleOffset + 32)};
        const float2 c[2] = {load_shared<float2>(factors + kColumnScaleOffset),
                             load_shared<float2>(factors + kColumnScaleOffset + 32)};
        float v[8];
        unpack(v, v_bits, T{});
        cute::warpgroup_wait<0>();

#pragma unroll
        for (int i = 0; i < 4; ++i) {
          u[2 * i] = fmaf(v[2 * i], v_scale[i / 2].x, w[2 * i]) * c[i / 2].x;
          u[2 * i + 1] = fmaf(v[2 * i + 1], v_scale[i / 2].y, w[2 * i + 1]) * c[i / 2].y;
        }
        pack(packed, u);
        cute::warpgroup_arrive();
        wgmma<Major::K>(u, packed, system);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();

        pack(packed, u);
        cute::warpgroup_arrive();
        wgmma<Major::MN>(state[0], packed, moved(tiles, L::kGateOffset));
        cute::warpgroup_commit_batch();
        wgmma<Major::MN>(state[1], packed, moved(tiles, L::kGateOffset + kTileBytes));
        cute::warpgroup_commit_batch();
        if (left > 1) {
          mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
          float4 d0[4], d1[4];
          load_half_decays(d0, 0);
          if constexpr (kLoadAhead) load_half_decays(d1, 1);
          cute::warpgroup_wait<1>();
          copy_and_decay(state, copy, 0, d0);
          if constexpr (!kLoadAhead) load_half_decays(d1, 1);
          find_operands(false);
          cute::warpgroup_wait<0>();
          copy_and_decay(state, copy, 1, d1);
        } else {
          cute::warpgroup_wait<0>();
        }
        __syncwarp();
        mbarrier_arrive(empty);
      }
    }

    if (reverse && p.d_initial_state) {
      store_state(state, p.d_initial_state + first, p.state_v_first);
    } else {
      // The last border, with no chunk behind it.
#pragma unroll
      for (int i = 0; i < 32; ++i) copy[i] = pack_bf16(state[i / 16][2 * (i % 16)], state[i / 16][2 * (i % 16) + 1]);
      store_image();
    }
    if (L::kScans == 1 && arguments.arrivals && lane == 0) announce();
    mbarrier_wait(barriers.ready(cursor.stage), cursor.parity);
  }
  if (lane == 0) bulk_store_wait();
}

template <typename G, int kScans>
using StateStages = Layout<G, kScans, kImageBytes + (kScans == 1 ? 4 : 0), kScans == 2 ? 144 : 152>;

// With one scan a warp less transforms: it tells of images.
template <typename G, int kScans>
struct StateLayout : StateStages<G, kScans> {
  using Stages = StateStages<G, kScans>;
  static constexpr int kTransformWarps = std::min(Stages::kOtherWarps - (2 - kScans), Stages::kStages);
};

template <typename T, typename G, bool kBounded, int kScans>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_kda_states_kernel(const __grid_constant__ StateArguments arguments) {
  using L = StateLayout<G, kScans>;
  extern __shared__ uint8_t unaligned[];
  const Block<L> block(unaligned, 4 * kScans * 32);
  const int warp = threadIdx.x / 32;
  if constexpr (kScans == 1) {
    if (arguments.arrivals) {
      if (threadIdx.x < 4) store_shared(images_written<L>(block.shared) + threadIdx.x * 4, 0);
      __syncthreads();
    }
  }
  if (warp < 4 * kScans) {
    cutlass::arch::warpgroup_reg_alloc<L::kScanRegisters>();
    scan_states<T, L>(arguments, block.shared, block.barriers);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<L::kTransformRegisters>();
    const int role = warp - 4 * kScans;
    if (role < L::kTransformWarps) {
      Cursor<L::kStages> cursor(role);
      transform<T, L, kBounded, Pass::kStates>(arguments.p, block.shared, block.bias(role), block.barriers, cursor);
    } else if (role == L::kTransformWarps && threadIdx.x % 32 == 0) {
      load_states<L>(arguments, block.shared, block.infos(), block.barriers);
    } else if (kScans == 1 && role == L::kTransformWarps + 1 && arguments.arrivals) {
      announce_images<L>(arguments, block.shared);
    }
  }
}

// ---- host

template <typename T, typename G, bool kBounded, int kScans>
cudaError_t launch_states(const ChunkKdaBwdParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr auto kKernel = chunk_kda_states_kernel<T, G, kBounded, kScans>;
  char* workspace = static_cast<char*>(p.workspace);
  StateArguments arguments;
  arguments.p = p;
  arguments.plan = workspace + plan.workspace.plan;
  arguments.tile_offsets = reinterpret_cast<const int*>(workspace + plan.workspace.tile_offsets);
  arguments.tiles_per_sequence = int(plan.tiles_per_sequence);
  arguments.states = workspace + plan.workspace.states;
  arguments.state_gradients = workspace + plan.workspace.state_gradients;
  arguments.arrivals = nullptr;
  if (plan.order.early_blocks > 0 && p.of_tokens())
    arguments.arrivals = reinterpret_cast<int*>(workspace + plan.workspace.arrivals);
  const bool encoded =
      chunk_kda::encode_tokens<T, G>(arguments, p, kChunk) &&
      chunk_kda::encode_tiles<T>(&arguments.d_o, p.d_o, p.batch, p.tokens, p.value_heads, p.d_o_stride, kChunk);
  if (!encoded) return cudaErrorInvalidValue;
  Launch launch = {dim3(plan.scan_grid), kThreads, StateLayout<G, kScans>::kBytes};
  launch.overlap = p.cu_seqlens;  // with the plan
  if (arguments.arrivals) launch.cluster = plan.scan_cluster;
  if (launch.cluster > 1 && !has_room_for_clusters<kKernel>(launch)) launch.cluster = 1;
  return flashkda::launch<kKernel>(arguments, launch, stream);
}

}  // namespace flashkda::chunk_kda_bwd
