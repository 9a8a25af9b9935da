#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <utility>

#include "memory.h"

namespace peak {

namespace {

struct GemmTile {
  int64_t rows, columns, slot;  // of a panel of a, of a panel of b, elements of k in a slot
};
struct GemmBlock {
  int64_t row, rows, column, columns, k, depth;
  bool first, last;  // along k
};
struct GemmPart {
  int64_t row_begin, row_end, column_begin, column_end;  // panels of a block
};

constexpr int64_t kThinRows = 4;  // up to which b is not packed
constexpr int64_t kGroupFloats = 120 << 10;  // of packed b, to stay in the second-level cache
constexpr int64_t kThinPanels = 16;  // of columns at a time where b is read by rows: their sums stay in the first cache
constexpr int64_t kThinSlots = 4;    // for each time that these sums are loaded and stored
constexpr int64_t kThinAhead = 16;   // k-rows that are asked for ahead, into the second-level cache

}  // namespace

}  // namespace peak

#define PEAK_THIS_FILE "gemm.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

#include "activation_math.h"

// A slot is what one lane of a product takes from each operand at a time: a float, or natively a pair of bf16.
// Where bf16 products are not native, packing widens to float.
template <class T>
constexpr int kSlot = 1;
template <>
constexpr int kSlot<bf16> = kNativePairs ? 2 : 1;

// The register tile: kRows x (kColumnVecs x kLanes) sums, with the loads of b and one broadcast of a beside them.
constexpr int kColumnVecs = 3;
constexpr int kRows = kRegisters == 32 ? 8 : 4;
constexpr int kColumns = kColumnVecs * kLanes;
// Panels of a: at least a Vec of rows, so that both operands are packed alike.
constexpr int kRowVecs = kRows > kLanes ? kRows / kLanes : 1;
constexpr int kPanelRows = kRowVecs * kLanes;

template <class T>
PEAK_INLINE Vec LoadSlots(const T* p, int64_t n) {
  if constexpr (kSlot<T> == 2) {
    return AsVec(LoadPairs(p, n));
  } else {
    return n >= kLanes ? Load(p) : LoadPart(p, n);
  }
}

// One Vec of slots from k-rows at p and, for pairs, k_stride further on: n lanes, `left` of the sum's elements.
template <class T>
PEAK_INLINE Vec GatherSlots(const T* p, int64_t k_stride, int64_t n, int64_t left) {
  if constexpr (kSlot<T> == 2) {
    return AsVec(ZipPairs(p, left > 1 ? p + k_stride : nullptr, n));
  } else {
    return n >= kLanes ? Load(p) : LoadPart(p, n);
  }
}

// Packs `lanes` <= kLanes rows of an operand, contiguous along k, into out[slot * width + lane].
template <class T>
void PackAlong(const T* p, int64_t stride, int64_t lanes, int64_t k, int64_t width, float* out) {
  constexpr int64_t kStep = kLanes * kSlot<T>;
  for (int64_t at = 0; at < k; at += kStep) {
    Vec rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < lanes ? LoadSlots(p + i * stride + at, k - at) : Set(0.0f);
    Transpose(rows);
    const int64_t slots = std::min<int64_t>(kLanes, (k - at + kSlot<T> - 1) / kSlot<T>);
    for (int64_t i = 0; i < slots; ++i, out += width) Store(out, rows[i]);
  }
}

// The same for rows that are neighbours in memory.
template <class T>
void PackAcross(const T* p, int64_t k_stride, int64_t lanes, int64_t k, int64_t width, float* out) {
  for (int64_t at = 0; at < k; at += kSlot<T>, out += width) {
    Store(out, GatherSlots(p + at * k_stride, k_stride, lanes, k - at));
  }
}

