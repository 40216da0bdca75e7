// Products of matrices in tiles, written once over a vector type V (vec_*.h); the contract is in product.h. Under the
// same rules as rows_kernel.h: an unnamed namespace, no templates of the standard library.
//
// A tile keeps kTileRows x 2 or 3 vectors of sums in registers and reads A one unit of each row at a time, B as units
// of rows side by side. A unit is a pair of bf16, multiplied and added in one instruction where the processor has it,
// or one fp32. Sums are fp32 over the whole inner dimension.
#pragma once
#include <cstring>

#include "product.h"

namespace {

using omni::kPanel;
using omni::kTileRows;
using omni::kUnit;
using omni::Out;
using omni::Product;

// How a product reads its elements: one by one, or in pairs.
template <class T>
struct Unit;
template <>
struct Unit<float> {
  static V::F one(const float* p) { return V::set(*p); }
  static V::F many(const float* p) { return V::load(p); }
  static V::F add(V::F acc, V::F a, V::F b) { return V::fma(a, b, acc); }
};
template <>
struct Unit<std::uint16_t> {
  static V::F one(const std::uint16_t* p) { return V::pair(p); }
  static V::F many(const std::uint16_t* p) { return V::pairs(p); }
  static V::F add(V::F acc, V::F a, V::F b) { return V::dot(acc, a, b); }
};

constexpr int kRows = static_cast<int>(kTileRows);

// acc[r][v] = sum over `steps` units of A[r] B[v]: units of A's rows are `unit` elements apart, those of B `next`. A
// cache line of what is wanted next is fetched at each step.
template <class T, int VECTORS>
__attribute__((always_inline)) inline void tile(const T* const (&a)[kRows], std::int64_t unit, const T* b,
                                                std::int64_t next, std::int64_t steps, const char* ahead,
                                                V::F (&acc)[kRows][VECTORS]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = V::set(0.0f);
  for (std::int64_t k = 0; k < steps; ++k) {
    __builtin_prefetch(ahead + 64 * k, 0, 2);
    V::F columns[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) columns[v] = Unit<T>::many(b + k * next + v * V::width * kUnit<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V::F x = Unit<T>::one(a[r] + k * unit);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = Unit<T>::add(acc[r][v], x, columns[v]);
    }
  }
}

// C [kTileRows, n] = A B with n a multiple of the tile's width; B's units are [n] side by side.
template <class T, class Put>
inline void strip(const T* a, std::int64_t row, std::int64_t unit, const T* b, std::int64_t n, std::int64_t steps,
                  Put put) {
  constexpr int vectors = 2;
  const T* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = a + r * row;
  for (std::int64_t j = 0; j < n; j += vectors * V::width) {
    V::F acc[kRows][vectors];
    const T* from = b + j * kUnit<T>;
    tile<T, vectors>(rows, unit, from, n * kUnit<T>, steps, reinterpret_cast<const char*>(from), acc);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < vectors; ++v) put(r, j + v * V::width, acc[r][v]);
  }
}

// Writes columns [j, j + lanes) of a row of C.
template <class T>
inline void write(const Product<T>& p, std::int64_t row, std::int64_t j, int lanes, V::F x) {
  const std::int64_t place = row * p.c_stride + j;
  if (p.out == Out::kFloat32 || p.out == Out::kAdd) {
    float* to = static_cast<float*>(p.c) + place;
    if (p.out == Out::kAdd)
      x = V::fma(V::set(p.scale), x, lanes == V::width ? V::load(to) : V::load_part(to, lanes, 0.0f));
    return lanes == V::width ? V::store(to, x) : V::store_part(to, lanes, x);
  }
  std::uint16_t* to = static_cast<std::uint16_t*>(p.c) + place;
  if (p.out == Out::kAddHalves || p.out == Out::kRound) x = V::add(x, V::join(to, p.low + place, lanes));
  if (p.out == Out::kHalves || p.out == Out::kAddHalves) return V::split(to, p.low + place, lanes, x);
  lanes == V::width ? V::store(to, x) : V::store_part(to, lanes, x);
}

// Fetches what a tile of sums will be added to, while it is made.
template <class T>
inline void fetch(const Product<T>& p, std::int64_t row, std::int64_t rows, std::int64_t j) {
  const std::int64_t size = p.out == Out::kAdd ? 4 : 2;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t place = ((row + r) * p.c_stride + j) * size;
    for (std::int64_t byte = 0; byte < kPanel * size; byte += 64) {
      __builtin_prefetch(static_cast<const char*>(p.c) + place + byte, 1, 2);
      if (size == 2) __builtin_prefetch(reinterpret_cast<const char*>(p.low) + place + byte, 1, 2);
    }
  }
}

