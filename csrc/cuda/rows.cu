// The row kernels: one read of the logits (forward), and one write (backward, fused), the row staying on chip between.
//
// A cluster of 1 to 8 blocks holds a row in shared memory (plan.h). Each warp owns a part of it: it has the copy engine
// fetch that part, folds it, and once the row's statistics are known overwrites it in device memory with the gradient;
// then it fetches its part of the cluster's next row at once. Warps meet only to merge statistics, which every block
// publishes to all blocks of its cluster, so that each merges them itself, in the same order: one cluster barrier a
// row.
//
// The blocks are persistent; which cluster takes which row does not change a row's result. No atomics.
#include "rows.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "device.h"
#include "ptx.h"
#include "row_math.h"

namespace omni::cuda {
namespace {

namespace cg = cooperative_groups;

// What a block keeps beside its slice.
struct Board {
  std::uint64_t full[kRowWarps];   // the warp's part of the row has arrived
  Fold warp[kRowWarps];            // written by each warp
  Fold block[2][kMaxCluster];      // written by each block of the cluster, alternating between rows
  RowGradient gradient;            // written by warp 0
  float registers[kMaxRegisters];  // of the program, used by warp 0
};
static_assert(sizeof(Board) == kBoardBytes, "plan.h knows the size");

__device__ __forceinline__ Fold shuffle_down(const Fold& f, int delta) {
  return {__shfl_down_sync(~0u, f.m, delta), __shfl_down_sync(~0u, f.s, delta), __shfl_down_sync(~0u, f.t, delta)};
}

// The merge of the folds of lanes [0, width), in lane 0.
__device__ __forceinline__ Fold merge_lanes(Fold f, int width, float c) {
  for (int delta = width / 2; delta > 0; delta /= 2) f = merge(f, shuffle_down(f, delta), c);
  return f;
}

template <class T>
struct Row {
  T* start;
  Extent extent;
  int target;  // -1: outside the vocabulary
  float inv_t;

  __device__ __forceinline__ Row(const RowArgs& args, std::int64_t i) {
    start = static_cast<T*>(args.logits) + i * args.row_stride;
    const int lead = static_cast<int>(reinterpret_cast<std::uintptr_t>(start) % kVectorBytes / sizeof(T));
    extent = {lead, args.vocab};
    const std::int64_t y = args.targets[i];
    target = y >= 0 && y < args.vocab ? static_cast<int>(y) : -1;
    inv_t = args.inv_t_rows ? args.inv_t_rows[i] : args.inv_t;
  }
  template <bool CAP>
  __device__ __forceinline__ float target_value(float inv_cap) const {
    return target < 0 ? from_bits(0x7fc00000u) : v_of<CAP>(load_one(start + target), inv_cap);
  }
  __device__ __forceinline__ int target_place() const { return target < 0 ? -1 : target + extent.lead; }
};

__device__ __forceinline__ Coefficients given_coefficients(const RowArgs& args, std::int64_t i) {
  return {args.a[i], args.b ? args.b[i] : 0.0f, args.z_loss_rows ? args.z_loss_rows[i] : args.z_loss};
}

// Whether the row's logits are looked at.
template <RowMode MODE>
__device__ __forceinline__ bool is_read(const RowArgs& args, std::int64_t i) {
  return args.targets[i] != kIgnore && (MODE != RowMode::kBackward || !is_idle(given_coefficients(args, i)));
}

template <class T, RowMode MODE, bool CAP>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm)
    rows_kernel(const RowArgs args, const __grid_constant__ Program program) {
  extern __shared__ __align__(kVectorBytes) unsigned char shared[];
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), blocks = static_cast<int>(cluster.num_blocks());
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t clusters = gridDim.x / blocks, first = blockIdx.x / blocks;
  Vector* const slice = reinterpret_cast<Vector*>(shared);
  Board& board = *reinterpret_cast<Board*>(slice + args.slice_vectors);

  if (threadIdx.x == 0) {
    for (std::uint64_t& bar : board.full) ptx::barrier_init(&bar, 1);
    ptx::barrier_init_fence();
  }
  if (MODE == RowMode::kFused && warp == 0)
    for (int k = lane; k < program.constants; k += 32)
      board.registers[program.constant[k].dst] = program.constant[k].value;
  __syncthreads();
  if (MODE != RowMode::kBackward) cluster.sync();  // every block runs before another writes to its shared memory

  // This warp's vectors of a row, and where they lie in the slice.
  const auto part_of = [&](const Row<T>& row) {
    return warp_span(block_span(vectors_of(row.extent, kPerVector<T>), args.slice_vectors, rank), args.slice_vectors,
                     warp);
  };
  const auto local = [&](Span part) { return slice + (part.first - rank * args.slice_vectors); };
  const auto fetch = [&](std::int64_t i) {  // by one lane, after the warp has done with what is there
    if (i >= args.rows || !is_read<MODE>(args, i)) return;
    const Row<T> row(args, i);
    const Span part = part_of(row);
    if (part.count == 0) return;
    const std::uint32_t bytes = static_cast<std::uint32_t>(part.count) * kVectorBytes;
    ptx::barrier_expect(&board.full[warp], bytes);
    ptx::copy_bulk(local(part), reinterpret_cast<const Vector*>(row.start - row.extent.lead) + part.first, bytes,
                   &board.full[warp]);
  };

