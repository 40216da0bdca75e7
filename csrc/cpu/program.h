// A coefficient program: the straight-line arithmetic from a row's (logp, H, lse) and its per-token columns to (a, b,
// z).
//
// It is no second copy of any loss: backends/program.py records it from losses.py, and this file only replays it.
// A register machine of floats; booleans are 0 and 1. Registers 0, 1, 2 hold logp, H and lse, then come the columns.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define OMNI_HD __host__ __device__ __forceinline__
#else
#define OMNI_HD inline
#endif

namespace omni {

enum class Op : std::int32_t {
  kConst,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kNeg,
  kAbs,
  kExp,
  kExpm1,
  kLog,
  kLog1p,
  kSigmoid,
  kSqrt,
  kMin,
  kMax,
  kLt,
  kLe,
  kGt,
  kGe,
  kEq,
  kNe,
  kAnd,
  kOr,
  kNot,
  kWhere,
  kIsFinite,
  kIsNan,
  kCount
};

// In the order of Op.
constexpr const char* kOpNames[] = {"const", "add",   "sub",     "mul",  "div", "neg", "abs",   "exp",      "expm1",
                                    "log",   "log1p", "sigmoid", "sqrt", "min", "max", "lt",    "le",       "gt",
                                    "ge",    "eq",    "ne",      "and",  "or",  "not", "where", "isfinite", "isnan"};
static_assert(sizeof(kOpNames) / sizeof(kOpNames[0]) == static_cast<int>(Op::kCount), "a name for each instruction");

// The larger one, or NaN if either is.
OMNI_HD float max_nan(float x, float y) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(x), "f"(y));
  return out;
#else
  return (x > y || x != x) ? x : y;
#endif
}

OMNI_HD float min_nan(float x, float y) { return -max_nan(-x, -y); }

// One instruction but kConst. Also the CUDA kernels' own.
OMNI_HD float evaluate(Op op, float x, float y, float z) {
  switch (op) {
    case Op::kAdd:
      return x + y;
    case Op::kSub:
      return x - y;
    case Op::kMul:
      return x * y;
    case Op::kDiv:
      return x / y;
    case Op::kNeg:
      return -x;
    case Op::kAbs:
      return fabsf(x);
    case Op::kExp:
      return expf(x);
    case Op::kExpm1:
      return expm1f(x);
    case Op::kLog:
      return logf(x);
    case Op::kLog1p:
      return log1pf(x);
    case Op::kSigmoid:
      return 1.0f / (1.0f + expf(-x));
    case Op::kSqrt:
      return sqrtf(x);
    case Op::kMin:
      return min_nan(x, y);
    case Op::kMax:
      return max_nan(x, y);
    case Op::kLt:
      return x < y;
    case Op::kLe:
      return x <= y;
    case Op::kGt:
      return x > y;
    case Op::kGe:
      return x >= y;
    case Op::kEq:
      return x == y;
    case Op::kNe:
      return x != y;
    case Op::kAnd:
      return x != 0.0f && y != 0.0f;
    case Op::kOr:
      return x != 0.0f || y != 0.0f;
    case Op::kNot:
      return x == 0.0f;
    case Op::kWhere:
      return x != 0.0f ? y : z;
    case Op::kIsFinite:
      return fabsf(x) <= 3.402823466e38f;
    case Op::kIsNan:
      return x != x;
    case Op::kConst:
    case Op::kCount:
      break;  // constants are in place, and there is no such instruction
  }
  return 0.0f;
}

struct Instruction {
  std::int32_t op, dst, x, y, z;
  float value;  // kConst
};

constexpr std::int32_t kMaxRegisters = 256;

struct Program {
  const Instruction* code;
  std::int32_t length, columns;
  const float* const* column;  // [columns] pointers to [rows] floats: registers 3, 4, ...
  std::int32_t a, b, z;        // result registers; -1: none
};

struct Coefficients {
  float a, b, z;  // dL/dlogp, dL/dH, weight of lse^2; 0 where the program has none
};

Coefficients run_program(const Program& program, std::int64_t row, float logp, float entropy, float lse);

}  // namespace omni
