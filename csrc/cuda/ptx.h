// The PTX instructions the kernels need, one function each: mbarriers, bulk copies, WGMMA. PTX ISA 8.x, sections
// "Parallel Synchronization: mbarrier", "Data Movement: cp.async.bulk" and "Asynchronous Warpgroup Level Matrix".
#pragma once
#include <cuda.h>

#include <cstdint>

namespace omni::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// --- mbarriers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(std::uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine; a block-wide barrier has to follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(std::uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// Arrives and announces so many bytes of copies.
__device__ __forceinline__ void barrier_expect(std::uint64_t* bar, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

// Returns once the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(std::uint64_t* bar, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// --- copies to shared memory that complete on an mbarrier ----------------------------------------------------------

// Addresses and size are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, std::uint32_t bytes, std::uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// The box of a 2-D tensor map whose first element is at (column, row); what lies outside the tensor arrives as 0.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int column, int row, std::uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(bar))
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- warpgroup matrix multiply-accumulate --------------------------------------------------------------------------

// A bf16 operand tile in shared memory: rows of 64 elements (128 bytes, 128-byte swizzle, as copy_box with that swizzle
// leaves it), 1024-byte aligned. The descriptor of the 16 elements of k-step 0; add 2 for each further step.
__device__ __forceinline__ std::uint64_t operand(const void* tile) {
  const std::uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
  const std::uint64_t leading = 1;         // unused by swizzled layouts
  const std::uint64_t stride = 1024 >> 4;  // from one group of 8 rows to the next
  const std::uint64_t swizzle_128 = 1;
  return address | leading << 16 | stride << 32 | swizzle_128 << 62;
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when all but the last PENDING committed groups are complete.
template <int PENDING>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d = a b^T (+ d): 64 rows of a, 256 rows of b, 16 elements deep. Thread t of the warpgroup holds, with q = t % 4 and
// r = 16 (t / 32) + t % 32 / 4, for j < 32: d[4j], d[4j + 1] of row r, columns 8j + 2q and + 1;
// the next two of row r + 8.
__device__ __forceinline__ void mma_64x256x16(float (&d)[128], std::uint64_t a, std::uint64_t b, bool accumulate) {
#define OMNI_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, 0, 0;\n"
      "}\n"
      : OMNI_FOUR(0), OMNI_FOUR(4), OMNI_FOUR(8), OMNI_FOUR(12), OMNI_FOUR(16), OMNI_FOUR(20), OMNI_FOUR(24),
        OMNI_FOUR(28), OMNI_FOUR(32), OMNI_FOUR(36), OMNI_FOUR(40), OMNI_FOUR(44), OMNI_FOUR(48), OMNI_FOUR(52),
        OMNI_FOUR(56), OMNI_FOUR(60), OMNI_FOUR(64), OMNI_FOUR(68), OMNI_FOUR(72), OMNI_FOUR(76), OMNI_FOUR(80),
        OMNI_FOUR(84), OMNI_FOUR(88), OMNI_FOUR(92), OMNI_FOUR(96), OMNI_FOUR(100), OMNI_FOUR(104), OMNI_FOUR(108),
        OMNI_FOUR(112), OMNI_FOUR(116), OMNI_FOUR(120), OMNI_FOUR(124)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
#undef OMNI_FOUR
}

// Keeps the compiler from using the accumulators before this point.
__device__ __forceinline__ void mma_results(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace omni::cuda::ptx
