// The kernels' algorithms on the host: the same functions as rows.cu and linear.cu, lane by lane, in the same order;
// only copies, barriers and shuffles are played by loops. A C interface, for tests/kernels/test_kernels_cuda.py.
#include <cstdint>
#include <cstring>
#include <vector>

#include "../linear_math.h"
#include "../linear_plan.h"
#include "../plan.h"
#include "../program.h"
#include "../row_math.h"

using namespace omni::cuda;
using omni::Coefficients;

namespace {

// Lane 0's result of shuffling down by width / 2, width / 4, ..., 1.
Fold merge_lanes(std::vector<Fold> lanes, int width, float c) {
  lanes.resize(32, nothing());
  for (int delta = width / 2; delta > 0; delta /= 2) {
    const std::vector<Fold> before = lanes;
    for (int l = 0; l < 32; ++l) lanes[l] = merge(before[l], before[l + delta < 32 ? l + delta : l], c);
  }
  return lanes[0];
}

struct Args {
  void* logits;
  std::int64_t rows, vocab, row_stride;
  const std::int64_t* targets;
  const float* inv_t;  // [rows]
  float softcap;
  float *logp, *entropy, *lse;
  const float *a, *b,
      *z_loss;  // [rows]; b null: no entropy gradient. a null: of the fold, by the program if there is one
  const Program* program;
};

template <class T, bool CAP>
int run(const Args& args) {
  const RowPlan plan = plan_rows(args.vocab, sizeof(T));
  for (std::int64_t i = 0; i < args.rows; ++i) {
    T* const row = static_cast<T*>(args.logits) + i * args.row_stride;
    const Extent extent{static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % kVectorBytes / sizeof(T)),
                        static_cast<int>(args.vocab)};
    const int vectors = vectors_of(extent, kPerVector<T>);
    std::vector<Vector> chip(static_cast<std::size_t>(vectors));  // all blocks' slices
    std::memcpy(chip.data(), row - extent.lead, chip.size() * sizeof(Vector));
    const auto each_warp = [&](const auto& work) {
      for (int rank = 0; rank < plan.cluster; ++rank)
        for (int warp = 0; warp < kRowWarps; ++warp)
          work(rank, warp, warp_span(block_span(vectors, plan.slice_vectors, rank), plan.slice_vectors, warp));
    };
    const std::int64_t y = args.targets[i];
    const Scale sc = scale_of(args.inv_t[i], args.softcap);
    const bool given = args.a != nullptr;
    const Coefficients k = given ? Coefficients{args.a[i], args.b ? args.b[i] : 0.0f, args.z_loss[i]} : Coefficients{};
    RowGradient gradient{};
    gradient.idle = true;
    if (y == kIgnore || (given && is_idle(k))) {
      if (!given) args.logp[i] = args.entropy[i] = args.lse[i] = 0.0f;
    } else {
      const float v_target = v_of<CAP>(load_one(row + y), sc.inv_cap);
      if (given) {
        gradient = gradient_of_lse<CAP>(args.lse[i], args.entropy[i], k, v_target, sc);
      } else {
        std::vector<std::vector<Fold>> warps(static_cast<std::size_t>(plan.cluster));
        each_warp([&](int rank, int, Span part) {
          std::vector<Fold> lanes;
          for (int lane = 0; lane < 32; ++lane)
            lanes.push_back(fold_lane<T, CAP>(chip.data() + part.first, part, lane, extent, sc));
          warps[rank].push_back(merge_lanes(lanes, 32, sc.c));
        });
        std::vector<Fold> blocks;
        for (const auto& block : warps) blocks.push_back(merge_lanes(block, kRowWarps, sc.c));
        const Fold f = merge_lanes(blocks, kMaxCluster, sc.c);
        const Stats st = stats_of(f, v_target, sc);
        args.logp[i] = st.logp, args.entropy[i] = st.entropy, args.lse[i] = st.lse;
        if (!args.program) continue;
        float registers[kMaxRegisters] = {st.logp, st.entropy, st.lse};
        for (int c = 0; c < args.program->columns; ++c) registers[3 + c] = args.program->column[c][i];
        for (int c = 0; c < args.program->constants; ++c)
          registers[args.program->constant[c].dst] = args.program->constant[c].value;
        gradient = gradient_of_fold<CAP>(f, st, run_program(*args.program, registers), v_target, sc);
      }
    }
    if (!given && !args.program) continue;
    each_warp([&](int, int, Span part) {
      for (int lane = 0; lane < 32; ++lane)
        gradient_lane<T, CAP>(row, chip.data() + part.first, part, lane, extent,
                              y == kIgnore ? -1 : static_cast<int>(y) + extent.lead, gradient);
    });
  }
  return plan.cluster;
}

