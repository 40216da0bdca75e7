// The row kernels, written once over a vector type V (vec_*.h) and compiled once for each instruction set.
// Included after one of the vec_*.h.
//
// Everything lives in an unnamed namespace and nothing from the standard library's templates is used: two translation
// units with different machine flags must not share one inline function, or the linker could hand AVX-512 code to a
// processor without it.
//
// Numerics: fp32 throughout; sums are folded every kBlock columns into doubles, so the error does not grow with V.
// exp is taken relative to the running maximum at the time of the block; the block's own offset is kept, so no column is
// touched twice for the sake of the maximum. log p_j is z_j - lse, never log(p_j). A row with a NaN or +inf logit, or with
// nothing but -inf, gives NaN in every output, as torch does.
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
constexpr float kRise = 8.0f;   // nats: e stays below 3000, and the entropy loses no digits to the reference
constexpr int kAhead = 4096;    // bytes: hardware prefetchers stop at pages

// exp for x <= 88: degree 6 on [-ln2/2, ln2/2], relative error 2e-9 before rounding. Arguments below -104 give 0.
inline V::F vexp(V::F x) {
  x = V::max(V::set(-104.0f), x);  // NaN stays: max returns its second operand
  const V::F n = V::round(V::mul(x, V::set(1.44269504f)));
  V::F r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  V::F p = V::set(0x1.6ae6dep-10f);
  p = V::fma(p, r, V::set(0x1.1267d8p-7f));
  p = V::fma(p, r, V::set(0x1.555824p-5f));
  p = V::fma(p, r, V::set(0x1.555418p-3f));
  p = V::fma(p, r, V::set(0x1.fffffcp-2f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return V::scale(p, n);
}

// tanh: an odd polynomial near 0 (no cancellation), 1 - 2 / (exp(2|x|) + 1) elsewhere.
inline V::F vtanh(V::F x) {
  const V::F one = V::set(1.0f), ax = V::min(V::set(20.0f), V::abs(x));
  const V::F big = V::sub(one, V::div(V::set(2.0f), V::add(vexp(V::add(ax, ax)), one)));
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

// A row's own constants.
struct Scale {
  float inv_t, cap, inv_cap, cap_t;  // cap_t = cap * inv_t
};

template <bool CAP>
inline V::F z_of(V::F u, const Scale& s) {
  if constexpr (CAP) return V::mul(vtanh(V::mul(u, V::set(s.inv_cap))), V::set(s.cap_t));
  else return V::mul(u, V::set(s.inv_t));
}
template <bool CAP>
inline float z_of(float u, const Scale& s) {
  return CAP ? ::tanhf(u * s.inv_cap) * s.cap_t : u * s.inv_t;
}
template <bool CAP>
inline double z_exact(float u, const Scale& s) {
  return CAP ? ::tanh(static_cast<double>(u) / s.cap) * s.cap * s.inv_t : static_cast<double>(u) * s.inv_t;
}
// z - m in one rounding where there is no softcap.
template <bool CAP>
inline V::F z_minus(V::F u, V::F m, const Scale& s) {
  if constexpr (CAP) return V::sub(z_of<true>(u, s), m);
  else return V::fmsub(u, V::set(s.inv_t), m);
}

template <class T>
inline V::F block_max(const T* u, std::int64_t n) {
  constexpr int W = V::width;
  V::F m0 = V::set(kNegInf), m1 = m0, m2 = m0, m3 = m0;
  std::int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    m0 = V::max(m0, V::load(u + j));
    m1 = V::max(m1, V::load(u + j + W));
    m2 = V::max(m2, V::load(u + j + 2 * W));
    m3 = V::max(m3, V::load(u + j + 3 * W));
  }
  for (; j + W <= n; j += W) m0 = V::max(m0, V::load(u + j));
  if (j < n) m1 = V::max(m1, V::load_part(u + j, static_cast<int>(n - j), kNegInf));
  return V::max(V::max(m0, m1), V::max(m2, m3));
}

struct Sums {
  V::F s, t, top;
};

template <bool CAP, bool ENT>
inline V::F term(V::F u, V::F m, const Scale& sc, Sums& sums, int lanes = V::width) {
  V::F x = z_minus<CAP>(u, m, sc);
  sums.top = V::max(u, sums.top);  // a NaN is passed over: the maximum only places the exponent
  if (CAP && lanes < V::width) {  // a softcap makes the padding finite: put it back to -inf
    float part[V::width];
    V::store(part, x);
    x = V::load_part(part, lanes, kNegInf);
  }
  const V::F e = vexp(x);
  sums.s = V::add(sums.s, e);
  if constexpr (ENT) sums.t = V::fma(e, V::max(V::set(-200.0f), x), sums.t);  // exp(-200) is 0: -inf gives 0, not NaN
  return e;
}

// sum e, sum e (z - m) and the largest u of a block; e is kept where KEEP.
template <class T, bool CAP, bool ENT, bool KEEP>
inline void block_sums(const T* u, std::int64_t n, float m_scalar, const Scale& sc, float* keep, double* s, double* t,
                       float* top) {
  constexpr int W = V::width;
  const V::F m = V::set(m_scalar), zero = V::set(0.0f), low = V::set(kNegInf);
  Sums q[4] = {{zero, zero, low}, {zero, zero, low}, {zero, zero, low}, {zero, zero, low}};
  std::int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    V::prefetch(u + j, kAhead);
    for (int k = 0; k < 4; ++k) {
      const V::F e = term<CAP, ENT>(V::load(u + j + k * W), m, sc, q[k]);
      if constexpr (KEEP) V::store(keep + j + k * W, e);
    }
  }
  for (; j + W <= n; j += W) {
    const V::F e = term<CAP, ENT>(V::load(u + j), m, sc, q[0]);
    if constexpr (KEEP) V::store(keep + j, e);
  }
  if (j < n) {
    const int r = static_cast<int>(n - j);
    const V::F e = term<CAP, ENT>(V::load_part(u + j, r, kNegInf), m, sc, q[1], r);
    if constexpr (KEEP) V::store_part(keep + j, r, e);
  }
  *s = V::sum(V::add(V::add(q[0].s, q[1].s), V::add(q[2].s, q[3].s)));
  if constexpr (ENT) *t = V::sum(V::add(V::add(q[0].t, q[1].t), V::add(q[2].t, q[3].t)));
  *top = V::largest(V::max(V::max(q[0].top, q[1].top), V::max(q[2].top, q[3].top)));
}

// lse is kept in double, for p = exp(z - lse) would inherit the rounding of a large lse.
struct Stats {
  float logp, entropy;
  double lse;
};

// One pass over a row. Where KEEP, e_j = exp(z_j - offset[j / kBlock]) is left in keep.
template <class T, bool CAP, bool ENT, bool KEEP>
inline Stats row_stats(const T* u, std::int64_t vocab, std::int64_t target, const Scale& sc, float* keep, float* offset) {
  const double z_target = z_exact<CAP>(load1(u + target), sc);
  float m = kNegInf;
  double s = 0.0, t = 0.0;
  for (std::int64_t j = 0, k = 0; j < vocab; j += kBlock, ++k) {
    const std::int64_t n = vocab - j < kBlock ? vocab - j : kBlock;
    double bs = 0.0, bt = 0.0;
    float top = kNegInf;
    // e is taken relative to a reference m, the maximum of some block; a block that rises above it by more than kRise is done
    // again from its own maximum (z grows with u, so the largest u has the largest z).
    for (bool again = m == kNegInf;; again = true) {
      if (again) {
        const float m_new = z_of<CAP>(V::largest(block_max(u + j, n)), sc);
        if (m_new > m) {
          if (m > kNegInf) {
            const double d = static_cast<double>(m) - m_new, c = ::exp(d);
            t = c * (t + d * s);
            s *= c;
          }
          m = m_new;
        }
      }
      block_sums<T, CAP, ENT, KEEP>(u + j, n, m > kNegInf ? m : 0.0f, sc, KEEP ? keep + j : nullptr, &bs, &bt, &top);
      if (again || !(z_of<CAP>(top, sc) > m + kRise)) break;
    }
    const float m_safe = m > kNegInf ? m : 0.0f;  // all -inf so far: every e is 0
    s += bs;
    t += bt;
    if constexpr (KEEP) offset[k] = m_safe;
  }
  const double log_s = ::log(s);
  Stats out;
  out.lse = m + log_s;
  const double logp = z_target - m - log_s, entropy = ENT ? log_s - t / s : 0.0;
  out.logp = logp > 0.0 ? 0.0f : static_cast<float>(logp);  // rounding alone can cross 0; NaN stays
  out.entropy = entropy < 0.0 ? 0.0f : static_cast<float>(entropy);
  return out;
}

// Writes du over a row. Where KEPT, keep and offset are those of row_stats; `u` is still intact unless keep == u.
template <class T, bool CAP, bool ENT, bool KEPT>
inline void row_gradient(T* u, std::int64_t vocab, std::int64_t target, const Scale& sc, const Stats& st, Coefficients c,
                         float u_target, const float* keep, const float* offset, std::int64_t next) {
  constexpr int W = V::width;
  const float lse_hi = static_cast<float>(st.lse), lse_lo = static_cast<float>(st.lse - lse_hi);
  const float base = -c.a + 2.0f * c.z * lse_hi;
  const V::F k0 = V::set(base), b = V::set(c.b), h = V::set(st.entropy), inv_t = V::set(sc.inv_t);
  const V::F hi = V::set(lse_hi), lo = V::set(std::isfinite(lse_lo) ? lse_lo : 0.0f);
  for (std::int64_t j0 = 0, k = 0; j0 < vocab; j0 += kBlock, ++k) {
    const std::int64_t end = vocab - j0 < kBlock ? vocab : j0 + kBlock;
    const float weight = KEPT ? static_cast<float>(::exp(offset[k] - st.lse)) : 1.0f;
    const V::F w = V::set(weight), plain = V::set(weight * base * sc.inv_t);
    const auto du = [&](V::F uj, V::F ej) {
      if constexpr (KEPT && !ENT && !CAP) {
        return V::mul(ej, plain);
      } else {
        const V::F logp = V::sub(z_minus<CAP>(uj, hi, sc), lo);
        const V::F p = KEPT ? V::mul(ej, w) : vexp(logp);
        V::F g = k0;
        if constexpr (ENT) g = V::fnma(b, V::add(V::max(V::set(-200.0f), logp), h), g);
        g = V::mul(V::mul(g, p), inv_t);
        if constexpr (CAP) {
          const V::F th = vtanh(V::mul(uj, V::set(sc.inv_cap)));
          g = V::mul(g, V::fnma(th, th, V::set(1.0f)));
        }
        return g;
      }
    };
    std::int64_t j = j0;
    for (; j + 2 * W <= end; j += 2 * W) {
      if (next) V::prefetch(u + j, next);
      const V::F g0 = du(V::load(u + j), KEPT ? V::load(keep + j) : k0);
      const V::F g1 = du(V::load(u + j + W), KEPT ? V::load(keep + j + W) : k0);
      V::store2(u + j, g0, g1);
    }
    for (; j < end; j += W) {
      const int r = end - j < W ? static_cast<int>(end - j) : W;
      const V::F g = du(V::load_part(u + j, r, kNegInf), KEPT ? V::load_part(keep + j, r, 0.0f) : k0);
      V::store_part(u + j, r, g);
    }
  }
  const float p = ::expf(st.logp);
  float g = -c.a * ::expm1f(st.logp) + 2.0f * c.z * lse_hi * p;  // expm1: no cancellation where p is near 1
  if (ENT && p > 0.0f) g -= c.b * p * (st.logp + st.entropy);
  g *= sc.inv_t;
  if (CAP) {
    const float th = ::tanhf(u_target * sc.inv_cap);
    g *= 1.0f - th * th;
  }
  store1(u + target, g);
}

inline Scale scale_of(const Rows& r, std::int64_t i) {
  const float inv_t = r.inv_t_rows ? r.inv_t_rows[i] : r.inv_t;
  return {inv_t, r.softcap, r.softcap > 0.0f ? 1.0f / r.softcap : 0.0f, r.softcap * inv_t};
}

template <class T>
inline T* row_of(const Rows& r, std::int64_t i) {
  return static_cast<T*>(r.logits) + i * r.row_stride;
}

// Bytes from row i to the next row of the range, to fetch it while this one is in arithmetic; 0 at the end.
template <class T>
inline std::int64_t next_row(const Rows& r, std::int64_t i, std::int64_t end) {
  return i + 1 < end ? r.row_stride * static_cast<std::int64_t>(sizeof(T)) : 0;
}

template <class T, bool CAP, bool ENT>
void forward_rows(const Rows& r, std::int64_t begin, std::int64_t end) {
  const V::FlushDenormals guard;
  for (std::int64_t i = begin; i < end; ++i) {
    Stats st{0.0f, 0.0f, 0.0};
    if (r.targets[i] != kIgnore)
      st = row_stats<T, CAP, ENT, false>(row_of<T>(r, i), r.vocab, r.targets[i], scale_of(r, i), nullptr, nullptr);
    r.logp[i] = st.logp;
    r.lse[i] = static_cast<float>(st.lse);
    if (ENT) r.entropy[i] = st.entropy;
  }
}

// The given lse, or, where its rounding would show in p, the row's own to more digits. A vocabulary shard comes with the lse
// of the whole vocabulary: that one differs from the shard's by more than its rounding and is taken as it is.
template <class T, bool CAP>
inline double lse_of(const T* u, std::int64_t vocab, std::int64_t target, const Scale& sc, float given) {
  if (!(std::fabs(given) > 16.0f)) return given;
  const double own = row_stats<T, CAP, false, false>(u, vocab, target, sc, nullptr, nullptr).lse;
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
    const float u_target = load1(u + y);
    const double lse = lse_of<T, CAP>(u, r.vocab, y, sc, r.lse[i]);
    const Stats st{static_cast<float>(z_exact<CAP>(u_target, sc) - lse), ENT ? r.entropy[i] : 0.0f, lse};
    row_gradient<T, CAP, ENT, false>(u, r.vocab, y, sc, st, c, u_target, nullptr, nullptr, next_row<T>(r, i, end));
  }
}

