// The coefficient program of a loss (see ../cpu/program.h) in a form that travels as a kernel argument.
//
// Every register is written once, so constants and columns are put in place beforehand and only the arithmetic is left.
#pragma once
#include <cmath>
#include <cstdint>

#include "../cpu/program.h"
#include "plan.h"

namespace omni::cuda {

// Names in the order of omni::Op.
constexpr const char* kOpNames[] = {"const", "add",   "sub",     "mul",  "div", "neg", "abs",   "exp",      "expm1",
                                    "log",   "log1p", "sigmoid", "sqrt", "min", "max", "lt",    "le",       "gt",
                                    "ge",    "eq",    "ne",      "and",  "or",  "not", "where", "isfinite", "isnan"};
static_assert(sizeof(kOpNames) / sizeof(kOpNames[0]) == static_cast<int>(Op::kCount), "a name for each instruction");

constexpr int kMaxRegisters = 104, kMaxColumns = 16;  // as many registers as leave room for three blocks (plan.h)

struct Step {
  std::uint8_t op, dst, x, y, z, unused[3];
};

struct Constant {
  std::int32_t dst;
  float value;
};

struct Program {
  std::int32_t steps, constants, columns;
  std::int32_t a, b, z;              // result registers; -1: none
  const float* column[kMaxColumns];  // [rows] each: registers 3, 4, ...
  Constant constant[kMaxRegisters];
  Step step[kMaxRegisters];
};

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

// r: kMaxRegisters floats; 0, 1, 2 are logp, H and lse; columns and constants are in place.
OMNI_HD Coefficients run_program(const Program& p, float* r) {
  for (int i = 0; i < p.steps; ++i) {
    const Step s = p.step[i];
    r[s.dst] = evaluate(static_cast<Op>(s.op), r[s.x], r[s.y], r[s.z]);
  }
  return {p.a < 0 ? 0.0f : r[p.a], p.b < 0 ? 0.0f : r[p.b], p.z < 0 ? 0.0f : r[p.z]};
}

}  // namespace omni::cuda
