// The row kernels, written once over a vector type V (vec_*.h) and compiled once for each instruction set.
// Included after one of the vec_*.h.
//
// Everything lives in an unnamed namespace and nothing from the standard library's templates is used: two translation
// units with different machine flags must not share one inline function, or the linker could hand AVX-512 code to a
// processor without it.
//
// Numerics: fp32, in units of log 2, so that exp is 2^n times a polynomial. y_j = (v_j - v_ref) c, where v_j is u_j, or
// tanh(u_j / cap) under a softcap, v_ref a value near the row's largest, and c = log2(e) inv_T (times the softcap)
// rounded to fp32; the reference is put back in double, once a row. Sums are folded every kBlock columns into doubles,
// so the error does not grow with V. log p_j is z_j - lse, never log(p_j). The second pass over a row computes its
// exponentials again: keeping them costs more in cache traffic than the polynomial does in arithmetic. A row with a NaN
// or +inf logit, or with nothing but -inf, gives NaN log-prob, entropy and gradient, as in torch.
#pragma once
#include <cmath>
#include <cstring>

#include "program.h"
#include "rows.h"

namespace {

using omni::Coefficients;
using omni::DType;
using omni::kBlock;
using omni::kIgnore;
using omni::Rows;

constexpr float kNegInf = -__builtin_inff();
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kTiny = -150.0f;  // 2^kTiny is 0 in fp32
constexpr double kCrowded =
    8.0 * kBlock;  // a block sum that says the reference lies too low: kBlock terms at it make kBlock

// 2^x for kTiny <= x <= 127. NaN stays. By the degree of the polynomial on [-1/2, 1/2], all with 2^0 = 1 exactly:
//   6: within 1.2 ulp.   5: relative error 9e-8, for sums.   4: 4e-6, for results that are rounded to bf16 (2e-3).
template <int DEGREE>
inline V::F vexp2(V::F x) {
  static_assert(DEGREE == 4 || DEGREE == 5 || DEGREE == 6);
  static constexpr float k6[] = {1.0f,           0x1.62e430p-1f,  0x1.ebfbdcp-3f, 0x1.c6aee8p-5f,
                                 0x1.3b2d4ep-7f, 0x1.5f3ec2p-10f, 0x1.41fb74p-13f};
  static constexpr float k5[] = {1.0f, 0x1.62e42ap-1f, 0x1.ebf9bap-3f, 0x1.c6b756p-5f, 0x1.3ceafap-7f, 0x1.5bb99ep-10f};
  static constexpr float k4[] = {1.0f, 0x1.62e12cp-1f, 0x1.ec037cp-3f, 0x1.c9fd18p-5f, 0x1.3a027ap-7f};
  constexpr const float* k = DEGREE == 6 ? k6 : DEGREE == 5 ? k5 : k4;
  const V::F n = V::round(x), f = V::sub(x, n);
  V::F p = V::set(k[DEGREE]);
  for (int i = DEGREE - 1; i >= 0; --i) p = V::fma(p, f, V::set(k[i]));
  return V::scale(p, n);
}

// tanh: an odd polynomial near 0 (no cancellation), 1 - 2 / (exp(2|x|) + 1) elsewhere.
inline V::F vtanh(V::F x) {
  const V::F one = V::set(1.0f), ax = V::min(V::set(20.0f), V::abs(x));
  const V::F e = vexp2<6>(V::mul(ax, V::set(static_cast<float>(2.0 * kLog2E))));
  const V::F big = V::sub(one, V::div(V::set(2.0f), V::add(e, one)));
  const V::F x2 = V::mul(x, x);
  V::F p = V::set(-5.70498872745e-3f);
  p = V::fma(p, x2, V::set(2.06390887954e-2f));
  p = V::fma(p, x2, V::set(-5.37397155531e-2f));
  p = V::fma(p, x2, V::set(1.33314422036e-1f));
  p = V::fma(p, x2, V::set(-3.33332819422e-1f));
  const V::F small = V::fma(V::mul(p, x2), x, x);
  return V::pick_less(V::abs(x), V::set(0.625f), small, V::copysign(big, x));
}

inline float load1(const float* p) { return *p; }
inline float load1(const std::uint16_t* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*p) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void store1(float* p, float v) { *p = v; }
inline void store1(std::uint16_t* p, float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  *p = v != v ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A row's own constants: z = v * span.
struct Scale {
  float inv_t, inv_cap;
  double span;  // inv_t, times the softcap if there is one
  float c;      // span * log2(e)
};

inline Scale scale_of(const Rows& r, std::int64_t i) {
  const float inv_t = r.inv_t_rows ? r.inv_t_rows[i] : r.inv_t;
  const double span = r.softcap > 0.0f ? static_cast<double>(r.softcap) * inv_t : inv_t;
  return {inv_t, r.softcap > 0.0f ? 1.0f / r.softcap : 0.0f, span, static_cast<float>(span * kLog2E)};
}

template <bool CAP>
inline V::F v_of(V::F u, const Scale& s) {
  if constexpr (CAP)
    return vtanh(V::mul(u, V::set(s.inv_cap)));
  else
    return u;
}
// The same arithmetic for one element, so that it agrees with itself inside a row to the last bit.
template <bool CAP>
inline double v_of(float u, const Scale& s) {
  return CAP ? V::largest(v_of<CAP>(V::set(u), s)) : u;
}

template <class T>
inline V::F block_max(const T* u, std::int64_t n) {
  constexpr int W = V::width;
  V::F m0 = V::set(kNegInf), m1 = m0;
  std::int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    m0 = V::max(V::load(u + j), m0);  // a NaN is passed over: the maximum only places the reference
    m1 = V::max(V::load(u + j + W), m1);
  }
  for (; j < n; j += W) m0 = V::max(V::load_part(u + j, n - j < W ? static_cast<int>(n - j) : W, kNegInf), m0);
  return V::max(m0, m1);
}

struct Sums {
  V::F s, t;
};

template <bool CAP, bool ENT>
inline void term(V::F u, V::F c, V::F v_ref, const Scale& sc, Sums& sums, int lanes = V::width) {
  // Subtract, then scale: the largest value gives exactly 1. max gives its second operand for a NaN.
  V::F y = V::max(V::set(kTiny), V::mul(V::sub(v_of<CAP>(u, sc), v_ref), c));
  if (CAP && lanes < V::width) {  // a softcap makes the padding finite: put it back
    float part[V::width];
    V::store(part, y);
    y = V::load_part(part, lanes, kTiny);
  }
  const V::F e = vexp2<5>(y);
  sums.s = V::add(sums.s, e);
  if constexpr (ENT) sums.t = V::fma(e, y, sums.t);
}

struct BlockSums {
  double s, t;  // sum 2^y, sum 2^y y
};

template <class T, bool CAP, bool ENT>
inline BlockSums block_sums(const T* u, std::int64_t n, float v_ref, const Scale& sc) {
  constexpr int W = V::width;
  const V::F c = V::set(sc.c), ref = V::set(v_ref), zero = V::set(0.0f);
  Sums q[4] = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
  std::int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    V::F x[4];
    V::load2(u + j, x[0], x[1]);
    V::load2(u + j + 2 * W, x[2], x[3]);
    for (int k = 0; k < 4; ++k) term<CAP, ENT>(x[k], c, ref, sc, q[k]);
  }
  for (; j < n; j += W) {
    const int lanes = n - j < W ? static_cast<int>(n - j) : W;
    term<CAP, ENT>(V::load_part(u + j, lanes, kNegInf), c, ref, sc, q[0], lanes);
  }
  return {V::sum(V::add(V::add(q[0].s, q[1].s), V::add(q[2].s, q[3].s))),
          ENT ? V::sum(V::add(V::add(q[0].t, q[1].t), V::add(q[2].t, q[3].t))) : 0.0};
}

