// A coefficient program: the straight-line arithmetic from a row's (logp, H, lse) and its per-token columns to (a, b,
// z).
//
// It is no second copy of any loss: backends/program.py records it from losses.py, and this file only replays it.
// A register machine of floats; booleans are 0 and 1. Registers 0, 1, 2 hold logp, H and lse, then come the columns.
#pragma once
#include <cstdint>

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