// Tiles [first, last) of rows, times panels [begin, end).
template <class T>
void multiply(const Product<T>& p, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
  constexpr int vectors = 3, width = vectors * V::width;
  static_assert(kPanel % width == 0);
  const std::int64_t steps = p.k / kUnit<T>;
  for (std::int64_t panel = begin; panel < end; ++panel)
    for (std::int64_t part = 0; part < kPanel; part += width) {
      const T* b = p.b + panel * p.k * kPanel + part * kUnit<T>;
      for (std::int64_t t = first; t < last; ++t) {
        const std::int64_t row = t * kTileRows, rows = p.m - row < kTileRows ? p.m - row : kTileRows;
        const T* a[kRows];
        for (int r = 0; r < kRows; ++r) a[r] = p.a + t * p.a_tile + (r < rows || p.tiled ? r : rows - 1) * p.a_row;
        // The next panel is on its way while the first tiles work on this one.
        const std::int64_t done = t - first;
        const char* ahead =
            done < 3 && panel + 1 < end
                ? reinterpret_cast<const char*>(p.b + (panel + 1) * p.k * kPanel) + done * 64 * steps
                : reinterpret_cast<const char*>(b);
        if (p.out == Out::kAdd || p.out == Out::kAddHalves || p.out == Out::kRound)
          fetch(p, row, rows, panel * kPanel + part);
        V::F acc[kRows][vectors];
        tile<T, vectors>(a, p.a_unit, b, kUnit<T> * kPanel, steps, ahead, acc);
        for (std::int64_t r = 0; r < rows; ++r)
          for (int v = 0; v < vectors; ++v) {
            const std::int64_t j = panel * kPanel + part + v * V::width, left = p.n - j;
            if (left > 0) write(p, row + r, j, left < V::width ? static_cast<int>(left) : V::width, acc[r][v]);
          }
      }
    }
}

// One panel of B out of B^T, [n, k] with `stride` elements from row to row.
template <class T>
void pack_transposed(const T* from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t panel, T* to) {
  constexpr std::int64_t square = V::width, unit = kUnit<T>;
  const std::int64_t count = n - panel * kPanel < kPanel ? n - panel * kPanel : kPanel;
  from += panel * kPanel * stride;
  to += panel * kPanel * k;
  if (count < kPanel) std::memset(to, 0, static_cast<std::size_t>(k * kPanel) * sizeof(T));
  for (std::int64_t u = 0; u < k / unit; u += square)
    for (std::int64_t j = 0; j < count; j += square) {
      const T* source = from + j * stride + unit * u;
      T* target = to + (u * kPanel + j) * unit;
      const std::int64_t deep = k / unit - u, wide = count - j;
      if (deep >= square && wide >= square)
        V::turn(source, stride, target, unit * kPanel);
      else
        for (std::int64_t r = 0; r < wide && r < square; ++r)
          for (std::int64_t s = 0; s < deep && s < square; ++s)
            std::memcpy(target + (s * kPanel + r) * unit, source + r * stride + unit * s, 4);
    }
}

// Panels [begin, end) of WIDTH columns out of a matrix [k, n], in units of its rows; an odd last one of bf16 is paired
// with zeros. Row by row, for neighbouring panels share cache lines. units: of a whole panel, of which this matrix may
// be a part.
template <class T, int WIDTH>
void pack_plain(const T* from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t units,
                std::int64_t begin, std::int64_t end, T* to) {
  static constexpr T zeros[WIDTH] = {};
  constexpr std::int64_t unit = kUnit<T>;
  constexpr std::int64_t ahead = 16;  // rows whose parts are fetched: pages apart, no processor sees them coming
  const std::int64_t bytes =
      static_cast<std::int64_t>(sizeof(T)) * ((end - begin) * WIDTH < n ? (end - begin) * WIDTH : n);
  for (std::int64_t u = 0; u < (k + unit - 1) / unit; ++u) {
    for (std::int64_t row = unit * u + ahead; row < unit * (u + 1) + ahead && row < k; ++row)
      for (std::int64_t byte = 0; byte < bytes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + row * stride + begin * WIDTH) + byte);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const int left = n - panel * WIDTH < WIDTH ? static_cast<int>(n - panel * WIDTH) : WIDTH;
      const T* first = from + unit * u * stride + panel * WIDTH;
      T* out = to + (panel * units + u) * unit * WIDTH;
      if constexpr (unit == 1) {
        for (int j = 0; j < WIDTH; ++j) out[j] = j < left ? first[j] : 0;
      } else {
        const T* second = unit * u + 1 < k ? first + stride : zeros;
        if (left == WIDTH)
          for (int j = 0; j < WIDTH; ++j) out[2 * j] = first[j], out[2 * j + 1] = second[j];
        else
          for (int j = 0; j < WIDTH; ++j)
            out[2 * j] = j < left ? first[j] : 0, out[2 * j + 1] = j < left ? second[j] : 0;
      }
    }
  }
}

template <class T>
constexpr omni::ProductKernels<T> kProduct = {&multiply<T>, &pack_transposed<T>,
                                              &pack_plain<T, static_cast<int>(kPanel)>,
                                              &pack_plain<T, static_cast<int>(kTileRows)>};

}  // namespace
