// What every pass over chunks is cut into.
#pragma once

namespace flashkda::chunk_kda {

constexpr int kHeadDim = 128;
constexpr int kChunk = 16;  // tokens

}  // namespace flashkda::chunk_kda
