#include "gemm/gemm.h"

#include <algorithm>
#include <utility>

#include "base/memory.h"
#include "base/parallel.h"
#include "gemm/quantized.h"

namespace peak {

namespace {

struct GemmTile {
  int64_t rows, columns;  // of a panel of a, of a panel of b
  int64_t slot;           // elements of k in a slot
};
struct GemmBlock {
  int64_t row, rows, column, columns, k, depth;
  bool first, last;  // along k
};
struct PanelRange {
  int64_t begin, end;  // panels of a block
};

constexpr int64_t kSkinnyAcross = 4;  // up to this number of rows, a b with contiguous rows is not packed
constexpr int64_t kDirectColumns = 512, kSharedSetFloats = 256;
constexpr int64_t kGroupFloats = 120 << 10;  // packed b in a group of columns: it stays in the second-level cache

}  // namespace

}  // namespace peak

#define PEAK_THIS_FILE "gemm/gemm.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "gemm/panels.h"
#include "gemm/decoded_panels.h"
#include "gemm/register_tile.h"
#include "gemm/epilogues.h"
#include "gemm/skinny_gemm.h"

template <class T>
GemmTile TileSizes() {
  return {kPanelRows, kColumns, kSlot<T>};
}

// Whether the tiles read a where it is instead of packed: it pays for few panels of b. It does not pay if the slots are
// a multiple of 1 KiB apart: they share four sets of the first-level cache. Sums are formed of packed rows or of rows
// that are contiguous.
template <class T>
bool ReadsRows(const GemmArgs& args) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (args.n > kDirectColumns) return false;
    return args.a_k == 1 ? args.a_sums == nullptr || args.a_row == 1 : args.a_k % kSharedSetFloats != 0;
  } else {
    return false;
  }
}

// Packs row panels [begin, end) of a block of an a of type X. kHalves: each becomes two (gemm/panels.h).
template <class T, bool kHalves, class X>
void PackRowsOf(const GemmArgs& args, const GemmBlock& block, int64_t begin, int64_t end, float* out) {
  const int64_t slots = (block.depth + kSlot<T> - 1) / kSlot<T>, row = begin * kPanelRows;
  const int64_t rows = std::min(end * kPanelRows, block.rows) - row;
  const X* a = static_cast<const X*>(args.a) + (block.row + row) * args.a_row + block.k * args.a_k;
  out += row * slots;
  Pack<T, kRowVecs, kHalves>(a, args.a_row, args.a_k, rows, block.depth, out);
  if (args.a_sums == nullptr || block.column > 0) return;
  constexpr int64_t kWidth = kHalves ? kRows : kPanelRows;
  for (int64_t i = 0; i < rows; i += kLanes) {
    const float* panel = out + i / kPanelRows * kPanelRows * slots + i % kPanelRows;
    AddSlots<T, kHalves>(panel, slots, kWidth, slots * kWidth, rows - i, block.first, args.a_sums + block.row + row + i);
  }
}
template <class T, bool kHalves>
void PackRows(const GemmArgs& args, const GemmBlock& block, int64_t begin, int64_t end, float* out) {
  args.float32_rows ? PackRowsOf<T, kHalves, float>(args, block, begin, end, out)
                    : PackRowsOf<T, kHalves, T>(args, block, begin, end, out);
}
template <class T>
void PackSkinnyRows(const GemmArgs& args, const GemmBlock& block, float* out) {
  PackRows<T, false>(args, block, 0, 1, out);
}

// Prepares the same rows for MultiplyPanels.
template <class T>
void PrepareRows(const GemmArgs& args, const GemmBlock& block, int64_t begin, int64_t end, float* out) {
  if (!ReadsRows<T>(args)) return PackRows<T, kTwoPanels>(args, block, begin, end, out);
  if (args.a_sums == nullptr || block.column > 0) return;
  const int64_t last = block.row + std::min(end * kPanelRows, block.rows);
  const float* a = static_cast<const float*>(args.a) + block.k * args.a_k;
  for (int64_t row = block.row + begin * kPanelRows; row < last; row += kLanes) {
    AddSlots<float, false>(a + row, block.depth, args.a_k, 0, last - row, block.first, args.a_sums + row);
  }
}

