// Vec: one register of floats, for the instruction set in PEAK_ISA. Included once per instruction set by
// base/foreach_isa.h, inside the namespace of that set. Kernels use the functions of this list and no intrinsics. More
// than 300 lines: it is the complete vocabulary of the kernels.
//
//   kLanes                     floats in a Vec
//   Load(p)                    from f16
//   Load(p) Load(p, n)         from float or bf16; n < kLanes reads n elements and sets the other lanes to 0
//   Store(p, v) Store(p, v, n) to float or bf16 (rounded to nearest even); NaN stays NaN
//   LoadSplit(p, r)  StoreSplit(p, r, v)  also with n   float bits = (bf16 bits << 16) + int16; kernels/ops/adamw.py
//   + - * / Fma(a,b,c)=a*b+c   Fnma(a,b,c)=c-a*b    Sqrt    Abs    CopySign(magnitude, sign)    Round (to even)
//   Max(a,b) Min(a,b)          b if either is NaN, on every instruction set, as on x86
//   Greater(a,b) Select(m,a,b) Mask and m ? a : b
//   Sum(v) MaxOf(v)            over the lanes, in a fixed order
//   Exp Erf Exp2 Reciprocal    with the errors stated below
//   Transpose(rows)            kLanes Vecs as a square matrix, in place
//   LoadWords(p, n)            n elements, at most kLanes words of four bytes: floats, or pairs of bf16 as in Pairs
//   LoadHalves(low, high)      half of a Vec from each address; StoreHalves(low, high, v)
//   LoadTransposed(p, stride, rows)  Transpose of kLanes rows of LoadWords, `stride` elements apart
//   Pairs                      kLanes pairs of bf16 for DotPairs(acc, a, b): acc[i] += a[2i]*b[2i] + a[2i+1]*b[2i+1]
//   LoadPairs(p)  SetPair(p)   2*kLanes elements; one pair repeated kLanes times
//   LoadPairs(p, n)            at most 2*kLanes elements, the others 0; if DotPairs is one instruction also of floats
//   ZipPairs(even, odd, n)     n pairs of two rows, of bf16 or floats; an odd of null is 0. Where DotPairs is one instruction
//   PackPairs(even, odd)       pair i = (bf16(even[i]), bf16(odd[i]))
//   StorePairs(p, pairs)       2*kLanes elements
//   Many<N>  Two = Many<2>     N Vecs with the same operations: + - * Max Min Fma Fnma Exp2 Reciprocal
//   LoadTwo  StoreTwo          2*kLanes elements. For bf16 one Vec holds the even and one the odd elements, which saves
//                              instructions; PermutedIndex(i) is the order of floats that match such Vecs
//   LoadRows  StoreRows        the same for several rows
//   Words                      kLanes unsigned 32-bit words: SetWords(u)  CountWords() = 0, 1, ..  +  ^
//   MultiplyWide(a, m, &high)  lower words of a * m; high receives the upper words
//   NotBelow(a, limit)         Mask of a >= limit
//   kRegisters kNativePairs    number of vector registers; whether DotPairs is one instruction
//   PrefetchTwo(p)  PrefetchTwoToL2(p)   for LoadTwo
//   Stream(p, v)  EndStream()  store to an aligned address that bypasses the caches; EndStream makes it visible
//   StreamTwo(p, two)          the same for 2*kLanes elements
//   Quads, Ints                kLanes groups of four bytes; kLanes signed sums: SetInts(i)  ToFloats(ints)
//   LoadQuads(p)  SetQuad(p)   4*kLanes bytes; one group repeated. StoreQuads
//   DotQuads(acc, a, b)        acc[i] += sum of (a[4i+j] - kQuadZero)*b[4i+j], j = 0..3; a unsigned, b -127..127
//   kQuadZero                  0 if DotQuads is one instruction, else 128
//   kNativeQuads               whether DotQuads is one instruction
//   LowerNibbles UpperNibbles  of each byte;  LookUp(LoadTable(p), quads)   table[byte] of a table of 16 bytes
//   StoreBytes(p, v)  LoadBytes(p)  kLanes integral floats of -128..127 as signed bytes
//   StoreInOrder(p, a, b)      2*kLanes elements: those of a, then those of b
//
// avx512bf16: the native conversion and dot product treat subnormal inputs as 0 and flush subnormal results.

