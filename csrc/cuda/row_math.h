// What one lane does with its part of a row, and how parts become the row: all of the row kernels' arithmetic.
//
// It compiles for the host as well, where tests/emulate.cpp drives it lane by lane; rows.cu adds only copies, barriers
// and shuffles. The quantities are those of ../cpu/rows.h, in units of log 2: with v_j = u_j, or tanh(u_j / cap) under
// a softcap, and c = log2(e) inv_T (times the softcap), y_j = (v_j - m) c, m the row's largest v. Subtracting first
// makes the largest term exactly 1 and costs no digits where logits are far from 0. p_j = 2^y_j / s, never exp(z_j -
// lse), so p does not inherit the rounding of a large lse. A row with a NaN or +inf, or with nothing but -inf, is NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "plan.h"
#include "program.h"

namespace omni::cuda {

constexpr std::int64_t kIgnore = -100;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kTiny = -150.0f;  // 2^kTiny is 0 in fp32; keeps 0 times -inf out of the sums
constexpr float kNegInf = -__builtin_huge_valf();

struct alignas(kVectorBytes) Vector {
  std::uint32_t word[4];
};

template <class T>
constexpr int kPerVector = kVectorBytes / static_cast<int>(sizeof(T));

// 2^x with 2 ulp; results below the normal range are 0.
OMNI_HD float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// log2 of x >= 0, to 2^-22; -inf below the normal range.
OMNI_HD float log2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return x < 0x1p-126f ? kNegInf : log2f(x);
#endif
}

OMNI_HD float from_bits(std::uint32_t bits) {
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
OMNI_HD std::uint32_t to_bits(float x) {
  std::uint32_t out;
  memcpy(&out, &x, 4);
  return out;
}

// Two floats as bf16, rounded to nearest, `low` in the low half.
OMNI_HD std::uint32_t to_bf16x2(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  const auto narrow = [](float x) {
    const std::uint32_t bits = to_bits(x);
    return x != x ? 0x7fffu : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  };
  return narrow(low) | narrow(high) << 16;
#endif
}

OMNI_HD void unpack(const Vector& in, float (&out)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = from_bits(in.word[k]);
}
OMNI_HD void unpack(const Vector& in, float (&out)[8]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[2 * k] = from_bits(in.word[k] << 16);
    out[2 * k + 1] = from_bits(in.word[k] & 0xffff0000u);
  }
}
OMNI_HD Vector pack(const float (&in)[4]) { return {{to_bits(in[0]), to_bits(in[1]), to_bits(in[2]), to_bits(in[3])}}; }
OMNI_HD Vector pack(const float (&in)[8]) {
  return {{to_bf16x2(in[0], in[1]), to_bf16x2(in[2], in[3]), to_bf16x2(in[4], in[5]), to_bf16x2(in[6], in[7])}};
}
OMNI_HD float load_one(const float* p) { return *p; }
OMNI_HD float load_one(const std::uint16_t* p) { return from_bits(static_cast<std::uint32_t>(*p) << 16); }
OMNI_HD void store_one(float* p, float x) { *p = x; }
OMNI_HD void store_one(std::uint16_t* p, float x) { *p = static_cast<std::uint16_t>(to_bf16x2(x, 0.0f)); }

// A row's constants: z = v * span.
struct Scale {
  float inv_t, inv_cap;  // inv_cap: 0 without a softcap
  double span;           // inv_t, times the softcap if there is one
  float c;               // span * log2(e), rounded
};

OMNI_HD Scale scale_of(float inv_t, float softcap) {
  const double span = softcap > 0.0f ? static_cast<double>(softcap) * inv_t : inv_t;
  return {inv_t, softcap > 0.0f ? 1.0f / softcap : 0.0f, span, static_cast<float>(span * kLog2E)};
}

template <bool CAP>
OMNI_HD float v_of(float u, float inv_cap) {
  if constexpr (CAP)
    return tanhf(u * inv_cap);
  else
    return u;
}

