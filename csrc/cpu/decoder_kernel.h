// The kernels of decoder.h, written once over a vector type V (vec_*.h). Included after rows_kernel.h, whose
// exponential and element access it uses, and under the same rules: an unnamed namespace, no templates of the standard
// library.
//
// Everything is computed in fp32 and rounded where a result is stored; y of norm and gate is rounded twice, as
// transformers' layers round. Products of bf16 multiply pairs: a tile reads A's rows two columns at a time and B as
// pairs of rows side by side, [rows / 2, columns, 2]; fp32 has single elements in place of pairs.
#pragma once
#include "attention_kernel.h"
#include "decoder.h"

namespace {

using omni::Gate;
using omni::kNormRows;
using omni::Norm;
using omni::Rotary;

template <class T>
inline V::F rounded(V::F x) {
  if constexpr (sizeof(T) == 2)
    return V::as_bf16(x);
  else
    return x;
}

// fn(column, lanes) over a row of n columns: whole vectors, then what is left.
template <class T>
inline V::F get(const T* p, std::int64_t j, int lanes, float fill = 0.0f) {
  return lanes == V::width ? V::load(p + j) : V::load_part(p + j, lanes, fill);
}
template <class T>
inline void put(T* p, std::int64_t j, int lanes, V::F x) {
  if (lanes == V::width)
    V::store(p + j, x);
  else
    V::store_part(p + j, lanes, x);
}
template <class Fn>
inline void columns(std::int64_t n, Fn fn) {
  std::int64_t j = 0;
  for (; j + V::width <= n; j += V::width) fn(j, V::width);
  if (j < n) fn(j, static_cast<int>(n - j));
}

template <class T>
void norm_forward_t(const Norm& a, std::int64_t begin, std::int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (std::int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(a.x) + i * a.width;
    V::F squares = V::set(0.0f);
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + i * a.width;
      T* sum = static_cast<T*>(a.sum) + i * a.width;
      columns(a.width, [&](std::int64_t j, int lanes) {
        const V::F s = rounded<T>(V::add(get(x, j, lanes), get(residual, j, lanes)));
        put(sum, j, lanes, s);
        squares = V::fma(s, s, squares);
      });
      x = sum;
    } else {
      columns(a.width, [&](std::int64_t j, int lanes) {
        const V::F s = get(x, j, lanes);
        squares = V::fma(s, s, squares);
      });
    }
    a.inverse[i] = static_cast<float>(1.0 / ::sqrt(V::sum(squares) / static_cast<double>(a.width) + a.eps));
    const V::F inverse = V::set(a.inverse[i]);
    T* y = static_cast<T*>(a.y) + i * a.width;
    columns(a.width, [&](std::int64_t j, int lanes) {
      put(y, j, lanes, V::mul(get(weight, j, lanes), rounded<T>(V::mul(get(x, j, lanes), inverse))));
    });
  }
}

template <class T>
void norm_backward_t(const Norm& a, std::int64_t begin, std::int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t first = task * kNormRows, last = first + kNormRows < a.rows ? first + kNormRows : a.rows;
    float* dweight = a.dweight ? a.dweight + task * a.width : nullptr;
    if (dweight) std::memset(dweight, 0, static_cast<std::size_t>(a.width) * sizeof(float));
    for (std::int64_t i = first; i < last; ++i) {
      const T *x = static_cast<const T*>(a.x) + i * a.width, *dy = static_cast<const T*>(a.dy) + i * a.width;
      const T* dsum = a.dsum ? static_cast<const T*>(a.dsum) + i * a.width : nullptr;
      T* dx = static_cast<T*>(a.dx) + i * a.width;
      const V::F inverse = V::set(a.inverse[i]);
      V::F along = V::set(0.0f);
      columns(a.width, [&](std::int64_t j, int lanes) {
        const V::F g = get(dy, j, lanes), normal = V::mul(get(x, j, lanes), inverse);
        along = V::fma(V::mul(g, get(weight, j, lanes)), normal, along);
        if (dweight) put(dweight, j, lanes, V::fma(g, normal, get(dweight, j, lanes)));
      });
      const V::F mean = V::set(static_cast<float>(V::sum(along) / static_cast<double>(a.width)));
      columns(a.width, [&](std::int64_t j, int lanes) {
        const V::F g = V::mul(get(dy, j, lanes), get(weight, j, lanes)), normal = V::mul(get(x, j, lanes), inverse);
        V::F d = V::mul(V::fnma(normal, mean, g), inverse);
        if (dsum) d = V::add(d, get(dsum, j, lanes));
        put(dx, j, lanes, d);
      });
    }
  }
}

// 1 / (1 + exp(-x)). The exponent is held where 2^n is finite; a NaN stays.
inline V::F sigmoid(V::F x) {
  const V::F y = V::mul(x, V::set(static_cast<float>(-kLog2E)));
  const V::F one = V::set(1.0f);
  return V::div(one, V::add(one, vexp2<6>(V::min(V::set(126.0f), V::max(V::set(-126.0f), y)))));
}

