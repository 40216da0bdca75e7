#include "program.h"

namespace omni {

Coefficients run_program(const Program& program, std::int64_t row, float logp, float entropy, float lse) {
  float r[kMaxRegisters];
  r[0] = logp;
  r[1] = entropy;
  r[2] = lse;
  for (std::int32_t c = 0; c < program.columns; ++c) r[3 + c] = program.column[c][row];
  for (std::int32_t i = 0; i < program.length; ++i) {
    const Instruction& in = program.code[i];
    const Op op = static_cast<Op>(in.op);
    r[in.dst] = op == Op::kConst ? in.value : evaluate(op, r[in.x], r[in.y], r[in.z]);
  }
  const auto result = [&](std::int32_t index) { return index < 0 ? 0.0f : r[index]; };
  return {result(program.a), result(program.b), result(program.z)};
}

}  // namespace omni
