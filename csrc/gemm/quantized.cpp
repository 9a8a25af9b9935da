// More than 300 lines: the layout, its products and its epilogue are read together.
#include "gemm/quantized.h"

#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "gemm/gemm.h"
#include "base/memory.h"

namespace peak {

namespace {

// LEVEL_TABLES of kernels/ops/quantize.py in their order, plus 128.
constexpr uint8_t kQuantizedLevels[4][16] = {
    {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
    {120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135},
    {128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143},
    {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116},
};

constexpr int64_t kUnitPanels = 3;    // panels in a unit of work; a tile has at most this number
constexpr int64_t kTileRows = 8;      // rows of x that are stored together
constexpr int64_t kBlockRows = 1024;  // rows of x in a block: they stay in the last-level cache
constexpr int64_t kLine = kPanelOutputs * 4;
// Up to this number of rows of x, each thread quantizes all of x: sharing the result costs more.
constexpr int64_t kOwnRows = 8;
// Up to this number of rows, panels are read one by one: the processor prefetches a single stream best.
constexpr int64_t kStreamRows = 8;
// Up to this number of rows, each tile unpacks 4-bit weights in registers. With more rows a unit is unpacked once for
// each block of rows.
constexpr int64_t kPackedRows = 32;

int64_t Pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Whether each block of inputs of an output has a scale; else an output has one.
bool HasBlockScales(const QuantizedMatrix& matrix) { return matrix.f16_scales || matrix.bits == 4; }

// The arrays of the scratch. With scratch == nullptr only `size` is valid.
struct QuantizedLayout {
  int64_t rows, quads, blocks;  // rows are padded so that the last tile has 1, 2, 4 or 8
  int8_t* bytes;    // x as (tile, quad, row, 4)
  float* scales;    // of x: (tile, block, row)
  int32_t* starts;  // (tile, block, row): what the sums start from, a correction for weights stored without a sign
  float* totals;    // (tile, block, row): the sum of a block of Q(x), which an offset of W is multiplied by
  uint8_t* panels;  // for each thread, unpacked 4-bit weights
  int64_t size;     // in bytes

  QuantizedLayout(const QuantizedArgs& args, int parts, void* scratch) {
    const int64_t rest = args.rows % kTileRows;
    rows = args.rows - rest + (rest <= 2 ? rest : rest <= 4 ? 4 : kTileRows);
    quads = Pieces(args.k, 8) * 2;
    blocks = Pieces(args.k, args.block);
    Arena arena(scratch);
    bytes = arena.Take<int8_t>(rows * quads * 4);
    scales = arena.Take<float>(rows * blocks);
    starts = arena.Take<int32_t>(rows * blocks);
    totals = arena.Take<float>(args.offset == nullptr ? 0 : rows * blocks);
    panels = arena.Take<uint8_t>(args.bits == 4 && args.rows > kPackedRows ? parts * PanelBytes() : 0);
    size = arena.used();
  }
  int64_t PanelBytes() const { return kUnitPanels * quads * kLine; }
  int64_t TileRows(int64_t row) const { return std::min(kTileRows, rows - row); }
};

}  // namespace

}  // namespace peak

#define PEAK_THIS_FILE "gemm/quantized.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"

constexpr int kPanelVecs = kPanelOutputs / kLanes;
// The sums of a tile take most of the registers. With 16 registers a tile has one panel and half the rows.
constexpr int kTilePanels = kLanes == 16 ? kUnitPanels : 1;
constexpr int kMostRows = kLanes == 16 ? kTileRows : kTileRows / 2;

// -------------------------------------------------------------------------------------------------- quantizing of x
// Quantizes one block of a row: `count` elements. The quads of bytes are `stride` quads apart.
template <class T>
void QuantizeBlock(const T* x, int64_t count, int64_t quads, int64_t stride, int8_t* out, float* scale, int32_t* start,
                   float* scaled_total) {
  Vec most = Set(0.0f), sum = Set(0.0f);
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += kLanes) most = Max(most, Abs(Load(x + i, count - i)));
  const float largest = MaxOf(most), inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  alignas(64) int8_t bytes[kMaxBlock + kLanes] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = Round(Load(x + i, count - i) * Set(inverse));
    sum = sum + v;
    StoreBytes(bytes + i, Max(v, Set(-127.0f)));  // -127 for a NaN
  }
  const float total = Sum(sum), poison = total - total;  // NaN if an element is not finite (inf * 0 is NaN too)
  *scale = largest / 127.0f + poison;
  *start = poison == 0.0f ? (kQuadZero - 128) * static_cast<int32_t>(total) : 0;
  if (scaled_total != nullptr) *scaled_total = *scale * total;
