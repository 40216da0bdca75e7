// The row kernels of every instruction set, under the sanitizers, on rows whose ends touch unreadable memory.
//
// Each case allocates exactly the bytes it owns, so a load past the end of a row or a vector is an error of
// AddressSanitizer; signed overflow, misaligned access and the like are errors of UBSan. Values are compared with plain
// double arithmetic. Prints one line and exits 0, or stops at the first error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "parallel.h"
#include "program.h"
#include "rows.h"

using namespace omni;

long check_decoder(const RowKernels& kernels);  // decoder_check.cpp

namespace {

std::mt19937 generator(0);

float normal() { return std::normal_distribution<float>()(generator); }

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}
float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void expect(bool good, const char* what, const char* isa, std::int64_t vocab, double got, double want) {
  if (good) return;
  std::printf("%s, %s, vocab %lld: got %.9g, want %.9g\n", isa, what, static_cast<long long>(vocab), got, want);
  std::exit(1);
}

struct Case {
  std::int64_t rows, vocab, stride;
  bool bf16, entropy, per_row, hostile;
  float softcap;
};

void run(const RowKernels& kernels, const Case& c) {
  const std::size_t cells = static_cast<std::size_t>((c.rows - 1) * c.stride + c.vocab),
                    n = static_cast<std::size_t>(c.rows);
  std::vector<float> wide(cells);
  std::vector<std::uint16_t> narrow(c.bf16 ? cells : 0);
  for (float& x : wide) x = normal() * 3.0f;
  if (c.hostile)
    for (float& x : wide) {
      const unsigned dice = generator() % 16;
      x = dice == 0 ? -INFINITY : dice == 1 ? INFINITY : dice == 2 ? NAN : dice == 3 ? 3e38f : dice == 4 ? -3e38f : x;
    }
  for (std::size_t i = 0; i < narrow.size(); ++i) wide[i] = from_bf16(narrow[i] = to_bf16(wide[i]));
  const std::vector<float> original = wide;
  std::vector<std::int64_t> targets(n);
  std::vector<float> inv_t(n), a(n), b(n), logp(n), entropy(n), lse(n);
  for (std::size_t i = 0; i < n; ++i) {
    targets[i] = i % 4 == 3 ? kIgnore : static_cast<std::int64_t>(generator() % static_cast<unsigned>(c.vocab));
    inv_t[i] = 0.5f + static_cast<float>(i % 3);
    a[i] = i % 5 == 4 ? 0.0f : normal();
    b[i] = i % 5 == 4 ? 0.0f : normal();
  }
  Rows r{};
  r.logits = c.bf16 ? static_cast<void*>(narrow.data()) : static_cast<void*>(wide.data());
  r.dtype = c.bf16 ? DType::kBFloat16 : DType::kFloat32;
  r.rows = c.rows;
  r.vocab = c.vocab;
  r.row_stride = c.stride;
  r.targets = targets.data();
  r.inv_t = 1.0f;
  r.inv_t_rows = c.per_row ? inv_t.data() : nullptr;
  r.softcap = c.softcap;
  r.want_entropy = c.entropy;
  r.logp = logp.data();
  r.entropy = entropy.data();
  r.lse = lse.data();
  r.a = a.data();
  r.b = c.entropy ? b.data() : nullptr;
  r.z_loss = 0.01f;
  kernels.forward(r, 0, c.rows);

  std::vector<double> gradient(cells, 0.0);
  for (std::int64_t i = 0; i < c.rows && !c.hostile; ++i) {
    const std::size_t k = static_cast<std::size_t>(i), start = static_cast<std::size_t>(i * c.stride);
    if (targets[k] == kIgnore) continue;
    const double t = c.per_row ? inv_t[k] : 1.0;
    std::vector<double> z(static_cast<std::size_t>(c.vocab));
    double total = 0.0, mean = 0.0;
    for (std::size_t j = 0; j < z.size(); ++j) {
      const double u = original[start + j];
      z[j] = t * (c.softcap > 0 ? c.softcap * std::tanh(u / c.softcap) : u);
      total += std::exp(z[j]);
    }
    const double log_total = std::log(total);
    for (const double x : z) mean += std::exp(x - log_total) * x;
    const double h = log_total - mean, logp_y = z[static_cast<std::size_t>(targets[k])] - log_total;
    expect(std::fabs(lse[k] - log_total) < 1e-5 * (1 + std::fabs(log_total)), "lse", kernels.name, c.vocab, lse[k],
           log_total);
    expect(std::fabs(logp[k] - logp_y) < 1e-5 * (1 + std::fabs(logp_y)), "logp", kernels.name, c.vocab, logp[k],
           logp_y);
    if (c.entropy) expect(std::fabs(entropy[k] - h) < 1e-4, "entropy", kernels.name, c.vocab, entropy[k], h);
    for (std::size_t j = 0; j < z.size(); ++j) {
      const double p = std::exp(z[j] - log_total), lp = z[j] - log_total;
      double g = a[k] * ((static_cast<std::int64_t>(j) == targets[k]) - p) + 2 * 0.01 * log_total * p;
      if (c.entropy) g -= b[k] * p * (lp + h);
      const double cap = c.softcap > 0 ? std::tanh(original[start + j] / c.softcap) : 0.0;
      gradient[start + j] = g * t * (1 - cap * cap);
    }
  }
  const auto compare = [&](const char* what) {
    for (std::int64_t i = 0; i < c.rows && !c.hostile; ++i)
      for (std::int64_t j = 0; j < c.vocab; ++j) {
        const std::size_t at = static_cast<std::size_t>(i * c.stride + j);
        const double got = c.bf16 ? from_bf16(narrow[at]) : wide[at], want = gradient[at];
        expect(std::fabs(got - want) <= (c.bf16 ? 5e-3 : 2e-5) * (1e-2 + std::fabs(want)), what, kernels.name, c.vocab,
               got, want);
      }
  };
  kernels.backward(r, 0, c.rows);
  compare("backward");

  for (std::size_t i = 0; i < narrow.size(); ++i) narrow[i] = to_bf16(original[i]);
  if (!c.bf16) wide = original;
  // A program that reads the same coefficients from two columns.
  const Instruction code[] = {{static_cast<std::int32_t>(Op::kConst), 5, 0, 0, 0, 0.01f}};
  const float* const columns[] = {a.data(), b.data()};
  const Program program{code, 1, 2, columns, 3, c.entropy ? 4 : -1, 5};
  r.program = &program;
  kernels.fused(r, 0, c.rows);
  compare("fused");
}

}  // namespace

