// The Python module omni_kernels._native_cuda: checks arguments, releases the GIL, enqueues kernels. No maths here.
//
// Tensors come as device addresses with shapes; the caller (backends/cuda.py) owns them, has checked their devices and
// dtypes, and keeps them alive. A stream is its handle as an integer. Nothing is allocated on the device and nothing
// waits for it, so every function can be captured into a CUDA graph. The values of device tensors are not looked at.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "linear.h"
#include "linear_plan.h"
#include "plan.h"
#include "program.h"
#include "rows.h"

namespace py = pybind11;
using omni::Op;
using namespace omni::cuda;

namespace {

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

void raise_on(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("CUDA: " + error);
}

template <class T>
T* at(std::uintptr_t address, const char* name, bool required) {
  if (required && address == 0) fail(std::string(name) + " is a null address; pass the data_ptr() of a tensor");
  if (address % alignof(T))
    fail(std::string(name) + " is not aligned to its elements; pass the data_ptr() of a tensor");
  return reinterpret_cast<T*>(address);
}

void check_scale(float value, const char* name) {
  if (!std::isfinite(value) || value <= 0.0f)
    fail(std::string(name) + " = " + std::to_string(value) + " must be finite and greater than 0");
}

RowArgs make_rows(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                  std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap) {
  if (dtype != 0 && dtype != 1) fail("dtype = " + std::to_string(dtype) + " must be 0 (float32) or 1 (bfloat16)");
  if (rows < 0) fail("rows = " + std::to_string(rows) + " must not be negative");
  if (vocab < 1 || vocab > std::numeric_limits<std::int32_t>::max() / 4)
    fail("vocab = " + std::to_string(vocab) + " must be at least 1, and fit on chip");
  if (row_stride < vocab)
    fail("row_stride = " + std::to_string(row_stride) + " must be at least vocab = " + std::to_string(vocab));
  RowArgs r{};
  r.logits = dtype == 0 ? static_cast<void*>(at<float>(logits, "logits", rows > 0))
                        : static_cast<void*>(at<std::uint16_t>(logits, "logits", rows > 0));
  r.rows = rows;
  r.row_stride = row_stride;
  r.vocab = static_cast<std::int32_t>(vocab);
  r.targets = at<std::int64_t>(targets, "targets", rows > 0);
  r.inv_t = inv_t;
  r.inv_t_rows = at<float>(inv_t_rows, "inv_temperature", false);
  r.softcap = softcap;
  if (softcap != 0.0f) check_scale(softcap, "softcap");
  if (!r.inv_t_rows) check_scale(inv_t, "inv_temperature");
  return r;
}

void rows_forward(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                  std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap, std::uintptr_t logp,
                  std::uintptr_t entropy, std::uintptr_t lse, int device, std::uintptr_t stream) {
  const py::gil_scoped_release release;
  RowArgs r = make_rows(logits, dtype, rows, vocab, row_stride, targets, inv_t, inv_t_rows, softcap);
  r.logp = at<float>(logp, "logp", rows > 0);
  r.entropy = at<float>(entropy, "entropy", false);
  r.lse = at<float>(lse, "lse", rows > 0);
  if (rows == 0) return;
  raise_on(
      launch_rows(RowMode::kForward, static_cast<DType>(dtype), r, Program{}, device, reinterpret_cast<void*>(stream)));
}

void rows_backward(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                   std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap, std::uintptr_t lse,
                   std::uintptr_t entropy, std::uintptr_t a, std::uintptr_t b, float z_loss, std::uintptr_t z_loss_rows,
                   int device, std::uintptr_t stream) {
  const py::gil_scoped_release release;
  RowArgs r = make_rows(logits, dtype, rows, vocab, row_stride, targets, inv_t, inv_t_rows, softcap);
  r.lse = at<float>(lse, "lse", rows > 0);
  r.a = at<float>(a, "a", rows > 0);
  r.b = at<float>(b, "b", false);
  r.entropy = at<float>(entropy, "entropy", rows > 0 && r.b);
  r.z_loss = z_loss;
  r.z_loss_rows = at<float>(z_loss_rows, "z_loss", false);
  if (rows == 0) return;
  raise_on(launch_rows(RowMode::kBackward, static_cast<DType>(dtype), r, Program{}, device,
                       reinterpret_cast<void*>(stream)));
}

// A checked program; columns are bound at the call.
class CoefficientProgram {
 public:
  CoefficientProgram(const std::vector<std::tuple<int, int, int, int, int, float>>& code, int columns,
                     const std::tuple<int, int, int>& results) {
    if (columns < 0 || columns > kMaxColumns) fail("columns = " + std::to_string(columns) + " is out of range");
    program_.columns = columns;
    int next = 3 + columns;
    for (const auto& [op, dst, x, y, z, value] : code) {
      if (op < 0 || op >= static_cast<int>(Op::kCount)) fail("op = " + std::to_string(op) + " is no instruction");
      if (dst != next++) fail("dst = " + std::to_string(dst) + " is not the next register");
      if (dst >= kMaxRegisters) fail("the program needs more than " + std::to_string(kMaxRegisters) + " registers");
      const auto source = [dst = dst](int index) {
        if (index < 0 || index >= dst) fail("register " + std::to_string(index) + " is read before it is written");
        return static_cast<std::uint8_t>(index);
      };
      if (static_cast<Op>(op) == Op::kConst) {
        program_.constant[program_.constants++] = {dst, value};
      } else {
        program_.step[program_.steps++] = {
            static_cast<std::uint8_t>(op), static_cast<std::uint8_t>(dst), source(x), source(y), source(z), {}};
      }
    }
    const auto result = [next](int index) {
      if (index < -1 || index >= next) fail("result = " + std::to_string(index) + " is no register");
      return index;
    };
    program_.a = result(std::get<0>(results));
    program_.b = result(std::get<1>(results));
    program_.z = result(std::get<2>(results));
  }
  int columns() const { return program_.columns; }
  Program bind(const std::vector<const float*>& column) const {
    Program bound = program_;
    for (std::size_t k = 0; k < column.size(); ++k) bound.column[k] = column[k];
    return bound;
  }

