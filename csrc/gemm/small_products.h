// Small products of one form, C[row][lane] += sum_k A(row, k) * B[k][lane], where A is broadcast from memory and B and
// C are read as vectors. Included once per instruction set, after simd/simd.h.
//
// An operand is float, or Pair if the instruction set multiplies pairs of bf16 (then an operand holds two steps of k),
// or bf16 that is converted when it is read. Swapping A and B gives the same bits: products commute, and k decides the
// order.
constexpr int kBlockRows = 4, kBlockVecs = kRegisters >= 32 ? 4 : 3;
// Number of products that are summed one by one. Longer sums are sums of such sums, which lose fewer digits.
constexpr int64_t kChain = 32;

struct Pair { bf16 even, odd; };
template <class T> struct OperandOf { using type = float; };
template <bool kNative> struct Bf16Operand { using type = float; };
template <> struct Bf16Operand<true> { using type = Pair; };
template <> struct OperandOf<bf16> : Bf16Operand<kNativePairs> {};
template <class E> constexpr int64_t kDepth = 1;  // steps of k in an operand
template <> constexpr int64_t kDepth<Pair> = 2;

PEAK_INLINE int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
PEAK_INLINE int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }
PEAK_INLINE int64_t UpTo(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

PEAK_INLINE float Widen(float f) { return f; }
PEAK_INLINE float Widen(bf16 b) {
  const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

PEAK_INLINE Vec Operand(const float* p) { return Load(p); }
PEAK_INLINE Vec Operand(const bf16* p) { return Load(p); }
PEAK_INLINE Pairs Operand(const Pair* p) { return LoadPairs(&p->even); }
template <class A>
PEAK_INLINE Vec MultiplyAdd(const A* a, Vec b, Vec c) { return Fma(Set(Widen(*a)), b, c); }
PEAK_INLINE Vec MultiplyAdd(const Pair* a, Pairs b, Vec c) { return DotPairs(c, SetPair(&a->even), b); }

template <int M, int N, class A, class B>
void Block(const A* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_step, int64_t depth, float* c,
           int64_t c_row, bool add) {
  Vec acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] = Set(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(Operand(b)) lanes[N];
    for (int n = 0; n < N; ++n) lanes[n] = Operand(b + n * kLanes);
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) acc[m][n] = MultiplyAdd(a + m * a_row, lanes[n], acc[m][n]);
    }
    a += a_step;
    b += b_step;
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* at = c + m * c_row + n * kLanes;
      Store(at, add ? Load(at) + acc[m][n] : acc[m][n]);
    }
  }
}

template <int M, class A, class B>
void MultiplyRows(const A* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_step, int64_t depth, float* c,
                  int64_t c_row, int64_t vecs, bool add) {
  if (vecs >= kBlockVecs) {
    Block<M, kBlockVecs>(a, a_row, a_step, b, b_step, depth, c, c_row, add);
  } else if (vecs == 3) {
    Block<M, 3>(a, a_row, a_step, b, b_step, depth, c, c_row, add);
  } else if (vecs == 2) {
    Block<M, 2>(a, a_row, a_step, b, b_step, depth, c, c_row, add);
  } else {
    Block<M, 1>(a, a_row, a_step, b, b_step, depth, c, c_row, add);
  }
}

template <class A, class B>
void MultiplyChain(const A* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_step, int64_t depth, float* c,
                   int64_t c_row, int64_t rows, int64_t vecs, bool add) {
  for (int64_t n = 0; n < vecs; n += kBlockVecs) {
    const int64_t blocks = rows / kBlockRows * kBlockRows;
    for (int64_t m = 0; m < blocks; m += kBlockRows) {
      MultiplyRows<kBlockRows>(a + m * a_row, a_row, a_step, b + n * kLanes, b_step, depth,
                               c + m * c_row + n * kLanes, c_row, vecs - n, add);
    }
    for (int64_t m = blocks; m < rows; ++m) {
      MultiplyRows<1>(a + m * a_row, a_row, a_step, b + n * kLanes, b_step, depth, c + m * c_row + n * kLanes, c_row,
                      vecs - n, add);
    }
  }
}

// C (rows x vecs) = A B, or += A B if `add`.
template <class A, class B>
void Multiply(const A* a, int64_t a_row, int64_t a_step, const B* b, int64_t b_step, int64_t depth, float* c,
              int64_t c_row, int64_t rows, int64_t vecs, bool add) {
  for (int64_t k = 0; k < depth; k += kChain) {
    MultiplyChain(a + k * a_step, a_row, a_step, b + k * b_step, b_step, Least(kChain, depth - k), c, c_row, rows, vecs,
                  add || k > 0);
  }
}
