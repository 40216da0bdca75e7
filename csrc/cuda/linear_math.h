// What a thread does with its share of a tile of logits, while they are accumulators in registers. For the host as
// well.
//
// Where a gradient is to follow, exponentials are kept in bf16: E_j = 2^((v_j - r) c), r the reference of row and tile.
// bf16 reaches as far as fp32, so r can be 0, and the same for all of a row, unless the row's largest logit is over 64
// bits (44 nats) from it; E is right to 8 bits however far it is from 1.
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

constexpr float kReach = 64.0f;  // bits; leaves as many above for sums of products, and below for small probabilities

// What exponentials are relative to where m is the largest v.
OMNI_HD float reference_of(float m, float c) { return fabsf(m) * c <= kReach ? 0.0f : m; }

// A thread's share of one of the two rows of an m64n256 product, a few values at a time, for the accumulators leave few
// registers: acc[4 j + 2 half + e] is its logit of column + 8 j + e (e < 2).
struct Share {
  int half, column, vocab;  // columns from vocab on do not exist
  const float* bias;        // [vocab] or null
};
constexpr int kPart = 8, kParts = 64 / kPart;

OMNI_HD constexpr int column_in_share(int part, int k) { return 8 * (part * (kPart / 2) + k / 2) + k % 2; }

// v of one part; -inf where there is no column. Most tiles are whole and most heads have no bias: one look at each.
template <bool CAP>
OMNI_HD void values_of(const Share& share, const float (&acc)[128], int part, float inv_cap, float (&v)[kPart]) {
  const int existing = share.vocab - share.column;
  const bool whole = column_in_share(part, kPart - 1) < existing;
#pragma unroll
  for (int k = 0; k < kPart; ++k) v[k] = acc[4 * (column_in_share(part, k) / 8) + 2 * share.half + k % 2];
  if (share.bias) {
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      const int at = column_in_share(part, k);
      v[k] += share.bias[whole || at < existing ? share.column + at : 0];
    }
  }
  if (CAP) {
#pragma unroll
    for (int k = 0; k < kPart; ++k) v[k] = v_of<CAP>(v[k], inv_cap);
  }
  if (!whole) {
#pragma unroll
    for (int k = 0; k < kPart; ++k)
      if (column_in_share(part, k) >= existing) v[k] = kNegInf;
  }
}

// The largest v of all parts.
template <bool CAP>
OMNI_HD float largest_of(const Share& share, const float (&acc)[128], float inv_cap) {
  float top = kNegInf;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float u[kPart];
    values_of<false>(share, acc, part, inv_cap, u);
#pragma unroll
    for (int k = 0; k < kPart; ++k) top = fmaxf(top, u[k]);  // a NaN is passed over: it shows in the sum
  }
  return CAP && share.column < share.vocab ? v_of<CAP>(top, inv_cap) : top;  // tanh rises
}

// Folds one part. e: its exponentials, relative to row.fold.m. target: a column, or < 0.
template <bool CAP>
OMNI_HD void fold_part(Running& row, const Share& share, const float (&acc)[128], int part, float inv_cap, int target,
                       float c, float (&e)[kPart]) {
  float v[kPart];
  values_of<CAP>(share, acc, part, inv_cap, v);
  fold_in(row.fold, v, c, e);
  const int place = target - share.column;
  if (place >= column_in_share(part, 0) && place <= column_in_share(part, kPart - 1)) {
#pragma unroll
    for (int k = 0; k < kPart; ++k)
      if (place == column_in_share(part, k)) row.v_target = v[k];
  }
}

// What those exponentials are to be multiplied by to be relative to the reference.
OMNI_HD float lift_of(float m, float reference, float c) { return m > kNegInf ? exp2_fast((m - reference) * c) : 0.0f; }

// The four threads of a row, quad = 0..3, each hold a pair of every 8 columns. Neighbours swap a pair of 8 columns j
// for one of j + 1, so that each has four columns side by side, and the four of them 32 bytes.
OMNI_HD std::uint32_t sent_pair(int quad, std::uint32_t of_j, std::uint32_t of_next) {
  return quad % 2 ? of_j : of_next;
}

struct FourColumns {
  std::uint32_t low, high;
};
OMNI_HD FourColumns four_columns(int quad, std::uint32_t of_j, std::uint32_t of_next, std::uint32_t received) {
  return quad % 2 ? FourColumns{received, of_next} : FourColumns{of_j, received};
}
OMNI_HD int four_columns_at(int quad, int j) { return 8 * (j + quad % 2) + 4 * (quad / 2); }

// --- from exponentials to the gradient -----------------------------------------------------------------------------

// How a row of exponentials becomes du. If the loss asks for multiples of p only, its exponentials do already, but for
// the target's: du = factor E, and the factor goes into products with other matrices. Else du itself takes their place.
struct ExpRow {
  RowGradient gradient;
  float reference, factor, hit;  // hit: what the target's exponential becomes
  bool scaled;                   // du = factor E; tiles that have another reference are brought to the row's
  bool idle, clear;              // no gradient: factor is 0. clear: the exponentials are no numbers
};

template <bool CAP>
OMNI_HD ExpRow exp_row(const Running& row, bool ignored, Coefficients k, const Scale& sc) {
  ExpRow out{};
  out.idle = ignored || is_idle(k);
  out.clear = out.idle && row.fold.s != row.fold.s;
  if (out.idle) return out;
  const Fold& f = row.fold;
  out.gradient = gradient_of_fold<CAP>(f, stats_of(f, row.v_target, sc), k, row.v_target, sc);
  out.reference = reference_of(f.m, sc.c);
  const float factor = out.gradient.k0 * exp2_fast((out.reference - f.m) * sc.c), size = fabsf(factor);
  out.scaled = !CAP && k.b == 0.0f && size > 0x1p-100f && size < 0x1p100f;  // far from what bf16 loses
  out.factor = out.scaled ? factor : 1.0f;
  out.hit = out.gradient.hit / out.factor;
  return out;
}

OMNI_HD bool is_finished(const ExpRow& row, float reference) {
  return row.idle ? !row.clear : row.scaled && reference == row.reference;
}

// Eight exponentials of a tile, as du / factor.
template <bool CAP>
OMNI_HD Vector finish(const Vector& in, const ExpRow& row, float reference) {
  if (row.idle) return Vector{};
  const RowGradient& g = row.gradient;
  const float shift = (reference - (row.scaled ? row.reference : g.m)) * g.c, lift = exp2_fast(shift);
  const float per_bit = 1.0f / g.c;
  float e[8];
  unpack(in, e);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float p = e[k] * lift;
    if (row.scaled) {
      e[k] = p;
    } else {
      const float y = max_nan(log2_fast(e[k]) + shift, kTiny), v = fmaf(y, per_bit, g.m);
      e[k] = p * fmaf(-g.k1, y + g.h, g.k0);
      if (CAP) e[k] *= fmaf(-v, v, 1.0f);
    }
  }
  return pack(e);
}

}  // namespace omni::cuda
