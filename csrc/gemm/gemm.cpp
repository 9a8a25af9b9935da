#include "gemm/gemm.h"

#include <omp.h>

#include <algorithm>
#include <utility>

#include "base/memory.h"

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
  int64_t row_begin, row_end, column_begin, column_end;  // panels of a block
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

// Packs row panels [begin, end) of a block of a.
template <class T>
void PackRows(const GemmArgs& args, const GemmBlock& block, int64_t begin, int64_t end, float* out) {
  const int64_t slots = (block.depth + kSlot<T> - 1) / kSlot<T>, row = begin * kPanelRows;
  const int64_t rows = std::min(end * kPanelRows, block.rows) - row;
  const T* a = static_cast<const T*>(args.a) + (block.row + row) * args.a_row + block.k * args.a_k;
  Pack<T>(a, args.a_row, args.a_k, rows, block.depth, kRowVecs, out + row * slots);
  if (args.a_sums == nullptr || block.column > 0) return;
  for (int64_t i = 0; i < rows; i += kLanes) {
    const float* panel = out + (row + i) / kPanelRows * kPanelRows * slots + i % kPanelRows;
    AddSlots<T>(panel, slots, kPanelRows, rows - i, block.first, args.a_sums + block.row + row + i);
  }
}

// Prepares the same rows for MultiplyPanels.
template <class T>
void PrepareRows(const GemmArgs& args, const GemmBlock& block, int64_t begin, int64_t end, float* out) {
  if (!ReadsRows<T>(args)) return PackRows<T>(args, block, begin, end, out);
  if (args.a_sums == nullptr || block.column > 0) return;
  const int64_t last = block.row + std::min(end * kPanelRows, block.rows);
  const float* a = static_cast<const float*>(args.a) + block.k * args.a_k;
  for (int64_t row = block.row + begin * kPanelRows; row < last; row += kLanes) {
    AddSlots<float>(a + row, block.depth, args.a_k, last - row, block.first, args.a_sums + row);
  }
}

// Packs elements k to k + depth of some columns of b.
template <class T>
void PackColumns(const GemmArgs& args, int64_t column, int64_t columns, int64_t k, int64_t depth, float* out) {
  const T* from = static_cast<const T*>(args.b) + column * args.b_col + k * args.b_k;
  Pack<T>(from, args.b_col, args.b_k, columns, depth, kColumnVecs, out);
}

// Columns of a block whose packed panels stay in the second-level cache.
struct ColumnGroup {
  int64_t begin, end;  // panels of a block
};

// Computes the tiles of one part of a block in a group of columns; b is the group, packed.
template <class T>
void MultiplyGroup(const GemmArgs& args, const GemmBlock& block, const PanelRange& part, const ColumnGroup& group,
                   const float* a, const float* b, float* sums) {
  const int64_t slots = (block.depth + kSlot<T> - 1) / kSlot<T>;
  const int64_t panels = (block.columns + kColumns - 1) / kColumns;
  alignas(64) float tile[kRows * kColumns];
  for (int64_t i = part.row_begin * kPanelRows; i < std::min(part.row_end * kPanelRows, block.rows); i += kRows) {
    TileRows left{a + i / kPanelRows * kPanelRows * slots + i % kPanelRows, 1, kPanelRows};
    if (ReadsRows<T>(args)) {
      const float* rows = static_cast<const float*>(args.a) + (block.row + i) * args.a_row + block.k * args.a_k;
      left = {rows, args.a_row, args.a_k};
    }
    for (int64_t j = group.begin; j < group.end; ++j) {
      float* at = sums == nullptr ? tile : sums + (i / kRows * panels + j) * kRows * kColumns;
      const int64_t width = block.columns - j * kColumns;
      const TileFunction multiply =
          left.slot_step == 1 ? TileOf<T, true>(block.rows - i, width) : TileOf<T, false>(block.rows - i, width);
      if (block.last) PrefetchTile<T>(args, block.row + i, block.column + j * kColumns);
      multiply(slots, left, b + (j - group.begin) * kColumns * slots, block.first, at);
      if (block.last) FinishTile<T>(args, at, block.row + i, block.column + j * kColumns);
    }
  }
}

