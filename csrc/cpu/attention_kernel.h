// Attention of decoder.h, over prefix trees and for rows that decode in lockstep: part of decoder_kernel.h, same rules.
#pragma once
#include "decoder.h"
#include "product_kernel.h"

namespace {

using omni::Attention;
using omni::Decode;
using omni::Prompts;

// x [count rows, size] by number -> units of columns: [size / unit, padded, unit]; what is beyond `count` becomes 0.
template <class T>
inline void pack_across(const T* x, std::int64_t stride, const std::int32_t* number, std::int64_t count,
                        std::int64_t size, std::int64_t width, T* out) {
  constexpr int U = kUnit<T>;
  for (std::int64_t c = 0; c < count; ++c) {
    const T* row = x + number[c] * stride;
    for (std::int64_t d = 0; d < size; d += U) std::memcpy(out + d * width + c * U, row + d, U * sizeof(T));
  }
  for (std::int64_t d = 0; d < size; d += U)
    std::memset(out + d * width + count * U, 0, static_cast<std::size_t>((width - count) * U) * sizeof(T));
}

// x [count rows, size] by number -> units of rows: [padded / unit, size, unit].
template <class T>
inline void pack_along(const T* x, std::int64_t stride, const std::int32_t* number, std::int64_t count,
                       std::int64_t size, std::int64_t width, T* out) {
  constexpr int U = kUnit<T>;
  for (std::int64_t c = 0; c < width; c += U) {
    T* to = out + c * size;
    if (c + U <= count) {
      const T *first = x + number[c] * stride, *second = x + number[c + U - 1] * stride;
      if constexpr (U == 1)
        std::memcpy(to, first, static_cast<std::size_t>(size) * sizeof(T));
      else
        for (std::int64_t d = 0; d < size; ++d) to[2 * d] = first[d], to[2 * d + 1] = second[d];
    } else {
      std::memset(to, 0, static_cast<std::size_t>(size * U) * sizeof(T));
      if (c < count)
        for (std::int64_t d = 0; d < size; ++d) to[U * d] = x[number[c] * stride + d];
    }
  }
}

// Rows [first, first + kTileRows) of a block, dense; zeros beyond its last row.
template <class T>
inline void gather(const T* x, std::int64_t stride, const std::int32_t* number, std::int64_t rows, std::int64_t size,
                   T* out) {
  for (std::int64_t r = 0; r < kTileRows; ++r)
    if (r < rows)
      std::memcpy(out + r * size, x + number[r] * stride, static_cast<std::size_t>(size) * sizeof(T));
    else
      std::memset(out + r * size, 0, static_cast<std::size_t>(size) * sizeof(T));
}

struct Block {
  const std::int32_t *rows, *columns;
  const std::uint16_t* bias;
  std::int64_t height, count, width;  // rows; columns; columns padded
};

inline Block block_of(const Attention& a, std::int64_t index) {
  const std::int64_t* b = a.block + 5 * index;
  return {a.rows + b[0], a.columns + b[2], a.bias + b[4], b[1], b[3], omni::padded(b[3])};
}

template <class T>
void attend_forward_t(const Attention& a, std::int64_t task, void* scratch) {
  const V::FlushDenormals guard;
  const std::int64_t head = task % a.kv_heads, group = a.heads / a.kv_heads, size = a.size;
  const std::int64_t* tree = a.tree + 4 * (task / a.kv_heads);
  const V::F c = V::set(static_cast<float>(a.scale * kLog2E));
  for (std::int64_t index = tree[0]; index < tree[1]; ++index) {
    const Block b = block_of(a, index);
    T* keys = static_cast<T*>(scratch);
    T* values = keys + b.width * size;
    T* q = values + b.width * size;
    float* scores = reinterpret_cast<float*>(q + kTileRows * size);
    T* p = reinterpret_cast<T*>(scores + kTileRows * b.width);
    pack_across(static_cast<const T*>(a.k) + head * size, a.k_stride, b.columns, b.count, size, b.width, keys);
    pack_along(static_cast<const T*>(a.v) + head * size, a.v_stride, b.columns, b.count, size, b.width, values);
    for (std::int64_t g = head * group; g < (head + 1) * group; ++g)
      for (std::int64_t first = 0; first < b.height; first += kTileRows) {
        const std::int64_t rows = b.height - first < kTileRows ? b.height - first : kTileRows;
        gather(static_cast<const T*>(a.q) + g * size, a.q_stride, b.rows + first, rows, size, q);
        strip(q, size, kUnit<T>, keys, b.width, size / kUnit<T>,
              [&](int r, std::int64_t j, V::F x) { V::store(scores + r * b.width + j, x); });
        for (std::int64_t r = 0; r < rows; ++r) {
          float* s = scores + r * b.width;
          const std::uint16_t* bias = b.bias + (first + r) * b.width;
          V::F most = V::set(kNegInf), total = V::set(0.0f);
          for (std::int64_t j = 0; j < b.width; j += V::width) {
            const V::F y = V::fma(V::load(s + j), c, V::load(bias + j));
            V::store(s + j, y);
            most = V::max(most, y);
          }
          const float top = V::largest(most);
          for (std::int64_t j = 0; j < b.width; j += V::width) {
            const V::F e = vexp2<5>(V::max(V::set(kTiny), V::sub(V::load(s + j), V::set(top))));
            V::store(s + j, e);
            total = V::add(total, e);
          }
          const double sum = V::sum(total);
          a.lse[b.rows[first + r] * a.heads + g] = static_cast<float>(top + ::log(sum) * kLog2E);
          const V::F inverse = V::set(static_cast<float>(1.0 / sum));
          for (std::int64_t j = 0; j < b.width; j += V::width)
            V::store(p + r * b.width + j, V::mul(V::load(s + j), inverse));
        }
        if (rows < kTileRows)
          std::memset(p + rows * b.width, 0, static_cast<std::size_t>((kTileRows - rows) * b.width) * sizeof(T));
        strip(p, b.width, kUnit<T>, values, size, b.width / kUnit<T>, [&](int r, std::int64_t j, V::F x) {
          if (r < rows) V::store(static_cast<T*>(a.out) + (b.rows[first + r] * a.heads + g) * size + j, x);
        });
      }
  }
}

template <class T>
void attend_backward_t(const Attention& a, std::int64_t task, void* scratch) {
  constexpr int U = kUnit<T>;
  const V::FlushDenormals guard;
  const std::int64_t head = task % a.kv_heads, group = a.heads / a.kv_heads, size = a.size;
  const std::int64_t* tree = a.tree + 4 * (task / a.kv_heads);
  const V::F c = V::set(static_cast<float>(a.scale * kLog2E)), scale = V::set(a.scale);
  const auto wide = [&](float* p, std::int64_t row) { return p + (row * a.kv_heads + head) * size; };
  for (std::int64_t row = tree[2]; row < tree[3]; ++row) {
    std::memset(wide(a.wide_dk, row), 0, static_cast<std::size_t>(size) * sizeof(float));
    std::memset(wide(a.wide_dv, row), 0, static_cast<std::size_t>(size) * sizeof(float));
  }
  for (std::int64_t index = tree[0]; index < tree[1]; ++index) {
    const Block b = block_of(a, index);
    const std::int64_t strips = (b.height + kTileRows - 1) / kTileRows, height = group * strips * kTileRows;
    T* keys = static_cast<T*>(scratch);
    T* values = keys + b.width * size;
    T* key_rows = values + b.width * size;
    T* q_rows = key_rows + b.width * size;
    T* d_rows = q_rows + height * size;
    T* p_rows = d_rows + height * size;
    T* ds_rows = p_rows + height * b.width;
    T* q = ds_rows + height * b.width;
    T* d = q + kTileRows * size;
    T* ds = d + kTileRows * size;
    float* scores = reinterpret_cast<float*>(ds + kTileRows * b.width);
    float* dp = scores + kTileRows * b.width;
    static constexpr std::int32_t dense[] = {0, 1, 2, 3, 4, 5, 6, 7};
    static_assert(sizeof(dense) / sizeof(dense[0]) == kTileRows);
    pack_across(static_cast<const T*>(a.k) + head * size, a.k_stride, b.columns, b.count, size, b.width, keys);
    pack_across(static_cast<const T*>(a.v) + head * size, a.v_stride, b.columns, b.count, size, b.width, values);
    pack_along(static_cast<const T*>(a.k) + head * size, a.k_stride, b.columns, b.count, size, b.width, key_rows);
    std::int64_t place = 0;
    for (std::int64_t g = head * group; g < (head + 1) * group; ++g)
      for (std::int64_t first = 0; first < b.height; first += kTileRows, place += kTileRows) {
        const std::int64_t rows = b.height - first < kTileRows ? b.height - first : kTileRows;
        gather(static_cast<const T*>(a.q) + g * size, a.q_stride, b.rows + first, rows, size, q);
        gather(static_cast<const T*>(a.dout) + g * size, a.heads * size, b.rows + first, rows, size, d);
        pack_along(q, size, dense, kTileRows, size, kTileRows, q_rows + place * size);
        pack_along(d, size, dense, kTileRows, size, kTileRows, d_rows + place * size);
        strip(q, size, U, keys, b.width, size / U,
              [&](int r, std::int64_t j, V::F x) { V::store(scores + r * b.width + j, x); });
        strip(d, size, U, values, b.width, size / U,
              [&](int r, std::int64_t j, V::F x) { V::store(dp + r * b.width + j, x); });
        for (std::int64_t r = 0; r < kTileRows; ++r) {
          float *s = scores + r * b.width, *t = dp + r * b.width;
          if (r >= rows) {
            std::memset(s, 0, static_cast<std::size_t>(b.width) * sizeof(float));
            std::memset(t, 0, static_cast<std::size_t>(b.width) * sizeof(float));
            continue;
          }
          const std::uint16_t* bias = b.bias + (first + r) * b.width;
          const V::F lse = V::set(a.lse[b.rows[first + r] * a.heads + g]);
          V::F along = V::set(0.0f);
          for (std::int64_t j = 0; j < b.width; j += V::width) {
            const V::F y = V::sub(V::fma(V::load(s + j), c, V::load(bias + j)), lse);
            const V::F x = vexp2<5>(V::max(V::set(kTiny), y));
            V::store(s + j, x);
            along = V::fma(x, V::load(t + j), along);
          }
          const V::F sum = V::set(static_cast<float>(V::sum(along)));
          for (std::int64_t j = 0; j < b.width; j += V::width)
            V::store(t + j, V::mul(V::mul(V::load(s + j), V::sub(V::load(t + j), sum)), scale));
        }
        for (std::int64_t r = 0; r < kTileRows; r += U)
          for (std::int64_t j = 0; j < b.width; j += V::width) {
            const V::F p0 = V::load(scores + r * b.width + j), ds0 = V::load(dp + r * b.width + j);
            T* p_to = p_rows + (place + r) * b.width + U * j;
            T* ds_to = ds_rows + (place + r) * b.width + U * j;
            V::store(ds + r * b.width + j, ds0);
            if constexpr (U == 1) {
              V::store(p_to, p0);
              V::store(ds_to, ds0);
            } else {
              const V::F ds1 = V::load(dp + (r + 1) * b.width + j);
              V::store_pairs(p_to, p0, V::load(scores + (r + 1) * b.width + j));
              V::store_pairs(ds_to, ds0, ds1);
              V::store(ds + (r + 1) * b.width + j, ds1);
            }
          }
        strip(ds, b.width, U, key_rows, size, b.width / U, [&](int r, std::int64_t j, V::F x) {
          if (r < rows) V::store(static_cast<T*>(a.dq) + b.rows[first + r] * a.dq_stride + g * size + j, x);
        });
      }
    for (std::int64_t first = 0; first < b.count; first += kTileRows) {
      const auto add_to = [&](float* sums) {
        return [&b, &wide, sums, first](int r, std::int64_t j, V::F x) {
          if (first + r >= b.count) return;
          float* to = wide(sums, b.columns[first + r]) + j;
          V::store(to, V::add(V::load(to), x));
        };
      };
      strip(ds_rows + first * U, U, U * b.width, q_rows, size, height / U, add_to(a.wide_dk));
      strip(p_rows + first * U, U, U * b.width, d_rows, size, height / U, add_to(a.wide_dv));
    }
  }
  for (std::int64_t row = tree[2]; row < tree[3]; ++row) {
    const std::int64_t to = row * a.dkv_stride + head * size;
    for (std::int64_t j = 0; j < size; j += V::width) {
      V::store(static_cast<T*>(a.dk) + to + j, V::load(wide(a.wide_dk, row) + j));
      V::store(static_cast<T*>(a.dv) + to + j, V::load(wide(a.wide_dv, row) + j));
    }
  }
}

template <class T>
void store_t(const Prompts& a, std::int64_t task) {
  const std::int64_t prompt = task / a.kv_heads, head = task % a.kv_heads;
  const std::int64_t count = a.start[prompt + 1] - a.start[prompt], width = omni::padded(count);
  const std::int64_t to = a.place[prompt] + head * width * a.size;
  const std::int32_t* number = a.columns + a.start[prompt];
  pack_across(static_cast<const T*>(a.k) + head * a.size, a.k_stride, number, count, a.size, width,
              static_cast<T*>(a.keys) + to);
  pack_along(static_cast<const T*>(a.v) + head * a.size, a.v_stride, number, count, a.size, width,
             static_cast<T*>(a.values) + to);
}

// One key against `size` numbers of a query, both dense.
template <class T>
inline float along(const T* q, const T* k, std::int64_t size) {
  V::F sum = V::set(0.0f);
  for (std::int64_t d = 0; d < size; d += V::width * kUnit<T>)
    sum = Unit<T>::add(sum, Unit<T>::many(q + d), Unit<T>::many(k + d));
  return static_cast<float>(V::sum(sum));
}

template <class T>
void decode_t(const Decode& a, std::int64_t task, void* scratch) {
  const V::FlushDenormals guard;
  const Prompts& shared = a.prompt;
  const std::int64_t prompt = task / shared.kv_heads, head = task % shared.kv_heads, size = shared.size;
  const std::int64_t group = a.heads / shared.kv_heads, count = shared.start[prompt + 1] - shared.start[prompt];
  const std::int64_t width = omni::padded(count), whole = width + omni::padded(a.own);
  const T* keys = static_cast<const T*>(shared.keys) + shared.place[prompt] + head * width * size;
  const T* values = static_cast<const T*>(shared.values) + shared.place[prompt] + head * width * size;
  const std::int32_t* rows = a.rows + a.row_start[prompt];
  const std::int64_t queries = (a.row_start[prompt + 1] - a.row_start[prompt]) * group;
  float* scores = static_cast<float*>(scratch);
  float* sums = scores + kRows * whole;
  T* q = reinterpret_cast<T*>(sums + kRows * size);
  T* p = q + kRows * size;
  const V::F c = V::set(static_cast<float>(a.scale * kLog2E));
  const auto own = [&](void* all, std::int64_t row) {
    return static_cast<T*>(all) + (row * shared.kv_heads + head) * a.capacity * size;
  };
  for (std::int64_t i = 0; i < queries; i += group) {
    const std::int64_t row = rows[i / group], at = (a.own - 1) * size;
    const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    std::memcpy(own(a.own_keys, row) + at, static_cast<const T*>(shared.k) + row * shared.k_stride + head * size,
                bytes);
    std::memcpy(own(a.own_values, row) + at, static_cast<const T*>(shared.v) + row * shared.v_stride + head * size,
                bytes);
  }
  for (std::int64_t first = 0; first < queries; first += kRows) {
    const std::int64_t here = queries - first < kRows ? queries - first : kRows;
    std::memset(q, 0, static_cast<std::size_t>(kRows * size) * sizeof(T));
    std::memset(p, 0, static_cast<std::size_t>(kRows * width) * sizeof(T));
    for (std::int64_t r = 0; r < here; ++r)
      std::memcpy(q + r * size,
                  static_cast<const T*>(a.q) + rows[(first + r) / group] * a.q_stride +
                      (head * group + (first + r) % group) * size,
                  static_cast<std::size_t>(size) * sizeof(T));
    strip(q, size, kUnit<T>, keys, width, size / kUnit<T>,
          [&](int r, std::int64_t j, V::F x) { V::store(scores + r * whole + j, x); });
    for (std::int64_t r = 0; r < here; ++r) {
      float* s = scores + r * whole;
      const T* key = own(a.own_keys, rows[(first + r) / group]);
      for (std::int64_t j = count; j < whole; ++j) s[j] = kNegInf;
      for (std::int64_t j = 0; j < a.own; ++j) s[width + j] = along(q + r * size, key + j * size, size);
      V::F most = V::set(kNegInf), total = V::set(0.0f);
      for (std::int64_t j = 0; j < whole; j += V::width) most = V::max(V::load(s + j), most);
      const V::F top = V::set(V::largest(most));
      for (std::int64_t j = 0; j < whole; j += V::width) {
        const V::F e = vexp2<5>(V::max(V::set(kTiny), V::mul(V::sub(V::load(s + j), top), c)));
        V::store(s + j, e);
        total = V::add(total, e);
      }
      const V::F inverse = V::set(static_cast<float>(1.0 / V::sum(total)));
      for (std::int64_t j = 0; j < whole; j += V::width) {
        const V::F x = V::mul(V::load(s + j), inverse);
        V::store(s + j, x);
        if (j < width) V::store(p + r * width + j, x);
      }
    }
    strip(p, width, kUnit<T>, values, size, width / kUnit<T>,
          [&](int r, std::int64_t j, V::F x) { V::store(sums + r * size + j, x); });
    for (std::int64_t r = 0; r < here; ++r) {
      const std::int64_t row = rows[(first + r) / group];
      const T* value = own(a.own_values, row);
      T* out = static_cast<T*>(a.out) + (row * a.heads + head * group + (first + r) % group) * size;
      for (std::int64_t d = 0; d < size; d += V::width) {
        V::F sum = V::load(sums + r * size + d);
        for (std::int64_t j = 0; j < a.own; ++j)
          sum = V::fma(V::set(scores[r * whole + width + j]), V::load(value + j * size + d), sum);
        V::store(out + d, sum);
      }
    }
  }
}

}  // namespace
