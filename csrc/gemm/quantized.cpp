#include "gemm/quantized.h"

#include <algorithm>
#include <type_traits>

#include "gemm/gemm.h"
#include "base/memory.h"
#include "base/parallel.h"
#include "gemm/quantized_layout.h"

#define PEAK_THIS_FILE "gemm/quantized.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"
#include "gemm/quantize_inputs.h"
#include "gemm/quantized_tile.h"

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

PEAK_INLINE Vec LoadBias(const QuantizedArgs& args, int64_t j, int64_t n) {
  return args.dtype == DType::kFloat32 ? Load(static_cast<const float*>(args.bias) + j, n)
                                       : Load(static_cast<const bf16*>(args.bias) + j, n);
}

// Finishes `rows` rows of `width` sums and writes them to y from (row, column) on, as far as y reaches.
template <class T>
void Finish(const QuantizedArgs& args, const float* sums, int64_t width, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min(width, args.n - column);
  for (int64_t i = 0; i < std::min(rows, args.rows - row); ++i, sums += width) {
    T* y = static_cast<T*>(args.y) + (row + i) * args.y_row + column;
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec v = Load(sums + j);
      if (!HasBlockScales(args)) v = v * Load(static_cast<const float*>(args.scale) + column + j, columns - j);
      if (args.bias != nullptr) v = v + LoadBias(args, column + j, columns - j);
      if (args.pre != nullptr) Store(static_cast<T*>(args.pre) + (row + i) * args.n + column + j, v, columns - j);
      Store(y + j, Activated<T>(args.activation, v), columns - j);
    }
  }
}

// Requests the memory that Finish writes: its rows arrive while a tile is computed.
template <class T>
PEAK_INLINE void PrefetchOutputs(const QuantizedArgs& args, int64_t width, int64_t row, int64_t rows, int64_t column) {
  for (int64_t i = 0; i < std::min(rows, args.rows - row); ++i) {
    const T* const y = static_cast<const T*>(args.y) + (row + i) * args.y_row + column;
    for (int64_t j = 0; j < width; j += kCacheLine / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(y + j, 1);
  }
}

template <class T, class Weight, int kRows, int kPanels>
void MultiplyTile(const QuantizedArgs& args, const QuantizedLayout& layout, const TileArgs& tile, int64_t row,
                  int64_t column) {
  alignas(64) float sums[kRows * kPanels * kPanelOutputs];
  PrefetchOutputs<T>(args, kPanels * kPanelOutputs, row, kRows, column);
  Tile<Weight, kRows, kPanels>(tile, layout.blocks, args.block / 4, layout.quads, sums);
  Finish<T>(args, sums, kPanels * kPanelOutputs, row, kRows, column);
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

// Chooses what a tile of several panels prefetches: the first tile of rows the lines that it reads soon itself, and each
// other one its share of the next unit, because the weights of this one are in the cache.
inline void LookAhead(TileArgs* tile, int64_t number, int64_t tiles) {
  const int64_t share = number == 0 ? 0 : tile->next_bytes / (tiles - 1);
  tile->ahead = number == 0 ? tile->weight + kAhead : tile->next + (number - 1) * share;
  tile->ahead_stride = number == 0 ? tile->panel_bytes : tile->next_bytes;
  tile->ahead_step = number == 0 ? kLine : share * kLine / std::max(tile->panel_bytes, kLine);  // no inputs: no bytes
}

// Multiplies rows [begin, end) of x by `panels` panels, the first of which is that of `column`.
template <class T, class Weight>
void MultiplyUnit(const QuantizedArgs& args, const QuantizedLayout& layout, TileArgs tile, int64_t panels,
                  int64_t column, int64_t begin, int64_t end) {
  while (panels > 0) {
    const int64_t step = args.rows > kStreamRows && panels >= kTilePanels ? kTilePanels : 1;
    for (int64_t row = begin; row < end; row += kTileRows) {
      LookAhead(&tile, (row - begin) / kTileRows, Pieces(end - begin, kTileRows));
      step == kTilePanels ? MultiplyRows<T, Weight, kTilePanels>(args, layout, tile, row, column)
                          : MultiplyRows<T, Weight, 1>(args, layout, tile, row, column);
    }
    tile.weight += step * tile.panel_bytes;
    tile.next += step * tile.next_bytes;
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
      tile.next = tile.weight + panels * packed_bytes;
      tile.next_bytes = packed_bytes;
      tile.scales_stride = layout.blocks * kPanelOutputs;
      tile.levels = kQuantizedLevels[args.levels];
      tile.zero_points = args.zero_points;
      if (HasBlockScales(args)) tile.weight_scales = static_cast<const uint16_t*>(args.scale) + panel * tile.scales_stride;
      if (args.offset != nullptr) tile.offsets = args.offset + panel * tile.scales_stride;
      if (unpack) {
        Unpack(tile.levels, tile.weight, panels * packed_bytes, unpacked);
        tile.weight = unpacked;
        tile.panel_bytes = layout.quads * kLine;
      }
      const int64_t column = panel * kPanelOutputs;
      switch (args.scales) {
        case Scales::kOfOutputs: MultiplyUnit<T, Bytes<void>>(args, layout, tile, panels, column, row, row_end); break;
        case Scales::kBf16OfBlocks: MultiplyScaled<T, bf16>(args, layout, tile, panels, column, row, row_end); break;
        case Scales::kF16OfBlocks: MultiplyScaled<T, f16>(args, layout, tile, panels, column, row, row_end); break;
      }
    }
  }
}

#else

namespace peak {

int64_t QuantizedInputBytes(const QuantizedArgs& args) { return QuantizedLayout(args, nullptr).size; }

int64_t UnpackedBytes(const QuantizedArgs& args) {
  return args.bits == 4 && args.rows > kPackedRows ? kUnitPanels * Pieces(args.k, 8) * 2 * kLine : 0;
}

int64_t QuantizedScratch(const QuantizedArgs& args, int threads) {
  return QuantizedInputBytes(args) + threads * UnpackedBytes(args);
}

void QuantizeInputs(const QuantizedArgs& args, int64_t begin, int64_t end, void* inputs) {
  PEAK_PICK_DTYPE(RowsDType(args), QuantizeBlocks)(args, QuantizedLayout(args, inputs), begin, end);
}

void MultiplyQuantized(const QuantizedArgs& args, int64_t begin, int64_t end, void* inputs, void* unpacked) {
  const auto multiply = PEAK_PICK_DTYPE(RowsDType(args), MultiplyPanels);
  multiply(args, QuantizedLayout(args, inputs), begin, end, static_cast<uint8_t*>(unpacked));
}

void LinearQuantized(const QuantizedArgs& args, char* scratch, int threads) {
  if (args.rows == 0 || args.n == 0) return;
  char* const unpacked = scratch + QuantizedInputBytes(args);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / (args.block * args.rows));
  ParallelRanges(QuantizedBlocks(args), grain, threads, [&](int64_t begin, int64_t end) {
    QuantizeInputs(args, begin, end, scratch);
  });
  ParallelRanges(QuantizedPanels(args), kUnitPanels, threads, [&](int64_t begin, int64_t end, int worker) {
    MultiplyQuantized(args, begin, end, scratch, unpacked + worker * UnpackedBytes(args));
  });
}

void LinearQuantized(const QuantizedArgs& args, int threads) {
  char* const scratch = Workspace(QuantizedScratch(args, threads));
  Team::Open(threads, [&] { LinearQuantized(args, scratch, threads); });
}

}  // namespace peak

#endif  // PEAK_ISA
