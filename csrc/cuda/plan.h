// How a row is spread over a cluster: pure arithmetic, shared by the kernels, their launches and the tests.
//
// A row of logits is seen as 16-byte vectors of its memory, the first of which starts at or up to 15 bytes before the
// row. Each block of a cluster holds the same number of them (the last one perhaps fewer) in shared memory, and each of
// its warps a contiguous part. The split depends on the vocabulary alone, never on how many rows there are.
#pragma once
#include <cstdint>

#include "../cpu/program.h"

namespace omni::cuda {

constexpr int kVectorBytes = 16;
constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;
constexpr int kRowBlocksPerSm = 3;  // while one waits for its row or for its cluster, the others compute
constexpr int kMaxCluster = 8;      // the most that every GPU of the architecture grants
// Compute capability 9.0: bytes of shared memory of a multiprocessor, those kept back per block, those a block may use.
constexpr int kSharedPerSm = 228 * 1024, kSharedReserved = 1024, kSharedPerBlock = 227 * 1024;
constexpr int kBoardBytes = 808;  // what a block keeps beside its slice: rows.cu's Board

struct Span {
  int first, count;  // of the row's vectors
};

struct RowPlan {
  int cluster;        // blocks a row, 0: the row does not fit on chip
  int slice_vectors;  // most vectors a block
  int shared_bytes;   // dynamic shared memory of a block
};

// The smallest cluster whose blocks fit kRowBlocksPerSm to a multiprocessor, or the largest one if they fit at all.
OMNI_HD RowPlan plan_rows(std::int64_t vocab, int element_bytes) {
  const std::int64_t bytes = vocab * element_bytes + kVectorBytes - element_bytes;  // of the row, starting anywhere
  const std::int64_t vectors = (bytes + kVectorBytes - 1) / kVectorBytes;
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const std::int64_t slice = (vectors + cluster - 1) / cluster, shared = slice * kVectorBytes + kBoardBytes;
    const bool shares = (shared + kSharedReserved) * kRowBlocksPerSm <= kSharedPerSm;
    if (shares || (cluster == kMaxCluster && shared <= kSharedPerBlock))
      return {cluster, static_cast<int>(slice), static_cast<int>(shared)};
  }
  return {0, 0, 0};
}

// A row's place in its vectors: `lead` elements of the first one come before the row.
struct Extent {
  int lead, vocab;
};

OMNI_HD int vectors_of(Extent x, int per_vector) { return (x.lead + x.vocab + per_vector - 1) / per_vector; }

OMNI_HD Span block_span(int vectors, int slice_vectors, int rank) {
  const int first = rank * slice_vectors, rest = vectors - first;
  return {first, rest < 0 ? 0 : rest < slice_vectors ? rest : slice_vectors};
}

// A warp's place in the slice is the same for all rows: it may fetch its part of the next row while others still read
// theirs of this one.
OMNI_HD Span warp_span(Span block, int slice_vectors, int warp) {
  const int begin = slice_vectors * warp / kRowWarps, end = slice_vectors * (warp + 1) / kRowWarps;
  const int last = end < block.count ? end : block.count;
  return {block.first + begin, last > begin ? last - begin : 0};
}

}  // namespace omni::cuda