#pragma GCC unroll 8
  for (int64_t q = 0; q < quads; ++q, out += stride * 4) std::memcpy(out, bytes + q * 4, 4);
}

// Quantizes blocks [begin, end) of all rows. The padding rows of the last tile become 0.
template <class T>
void QuantizeBlocks(const QuantizedArgs& args, const QuantizedLayout& layout, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < layout.rows; first += kTileRows) {
    const int64_t rows = layout.TileRows(first);
    for (int64_t i = 0; i < rows; ++i) {
      const bool exists = first + i < args.rows;
      const T* x = static_cast<const T*>(args.x) + (exists ? (first + i) * args.x_row : 0);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * args.block, count = exists ? std::min(args.block, args.k - at) : 0;
        const int64_t entry = first * layout.blocks + block * rows + i;
        QuantizeBlock(x + at, count, std::min(args.block, layout.quads * 4 - at) / 4, rows,
                      layout.bytes + first * layout.quads * 4 + (at / 4 * rows + i) * 4, layout.scales + entry,
                      layout.starts + entry, args.offset == nullptr ? nullptr : layout.totals + entry);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- products
// Formats of a panel's weights: the number of quads of inputs in a line, and the type of the scales of blocks, if any.
template <class S>
struct Bytes {
  using Scale = S;
  static constexpr int kLineQuads = 1;
  static constexpr bool kGrouped = !std::is_void_v<Scale>;
  Table table;
  PEAK_INLINE Quads Get(Quads line, int) const { return line; }
};
template <class S>
struct Nibbles {
  using Scale = S;
  static constexpr int kLineQuads = 2;
  static constexpr bool kGrouped = true;
  Table table;
  PEAK_INLINE Quads Get(Quads line, int half) const {
    return LookUp(table, half == 0 ? LowerNibbles(line) : UpperNibbles(line));
  }
};

// The inputs of a tile: rows of x and panels of weights.
struct TileArgs {
  const int8_t* bytes;
  const float* scales;
  const int32_t* starts;
  const float* totals;
  int64_t rows;
  const uint8_t* weight;
  int64_t panel_bytes;
  const uint8_t* levels;          // the table of 4-bit weights
  const uint16_t* weight_scales;  // of blocks: (panels, blocks, kPanelOutputs)
  const f16* offsets;             // as weight_scales, or null
  int64_t scales_stride;          // between panels
};

// sums[kRows][kPanels * kPanelOutputs] = Q(x) W^T, without the scales of outputs.
template <class Weight, int kRows, int kPanels>
void Tile(const TileArgs& tile, int64_t blocks, int64_t block_quads, int64_t quads, float* sums) {
  constexpr int kVecs = kPanels * kPanelVecs;
  constexpr int64_t kAhead = 1024;  // prefetch distance in each panel, in bytes
  Weight weights;
  weights.table = LoadTable(tile.levels);
  const int64_t rows = tile.rows, panel_bytes = tile.panel_bytes;
  const int8_t* x = tile.bytes;
  const float* scales = tile.scales;
  const int32_t* starts = tile.starts;
  const uint8_t* w = tile.weight;
  using Scale = std::conditional_t<Weight::kGrouped, typename Weight::Scale, bf16>;
  const Scale* weight_scales = reinterpret_cast<const Scale*>(tile.weight_scales);
  [[maybe_unused]] const f16* offsets = tile.offsets;
  [[maybe_unused]] const float* totals = tile.totals;
  const uint8_t* const last = w + panel_bytes - kAhead;  // from here on the next panels are prefetched
  // All loops over both arrays of sums are unrolled: otherwise GCC 12 keeps the inner sums in memory.
  Vec total[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) total[i][v] = Set(0.0f);
  }
  constexpr int64_t kNextScales = Weight::kGrouped ? kPanelOutputs : 0;
  for (; blocks > 0; --blocks, quads -= block_quads, scales += rows, starts += rows, weight_scales += kNextScales) {
    Ints acc[kRows][kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] = SetInts(starts[i]);
    }
    for (int64_t line = std::min(block_quads, quads) / Weight::kLineQuads; line > 0; --line, w += kLine) {
      Quads lines[kVecs];
      const uint8_t* const next = w + kAhead + (w < last ? 0 : (kPanels - 1) * panel_bytes);
      for (int p = 0; p < kPanels; ++p) {
        __builtin_prefetch(next + p * panel_bytes);
        for (int v = 0; v < kPanelVecs; ++v) {
          lines[p * kPanelVecs + v] = LoadQuads(w + p * panel_bytes + v * kLanes * 4);
        }
      }
      for (int half = 0; half < Weight::kLineQuads; ++half, x += rows * 4) {
        Quads right[kVecs];
        for (int v = 0; v < kVecs; ++v) right[v] = weights.Get(lines[v], half);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Quads left = SetQuad(x + i * 4);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) acc[i][v] = DotQuads(acc[i][v], right[v], left);
        }
      }
    }
    [[maybe_unused]] Vec groups[kVecs];
    if constexpr (Weight::kGrouped) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(weight_scales + (p + kPanels) * tile.scales_stride);
      for (int v = 0; v < kVecs; ++v) {
        groups[v] = Load(weight_scales + v / kPanelVecs * tile.scales_stride + v % kPanelVecs * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec scale = Set(scales[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Vec factor = scale;
        if constexpr (Weight::kGrouped) factor = scale * groups[v];
        total[i][v] = Fma(ToFloats(acc[i][v]), factor, total[i][v]);
      }
    }
    if constexpr (std::is_same_v<Scale, f16>) {
      if (offsets != nullptr) {
        for (int v = 0; v < kVecs; ++v) {
          groups[v] = Load(offsets + v / kPanelVecs * tile.scales_stride + v % kPanelVecs * kLanes);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec sum = Set(totals[i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) total[i][v] = Fma(sum, groups[v], total[i][v]);
        }
        offsets += kPanelOutputs, totals += rows;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) Store(sums + (i * kVecs + v) * kLanes, total[i][v]);
  }
}

template <class T>
PEAK_INLINE Vec Activated(int activation, Vec v) {
  switch (activation) {
    case static_cast<int>(Activation::kGeluTanh): return GeluTanh<T>::Value(v);
    case static_cast<int>(Activation::kGeluErf): return GeluErf::Value(v);
    case static_cast<int>(Activation::kRelu): return Relu::Value(v);
    case static_cast<int>(Activation::kSilu): return Silu<T>::Value(v);
    case static_cast<int>(Activation::kClampedSwiglu): return ClampedSwiglu<T>::Value(v);
    case static_cast<int>(Activation::kClampedUp): return ClampedSwiglu<T>::Up(v);
    default: return v;
  }
}

// Finishes `rows` rows of `width` sums and writes them to y from (row, column) on, as far as y reaches.
template <class T, class Out>
void Finish(const QuantizedArgs& args, const float* sums, int64_t width, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min(width, args.n - column);
  for (int64_t i = 0; i < std::min(rows, args.rows - row); ++i, sums += width) {
    Out* y = static_cast<Out*>(args.y) + (row + i) * args.y_row + column;
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v = Load(sums + j);
      if (!HasBlockScales(args)) v = v * Load(static_cast<const float*>(args.scale) + column + j, columns - j);
      if (args.bias != nullptr) v = v + Load(static_cast<const T*>(args.bias) + column + j, columns - j);
      Store(y + j, Activated<T>(args.activation, v), columns - j);
    }
  }
}

template <class T, class Weight, int kRows, int kPanels>
void MultiplyTile(const QuantizedArgs& args, const QuantizedLayout& layout, const TileArgs& tile, int64_t row,
                  int64_t column) {
  alignas(64) float sums[kRows * kPanels * kPanelOutputs];
  Tile<Weight, kRows, kPanels>(tile, layout.blocks, args.block / 4, layout.quads, sums);
  args.float32_out ? Finish<T, float>(args, sums, kPanels * kPanelOutputs, row, kRows, column)
                   : Finish<T, T>(args, sums, kPanels * kPanelOutputs, row, kRows, column);
}

// Multiplies the rows of one tile of x by kPanels panels.
template <class T, class Weight, int kPanels>
void MultiplyRows(const QuantizedArgs& args, const QuantizedLayout& layout, TileArgs tile, int64_t row,
                  int64_t column) {
  tile.rows = layout.TileRows(row);
  tile.bytes = layout.bytes + row * layout.quads * 4;
  tile.scales = layout.scales + row * layout.blocks;
  tile.starts = layout.starts + row * layout.blocks;
  tile.totals = layout.totals + row * layout.blocks;
  switch (tile.rows) {
    case 1: return MultiplyTile<T, Weight, 1, kPanels>(args, layout, tile, row, column);
    case 2: return MultiplyTile<T, Weight, 2, kPanels>(args, layout, tile, row, column);
    case 4: return MultiplyTile<T, Weight, 4, kPanels>(args, layout, tile, row, column);
    default:
      for (int64_t i = 0; i < kTileRows; i += kMostRows) {
        MultiplyTile<T, Weight, kMostRows, kPanels>(args, layout, tile, row + i, column);
        tile.bytes += kMostRows * 4, tile.scales += kMostRows, tile.starts += kMostRows, tile.totals += kMostRows;
      }
  }
}

// Multiplies rows [begin, end) of x by `panels` panels, the first of which is that of `column`.
template <class T, class Weight>
void MultiplyUnit(const QuantizedArgs& args, const QuantizedLayout& layout, TileArgs tile, int64_t panels,
                  int64_t column, int64_t begin, int64_t end) {
  while (panels > 0) {
    const int64_t step = args.rows > kStreamRows && panels >= kTilePanels ? kTilePanels : 1;
    for (int64_t row = begin; row < end; row += kTileRows) {
      step == kTilePanels ? MultiplyRows<T, Weight, kTilePanels>(args, layout, tile, row, column)
                          : MultiplyRows<T, Weight, 1>(args, layout, tile, row, column);
    }
    tile.weight += step * tile.panel_bytes;
    if (Weight::kGrouped) tile.weight_scales += step * tile.scales_stride;
    if (tile.offsets != nullptr) tile.offsets += step * tile.scales_stride;
    panels -= step, column += step * kPanelOutputs;
  }
}

// Unpacks lines of 8 inputs of 4 bits to lines of 4 inputs of 8 bits.
inline void Unpack(const uint8_t* levels, const uint8_t* from, int64_t bytes, uint8_t* out) {
  const Nibbles<bf16> weights{LoadTable(levels)};
  for (int64_t at = 0; at < bytes; at += kLine, out += 2 * kLine) {
    for (int v = 0; v < kPanelVecs; ++v) {
      const Quads line = LoadQuads(from + at + v * kLanes * 4);
      StoreQuads(out + v * kLanes * 4, weights.Get(line, 0));
      StoreQuads(out + kLine + v * kLanes * 4, weights.Get(line, 1));
    }
  }
}

// Multiplies rows [begin, end) of x by the panels of a unit, with scales of the type S.
template <class T, class S>
void MultiplyScaled(const QuantizedArgs& args, const QuantizedLayout& layout, const TileArgs& tile, int64_t panels,
                    int64_t column, int64_t begin, int64_t end) {
  const bool nibbles = args.bits == 4 && args.rows <= kPackedRows;
  nibbles ? MultiplyUnit<T, Nibbles<S>>(args, layout, tile, panels, column, begin, end)
          : MultiplyUnit<T, Bytes<S>>(args, layout, tile, panels, column, begin, end);
}

// Multiplies all rows by panels [begin, end).
template <class T>
void MultiplyPanels(const QuantizedArgs& args, const QuantizedLayout& layout, int64_t begin, int64_t end,
                    uint8_t* unpacked) {
  const bool nibbles = args.bits == 4, unpack = nibbles && args.rows > kPackedRows;
  const int64_t packed_bytes = layout.quads * kLine / (nibbles ? 2 : 1);
  for (int64_t row = 0; row < args.rows; row += kBlockRows) {
    const int64_t row_end = std::min(row + kBlockRows, args.rows);
    for (int64_t panel = begin; panel < end; panel += kUnitPanels) {
      const int64_t panels = std::min(kUnitPanels, end - panel);
      TileArgs tile{};
      tile.weight = args.weight + panel * packed_bytes;
      tile.panel_bytes = packed_bytes;
      tile.scales_stride = layout.blocks * kPanelOutputs;
      tile.levels = kQuantizedLevels[args.levels];
      if (HasBlockScales(args)) tile.weight_scales = static_cast<const uint16_t*>(args.scale) + panel * tile.scales_stride;
      if (args.offset != nullptr) tile.offsets = args.offset + panel * tile.scales_stride;
      if (unpack) {
        Unpack(tile.levels, tile.weight, panels * packed_bytes, unpacked);
        tile.weight = unpacked;
        tile.panel_bytes = layout.quads * kLine;
      }
      const int64_t column = panel * kPanelOutputs;
      args.f16_scales         ? MultiplyScaled<T, f16>(args, layout, tile, panels, column, row, row_end)
      : !HasBlockScales(args) ? MultiplyUnit<T, Bytes<void>>(args, layout, tile, panels, column, row, row_end)
                              : MultiplyScaled<T, bf16>(args, layout, tile, panels, column, row, row_end);
    }
  }
}

#else

namespace peak {

int64_t QuantizedScratch(const QuantizedArgs& args, int parts) { return QuantizedLayout(args, parts, nullptr).size; }

void QuantizeInputs(const QuantizedArgs& args, int part, int parts, void* scratch) {
  const QuantizedLayout layout(args, parts, scratch);
  const auto quantize = PEAK_PICK_DTYPE(args.dtype, QuantizeBlocks);
  quantize(args, layout, layout.blocks * part / parts, layout.blocks * (part + 1) / parts);
}

void MultiplyQuantized(const QuantizedArgs& args, int part, int parts, void* scratch) {
  const QuantizedLayout layout(args, parts, scratch);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplyPanels);
  const int64_t panels = Pieces(args.n, kPanelOutputs), units = Pieces(panels, kUnitPanels);
  multiply(args, layout, units * part / parts * kUnitPanels,
           std::min(panels, units * (part + 1) / parts * kUnitPanels), layout.panels + part * layout.PanelBytes());
}

void LinearQuantized(const QuantizedArgs& args, int threads) {
  if (args.rows == 0 || args.n == 0) return;
  const int64_t units = Pieces(args.n, kPanelOutputs * kUnitPanels);
  const int team = static_cast<int>(std::min<int64_t>(threads, units));
  const int64_t size = Pieces(QuantizedScratch(args, team), 64) * 64;
  const bool alone = args.rows <= kOwnRows;
  char* const scratch = Workspace(alone ? team * size : size);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    // The team may be smaller inside another parallel region, or if OMP_THREAD_LIMIT or OMP_DYNAMIC limits it.
    const int parts = omp_get_num_threads(), part = omp_get_thread_num();
    char* const own = alone ? scratch + part * size : scratch;
    alone ? QuantizeInputs(args, 0, 1, own) : QuantizeInputs(args, part, parts, own);
    if (!alone) {
#pragma omp barrier
    }
    MultiplyQuantized(args, part, parts, own);
  }
}

}  // namespace peak

#endif  // PEAK_ISA
