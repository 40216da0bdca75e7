// Tiles of the fused linear log-prob: pure arithmetic, shared by kernel, launch and tests.
//
// The logits are computed in tiles of 128 rows by 256 columns. A piece of work is one row tile against a run of column
// tiles, a split; how the vocabulary is split depends on its size alone, so a row's result does not depend on how many
// rows there are. Pieces are ordered so that the blocks at work at one time share few row tiles (which then stay in L2)
// and few splits.
#pragma once
#include <cstdint>

#include "plan.h"

namespace omni::cuda {

constexpr int kTileRows = 128, kTileColumns = 256, kTileDepth = 64, kStages = 4;
constexpr int kMmaThreads = 384;  // a warpgroup that fetches, and two that multiply 64 rows each
constexpr int kMaxSplits = 66;    // half the multiprocessors of an H100 or H200
constexpr int kRowTilesTogether = 16;
constexpr int kStageBytes = (kTileRows + kTileColumns) * kTileDepth * 2;
constexpr int kTileAlignment = 1024;  // of the 128-byte swizzle's pattern
constexpr int kLinearSharedBytes = kStages * kStageBytes + 2 * kStages * 8 + kTileAlignment;
static_assert(kLinearSharedBytes <= kSharedPerBlock, "a block's shared memory");

struct LinearPlan {
  int row_tiles, column_tiles, splits;
};

OMNI_HD LinearPlan plan_linear(std::int64_t rows, std::int64_t vocab) {
  const int columns = static_cast<int>((vocab + kTileColumns - 1) / kTileColumns);
  return {static_cast<int>((rows + kTileRows - 1) / kTileRows), columns, columns < kMaxSplits ? columns : kMaxSplits};
}

struct Piece {
  int row_tile, split, first, last;  // column tiles [first, last)
};

OMNI_HD Piece piece_of(const LinearPlan& plan, int index) {
  const int together = kRowTilesTogether * plan.splits, start = index / together * kRowTilesTogether;
  const int left = plan.row_tiles - start, height = left < kRowTilesTogether ? left : kRowTilesTogether;
  const int within = index % together, split = within / height;
  return {start + within % height, split, plan.column_tiles * split / plan.splits,
          plan.column_tiles * (split + 1) / plan.splits};
}

// Columns from one row of exponentials to the next: whole tiles. Those from vocab on are 0.
OMNI_HD std::int64_t exp_pitch(std::int64_t vocab) { return (vocab + kTileColumns - 1) / kTileColumns * kTileColumns; }

// Where the boxes of both operands begin that a step along the depth needs.
struct Boxes {
  int depth, hidden_row, weight_row;
};

OMNI_HD Boxes boxes_of(const Piece& piece, int tile, int step) {
  return {step * kTileDepth, piece.row_tile * kTileRows, tile * kTileColumns};
}

}  // namespace omni::cuda