// Adds the elements of a packed panel of one Vec of rows to sums[lanes], in the order of k.
template <class T>
void AddSlots(const float* panel, int64_t slots, int64_t width, int64_t lanes, bool first, float* sums) {
  Vec sum = first ? Set(0.0f) : Load(sums, lanes);
  [[maybe_unused]] const bf16 ones[2] = {{0x3f80}, {0x3f80}};
  for (int64_t s = 0; s < slots; ++s, panel += width) {
    if constexpr (kSlot<T> == 2) {
      sum = DotPairs(sum, AsPairs(Load(panel)), SetPair(ones));
    } else {
      sum = sum + Load(panel);
    }
  }
  Store(sums, sum, lanes);
}

// Packs rows [0, rows) of an operand as panels of `vecs` Vecs: panel, slot, lane. Missing rows are 0.
template <class T>
void Pack(const void* from, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int64_t vecs, float* out) {
  const int64_t width = vecs * kLanes, slots = (k + kSlot<T> - 1) / kSlot<T>;
  for (int64_t row = 0; row < rows; row += width, out += slots * width) {
    for (int64_t v = 0; v < vecs; ++v) {
      const int64_t first = row + v * kLanes, lanes = std::max<int64_t>(0, std::min<int64_t>(kLanes, rows - first));
      const T* p = static_cast<const T*>(from) + (lanes > 0 ? first * row_stride : 0);
      k_stride == 1 ? PackAlong(p, row_stride, lanes, k, width, out + v * kLanes)
                    : PackAcross(p, k_stride, lanes, k, width, out + v * kLanes);
    }
  }
}

// One slot of each lane, multiplied and added.
template <class T>
PEAK_INLINE Vec AddProduct(Vec sum, Vec left, Vec right) {
  if constexpr (kSlot<T> == 2) {
    return DotPairs(sum, AsPairs(left), AsPairs(right));
  } else {
    return Fma(left, right, sum);
  }
}

