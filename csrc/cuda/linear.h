// Log-probs of a language-model head in one kernel: logits exist only as accumulators. Compute capability 9.0.
//
// A loss that makes its gradient at once keeps the exponentials (linear_math.h says in what form), from which one more
// small kernel, given dloss/dlogp and its kin, makes matrices that dX and dW are plain products of.
#pragma once
#include <cstdint>
#include <string>

#include "linear_plan.h"

namespace omni::cuda {

struct Exponentials {
  std::uint16_t* values;  // bf16 [rows, exp_pitch(vocab)], 16-byte aligned; null: they are not kept
  float* references;      // [rows, column tiles]
  float* folds;           // [rows, 4]: the merged (m, s, t, v_target); 16-byte aligned
};

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
  Exponentials exps;            // out
};

struct GradientArgs {
  Exponentials exps;  // as linear_forward left them; values become, but for `factor`, dloss/dlogits
  std::int64_t rows, vocab;
  const std::int64_t* targets;
  float inv_t;
  const float* inv_t_rows;
  float softcap;
  const float *a, *b, *z;  // [rows]: dloss/dlogp, dloss/dentropy, the weight of lse^2; b and z may be null
  float* factor;           // [rows] out: what each row is to be multiplied by
};

std::int64_t linear_workspace_bytes(std::int64_t rows, std::int64_t vocab);

// Enqueues two kernels; nothing is allocated and nothing waits. An empty string, or what CUDA reports.
std::string launch_linear_forward(const LinearArgs& args, int device, void* stream);

// Enqueues a kernel. Where b is null and there is no softcap it reads and writes next to nothing.
std::string launch_linear_gradient(const GradientArgs& args, int device, void* stream);

}  // namespace omni::cuda
