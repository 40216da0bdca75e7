// The row kernels of compute capability 9.0. Contract and quantities are those of ../cpu/rows.h, on device memory.
#pragma once
#include <cstdint>
#include <string>

#include "plan.h"
#include "program.h"

namespace omni::cuda {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };
enum class RowMode : int { kForward, kBackward, kFused };

struct RowArgs {
  void* logits;  // [rows, vocab], row_stride elements from row to row; overwritten by backward and fused
  std::int64_t rows, row_stride;
  std::int32_t vocab, slice_vectors;
  const std::int64_t* targets;  // [rows]: 0 <= y < vocab, or kIgnore; any other makes the row NaN
  float inv_t;                  // used where inv_t_rows is null
  const float* inv_t_rows;      // [rows] or null
  float softcap;                // 0: none
  float* logp;                  // [rows] out (forward, fused)
  float* entropy;               // [rows] or null; out (forward, fused), in (backward)
  float* lse;                   // [rows] out (forward, fused), in (backward)
  const float* a;               // [rows] (backward)
  const float* b;               // [rows] or null (backward)
  float z_loss;                 // used where z_loss_rows is null
  const float* z_loss_rows;     // [rows] or null
};

// How rows of so many logits are laid out; cluster 0: they do not fit on chip.
RowPlan row_plan(std::int64_t vocab, DType dtype);

// Enqueues the kernel; nothing is allocated and nothing waits. An empty string, or what CUDA reports.
std::string launch_rows(RowMode mode, DType dtype, RowArgs args, const Program& program, int device, void* stream);

}  // namespace omni::cuda