 private:
  Program program_{};
};

void rows_fused(std::uintptr_t logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t row_stride,
                std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap, std::uintptr_t logp,
                std::uintptr_t entropy, std::uintptr_t lse, const CoefficientProgram& program,
                const std::vector<std::uintptr_t>& columns, int device, std::uintptr_t stream) {
  if (static_cast<int>(columns.size()) != program.columns())
    fail("columns has " + std::to_string(columns.size()) + " entries, the program reads " +
         std::to_string(program.columns()));
  const py::gil_scoped_release release;
  RowArgs r = make_rows(logits, dtype, rows, vocab, row_stride, targets, inv_t, inv_t_rows, softcap);
  r.logp = at<float>(logp, "logp", rows > 0);
  r.entropy = at<float>(entropy, "entropy", false);
  r.lse = at<float>(lse, "lse", rows > 0);
  std::vector<const float*> column;
  for (const std::uintptr_t address : columns) column.push_back(at<float>(address, "columns", rows > 0));
  if (rows == 0) return;
  raise_on(launch_rows(RowMode::kFused, static_cast<DType>(dtype), r, program.bind(column), device,
                       reinterpret_cast<void*>(stream)));
}

std::tuple<int, int, int> plan_of(std::int64_t vocab, int dtype) {
  const RowPlan plan = row_plan(vocab, static_cast<DType>(dtype));
  return {plan.cluster, plan.slice_vectors, plan.shared_bytes};
}

void check_linear(std::int64_t rows, std::int64_t vocab, float inv_t, const float* inv_t_rows, float softcap) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max() / 2;
  if (rows < 0 || rows > most) fail("rows = " + std::to_string(rows) + " is out of range");
  if (vocab < 1 || vocab > most) fail("vocab = " + std::to_string(vocab) + " is out of range");
  if (softcap != 0.0f) check_scale(softcap, "softcap");
  if (!inv_t_rows) check_scale(inv_t, "inv_temperature");
}

// values, references and folds of the exponentials to keep, or nothing.
Exponentials make_exponentials(const std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>& exps) {
  const auto& [values, references, folds] = exps;
  if (values % kVectorBytes || folds % kVectorBytes) fail("exponentials must start at multiples of 16 bytes");
  return {at<std::uint16_t>(values, "values", false), at<float>(references, "references", values != 0),
          at<float>(folds, "folds", values != 0)};
}

