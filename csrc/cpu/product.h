// Products of matrices of one dtype, bf16 or fp32, C [m, n] = A [m, k] B [k, n], summed in fp32: the contract, shared by
// every instruction set.
//
// A unit is what one lane multiplies in one step: a pair of bf16, neighbours in k, or one fp32. B comes in panels of
// kPanel columns, [panels, units of k, kPanel, unit]: columns beyond n are 0. A is read as it is, rows of whole units,
// or in tiles of kTileRows rows, [tiles, units of k, kTileRows, unit], where its transpose is what there is. Whoever
// packs pairs an odd last row of A^T and B with zeros.
#pragma once
#include <cstdint>

namespace omni {

constexpr std::int64_t kPanel = 48;
constexpr std::int64_t kTileRows = 8;

// T: float, or std::uint16_t for the bits of a bf16.
template <class T>
constexpr std::int64_t kUnit = 4 / sizeof(T);

// Where a product goes; one of fp32 to kFloat32 or kAdd. Halves: an fp32 sum as its upper 16 bits in c and its lower
// ones in `low`, so that a sum which ends as bf16 needs no fp32 matrix beside it.
enum class Out : int {
  kBFloat16 = 0,
  kFloat32 = 1,
  kAdd = 2,        // times `scale`, added to the fp32 numbers that are there
  kHalves = 3,     // written
  kAddHalves = 4,  // added to the halves that are there
  kRound = 5,      // the same, and the sum rounded to bf16 in c; `low` is read only
};

template <class T>
struct Product {
  const T *a, *b;
  std::int64_t m, n, k;                // k in whole units
  std::int64_t a_tile, a_row, a_unit;  // elements from tile to tile, row to row within one, unit to unit
  bool tiled;                          // A is in tiles, whose missing rows are there as zeros
  void* c;
  std::int64_t c_stride;  // elements from row to row, of c and of low
  Out out;
  std::uint16_t* low;  // halves
  float scale;         // kAdd
};

template <class T>
struct ProductKernels {
  void (*multiply)(const Product<T>&, std::int64_t first_tile, std::int64_t last_tile, std::int64_t first_panel,
                   std::int64_t last_panel);
  // One panel of B out of B^T [n, k], k in whole units.
  void (*pack_transposed)(const T* from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t panel,
                          T* to);
  // Panels [begin, end) out of [k, n]: of B, or, a tile of columns as a tile of rows, of the transpose of A. units: of a
  // whole panel, of a matrix that is a part of B.
  void (*pack_panels)(const T* from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t units,
                      std::int64_t begin, std::int64_t end, T* to);
  void (*pack_tiles)(const T* from, std::int64_t stride, std::int64_t n, std::int64_t k, std::int64_t units,
                     std::int64_t begin, std::int64_t end, T* to);
};

}  // namespace omni
