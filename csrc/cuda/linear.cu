// linear_logprob forward on the tensor cores: logits = hidden weight^T, folded to statistics while they are
// accumulators.
//
// A block has one thread that fetches tiles of both operands into a ring of stages in shared memory, and two warpgroups
// that multiply them, 64 rows each, into 128 fp32 registers a thread. After each tile of 256 columns these are folded,
// in fp32 and never rounded, into running (m, s, t) of the thread's two rows, and where a gradient is to follow their
// exponentials are stored; four threads share a row and merge once a piece of work (linear_plan.h) is done. Meanwhile
// the ring fills with the next tiles. A small second kernel merges the splits of a row in order. No atomics; the result
// of a row depends on its hidden state, the weight and V alone.
#include "linear.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include "device.h"
#include "linear_math.h"
#include "ptx.h"

namespace omni::cuda {
namespace {

struct Stage {
  unsigned char hidden[kTileRows * kTileDepth * 2], weight[kTileColumns * kTileDepth * 2];
};
static_assert(sizeof(Stage) == kStageBytes && sizeof(Stage::hidden) % kTileAlignment == 0, "the swizzle's alignment");

struct Shared {
  Stage stage[kStages];
  std::uint64_t full[kStages];   // the stage's tiles have arrived
  std::uint64_t empty[kStages];  // both warpgroups have used them
};
static_assert(sizeof(Shared) + kTileAlignment <= kLinearSharedBytes, "linear_plan.h knows the size");

// A place in the ring: stage, and the parity of how often it has been round.
struct Cursor {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ void fetch_all(Shared& shared, const CUtensorMap* hidden, const CUtensorMap* weight, const LinearPlan& plan,
                          int steps) {
  Cursor at;
  const int pieces = plan.row_tiles * plan.splits;
  for (int index = static_cast<int>(blockIdx.x); index < pieces; index += static_cast<int>(gridDim.x)) {
    const Piece piece = piece_of(plan, index);
    for (int tile = piece.first; tile < piece.last; ++tile) {
      for (int step = 0; step < steps; ++step, at.advance()) {
        Stage& stage = shared.stage[at.stage];
        std::uint64_t* const full = &shared.full[at.stage];
        ptx::barrier_wait(&shared.empty[at.stage], at.parity ^ 1);  // the first time round they are empty
        ptx::barrier_expect(full, kStageBytes);
        const Boxes boxes = boxes_of(piece, tile, step);
        ptx::copy_box(stage.hidden, hidden, boxes.depth, boxes.hidden_row, full);
        ptx::copy_box(stage.weight, weight, boxes.depth, boxes.weight_row, full);
      }
    }
  }
}

// acc = 64 rows of hidden times 256 rows of weight, over the whole depth.
__device__ __forceinline__ void multiply(float (&acc)[128], Shared& shared, Cursor& at, int group, int steps) {
  const bool speaker = threadIdx.x % 32 == 0;
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    const Stage& stage = shared.stage[at.stage];
    ptx::barrier_wait(&shared.full[at.stage], at.parity);
    const std::uint64_t a = ptx::operand(stage.hidden + group * 64 * kTileDepth * 2), b = ptx::operand(stage.weight);
    ptx::mma_fence();
#pragma unroll
    for (int k = 0; k < kTileDepth / 16; ++k) ptx::mma_64x256x16(acc, a + 2 * k, b + 2 * k, step > 0 || k > 0);
    ptx::mma_commit();
    ptx::mma_wait<1>();  // the step before is done: its stage can be filled again
    if (step > 0 && speaker) ptx::barrier_arrive(&shared.empty[before]);
    before = at.stage;
    at.advance();
  }
  ptx::mma_wait<0>();
  ptx::mma_results(acc);
  if (speaker) ptx::barrier_arrive(&shared.empty[before]);
}

__device__ __forceinline__ Running shuffle_xor(const Running& r, int mask) {
  return {{__shfl_xor_sync(~0u, r.fold.m, mask), __shfl_xor_sync(~0u, r.fold.s, mask),
           __shfl_xor_sync(~0u, r.fold.t, mask)},
          __shfl_xor_sync(~0u, r.v_target, mask)};
}

// Stores a part of this thread's exponentials of a tile's row.
__device__ __forceinline__ void keep_part(std::uint16_t* tile, const float (&e)[kPart], float lift, int part, int quad,
                                          bool exists) {
#pragma unroll
  for (int k = 0; k < kPart; k += 4) {
    const std::uint32_t of_j = to_bf16x2(e[k] * lift, e[k + 1] * lift);
    const std::uint32_t of_next = to_bf16x2(e[k + 2] * lift, e[k + 3] * lift);
    const std::uint32_t received = __shfl_xor_sync(~0u, sent_pair(quad, of_j, of_next), 1);
    const FourColumns four = four_columns(quad, of_j, of_next, received);
    if (exists)
      *reinterpret_cast<uint2*>(tile + four_columns_at(quad, (part * kPart + k) / 2)) = make_uint2(four.low, four.high);
  }
}

template <bool CAP, bool KEEP>
__device__ void multiply_all(Shared& shared, const LinearArgs& args, const LinearPlan& plan, int steps) {
  const int thread = static_cast<int>(threadIdx.x) - 128, group = thread / 128, lane = thread % 32;
  const int vocab = static_cast<int>(args.vocab), pieces = plan.row_tiles * plan.splits;
  const std::int64_t pitch = exp_pitch(args.vocab);
  const float inv_cap = CAP ? 1.0f / args.softcap : 0.0f;
  Cursor at;
  for (int index = static_cast<int>(blockIdx.x); index < pieces; index += static_cast<int>(gridDim.x)) {
    const Piece piece = piece_of(plan, index);
    // This thread's rows are `row` and `row` + 8.
    const std::int64_t row =
        static_cast<std::int64_t>(piece.row_tile) * kTileRows + group * 64 + thread % 128 / 32 * 16 + lane / 4;
    Running running[2] = {nothing_yet(), nothing_yet()};
    int target[2];
    float c[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t i = row + 8 * half;
      const std::int64_t y = i < args.rows ? args.targets[i] : kIgnore;
      target[half] = y >= 0 && y < vocab ? static_cast<int>(y) : -1;
      const float inv_t = args.inv_t_rows && i < args.rows ? args.inv_t_rows[i] : args.inv_t;
      c[half] = scale_of(inv_t, args.softcap).c;
    }
    for (int tile = piece.first; tile < piece.last; ++tile) {
      float acc[128];
      multiply(acc, shared, at, group, steps);
      const int column = tile * kTileColumns + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Share share{half, column, vocab, args.bias};
        const std::int64_t i = row + 8 * half;
        float reference = 0.0f, lift = 0.0f;
        if constexpr (KEEP) {
          float top = largest_of<CAP>(share, acc, inv_cap);
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          raise(running[half].fold, top, c[half]);
          reference = reference_of(running[half].fold.m, c[half]);
          lift = lift_of(running[half].fold.m, reference, c[half]);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          float e[kPart];
          fold_part<CAP>(running[half], share, acc, part, inv_cap, target[half], c[half], e);
          if constexpr (KEEP)
            keep_part(args.exps.values + i * pitch + tile * kTileColumns, e, lift, part, lane % 4, i < args.rows);
        }
        if (KEEP && lane % 4 == 0 && i < args.rows) args.exps.references[i * plan.column_tiles + tile] = reference;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Running r = running[half];
      r = merge(r, shuffle_xor(r, 2), c[half]);
      r = merge(r, shuffle_xor(r, 1), c[half]);
      const std::int64_t i = row + 8 * half;
      if (lane % 4 == 0 && i < args.rows)
        reinterpret_cast<float4*>(args.partial)[piece.split * args.rows + i] =
            make_float4(r.fold.m, r.fold.s, r.fold.t, r.v_target);
    }
  }
}

template <bool CAP, bool KEEP>
__global__ void __launch_bounds__(kMmaThreads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
                  const __grid_constant__ LinearArgs args) {
  extern __shared__ unsigned char raw[];
  const std::uint32_t offset = ptx::shared_address(raw) % kTileAlignment;
  Shared& shared = *reinterpret_cast<Shared*>(raw + (kTileAlignment - offset) % kTileAlignment);
  const LinearPlan plan = plan_linear(args.rows, args.vocab);
  const int steps = static_cast<int>(args.depth / kTileDepth);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&hidden);
    ptx::prefetch_map(&weight);
    for (int k = 0; k < kStages; ++k) {
      ptx::barrier_init(&shared.full[k], 1);
      ptx::barrier_init(&shared.empty[k], 8);  // warps that multiply
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) fetch_all(shared, &hidden, &weight, plan, steps);
  } else {
    ptx::take_registers<232>();
    multiply_all<CAP, KEEP>(shared, args, plan, steps);
  }
}