void linear_forward(std::uintptr_t hidden, std::uintptr_t weight, std::int64_t rows, std::int64_t vocab,
                    std::int64_t depth, std::uintptr_t bias, std::uintptr_t targets, float inv_t,
                    std::uintptr_t inv_t_rows, float softcap, std::uintptr_t workspace, std::uintptr_t logp,
                    std::uintptr_t entropy, std::uintptr_t lse,
                    const std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>& exps, int device,
                    std::uintptr_t stream) {
  const py::gil_scoped_release release;
  const bool some = rows > 0;
  LinearArgs args{};
  args.inv_t_rows = at<float>(inv_t_rows, "inv_temperature", false);
  check_linear(rows, vocab, inv_t, args.inv_t_rows, softcap);
  if (depth < kTileDepth || depth % kTileDepth || depth > std::numeric_limits<std::int32_t>::max() / 2)
    fail("depth = " + std::to_string(depth) + " must be a multiple of " + std::to_string(kTileDepth));
  for (const std::uintptr_t matrix : {hidden, weight, workspace})
    if (matrix % kVectorBytes) fail("hidden, weight and workspace must start at multiples of 16 bytes");
  args.hidden = at<std::uint16_t>(hidden, "hidden", some);
  args.weight = at<std::uint16_t>(weight, "weight", some);
  args.rows = rows;
  args.vocab = vocab;
  args.depth = depth;
  args.bias = at<float>(bias, "bias", false);
  args.targets = at<std::int64_t>(targets, "targets", some);
  args.inv_t = inv_t;
  args.softcap = softcap;
  args.partial = at<float>(workspace, "workspace", some);
  args.logp = at<float>(logp, "logp", some);
  args.entropy = at<float>(entropy, "entropy", false);
  args.lse = at<float>(lse, "lse", some);
  args.exps = make_exponentials(exps);
  if (some) raise_on(launch_linear_forward(args, device, reinterpret_cast<void*>(stream)));
}

void linear_gradient(const std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>& exps, std::int64_t rows,
                     std::int64_t vocab, std::uintptr_t targets, float inv_t, std::uintptr_t inv_t_rows, float softcap,
                     std::uintptr_t a, std::uintptr_t b, std::uintptr_t z, std::uintptr_t factor, int device,
                     std::uintptr_t stream) {
  const py::gil_scoped_release release;
  const bool some = rows > 0;
  GradientArgs args{};
  args.inv_t_rows = at<float>(inv_t_rows, "inv_temperature", false);
  check_linear(rows, vocab, inv_t, args.inv_t_rows, softcap);
  args.exps = make_exponentials(exps);
  if (some && !args.exps.values) fail("values is a null address; pass what linear_forward has written");
  args.rows = rows;
  args.vocab = vocab;
  args.targets = at<std::int64_t>(targets, "targets", some);
  args.inv_t = inv_t;
  args.softcap = softcap;
  args.a = at<float>(a, "a", some);
  args.b = at<float>(b, "b", false);
  args.z = at<float>(z, "z", false);
  args.factor = at<float>(factor, "factor", some);
  if (some) raise_on(launch_linear_gradient(args, device, reinterpret_cast<void*>(stream)));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "Kernels for GPUs of compute capability 9.0; omni_kernels.backends.cuda is the interface to use.";
  m.attr("OPS") = std::vector<std::string>(std::begin(omni::kOpNames), std::end(omni::kOpNames));
  py::class_<CoefficientProgram>(m, "CoefficientProgram")
      .def(py::init<const std::vector<std::tuple<int, int, int, int, int, float>>&, int,
                    const std::tuple<int, int, int>&>());
  m.attr("MAX_REGISTERS") = kMaxRegisters;
  m.def("row_plan", &plan_of, "(blocks a row or 0, 16-byte vectors a block, bytes of shared memory a block)");
  m.def("rows_forward", &rows_forward);
  m.def("rows_backward", &rows_backward);
  m.def("rows_fused", &rows_fused);
  m.def("linear_workspace_bytes", &linear_workspace_bytes);
  m.def("linear_pitch", &exp_pitch, "columns from one row of exponentials to the next");
  m.def("linear_forward", &linear_forward);
  m.def("linear_gradient", &linear_gradient);
}
