// The row kernels' contract, shared by every instruction set and by the bindings.
//
// A row is one token: V logits u_j, a target y, an inverse temperature inv_T and, if asked, a softcap:
//     z_j  = inv_T * u_j                              (softcap c: inv_T * c * tanh(u_j / c))
//     lse  = log sum_j exp z_j,  p_j = exp(z_j - lse),  logp = z_y - lse,  H = lse - sum_j p_j z_j
//     g_j  = a (1[j=y] - p_j) - b p_j (log p_j + H) + 2 z lse p_j      a = dL/dlogp, b = dL/dH, z: weight of lse^2
//     du_j = g_j inv_T                                (softcap: times 1 - tanh^2(u_j / c))
// A row whose target is kIgnore gives logp = H = lse = 0 and du = 0, and its logits are never read; neither are those
// of a row with a = b = z = 0. Nothing is allocated.
#pragma once
#include <cstdint>

#include "decoder.h"
#include "dtype.h"
#include "product.h"

namespace omni {

constexpr std::int64_t kIgnore = -100;
constexpr std::int64_t kBlock = 2048;  // columns folded in fp32 before a look at the reference: at most 8 KiB, in L1

struct Program;

struct Rows {
  void* logits;  // [rows, vocab], row_stride elements from row to row; overwritten by backward and fused
  DType dtype;
  std::int64_t rows, vocab, row_stride;
  const std::int64_t* targets;  // [rows]: 0 <= y < vocab, or kIgnore
  float inv_t;                  // used where inv_t_rows is null
  const float* inv_t_rows;      // [rows] or null
  float softcap;                // 0: none
  bool want_entropy;
  float* logp;               // [rows] out (forward, fused)
  float* entropy;            // [rows] out (forward, fused, where wanted), in (backward, where b is given)
  float* lse;                // [rows] out (forward, fused), in (backward)
  const float* a;            // [rows] (backward)
  const float* b;            // [rows] or null (backward)
  float z_loss;              // used where z_loss_rows is null
  const float* z_loss_rows;  // [rows] or null
  const Program* program;    // (fused) gives a, b, z of a row
};

// Each function handles rows [begin, end).
struct RowKernels {
  const char* name;
  void (*forward)(const Rows&, std::int64_t begin, std::int64_t end);
  void (*backward)(const Rows&, std::int64_t begin, std::int64_t end);
  void (*fused)(const Rows&, std::int64_t begin, std::int64_t end);
  void (*exp2)(const float* x, float* y, std::int64_t n);  // the kernels' own 2^x, to be tested for its ulps
  DecoderKernels decoder;
  ProductKernels<std::uint16_t> product_bf16;
  ProductKernels<float> product_fp32;
};

extern const RowKernels kPortable;
#if defined(OMNI_X86)
extern const RowKernels kAvx2;
extern const RowKernels kAvx512;
extern const RowKernels kAvx512Bf16;  // rounds to bf16 in one instruction
#endif

// The best set this processor runs, or the named one; null when the name is unknown or the processor cannot run it.
const RowKernels* select_kernels(const char* name);

template <class T>
const ProductKernels<T>& products(const RowKernels& kernels) {
  if constexpr (kUnit<T> == 1)
    return kernels.product_fp32;
  else
    return kernels.product_bf16;
}

// Whether the processor has AMX, whose products of bf16 these kernels do not have and torch does.
bool has_matrix_unit();

// Whether torch's GEMM library runs its AVX-512 code here; on others' processors MKL 2024 stays with AVX2.
bool is_intel();

}  // namespace omni
