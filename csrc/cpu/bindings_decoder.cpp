// The decoder's kernels and products in the Python module: omni_kernels/decoder.py is the interface to use. Addresses,
// shapes and strides come from there, checked; numbers that would make a kernel leave its tensors are checked again
// here.
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "product_blocks.h"

namespace omni {
namespace {

using Address = std::uintptr_t;

DType dtype_of(int dtype) {
  if (dtype != 0 && dtype != 1) fail("dtype = " + std::to_string(dtype) + " must be 0 (float32) or 1 (bfloat16)");
  return static_cast<DType>(dtype);
}

void at_least(std::int64_t value, std::int64_t least, const char* name) {
  if (value < least)
    fail(std::string(name) + " = " + std::to_string(value) + " must be at least " + std::to_string(least));
}

template <class T = void>
T* there(Address address, const char* name, std::int64_t rows = 1) {
  if (address == 0 && rows > 0) fail(std::string(name) + " is a null address; pass the data_ptr() of a tensor");
  return reinterpret_cast<T*>(address);
}

template <class T = void>
T* maybe(Address address) {
  return reinterpret_cast<T*>(address);
}

Norm norm_of(int dtype, std::int64_t rows, std::int64_t width, Address x, Address weight, Address inverse) {
  at_least(rows, 0, "rows");
  at_least(width, 1, "width");
  Norm a{};
  a.dtype = dtype_of(dtype);
  a.rows = rows;
  a.width = width;
  a.x = there(x, "x", rows);
  a.weight = there(weight, "weight");
  a.inverse = there<float>(inverse, "inverse", rows);
  return a;
}

void norm_forward(int dtype, std::int64_t rows, std::int64_t width, Address x, Address residual, Address weight,
                  float eps, Address sum, Address y, Address inverse, const How& how) {
  Norm a = norm_of(dtype, rows, width, x, weight, inverse);
  a.residual = maybe(residual);
  a.eps = eps;
  a.sum = there(sum, "sum", residual ? rows : 0);
  a.y = there(y, "y", rows);
  how.over_rows(rows, [&](std::int64_t begin, std::int64_t end) { how.kernels.decoder.norm_forward(a, begin, end); });
}

void norm_backward(int dtype, std::int64_t rows, std::int64_t width, Address x, Address weight, Address inverse,
                   Address dy, Address dsum, Address dx, Address dweight, const How& how) {
  Norm a = norm_of(dtype, rows, width, x, weight, inverse);
  a.dy = there(dy, "dy", rows);
  a.dsum = maybe(dsum);
  a.dx = there(dx, "dx", rows);
  a.dweight = maybe<float>(dweight);
  how.over((rows + kNormRows - 1) / kNormRows, 1,
           [&](std::int64_t begin, std::int64_t end) { how.kernels.decoder.norm_backward(a, begin, end); });
}

void gate(int dtype, std::int64_t rows, std::int64_t width, std::int64_t stride, Address gate, Address up, Address y,
          Address dy, Address dgate, Address dup, const How& how) {
  at_least(rows, 0, "rows");
  at_least(width, 1, "width");
  at_least(stride, width, "stride");
  Gate a{};
  a.dtype = dtype_of(dtype);
  a.rows = rows;
  a.width = width;
  a.stride = stride;
  a.gate = there(gate, "gate", rows);
  a.up = there(up, "up", rows);
  a.y = there(y, "y", rows);
  a.dy = maybe(dy);
  a.dgate = there(dgate, "dgate", dy ? rows : 0);
  a.dup = there(dup, "dup", dy ? rows : 0);
  const auto kernel = dy ? how.kernels.decoder.gate_backward : how.kernels.decoder.gate_forward;
  how.over_rows(rows, [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
}

void rotate(int dtype, std::int64_t rows, std::int64_t heads, std::int64_t size, std::int64_t stride,
            std::int64_t out_stride, Address x, Address cos, Address sin, Address y, bool backward, const How& how) {
  at_least(rows, 0, "rows");
  at_least(heads, 1, "heads");
  at_least(size, 2, "size");
  if (size % 2) fail("size = " + std::to_string(size) + " must be even");
  at_least(stride, heads * size, "stride");
  at_least(out_stride, heads * size, "out_stride");
  Rotary a{};
  a.dtype = dtype_of(dtype);
  a.rows = rows;
  a.heads = heads;
  a.size = size;
  a.stride = stride;
  a.out_stride = out_stride;
  a.x = there(x, "x", rows);
  a.cos = there(cos, "cos", rows);
  a.sin = there(sin, "sin", rows);
  a.y = there(y, "y", rows);
  a.backward = backward;
  how.over_rows(rows, [&](std::int64_t begin, std::int64_t end) { how.kernels.decoder.rotate(a, begin, end); });
}

void check_heads(std::int64_t heads, std::int64_t kv_heads, std::int64_t size) {
  at_least(kv_heads, 1, "kv_heads");
  if (heads < 1 || heads % kv_heads) fail("heads = " + std::to_string(heads) + " must be a multiple of kv_heads");
  if (size < 32 || size % 32) fail("size = " + std::to_string(size) + " must be a multiple of 32");
}

// The blocks of an attention over trees, checked once; calls bind tensors to them.
class TreeBlocks {
 public:
  using List = std::pair<Address, std::int64_t>;  // and how many elements there are
  // Copies the lists: trees, blocks, rows, columns, bias.
  explicit TreeBlocks(const std::array<List, 5>& lists)
      : trees_(copied<std::int64_t>(lists[0])),
        blocks_(copied<std::int64_t>(lists[1])),
        rows_(copied<std::int32_t>(lists[2])),
        columns_(copied<std::int32_t>(lists[3])),
        bias_(copied<std::uint16_t>(lists[4])) {
    const std::int64_t count = static_cast<std::int64_t>(blocks_.size() / 5);
    if (trees_.size() % 4 || blocks_.size() % 5) fail("trees must have 4 numbers each and blocks 5");
    for (std::size_t t = 0; t < trees_.size(); t += 4) {
      if (trees_[t] < 0 || trees_[t] > trees_[t + 1] || trees_[t + 1] > count || trees_[t + 2] < 0 ||
          trees_[t + 2] > trees_[t + 3])
        fail("tree " + std::to_string(t / 4) + " has blocks or rows out of order");
      all_ = trees_[t + 3] > all_ ? trees_[t + 3] : all_;
      for (std::int64_t b = trees_[t]; b < trees_[t + 1]; ++b) check(b, trees_[t + 2], trees_[t + 3]);
    }
  }

  std::int64_t rows() const { return all_; }
  std::size_t bytes(std::int64_t group, std::int64_t size, bool backward) const {
    std::size_t most = 0;
    for (std::size_t b = 0; b < blocks_.size(); b += 5) {
      const std::size_t own = attention_bytes(group, blocks_[b + 1], blocks_[b + 3], size, backward);
      most = own > most ? own : most;
    }
    return most;
  }
  void bind(Attention& a) const {
    a.trees = static_cast<std::int64_t>(trees_.size() / 4);
    a.tree = trees_.data();
    a.block = blocks_.data();
    a.rows = rows_.data();
    a.columns = columns_.data();
    a.bias = bias_.data();
  }

 private:
  template <class T>
  static std::vector<T> copied(const List& list) {
    at_least(list.second, 0, "count");
    const T* first = there<const T>(list.first, "a list of the blocks", list.second);
    return std::vector<T>(first, first + list.second);
  }
  void check(std::int64_t index, std::int64_t first, std::int64_t last) const {
    const std::int64_t* b = blocks_.data() + 5 * index;
    const auto inside = [](std::int64_t start, std::int64_t length, std::size_t size) {
      const std::int64_t all = static_cast<std::int64_t>(size);
      return start >= 0 && length >= 1 && length <= all && start <= all - length;
    };
    if (!inside(b[0], b[1], rows_.size()) || !inside(b[2], b[3], columns_.size()) ||
        !inside(b[4], b[1] * padded(b[3]), bias_.size()))
      fail("block " + std::to_string(index) + " reaches beyond its rows, columns or bias");
    for (std::int64_t i = 0; i < b[1]; ++i) in_tree(rows_[static_cast<std::size_t>(b[0] + i)], first, last, index);
    for (std::int64_t i = 0; i < b[3]; ++i) in_tree(columns_[static_cast<std::size_t>(b[2] + i)], first, last, index);
  }
  static void in_tree(std::int64_t row, std::int64_t first, std::int64_t last, std::int64_t index) {
    if (row < first || row >= last)
      fail("block " + std::to_string(index) + " names row " + std::to_string(row) + " outside its tree");
  }

  std::vector<std::int64_t> trees_, blocks_;
  std::vector<std::int32_t> rows_, columns_;
  std::vector<std::uint16_t> bias_;
  std::int64_t all_ = 0;
};

// What attention forward and backward begin with: dtype; rows, heads, kv_heads, size; q, k and v, each with its stride;
// scale; lse.
using Attended = std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, Address, std::int64_t, Address,
                            std::int64_t, Address, std::int64_t, float, Address>;

Attention attention_of(const TreeBlocks& trees, const Attended& given) {
  const auto& [dtype, rows, heads, kv_heads, size, q, q_stride, k, k_stride, v, v_stride, scale, lse] = given;
  check_heads(heads, kv_heads, size);
  if (rows < trees.rows())
    fail("the trees have " + std::to_string(trees.rows()) + " rows, the tensors " + std::to_string(rows));
  at_least(q_stride, heads * size, "q_stride");
  at_least(k_stride, kv_heads * size, "k_stride");
  at_least(v_stride, kv_heads * size, "v_stride");
  Attention a{};
  a.dtype = dtype_of(dtype);
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.size = size;
  a.q_stride = q_stride;
  a.k_stride = k_stride;
  a.v_stride = v_stride;
  a.q = there(q, "q", rows);
  a.k = there(k, "k", rows);
  a.v = there(v, "v", rows);
  a.scale = scale;
  a.lse = there<float>(lse, "lse", rows);
  trees.bind(a);
  return a;
}

// Memory for one range of tasks, on whole cache lines.
struct Scratch {
  explicit Scratch(std::size_t bytes) : start(::operator new(bytes, std::align_val_t(64))) {}
  ~Scratch() { ::operator delete(start, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* const start;
};

// The cache of a wave: which columns each prompt has, which rows go on from it.
class Wave {
 public:
  Wave(const std::vector<std::vector<std::int32_t>>& columns, std::int64_t kv_heads, std::int64_t size)
      : kv_heads_(kv_heads), size_(size), start_{0}, row_start_(columns.size() + 1) {
    check_heads(kv_heads, kv_heads, size);
    for (const auto& own : columns) {
      at_least(static_cast<std::int64_t>(own.size()), 1, "columns of a prompt");
      for (const std::int32_t column : own) {
        at_least(column, 0, "a column");
        tokens_ = column >= tokens_ ? std::int64_t{column} + 1 : tokens_;
      }
      columns_.insert(columns_.end(), own.begin(), own.end());
      start_.push_back(static_cast<std::int64_t>(columns_.size()));
      place_.push_back(numbers_);
      numbers_ += kv_heads * padded(static_cast<std::int64_t>(own.size())) * size;
      most_ = static_cast<std::int64_t>(own.size()) > most_ ? static_cast<std::int64_t>(own.size()) : most_;
    }
  }
  std::int64_t numbers() const { return numbers_; }
  // Which prompt each row goes on from.
  void assign(const std::vector<std::int64_t>& prompt_of_row) {
    std::vector<std::int64_t> start(row_start_.size());
    std::vector<std::int32_t> rows(prompt_of_row.size());
    for (const std::int64_t prompt : prompt_of_row) {
      if (prompt < 0 || prompt >= static_cast<std::int64_t>(place_.size())) fail("a row has no prompt");
      ++start[static_cast<std::size_t>(prompt) + 1];
    }
    for (std::size_t p = 1; p < start.size(); ++p) start[p] += start[p - 1];
    row_start_ = start;
    for (std::size_t row = 0; row < rows.size(); ++row)
      rows[static_cast<std::size_t>(start[static_cast<std::size_t>(prompt_of_row[row])]++)] =
          static_cast<std::int32_t>(row);
    rows_ = rows;
  }
  void store(int dtype, std::int64_t tokens, Address k, Address v, std::int64_t stride, Address keys, Address values,
             const How& how) const {
    at_least(tokens, tokens_, "tokens");
    const Prompts a = prompts_of(dtype, k, v, stride, keys, values);
    how.over(a.prompts * kv_heads_, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) how.kernels.decoder.store(a, task);
    });
  }
  void decode(int dtype, std::int64_t rows, std::int64_t heads, Address q, Address k, Address v, std::int64_t stride,
              Address keys, Address values, Address own_keys, Address own_values, std::int64_t capacity,
              std::int64_t own, float scale, Address out, const How& how) const {
    if (rows != static_cast<std::int64_t>(rows_.size())) fail("the wave has " + std::to_string(rows_.size()) + " rows");
    check_heads(heads, kv_heads_, size_);
    at_least(stride, heads * size_, "stride");
    at_least(own, 1, "own");
    at_least(capacity, own, "capacity");
    Decode a{};
    a.prompt = prompts_of(dtype, k, v, stride, keys, values);
    a.heads = heads;
    a.q_stride = stride;
    a.capacity = capacity;
    a.own = own;
    a.row_start = row_start_.data();
    a.rows = rows_.data();
    a.q = there(q, "q", rows);
    a.own_keys = there(own_keys, "own_keys", rows);
    a.own_values = there(own_values, "own_values", rows);
    a.scale = scale;
    a.out = there(out, "out", rows);
    const std::size_t bytes = decode_bytes(most_, own, size_);
    how.over(a.prompt.prompts * kv_heads_, 1, [&](std::int64_t begin, std::int64_t end) {
      const Scratch scratch(bytes);
      for (std::int64_t task = begin; task < end; ++task) how.kernels.decoder.decode(a, task, scratch.start);
    });
  }

 private:
  Prompts prompts_of(int dtype, Address k, Address v, std::int64_t stride, Address keys, Address values) const {
    at_least(stride, kv_heads_ * size_, "stride");
    Prompts a{};
    a.dtype = dtype_of(dtype);
    a.prompts = static_cast<std::int64_t>(place_.size());
    a.kv_heads = kv_heads_;
    a.size = size_;
    a.k_stride = a.v_stride = stride;
    a.start = start_.data();
    a.place = place_.data();
    a.columns = columns_.data();
    a.k = there(k, "k");
    a.v = there(v, "v");
    a.keys = there(keys, "keys");
    a.values = there(values, "values");
    return a;
  }

  std::int64_t kv_heads_, size_, numbers_ = 0, most_ = 0, tokens_ = 0;
  std::vector<std::int64_t> start_, place_, row_start_;
  std::vector<std::int32_t> columns_, rows_;
};

template <class Kernel>
void over_trees(const TreeBlocks& trees, const Attention& a, bool backward, const How& how, Kernel kernel) {
  const std::size_t bytes = trees.bytes(a.heads / a.kv_heads, a.size, backward);
  how.over(a.trees * a.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    const Scratch scratch(bytes);
    for (std::int64_t task = begin; task < end; ++task) kernel(a, task, scratch.start);
  });
}

void attend_forward(const TreeBlocks& trees, const Attended& given, Address out, const How& how) {
  Attention a = attention_of(trees, given);
  a.out = there(out, "out", std::get<1>(given));
  over_trees(trees, a, false, how, how.kernels.decoder.attend_forward);
}

void attend_backward(const TreeBlocks& trees, const Attended& given, Address dout, Address dq, std::int64_t dq_stride,
                     Address dk, Address dv, std::int64_t dkv_stride, Address wide_dk, Address wide_dv,
                     const How& how) {
  const std::int64_t rows = std::get<1>(given);
  Attention a = attention_of(trees, given);
  at_least(dq_stride, a.heads * a.size, "dq_stride");
  at_least(dkv_stride, a.kv_heads * a.size, "dkv_stride");
  a.dout = there(dout, "dout", rows);
  a.dq = there(dq, "dq", rows);
  a.dq_stride = dq_stride;
  a.dkv_stride = dkv_stride;
  a.dk = there(dk, "dk", rows);
  a.dv = there(dv, "dv", rows);
  a.wide_dk = there<float>(wide_dk, "wide_dk", rows);
  a.wide_dv = there<float>(wide_dv, "wide_dv", rows);
  over_trees(trees, a, true, how, how.kernels.decoder.attend_backward);
}

// body(zero): zero of the type that holds an element.
template <class Body>
void with_element(int dtype, const Body& body) {
  if (dtype_of(dtype) == DType::kFloat32)
    body(float{});
  else
    body(std::uint16_t{});
}

void whole_units(std::int64_t k, std::int64_t unit) {
  if (k % unit) fail("k = " + std::to_string(k) + " must be even");
}

void pack(int dtype, Address from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t units,
          bool transposed, Address to, const How& how) {
  at_least(n, 1, "n");
  at_least(k, 1, "k");
  at_least(stride, transposed ? k : n, "stride");
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    const ProductKernels<T>& kernels = products<T>(how.kernels);
    const T* source = there<const T>(from, "from");
    T* target = there<T>(to, "to");
    if (transposed)
      whole_units(k, kUnit<T>);
    else
      at_least(units, parts_of(k, kUnit<T>), "units");
    how.over(parts_of(n, kPanel), 1, [&](std::int64_t begin, std::int64_t end) {
      if (!transposed) return kernels.pack_panels(source, stride, n, k, units, begin, end, target);
      for (std::int64_t panel = begin; panel < end; ++panel)
        kernels.pack_transposed(source, stride, n, k, panel, target);
    });
  });
}

Inner inner_of(const std::string& name, const char* which) {
  if (name == "along") return Inner::kAlong;
  if (name == "down") return Inner::kDown;
  if (name == "packed") return Inner::kPacked;
  fail(std::string(which) + " = '" + name + "' must be 'along', 'down' or 'packed'");
}

Out out_of(int dtype, int out, bool deep) {
  const bool wide = dtype_of(dtype) == DType::kFloat32;
  const Out first = wide ? Out::kFloat32 : Out::kBFloat16;
  const Out last = wide || deep ? Out::kAdd : Out::kRound;
  if (out < static_cast<int>(first) || out > static_cast<int>(last))
    fail("out = " + std::to_string(out) + " must be between " + std::to_string(static_cast<int>(first)) + " and " +
         std::to_string(static_cast<int>(last)) + " here");
  return static_cast<Out>(out);
}

// a, b: address, stride from row to row (packed: any), where the inner dimension lies.
using Side = std::tuple<Address, std::int64_t, std::string>;

void multiply(int dtype, const Side& a, const Side& b, std::int64_t m, std::int64_t n, std::int64_t k, Address c,
              std::int64_t c_stride, int out, Address low, float scale, const How& how) {
  at_least(m, 0, "m");
  at_least(n, 1, "n");
  at_least(k, 1, "k");
  at_least(c_stride, n, "c_stride");
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    Operands<T> o{};
    o.a = there<const T>(std::get<0>(a), "a", m);
    o.b = there<const T>(std::get<0>(b), "b");
    o.a_stride = std::get<1>(a);
    o.b_stride = std::get<1>(b);
    o.a_inner = inner_of(std::get<2>(a), "a");
    o.b_inner = inner_of(std::get<2>(b), "b");
    if (o.a_inner == Inner::kPacked) fail("a is packed; only b may be");
    if (o.a_inner == Inner::kDown && o.b_inner != Inner::kPacked) fail("a lies down its columns; pack b");
    if (o.a_inner == Inner::kAlong) whole_units(k, kUnit<T>);
    at_least(o.a_stride, o.a_inner == Inner::kAlong ? k : m, "a's stride");
    if (o.b_inner != Inner::kPacked) at_least(o.b_stride, o.b_inner == Inner::kAlong ? k : n, "b's stride");
    o.m = m;
    o.n = n;
    o.k = k;
    o.c = there(c, "c", m);
    o.c_stride = c_stride;
    o.out = out_of(dtype, out, o.b_inner == Inner::kDown);
    const bool waits = o.out == Out::kBFloat16 && o.b_inner == Inner::kDown && k > kDepth<T>;
    o.low = there<std::uint16_t>(low, "low", o.out >= Out::kHalves || waits ? m : 0);
    o.scale = scale;
    multiply_matrices(products<T>(how.kernels), o, how.threads,
                      [&](std::int64_t tasks, const auto& body) { how.over(tasks, 1, body); });
  });
}

}  // namespace

void bind_decoder(py::module_& m) {
  m.attr("NORM_ROWS") = kNormRows;
  m.attr("PANEL") = kPanel;
  m.attr("DEPTH") = kDepth<std::uint16_t>;
  m.def("norm_forward", &norm_forward);
  m.def("norm_backward", &norm_backward);
  m.def("gate", &gate);
  m.def("rotate", &rotate);
  py::class_<TreeBlocks>(m, "TreeBlocks").def(py::init<const std::array<TreeBlocks::List, 5>&>());
  m.def("attend_forward", &attend_forward);
  m.def("attend_backward", &attend_backward);
  py::class_<Wave>(m, "Wave")
      .def(py::init<const std::vector<std::vector<std::int32_t>>&, std::int64_t, std::int64_t>())
      .def_property_readonly("numbers", &Wave::numbers)
      .def("assign", &Wave::assign)
      .def("store", &Wave::store)
      .def("decode", &Wave::decode);
  m.def("pack", &pack);
  m.def("multiply", &multiply);
}

}  // namespace omni