int main() {
  long cases = 0;
  for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16"}) {
    const RowKernels* kernels = select_kernels(name);
    if (!kernels) continue;
    cases += check_decoder(*kernels);
    for (const std::int64_t vocab :
         {1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 5000})
      for (const bool bf16 : {false, true})
        for (const bool entropy : {false, true})
          for (const float softcap : {0.0f, 5.0f})
            for (const bool hostile : {false, true}) {
              run(*kernels, {1, vocab, vocab, bf16, entropy, false, hostile, softcap});
              run(*kernels, {6, vocab, vocab + 3, bf16, entropy, true, hostile, softcap});
              cases += 2;
            }
  }
  std::int64_t sum = 0;
  std::vector<std::int64_t> seen(1000);
  parallel_for(1000, 7, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
  });
  for (const std::int64_t count : seen) sum += count == 1;
  expect(sum == 1000, "parallel_for", "threads", 0, static_cast<double>(sum), 1000);
  for (const int threads : {1, 4}) {
    bool caught = false;
    try {
      parallel_for(100, 7, threads, [](std::int64_t, std::int64_t) { throw std::bad_alloc(); });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    expect(caught, "parallel_for", "an exception", threads, caught, 1);
  }
  std::printf("%ld cases, no error\n", cases);
  return 0;
}