// Packs a group of columns of a block.
template <class T>
void PackColumns(const GemmArgs& args, const GemmBlock& block, const PanelRange& group, float* out) {
  const int64_t begin = group.begin * kColumns, end = std::min(group.end * kColumns, block.columns);
  if (args.weight != nullptr) {
    return PackDecoded<T>(*args.weight, block.column + begin, end - begin, block.k, block.depth, out);
  }
  const T* from = static_cast<const T*>(args.b) + (block.column + begin) * args.b_col + block.k * args.b_k;
  Pack<T, kColumnVecs, false>(from, args.b_col, args.b_k, end - begin, block.depth, out);
}

// Computes the tiles of a part of the rows of a block in a group of columns; b is the group, packed.
template <class T>
void MultiplyPanels(const GemmArgs& args, const GemmBlock& block, const PanelRange& part, const PanelRange& group,
                    const float* a, const float* b, float* sums) {
  const int64_t slots = (block.depth + kSlot<T> - 1) / kSlot<T>;
  const int64_t panels = (block.columns + kColumns - 1) / kColumns;
  alignas(64) float tile[kRows * kColumns];
  for (int64_t i = part.begin * kPanelRows; i < std::min(part.end * kPanelRows, block.rows); i += kRows) {
    TileRows left{a + i * slots, 1, kRows};
    if (ReadsRows<T>(args)) {
      const float* rows = static_cast<const float*>(args.a) + (block.row + i) * args.a_row + block.k * args.a_k;
      left = {rows, args.a_row, args.a_k};
    }
    for (int64_t j = group.begin; j < group.end; ++j) {
      float* at = sums == nullptr ? tile : sums + (i / kRows * panels + j) * kRows * kColumns;
      const int64_t width = block.columns - j * kColumns;
      const TileFunction multiply =
          left.slot_step == 1 ? TileOf<T, true>(block.rows - i, width) : TileOf<T, false>(block.rows - i, width);
      if (block.last) PrefetchTile(args, block.row + i, block.column + j * kColumns);
      multiply(slots, left, b + (j - group.begin) * kColumns * slots, block.first, at);
      if (block.last) FinishTile(args, at, block.row + i, block.column + j * kColumns);
    }
  }
}

#else

namespace peak {

namespace {

// Sizes of a block of C and of k: the packed block of a and the sums of C stay in the last-level cache.
constexpr int64_t kBlockRows = 1024, kBlockColumns = 3072, kBlockSlots = 1024;
constexpr int64_t kSkinnyBytes = 128 << 10;  // of b in the smallest unit of a skinny product
constexpr int64_t kUnitFlops = 4'000'000;  // of the smallest unit: some ten microseconds

int64_t Pieces(int64_t n, int64_t most) { return std::max<int64_t>(1, (n + most - 1) / most); }
int64_t Up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
float* FloatWorkspace(int64_t count) {
  return reinterpret_cast<float*>(Workspace(count * static_cast<int64_t>(sizeof(float))));
}

// How a block is divided into units: groups of columns, whose packed panels stay in the second-level cache, times parts
// of the rows.
struct GemmUnits {
  int64_t row_panels, column_panels, groups, parts;

