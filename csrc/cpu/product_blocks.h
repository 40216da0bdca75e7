// Products of whole matrices: cut into tasks, and what is not packed yet packed by the block, in memory that stays in
// the second cache. No matrix is ever copied as a whole.
//
// How a matrix has the inner dimension: along its rows (A [m, k], B^T [n, k]), or down its columns (A^T [k, m],
// B [k, n]). Of those down columns any number of rows is right; along rows it is one of whole units.
//
// Sums do not depend on how tasks are cut, nor a row of C on the others.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

#include "product.h"

namespace omni {

enum class Inner { kAlong, kDown, kPacked };

template <class T>
struct Operands {
  const T *a, *b;
  Inner a_inner, b_inner;           // a: kAlong or kDown, b: any; one of them at most is packed here
  std::int64_t a_stride, b_stride;  // elements from row to row, of what is not packed
  std::int64_t m, n, k;
  void* c;
  std::int64_t c_stride;
  Out out;             // bf16 and B kDown: kBFloat16
  std::uint16_t* low;  // for halves; and for bf16 and B kDown with more than kDepth rows, as large as c
  float scale;
};

template <class T>
constexpr std::int64_t kDepth = 512 * kUnit<T>;    // rows of B that are packed at a time
constexpr std::int64_t kBlockTiles = 16;           // of A, that stay in the second cache together
constexpr std::int64_t kPackedBytes = 384 * 1024;  // of B

constexpr std::int64_t parts_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// A thread's own memory on whole cache lines, kept from call to call: fresh memory costs page faults.
template <class T>
T* block_memory(std::int64_t elements) {
  struct Memory {
    ~Memory() { ::operator delete(start, std::align_val_t(64)); }
    void* start = nullptr;
    std::size_t size = 0;
  };
  static thread_local Memory memory;
  const std::size_t bytes = static_cast<std::size_t>(elements) * sizeof(T);
  if (memory.size < bytes) {
    ::operator delete(memory.start, std::align_val_t(64));
    memory.size = 0;
    memory.start = ::operator new(bytes, std::align_val_t(64));
    memory.size = bytes;
  }
  return static_cast<T*>(memory.start);
}

// Where a task's part of C begins.
template <class T>
void move_c(Product<T>& p, const Operands<T>& o, std::int64_t row, std::int64_t column) {
  const std::int64_t place = row * o.c_stride + column;
  const bool wide = o.out == Out::kFloat32 || o.out == Out::kAdd;
  p.c = wide ? static_cast<void*>(static_cast<float*>(o.c) + place)
             : static_cast<void*>(static_cast<std::uint16_t*>(o.c) + place);
  p.low = o.low ? o.low + place : nullptr;
}

template <class T>
Product<T> rows_of_a(const Operands<T>& o) {
  Product<T> p{};
  p.a = o.a, p.m = o.m, p.n = o.n;
  p.a_tile = kTileRows * o.a_stride, p.a_row = o.a_stride, p.a_unit = kUnit<T>;
  p.c_stride = o.c_stride, p.out = o.out, p.scale = o.scale;
  return p;
}

// A [m, k] times panels that are there.
template <class T>
void multiply_packed(const ProductKernels<T>& kernels, const Operands<T>& o, std::int64_t tile, std::int64_t last_tile,
                            std::int64_t panel, std::int64_t last_panel) {
  Product<T> p = rows_of_a(o);
  p.b = o.b, p.k = o.k;
  move_c(p, o, 0, 0);
  kernels.multiply(p, tile, last_tile, panel, last_panel);
}

// How much of the inner dimension is packed at a time; of B^T all of it.
template <class T>
std::int64_t depth_of(const Operands<T>& o) {
  return o.b_inner == Inner::kDown && o.k > kDepth<T> ? kDepth<T> : o.k;
}

// A [m, k] times B, of which panels are packed kDepth rows at a time, or times B^T, of which whole panels are.
template <class T>
void multiply_packing_b(const ProductKernels<T>& kernels, const Operands<T>& o, std::int64_t tile,
                        std::int64_t last_tile, std::int64_t panel, std::int64_t last_panel) {
  const std::int64_t deep = depth_of(o), left = o.n - panel * kPanel;
  T* packed = block_memory<T>((last_panel - panel) * kPanel * deep);
  Product<T> p = rows_of_a(o);
  move_c(p, o, 0, panel * kPanel);
  p.b = packed, p.n = left;
  for (std::int64_t start = 0; start < o.k; start += deep) {
    p.a = o.a + start;
    p.k = o.k - start < deep ? o.k - start : deep;
    if (o.b_inner == Inner::kDown)
      kernels.pack_panels(o.b + start * o.b_stride + panel * kPanel, o.b_stride, left, p.k, p.k / kUnit<T>, 0,
                          last_panel - panel, packed);
    else
      for (std::int64_t j = 0; j < last_panel - panel; ++j)
        kernels.pack_transposed(o.b + (panel + j) * kPanel * o.b_stride, o.b_stride, left - j * kPanel, p.k, 0,
                                packed + j * kPanel * p.k);
    const bool first = start == 0, last = start + deep >= o.k;
    if (o.out == Out::kBFloat16) {
      p.out = first && last ? o.out : first ? Out::kHalves : last ? Out::kRound : Out::kAddHalves;
    } else if (!first && o.out == Out::kFloat32) {
      p.out = Out::kAdd, p.scale = 1;
    }
    for (std::int64_t t = tile; t < last_tile; t += kBlockTiles)
      kernels.multiply(p, t, t + kBlockTiles < last_tile ? t + kBlockTiles : last_tile, 0, last_panel - panel);
  }
}

// A, of whose transpose [k, m] tiles are packed, times panels that are there.
template <class T>
void multiply_packing_a(const ProductKernels<T>& kernels, const Operands<T>& o, std::int64_t tile,
                               std::int64_t last_tile, std::int64_t panel, std::int64_t last_panel) {
  const std::int64_t units = parts_of(o.k, kUnit<T>), deep = units * kUnit<T>, row = tile * kTileRows;
  T* packed = block_memory<T>((last_tile - tile) * kTileRows * deep);
  Product<T> p{};
  p.a = packed, p.b = o.b, p.tiled = true;
  p.m = o.m - row, p.n = o.n, p.k = deep;
  p.a_tile = kTileRows * deep, p.a_row = kUnit<T>, p.a_unit = kUnit<T> * kTileRows;
  p.c_stride = o.c_stride, p.out = o.out, p.scale = o.scale;
  move_c(p, o, row, 0);
  kernels.pack_tiles(o.a + row, o.a_stride, o.m - row, o.k, units, 0, last_tile - tile, packed);
  kernels.multiply(p, 0, last_tile - tile, panel, last_panel);
}

// over(count, body): calls body(begin, end) over ranges that cover [0, count), on `threads` threads.
template <class T, class Over>
void multiply_matrices(const ProductKernels<T>& kernels, const Operands<T>& o, int threads, const Over& over) {
  const std::int64_t tiles = parts_of(o.m, kTileRows), panels = parts_of(o.n, kPanel);
  if (tiles == 0) return;
  const bool packs_a = o.a_inner == Inner::kDown, packs_b = o.b_inner != Inner::kPacked;
  // A task is some tiles of rows by some panels. What it packs is used for all of the other side, unless there would be
  // too few tasks; and each thread gets as many of them.
  const auto even = [&](std::int64_t count, std::int64_t most) {
    const std::int64_t shared = parts_of(count, threads) * threads;
    return shared < most ? shared : most;
  };
  std::int64_t across, along;
  if (packs_b) {
    const std::int64_t most = kPackedBytes / (static_cast<std::int64_t>(sizeof(T)) * kPanel * depth_of(o));
    along = even(parts_of(panels, most < 1 ? 1 : most), panels);
    across = along < threads ? even(parts_of(threads, along), tiles) : 1;
  } else {
    across = parts_of(tiles, kBlockTiles);
    if (packs_a) across = even(across, tiles);
    along = packs_a ? 1 : parts_of(8 * threads, across);
    if (along > panels) along = panels;
  }
  const auto kernel = packs_a ? multiply_packing_a<T> : packs_b ? multiply_packing_b<T> : multiply_packed<T>;
  over(across * along, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t i = task / along, j = task % along;
      kernel(kernels, o, tiles * i / across, tiles * (i + 1) / across, panels * j / along, panels * (j + 1) / along);
    }
  });
}

}  // namespace omni