int dispatch(const Args& args, int dtype) {
  const bool cap = args.softcap > 0.0f;
  if (dtype == 0) return cap ? run<float, true>(args) : run<float, false>(args);
  return cap ? run<std::uint16_t, true>(args) : run<std::uint16_t, false>(args);
}

Running merge_quad(const Running (&lanes)[4], float c) {
  const Running low = merge(lanes[0], lanes[2], c), high = merge(lanes[1], lanes[3], c);
  return merge(low, high, c);
}

// What the fused linear forward leaves for the gradient; values null: it is not to.
struct Kept {
  std::uint16_t* values;
  float* references;
  Running* folds;
};

// A row's four threads, a tile: fold, and keep the exponentials.
template <bool CAP>
void fold_quad(Running (&lanes)[4], const float (&acc)[4][128], int half, int tile, int vocab, const float* bias,
               int target, const Scale& sc, std::uint16_t* values, float* reference) {
  const auto share = [=](int quad) { return Share{half, tile * kTileColumns + 2 * quad, vocab, bias}; };
  float top = kNegInf;
  for (int quad = 0; quad < 4; ++quad) top = fmaxf(top, largest_of<CAP>(share(quad), acc[quad], sc.inv_cap));
  for (Running& lane : lanes)
    if (values) raise(lane.fold, top, sc.c);
  for (int part = 0; part < kParts; ++part) {
    float e[4][kPart], lift = 0.0f;
    for (int quad = 0; quad < 4; ++quad)
      fold_part<CAP>(lanes[quad], share(quad), acc[quad], part, sc.inv_cap, target, sc.c, e[quad]);
    if (!values) continue;
    *reference = reference_of(lanes[0].fold.m, sc.c);
    for (int k = 0; k < kPart; k += 4) {
      std::uint32_t of_j[4], of_next[4];
      for (int quad = 0; quad < 4; ++quad) {
        lift = lift_of(lanes[quad].fold.m, *reference, sc.c);
        of_j[quad] = to_bf16x2(e[quad][k] * lift, e[quad][k + 1] * lift);
        of_next[quad] = to_bf16x2(e[quad][k + 2] * lift, e[quad][k + 3] * lift);
      }
      for (int quad = 0; quad < 4; ++quad) {
        const std::uint32_t received = sent_pair(quad ^ 1, of_j[quad ^ 1], of_next[quad ^ 1]);
        const FourColumns four = four_columns(quad, of_j[quad], of_next[quad], received);
        std::memcpy(values + tile * kTileColumns + four_columns_at(quad, (part * kPart + k) / 2), &four, sizeof four);
      }
    }
  }
}

// The fused linear forward, its logits u [rows, vocab] given instead of multiplied: pieces, tiles, lanes, splits.
template <bool CAP>
void run_linear(const Args& args, const float* bias, const Kept& kept) {
  const auto* u = static_cast<const float*>(args.logits);
  const int vocab = static_cast<int>(args.vocab);
  const LinearPlan plan = plan_linear(args.rows, args.vocab);
  std::vector<Running> partial(static_cast<std::size_t>(plan.splits * args.rows));
  for (int index = 0; index < plan.row_tiles * plan.splits; ++index) {
    const Piece piece = piece_of(plan, index);
    for (int local = 0; local < kTileRows;
         ++local) {  // a row, and which half of its four threads' accumulators holds it
      const std::int64_t i = static_cast<std::int64_t>(piece.row_tile) * kTileRows + local;
      if (i >= args.rows) continue;
      const int half = local % 16 / 8;
      const Scale sc = scale_of(args.inv_t[i], args.softcap);
      Running lanes[4] = {nothing_yet(), nothing_yet(), nothing_yet(), nothing_yet()};
      for (int tile = piece.first; tile < piece.last; ++tile) {
        float acc[4][128];
        for (int quad = 0; quad < 4; ++quad)
          for (int k = 0; k < 128; ++k) {
            const int column = tile * kTileColumns + 8 * (k / 4) + 2 * quad + k % 2;
            acc[quad][k] = k % 4 / 2 == half && column < vocab ? u[i * args.row_stride + column] : 0.0f;
          }
        fold_quad<CAP>(lanes, acc, half, tile, vocab, bias, static_cast<int>(args.targets[i]), sc,
                       kept.values ? kept.values + i * exp_pitch(vocab) : nullptr,
                       kept.values ? kept.references + i * plan.column_tiles + tile : nullptr);
      }
      partial[piece.split * args.rows + i] = merge_quad(lanes, sc.c);
    }
  }
  for (std::int64_t i = 0; i < args.rows; ++i) {
    const Scale sc = scale_of(args.inv_t[i], args.softcap);
    Running all = nothing_yet();
    for (int split = 0; split < plan.splits; ++split) all = merge(all, partial[split * args.rows + i], sc.c);
    if (kept.values) kept.folds[i] = all;
    const Stats st = args.targets[i] == kIgnore ? Stats{} : stats_of(all.fold, all.v_target, sc);
    args.logp[i] = st.logp, args.entropy[i] = st.entropy, args.lse[i] = st.lse;
  }
}

