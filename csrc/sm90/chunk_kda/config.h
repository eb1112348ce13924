// What the passes over chunks share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashkda::chunk_kda {

constexpr int kHeadDim = 128;
constexpr int kChunk = 16;  // tokens

// What plan.cuh leaves of a packed call: the ticket counter, the cleaned cu_seqlens, and the sequences, longest first.
struct PlanLayout {
  size_t ticket = 0;
  size_t offsets = 0;
  size_t order = 0;
  size_t bytes = 0;
};

constexpr PlanLayout plan_layout(int sequences) {
  PlanLayout layout;
  layout.offsets = 16;
  layout.order = layout.offsets + sizeof(int32_t) * (size_t(sequences) + 1);
  layout.bytes = layout.order + sizeof(int32_t) * size_t(sequences);
  return layout;
}

}  // namespace flashkda::chunk_kda
