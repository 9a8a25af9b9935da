// Panels: the order in which the innermost loop of a product reads its operands. Included once per instruction set by
// gemm.cpp, after simd/simd.h.

// A slot is the unit that one lane of a product reads from each operand: a float, or a pair of bf16 if the instruction
// set multiplies pairs. Without such an instruction packing converts bf16 to float.
template <class T>
constexpr int kSlot = 1;
template <>
constexpr int kSlot<bf16> = kNativePairs ? 2 : 1;

// The register tile: kRows x (kColumnVecs x kLanes) sums. The other registers hold the loads of b and one broadcast of
// a.
constexpr int kColumnVecs = 3;
constexpr int kRows = kRegisters == 32 ? 8 : 4;
constexpr int kColumns = kColumnVecs * kLanes;
// Rows of a are packed by whole Vecs: into one panel of kRows, or into two if a Vec has twice as many lanes. Panels of
// more rows than a tile has would fill the first-level cache with rows that the tile does not read.
constexpr int kRowVecs = kRows > kLanes ? kRows / kLanes : 1;
constexpr int kPanelRows = kRowVecs * kLanes;
constexpr bool kTwoPanels = kPanelRows == 2 * kRows;

// The elements of an operand have type X: T, or float, which is rounded if a slot is a pair.
template <class T, class X>
PEAK_INLINE Vec LoadSlots(const X* p, int64_t n) {
  if constexpr (kSlot<T> == 2) {
    return AsVec(LoadPairs(p, n));
  } else {
    return Load(p, n);
  }
}

// One Vec of n slots from the row at p and, for pairs, the row after it; the sum over k has `left` elements left.
template <class T, class X>
PEAK_INLINE Vec GatherSlots(const X* p, int64_t k_stride, int64_t n, int64_t left) {
  if constexpr (kSlot<T> == 2) {
    return AsVec(ZipPairs(p, left > 1 ? p + k_stride : nullptr, n));
  } else {
    return Load(p, n);
  }
}

// Where the slots of kLanes rows are packed: slot s is at out + s * width. kHalves: the second half of its lanes is
// `half` later, in another panel.
template <bool kHalves>
struct PackedLanes {
  float* out;
  int64_t width, half;

  PEAK_INLINE void Add(Vec slot) {
    if constexpr (kHalves) {
      StoreHalves(out, out + half, slot);
    } else {
      Store(out, slot);
    }
    out += width;
  }
};

// Packs up to kLanes rows (`lanes`) of an operand whose rows are contiguous along k.
template <class T, bool kHalves, class X>
void PackAlong(const X* p, int64_t stride, int64_t lanes, int64_t k, PackedLanes<kHalves> to) {
  constexpr int64_t kStep = kLanes * kSlot<T>;
  Vec rows[kLanes];
  int64_t at = 0;
  if constexpr (kSlot<T> * sizeof(X) == 4) {
    for (; lanes == kLanes && at + kStep <= k; at += kStep) {
      LoadTransposed(p + at, stride, rows);
      for (const Vec& slot : rows) to.Add(slot);
    }
  }
  for (; at < k; at += kStep) {
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = i < lanes ? LoadSlots<T>(p + i * stride + at, k - at) : Set(0.0f);
    Transpose(rows);
    const int64_t slots = std::min<int64_t>(kLanes, (k - at + kSlot<T> - 1) / kSlot<T>);
    for (int64_t i = 0; i < slots; ++i) to.Add(rows[i]);
  }
}

// The same for an operand in which the elements of one k are contiguous.
template <class T, bool kHalves, class X>
void PackAcross(const X* p, int64_t k_stride, int64_t lanes, int64_t k, PackedLanes<kHalves> to) {
  for (int64_t at = 0; at < k; at += kSlot<T>) to.Add(GatherSlots<T>(p + at * k_stride, k_stride, lanes, k - at));
}

// Adds one Vec of rows to sums[lanes], in the order of k. Slots are `width` elements apart; panels are read whole.
// kHalves: as in PackedLanes.
template <class T, bool kHalves>
void AddSlots(const float* panel, int64_t slots, int64_t width, int64_t half, int64_t lanes, bool first, float* sums) {
  Vec sum = first ? Set(0.0f) : Load(sums, lanes);
  [[maybe_unused]] const bf16 ones[2] = {{0x3f80}, {0x3f80}};
  for (int64_t s = 0; s < slots; ++s, panel += width) {
    if constexpr (kHalves) {
      const Vec slot = LoadHalves(panel, panel + half);
      sum = kSlot<T> == 2 ? DotPairs(sum, AsPairs(slot), SetPair(ones)) : sum + slot;
    } else if constexpr (kSlot<T> == 2) {
      sum = DotPairs(sum, AsPairs(Load(panel)), SetPair(ones));
    } else {
      sum = sum + Load(panel, lanes);
    }
  }
  Store(sums, sum, lanes);
}

// Packs rows [0, rows) of an operand as panels of kVecs Vecs: [panel][slot][lane]. Missing rows are 0. kHalves: each Vec
// becomes two panels.
template <class T, int kVecs, bool kHalves, class X>
void Pack(const X* from, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, float* out) {
  constexpr int64_t kWidth = kVecs * kLanes;
  const int64_t slots = (k + kSlot<T> - 1) / kSlot<T>;
  for (int64_t row = 0; row < rows; row += kWidth, out += slots * kWidth) {
    for (int64_t v = 0; v < kVecs; ++v) {
      const int64_t first = row + v * kLanes, lanes = std::max<int64_t>(0, std::min<int64_t>(kLanes, rows - first));
      const X* p = from + (lanes > 0 ? first * row_stride : 0);
      const PackedLanes<kHalves> to{out + v * kLanes, kHalves ? kLanes / 2 : kWidth, slots * kLanes / 2};
      k_stride == 1 ? PackAlong<T>(p, row_stride, lanes, k, to) : PackAcross<T>(p, k_stride, lanes, k, to);
    }
  }
}
