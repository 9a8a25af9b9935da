// Skinny GEMM: a product with so few rows that b is not packed, because reading it takes longer than multiplying.
// Included once per instruction set by gemm.cpp.

constexpr int64_t kSkinnyPanels = 16;  // column panels in a block of SkinnyAcross: their sums stay in L1
constexpr int64_t kSkinnySlots = 4;    // slots for each load and store of these sums
constexpr int64_t kSkinnyAhead = 16;   // rows of b to prefetch, into the second-level cache

// b is read in words of four bytes: a float, or two bf16 that follow each other along k.
template <class T>
constexpr int64_t kWord = 4 / sizeof(T);

// Adds kM rows of a, times one word of kLanes columns of b. The sum over k has `left` elements left.
template <class T, int64_t kM>
PEAK_INLINE void AddWord(const float* a, Vec word, int64_t left, Vec* sums) {
  if constexpr (kSlot<T> == kWord<T>) {
    for (int64_t i = 0; i < kM; ++i) sums[i] = AddProduct<T>(sums[i], Set(a[i]), word);
  } else {
    const Vec even = Even(AsPairs(word)), odd = Odd(AsPairs(word));
    for (int64_t i = 0; i < kM; ++i) sums[i] = Fma(Set(a[i]), even, sums[i]);
    for (int64_t i = 0; i < kM && left > 1; ++i) sums[i] = Fma(Set(a[kPanelRows + i]), odd, sums[i]);
  }
}

// Prefetches as many bytes of kLanes columns as a step of SkinnySums reads, to the second-level cache: what follows
// `at` elements of k in each of four runs of memory. On one core of Emerald Rapids, bf16 with k of 768 and one row of a, that
// reads 14.7 GB/s; 13.7 with one run, 13.1 with one for each column. With eight rows: 12.9, 10.2 and 10.4 GB/s.
template <class T>
PEAK_INLINE void PrefetchColumns(const T* b, int64_t stride, int64_t at) {
  constexpr int64_t kRuns = kLanes < 4 ? 1 : 4, kEach = kLanes / kRuns;
  for (int64_t run = 0; run < kRuns; ++run) {
    const char* const p = reinterpret_cast<const char*>(b + run * kEach * stride + at * kEach);
    for (int64_t byte = 0; byte < kEach * kLanes * 4; byte += 64) __builtin_prefetch(p + byte, 0, 2);
  }
}

// out[i * kColumns + lane] = the sums of kM rows of a and kLanes columns of b over elements [k, k + depth); += unless k
// is 0. b is transposed in registers. Elements are added in the order of Tile, so the bits are the same.
template <class T, int64_t kM>
void SkinnySums(const float* a, const T* b, int64_t stride, int64_t lanes, int64_t k, int64_t depth, float* out) {
  constexpr int64_t kStep = kLanes * kWord<T>, kNext = kWord<T> / kSlot<T> * kPanelRows;
  const T* const next = b + kLanes * stride;
  const int64_t end = k + depth, whole = lanes == kLanes ? k + depth / kStep * kStep : k;
  Vec sums[kM], words[kLanes];
  for (Vec& sum : sums) sum = Set(0.0f);
  int64_t at = k;
  for (; at < whole; at += kStep) {
    PrefetchColumns(next, stride, at);
    LoadTransposed(b + at, stride, words);
#pragma GCC unroll 16
    for (int64_t s = 0; s < kLanes; ++s, a += kNext) AddWord<T, kM>(a, words[s], kWord<T>, sums);
  }
  for (; at < end; at += kStep) {
    for (int64_t j = 0; j < kLanes; ++j) words[j] = j < lanes ? LoadWords(b + j * stride + at, end - at) : Set(0.0f);
    Transpose(words);
    for (int64_t s = 0, left = end - at; s < kLanes && left > 0; ++s, left -= kWord<T>, a += kNext) {
      AddWord<T, kM>(a, words[s], left, sums);
    }
  }
  for (int64_t i = 0; i < kM; ++i, out += kColumns) Store(out, k == 0 ? sums[i] : Load(out) + sums[i]);
}

