// How a product with quantized weights is cut into units of work, and where its quantized inputs lie in the scratch.
#ifndef PEAK_QUANTIZED_LAYOUT_H_
#define PEAK_QUANTIZED_LAYOUT_H_

#include <algorithm>
#include <cstdint>

#include "base/memory.h"
#include "gemm/quantized.h"

namespace peak {

constexpr int64_t kUnitPanels = 3;    // panels in a unit of work; a tile has at most this number
constexpr int64_t kTileRows = 8;      // rows of x that are stored together
constexpr int64_t kBlockRows = 1024;  // rows of x in a block: they stay in the last-level cache
// Up to this number of rows, panels are read one by one: the processor prefetches a single stream best.
constexpr int64_t kStreamRows = 8;
// Up to this number of rows, each tile unpacks 4-bit weights in registers. With more rows a unit is unpacked once for
// each block of rows.
constexpr int64_t kPackedRows = 32;

inline int64_t Pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The arrays of the scratch. With scratch == nullptr only `size` is valid.
struct QuantizedLayout {
  int64_t rows, quads, blocks;  // rows are padded so that the last tile has 1, 2, 4 or 8
  int8_t* bytes;    // x as (tile, quad, row, 4)
  float* scales;    // of x: (tile, block, row)
  int32_t* starts;  // (tile, block, row): what the sums start from, a correction for weights stored without a sign
  float* totals;    // (tile, block, row): the sum of a block of Q(x), which an offset or a zero point of W is multiplied by
  int64_t size;     // in bytes

  QuantizedLayout(const QuantizedArgs& args, void* scratch) {
    const int64_t rest = args.rows % kTileRows;
    rows = args.rows - rest + (rest <= 2 ? rest : rest <= 4 ? 4 : kTileRows);
    quads = Pieces(args.k, 8) * 2;
    blocks = Pieces(args.k, args.block);
    Arena arena(scratch);
    bytes = arena.Take<int8_t>(rows * quads * 4);
    scales = arena.Take<float>(rows * blocks);
    starts = arena.Take<int32_t>(rows * blocks);
    totals = arena.Take<float>(args.offset == nullptr ? 0 : rows * blocks);
    size = arena.used();
  }
  int64_t TileRows(int64_t row) const { return std::min(kTileRows, rows - row); }
};

}  // namespace peak

#endif  // PEAK_QUANTIZED_LAYOUT_H_
