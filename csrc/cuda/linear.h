// Log-probs of a language-model head in one kernel: logits exist only as accumulators. Compute capability 9.0.
#pragma once
#include <cstdint>
#include <string>

namespace omni::cuda {

struct LinearArgs {
  const void *hidden, *weight;  // bf16 [rows, depth] and [vocab, depth], contiguous, 16-byte aligned, depth % 64 == 0
  std::int64_t rows, vocab, depth;
  const float* bias;            // [vocab] or null
  const std::int64_t* targets;  // [rows]: 0 <= y < vocab, or kIgnore; any other makes the row NaN
  float inv_t;                  // used where inv_t_rows is null
  const float* inv_t_rows;      // [rows] or null
  float softcap;                // 0: none
  float* partial;               // workspace of linear_workspace_bytes(), 16-byte aligned
  float *logp, *entropy, *lse;  // [rows] out; entropy may be null
};

std::int64_t linear_workspace_bytes(std::int64_t rows, std::int64_t vocab);

// Enqueues two kernels; nothing is allocated and nothing waits. An empty string, or what CUDA reports.
std::string launch_linear_forward(const LinearArgs& args, int device, void* stream);

}  // namespace omni::cuda