// Computes the tiles of one part of a block, one group of columns after the other. The thread that uses a group packs
// it.
template <class T>
void MultiplyPanels(const GemmArgs& args, const GemmBlock& block, const PanelRange& part, const float* a, float* b,
                    float* sums) {
  const int64_t slots = (block.depth + kSlot<T> - 1) / kSlot<T>;
  const int64_t most = std::max<int64_t>(1, kGroupFloats / (kColumns * std::max<int64_t>(1, slots)));
  for (int64_t begin = part.column_begin; begin < part.column_end; begin += most) {
    const ColumnGroup group{begin, std::min(begin + most, part.column_end)};
    const int64_t column = begin * kColumns, columns = std::min(group.end * kColumns, block.columns) - column;
    PackColumns<T>(args, block.column + column, columns, block.k, block.depth, b);
    MultiplyGroup<T>(args, block, part, group, a, b, sums);
  }
}

#else

namespace peak {

namespace {

// Sizes of a block of C and of k: the packed block of a and the sums of C stay in the last-level cache.
constexpr int64_t kBlockRows = 1024, kBlockColumns = 3072, kBlockSlots = 1024;

int64_t Pieces(int64_t n, int64_t most) { return std::max<int64_t>(1, (n + most - 1) / most); }
int64_t Up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
float* FloatWorkspace(int64_t count) {
  return reinterpret_cast<float*>(Workspace(count * static_cast<int64_t>(sizeof(float))));
}

// Divides a block among `threads`: the grid of row groups and column groups with the least work for the slowest thread.
std::pair<int, int> Grid(int64_t row_panels, int64_t column_panels, int threads) {
  std::pair<int, int> best{1, 1};
  int64_t least = row_panels * column_panels + 1;
  for (int r = 1; r <= threads; ++r) {
    const int c = threads / r;
    const int64_t work = ((row_panels + r - 1) / r) * ((column_panels + c - 1) / c);
    if (work < least) {
      least = work;
      best = {r, c};
    }
  }
  return best;
}

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
    const int64_t slots = depth / tile.slot;
    a_size = rows * slots;
    b_size = std::max(kGroupFloats, tile.columns * slots);
    sums_size = depth < args.k ? rows * columns : 0;
  }
  int64_t Scratch(int threads) const { return a_size + sums_size + threads * b_size; }
};

// Whether b is not packed. A b that is contiguous along k is transposed in registers, for one panel of a.
bool IsSkinny(const GemmArgs& args, const GemmTile& tile) {
  return args.m <= (args.b_k == 1 ? tile.rows : kSkinnyAcross);
}

// The size of the packed rows of a skinny product, in floats.
int64_t SkinnyScratch(const GemmArgs& args, const GemmTile& tile) {
  return Up(args.k, tile.slot) / tile.slot * tile.rows;
}

void PackSkinnyRows(const GemmArgs& args, float* a) {
  PEAK_PICK_DTYPE(args.dtype, PackRows)(args, {0, args.m, 0, args.n, 0, args.k, true, true}, 0, 1, a);
}

// Divides the columns among the threads of the current team, or among `threads`.
void MultiplySkinnyRows(const GemmArgs& args, const GemmPlan& plan, const float* a, int threads) {
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplySkinny);
  ParallelParts(Pieces(args.n, plan.tile.columns), threads, threads,
                [&](int64_t, int64_t begin, int64_t end) { multiply(args, plan.depth, a, begin, end); });
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

// Computes one thread's part of a product. All `workers` call it with the same scratch.
void MultiplyPart(const GemmArgs& args, const GemmPlan& plan, float* a, int id, int workers) {
  const auto prepare = PEAK_PICK_DTYPE(args.dtype, PrepareRows);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplyPanels);
  const auto [row_groups, column_groups] = Grid(plan.rows / plan.tile.rows, plan.columns / plan.tile.columns, workers);
  const int64_t i = id / column_groups, j = id % column_groups, groups = row_groups, others = column_groups;
  float* const sums = plan.sums_size > 0 ? a + plan.a_size : nullptr;
  float* const b = a + plan.a_size + plan.sums_size + id * plan.b_size;
  ForEachBlock(args, plan, 0, args.n, [&](const GemmBlock& block) {
    const int64_t r = Pieces(block.rows, plan.tile.rows), c = Pieces(block.columns, plan.tile.columns);
    prepare(args, block, r * id / workers, r * (id + 1) / workers, a);
    Barrier();
    const PanelRange part{r * i / groups, r * (i + 1) / groups, c * j / others, c * (j + 1) / others};
    if (i < groups) multiply(args, block, part, a, b, sums);
    Barrier();
  });
}

}  // namespace

