// Products of bf16 matrices, C [m, n] = A [m, k] B [k, n], summed in fp32: the contract, shared by every instruction
// set.
//
// B comes in panels of kPanel columns, [panels, k / 2, kPanel, 2]: rows in pairs, columns beyond n are 0. A is read as
// it is, rows of k with k even, or in tiles of kTileRows rows, [tiles, k / 2, kTileRows, 2], where its transpose is
// what there is. Whoever packs pairs an odd last row of A^T and B with zeros.
#pragma once
#include <cstdint>

namespace omni {

constexpr std::int64_t kPanel = 48;
constexpr std::int64_t kTileRows = 8;

// Where a product goes. Halves: an fp32 sum as its upper 16 bits in c and its lower ones in `low`, so that a sum which
// ends as bf16 needs no fp32 matrix beside it.
enum class Out : int {
  kBFloat16 = 0,
  kFloat32 = 1,
  kAdd = 2,        // times `scale`, added to the fp32 numbers that are there
  kHalves = 3,     // written
  kAddHalves = 4,  // added to the halves that are there
  kRound = 5,      // the same, and the sum rounded to bf16 in c; `low` is read only
};

struct Product {
  const std::uint16_t *a, *b;
  std::int64_t m, n, k;                // k even
  std::int64_t a_tile, a_row, a_unit;  // elements from tile to tile, row to row within one, pair to pair
  bool tiled;                          // A is in tiles, whose missing rows are there as zeros
  void* c;
  std::int64_t c_stride;  // elements from row to row, of c and of low
  Out out;
  std::uint16_t* low;  // halves
  float scale;         // kAdd
};

struct ProductKernels {
  void (*multiply)(const Product&, std::int64_t first_tile, std::int64_t last_tile, std::int64_t first_panel,
                   std::int64_t last_panel);
  // One panel of B out of B^T [n, k], k even.
  void (*pack_transposed)(const std::uint16_t* from, std::int64_t stride, std::int64_t n, std::int64_t k,
                          std::int64_t panel, std::uint16_t* to);
  // Panels [begin, end) out of [k, n]: of B, or, a tile of columns as a tile of rows, of the transpose of A. units:
  // pairs of rows in a whole panel, for a matrix that is a part of B.
  void (*pack_panels)(const std::uint16_t* from, std::int64_t stride, std::int64_t n, std::int64_t k,
                      std::int64_t units, std::int64_t begin, std::int64_t end, std::uint16_t* to);
  void (*pack_tiles)(const std::uint16_t* from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t units,
                     std::int64_t begin, std::int64_t end, std::uint16_t* to);
};

}  // namespace omni