// Exponentials to du / factor.
template <bool CAP>
void run_gradient(const Args& args, const Kept& kept, float* factor) {
  const std::int64_t pitch = exp_pitch(args.vocab), tiles = pitch / kTileColumns;
  for (std::int64_t i = 0; i < args.rows; ++i) {
    const Scale sc = scale_of(args.inv_t[i], args.softcap);
    const Coefficients k{args.a[i], args.b ? args.b[i] : 0.0f, args.z_loss ? args.z_loss[i] : 0.0f};
    const ExpRow row = exp_row<CAP>(kept.folds[i], args.targets[i] == kIgnore, k, sc);
    std::uint16_t* const values = kept.values + i * pitch;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const float reference = kept.references[i * tiles + tile];
      if (is_finished(row, reference)) continue;
      for (int lane = 0; lane < 32; ++lane) {
        Vector at;
        std::memcpy(&at, values + tile * kTileColumns + 8 * lane, sizeof at);
        at = finish<CAP>(at, row, reference);
        std::memcpy(values + tile * kTileColumns + 8 * lane, &at, sizeof at);
      }
    }
    factor[i] = row.factor;
    if (!row.idle) store_one(values + args.targets[i], row.hit);
  }
}

}  // namespace

extern "C" {

// Writes (row tile, split, first, last) of every piece; their number.
int linear_pieces(std::int64_t rows, std::int64_t vocab, int* out, int most) {
  const LinearPlan plan = plan_linear(rows, vocab);
  const int count = plan.row_tiles * plan.splits;
  for (int index = 0; index < count && index < most; ++index) {
    const Piece p = piece_of(plan, index);
    for (const int field : {p.row_tile, p.split, p.first, p.last}) *out++ = field;
  }
  return count;
}

// u [rows, vocab] = x w^T by the boxes and steps of the kernel; what a box has outside its matrix is 0.
void linear_product(const float* x, const float* w, std::int64_t rows, std::int64_t vocab, std::int64_t depth,
                    float* u) {
  const LinearPlan plan = plan_linear(rows, vocab);
  const auto element = [depth](const float* matrix, std::int64_t most, std::int64_t row, std::int64_t column) {
    return row < most && column < depth ? matrix[row * depth + column] : 0.0f;
  };
  for (int index = 0; index < plan.row_tiles * plan.splits; ++index) {
    const Piece piece = piece_of(plan, index);
    for (int tile = piece.first; tile < piece.last; ++tile) {
      std::vector<float> acc(kTileRows * kTileColumns);
      for (int step = 0; step < depth / kTileDepth; ++step) {
        const Boxes at = boxes_of(piece, tile, step);
        for (int r = 0; r < kTileRows; ++r)
          for (int k = 0; k < kTileDepth && at.hidden_row + r < rows; ++k) {
            const float left = element(x, rows, at.hidden_row + r, at.depth + k);
            for (int c = 0; c < kTileColumns; ++c)
              acc[r * kTileColumns + c] += left * element(w, vocab, at.weight_row + c, at.depth + k);
          }
      }
      for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileColumns; ++c) {
          const std::int64_t i = piece.row_tile * kTileRows + r, j = tile * kTileColumns + c;
          if (i < rows && j < vocab) u[i * vocab + j] = acc[r * kTileColumns + c];
        }
    }
  }
}