// Column panels [begin, end) of a product with kM rows, for a b whose columns are contiguous along k.
template <class T, int64_t kM>
void SkinnyAlong(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  alignas(64) float tile[kM * kColumns];
  for (int64_t column = begin * kColumns; column < std::min(end * kColumns, args.n); column += kColumns) {
    for (int64_t j = 0; j < std::min<int64_t>(kColumns, args.n - column); j += kLanes) {
      const T* b = static_cast<const T*>(args.b) + (column + j) * args.b_col;
      const int64_t lanes = std::min<int64_t>(kLanes, args.n - column - j);
      for (int64_t k = 0; k == 0 || k < args.k; k += depth) {
        const float* const slots = a + k / kSlot<T> * kPanelRows;
        SkinnySums<T, kM>(slots, b, args.b_col, lanes, k, std::min(depth, args.k - k), tile + j);
      }
    }
    for (int64_t i = 0; i < kM; i += kRows) FinishTile(args, tile + i * kColumns, i, column);
  }
}

// Adds kSlots slots of kM rows of a, each times a row of b of `columns` elements, to sums: panels of kM x kColumns.
template <class T, int64_t kM, int64_t kSlots>
PEAK_INLINE void AddAcross(const float* a, const T* b, int64_t stride, int64_t columns, int64_t left, float* sums) {
  constexpr int64_t kStep = kSlot<T>;
  for (int64_t j = 0; j < columns; j += kLanes) {
    float* at = sums + j / kColumns * kM * kColumns + j % kColumns;
    Vec right[kSlots];
    for (int64_t s = 0; s < kSlots; ++s) {
      right[s] = GatherSlots<T>(b + s * kStep * stride + j, stride, columns - j, left - s * kStep);
      for (int64_t k = 0; k < kStep; ++k) __builtin_prefetch(b + (kSkinnyAhead + s * kStep + k) * stride + j, 0, 2);
    }
    for (int64_t i = 0; i < kM; ++i) {
      Vec sum = Load(at + i * kColumns);
      for (int64_t s = 0; s < kSlots; ++s) sum = AddProduct<T>(sum, Set(a[s * kPanelRows + i]), right[s]);
      Store(at + i * kColumns, sum);
    }
  }
}

// The same panels for a b whose rows are contiguous: it is read row by row.
template <class T, int64_t kM>
void SkinnyAcross(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  constexpr int64_t kSums = kSkinnyPanels * kM * kColumns, kStep = kSlot<T>;
  alignas(64) float total[kSums], block[kSums];
  for (int64_t panel = begin; panel < end; panel += kSkinnyPanels) {
    const int64_t column = panel * kColumns;
    const int64_t columns = std::min(std::min(end, panel + kSkinnyPanels) * kColumns, args.n) - column;
    const T* b = static_cast<const T*>(args.b) + column;
    for (int64_t k = 0; k == 0 || k < args.k; k += depth) {
      float* sums = k == 0 ? total : block;
      std::fill_n(sums, kSums, 0.0f);
      const int64_t stop = std::min(k + depth, args.k);
      int64_t at = k;
      const auto slots = [&] { return a + at / kStep * kPanelRows; };
      const auto rows = [&] { return b + at * args.b_k; };
      for (; at + kSkinnySlots * kStep <= stop; at += kSkinnySlots * kStep) {
        AddAcross<T, kM, kSkinnySlots>(slots(), rows(), args.b_k, columns, stop - at, sums);
      }
      for (; at < stop; at += kStep) AddAcross<T, kM, 1>(slots(), rows(), args.b_k, columns, stop - at, sums);
      for (int64_t i = 0; k > 0 && i < kSums; i += kLanes) Store(total + i, Load(total + i) + Load(block + i));
    }
    for (int64_t j = 0; j < columns; j += kColumns) FinishTile(args, total + j * kM, 0, column + j);
  }
}

using SkinnyFunction = void (*)(const GemmArgs&, int64_t depth, const float* a, int64_t begin, int64_t end);

template <class T, size_t... I>
SkinnyFunction SkinnyAlongOf(int64_t rows, std::index_sequence<I...>) {
  constexpr SkinnyFunction kFunctions[] = {SkinnyAlong<T, static_cast<int64_t>(I) + 1>...};
  return kFunctions[rows - 1];
}
template <class T, size_t... I>
SkinnyFunction SkinnyAcrossOf(int64_t rows, std::index_sequence<I...>) {
  constexpr SkinnyFunction kFunctions[] = {SkinnyAcross<T, static_cast<int64_t>(I) + 1>...};
  return kFunctions[rows - 1];
}

template <class T>
void MultiplySkinny(const GemmArgs& args, int64_t depth, const float* a, int64_t begin, int64_t end) {
  const SkinnyFunction multiply = args.b_k == 1
                                      ? SkinnyAlongOf<T>(args.m, std::make_index_sequence<kPanelRows>{})
                                      : SkinnyAcrossOf<T>(args.m, std::make_index_sequence<kSkinnyAcross>{});
  multiply(args, depth, a, begin, end);
}
