// The decoder's kernels and products of one instruction set under the sanitizers: every buffer has exactly the bytes it
// needs. Forward results are compared with double arithmetic where a formula is short; that the others are right is for
// tests/kernels/test_kernels_decoder.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "parallel.h"
#include "product_blocks.h"
#include "rows.h"

using namespace omni;

namespace {

std::mt19937 generator(1);

// Numbers of one dtype, in memory of exactly their size.
struct Numbers {
  Numbers(DType dtype, std::int64_t count)
      : dtype(dtype),
        count(count),
        size(dtype == DType::kFloat32 ? 4 : 2),
        bytes(new unsigned char[static_cast<std::size_t>(count) * size]) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float x = std::normal_distribution<float>()(generator);
      std::uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(bytes.get() + static_cast<std::size_t>(i) * size, size == 4 ? static_cast<const void*>(&x) : &half,
                  size);
    }
  }
  double operator[](std::int64_t i) const {
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<unsigned char*>(&bits) + (4 - size), bytes.get() + static_cast<std::size_t>(i) * size,
                size);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void* data() const { return bytes.get(); }
  double tolerance() const { return dtype == DType::kFloat32 ? 1e-5 : 3e-2; }
  // size: of what was summed up.
  void expect(std::int64_t i, double want, const char* what, const char* isa, double size = 1) const {
    if (std::fabs((*this)[i] - want) <= tolerance() * (size + std::fabs(want))) return;
    std::printf("%s, %s: element %lld is %.9g, want %.9g\n", isa, what, static_cast<long long>(i), (*this)[i], want);
    std::exit(1);
  }
  void finite(const char* what, const char* isa) const {
    for (std::int64_t i = 0; i < count; ++i)
      if (!std::isfinite((*this)[i])) {
        std::printf("%s, %s: element %lld is not finite\n", isa, what, static_cast<long long>(i));
        std::exit(1);
      }
  }
  DType dtype;
  std::int64_t count;
  std::size_t size;
  std::unique_ptr<unsigned char[]> bytes;
};

std::vector<unsigned char> scratch(std::size_t bytes) { return std::vector<unsigned char>(bytes); }

void rows_of(const RowKernels& kernels, DType dtype, std::int64_t rows, std::int64_t width) {
  const DecoderKernels& k = kernels.decoder;
  const Numbers x(dtype, rows * width), other(dtype, rows * width), weight(dtype, width), sum(dtype, rows * width),
      y(dtype, rows * width), dx(dtype, rows * width), both(dtype, 2 * rows * width), dboth(dtype, 2 * rows * width);
  std::vector<float> inverse(static_cast<std::size_t>(rows));
  const std::int64_t tasks = (rows + kNormRows - 1) / kNormRows;
  std::vector<float> dweight(static_cast<std::size_t>(tasks * width));
  Norm norm{dtype,      rows,     width,          x.data(), other.data(), weight.data(), 1e-5f,
            sum.data(), y.data(), inverse.data(), nullptr,  nullptr,      nullptr,       nullptr};
  k.norm_forward(norm, 0, rows);
  for (std::int64_t i = 0; i < rows; ++i) {
    double squares = 0;
    for (std::int64_t j = i * width; j < (i + 1) * width; ++j) {
      sum.expect(j, x[j] + other[j], "sum", kernels.name);
      squares += sum[j] * sum[j];
    }
    for (std::int64_t j = 0; j < width; ++j)
      y.expect(i * width + j, weight[j] * sum[i * width + j] / std::sqrt(squares / static_cast<double>(width) + 1e-5),
               "norm", kernels.name);
  }
  norm.x = sum.data();
  norm.dy = x.data();
  norm.dsum = other.data();
  norm.dx = dx.data();
  norm.dweight = dweight.data();
  k.norm_backward(norm, 0, tasks);
  dx.finite("norm backward", kernels.name);

  unsigned char* up = static_cast<unsigned char*>(both.data()) + static_cast<std::size_t>(width) * both.size;
  unsigned char* dup = static_cast<unsigned char*>(dboth.data()) + static_cast<std::size_t>(width) * both.size;
  const Gate gate{dtype, rows, width, 2 * width, both.data(), up, y.data(), x.data(), dboth.data(), dup};
  k.gate_forward(gate, 0, rows);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < width; ++j) {
      const double g = both[2 * i * width + j];
      y.expect(i * width + j, g / (1 + std::exp(-g)) * both[(2 * i + 1) * width + j], "gate", kernels.name);
    }
  k.gate_backward(gate, 0, rows);
  dboth.finite("gate backward", kernels.name);
  if (width % 2 == 0) {
    Rotary rotary{dtype, rows, 1, width, width, width, x.data(), other.data(), sum.data(), y.data(), false};
    k.rotate(rotary, 0, rows);
    rotary.backward = true;
    k.rotate(rotary, 0, rows);
    y.finite("rotate", kernels.name);
  }
}