  if (lane == 0) fetch(first);
  std::uint32_t arrived = 0, merged = 0;  // phases, modulo 2
  for (std::int64_t i = first; i < args.rows; i += clusters) {
    const Row<T> row(args, i);
    const Span part = part_of(row);
    const Scale sc = scale_of(row.inv_t, args.softcap);
    RowGradient gradient{};
    gradient.idle = true;
    if (is_read<MODE>(args, i)) {
      // Of the backward warps, the one that overwrites the target's entry reads it before; the others do not use it.
      // Otherwise warp 0 does, before the cluster's barrier, after which the row is overwritten.
      float v_target = 0.0f;
      if (MODE == RowMode::kBackward || warp == 0) v_target = row.template target_value<CAP>(sc.inv_cap);
      if (MODE == RowMode::kFused && warp == 0)
        for (int k = lane; k < program.columns; k += 32) board.registers[3 + k] = program.column[k][i];
      if (part.count > 0) {
        ptx::barrier_wait(&board.full[warp], arrived);
        arrived ^= 1;
      }
      if (MODE == RowMode::kBackward) {
        gradient = gradient_of_lse<CAP>(args.lse[i], args.b ? args.entropy[i] : 0.0f, given_coefficients(args, i),
                                        v_target, sc);
      } else {
        const Fold mine = merge_lanes(fold_lane<T, CAP>(local(part), part, lane, row.extent, sc), 32, sc.c);
        if (lane == 0) board.warp[warp] = mine;
        if (MODE == RowMode::kForward) {
          __syncwarp();
          if (lane == 0) fetch(i + clusters);
        }
        __syncthreads();
        if (warp == 0) {
          Fold f = merge_lanes(lane < kRowWarps ? board.warp[lane] : nothing(), kRowWarps, sc.c);
          f = {__shfl_sync(~0u, f.m, 0), __shfl_sync(~0u, f.s, 0), __shfl_sync(~0u, f.t, 0)};
          if (lane < blocks) *cluster.map_shared_rank(&board.block[merged][rank], lane) = f;
        }
        cluster.sync();
        if (warp == 0) {
          const Fold f = merge_lanes(lane < blocks ? board.block[merged][lane] : nothing(), kMaxCluster, sc.c);
          if (lane == 0) {
            const Stats st = stats_of(f, v_target, sc);
            if (rank == 0) {
              args.logp[i] = st.logp;
              args.lse[i] = st.lse;
              if (args.entropy) args.entropy[i] = st.entropy;
            }
            if (MODE == RowMode::kFused) {
              board.registers[0] = st.logp;
              board.registers[1] = st.entropy;
              board.registers[2] = st.lse;
              board.gradient = gradient_of_fold<CAP>(f, st, run_program(program, board.registers), v_target, sc);
            }
          }
        }
        merged ^= 1;
        if (MODE == RowMode::kFused) {
          __syncthreads();
          gradient = board.gradient;
        }
      }
    } else if (MODE != RowMode::kBackward && rank == 0 && threadIdx.x == 0) {
      args.logp[i] = 0.0f;
      args.lse[i] = 0.0f;
      if (args.entropy) args.entropy[i] = 0.0f;
    }
    if (MODE != RowMode::kForward)
      gradient_lane<T, CAP>(row.start, local(part), part, lane, row.extent, row.target_place(), gradient);
    if (MODE != RowMode::kForward || !is_read<MODE>(args, i)) {
      __syncwarp();
      if (lane == 0) fetch(i + clusters);
    }
  }
}

template <class T, RowMode MODE>
const void* kernel_of(bool softcap) {
  return softcap ? reinterpret_cast<const void*>(&rows_kernel<T, MODE, true>)
                 : reinterpret_cast<const void*>(&rows_kernel<T, MODE, false>);
}

template <class T>
const void* kernel_of(RowMode mode, bool softcap) {
  return mode == RowMode::kForward    ? kernel_of<T, RowMode::kForward>(softcap)
         : mode == RowMode::kBackward ? kernel_of<T, RowMode::kBackward>(softcap)
                                      : kernel_of<T, RowMode::kFused>(softcap);
}

}  // namespace

RowPlan row_plan(std::int64_t vocab, DType dtype) { return plan_rows(vocab, dtype == DType::kFloat32 ? 4 : 2); }

std::string launch_rows(RowMode mode, DType dtype, RowArgs args, const Program& program, int device, void* stream) {
  const RowPlan plan = row_plan(args.vocab, dtype);
  if (plan.cluster == 0) return "a row of " + std::to_string(args.vocab) + " logits does not fit on chip";
  args.slice_vectors = plan.slice_vectors;
  const void* kernel = dtype == DType::kFloat32 ? kernel_of<float>(mode, args.softcap > 0.0f)
                                                : kernel_of<std::uint16_t>(mode, args.softcap > 0.0f);
  const DeviceGuard guard(device);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kRowThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident = 0;
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster));
  // Both belong to the function, which threads launch with other sizes meanwhile: the same for all.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedPerBlock);
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
  if (error == cudaSuccess && resident > 0) {
    const std::int64_t clusters = args.rows < resident ? args.rows : resident;
    config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster));
    void* arguments[] = {&args, const_cast<Program*>(&program)};
    error = cudaLaunchKernelExC(&config, kernel, arguments);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return resident > 0 ? "" : "no cluster of " + std::to_string(plan.cluster) + " blocks fits on this GPU";
}

}  // namespace omni::cuda