// Statistics, coefficients and gradient of a row while it is in cache; the next row is fetched under the gradient.
template <class T, bool CAP, bool ENT, bool WANT>
void fused_rows(const Rows& r, std::int64_t begin, std::int64_t end, float* scratch) {
  const V::FlushDenormals guard;
  float* offset = scratch + r.vocab + 64;
  for (std::int64_t i = begin; i < end; ++i) {
    T* u = row_of<T>(r, i);
    const std::int64_t y = r.targets[i];
    Stats st{0.0f, 0.0f, 0.0};
    Coefficients c{0.0f, 0.0f, 0.0f};
    Scale sc{};
    float u_target = 0.0f;
    if (y != kIgnore) {
      sc = scale_of(r, i);
      u_target = load1(u + y);
      st = row_stats<T, CAP, WANT, true>(u, r.vocab, y, sc, scratch, offset);
      c = omni::run_program(*r.program, i, st.logp, st.entropy, static_cast<float>(st.lse));
    }
    r.logp[i] = st.logp;
    r.lse[i] = static_cast<float>(st.lse);
    if (WANT) r.entropy[i] = st.entropy;
    if (c.a == 0.0f && c.b == 0.0f && c.z == 0.0f)
      std::memset(u, 0, static_cast<std::size_t>(r.vocab) * sizeof(T));
    else
      row_gradient<T, CAP, ENT, true>(u, r.vocab, y, sc, st, c, u_target, scratch, offset, next_row<T>(r, i, end));
  }
}

