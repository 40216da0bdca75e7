// The coefficient program of a loss (see ../cpu/program.h) in a form that travels as a kernel argument.
//
// Every register is written once, so constants and columns are put in place beforehand and only the arithmetic is left.
#pragma once
#include <cmath>
#include <cstdint>

#include "../cpu/program.h"

namespace omni::cuda {

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

// r: kMaxRegisters floats; 0, 1, 2 are logp, H and lse; columns and constants are in place.
OMNI_HD Coefficients run_program(const Program& p, float* r) {
  for (int i = 0; i < p.steps; ++i) {
    const Step s = p.step[i];
    r[s.dst] = evaluate(static_cast<Op>(s.op), r[s.x], r[s.y], r[s.z]);
  }
  return {p.a < 0 ? 0.0f : r[p.a], p.b < 0 ? 0.0f : r[p.b], p.z < 0 ? 0.0f : r[p.z]};
}

}  // namespace omni::cuda