// One thread a row: merges its splits in order.
__global__ void __launch_bounds__(128) merge_kernel(const __grid_constant__ LinearArgs args) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.rows) return;
  const std::int64_t y = args.targets[i];
  const Scale sc = scale_of(args.inv_t_rows ? args.inv_t_rows[i] : args.inv_t, args.softcap);
  const int splits = plan_linear(args.rows, args.vocab).splits;
  Running all = nothing_yet();
  for (int split = 0; split < splits; ++split) {
    const float4 part = reinterpret_cast<const float4*>(args.partial)[split * args.rows + i];
    all = merge(all, {{part.x, part.y, part.z}, part.w}, sc.c);
  }
  if (y < 0 || y >= args.vocab) all.v_target = from_bits(0x7fc00000u);
  if (args.exps.values)
    reinterpret_cast<float4*>(args.exps.folds)[i] = make_float4(all.fold.m, all.fold.s, all.fold.t, all.v_target);
  const Stats st = y == kIgnore ? Stats{} : stats_of(all.fold, all.v_target, sc);
  args.logp[i] = st.logp;
  args.lse[i] = st.lse;
  if (args.entropy) args.entropy[i] = st.entropy;
}

// A block a row of exponentials, a warp a tile of it.
template <bool CAP>
__global__ void __launch_bounds__(256) gradient_kernel(const __grid_constant__ GradientArgs args) {
  const std::int64_t i = blockIdx.x, y = args.targets[i];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Scale sc = scale_of(args.inv_t_rows ? args.inv_t_rows[i] : args.inv_t, args.softcap);
  const float4 fold = reinterpret_cast<const float4*>(args.exps.folds)[i];
  const Coefficients k{args.a[i], args.b ? args.b[i] : 0.0f, args.z ? args.z[i] : 0.0f};
  const ExpRow row = exp_row<CAP>({{fold.x, fold.y, fold.z}, fold.w}, y == kIgnore, k, sc);
  const std::int64_t pitch = exp_pitch(args.vocab);
  std::uint16_t* const values = args.exps.values + i * pitch;
  const int tiles = static_cast<int>(pitch / kTileColumns);
  for (int tile = warp; tile < tiles; tile += 8) {
    const float reference = args.exps.references[i * tiles + tile];
    if (is_finished(row, reference)) continue;
    Vector* const at = reinterpret_cast<Vector*>(values + tile * kTileColumns) + lane;
    *at = finish<CAP>(*at, row, reference);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  args.factor[i] = row.factor;
  if (!row.idle && y >= 0 && y < args.vocab) store_one(values + y, row.hit);
}

// A tensor map of a bf16 matrix [rows, depth] in boxes of box_rows by kTileDepth. The driver's function is asked for by
// name, so that nothing links to the driver's library.
std::string make_map(CUtensorMap* map, const void* matrix, std::int64_t rows, std::int64_t depth, int box_rows) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult query{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (query != cudaDriverEntryPointSuccess || found == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(depth) * 2};
  const cuuint32_t box[] = {kTileDepth, static_cast<cuuint32_t>(box_rows)}, strides[] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, pitch, box, strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled fails with " + std::to_string(result);
}

}  // namespace