// sums[kTileRows][kColumns] = (or, from the second block of k on, +=) the product of two panels over `slots`.
template <class T, int kTileRows>
void Tile(int64_t slots, const float* a, const float* b, bool first, float* sums) {
  Vec acc[kTileRows][kColumnVecs];
  for (auto& row : acc) {
    for (Vec& v : row) v = Set(0.0f);
  }
  for (int64_t s = 0; s < slots; ++s, a += kPanelRows, b += kColumns) {
    Vec right[kColumnVecs];
    for (int j = 0; j < kColumnVecs; ++j) right[j] = Load(b + j * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const Vec left = Set(a[i]);
      for (int j = 0; j < kColumnVecs; ++j) acc[i][j] = AddProduct<T>(acc[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < kTileRows; ++i) {
    for (int j = 0; j < kColumnVecs; ++j, sums += kLanes) Store(sums, first ? acc[i][j] : Load(sums) + acc[i][j]);
  }
}

using TileFunction = void (*)(int64_t, const float*, const float*, bool, float*);

// The tile for the last rows of a product, or the only ones, computes no rows that are not there.
template <class T>
TileFunction TileOfRows(int64_t rows) {
  if constexpr (kRows == 8) {
    constexpr TileFunction kTiles[] = {Tile<T, 1>, Tile<T, 2>, Tile<T, 3>, Tile<T, 4>,
                                       Tile<T, 5>, Tile<T, 6>, Tile<T, 7>, Tile<T, 8>};
    return kTiles[(rows < kRows ? rows : kRows) - 1];
  } else {
    constexpr TileFunction kTiles[] = {Tile<T, 1>, Tile<T, 2>, Tile<T, 3>, Tile<T, 4>};
    return kTiles[(rows < kRows ? rows : kRows) - 1];
  }
}

// What a tile of sums becomes, one Vec at a time: i counts its rows from the top of C, j its columns from the left.
template <class T, class Out, Epilogue kEpilogue, class Act>
PEAK_INLINE void FinishVec(const GemmArgs& args, Vec sum, int64_t i, int64_t j, int64_t n) {
  Out* c = static_cast<Out*>(args.c) + i * args.c_row + j;
  T* pre = args.pre == nullptr ? nullptr : static_cast<T*>(args.pre) + i * args.n + j;
  if constexpr (kEpilogue == Epilogue::kAdd) {
    Store(c, sum + Load(c, n), n);
  } else if constexpr (kEpilogue == Epilogue::kSlope) {
    Vec slope;
    const Vec value = Act::ValueAndSlope(Load(pre, n), &slope);
    Store(c, sum * slope, n);
    if (args.act != nullptr) Store(static_cast<T*>(args.act) + i * args.n + j, value, n);
  } else if constexpr (kEpilogue == Epilogue::kGateSlope) {
    Vec slope;
    const int64_t at = i * args.n + j;
    const Vec gate = Act::ValueAndSlope(Load(static_cast<const T*>(args.gate) + at, n), &slope), up = Load(pre, n);
    Store(static_cast<T*>(args.dgate) + at, sum * up * slope, n);
    Store(c, sum * gate, n);
    if (args.act != nullptr) Store(static_cast<T*>(args.act) + at, gate * up, n);
  } else {
    if (args.bias != nullptr) sum = sum + Load(static_cast<const T*>(args.bias) + j, n);
    if constexpr (kEpilogue == Epilogue::kActivate) {
      if (pre != nullptr) Store(pre, sum, n);
      sum = Act::Value(sum);
    } else if constexpr (kEpilogue == Epilogue::kGate) {
      if (pre != nullptr) Store(pre, sum, n);
      sum = Act::Value(Load(static_cast<const T*>(args.gate) + i * args.n + j, n)) * sum;
    }
    Store(c, sum, n);
  }
}

template <class T, class Out, Epilogue kEpilogue, class Act>
void Finish(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  const int64_t rows = std::min<int64_t>(kRows, args.m - row), columns = std::min<int64_t>(kColumns, args.n - column);
  for (int64_t i = 0; i < rows; ++i, sums += kColumns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      FinishVec<T, Out, kEpilogue, Act>(args, Load(sums + j), row + i, column + j, columns - j);
    }
  }
}

// An activation's result has the type of the operands: each further one costs a second of compilation.
template <class T, Epilogue kEpilogue>
void FinishWith(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  switch (args.activation) {
    case Activation::kGeluTanh: return Finish<T, T, kEpilogue, GeluTanh<T>>(args, sums, row, column);
    case Activation::kGeluErf: return Finish<T, T, kEpilogue, GeluErf>(args, sums, row, column);
    case Activation::kRelu: return Finish<T, T, kEpilogue, Relu>(args, sums, row, column);
    case Activation::kSilu: return Finish<T, T, kEpilogue, Silu<T>>(args, sums, row, column);
  }
}

template <class T, Epilogue kEpilogue>
void FinishSum(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  args.out_dtype == DType::kFloat32 ? Finish<T, float, kEpilogue, void>(args, sums, row, column)
                                    : Finish<T, bf16, kEpilogue, void>(args, sums, row, column);
}

template <class T>
void FinishTile(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  switch (args.epilogue) {
    case Epilogue::kStore: return FinishSum<T, Epilogue::kStore>(args, sums, row, column);
    case Epilogue::kAdd: return FinishSum<T, Epilogue::kAdd>(args, sums, row, column);
    case Epilogue::kActivate: return FinishWith<T, Epilogue::kActivate>(args, sums, row, column);
    case Epilogue::kSlope: return FinishWith<T, Epilogue::kSlope>(args, sums, row, column);
    case Epilogue::kGate: return FinishWith<T, Epilogue::kGate>(args, sums, row, column);
    case Epilogue::kGateSlope: return FinishWith<T, Epilogue::kGateSlope>(args, sums, row, column);
  }
}

template <class T>
GemmTile TileOf() {
  return {kPanelRows, kColumns, kSlot<T>};
}

// Packs panels [begin, end) of the block's rows of a.
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

// Packs columns of b, and elements k to k + depth of them.
template <class T, class Args>
void PackColumns(const Args& args, int64_t column, int64_t columns, int64_t k, int64_t depth, float* out) {
  const T* from = static_cast<const T*>(args.b) + column * args.b_col + k * args.b_k;
  Pack<T>(from, args.b_col, args.b_k, columns, depth, kColumnVecs, out);
}

// Where PackB leaves the panel of `column` in the block of k that begins at `k`, of `slots` slots: [block][panel][slot].
template <class T>
int64_t PackedAt(int64_t n, int64_t k, int64_t column, int64_t slots) {
  const int64_t width = (n + kColumns - 1) / kColumns * kColumns;
  return k / kSlot<T> * width + column * slots;
}

// Panels [begin, end) of columns of one block of k, packed to where they belong.
template <class T>
void PackBlock(const PackArgs& args, int64_t k, int64_t depth, int64_t begin, int64_t end) {
  const int64_t column = begin * kColumns, slots = (depth + kSlot<T> - 1) / kSlot<T>;
  PackColumns<T>(args, column, std::min(end * kColumns, args.n) - column, k, depth,
                 args.out + PackedAt<T>(args.n, k, column, slots));
}

// All of a block's tiles in its panels of rows [row_begin, row_end) and of columns [begin, end).
// Columns go in groups that stay in the second-level cache, packed by the thread that uses them.
template <class T>
void MultiplyPanels(const GemmArgs& args, const GemmBlock& block, const GemmPart& part, const float* a, float* b,
                    float* sums) {
  const int64_t slots = (block.depth + kSlot<T> - 1) / kSlot<T>;
  const int64_t panels = (block.columns + kColumns - 1) / kColumns;
  alignas(64) float tile[kRows * kColumns];
  const int64_t most = std::max<int64_t>(1, kGroupFloats / (kColumns * std::max<int64_t>(1, slots)));
  for (int64_t group = part.column_begin; group < part.column_end; group += most) {
    const int64_t group_end = std::min(group + most, part.column_end);
    const int64_t column = group * kColumns, columns = std::min(group_end * kColumns, block.columns) - column;
    const float* right = b;
    if (args.packed_b != nullptr) {
      right = args.packed_b + PackedAt<T>(args.n, block.k, block.column + column, slots);
    } else {
      PackColumns<T>(args, block.column + column, columns, block.k, block.depth, b);
    }
    for (int64_t i = part.row_begin * kPanelRows; i < std::min(part.row_end * kPanelRows, block.rows); i += kRows) {
      const float* left = a + i / kPanelRows * kPanelRows * slots + i % kPanelRows;
      const TileFunction multiply = TileOfRows<T>(block.rows - i);
      for (int64_t j = group; j < group_end; ++j) {
        float* at = sums == nullptr ? tile : sums + (i / kRows * panels + j) * kRows * kColumns;
        multiply(slots, left, right + (j - group) * kColumns * slots, block.first, at);
        if (block.last) FinishTile<T>(args, at, block.row + i, block.column + j * kColumns);
      }
    }
  }
}

// out[i * kColumns + lane] = (or, from the second block of k on, +=) the sums of kThin rows of a and kLanes columns of b,
// b read where it lies: it is transposed in registers. Slot by slot as in Tile, so to the same bits.
template <class T, int64_t kThin>
void ThinSums(const float* a, const T* b, int64_t stride, int64_t lanes, int64_t depth, bool first, float* out) {
  constexpr int64_t kStep = kLanes * kSlot<T>;
  Vec sums[kThin];
  for (Vec& sum : sums) sum = Set(0.0f);
  for (int64_t at = 0; at < depth; at += kStep) {
    Vec right[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      right[j] = j < lanes ? LoadSlots(b + j * stride + at, depth - at) : Set(0.0f);
      __builtin_prefetch(b + (j + kLanes) * stride + at, 0, 2);  // the next columns, into the second-level cache
    }
    Transpose(right);
    const int64_t slots = std::min<int64_t>(kLanes, (depth - at + kSlot<T> - 1) / kSlot<T>);
    for (int64_t s = 0; s < slots; ++s, a += kPanelRows) {
      for (int64_t i = 0; i < kThin; ++i) sums[i] = AddProduct<T>(sums[i], Set(a[i]), right[s]);
    }
  }
  for (int64_t i = 0; i < kThin; ++i, out += kColumns) Store(out, first ? sums[i] : Load(out) + sums[i]);
}

// Panels [begin, end) of columns of a product with kThin rows: nothing of b would be used twice, so it is not packed.
// Here its columns are contiguous along k.
template <class T, int64_t kThin>
void ThinPanels(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  alignas(64) float tile[kThin * kColumns];
  for (int64_t column = begin * kColumns; column < std::min(end * kColumns, args.n); column += kColumns) {
    for (int64_t j = 0; j < std::min<int64_t>(kColumns, args.n - column); j += kLanes) {
      const T* b = static_cast<const T*>(args.b) + (column + j) * args.b_col;
      const int64_t lanes = std::min<int64_t>(kLanes, args.n - column - j);
      for (int64_t k = 0; k == 0 || k < args.k; k += depth) {
        ThinSums<T, kThin>(a + k / kSlot<T> * kPanelRows, b + k, args.b_col, lanes, std::min(depth, args.k - k), k == 0,
                           tile + j);
      }
    }
    FinishTile<T>(args, tile, 0, column);
  }
}

// Adds kSlots slots of kThin rows of a and a k-row of b each, `columns` wide, to sums: panels of kThin x kColumns.
template <class T, int64_t kThin, int64_t kSlots>
PEAK_INLINE void AddAcross(const float* a, const T* b, int64_t stride, int64_t columns, int64_t left, float* sums) {
  constexpr int64_t kStep = kSlot<T>;
  for (int64_t j = 0; j < columns; j += kLanes) {
    float* at = sums + j / kColumns * kThin * kColumns + j % kColumns;
    Vec right[kSlots];
    for (int64_t s = 0; s < kSlots; ++s) {
      right[s] = GatherSlots(b + s * kStep * stride + j, stride, columns - j, left - s * kStep);
      for (int64_t k = 0; k < kStep; ++k) __builtin_prefetch(b + (kThinAhead + s * kStep + k) * stride + j, 0, 2);
    }
    for (int64_t i = 0; i < kThin; ++i) {
      Vec sum = Load(at + i * kColumns);
      for (int64_t s = 0; s < kSlots; ++s) sum = AddProduct<T>(sum, Set(a[s * kPanelRows + i]), right[s]);
      Store(at + i * kColumns, sum);
    }
  }
}

// The same panels where b's columns are neighbours in memory: its rows are read in their order.
template <class T, int64_t kThin>
void ThinAcross(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  constexpr int64_t kSums = kThinPanels * kThin * kColumns, kStep = kSlot<T>;
  alignas(64) float total[kSums], block[kSums];
  for (int64_t panel = begin; panel < end; panel += kThinPanels) {
    const int64_t column = panel * kColumns;
    const int64_t columns = std::min(std::min(end, panel + kThinPanels) * kColumns, args.n) - column;
    const T* b = static_cast<const T*>(args.b) + column;
    for (int64_t k = 0; k == 0 || k < args.k; k += depth) {
      float* sums = k == 0 ? total : block;
      std::fill_n(sums, kSums, 0.0f);
      const int64_t stop = std::min(k + depth, args.k);
      int64_t at = k;
      const auto slots = [&] { return a + at / kStep * kPanelRows; };
      const auto rows = [&] { return b + at * args.b_k; };
      for (; at + kThinSlots * kStep <= stop; at += kThinSlots * kStep) {
        AddAcross<T, kThin, kThinSlots>(slots(), rows(), args.b_k, columns, stop - at, sums);
      }
      for (; at < stop; at += kStep) AddAcross<T, kThin, 1>(slots(), rows(), args.b_k, columns, stop - at, sums);
      for (int64_t i = 0; k > 0 && i < kSums; i += kLanes) Store(total + i, Load(total + i) + Load(block + i));
    }
    for (int64_t j = 0; j < columns; j += kColumns) FinishTile<T>(args, total + j * kThin, 0, column + j);
  }
}

template <class T, int64_t kThin>
void ThinEither(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  args.b_k == 1 ? ThinPanels<T, kThin>(args, depth, a, begin, end) : ThinAcross<T, kThin>(args, depth, a, begin, end);
}

template <class T>
void MultiplyThin(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  switch (args.m) {
    case 1: return ThinEither<T, 1>(args, depth, a, begin, end);
    case 2: return ThinEither<T, 2>(args, depth, a, begin, end);
    case 3: return ThinEither<T, 3>(args, depth, a, begin, end);
    case kThinRows: return ThinEither<T, kThinRows>(args, depth, a, begin, end);
  }
}

#else

namespace peak {

namespace {

// Blocks of C and of k: a's packed block and the sums of C stay in the last-level cache, b's group in the second-level.
constexpr int64_t kBlockRows = 1024, kBlockColumns = 3072, kBlockSlots = 1024;

int64_t Pieces(int64_t n, int64_t most) { return std::max<int64_t>(1, (n + most - 1) / most); }
int64_t Up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
float* Floats(int64_t count) { return static_cast<float*>(Workspace(count * static_cast<int64_t>(sizeof(float)))); }

// How `threads` share a block: a grid of row groups and column groups with the least work for the slowest.
std::pair<int, int> Grid(int64_t row_panels, int64_t column_panels, int threads) {
  std::pair<int, int> best{1, 1};
  int64_t least = row_panels * column_panels + 1;
  for (int r = 1; r <= threads; ++r) {
    const int c = threads / r;
    const int64_t work = Pieces(row_panels, 1) == 0 ? 0 : ((row_panels + r - 1) / r) * ((column_panels + c - 1) / c);
    if (work < least) {
      least = work;
      best = {r, c};
    }
  }
  return best;
}

}  // namespace

namespace {

void GemmThin(const GemmArgs& args, const GemmTile& tile, int64_t depth, int threads) {
  float* const a = Floats(Up(args.k, tile.slot) / tile.slot * tile.rows);
  PEAK_PICK_DTYPE(args.dtype, PackRows)(args, {0, args.m, 0, args.n, 0, args.k, true, true}, 0, 1, a);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplyThin);
  ParallelParts(Pieces(args.n, tile.columns), threads, threads,
                [&](int64_t, int64_t begin, int64_t end) { multiply(args, depth, a, begin, end); });
}

}  // namespace

namespace {

int64_t DepthOf(int64_t k, const GemmTile& tile) {
  const int64_t blocks = Pieces(k, kBlockSlots * tile.slot);
  return Up(Pieces(k, blocks), tile.slot);  // at least a slot: an empty sum is 0
}

// How a product is cut, and the memory that it takes.
struct GemmPlan {
  GemmTile tile;
  int64_t rows, columns, depth;  // of a block
  int64_t a_size, b_size, sums_size;  // floats; b_size for each thread

  explicit GemmPlan(const GemmArgs& args) : tile(PEAK_PICK_DTYPE(args.dtype, TileOf)()) {
    rows = Up(Pieces(args.m, Pieces(args.m, kBlockRows)), tile.rows);
    columns = Up(Pieces(args.n, Pieces(args.n, kBlockColumns)), tile.columns);
    depth = DepthOf(args.k, tile);
    const int64_t slots = depth / tile.slot;
    a_size = rows * slots;
    b_size = args.packed_b != nullptr ? 0 : std::max(kGroupFloats, tile.columns * slots);
    sums_size = depth < args.k ? rows * columns : 0;
  }
  int64_t Scratch(int threads) const { return a_size + sums_size + threads * b_size; }
};

// One thread's share of a product; all of `workers` run it, on the same scratch.
void Share(const GemmArgs& args, const GemmPlan& plan, float* a, int id, int workers) {
  const auto pack = PEAK_PICK_DTYPE(args.dtype, PackRows);
  const auto multiply = PEAK_PICK_DTYPE(args.dtype, MultiplyPanels);
  const int64_t rows = plan.rows, columns = plan.columns, depth = plan.depth;
  const auto [row_groups, column_groups] = Grid(rows / plan.tile.rows, columns / plan.tile.columns, workers);
  float* const sums = plan.sums_size > 0 ? a + plan.a_size : nullptr;
  float* const b = a + plan.a_size + plan.sums_size + id * plan.b_size;
  for (int64_t column = 0; column < args.n; column += columns) {
    for (int64_t row = 0; row < args.m; row += rows) {
      for (int64_t k = 0; k == 0 || k < args.k; k += depth) {
        const GemmBlock block{row, std::min(rows, args.m - row), column, std::min(columns, args.n - column),
                              k, std::min(depth, args.k - k), k == 0, k + depth >= args.k};
        const int64_t r = Pieces(block.rows, plan.tile.rows), c = Pieces(block.columns, plan.tile.columns);
        pack(args, block, r * id / workers, r * (id + 1) / workers, a);
        Barrier();
        const int64_t i = id / column_groups, j = id % column_groups;
        const GemmPart part{r * i / row_groups, r * (i + 1) / row_groups, c * j / column_groups,
                            c * (j + 1) / column_groups};
        if (i < row_groups) multiply(args, block, part, a, b, sums);
        Barrier();
      }
    }
  }
}

}  // namespace

int64_t PackedFloats(DType dtype, int64_t n, int64_t k) {
  const GemmTile tile = PEAK_PICK_DTYPE(dtype, TileOf)();
  return Up(n, tile.columns) * (Up(k, tile.slot) / tile.slot);
}

void PackB(const PackArgs& args, int threads) {
  const GemmTile tile = PEAK_PICK_DTYPE(args.dtype, TileOf)();
  const auto pack = PEAK_PICK_DTYPE(args.dtype, PackBlock);
  const int64_t depth = DepthOf(args.k, tile), panels = Pieces(args.n, tile.columns);
  for (int64_t k = 0; k < args.k; k += depth) {
    ParallelParts(panels, panels, threads, [&](int64_t, int64_t begin, int64_t end) {
      pack(args, k, std::min(depth, args.k - k), begin, end);
    });
  }
}

int64_t GemmScratch(const GemmArgs& args, int threads) { return GemmPlan(args).Scratch(threads); }

void TeamGemm(const GemmArgs& args, float* scratch) {
  if (args.m == 0 || args.n == 0) return;
  const Team* team = Team::Current();
  Share(args, GemmPlan(args), scratch, team->id, team->size);
}

void Gemm(const GemmArgs& args, int threads) {
  if (args.m == 0 || args.n == 0) return;
  const GemmPlan plan(args);
  if (args.m <= kThinRows && args.packed_b == nullptr) return GemmThin(args, plan.tile, plan.depth, threads);
  const auto wanted = Grid(plan.rows / plan.tile.rows, plan.columns / plan.tile.columns, threads);
  const int workers = wanted.first * wanted.second;
  float* const scratch = Floats(plan.Scratch(workers));
  // Fewer than wanted come where the caller is in a parallel region itself, or OMP_THREAD_LIMIT or OMP_DYNAMIC says so.
#pragma omp parallel num_threads(workers) if (workers > 1)
  Share(args, plan, scratch, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace peak

#endif  // PEAK_ISA
