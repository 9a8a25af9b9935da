// The innermost loop of a product: a tile of sums in registers, from two panels. Included once per instruction set by
// gemm.cpp.

// Multiplies and adds one slot of each lane.
template <class T>
PEAK_INLINE Vec AddProduct(Vec sum, Vec left, Vec right) {
  if constexpr (kSlot<T> == 2) {
    return DotPairs(sum, AsPairs(left), AsPairs(right));
  } else {
    return Fma(left, right, sum);
  }
}

// The left operand of a tile: element (row, slot) is data[row * row_step + slot * slot_step], and one step is 1.
struct TileRows {
  const float* data;
  int64_t row_step, slot_step;
};

// sums[kTileRows][kColumns] = the product of rows and a panel over `slots`; += unless `first`. Only the first kVecs
// Vecs of the panel are computed. kAlong: the slots of a row are contiguous.
template <class T, int kTileRows, int kVecs, bool kAlong>
void Tile(int64_t slots, const TileRows& rows, const float* b, bool first, float* sums) {
  Vec acc[kTileRows][kVecs];
  for (auto& row : acc) {
    for (Vec& v : row) v = Set(0.0f);
  }
  const float* a = rows.data;
  const int64_t row_step = kAlong ? rows.row_step : 1, slot_step = kAlong ? 1 : rows.slot_step;
  for (int64_t s = 0; s < slots; ++s, a += slot_step, b += kColumns) {
    Vec right[kVecs];
    for (int j = 0; j < kVecs; ++j) right[j] = Load(b + j * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const Vec left = Set(a[i * row_step]);
      for (int j = 0; j < kVecs; ++j) acc[i][j] = AddProduct<T>(acc[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < kTileRows; ++i, sums += kColumns) {
    for (int j = 0; j < kVecs; ++j) {
      float* at = sums + j * kLanes;
      Store(at, first ? acc[i][j] : Load(at) + acc[i][j]);
    }
  }
}

using TileFunction = void (*)(int64_t, const TileRows&, const float*, bool, float*);

template <class T, bool kAlong, int kVecs, size_t... I>
TileFunction TileOfRows(int64_t rows, std::index_sequence<I...>) {
  constexpr TileFunction kTiles[] = {Tile<T, static_cast<int>(I) + 1, kVecs, kAlong>...};
  return kTiles[(rows < kRows ? rows : kRows) - 1];
}

// The tile function for `rows` rows and `columns` columns: the last tiles of a product compute their own part only.
template <class T, bool kAlong>
TileFunction TileOf(int64_t rows, int64_t columns) {
  constexpr std::make_index_sequence<kRows> every{};
  if (columns > 2 * kLanes) return TileOfRows<T, kAlong, 3>(rows, every);
  return columns > kLanes ? TileOfRows<T, kAlong, 2>(rows, every) : TileOfRows<T, kAlong, 1>(rows, every);
}
