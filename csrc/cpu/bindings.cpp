// The Python module omni_kernels._native_cpu: checks arguments, releases the GIL, runs the row kernels. No maths here.
//
// Tensors come as addresses with shapes; the caller (backends/cpu.py) owns them, has checked their devices and dtypes,
// and keeps them alive. What can be checked without touching them is checked again here, so that a slip is a
// ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "program.h"

namespace py = pybind11;
using namespace omni;

namespace {

void check_scale(float value, const char* name, std::int64_t row) {
  if (std::isfinite(value) && value > 0.0f) return;
  const std::string where = row < 0 ? "" : "[" + std::to_string(row) + "]";
  fail(std::string(name) + where + " = " + std::to_string(value) + " must be finite and greater than 0");
}

// Fills what the three entry points share.
Rows make_rows(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
               std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap) {
  if (dtype != 0 && dtype != 1) fail("dtype = " + std::to_string(dtype) + " must be 0 (float32) or 1 (bfloat16)");
  if (rows < 0) fail("rows = " + std::to_string(rows) + " must not be negative");
  if (vocab < 1) fail("vocab = " + std::to_string(vocab) + " must be at least 1");
  if (row_stride < vocab)
    fail("row_stride = " + std::to_string(row_stride) + " must be at least vocab = " + std::to_string(vocab));
  if (rows > 0 && row_stride > std::numeric_limits<std::int64_t>::max() / 4 / rows)
    fail("rows x row_stride exceeds the address space");
  Rows r{};
  r.dtype = static_cast<DType>(dtype);
  r.logits = dtype == 0 ? static_cast<void*>(at<float>(logits, "logits", rows > 0))
                        : static_cast<void*>(at<std::uint16_t>(logits, "logits", rows > 0));
  r.rows = rows;
  r.vocab = vocab;
  r.row_stride = row_stride;
  r.targets = at<std::int64_t>(targets, "targets", rows > 0);
  r.inv_t = inv_t;
  r.inv_t_rows = at<float>(inv_t_rows, "inv_temperature", false);
  r.softcap = softcap;
  if (softcap != 0.0f) check_scale(softcap, "softcap", -1);
  if (!r.inv_t_rows) check_scale(inv_t, "inv_temperature", -1);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t y = r.targets[i];
    if (y == kIgnore) continue;
    if (y < 0 || y >= vocab)
      fail("targets[" + std::to_string(i) + "] = " + std::to_string(y) + " is outside 0.." + std::to_string(vocab - 1) +
           "; use -100 for a row to ignore");
    if (r.inv_t_rows) check_scale(r.inv_t_rows[i], "inv_temperature", i);
  }
  return r;
}

void rows_forward(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                  std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap, std::uintptr_t logp,
                  std::uintptr_t entropy, std::uintptr_t lse, const How& how) {
  Rows r = make_rows(logits, dtype, rows, vocab, row_stride, targets, inv_t, inv_t_rows, softcap);
  r.logp = at<float>(logp, "logp", rows > 0);
  r.entropy = at<float>(entropy, "entropy", false);
  r.lse = at<float>(lse, "lse", rows > 0);
  r.want_entropy = r.entropy != nullptr;
  how.over_rows(rows, [&](std::int64_t begin, std::int64_t end) { how.kernels.forward(r, begin, end); });
}

void rows_backward(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                   std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap, std::uintptr_t lse,
                   std::uintptr_t entropy, std::uintptr_t a, std::uintptr_t b, float z_loss, std::uintptr_t z_loss_rows,
                   const How& how) {
  Rows r = make_rows(logits, dtype, rows, vocab, row_stride, targets, inv_t, inv_t_rows, softcap);
  r.lse = at<float>(lse, "lse", rows > 0);
  r.a = at<float>(a, "a", rows > 0);
  r.b = at<float>(b, "b", false);
  r.entropy = at<float>(entropy, "entropy", rows > 0 && r.b);
  r.z_loss = z_loss;
  r.z_loss_rows = at<float>(z_loss_rows, "z_loss", false);
  how.over_rows(rows, [&](std::int64_t begin, std::int64_t end) { how.kernels.backward(r, begin, end); });
}