int64_t GemmScratch(const GemmArgs& args, int threads) {
  const GemmPlan plan(args);
  return IsSkinny(args, plan.tile) ? SkinnyScratch(args, plan.tile) : plan.Scratch(threads);
}

void TeamGemm(const GemmArgs& args, float* scratch) {
  if (args.m == 0 || args.n == 0) return;
  const Team* team = Team::Current();
  const GemmPlan plan(args);
  if (!IsSkinny(args, plan.tile)) return MultiplyPart(args, plan, scratch, team->id, team->size);
  if (team->id == 0) PackSkinnyRows(args, scratch);
  Barrier();
  MultiplySkinnyRows(args, plan, scratch, team->size);
}

int64_t GemmPanels(const GemmArgs& args) { return Pieces(args.n, PEAK_PICK_DTYPE(args.dtype, TileSizes)().columns); }

int64_t GemmPartScratch(const GemmArgs& args) {
  const GemmTile tile = PEAK_PICK_DTYPE(args.dtype, TileSizes)();
  const int64_t rows = std::min(Up(args.m, tile.rows), kBlockRows), all_slots = Up(args.k, tile.slot) / tile.slot;
  const int64_t columns = std::min(Up(args.n, tile.columns), kBlockColumns), slots = std::min(all_slots, kBlockSlots) + 1;
  const int64_t b = std::max(kGroupFloats, tile.columns * slots);
  return std::max(rows * slots, tile.rows * all_slots) + (all_slots > kBlockSlots ? rows * columns : 0) + b;
}

void GemmPart(const GemmArgs& args, int64_t part, int64_t parts, float* scratch) {
  if (args.m == 0) return;
  const GemmPlan plan(args);
  const int64_t panels = Pieces(args.n, plan.tile.columns);
  const int64_t begin = panels * part / parts, end = panels * (part + 1) / parts;
  if (IsSkinny(args, plan.tile)) {
    const GemmBlock block{0, args.m, begin, args.n, 0, args.k, true, true};
    PEAK_PICK_DTYPE(args.dtype, PackRows)(args, block, 0, 1, scratch);
    return PEAK_PICK_DTYPE(args.dtype, MultiplySkinny)(args, plan.depth, scratch, begin, end);
  }
  const auto prepare = PEAK_PICK_DTYPE(args.dtype, PrepareRows);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplyPanels);
  float* const sums = plan.sums_size > 0 ? scratch + plan.a_size : nullptr;
  float* const b = scratch + plan.a_size + plan.sums_size;
  const int64_t last = std::min(end * plan.tile.columns, args.n);
  ForEachBlock(args, plan, begin * plan.tile.columns, last, [&](const GemmBlock& block) {
    const int64_t r = Pieces(block.rows, plan.tile.rows), c = Pieces(block.columns, plan.tile.columns);
    prepare(args, block, 0, r, scratch);
    multiply(args, block, {0, r, 0, c}, scratch, b, sums);
  });
}

void Gemm(const GemmArgs& args, int threads) {
  if (args.m == 0 || args.n == 0) return;
  const GemmPlan plan(args);
  if (IsSkinny(args, plan.tile)) {
    float* const a = FloatWorkspace(SkinnyScratch(args, plan.tile));
    PackSkinnyRows(args, a);
    return MultiplySkinnyRows(args, plan, a, threads);
  }
  const auto grid = Grid(plan.rows / plan.tile.rows, plan.columns / plan.tile.columns, threads);
  const int workers = grid.first * grid.second;
  float* const scratch = FloatWorkspace(plan.Scratch(workers));
  // The team is smaller than `workers` inside another parallel region, or if OMP_THREAD_LIMIT or OMP_DYNAMIC limits it.
#pragma omp parallel num_threads(workers) if (workers > 1)
  MultiplyPart(args, plan, scratch, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace peak

#endif  // PEAK_ISA
