#include <cstring>

#include "rows.h"

#if defined(OMNI_X86)
#include <cpuid.h>
#endif

namespace omni {

const RowKernels* select_kernels(const char* name) {
  const bool any = std::strcmp(name, "auto") == 0;
#if defined(OMNI_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && (any || std::strcmp(name, kAvx512Bf16.name) == 0)) return &kAvx512Bf16;
  if (avx512 && (any || std::strcmp(name, kAvx512.name) == 0)) return &kAvx512;
  if (avx2 && (any || std::strcmp(name, kAvx2.name) == 0)) return &kAvx2;
#endif
  return any || std::strcmp(name, kPortable.name) == 0 ? &kPortable : nullptr;
}

bool has_matrix_unit() {
#if defined(OMNI_X86)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);  // AMX-BF16
#else
  return false;
#endif
}

bool is_intel() {
#if defined(OMNI_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace omni