std::int64_t linear_workspace_bytes(std::int64_t rows, std::int64_t vocab) {
  return plan_linear(rows, vocab).splits * rows * static_cast<std::int64_t>(sizeof(float4));
}

std::string launch_linear_forward(const LinearArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  int processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const LinearPlan plan = plan_linear(args.rows, args.vocab);
  const int pieces = plan.row_tiles * plan.splits, grid = pieces < processors ? pieces : processors;
  const bool cap = args.softcap > 0.0f;
  const auto kernel = args.exps.values ? (cap ? &linear_kernel<true, true> : &linear_kernel<false, true>)
                                       : (cap ? &linear_kernel<true, false> : &linear_kernel<false, false>);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kLinearSharedBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  CUtensorMap hidden, weight;  // the driver makes them, which has a context by now in a new thread too
  std::string problem = make_map(&hidden, args.hidden, args.rows, args.depth, kTileRows);
  if (problem.empty()) problem = make_map(&weight, args.weight, args.vocab, args.depth, kTileColumns);
  if (!problem.empty()) return problem;
  const auto queue = static_cast<cudaStream_t>(stream);
  cudaGetLastError();  // what an earlier call left
  kernel<<<grid, kMmaThreads, kLinearSharedBytes, queue>>>(hidden, weight, args);
  merge_kernel<<<static_cast<unsigned>((args.rows + 127) / 128), 128, 0, queue>>>(args);
  error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

std::string launch_linear_gradient(const GradientArgs& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto kernel = args.softcap > 0.0f ? &gradient_kernel<true> : &gradient_kernel<false>;
  cudaGetLastError();  // what an earlier call left
  kernel<<<static_cast<unsigned>(args.rows), 256, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace omni::cuda