constexpr int32_t kNanBits = 0x7fc00000;  // the NaN that StoreSplit writes: its lower half is 0

#if PEAK_ISA == PEAK_SCALAR
#include "simd/scalar.h"
#elif PEAK_ISA == PEAK_AVX2
#include "simd/avx2.h"
#elif PEAK_ISA == PEAK_NEON
#include "simd/neon.h"
#else
#include "simd/avx512.h"
#endif

// ----------------------------------------------------------------------------- the same on every instruction set
// n elements, at most kLanes.
template <class T>
PEAK_INLINE Vec Load(const T* p, int64_t n) {
  return n >= kLanes ? Load(p) : LoadPart(p, n);
}
template <class T>
PEAK_INLINE void Store(T* p, Vec a, int64_t n) {
  n >= kLanes ? Store(p, a) : StorePart(p, a, n);
}

// Bit cast.
PEAK_INLINE Vec AsVec(Pairs a) {
  Vec v;
  std::memcpy(&v, &a, sizeof(v));
  return v;
}
PEAK_INLINE Pairs AsPairs(Vec a) {
  Pairs pairs;
  std::memcpy(&pairs, &a, sizeof(pairs));
  return pairs;
}

PEAK_INLINE Vec LoadSplit(const bf16* p, const int16_t* r, int64_t n) {
  if (n >= kLanes) return LoadSplit(p, r);
  bf16 upper[kLanes] = {};
  int16_t lower[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) upper[i] = p[i], lower[i] = r[i];
  return LoadSplit(upper, lower);
}
PEAK_INLINE void StoreSplit(bf16* p, int16_t* r, Vec a, int64_t n) {
  if (n >= kLanes) return StoreSplit(p, r, a);
  bf16 upper[kLanes];
  int16_t lower[kLanes];
  StoreSplit(upper, lower, a);
  for (int64_t i = 0; i < n; ++i) p[i] = upper[i], r[i] = lower[i];
}

// Vecs with the same operations. All of them do one operation before any does the next: a scheduler of 64 entries
// cannot look past a chain of 15 operations to the next chain, so chains one after another would leave the units idle.
template <int N>
struct Many { Vec v[N]; };
using Two = Many<2>;

template <class A>
struct CountOf;  // N of a Many<N>; 0 for a Vec, which is combined with every Vec of a Many
template <>
struct CountOf<Vec> { static constexpr int k = 0; };
template <int N>
struct CountOf<Many<N>> { static constexpr int k = N; };
template <class A, class B>
using Wider = Many<(CountOf<A>::k > CountOf<B>::k ? CountOf<A>::k : CountOf<B>::k)>;

PEAK_INLINE Vec Part(Vec a, int) { return a; }
template <int N>
PEAK_INLINE Vec Part(const Many<N>& a, int k) { return a.v[k]; }

#define PEAK_EACH(expression)                                 \
  {                                                           \
    R result;                                                 \
    for (int k = 0; k < CountOf<R>::k; ++k) result.v[k] = expression; \
    return result;                                            \
  }
#define PEAK_LIFT_1(name)         \
  template <int N, class R = Many<N>> \
  PEAK_INLINE R name(const Many<N>& a) PEAK_EACH(name(a.v[k]))
#define PEAK_LIFT_2(name)                           \
  template <class A, class B, class R = Wider<A, B>> \
  PEAK_INLINE R name(const A& a, const B& b) PEAK_EACH(name(Part(a, k), Part(b, k)))
#define PEAK_LIFT_3(name)                                              \
  template <class A, class B, class C, class R = Wider<Wider<A, B>, C>> \
  PEAK_INLINE R name(const A& a, const B& b, const C& c) PEAK_EACH(name(Part(a, k), Part(b, k), Part(c, k)))

PEAK_LIFT_2(operator+)
PEAK_LIFT_2(operator-)
PEAK_LIFT_2(operator*)
PEAK_LIFT_2(Max)
PEAK_LIFT_2(Min)
PEAK_LIFT_3(Fma)
PEAK_LIFT_3(Fnma)