// lse is kept in double, for p = exp(z - lse) would inherit the rounding of a large lse.
struct Stats {
  float logp, entropy;
  double lse;
};

template <class T, bool CAP, bool ENT>
inline Stats row_stats(const T* u, std::int64_t vocab, std::int64_t target, const Scale& sc) {
  double s = 0.0, t = 0.0;
  float v_ref = kNegInf;
  for (std::int64_t j = 0; j < vocab; j += kBlock) {
    const std::int64_t n = vocab - j < kBlock ? vocab - j : kBlock;
    // The reference is the largest value of some block. A block that towers above it shows in its sum (finite or not)
    // and is done again from its own, so no pass is spent on the maximum. v grows with u.
    for (bool again = v_ref == kNegInf;; again = true) {
      if (again) {
        const float v = static_cast<float>(v_of<CAP>(V::largest(block_max(u + j, n)), sc));
        if (v > v_ref) {
          if (v_ref > kNegInf) {
            const double d = (static_cast<double>(v_ref) - v) * sc.c, scale = ::exp2(d);
            t = scale * (t + d * s);
            s *= scale;
          }
          v_ref = v;
        }
      }
      const BlockSums block = block_sums<T, CAP, ENT>(u + j, n, v_ref > kNegInf ? v_ref : 0.0f, sc);
      if (again || !(block.s > kCrowded)) {
        s += block.s;
        t += block.t;
        break;
      }
    }
  }
  const double log_s = ::log(s), logp = (v_of<CAP>(load1(u + target), sc) - v_ref) * sc.span - log_s;
  const double entropy = ENT ? log_s - kLn2 * (t / s) : 0.0;
  Stats out;
  out.lse = v_ref * sc.span + log_s;
  out.logp = logp > 0.0 ? 0.0f : static_cast<float>(logp);  // rounding alone can cross 0; NaN stays
  out.entropy = entropy < 0.0 ? 0.0f : static_cast<float>(entropy);
  return out;
}

