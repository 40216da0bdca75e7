#include "program.h"

#include <cmath>

namespace omni {

// torch's minimum, maximum and clamp propagate NaN; std::fmin would drop it.
static float min_nan(float x, float y) { return (x < y || x != x) ? x : y; }
static float max_nan(float x, float y) { return (x > y || x != x) ? x : y; }

Coefficients run_program(const Program& program, std::int64_t row, float logp, float entropy, float lse) {
  float r[kMaxRegisters];
  r[0] = logp;
  r[1] = entropy;
  r[2] = lse;
  for (std::int32_t c = 0; c < program.columns; ++c) r[3 + c] = program.column[c][row];
  for (std::int32_t i = 0; i < program.length; ++i) {
    const Instruction& in = program.code[i];
    const float x = r[in.x], y = r[in.y];
    float v = 0.0f;
    switch (static_cast<Op>(in.op)) {
      case Op::kConst:
        v = in.value;
        break;
      case Op::kAdd:
        v = x + y;
        break;
      case Op::kSub:
        v = x - y;
        break;
      case Op::kMul:
        v = x * y;
        break;
      case Op::kDiv:
        v = x / y;
        break;
      case Op::kNeg:
        v = -x;
        break;
      case Op::kAbs:
        v = std::fabs(x);
        break;
      case Op::kExp:
        v = std::exp(x);
        break;
      case Op::kExpm1:
        v = std::expm1(x);
        break;
      case Op::kLog:
        v = std::log(x);
        break;
      case Op::kLog1p:
        v = std::log1p(x);
        break;
      case Op::kSigmoid:
        v = 1.0f / (1.0f + std::exp(-x));
        break;
      case Op::kSqrt:
        v = std::sqrt(x);
        break;
      case Op::kMin:
        v = min_nan(x, y);
        break;
      case Op::kMax:
        v = max_nan(x, y);
        break;
      case Op::kLt:
        v = x < y;
        break;
      case Op::kLe:
        v = x <= y;
        break;
      case Op::kGt:
        v = x > y;
        break;
      case Op::kGe:
        v = x >= y;
        break;
      case Op::kEq:
        v = x == y;
        break;
      case Op::kNe:
        v = x != y;
        break;
      case Op::kAnd:
        v = x != 0.0f && y != 0.0f;
        break;
      case Op::kOr:
        v = x != 0.0f || y != 0.0f;
        break;
      case Op::kNot:
        v = x == 0.0f;
        break;
      case Op::kWhere:
        v = x != 0.0f ? y : r[in.z];
        break;
      case Op::kIsFinite:
        v = std::isfinite(x);
        break;
      case Op::kIsNan:
        v = std::isnan(x);
        break;
      case Op::kCount:
        break;
    }
    r[in.dst] = v;
  }
  const auto result = [&](std::int32_t index) { return index < 0 ? 0.0f : r[index]; };
  return {result(program.a), result(program.b), result(program.z)};
}

}  // namespace omni