template <class T>
void forward_t(const Rows& r, std::int64_t b, std::int64_t e) {
  if (r.softcap > 0.0f) return r.want_entropy ? forward_rows<T, true, true>(r, b, e) : forward_rows<T, true, false>(r, b, e);
  return r.want_entropy ? forward_rows<T, false, true>(r, b, e) : forward_rows<T, false, false>(r, b, e);
}
template <class T>
void backward_t(const Rows& r, std::int64_t b, std::int64_t e) {
  if (r.softcap > 0.0f) return r.b ? backward_rows<T, true, true>(r, b, e) : backward_rows<T, true, false>(r, b, e);
  return r.b ? backward_rows<T, false, true>(r, b, e) : backward_rows<T, false, false>(r, b, e);
}
template <class T, bool CAP>
void fused_c(const Rows& r, std::int64_t b, std::int64_t e, float* scratch) {
  if (r.program->b >= 0) return fused_rows<T, CAP, true, true>(r, b, e, scratch);
  return r.want_entropy ? fused_rows<T, CAP, false, true>(r, b, e, scratch) : fused_rows<T, CAP, false, false>(r, b, e, scratch);
}

void forward(const Rows& r, std::int64_t b, std::int64_t e) {
  return r.dtype == DType::kFloat32 ? forward_t<float>(r, b, e) : forward_t<std::uint16_t>(r, b, e);
}
void backward(const Rows& r, std::int64_t b, std::int64_t e) {
  return r.dtype == DType::kFloat32 ? backward_t<float>(r, b, e) : backward_t<std::uint16_t>(r, b, e);
}
void fused(const Rows& r, std::int64_t b, std::int64_t e, float* scratch) {
  if (r.dtype == DType::kFloat32)
    return r.softcap > 0.0f ? fused_c<float, true>(r, b, e, scratch) : fused_c<float, false>(r, b, e, scratch);
  return r.softcap > 0.0f ? fused_c<std::uint16_t, true>(r, b, e, scratch) : fused_c<std::uint16_t, false>(r, b, e, scratch);
}
void exp_array(const float* x, float* y, std::int64_t n) {
  for (std::int64_t j = 0; j < n; j += V::width) {
    const int r = n - j < V::width ? static_cast<int>(n - j) : V::width;
    V::store_part(y + j, r, vexp(V::load_part(x + j, r, 0.0f)));
  }
}

}  // namespace