template <class T>
void gate_forward_t(const Gate& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T *gate = static_cast<const T*>(a.gate) + i * a.stride, *up = static_cast<const T*>(a.up) + i * a.stride;
    T* y = static_cast<T*>(a.y) + i * a.width;
    columns(a.width, [&](std::int64_t j, int lanes) {
      const V::F g = get(gate, j, lanes);
      put(y, j, lanes, V::mul(rounded<T>(V::mul(g, sigmoid(g))), get(up, j, lanes)));
    });
  }
}

template <class T>
void gate_backward_t(const Gate& a, std::int64_t begin, std::int64_t end) {
  const V::F one = V::set(1.0f);
  for (std::int64_t i = begin; i < end; ++i) {
    const T *gate = static_cast<const T*>(a.gate) + i * a.stride, *up = static_cast<const T*>(a.up) + i * a.stride;
    const T* dy = static_cast<const T*>(a.dy) + i * a.width;
    T *y = static_cast<T*>(a.y) + i * a.width, *dgate = static_cast<T*>(a.dgate) + i * a.stride;
    T* dup = static_cast<T*>(a.dup) + i * a.stride;
    columns(a.width, [&](std::int64_t j, int lanes) {
      const V::F g = get(gate, j, lanes), u = get(up, j, lanes), d = get(dy, j, lanes), s = sigmoid(g);
      const V::F open = rounded<T>(V::mul(g, s));
      put(y, j, lanes, V::mul(open, u));
      put(dup, j, lanes, V::mul(d, open));
      // silu' = s (1 + g (1 - s))
      put(dgate, j, lanes, V::mul(V::mul(d, u), V::mul(s, V::fma(g, V::sub(one, s), one))));
    });
  }
}

template <class T>
void rotate_t(const Rotary& a, std::int64_t begin, std::int64_t end) {
  const std::int64_t half = a.size / 2;
  for (std::int64_t i = begin; i < end; ++i) {
    const T *cos = static_cast<const T*>(a.cos) + i * a.size, *sin = static_cast<const T*>(a.sin) + i * a.size;
    for (std::int64_t head = 0; head < a.heads; ++head) {
      const T* x = static_cast<const T*>(a.x) + i * a.stride + head * a.size;
      T* y = static_cast<T*>(a.y) + i * a.out_stride + head * a.size;
      columns(half, [&](std::int64_t j, int lanes) {
        const V::F x1 = get(x, j, lanes), x2 = get(x, half + j, lanes);
        const V::F c1 = get(cos, j, lanes), c2 = get(cos, half + j, lanes);
        const V::F s1 = get(sin, j, lanes), s2 = get(sin, half + j, lanes);
        if (a.backward) {
          put(y, j, lanes, V::fma(x2, s2, V::mul(x1, c1)));
          put(y, half + j, lanes, V::fnma(x1, s1, V::mul(x2, c2)));
        } else {
          put(y, j, lanes, V::fnma(x2, s1, V::mul(x1, c1)));
          put(y, half + j, lanes, V::fma(x1, s2, V::mul(x2, c2)));
        }
      });
    }
  }
}

void norm_forward(const Norm& a, std::int64_t begin, std::int64_t end) {
  return a.dtype == DType::kFloat32 ? norm_forward_t<float>(a, begin, end)
                                    : norm_forward_t<std::uint16_t>(a, begin, end);
}
void norm_backward(const Norm& a, std::int64_t begin, std::int64_t end) {
  return a.dtype == DType::kFloat32 ? norm_backward_t<float>(a, begin, end)
                                    : norm_backward_t<std::uint16_t>(a, begin, end);
}
void gate_forward(const Gate& a, std::int64_t begin, std::int64_t end) {
  return a.dtype == DType::kFloat32 ? gate_forward_t<float>(a, begin, end)
                                    : gate_forward_t<std::uint16_t>(a, begin, end);
}
void gate_backward(const Gate& a, std::int64_t begin, std::int64_t end) {
  return a.dtype == DType::kFloat32 ? gate_backward_t<float>(a, begin, end)
                                    : gate_backward_t<std::uint16_t>(a, begin, end);
}
void rotate(const Rotary& a, std::int64_t begin, std::int64_t end) {
  return a.dtype == DType::kFloat32 ? rotate_t<float>(a, begin, end) : rotate_t<std::uint16_t>(a, begin, end);
}
void attend_forward(const Attention& a, std::int64_t task, void* scratch) {
  return a.dtype == DType::kFloat32 ? attend_forward_t<float>(a, task, scratch)
                                    : attend_forward_t<std::uint16_t>(a, task, scratch);
}
void attend_backward(const Attention& a, std::int64_t task, void* scratch) {
  return a.dtype == DType::kFloat32 ? attend_backward_t<float>(a, task, scratch)
                                    : attend_backward_t<std::uint16_t>(a, task, scratch);
}

void store(const Prompts& a, std::int64_t task) {
  return a.dtype == DType::kFloat32 ? store_t<float>(a, task) : store_t<std::uint16_t>(a, task);
}
void decode(const Decode& a, std::int64_t task, void* scratch) {
  return a.prompt.dtype == DType::kFloat32 ? decode_t<float>(a, task, scratch)
                                           : decode_t<std::uint16_t>(a, task, scratch);
}

constexpr omni::DecoderKernels kDecoder = {&norm_forward,   &norm_backward,   &gate_forward, &gate_backward, &rotate,
                                           &attend_forward, &attend_backward, &store,        &decode};

}  // namespace