// Writes du over a row.
template <class T, bool CAP, bool ENT>
inline void row_gradient(T* u, std::int64_t vocab, std::int64_t target, const Scale& sc, const Stats& st,
                         Coefficients k) {
  constexpr int W = V::width;
  const float u_target = load1(u + target), lse = static_cast<float>(st.lse), base = -k.a + 2.0f * k.z * lse;
  // lse in bits, as the rounded c sees it; what does not fit in fp32 goes into the factors.
  const double bits = st.lse * (sc.c / sc.span);
  const float high = static_cast<float>(bits);
  const double low = std::isfinite(high) ? bits - high : 0.0, inv_t = sc.inv_t * ::exp2(-low);
  const V::F c = V::set(sc.c), r = V::set(high), k0 = V::set(static_cast<float>(base * inv_t));
  const V::F k1 = V::set(static_cast<float>(k.b * inv_t * kLn2)),
             h = V::set(static_cast<float>(st.entropy * kLog2E - low));
  const auto du = [&](V::F uj) {
    const V::F v = v_of<CAP>(uj, sc), y = V::max(V::set(kTiny), V::fmsub(v, c, r)),
               p = vexp2<sizeof(T) == 2 ? 4 : 6>(y);
    V::F g = V::mul(p, ENT ? V::fnma(k1, V::add(y, h), k0) : k0);
    if constexpr (CAP) g = V::mul(g, V::fnma(v, v, V::set(1.0f)));
    return g;
  };
  std::int64_t j = 0;
  for (; j + 4 * W <= vocab; j += 4 * W) {
    V::F x[4];
    V::load2(u + j, x[0], x[1]);
    V::load2(u + j + 2 * W, x[2], x[3]);
    for (V::F& each : x) each = du(each);
    V::store2(u + j, x[0], x[1]);
    V::store2(u + j + 2 * W, x[2], x[3]);
  }
  for (; j < vocab; j += W) {
    const int lanes = vocab - j < W ? static_cast<int>(vocab - j) : W;
    V::store_part(u + j, lanes, du(V::load_part(u + j, lanes, kNegInf)));
  }
  const float p = ::expf(st.logp);
  float g = -k.a * ::expm1f(st.logp) + 2.0f * k.z * lse * p;  // expm1: no cancellation where p is near 1
  if (ENT && p > 0.0f) g -= k.b * p * (st.logp + st.entropy);
  g *= sc.inv_t;
  if (CAP) {
    const float v = static_cast<float>(v_of<CAP>(u_target, sc));
    g *= 1.0f - v * v;
  }
  store1(u + target, g);
}

template <class T>
inline T* row_of(const Rows& r, std::int64_t i) {
  return static_cast<T*>(r.logits) + i * r.row_stride;
}

template <class T, bool CAP, bool ENT>
void forward_rows(const Rows& r, std::int64_t begin, std::int64_t end) {
  const V::FlushDenormals guard;
  for (std::int64_t i = begin; i < end; ++i) {
    Stats st{0.0f, 0.0f, 0.0};
    if (r.targets[i] != kIgnore) st = row_stats<T, CAP, ENT>(row_of<T>(r, i), r.vocab, r.targets[i], scale_of(r, i));
    r.logp[i] = st.logp;
    r.lse[i] = static_cast<float>(st.lse);
    if (ENT) r.entropy[i] = st.entropy;
  }
}

// The given lse, or, where its rounding would show in p, the row's own to more digits. A vocabulary shard comes with
// the lse of the whole vocabulary: that one differs from the shard's by more than its rounding and is taken as it is.
template <class T, bool CAP>
inline double lse_of(const T* u, std::int64_t vocab, std::int64_t target, const Scale& sc, float given) {
  if (!(std::fabs(given) > 16.0f)) return given;
  const double own = row_stats<T, CAP, false>(u, vocab, target, sc).lse;
  return std::fabs(own - given) <= std::fabs(given) * 1.2e-7f ? own : given;
}