// --- statistics ----------------------------------------------------------------------------------------------------

struct Fold {
  float m, s, t;  // largest v, sum 2^y, sum 2^y y
};
OMNI_HD constexpr Fold nothing() { return {kNegInf, 0.0f, 0.0f}; }

// Both folds, relative to the larger of their references.
OMNI_HD Fold merge(const Fold& a, const Fold& b, float c) {
  const float m = fmaxf(a.m, b.m);
  if (!(m > kNegInf)) return {m, a.s + b.s, a.t + b.t};  // sums are 0, or NaN
  const float da = max_nan((a.m - m) * c, kTiny), db = max_nan((b.m - m) * c, kTiny);
  const float ea = exp2_fast(da), eb = exp2_fast(db);
  return {m, ea * a.s + eb * b.s, ea * (a.t + da * a.s) + eb * (b.t + db * b.s)};
}

// Makes way for values up to top.
OMNI_HD void raise(Fold& f, float top, float c) {
  if (top > f.m) f = merge(f, {top, 0.0f, 0.0f}, c);
}

// Takes n values in. -inf adds nothing. e: their 2^y.
template <int N>
OMNI_HD void fold_in(Fold& f, const float (&v)[N], float c, float (&e)[N]) {
  float top = v[0];
#pragma unroll
  for (int k = 1; k < N; ++k) top = fmaxf(top, v[k]);  // a NaN is passed over: it shows in the sum
  raise(f, top, c);
  const float m = f.m > kNegInf ? f.m : 0.0f;
  float s = 0.0f, t = 0.0f;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float y = max_nan((v[k] - m) * c, kTiny);
    e[k] = exp2_fast(y);
    s += e[k];
    t = fmaf(e[k], y, t);
  }
  f.s += s;
  f.t += t;
}

OMNI_HD bool inside(Extent x, int element) { return element >= x.lead && element < x.lead + x.vocab; }

// Whether all elements of vector j belong to the row.
OMNI_HD bool whole(Extent x, int j, int per_vector) {
  return inside(x, j * per_vector) && inside(x, j * per_vector + per_vector - 1);
}

// One lane's share of a warp's vectors. slice: the first of them.
template <class T, bool CAP>
OMNI_HD Fold fold_lane(const Vector* slice, Span span, int lane, Extent x, const Scale& sc) {
  constexpr int N = kPerVector<T>;
  Fold f = nothing();
#pragma unroll 2
  for (int i = lane; i < span.count; i += 32) {
    float v[N], e[N];
    unpack(slice[i], v);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = v_of<CAP>(v[k], sc.inv_cap);
    const int j = span.first + i;
    if (!whole(x, j, N)) {
#pragma unroll
      for (int k = 0; k < N; ++k) v[k] = inside(x, j * N + k) ? v[k] : kNegInf;
    }
    fold_in(f, v, sc.c, e);
  }
  return f;
}

struct Stats {
  float logp, entropy, lse;
  double log_s;
};

OMNI_HD Stats stats_of(const Fold& f, float v_target, const Scale& sc) {
  Stats out;
  out.log_s = log(static_cast<double>(f.s));
  const double logp = (static_cast<double>(v_target) - f.m) * sc.span - out.log_s;
  const double entropy = out.log_s - kLn2 * (static_cast<double>(f.t) / f.s);
  out.lse = static_cast<float>(f.m * sc.span + out.log_s);
  out.logp = logp > 0.0 ? 0.0f : static_cast<float>(logp);  // rounding alone can cross 0; NaN stays
  out.entropy = entropy < 0.0 ? 0.0f : static_cast<float>(entropy);
  return out;
}

// --- gradient ------------------------------------------------------------------------------------------------------

// du_j = p (k0 - k1 (y + h)), p = 2^y, y = (v - m) c - shift, times 1 - v^2 under a softcap; `hit` at the target.
struct RowGradient {
  float m, c, shift, k0, k1, h, hit, inv_cap;
  bool idle;  // all coefficients are 0: so is the gradient
};

