// Products with so few rows that nothing of b would be used twice: b is not packed. Included once per set by gemm.cpp.

constexpr int64_t kThinPanels = 16;  // of columns at a time where b is read by rows: their sums stay in the first cache
constexpr int64_t kThinSlots = 4;    // for each time that these sums are loaded and stored
constexpr int64_t kThinAhead = 16;   // k-rows that are asked for ahead, into the second-level cache

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