PEAK_INLINE Two LoadTwo(const float* p) { return {{Load(p), Load(p + kLanes)}}; }
PEAK_INLINE Two LoadTwo(const bf16* p) {
  const Pairs pairs = LoadPairs(p);
  return {{Even(pairs), Odd(pairs)}};
}
PEAK_INLINE void StoreTwo(float* p, Two t) {
  Store(p, t.v[0]);
  Store(p + kLanes, t.v[1]);
}
PEAK_INLINE void StoreTwo(bf16* p, Two t) { StorePairs(p, PackPairs(t.v[0], t.v[1])); }
PEAK_INLINE void StreamTwo(float* p, Two t) {
  Stream(p, t.v[0]);
  Stream(p + kLanes, t.v[1]);
}
PEAK_INLINE void StreamTwo(bf16* p, Two t) { StreamPairs(p, PackPairs(t.v[0], t.v[1])); }

// 2 * kLanes elements of each of kRows rows.
template <int kRows, class T>
PEAK_INLINE Many<2 * kRows> LoadRows(const T* p, int64_t stride) {
  Many<2 * kRows> m;
  for (int r = 0; r < kRows; ++r) {
    const Two t = LoadTwo(p + r * stride);
    m.v[2 * r] = t.v[0];
    m.v[2 * r + 1] = t.v[1];
  }
  return m;
}
template <bool kBypass, int kRows, class T>
PEAK_INLINE void StoreRows(T* p, int64_t stride, const Many<2 * kRows>& m) {
  for (int r = 0; r < kRows; ++r) {
    const Two t = {m.v[2 * r], m.v[2 * r + 1]};
    kBypass ? StreamTwo(p + r * stride, t) : StoreTwo(p + r * stride, t);
  }
}

// Prefetches the elements of a LoadTwo to L1, or L2. Addresses after the end are allowed.
template <class T>
PEAK_INLINE void PrefetchTwo(const T* p) {
  for (size_t byte = 0; byte < 2 * kLanes * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 3);
  }
}
template <class T>
PEAK_INLINE void PrefetchTwoToL2(const T* p) {
  for (size_t byte = 0; byte < 2 * kLanes * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }
}

// The index of element i in a row of floats whose LoadTwo matches LoadTwo of a row of T of the same width.
template <class T>
PEAK_INLINE int64_t PermutedIndex(int64_t i, int64_t width) {
  const int64_t begin = i - i % (2 * kLanes), k = i - begin;
  return sizeof(T) == 4 || begin + 2 * kLanes > width ? i : begin + k % 2 * kLanes + k / 2;
}

template <class T>
PEAK_INLINE void StoreInOrder(T* p, Vec a, Vec b) {
  Store(p, a);
  Store(p + kLanes, b);
}

constexpr bool kNativeQuads = kQuadZero == 0;

#if PEAK_ISA >= PEAK_AVX512 && PEAK_ISA <= PEAK_AVX512BF16
PEAK_INLINE Pairs LoadPairs(const bf16* p, int64_t n) {
  return {n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p)};
}
#else
PEAK_INLINE Pairs LoadPairs(const bf16* p, int64_t n) {
  if (n >= 2 * kLanes) return LoadPairs(p);
  bf16 part[2 * kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return LoadPairs(part);
}
#endif
PEAK_INLINE Vec LoadWords(const float* p, int64_t n) { return Load(p, n); }
PEAK_INLINE Vec LoadWords(const bf16* p, int64_t n) { return AsVec(LoadPairs(p, n)); }
#if PEAK_ISA == PEAK_SCALAR || PEAK_ISA == PEAK_NEON
PEAK_INLINE Vec LoadHalves(const float* low, const float* high) {
  float both[kLanes];
  for (int i = 0; i < kLanes; ++i) both[i] = i < kLanes / 2 ? low[i] : high[i - kLanes / 2];
  return Load(both);
}
PEAK_INLINE void StoreHalves(float* low, float* high, Vec a) {
  float both[kLanes];
  Store(both, a);
  for (int i = 0; i < kLanes; ++i) (i < kLanes / 2 ? low[i] : high[i - kLanes / 2]) = both[i];
}
#endif
#if PEAK_ISA < PEAK_AVX512 || PEAK_ISA > PEAK_AVX512BF16
template <class T>
PEAK_INLINE void LoadTransposed(const T* p, int64_t stride, Vec* rows) {
  for (int64_t i = 0; i < kLanes; ++i) rows[i] = LoadWords(p + i * stride, kLanes * 4 / sizeof(T));
  Transpose(rows);
}
#endif

#if PEAK_ISA == PEAK_AVX512BF16
PEAK_INLINE Pairs LoadPairs(const float* p, int64_t n) {
  const Vec low = Load(p, n), high = n > kLanes ? Load(p + kLanes, n - kLanes) : Set(0.0f);
  const __m512bh halves = _mm512_cvtne2ps_pbh(high.v, low.v);
  Pairs pairs;
  std::memcpy(&pairs, &halves, sizeof(pairs));
  return pairs;
}
PEAK_INLINE Pairs ZipPairs(const float* even, const float* odd, int64_t n) {
  return PackPairs(Load(even, n), odd == nullptr ? Set(0.0f) : Load(odd, n));
}
PEAK_INLINE Pairs ZipPairs(const bf16* even, const bf16* odd, int64_t n) {
  const __mmask16 lanes = PartMask(n < 16 ? n : 16);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
  if (odd == nullptr) return {low};
  return {_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd)), 16))};
}
PEAK_INLINE void StoreInOrder(bf16* p, Vec a, Vec b) {  // one conversion for both
  const __m512bh halves = _mm512_cvtne2ps_pbh(b.v, a.v);
  std::memcpy(p, &halves, sizeof(halves));
}
PEAK_INLINE Vec DotPairs(Vec acc, Pairs a, Pairs b) {
  __m512bh x, y;
  std::memcpy(&x, &a.v, sizeof(x));
  std::memcpy(&y, &b.v, sizeof(y));
  return {_mm512_dpbf16_ps(acc.v, x, y)};
}
#else
PEAK_INLINE Vec DotPairs(Vec acc, Pairs a, Pairs b) {
  return Fma(Odd(a), Odd(b), Fma(Even(a), Even(b), acc));
}
#endif