OMNI_HD bool is_idle(Coefficients k) { return k.a == 0.0f && k.b == 0.0f && k.z == 0.0f; }

// The target's entry has its own formula: expm1 does not cancel where p is near 1.
template <bool CAP>
OMNI_HD float hit_of(Coefficients k, float logp, float entropy, float lse, float v_target, const Scale& sc) {
  const float p = expf(logp);
  float g = -k.a * expm1f(logp) + 2.0f * k.z * lse * p;
  if (k.b != 0.0f && p > 0.0f) g -= k.b * p * (logp + entropy);
  g *= sc.inv_t;
  return CAP ? g * (1.0f - v_target * v_target) : g;
}

// After the row's own fold: 1 / s goes into the factors.
template <bool CAP>
OMNI_HD RowGradient gradient_of_fold(const Fold& f, const Stats& st, Coefficients k, float v_target, const Scale& sc) {
  const float factor = sc.inv_t / f.s;
  return {f.m,
          sc.c,
          0.0f,
          (-k.a + 2.0f * k.z * st.lse) * factor,
          k.b == 0.0f ? 0.0f : static_cast<float>(k.b * kLn2) * factor,
          k.b == 0.0f ? 0.0f : static_cast<float>((st.entropy - st.log_s) * kLog2E),
          hit_of<CAP>(k, st.logp, st.entropy, st.lse, v_target, sc),
          sc.inv_cap,
          is_idle(k)};
}

// From a given lse: counted in bits as the rounded c sees them, what does not fit in fp32 goes into the factors.
template <bool CAP>
OMNI_HD RowGradient gradient_of_lse(float lse, float entropy, Coefficients k, float v_target, const Scale& sc) {
  const double bits = static_cast<double>(lse) * (sc.c / sc.span);
  const float shift = static_cast<float>(bits), low = fabsf(shift) < -kNegInf ? static_cast<float>(bits - shift) : 0.0f;
  const float factor = sc.inv_t * exp2_fast(-low);
  const float logp = static_cast<float>(v_target * sc.span) - lse;  // both rounded alike: 0 where z is all there is
  return {0.0f,
          sc.c,
          shift,
          (-k.a + 2.0f * k.z * lse) * factor,
          k.b == 0.0f ? 0.0f : static_cast<float>(k.b * kLn2) * factor,
          k.b == 0.0f ? 0.0f : static_cast<float>(entropy * kLog2E) - low,
          hit_of<CAP>(k, logp, entropy, lse, v_target, sc),
          sc.inv_cap,
          is_idle(k)};
}

// Writes one lane's share of du over the row. target: its place counted from the first vector's start, < 0 for none.
template <class T, bool CAP>
OMNI_HD void gradient_lane(T* row, const Vector* slice, Span span, int lane, Extent x, int target,
                           const RowGradient& g) {
  constexpr int N = kPerVector<T>;
  T* const start = row - x.lead;
#pragma unroll 2
  for (int i = lane; i < span.count; i += 32) {
    const int j = span.first + i;
    float du[N];
    if (g.idle) {
#pragma unroll
      for (int k = 0; k < N; ++k) du[k] = 0.0f;
    } else {
      unpack(slice[i], du);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float v = v_of<CAP>(du[k], g.inv_cap), y = max_nan(fmaf(v - g.m, g.c, -g.shift), kTiny);
        du[k] = exp2_fast(y) * fmaf(-g.k1, y + g.h, g.k0);
        if (CAP) du[k] *= fmaf(-v, v, 1.0f);
      }
      if (target >= 0 && target / N == j) {
#pragma unroll
        for (int k = 0; k < N; ++k) du[k] = target % N == k ? g.hit : du[k];
      }
    }
    if (whole(x, j, N)) {
      reinterpret_cast<Vector*>(start)[j] = pack(du);
    } else {  // this vector is shared with a neighbour
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (inside(x, j * N + k)) store_one(start + j * N + k, du[k]);
    }
  }
}

}  // namespace omni::cuda
