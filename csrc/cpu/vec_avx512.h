// 16 floats in an AVX-512 register (F, BW, DQ, VL).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct V {
  using F = __m512;
  static constexpr int width = 16;
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const std::uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_part(const float* p, int n, float fill) { return _mm512_mask_loadu_ps(set(fill), mask(n), p); }
  static F load_part(const std::uint16_t* p, int n, float fill) {
    return _mm512_mask_blend_ps(mask(n), set(fill), widen(_mm256_maskz_loadu_epi16(mask(n), p)));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(std::uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
  static void store_part(float* p, int n, F x) { _mm512_mask_storeu_ps(p, mask(n), x); }
  static void store_part(std::uint16_t* p, int n, F x) { _mm256_mask_storeu_epi16(p, mask(n), narrow(x)); }
  // n numbers from and to the halves of their bits.
  static F join(const std::uint16_t* high, const std::uint16_t* low, int n) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(words(high, n), 16), words(low, n)));
  }
  static void split(std::uint16_t* high, std::uint16_t* low, int n, F x) {
    const __m256i above = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
    const __m256i below = _mm512_cvtepi32_epi16(_mm512_castps_si512(x));
    if (n == width) {  // a masked store of words takes several times as long
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), above);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), below);
    } else {
      _mm256_mask_storeu_epi16(high, mask(n), above);
      _mm256_mask_storeu_epi16(low, mask(n), below);
    }
  }
  // x rounded to bf16 and widened again.
  static F as_bf16(F x) { return widen(narrow(x)); }
  // Pairs of bf16, as a product reads them: `width` of them side by side, or one in every place.
  static F pairs(const std::uint16_t* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static F pair(const std::uint16_t* p) {
    int bits;
    __builtin_memcpy(&bits, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
  }
  // `width` rows of `width` units of 32 bits become the columns of what is written `step` elements apart.
  template <class T>
  static void turn(const T* from, std::int64_t stride, T* to, std::int64_t step) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // lane l of r[4 i + j] has column 4 l + j of rows 4 i to 4 i + 3
      const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
      const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
      _mm512_storeu_si512(to + j * step, _mm512_shuffle_i32x4(a, b, 0x88));
      _mm512_storeu_si512(to + (4 + j) * step, _mm512_shuffle_i32x4(c, d, 0x88));
      _mm512_storeu_si512(to + (8 + j) * step, _mm512_shuffle_i32x4(a, b, 0xdd));
      _mm512_storeu_si512(to + (12 + j) * step, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
  }
  // acc + a.first b.first + a.second b.second
  static F dot(F acc, F a, F b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    const F first = fma(even(a), even(b), acc);
    return fma(odd(a), odd(b), first);
#endif
  }
  // Writes first and second, rounded, as `width` pairs.
  static void store_pairs(std::uint16_t* p, F first, F second) {
#if defined(__AVX512BF16__)
    store2(p, first, second);
#else
    const __m512i high = _mm512_and_si512(rounded(second), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(rounded(first), 16), high));
#endif
  }
  // Two vectors at once. Those of bf16 hold the even and the odd elements: a shift and a mask widen them.
  static void load2(const float* p, F& x, F& y) { x = load(p), y = load(p + width); }
  static void load2(const std::uint16_t* p, F& x, F& y) {
    const __m512i both = _mm512_loadu_si512(p);
    x = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    y = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store2(float* p, F x, F y) { store(p, x), store(p + width, y); }
  static void store2(std::uint16_t* p, F x, F y) {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x))));
#else
    const __m512i odd = _mm512_and_si512(rounded(y), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(rounded(x), 16), odd));
#endif
  }
  static F add(F x, F y) { return _mm512_add_ps(x, y); }
  static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F div(F x, F y) { return _mm512_div_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static F fmsub(F x, F y, F z) { return _mm512_fmsub_ps(x, y, z); }
  static F fnma(F x, F y, F z) { return _mm512_fnmadd_ps(x, y, z); }
  static F max(F x, F y) { return _mm512_max_ps(x, y); }
  static F min(F x, F y) { return _mm512_min_ps(x, y); }
  static F abs(F x) { return _mm512_abs_ps(x); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F p, F n) { return _mm512_scalef_ps(p, n); }
  static F copysign(F x, F sign) {
    return _mm512_or_ps(_mm512_and_ps(sign, set(-0.0f)), _mm512_andnot_ps(set(-0.0f), x));
  }
  static F pick_less(F x, F y, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), no, yes);
  }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  static double sum(F x) { return _mm512_reduce_add_ps(x); }

  // Tiny probabilities become 0 instead of denormals, which cost some processors 100 cycles each.
  struct FlushDenormals {
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
  };

 private:
  static __m512i words(const std::uint16_t* p, int n) {
    return _mm512_cvtepu16_epi32(n == width ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                            : _mm256_maskz_loadu_epi16(mask(n), p));
  }
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
#if defined(__AVX512BF16__)
  static __m256i narrow(F x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
#else
  static __m256i narrow(F x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16)); }
  static F even(F x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
  static F odd(F x) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
#endif
  static F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  // Round to nearest even at bit 16. Arithmetic NaNs have a clear low half, so they stay NaN.
  static __m512i rounded(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
};

}  // namespace