// A checked program that owns its code; columns are bound at the call.
class CoefficientProgram {
 public:
  CoefficientProgram(const std::vector<std::tuple<int, int, int, int, int, float>>& code, int columns,
                     const std::tuple<int, int, int>& results)
      : columns_(columns), a_(std::get<0>(results)), b_(std::get<1>(results)), z_(std::get<2>(results)) {
    if (columns < 0 || columns > kMaxRegisters - 3) fail("columns = " + std::to_string(columns) + " is out of range");
    const auto reg = [](int index, const char* name) {
      if (index < 0 || index >= kMaxRegisters)
        fail(std::string(name) + " = " + std::to_string(index) + " is no register; a program has " +
             std::to_string(kMaxRegisters));
      return index;
    };
    for (const auto& [op, dst, x, y, z, value] : code) {
      if (op < 0 || op >= static_cast<int>(Op::kCount)) fail("op = " + std::to_string(op) + " is no instruction");
      code_.push_back({op, reg(dst, "dst"), reg(x, "x"), reg(y, "y"), reg(z, "z"), value});
    }
    for (const int result : {a_, b_, z_})
      if (result != -1) reg(result, "result");
  }
  int columns() const { return columns_; }
  bool has_entropy_gradient() const { return b_ >= 0; }
  Program bind(const float* const* column) const {
    return {code_.data(), static_cast<std::int32_t>(code_.size()), columns_, column, a_, b_, z_};
  }

 private:
  std::vector<Instruction> code_;
  std::int32_t columns_, a_, b_, z_;
};

void rows_fused(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap, std::uintptr_t logp,
                std::uintptr_t entropy, std::uintptr_t lse, const CoefficientProgram& program,
                const std::vector<std::uintptr_t>& columns, const How& how) {
  if (static_cast<int>(columns.size()) != program.columns())
    fail("columns has " + std::to_string(columns.size()) + " entries, the program reads " +
         std::to_string(program.columns()));
  Rows r = make_rows(logits, dtype, rows, vocab, row_stride, targets, inv_t, inv_t_rows, softcap);
  std::vector<const float*> column;
  for (const std::uintptr_t address : columns) column.push_back(at<float>(address, "columns", rows > 0));
  const Program bound = program.bind(column.data());
  r.program = &bound;
  r.logp = at<float>(logp, "logp", rows > 0);
  r.entropy = at<float>(entropy, "entropy", rows > 0 && program.has_entropy_gradient());
  r.lse = at<float>(lse, "lse", rows > 0);
  r.want_entropy = r.entropy != nullptr;
  how.over_rows(rows, [&](std::int64_t begin, std::int64_t end) { how.kernels.fused(r, begin, end); });
}

void vector_exp2(std::uintptr_t x, std::uintptr_t y, std::int64_t n, const std::string& isa) {
  if (n < 0) fail("n = " + std::to_string(n) + " must not be negative");
  kernels_named(isa).exp2(at<float>(x, "x", n > 0), at<float>(y, "y", n > 0), n);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"avx512_bf16", "avx512", "avx2", "portable"})
    if (select_kernels(name)) names.emplace_back(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native_cpu, m) {
  m.doc() = "Row kernels for CPUs; omni_kernels.backends.cpu is the interface to use.";
  m.def("instruction_sets", &instruction_sets, "What this processor runs, best first.");
  m.def(
      "thread_runtime", [] { return std::string(thread_runtime()); }, "'openmp' (shared with torch) or 'std::thread'.");
  m.attr("OPS") = std::vector<std::string>(std::begin(kOpNames), std::end(kOpNames));
  py::class_<CoefficientProgram>(m, "CoefficientProgram")
      .def(py::init<const std::vector<std::tuple<int, int, int, int, int, float>>&, int,
                    const std::tuple<int, int, int>&>());
  py::class_<How>(m, "How").def(py::init<int, const std::string&>());
  m.def("rows_forward", &rows_forward);
  m.def("rows_backward", &rows_backward);
  m.def("rows_fused", &rows_fused);
  m.attr("MATRIX_UNIT") = has_matrix_unit();
  m.attr("INTEL") = is_intel();
  bind_decoder(m);
  m.def("vector_exp2", &vector_exp2);
}