std::int64_t linear_pitch(std::int64_t vocab) { return exp_pitch(vocab); }

// values [rows, pitch] may be null; then so may references [rows, pitch / 256] and folds [rows, 4].
void linear(void* u, std::int64_t rows, std::int64_t vocab, const float* bias, const std::int64_t* targets,
            const float* inv_t, float softcap, float* logp, float* entropy, float* lse, std::uint16_t* values,
            float* references, float* folds) {
  static_assert(sizeof(Running) == 16, "four floats a row");
  const Args args{u,    rows,    vocab, vocab,   targets, inv_t,   softcap,
                  logp, entropy, lse,   nullptr, nullptr, nullptr, nullptr};
  const Kept kept{values, references, reinterpret_cast<Running*>(folds)};
  softcap > 0.0f ? run_linear<true>(args, bias, kept) : run_linear<false>(args, bias, kept);
}

void linear_gradient(std::uint16_t* values, float* references, float* folds, std::int64_t rows, std::int64_t vocab,
                     const std::int64_t* targets, const float* inv_t, float softcap, const float* a, const float* b,
                     const float* z, float* factor) {
  const Args args{nullptr, rows, vocab, 0, targets, inv_t, softcap, nullptr, nullptr, nullptr, a, b, z, nullptr};
  const Kept kept{values, references, reinterpret_cast<Running*>(folds)};
  softcap > 0.0f ? run_gradient<true>(args, kept, factor) : run_gradient<false>(args, kept, factor);
}

const char* op_name(int op) { return op < static_cast<int>(omni::Op::kCount) ? omni::kOpNames[op] : ""; }

// (cluster, vectors a block, shared bytes) and each warp's (first, count) of a row that starts `lead` elements late.
int plan(std::int64_t vocab, int element_bytes, int lead, int* out, int* spans) {
  const RowPlan p = plan_rows(vocab, element_bytes);
  out[0] = p.cluster, out[1] = p.slice_vectors, out[2] = p.shared_bytes;
  const int vectors = vectors_of({lead, static_cast<int>(vocab)}, kVectorBytes / element_bytes);
  for (int rank = 0; rank < p.cluster; ++rank)
    for (int warp = 0; warp < kRowWarps; ++warp) {
      const Span part = warp_span(block_span(vectors, p.slice_vectors, rank), p.slice_vectors, warp);
      *spans++ = part.first;
      *spans++ = part.count;
    }
  return vectors;
}

int forward(void* logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t stride,
            const std::int64_t* targets, const float* inv_t, float softcap, float* logp, float* entropy, float* lse) {
  return dispatch(
      {logits, rows, vocab, stride, targets, inv_t, softcap, logp, entropy, lse, nullptr, nullptr, nullptr, nullptr},
      dtype);
}

int backward(void* logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t stride,
             const std::int64_t* targets, const float* inv_t, float softcap, float* entropy, float* lse, const float* a,
             const float* b, const float* z_loss) {
  return dispatch({logits, rows, vocab, stride, targets, inv_t, softcap, nullptr, entropy, lse, a, b, z_loss, nullptr},
                  dtype);
}

// steps: [count, 5] op, dst, x, y, z; constants: where op is 0, by step.
int fused(void* logits, int dtype, std::int64_t rows, std::int64_t vocab, std::int64_t stride,
          const std::int64_t* targets, const float* inv_t, float softcap, float* logp, float* entropy, float* lse,
          const int* steps, const float* values, int count, const float* const* columns, int column_count,
          const int* results) {
  Program p{};
  p.columns = column_count;
  for (int k = 0; k < column_count; ++k) p.column[k] = columns[k];
  for (int k = 0; k < count; ++k) {
    const int* s = steps + 5 * k;
    const auto byte = [s](int field) { return static_cast<std::uint8_t>(s[field]); };
    if (s[0] == 0)
      p.constant[p.constants++] = {s[1], values[k]};
    else
      p.step[p.steps++] = {byte(0), byte(1), byte(2), byte(3), byte(4), {}};
  }
  p.a = results[0], p.b = results[1], p.z = results[2];
  return dispatch(
      {logits, rows, vocab, stride, targets, inv_t, softcap, logp, entropy, lse, nullptr, nullptr, nullptr, &p}, dtype);
}

}  // extern "C"
