// What a thread does with its share of a tile of logits, while they are accumulators in registers. For the host as
// well.
#pragma once
#include "linear_plan.h"
#include "row_math.h"

namespace omni::cuda {

// Running statistics of a row over the columns that a thread sees; v_target is -inf until the target comes by.
struct Running {
  Fold fold;
  float v_target;
};

OMNI_HD Running nothing_yet() { return {nothing(), kNegInf}; }

OMNI_HD Running merge(const Running& a, const Running& b, float c) {
  return {merge(a.fold, b.fold, c), fmaxf(a.v_target, b.v_target)};
}

// Takes one of the two rows of an m64n256 product in: acc[4 j + 2 half + e] is its logit of column + 8 j + e (e < 2).
// bias: [vocab] or null. target: its column, or < 0. Columns from vocab on do not exist.
template <bool CAP>
OMNI_HD void fold_tile(Running& row, const float (&acc)[128], int half, int column, int vocab, const float* bias,
                       float inv_cap, int target, float c) {
  constexpr int kPart = 8;  // values at a time: few, for the accumulators leave few registers
  const int existing = vocab - column, place = target - column;
#pragma unroll
  for (int part = 0; part < 64 / kPart; ++part) {
    float v[kPart];
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      const int j = part * (kPart / 2) + k / 2, at = 8 * j + k % 2;
      v[k] = acc[4 * j + 2 * half + k % 2];
      if (bias && at < existing) v[k] += bias[column + at];
      v[k] = v_of<CAP>(v[k], inv_cap);
      if (at >= existing) v[k] = kNegInf;
    }
    fold_in(row.fold, v, c);
    if (place >= part * 4 * kPart && place < (part + 1) * 4 * kPart) {
#pragma unroll
      for (int k = 0; k < kPart; ++k)
        if (place == 8 * (part * (kPart / 2) + k / 2) + k % 2) row.v_target = v[k];
    }
  }
}

}  // namespace omni::cuda
