// Eight floats in an array: any processor, any compiler; optimisers turn the loops into whatever vectors there are.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct V {
  static constexpr int width = 8;
  struct F {
    float v[width];
  };
  template <class Fn>
  static F each(Fn fn) {
    F out;
    for (int k = 0; k < width; ++k) out.v[k] = fn(k);
    return out;
  }
  static F set(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float* p) {
    return each([&](int k) { return p[k]; });
  }
  static F load(const std::uint16_t* p) {
    return each([&](int k) { return widen(p[k]); });
  }
  static F load_part(const float* p, int n, float fill) {
    return each([&](int k) { return k < n ? p[k] : fill; });
  }
  static F load_part(const std::uint16_t* p, int n, float fill) {
    return each([&](int k) { return k < n ? widen(p[k]) : fill; });
  }
  static void store(float* p, F x) { std::memcpy(p, x.v, sizeof(x.v)); }
  static void store(std::uint16_t* p, F x) { store_part(p, width, x); }
  // n numbers from and to the halves of their bits.
  static F join(const std::uint16_t* high, const std::uint16_t* low, int n) {
    std::uint32_t bits[width] = {};
    for (int k = 0; k < n; ++k) bits[k] = static_cast<std::uint32_t>(high[k]) << 16 | low[k];
    F out;
    std::memcpy(out.v, bits, sizeof(bits));
    return out;
  }
  static void split(std::uint16_t* high, std::uint16_t* low, int n, F x) {
    std::uint32_t bits[width];
    std::memcpy(bits, x.v, sizeof(bits));
    for (int k = 0; k < n; ++k)
      high[k] = static_cast<std::uint16_t>(bits[k] >> 16), low[k] = static_cast<std::uint16_t>(bits[k]);
  }
  // x rounded to bf16 and widened again.
  static F as_bf16(F x) {
    return each([&](int k) { return widen(narrow(x.v[k])); });
  }
  // Pairs of bf16, as a product reads them: `width` of them side by side, or one in every place.
  static F pairs(const std::uint16_t* p) {
    F out;
    std::memcpy(out.v, p, sizeof(out.v));
    return out;
  }
  static F pair(const std::uint16_t* p) {
    float bits;
    std::memcpy(&bits, p, 4);
    return set(bits);
  }
  // `width` rows of `width` units of 32 bits become the columns of what is written `step` elements apart.
  template <class T>
  static void turn(const T* from, std::int64_t stride, T* to, std::int64_t step) {
    constexpr int unit = 4 / sizeof(T);
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) std::memcpy(to + j * step + unit * i, from + i * stride + unit * j, 4);
  }
  // acc + a.first b.first + a.second b.second
  static F dot(F acc, F a, F b) {
    std::uint16_t x[2 * width], y[2 * width];
    std::memcpy(x, a.v, sizeof(x));
    std::memcpy(y, b.v, sizeof(y));
    return each([&](int k) {
      return acc.v[k] + widen(x[2 * k]) * widen(y[2 * k]) + widen(x[2 * k + 1]) * widen(y[2 * k + 1]);
    });
  }
  // Writes first and second, rounded, as `width` pairs.
  static void store_pairs(std::uint16_t* p, F first, F second) {
    for (int k = 0; k < width; ++k) p[2 * k] = narrow(first.v[k]), p[2 * k + 1] = narrow(second.v[k]);
  }
  static void store_part(float* p, int n, F x) { std::memcpy(p, x.v, static_cast<std::size_t>(n) * 4); }
  static void store_part(std::uint16_t* p, int n, F x) {
    for (int k = 0; k < n; ++k) p[k] = narrow(x.v[k]);
  }
  template <class T>
  static void load2(const T* p, F& x, F& y) {
    x = load(p), y = load(p + width);
  }
  template <class T>
  static void store2(T* p, F x, F y) {
    store_part(p, width, x);
    store_part(p + width, width, y);
  }
  static F add(F x, F y) {
    return each([&](int k) { return x.v[k] + y.v[k]; });
  }
  static F sub(F x, F y) {
    return each([&](int k) { return x.v[k] - y.v[k]; });
  }
  static F mul(F x, F y) {
    return each([&](int k) { return x.v[k] * y.v[k]; });
  }
  static F div(F x, F y) {
    return each([&](int k) { return x.v[k] / y.v[k]; });
  }
  static F fma(F x, F y, F z) {
    return each([&](int k) { return x.v[k] * y.v[k] + z.v[k]; });
  }
  // z - m with large z: the product must not be rounded, and not every processor has a fused multiply-add.
  static F fmsub(F x, F y, F z) {
    return each([&](int k) { return static_cast<float>(static_cast<double>(x.v[k]) * y.v[k] - z.v[k]); });
  }
  static F fnma(F x, F y, F z) {
    return each([&](int k) { return z.v[k] - x.v[k] * y.v[k]; });
  }
  static F max(F x, F y) {
    return each([&](int k) { return x.v[k] > y.v[k] ? x.v[k] : y.v[k]; });
  }
  static F min(F x, F y) {
    return each([&](int k) { return x.v[k] < y.v[k] ? x.v[k] : y.v[k]; });
  }
  static F abs(F x) {
    return each([&](int k) { return x.v[k] < 0.0f ? -x.v[k] : x.v[k]; });
  }
  // |x| < 2^22: adding and taking away 1.5 * 2^23 leaves the nearest integer.
  static F round(F x) {
    return each([&](int k) { return (x.v[k] + 12582912.0f) - 12582912.0f; });
  }
  // p * 2^n, n an integer; 0 below the normal range, infinity above it.
  static F scale(F p, F n) {
    return each([&](int k) {
      const float clamped = n.v[k] < -127.0f ? -127.0f : n.v[k] > 128.0f ? 128.0f : n.v[k];
      const std::uint32_t bits =
          static_cast<std::uint32_t>(clamped == clamped ? static_cast<std::int32_t>(clamped) + 127 : 0) << 23;
      float two_n;
      std::memcpy(&two_n, &bits, 4);
      return p.v[k] * two_n;
    });
  }
  static F copysign(F x, F sign) {
    return each([&](int k) { return std::signbit(sign.v[k]) ? -x.v[k] : x.v[k]; });  // x >= 0
  }
  static F pick_less(F x, F y, F yes, F no) {
    return each([&](int k) { return x.v[k] < y.v[k] ? yes.v[k] : no.v[k]; });
  }
  static float largest(F x) {
    float m = x.v[0];
    for (int k = 1; k < width; ++k) m = x.v[k] > m ? x.v[k] : m;
    return m;
  }
  static double sum(F x) {
    double s = 0.0;
    for (int k = 0; k < width; ++k) s += x.v[k];
    return s;
  }
  struct FlushDenormals {
    FlushDenormals() {}  // nothing to set without knowing the processor
  };

 private:
  static float widen(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static std::uint16_t narrow(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

}  // namespace