// a * 2^n for integral n; the product may be subnormal or infinite.
PEAK_INLINE Vec Scale(Vec a, Vec n) {
#if PEAK_ISA >= PEAK_AVX512 && PEAK_ISA <= PEAK_AVX512BF16
  return {_mm512_scalef_ps(a.v, n.v)};
#else
  // Multiplies in two steps, because 2^-150 and 2^128 are not floats.
  const Vec half = Round(n * Set(0.5f));
  return a * Pow2(half) * Pow2(n - half);
#endif
}

// e^a to 1.5 ulp (2 ulp without FMA, and below the normal range); e^-inf = 0, NaN stays NaN.
// r = a - n ln 2 with ln 2 in two parts (Cody and Waite), then the Taylor-like minimax of Cephes' expf.
PEAK_INLINE Vec Exp(Vec a) {
  // e^-104 rounds to 0 and e^89 to infinity. Min returns its second operand for a NaN, so a NaN remains. Smaller
  // exponents, such as those of masked scores, are not scaled: a result below the normal range takes 100 cycles or more.
  const auto vanishes = Greater(Set(-104.0f), a);
  const Vec x = Min(Set(89.0f), Select(vanishes, Set(0.0f), a));
  const Vec n = Round(x * Set(1.44269504088896341f));
  Vec r = Fnma(n, Set(0.693359375f), x);
  r = Fma(n, Set(2.12194440e-4f), r);
  Vec p = Set(1.9875691500e-4f);
  p = Fma(p, r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  return Select(vanishes, Set(0.0f), Scale(Fma(p, r * r, r) + Set(1.0f), n));
}

#if PEAK_ISA >= PEAK_AVX512 && PEAK_ISA <= PEAK_AVX512BF16
// Fraction is a - floor(a). ScaleByFloor is p * 2^floor(a) for p in [1, 2]. a may have any size; NaN stays NaN.
PEAK_INLINE Vec Fraction(Vec a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF)}; }
PEAK_INLINE Vec ScaleByFloor(Vec p, Vec a) { return {_mm512_scalef_ps(p.v, a.v)}; }
PEAK_INLINE Vec Reciprocal14(Vec a) { return {_mm512_rcp14_ps(a.v)}; }
constexpr bool kReciprocal14 = true;
#else
PEAK_INLINE Vec Clamped(Vec a) { return Min(Set(129.0f), Max(Set(-151.0f), a)); }
PEAK_INLINE Vec Fraction(Vec a) { return Clamped(a) - Round(Clamped(a) - Set(0.5f)); }
PEAK_INLINE Vec ScaleByFloor(Vec p, Vec a) { return Scale(p, Round(Clamped(a) - Set(0.5f))); }
PEAK_INLINE Vec Reciprocal14(Vec a) { return Set(1.0f) / a; }
constexpr bool kReciprocal14 = false;
#endif
PEAK_LIFT_1(Fraction)
PEAK_LIFT_2(ScaleByFloor)
PEAK_LIFT_1(Reciprocal14)

