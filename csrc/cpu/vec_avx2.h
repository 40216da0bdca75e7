// 8 floats in an AVX2 register, with FMA.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct V {
  using F = __m256;
  static constexpr int width = 8;
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const std::uint16_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static F load_part(const float* p, int n, float fill) {
    float part[width];
    for (int k = 0; k < width; ++k) part[k] = k < n ? p[k] : fill;
    return load(part);
  }
  static F load_part(const std::uint16_t* p, int n, float fill) {
    float part[width];
    for (int k = 0; k < width; ++k) {
      const std::uint32_t bits = k < n ? static_cast<std::uint32_t>(p[k]) << 16 : 0;
      std::memcpy(&part[k], &bits, 4);
      if (k >= n) part[k] = fill;
    }
    return load(part);
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(std::uint16_t* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
  static void store_part(float* p, int n, F x) {
    float part[width];
    store(part, x);
    std::memcpy(p, part, static_cast<std::size_t>(n) * 4);
  }
  static void store_part(std::uint16_t* p, int n, F x) {
    std::uint16_t part[width];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(part), narrow(x));
    std::memcpy(p, part, static_cast<std::size_t>(n) * 2);
  }
  // n numbers from and to the halves of their bits.
  static F join(const std::uint16_t* high, const std::uint16_t* low, int n) {
    std::uint32_t bits[width] = {};
    for (int k = 0; k < n; ++k) bits[k] = static_cast<std::uint32_t>(high[k]) << 16 | low[k];
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
  }
  static void split(std::uint16_t* high, std::uint16_t* low, int n, F x) {
    std::uint32_t bits[width];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), _mm256_castps_si256(x));
    for (int k = 0; k < n; ++k)
      high[k] = static_cast<std::uint16_t>(bits[k] >> 16), low[k] = static_cast<std::uint16_t>(bits[k]);
  }
  // x rounded to bf16 and widened again.
  static F as_bf16(F x) { return odd(_mm256_castsi256_ps(rounded(x))); }
  // Pairs of bf16, as a product reads them: `width` of them side by side, or one in every place.
  static F pairs(const std::uint16_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static F pair(const std::uint16_t* p) {
    int bits;
    std::memcpy(&bits, p, 4);
    return _mm256_castsi256_ps(_mm256_set1_epi32(bits));
  }
  // `width` rows of `width` units of 32 bits become the columns of what is written `step` elements apart.
  template <class T>
  static void turn(const T* from, std::int64_t stride, T* to, std::int64_t step) {
    constexpr int unit = 4 / sizeof(T);
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) std::memcpy(to + j * step + unit * i, from + i * stride + unit * j, 4);
  }
  // acc + a.first b.first + a.second b.second
  static F dot(F acc, F a, F b) { return fma(odd(a), odd(b), fma(even(a), even(b), acc)); }
  // Writes first and second, rounded, as `width` pairs.
  static void store_pairs(std::uint16_t* p, F first, F second) {
    const __m256i high = _mm256_castps_si256(odd(_mm256_castsi256_ps(rounded(second))));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(_mm256_srli_epi32(rounded(first), 16), high));
  }
  // Two vectors at once. Those of bf16 hold the even and the odd elements: a shift and a mask widen them.
  static void load2(const float* p, F& x, F& y) { x = load(p), y = load(p + width); }
  static void load2(const std::uint16_t* p, F& x, F& y) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    x = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    y = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void store2(float* p, F x, F y) { store(p, x), store(p + width, y); }
  static void store2(std::uint16_t* p, F x, F y) {
    const __m256i odd = _mm256_and_si256(rounded(y), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(_mm256_srli_epi32(rounded(x), 16), odd));
  }
  static F add(F x, F y) { return _mm256_add_ps(x, y); }
  static F sub(F x, F y) { return _mm256_sub_ps(x, y); }
  static F mul(F x, F y) { return _mm256_mul_ps(x, y); }
  static F div(F x, F y) { return _mm256_div_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm256_fmadd_ps(x, y, z); }
  static F fmsub(F x, F y, F z) { return _mm256_fmsub_ps(x, y, z); }
  static F fnma(F x, F y, F z) { return _mm256_fnmadd_ps(x, y, z); }
  static F max(F x, F y) { return _mm256_max_ps(x, y); }
  static F min(F x, F y) { return _mm256_min_ps(x, y); }
  static F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // p * 2^n, n an integer; 0 below the normal range, infinity above it.
  static F scale(F p, F n) {
    const __m256i k = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const __m256i safe = _mm256_min_epi32(_mm256_max_epi32(k, _mm256_setzero_si256()), _mm256_set1_epi32(255));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(safe, 23)));
  }
  static F copysign(F x, F sign) {
    return _mm256_or_ps(_mm256_and_ps(sign, set(-0.0f)), _mm256_andnot_ps(set(-0.0f), x));
  }
  static F pick_less(F x, F y, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, y, _CMP_LT_OQ)); }
  static float largest(F x) {
    const __m128 a = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 b = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
  }
  static double sum(F x) {
    const __m128 a = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
  }

  // Tiny probabilities become 0 instead of denormals, which cost some processors 100 cycles each.
  struct FlushDenormals {
    unsigned saved = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
  };

 private:
  static F even(F x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
  static F odd(F x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u)))); }
  // Round to nearest even at bit 16. Arithmetic NaNs have a clear low half, so they stay NaN.
  static __m256i rounded(F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static __m128i narrow(F x) {
    const __m256i up = _mm256_srli_epi32(rounded(x), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0xD8));
  }
};

}  // namespace