  GemmUnits(const GemmBlock& block, const GemmTile& tile, int threads)
      : row_panels(Pieces(block.rows, tile.rows)), column_panels(Pieces(block.columns, tile.columns)) {
    const int64_t slots = std::max<int64_t>(1, Pieces(block.depth, tile.slot));
    groups = Pieces(column_panels, std::max<int64_t>(1, kGroupFloats / (tile.columns * slots)));
    // Shares of whole groups are equal if the number of groups is a multiple of the threads. Few panels cannot be
    // divided equally, but parts of the rows can.
    if (column_panels >= kUnitsPerThread * threads) groups = std::min(Up(groups, threads), column_panels);
    const int64_t work = 2 * block.rows * block.columns * block.depth;
    const int64_t units = std::clamp<int64_t>(work / kUnitFlops, 1, kUnitsPerThread * threads);
    parts = std::min(row_panels, threads == 1 ? 1 : Up(Pieces(units, groups), groups % threads == 0 ? 1 : threads));
  }
  int64_t Count() const { return groups * parts; }
  // The parts of a group follow one another: a thread packs the group once for those that it takes.
  int64_t Group(int64_t unit) const { return unit / parts; }
  PanelRange Columns(int64_t unit) const {
    return {column_panels * Group(unit) / groups, column_panels * (Group(unit) + 1) / groups};
  }
  PanelRange Rows(int64_t unit) const {
    const int64_t part = unit % parts;
    return {row_panels * part / parts, row_panels * (part + 1) / parts};
  }
};

int64_t DepthOf(int64_t k, const GemmTile& tile) {
  const int64_t blocks = Pieces(k, kBlockSlots * tile.slot);
  return Up(Pieces(k, blocks), tile.slot);  // at least one slot: an empty sum is 0
}

// The blocks of a product and the memory that it needs.
struct GemmPlan {
  GemmTile tile;
  int64_t rows, columns, depth;  // of a block
  int64_t a_size, b_size, sums_size;  // in floats; b_size is for each thread

  explicit GemmPlan(const GemmArgs& args) : tile(PEAK_PICK_DTYPE(args.dtype, TileSizes)()) {
    rows = Up(Pieces(args.m, Pieces(args.m, kBlockRows)), tile.rows);
    columns = Up(Pieces(args.n, Pieces(args.n, kBlockColumns)), tile.columns);
    depth = DepthOf(args.k, tile);
    if (args.weight != nullptr) depth = Up(depth, kPanelOutputs);
    const int64_t slots = depth / tile.slot;
    a_size = rows * slots;
    b_size = std::max(kGroupFloats, tile.columns * slots);
    sums_size = depth < args.k ? rows * columns : 0;
  }
  int64_t Scratch(int threads) const { return a_size + sums_size + threads * b_size; }
};

// Whether b is not packed. A b that is contiguous along k is transposed in registers, for one panel of a.
bool IsSkinny(const GemmArgs& args, const GemmTile& tile) {
  return args.weight == nullptr && args.m <= (args.b_k == 1 ? tile.rows : kSkinnyAcross);
}

// The size of the packed rows of a skinny product, in floats.
int64_t SkinnyScratch(const GemmArgs& args, const GemmTile& tile) {
  return Up(args.k, tile.slot) / tile.slot * tile.rows;
}

// Multiplies column panels [begin, end).
void MultiplySkinnyRows(const GemmArgs& args, const GemmPlan& plan, int64_t begin, int64_t end, float* a, int threads) {
  const auto pack = PEAK_PICK_DTYPE(args.dtype, PackSkinnyRows);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplySkinny);
  const int64_t slot = plan.tile.slot, slots = Pieces(args.k, slot);
  // Sums of a row are formed from its first element to its last one.
  const int64_t slots_of_unit = args.a_sums == nullptr ? GrainRows(args.m * slot * SizeOf(RowsDType(args))) : slots;
  ParallelRanges(slots, std::max<int64_t>(1, slots_of_unit), threads, [&](int64_t first, int64_t last) {
    const int64_t k = first * slot, depth = std::min(last * slot, args.k) - k;
    pack(args, {0, args.m, begin, args.n, k, depth, first == 0, last == slots}, a + first * plan.tile.rows);
  });
  const int64_t panel_bytes = plan.tile.columns * std::max<int64_t>(1, args.k) * SizeOf(args.dtype);
  const int64_t grain = std::max<int64_t>(1, kSkinnyBytes / panel_bytes);
  ParallelRanges(end - begin, grain, threads, [&](int64_t first, int64_t last) {
    multiply(args, plan.depth, a, begin + first, begin + last);
  });
}

// Calls f(block) for the blocks of columns [begin, end) of a product, in order.
template <class F>
void ForEachBlock(const GemmArgs& args, const GemmPlan& plan, int64_t begin, int64_t end, const F& f) {
  for (int64_t column = begin; column < end; column += plan.columns) {
    for (int64_t row = 0; row < args.m; row += plan.rows) {
      for (int64_t k = 0; k == 0 || k < args.k; k += plan.depth) {
        f(GemmBlock{row, std::min(plan.rows, args.m - row), column, std::min(plan.columns, end - column), k,
                    std::min(plan.depth, args.k - k), k == 0, k + plan.depth >= args.k});
      }
    }
  }
}

// Multiplies columns [begin, end).
void MultiplyBlocks(const GemmArgs& args, const GemmPlan& plan, int64_t begin, int64_t end, float* a, int threads) {
  const auto prepare = PEAK_PICK_DTYPE(args.dtype, PrepareRows);
  const auto pack = PEAK_PICK_DTYPE(args.dtype, PackColumns);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplyPanels);
  float* const sums = plan.sums_size > 0 ? a + plan.a_size : nullptr;
  float* const all_b = a + plan.a_size + plan.sums_size;
  ForEachBlock(args, plan, begin, end, [&](const GemmBlock& block) {
    const GemmUnits units(block, plan.tile, threads);
    const int64_t grain = GrainRows(plan.tile.rows * block.depth * SizeOf(RowsDType(args)));
    ParallelRanges(units.row_panels, grain, threads, [&](int64_t first, int64_t last) {
      prepare(args, block, first, last, a);
    });
    int64_t packed = -1;  // the group in the memory of this thread
    ParallelUnits(units.Count(), threads, [&](int64_t unit, int worker) {
      const PanelRange columns = units.Columns(unit);
      float* const b = all_b + worker * plan.b_size;
      if (packed != units.Group(unit)) pack(args, block, columns, b);
      packed = units.Group(unit);
      multiply(args, block, units.Rows(unit), columns, a, b, sums);
    });
  });
}

}  // namespace