// 2^a with a relative error of 2e-7 for T = float, and of 4e-6 for bf16, whose result has 8 bits. The limits are exact
// and NaN stays NaN. V is Vec or Many. The polynomials minimize the maximum relative error on [0, 1).
template <class T, class V>
PEAK_INLINE V Exp2(const V& a) {
  const V r = Fraction(a);
  if (sizeof(T) == 4) {
    V p = Fma(r, Set(1.8775766734e-3f), Set(8.9893400947e-3f));
    p = Fma(p, r, Set(5.5826318050e-2f));
    p = Fma(p, r, Set(2.4015361705e-1f));
    p = Fma(p, r, Set(6.9315307320e-1f));
    return ScaleByFloor(Fma(p, r, Set(9.9999992506e-1f)), a);
  }
  V p = Fma(r, Set(1.3534167912e-2f), Set(5.2011460619e-2f));
  p = Fma(p, r, Set(2.4144275689e-1f));
  p = Fma(p, r, Set(6.9300383447e-1f));
  return ScaleByFloor(Fma(p, r, Set(1.0000025934f)), a);
}

// 1 / a for a from 1 to infinity, with a relative error of 1e-7 for T = float, and of 6.2e-5 for bf16.
template <class T, class V>
PEAK_INLINE V Reciprocal(const V& a) {
  const V y = Reciprocal14(a);
  if (!kReciprocal14 || sizeof(T) < 4) return y;
  return Fma(y, Max(Fnma(a, y, Set(1.0f)), Set(-0.5f)), y);  // infinity times 0 is NaN; then Max returns -0.5
}

// erf(a) to 1.5 ulp: a + a P(a^2) near 0, 1 - e^Q(|a|) outside. Coefficients: N. Juffa's single-precision minimax fit.
PEAK_INLINE Vec Erf(Vec a) {
  const Vec t = Abs(a), s = a * a;
  Vec far = Fma(Set(-1.72853470e-5f), t, Set(3.83197126e-4f));
  far = Fma(far, s, Fma(Set(-3.88396438e-3f), t, Set(2.42546219e-2f)));
  far = Fma(far, t, Set(-1.06777877e-1f));
  far = Fma(far, t, Set(-6.34846687e-1f));
  far = Fma(far, t, Set(-1.28717512e-1f));
  // The polynomial is valid up to |a| = 6. Beyond it the result is exactly 1: e^-18 is below half an ulp of 1.
  far = Select(Greater(t, Set(6.0f)), Set(-18.0f), Fma(far, t, Set(0.0f) - t));
  far = CopySign(Set(1.0f) - Exp(far), a);
  Vec near = Set(-5.96761703e-4f);
  near = Fma(near, s, Set(4.99119423e-3f));
  near = Fma(near, s, Set(-2.67681349e-2f));
  near = Fma(near, s, Set(1.12819925e-1f));
  near = Fma(near, s, Set(-3.76125336e-1f));
  near = Fma(near, s, Set(1.28379166e-1f));
  return Select(Greater(t, Set(0.927734375f)), far, Fma(near, a, a));
}

// out[i] = sum over kParts of partial[part][PermutedIndex<X>(i)] in the order of the parts: the second stage of a
// reduction over rows of X. add: out += the sum.
template <class T, class X>
void AddParts(float* partial, int64_t stride, int64_t width, void* out, bool add) {
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec sum = Set(0.0f);
    for (int64_t part = 0; part < kParts; ++part) sum = sum + Load(partial + part * stride + i, width - i);
    Store(partial + i, sum, width - i);
  }
  T* to = static_cast<T*>(out);
  int64_t i = 0;
  if (sizeof(T) == sizeof(X)) {
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      const Two sum = LoadTwo(partial + i);
      StoreTwo(to + i, add ? LoadTwo(to + i) + sum : sum);
    }
  }
  for (; i < width; ++i) {
    const Vec sum = Load(partial + PermutedIndex<X>(i, width), 1);
    Store(to + i, add ? Load(to + i, 1) + sum : sum, 1);
  }
}