template <class T, bool CAP, bool ENT>
void backward_rows(const Rows& r, std::int64_t begin, std::int64_t end) {
  const V::FlushDenormals guard;
  for (std::int64_t i = begin; i < end; ++i) {
    T* u = row_of<T>(r, i);
    const Coefficients c{r.a[i], ENT ? r.b[i] : 0.0f, r.z_loss_rows ? r.z_loss_rows[i] : r.z_loss};
    const std::int64_t y = r.targets[i];
    if (y == kIgnore || (c.a == 0.0f && c.b == 0.0f && c.z == 0.0f)) {
      std::memset(u, 0, static_cast<std::size_t>(r.vocab) * sizeof(T));
      continue;
    }
    const Scale sc = scale_of(r, i);
    const double lse = lse_of<T, CAP>(u, r.vocab, y, sc, r.lse[i]);
    const double logp = v_of<CAP>(load1(u + y), sc) * sc.span - lse;
    const Stats st{static_cast<float>(logp), ENT ? r.entropy[i] : 0.0f, lse};
    row_gradient<T, CAP, ENT>(u, r.vocab, y, sc, st, c);
  }
}

// Statistics, coefficients and gradient of a row while it is in cache.
template <class T, bool CAP, bool ENT, bool WANT>
void fused_rows(const Rows& r, std::int64_t begin, std::int64_t end) {
  const V::FlushDenormals guard;
  for (std::int64_t i = begin; i < end; ++i) {
    T* u = row_of<T>(r, i);
    const std::int64_t y = r.targets[i];
    Stats st{0.0f, 0.0f, 0.0};
    Coefficients c{0.0f, 0.0f, 0.0f};
    Scale sc{};
    if (y != kIgnore) {
      sc = scale_of(r, i);
      st = row_stats<T, CAP, WANT>(u, r.vocab, y, sc);
      c = omni::run_program(*r.program, i, st.logp, st.entropy, static_cast<float>(st.lse));
    }
    r.logp[i] = st.logp;
    r.lse[i] = static_cast<float>(st.lse);
    if (WANT) r.entropy[i] = st.entropy;
    if (c.a == 0.0f && c.b == 0.0f && c.z == 0.0f)
      std::memset(u, 0, static_cast<std::size_t>(r.vocab) * sizeof(T));
    else
      row_gradient<T, CAP, ENT>(u, r.vocab, y, sc, st, c);
  }
}

template <class T>
void forward_t(const Rows& r, std::int64_t b, std::int64_t e) {
  if (r.softcap > 0.0f)
    return r.want_entropy ? forward_rows<T, true, true>(r, b, e) : forward_rows<T, true, false>(r, b, e);
  return r.want_entropy ? forward_rows<T, false, true>(r, b, e) : forward_rows<T, false, false>(r, b, e);
}
template <class T>
void backward_t(const Rows& r, std::int64_t b, std::int64_t e) {
  if (r.softcap > 0.0f) return r.b ? backward_rows<T, true, true>(r, b, e) : backward_rows<T, true, false>(r, b, e);
  return r.b ? backward_rows<T, false, true>(r, b, e) : backward_rows<T, false, false>(r, b, e);
}
template <class T, bool CAP>
void fused_c(const Rows& r, std::int64_t b, std::int64_t e) {
  if (r.program->b >= 0) return fused_rows<T, CAP, true, true>(r, b, e);
  return r.want_entropy ? fused_rows<T, CAP, false, true>(r, b, e) : fused_rows<T, CAP, false, false>(r, b, e);
}

void forward(const Rows& r, std::int64_t b, std::int64_t e) {
  return r.dtype == DType::kFloat32 ? forward_t<float>(r, b, e) : forward_t<std::uint16_t>(r, b, e);
}
void backward(const Rows& r, std::int64_t b, std::int64_t e) {
  return r.dtype == DType::kFloat32 ? backward_t<float>(r, b, e) : backward_t<std::uint16_t>(r, b, e);
}
void fused(const Rows& r, std::int64_t b, std::int64_t e) {
  if (r.dtype == DType::kFloat32)
    return r.softcap > 0.0f ? fused_c<float, true>(r, b, e) : fused_c<float, false>(r, b, e);
  return r.softcap > 0.0f ? fused_c<std::uint16_t, true>(r, b, e) : fused_c<std::uint16_t, false>(r, b, e);
}
void exp2_array(const float* x, float* y, std::int64_t n) {
  for (std::int64_t j = 0; j < n; j += V::width) {
    const int r = n - j < V::width ? static_cast<int>(n - j) : V::width;
    V::store_part(y + j, r, vexp2<6>(V::max(V::set(kTiny), V::load_part(x + j, r, 0.0f))));
  }
}

}  // namespace