void attention(const RowKernels& kernels, DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t kv_heads) {
  const std::int64_t size = 32, width = padded(rows);
  const Numbers q(dtype, rows * heads * size), k(dtype, rows * kv_heads * size), v(dtype, rows * kv_heads * size),
      out(dtype, rows * heads * size), dout(dtype, rows * heads * size), dq(dtype, rows * heads * size),
      dk(dtype, rows * kv_heads * size), dv(dtype, rows * kv_heads * size);
  std::vector<float> lse(static_cast<std::size_t>(rows * heads)),
      wide_dk(static_cast<std::size_t>(rows * kv_heads * size)), wide_dv(wide_dk.size());
  std::vector<std::int32_t> number(static_cast<std::size_t>(rows));
  std::vector<std::uint16_t> bias(static_cast<std::size_t>(rows * width), 0xff80);  // -inf
  for (std::int64_t i = 0; i < rows; ++i) {
    number[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
    for (std::int64_t j = 0; j <= i; ++j) bias[static_cast<std::size_t>(i * width + j)] = 0;
  }
  const std::int64_t tree[] = {0, 1, 0, rows}, block[] = {0, rows, 0, rows, 0};
  Attention a{};
  a.dtype = dtype;
  a.heads = heads, a.kv_heads = kv_heads, a.size = size, a.trees = 1;
  a.q_stride = a.dq_stride = heads * size, a.k_stride = a.v_stride = a.dkv_stride = kv_heads * size;
  a.tree = tree, a.block = block, a.rows = number.data(), a.columns = number.data(), a.bias = bias.data();
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.scale = 0.2f, a.out = out.data(), a.lse = lse.data();
  a.dout = dout.data(), a.dq = dq.data(), a.dk = dk.data(), a.dv = dv.data();
  a.wide_dk = wide_dk.data(), a.wide_dv = wide_dv.data();
  auto forward = scratch(attention_bytes(heads / kv_heads, rows, rows, size, false));
  auto backward = scratch(attention_bytes(heads / kv_heads, rows, rows, size, true));
  for (std::int64_t task = 0; task < kv_heads; ++task) {
    kernels.decoder.attend_forward(a, task, forward.data());
    kernels.decoder.attend_backward(a, task, backward.data());
  }
  for (std::int64_t j = 0; j < heads * size; ++j)  // the first row sees itself alone
    out.expect(j, v[j / size / (heads / kv_heads) * size + j % size], "attention", kernels.name);
  for (const Numbers* each : {&out, &dq, &dk, &dv}) each->finite("attention", kernels.name);

  // The same prompt for three rows that have made two tokens.
  const std::int64_t made = 2, capacity = 2;
  const std::int64_t start[] = {0, rows}, place[] = {0}, row_start[] = {0, 3};
  const std::int32_t members[] = {2, 0, 1};
  const Numbers keys(dtype, kv_heads * width * size), values(dtype, kv_heads * width * size),
      own_keys(dtype, 3 * kv_heads * capacity * size), own_values(dtype, 3 * kv_heads * capacity * size),
      token(dtype, 3 * (heads + 2 * kv_heads) * size), made_out(dtype, 3 * heads * size);
  Decode d{};
  d.prompt = {dtype,         1,        kv_heads, size,        kv_heads * size, kv_heads * size, start, place,
              number.data(), k.data(), v.data(), keys.data(), values.data()};
  for (std::int64_t task = 0; task < kv_heads; ++task) kernels.decoder.store(d.prompt, task);
  const std::int64_t stride = (heads + 2 * kv_heads) * size;
  unsigned char* first = static_cast<unsigned char*>(token.data());
  d.prompt.k_stride = d.prompt.v_stride = d.q_stride = stride;
  d.q = first;
  d.prompt.k = first + static_cast<std::size_t>(heads * size) * token.size;
  d.prompt.v = first + static_cast<std::size_t>((heads + kv_heads) * size) * token.size;
  d.heads = heads, d.capacity = capacity, d.own = made, d.row_start = row_start, d.rows = members;
  d.own_keys = own_keys.data(), d.own_values = own_values.data(), d.scale = 0.2f, d.out = made_out.data();
  auto decoding = scratch(decode_bytes(rows, made, size));
  for (std::int64_t task = 0; task < kv_heads; ++task) kernels.decoder.decode(d, task, decoding.data());
  made_out.finite("decode", kernels.name);
}

// C = A B in every form the operands come in, and every form of the sum.
template <class T>
void product(const RowKernels& kernels, std::int64_t m, std::int64_t n, std::int64_t k) {
  const bool paired = kUnit<T> == 2;
  const DType dtype = paired ? DType::kBFloat16 : DType::kFloat32, fp32 = DType::kFloat32;
  const auto of = [](const Numbers& numbers) { return static_cast<T*>(numbers.data()); };
  const auto half = [](const Numbers& numbers) { return static_cast<std::uint16_t*>(numbers.data()); };
  const std::int64_t panels = parts_of(n, kPanel), units = parts_of(k, kUnit<T>), whole = units * kUnit<T>;
  const Numbers a(dtype, m * whole), b_across(dtype, n * whole), a_across(dtype, k * m), b(dtype, k * n);
  Numbers packed(dtype, panels * kPanel * whole), c(dtype, m * n), low(DType::kBFloat16, m * n), wide(fp32, m * n);
  const Out rounded = paired ? Out::kBFloat16 : Out::kFloat32;
  const auto run = [&](const Operands<T>& o) {
    multiply_matrices(products<T>(kernels), o, 2,
                      [](std::int64_t tasks, const auto& body) { parallel_for(tasks, 1, 2, body); });
  };
  const auto expect = [&](const Numbers& found, double times, bool transposed_a, bool transposed_b, const char* what) {
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (std::int64_t u = 0; u < (transposed_a || !transposed_b ? k : whole); ++u)
          sum += (transposed_a ? a_across[u * m + i] : a[i * whole + u]) *
                 (transposed_b ? b_across[j * whole + u] : b[u * n + j]);
        found.expect(i * n + j, times * sum, what, kernels.name, std::sqrt(static_cast<double>(k)));
      }
  };
  for (std::int64_t panel = 0; panel < panels; ++panel)
    products<T>(kernels).pack_transposed(of(b_across), whole, n, whole, panel, of(packed));
  Operands<T> o{of(a), of(packed), Inner::kAlong, Inner::kPacked, whole, 0,  m, n,
                whole, c.data(),   n,             rounded,        half(low), 1};
  run(o);
  expect(c, 1, false, true, "product");
  o.b = of(b_across), o.b_inner = Inner::kAlong, o.b_stride = whole;
  run(o);
  expect(c, 1, false, true, "product of rows");
  if (k == whole) {
    o.b = of(b), o.b_inner = Inner::kDown, o.b_stride = n;
    run(o);
    expect(c, 1, false, false, "product of columns");
    o.c = wide.data();
    for (const Out out : {Out::kFloat32, Out::kAdd}) o.out = out, run(o);
    expect(wide, 2, false, false, "added product of columns");
  }
  products<T>(kernels).pack_panels(of(b), n, n, k, units, 0, panels, of(packed));
  o = {of(a_across), of(packed), Inner::kDown,  Inner::kPacked, m,      0, m, n,
       k,            wide.data(), n,            Out::kFloat32,  nullptr, 0.5f};
  run(o);
  expect(wide, 1, true, false, "product of a transpose");
  o.out = Out::kAdd;
  run(o);
  expect(wide, 1.5, true, false, "added product");
  if (!paired) return;
  o.c = c.data(), o.low = half(low);
  for (const Out out : {Out::kHalves, Out::kAddHalves}) o.out = out, run(o);
  for (std::int64_t i = 0; i < m * n; ++i) {  // exactly the fp32 sum
    std::uint32_t bits = static_cast<std::uint32_t>(half(c)[i]) << 16 | half(low)[i];
    std::memcpy(static_cast<float*>(wide.data()) + i, &bits, 4);
  }
  expect(wide, 2, true, false, "halves");
  o.out = Out::kRound;
  run(o);
  expect(c, 3, true, false, "rounded halves");
}

}  // namespace

long check_decoder(const RowKernels& kernels) {
  long cases = 0;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::int64_t width : {1, 2, 7, 16, 31, 32, 33, 64, 576})
      for (const std::int64_t rows : {1, 3, 33}) rows_of(kernels, dtype, rows, width), ++cases;
    for (const std::int64_t rows : {1, 7, 32, 33, 70})
      attention(kernels, dtype, rows, 2, 2), attention(kernels, dtype, rows, 6, 2), cases += 2;
  }
  for (const std::int64_t m : {1, 7, 8, 21})
    for (const std::int64_t n : {1, 16, 47, 48, 97})
      for (const std::int64_t k : {1, 2, 33})
        product<std::uint16_t>(kernels, m, n, k), product<float>(kernels, m, n, k), cases += 2;
  product<std::uint16_t>(kernels, 140, 50, 2 * kDepth<std::uint16_t> + 6), ++cases;
  product<float>(kernels, 140, 50, 2 * kDepth<float> + 7), ++cases;
  return cases;
}
