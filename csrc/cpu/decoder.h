// What a decoder layer computes beside its linear layers: the contract, shared by every instruction set. Every function
// handles a range of independent tasks, nothing is allocated, and results do not depend on how tasks are spread over
// threads.
//
//   norm    s = x + residual (if given);  y = w round(s / sqrt(mean(s^2) + eps))
//   gate    y = round(silu(g)) u
//   rotate  y = x cos + (-x2, x1) sin, of the halves x1, x2 of a head; backwards with -sin
//   attend  softmax(scale q k + bias) v over blocks of rows that share their columns, as prefix trees are cut
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "product.h"

namespace omni {

constexpr std::int64_t kNormRows = 32;  // rows of one task of norm_backward, whose weight gradients are summed together

struct Norm {
  DType dtype;
  std::int64_t rows, width;
  const void *x, *residual, *weight;  // [rows, width], the same or null, [width]; backward: x is the sum
  float eps;
  void *sum, *y;          // out (forward): [rows, width]; sum only with a residual
  float* inverse;         // [rows] out (forward), in (backward)
  const void *dy, *dsum;  // (backward) [rows, width]; gradient of the sum itself, or null
  void* dx;               // out (backward) [rows, width]: of x, and of the residual
  float* dweight;         // out (backward) [ceil(rows / kNormRows), width], to be summed over the first, or null
};

struct Gate {
  DType dtype;
  std::int64_t rows, width, stride;  // stride: from row to row of gate, up and their gradients; all others are dense
  const void *gate, *up;
  void* y;            // out: [rows, width]; backward: the same again, for the gradient of what follows
  const void* dy;     // (backward)
  void *dgate, *dup;  // out (backward)
};

struct Rotary {
  DType dtype;
  std::int64_t rows, heads, size, stride, out_stride;  // strides from row to row
  const void *x, *cos, *sin;                           // [rows, heads, size], [rows, size] twice
  void* y;
  bool backward;
};

// Blocks of rows; the blocks of one tree (equal columns among them) belong to one task, one key head at a time.
struct Attention {
  DType dtype;
  std::int64_t heads, kv_heads, size, trees;
  std::int64_t q_stride, k_stride, v_stride;  // from row to row
  const std::int64_t* tree;   // [trees, 4]: first block, one past the last, first row, one past the last
  const std::int64_t* block;  // [blocks, 5]: place in `rows`, rows, place in `columns`, columns, place in `bias`
  const std::int32_t *rows, *columns;  // row numbers of the blocks' rows and columns
  const std::uint16_t* bias;           // bf16, 0 or -inf: a row of padded(columns) for each row of a block
  const void *q, *k, *v;               // [all rows, heads or kv_heads, size]
  float scale;
  void* out;           // [all rows, heads, size], dense
  float* lse;          // [all rows, heads], in units of log 2: out (forward), in (backward)
  const void* dout;    // (backward) dense
  void *dq, *dk, *dv;  // out (backward), rows dq_stride and dkv_stride apart
  std::int64_t dq_stride, dkv_stride;
  float *wide_dk, *wide_dv;  // (backward) [all rows, kv_heads, size] to sum in
};

// Columns of a block as its tiles see them.
constexpr std::int64_t padded(std::int64_t columns) { return (columns + 31) / 32 * 32; }

// Bytes that one task of attend_forward or attend_backward needs for a block of so many rows and columns.
constexpr std::size_t attention_bytes(std::int64_t group, std::int64_t rows, std::int64_t columns, std::int64_t size,
                                      bool backward) {
  const std::int64_t c = padded(columns), r = group * ((rows + kTileRows - 1) / kTileRows * kTileRows);
  const std::int64_t tile = kTileRows * (2 * c + 2 * size + 2 * c);
  return static_cast<std::size_t>(4 *
                                  (backward ? 3 * c * size + 2 * r * size + 2 * r * c + tile : 2 * c * size + tile)) +
         64;
}

// The prompts of a wave that decodes in lockstep: keys and values of each once, packed for all rows that go on from it.
struct Prompts {
  DType dtype;
  std::int64_t prompts, kv_heads, size, k_stride, v_stride;
  const std::int64_t *start, *place;  // [prompts + 1]: its part of `columns`; [prompts]: its part of keys and of values
  const std::int32_t* columns;        // rows of k and v
  const void *k, *v;                  // in, of store
  void *keys, *values;                // out: kv_heads x padded(columns) x size of each prompt
};

// One token a row: the row attends to its prompt and to the tokens that it has made itself, this one the last of `own`.
struct Decode {
  Prompts prompt;
  std::int64_t heads, q_stride, capacity, own;
  const std::int64_t* row_start;  // [prompts + 1]: its part of `rows`
  const std::int32_t* rows;
  const void* q;                // [rows, heads, size]; prompt.k and prompt.v: this token's, [rows, kv_heads, size]
  void *own_keys, *own_values;  // [rows, kv_heads, capacity, size], of which this token's column is written
  float scale;
  void* out;  // [rows, heads, size], dense
};

// Bytes that one task of decode needs for a prompt of so many columns.
constexpr std::size_t decode_bytes(std::int64_t columns, std::int64_t own, std::int64_t size) {
  return static_cast<std::size_t>(kTileRows * 4 * (2 * padded(columns) + padded(own) + 3 * size)) + 64;
}

struct DecoderKernels {
  void (*norm_forward)(const Norm&, std::int64_t begin, std::int64_t end);     // rows
  void (*norm_backward)(const Norm&, std::int64_t begin, std::int64_t end);    // tasks of kNormRows rows
  void (*gate_forward)(const Gate&, std::int64_t begin, std::int64_t end);     // rows
  void (*gate_backward)(const Gate&, std::int64_t begin, std::int64_t end);    // rows
  void (*rotate)(const Rotary&, std::int64_t begin, std::int64_t end);         // rows
  void (*attend_forward)(const Attention&, std::int64_t task, void* scratch);  // tasks: trees x kv_heads
  void (*attend_backward)(const Attention&, std::int64_t task, void* scratch);
  void (*store)(const Prompts&, std::int64_t task);  // tasks: prompts x kv_heads
  void (*decode)(const Decode&, std::int64_t task, void* scratch);
};

}  // namespace omni