int64_t GemmScratch(const GemmArgs& args, int threads) {
  const GemmPlan plan(args);
  return IsSkinny(args, plan.tile) ? SkinnyScratch(args, plan.tile) : plan.Scratch(threads);
}

int64_t GemmPanels(const GemmArgs& args) { return Pieces(args.n, PEAK_PICK_DTYPE(args.dtype, TileSizes)().columns); }

int64_t GemmPartScratch(const GemmArgs& args) {
  const GemmTile tile = PEAK_PICK_DTYPE(args.dtype, TileSizes)();
  const int64_t rows = std::min(Up(args.m, tile.rows), kBlockRows), all_slots = Up(args.k, tile.slot) / tile.slot;
  const int64_t columns = std::min(Up(args.n, tile.columns), kBlockColumns), slots = std::min(all_slots, kBlockSlots) + 1;
  const int64_t b = std::max(kGroupFloats, tile.columns * slots);
  return std::max(rows * slots, tile.rows * all_slots) + (all_slots > kBlockSlots ? rows * columns : 0) + b;
}

void GemmPart(const GemmArgs& args, int64_t begin, int64_t end, float* scratch, int threads) {
  if (args.m == 0 || args.n == 0) return;
  const GemmPlan plan(args);
  if (IsSkinny(args, plan.tile)) return MultiplySkinnyRows(args, plan, begin, end, scratch, threads);
  const int64_t columns = plan.tile.columns;
  MultiplyBlocks(args, plan, begin * columns, std::min(end * columns, args.n), scratch, threads);
}

void Gemm(const GemmArgs& args, float* scratch, int threads) { GemmPart(args, 0, GemmPanels(args), scratch, threads); }

void Gemm(const GemmArgs& args, int threads) {
  float* const scratch = FloatWorkspace(GemmScratch(args, threads));
  Team::Open(threads, [&] { Gemm(args, scratch, threads); });
}

}  // namespace peak

#endif  // PEAK_ISA
