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

// sums[kTileRows][kColumns] = the product of two panels over `slots`; += unless `first`.
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

// The tile function for `rows` rows: the last tile of a product computes its own rows only.
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
