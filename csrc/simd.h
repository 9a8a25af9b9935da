// Vec: one register of floats, for the instruction set in PEAK_ISA. Included once per set by foreach_isa.h, inside
// that set's namespace; kernels see only what this file names, never an intrinsic.
//
//   kLanes                     floats in a Vec
//   Load(p) Load(p, n)         from float or bf16; n < kLanes reads only n elements, the other lanes are 0
//   Store(p, v) Store(p, v, n) to float or bf16, bf16 rounded to nearest even, NaN stays NaN
//   LoadSplit(p, r)  StoreSplit(p, r, v)  and with n   float bits = (bf16 bits << 16) + int16; kernels/adamw.py
//   + - * / Fma(a,b,c)=a*b+c   Fnma(a,b,c)=c-a*b    Sqrt    Abs    CopySign(magnitude, sign)    Round (to even)
//   Max(a,b) Min(a,b)          b where either is NaN, on every set, as x86 does
//   Greater(a,b) Select(m,a,b) Mask and m ? a : b
//   Sum(v) MaxOf(v)            over the lanes, in a fixed order
//   Exp Erf Exp2 Reciprocal    errors stated below
//   Transpose(rows)            kLanes Vecs as a square matrix, in place
//   Pairs                      kLanes pairs of bf16 for DotPairs(acc, a, b): acc[i] += a[2i]*b[2i] + a[2i+1]*b[2i+1]
//   LoadPairs(p)  SetPair(p)   2*kLanes elements; one pair repeated kLanes times
//   PackPairs(even, odd)       pair i = (bf16(even[i]), bf16(odd[i]))
//   StorePairs(p, pairs)       2*kLanes elements
//   Many<N>  Two = Many<2>     N Vecs that take the same steps: + - * Max Min Fma Fnma Exp2 Reciprocal
//   LoadTwo  StoreTwo          2*kLanes elements; of bf16 one Vec holds the even ones, which saves instructions. Floats
//                              that meet such Vecs lie as Place(i) says
//   LoadRows  StoreRows        the same of several rows
//   Words                      kLanes unsigned 32-bit words: SetWords(u)  CountWords() = 0, 1, ..  +  ^
//   MultiplyWide(a, m, &high)  lower words of a * m; the upper ones go to high
//   NotBelow(a, limit)         Mask of a >= limit
//   kRegisters kNativePairs    vector registers; whether DotPairs is one instruction
//   FetchTwo(p)  FetchTwoToL2(p)   prefetch
//   Stream(p, v)  EndStream()  store past the caches to an aligned address; after the last one, before others look
//   StreamTwo(p, two)          the same of 2*kLanes elements
//   Quads, Ints                kLanes groups of four bytes; kLanes signed sums: SetInts(i)  ToFloats(ints)
//   LoadQuads(p)  SetQuad(p)   4*kLanes bytes; one group repeated. StoreQuads
//   DotQuads(acc, a, b)        acc[i] += sum of (a[4i+j] - kQuadZero)*b[4i+j], j = 0..3; a unsigned, b -127..127
//   kQuadZero kNativeQuads     0 where DotQuads is one instruction, else 128; whether it is
//   LowerNibbles UpperNibbles  of each byte;  LookUp(LoadTable(p), quads)   table[byte], of 16 bytes
//   StoreBytes(p, v)           kLanes integral floats of -128..127 as signed bytes
//
// avx512bf16: the native conversion and dot product take subnormal inputs for 0 and flush subnormal results.

constexpr int32_t kNanBits = 0x7fc00000;  // the NaN that StoreSplit writes: its lower half is 0

// ---------------------------------------------------------------------------------------------------------- scalar
#if PEAK_ISA == PEAK_SCALAR

constexpr int kLanes = 1;
constexpr int kRegisters = 16;
constexpr bool kNativePairs = false;
struct Vec { float v; };
struct Mask { bool v; };
struct Pairs { uint32_t v; };

PEAK_INLINE uint32_t Bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
PEAK_INLINE float FromBits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
PEAK_INLINE uint32_t RoundToBf16(float f) {
  const uint32_t u = Bits(f);
  if (f != f) return (u >> 16) | 0x40;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

PEAK_INLINE Vec Set(float f) { return {f}; }
PEAK_INLINE Vec Load(const float* p) { return {*p}; }
PEAK_INLINE Vec Load(const bf16* p) { return {FromBits(static_cast<uint32_t>(p->bits) << 16)}; }
PEAK_INLINE Vec LoadPart(const float*, int64_t) { return {0.0f}; }
PEAK_INLINE Vec LoadPart(const bf16*, int64_t) { return {0.0f}; }
PEAK_INLINE void Store(float* p, Vec a) { *p = a.v; }
PEAK_INLINE void Store(bf16* p, Vec a) { p->bits = static_cast<uint16_t>(RoundToBf16(a.v)); }
PEAK_INLINE Vec LoadSplit(const bf16* p, const int16_t* r) {
  const int32_t magnitude = static_cast<int32_t>((p->bits & 0x7fffu) << 16) + *r;
  return {FromBits(static_cast<uint32_t>(magnitude < 0 ? 0 : magnitude) | (p->bits & 0x8000u) << 16)};
}
PEAK_INLINE void StoreSplit(bf16* p, int16_t* r, Vec a) {
  const uint32_t u = a.v == a.v ? Bits(a.v) : kNanBits;
  p->bits = static_cast<uint16_t>((u + 0x8000) >> 16);
  *r = static_cast<int16_t>(u);
}
PEAK_INLINE void Stream(float* p, Vec a) { Store(p, a); }
PEAK_INLINE void StreamPairs(bf16* p, Pairs a) { std::memcpy(p, &a.v, 4); }
PEAK_INLINE void EndStream() {}
PEAK_INLINE void StorePart(float*, Vec, int64_t) {}
PEAK_INLINE void StorePart(bf16*, Vec, int64_t) {}

PEAK_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
PEAK_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
PEAK_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
PEAK_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Not std::fma: without the instruction it is a library call a hundred times slower.
PEAK_INLINE Vec Fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
PEAK_INLINE Vec Fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
PEAK_INLINE Vec Sqrt(Vec a) { return {std::sqrt(a.v)}; }
PEAK_INLINE Vec Abs(Vec a) { return {std::fabs(a.v)}; }
PEAK_INLINE Vec CopySign(Vec a, Vec sign) { return {std::copysign(a.v, sign.v)}; }
PEAK_INLINE Vec Round(Vec a) { return {std::nearbyint(a.v)}; }
PEAK_INLINE Vec Max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
PEAK_INLINE Vec Min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
PEAK_INLINE Mask Greater(Vec a, Vec b) { return {a.v > b.v}; }
PEAK_INLINE Vec Select(Mask m, Vec a, Vec b) { return m.v ? a : b; }
PEAK_INLINE float Sum(Vec a) { return a.v; }
PEAK_INLINE float MaxOf(Vec a) { return a.v; }
// 2^n for integral n in [-126, 127].
PEAK_INLINE Vec Pow2(Vec n) {
  return {FromBits(static_cast<uint32_t>(static_cast<int32_t>(n.v == n.v ? n.v : 0.0f) + 127) << 23)};
}

PEAK_INLINE Pairs LoadPairs(const bf16* p) { return {p[0].bits | static_cast<uint32_t>(p[1].bits) << 16}; }
PEAK_INLINE Pairs SetPair(const bf16* p) { return LoadPairs(p); }
PEAK_INLINE void StorePairs(bf16* p, Pairs a) { std::memcpy(p, &a.v, 4); }
PEAK_INLINE Pairs PackPairs(Vec even, Vec odd) { return {RoundToBf16(even.v) | RoundToBf16(odd.v) << 16}; }
PEAK_INLINE Vec Even(Pairs a) { return {FromBits(a.v << 16)}; }
PEAK_INLINE Vec Odd(Pairs a) { return {FromBits(a.v & 0xffff0000u)}; }
PEAK_INLINE void Transpose(Vec*) {}

struct Words { uint32_t v; };
PEAK_INLINE Words SetWords(uint32_t u) { return {u}; }
PEAK_INLINE Words CountWords() { return {0}; }
PEAK_INLINE Words operator+(Words a, Words b) { return {a.v + b.v}; }
PEAK_INLINE Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
PEAK_INLINE Words MultiplyWide(Words a, uint32_t m, Words* high) {
  const uint64_t product = static_cast<uint64_t>(a.v) * m;
  *high = {static_cast<uint32_t>(product >> 32)};
  return {static_cast<uint32_t>(product)};
}
PEAK_INLINE Mask NotBelow(Words a, uint32_t limit) { return {a.v >= limit}; }

constexpr int kQuadZero = 128;
struct Quads { uint8_t v[4]; };
struct Ints { int32_t v; };
struct Table { uint8_t v[16]; };
PEAK_INLINE Ints SetInts(int32_t i) { return {i}; }
PEAK_INLINE Vec ToFloats(Ints a) { return {static_cast<float>(a.v)}; }
PEAK_INLINE Quads LoadQuads(const void* p) { Quads q; std::memcpy(q.v, p, 4); return q; }
PEAK_INLINE Quads SetQuad(const void* p) { return LoadQuads(p); }
PEAK_INLINE void StoreQuads(void* p, Quads a) { std::memcpy(p, a.v, 4); }
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {
  for (int j = 0; j < 4; ++j) acc.v += (a.v[j] - kQuadZero) * static_cast<int8_t>(b.v[j]);
  return acc;
}
PEAK_INLINE Quads LowerNibbles(Quads a) {
  for (uint8_t& byte : a.v) byte &= 15;
  return a;
}
PEAK_INLINE Quads UpperNibbles(Quads a) {
  for (uint8_t& byte : a.v) byte >>= 4;
  return a;
}
PEAK_INLINE Table LoadTable(const uint8_t* p) { Table t; std::memcpy(t.v, p, 16); return t; }
PEAK_INLINE Quads LookUp(const Table& t, Quads a) { return {{t.v[a.v[0]], t.v[a.v[1]], t.v[a.v[2]], t.v[a.v[3]]}}; }
PEAK_INLINE void StoreBytes(int8_t* p, Vec a) { *p = static_cast<int8_t>(a.v); }

// ------------------------------------------------------------------------------------------------------------ AVX2
#elif PEAK_ISA == PEAK_AVX2

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kNativePairs = false;
struct Vec { __m256 v; };
struct Mask { __m256 v; };
struct Pairs { __m256i v; };

PEAK_INLINE __m256i PartMask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The upper 16 bits of each lane hold the rounded value; the lower ones are rubbish.
PEAK_INLINE __m256i RoundToUpper(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
PEAK_INLINE __m128i LowerHalves(__m256i u) {
  const __m256i lower = _mm256_and_si256(u, _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
}
PEAK_INLINE __m128i ToBf16(__m256 a) { return LowerHalves(_mm256_srli_epi32(RoundToUpper(a), 16)); }
PEAK_INLINE __m256 FromBf16(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }

PEAK_INLINE Vec Set(float f) { return {_mm256_set1_ps(f)}; }
PEAK_INLINE Vec Load(const float* p) { return {_mm256_loadu_ps(p)}; }
PEAK_INLINE Vec Load(const bf16* p) { return {FromBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
PEAK_INLINE Vec LoadPart(const float* p, int64_t n) { return {_mm256_maskload_ps(p, PartMask(n))}; }
PEAK_INLINE Vec LoadPart(const bf16* p, int64_t n) {
  bf16 part[8] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return Load(part);
}
PEAK_INLINE void Store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
PEAK_INLINE void Store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), ToBf16(a.v)); }
PEAK_INLINE Vec LoadSplit(const bf16* p, const int16_t* r) {
  const __m256i u = _mm256_castps_si256(Load(p).v), sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i lower = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(r)));
  const __m256i magnitude = _mm256_add_epi32(_mm256_andnot_si256(sign, u), lower);
  const __m256i bits = _mm256_max_epi32(magnitude, _mm256_setzero_si256());
  return {_mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(sign, u)))};
}
PEAK_INLINE void StoreSplit(bf16* p, int16_t* r, Vec a) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(kNanBits));
  const __m256i u = _mm256_castps_si256(_mm256_blendv_ps(a.v, nan, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
  const __m256i upper = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x8000)), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), LowerHalves(upper));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(r), LowerHalves(u));
}
PEAK_INLINE void Stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
PEAK_INLINE void StreamPairs(bf16* p, Pairs a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a.v); }
PEAK_INLINE void EndStream() { _mm_sfence(); }
PEAK_INLINE void StorePart(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, PartMask(n), a.v); }
PEAK_INLINE void StorePart(bf16* p, Vec a, int64_t n) {
  bf16 part[8];
  Store(part, a);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

PEAK_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
PEAK_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
PEAK_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
PEAK_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
PEAK_INLINE Vec Fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PEAK_INLINE Vec Fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
PEAK_INLINE Vec Sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
PEAK_INLINE Vec Abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
PEAK_INLINE Vec CopySign(Vec a, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, a.v), _mm256_and_ps(bit, sign.v))};
}
PEAK_INLINE Vec Round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PEAK_INLINE Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
PEAK_INLINE Vec Min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
PEAK_INLINE Mask Greater(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
PEAK_INLINE Vec Select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
PEAK_INLINE float Sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PEAK_INLINE float MaxOf(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
PEAK_INLINE Vec Pow2(Vec n) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}

PEAK_INLINE Pairs LoadPairs(const bf16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PEAK_INLINE void StorePairs(bf16* p, Pairs a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
PEAK_INLINE Pairs SetPair(const bf16* p) {
  int pair;
  std::memcpy(&pair, p, 4);
  return {_mm256_set1_epi32(pair)};
}
PEAK_INLINE Pairs PackPairs(Vec even, Vec odd) {
  return {_mm256_blend_epi16(_mm256_srli_epi32(RoundToUpper(even.v), 16), RoundToUpper(odd.v), 0xaa)};
}
PEAK_INLINE Vec Even(Pairs a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
PEAK_INLINE Vec Odd(Pairs a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// Columns 4l + j of rows 4i .. 4i + 3 gather in lane l of row 4i + j; then the lanes change places.
PEAK_INLINE void Transpose(Vec* rows) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 lo0 = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v), hi0 = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m256 lo1 = _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m256 hi1 = _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    t[i] = _mm256_shuffle_ps(lo0, lo1, 0x44);
    t[i + 1] = _mm256_shuffle_ps(lo0, lo1, 0xee);
    t[i + 2] = _mm256_shuffle_ps(hi0, hi1, 0x44);
    t[i + 3] = _mm256_shuffle_ps(hi0, hi1, 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
    rows[4 + j].v = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
  }
}

struct Words { __m256i v; };
PEAK_INLINE Words SetWords(uint32_t u) { return {_mm256_set1_epi32(static_cast<int>(u))}; }
PEAK_INLINE Words CountWords() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
PEAK_INLINE Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
PEAK_INLINE Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
PEAK_INLINE Words MultiplyWide(Words a, uint32_t m, Words* high) {
  const __m256i factor = SetWords(m).v, even = _mm256_mul_epu32(a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  *high = {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
  return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
}
PEAK_INLINE Mask NotBelow(Words a, uint32_t limit) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, SetWords(limit).v), a.v))};
}

constexpr int kQuadZero = 128;
struct Quads { __m256i v; };
struct Ints { __m256i v; };
struct Table { __m256i v; };
PEAK_INLINE Ints SetInts(int32_t i) { return {_mm256_set1_epi32(i)}; }
PEAK_INLINE Vec ToFloats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
PEAK_INLINE Quads LoadQuads(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
PEAK_INLINE Quads SetQuad(const void* p) {
  int quad;
  std::memcpy(&quad, p, 4);
  return {_mm256_set1_epi32(quad)};
}
PEAK_INLINE void StoreQuads(void* p, Quads a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
// Unsigned times signed bytes saturate at 16 bits: the sign goes to b, so that a is at most 128.
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {
  const __m256i w = _mm256_xor_si256(a.v, _mm256_set1_epi8(-128));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(b.v, w));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
PEAK_INLINE Quads LowerNibbles(Quads a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
PEAK_INLINE Quads UpperNibbles(Quads a) { return LowerNibbles({_mm256_srli_epi16(a.v, 4)}); }
PEAK_INLINE Table LoadTable(const uint8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PEAK_INLINE Quads LookUp(Table t, Quads a) { return {_mm256_shuffle_epi8(t.v, a.v)}; }
PEAK_INLINE void StoreBytes(int8_t* p, Vec a) {
  const __m256i ints = _mm256_cvtps_epi32(a.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}

// --------------------------------------------------------------------------------------------------------- AVX-512
#elif PEAK_ISA == PEAK_AVX512 || PEAK_ISA == PEAK_AVX512BF16

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
constexpr bool kNativePairs = PEAK_ISA == PEAK_AVX512BF16;
struct Vec { __m512 v; };
struct Mask { __mmask16 v; };
struct Pairs { __m512i v; };

PEAK_INLINE __mmask16 PartMask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#if PEAK_ISA == PEAK_AVX512BF16
PEAK_INLINE __m256i ToBf16(__m512 a) {
  const __m256bh h = _mm512_cvtneps_pbh(a);
  __m256i bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
}
#else
PEAK_INLINE __m256i ToBf16(__m512 a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
#endif
PEAK_INLINE __m512 FromBf16(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }

PEAK_INLINE Vec Set(float f) { return {_mm512_set1_ps(f)}; }
PEAK_INLINE Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
PEAK_INLINE Vec Load(const bf16* p) { return {FromBf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
PEAK_INLINE Vec LoadPart(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(PartMask(n), p)}; }
PEAK_INLINE Vec LoadPart(const bf16* p, int64_t n) { return {FromBf16(_mm256_maskz_loadu_epi16(PartMask(n), p))}; }
PEAK_INLINE void Store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
PEAK_INLINE void Store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ToBf16(a.v)); }
PEAK_INLINE Vec LoadSplit(const bf16* p, const int16_t* r) {
  const __m512i u = _mm512_castps_si512(Load(p).v), sign = _mm512_set1_epi32(INT32_MIN);
  const __m512i lower = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(r)));
  const __m512i magnitude = _mm512_add_epi32(_mm512_andnot_si512(sign, u), lower);
  const __m512i bits = _mm512_max_epi32(magnitude, _mm512_setzero_si512());
  return {_mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_and_si512(sign, u)))};
}
PEAK_INLINE void StoreSplit(bf16* p, int16_t* r, Vec a) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i u = _mm512_mask_blend_epi32(nan, _mm512_castps_si512(a.v), _mm512_set1_epi32(kNanBits));
  const __m512i upper = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x8000)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(r), _mm512_cvtepi32_epi16(u));
}
PEAK_INLINE void Stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
PEAK_INLINE void StreamPairs(bf16* p, Pairs a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a.v); }
PEAK_INLINE void EndStream() { _mm_sfence(); }
PEAK_INLINE void StorePart(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, PartMask(n), a.v); }
PEAK_INLINE void StorePart(bf16* p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, PartMask(n), ToBf16(a.v)); }

PEAK_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
PEAK_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
PEAK_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
PEAK_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
PEAK_INLINE Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PEAK_INLINE Vec Fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
PEAK_INLINE Vec Sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
PEAK_INLINE Vec Abs(Vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
PEAK_INLINE Vec CopySign(Vec a, Vec sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
PEAK_INLINE Vec Round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PEAK_INLINE Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
PEAK_INLINE Vec Min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
PEAK_INLINE Mask Greater(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
PEAK_INLINE Vec Select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
PEAK_INLINE float Sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
PEAK_INLINE float MaxOf(Vec a) { return _mm512_reduce_max_ps(a.v); }

PEAK_INLINE Pairs LoadPairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
PEAK_INLINE void StorePairs(bf16* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
PEAK_INLINE Pairs SetPair(const bf16* p) {
  int pair;
  std::memcpy(&pair, p, 4);
  return {_mm512_set1_epi32(pair)};
}
PEAK_INLINE Pairs PackPairs(Vec even, Vec odd) {
#if PEAK_ISA == PEAK_AVX512BF16
  const __m512bh halves = _mm512_cvtne2ps_pbh(odd.v, even.v);
  __m512i bits;
  std::memcpy(&bits, &halves, sizeof(bits));
  // Element 2i comes from i, 2i + 1 from 16 + i.
  const __m512i from = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                        0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return {_mm512_permutexvar_epi16(from, bits)};
#else
  return {_mm512_or_si512(_mm512_cvtepu16_epi32(ToBf16(even.v)),
                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(ToBf16(odd.v)), 16))};
#endif
}
PEAK_INLINE Vec Even(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
PEAK_INLINE Vec Odd(Pairs a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// As on AVX2.
PEAK_INLINE void Transpose(Vec* rows) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 lo0 = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v), hi0 = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m512 lo1 = _mm512_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m512 hi1 = _mm512_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    t[i] = _mm512_shuffle_ps(lo0, lo1, 0x44);
    t[i + 1] = _mm512_shuffle_ps(lo0, lo1, 0xee);
    t[i + 2] = _mm512_shuffle_ps(hi0, hi1, 0x44);
    t[i + 3] = _mm512_shuffle_ps(hi0, hi1, 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 lo0 = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x44), hi0 = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xee);
    const __m512 lo1 = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x44);
    const __m512 hi1 = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xee);
    rows[j].v = _mm512_shuffle_f32x4(lo0, lo1, 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(lo0, lo1, 0xdd);
    rows[8 + j].v = _mm512_shuffle_f32x4(hi0, hi1, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(hi0, hi1, 0xdd);
  }
}

struct Words { __m512i v; };
PEAK_INLINE Words SetWords(uint32_t u) { return {_mm512_set1_epi32(static_cast<int>(u))}; }
PEAK_INLINE Words CountWords() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
PEAK_INLINE Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
PEAK_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
PEAK_INLINE Words MultiplyWide(Words a, uint32_t m, Words* high) {
  const __m512i factor = SetWords(m).v, even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  *high = {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)};
  return {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
PEAK_INLINE Mask NotBelow(Words a, uint32_t limit) { return {_mm512_cmpge_epu32_mask(a.v, SetWords(limit).v)}; }

constexpr int kQuadZero = PEAK_ISA == PEAK_AVX512BF16 ? 0 : 128;
struct Quads { __m512i v; };
using IntLanes = int __attribute__((vector_size(64)));  // of __m512i GCC would keep a second copy in the loops
struct Ints { IntLanes v; };
struct Table { __m512i v; };
PEAK_INLINE Ints SetInts(int32_t i) { return {reinterpret_cast<IntLanes>(_mm512_set1_epi32(i))}; }
PEAK_INLINE Vec ToFloats(Ints a) { return {_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(a.v))}; }
PEAK_INLINE Quads LoadQuads(const void* p) { return {_mm512_loadu_si512(p)}; }
PEAK_INLINE Quads SetQuad(const void* p) {
  int quad;
  std::memcpy(&quad, p, 4);
  return {_mm512_set1_epi32(quad)};
}
PEAK_INLINE void StoreQuads(void* p, Quads a) { _mm512_storeu_si512(p, a.v); }
#if PEAK_ISA == PEAK_AVX512BF16
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {
  return {reinterpret_cast<IntLanes>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc.v), a.v, b.v))};
}
#else
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {  // as on AVX2
  const __m512i w = _mm512_xor_si512(a.v, _mm512_set1_epi8(-128));
  const __m512i turned = _mm512_mask_sub_epi8(b.v, _mm512_movepi8_mask(w), _mm512_setzero_si512(), b.v);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), turned);
  return {acc.v + reinterpret_cast<IntLanes>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
#endif
PEAK_INLINE Quads LowerNibbles(Quads a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
PEAK_INLINE Quads UpperNibbles(Quads a) { return LowerNibbles({_mm512_srli_epi16(a.v, 4)}); }
PEAK_INLINE Table LoadTable(const uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PEAK_INLINE Quads LookUp(Table t, Quads a) { return {_mm512_shuffle_epi8(t.v, a.v)}; }
PEAK_INLINE void StoreBytes(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// ------------------------------------------------------------------------------------------------------------ NEON
#elif PEAK_ISA == PEAK_NEON

constexpr int kLanes = 4;
constexpr int kRegisters = 32;
constexpr bool kNativePairs = false;
struct Vec { float32x4_t v; };
struct Mask { uint32x4_t v; };
struct Pairs { uint32x4_t v; };

PEAK_INLINE uint32x4_t RoundToUpper(float32x4_t a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(a, a), rounded, vorrq_u32(u, vdupq_n_u32(0x400000)));
}

PEAK_INLINE Vec Set(float f) { return {vdupq_n_f32(f)}; }
PEAK_INLINE Vec Load(const float* p) { return {vld1q_f32(p)}; }
PEAK_INLINE Vec Load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
PEAK_INLINE void Store(float* p, Vec a) { vst1q_f32(p, a.v); }
PEAK_INLINE void Store(bf16* p, Vec a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(RoundToUpper(a.v), 16));
}
PEAK_INLINE Vec LoadSplit(const bf16* p, const int16_t* r) {
  const uint32x4_t u = vreinterpretq_u32_f32(Load(p).v), sign = vdupq_n_u32(0x80000000u);
  const int32x4_t magnitude = vaddw_s16(vreinterpretq_s32_u32(vbicq_u32(u, sign)), vld1_s16(r));
  const uint32x4_t bits = vreinterpretq_u32_s32(vmaxq_s32(magnitude, vdupq_n_s32(0)));
  return {vreinterpretq_f32_u32(vorrq_u32(bits, vandq_u32(u, sign)))};
}
PEAK_INLINE void StoreSplit(bf16* p, int16_t* r, Vec a) {
  const uint32x4_t u = vbslq_u32(vceqq_f32(a.v, a.v), vreinterpretq_u32_f32(a.v), vdupq_n_u32(kNanBits));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vaddq_u32(u, vdupq_n_u32(0x8000)), 16));
  vst1_s16(r, vreinterpret_s16_u16(vmovn_u32(u)));
}
PEAK_INLINE void Stream(float* p, Vec a) { Store(p, a); }  // aarch64 has no such hint for one register
PEAK_INLINE void EndStream() {}
template <class T>
PEAK_INLINE Vec LoadPart(const T* p, int64_t n) {
  T part[4] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return Load(part);
}
template <class T>
PEAK_INLINE void StorePart(T* p, Vec a, int64_t n) {
  T part[4];
  Store(part, a);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

PEAK_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
PEAK_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
PEAK_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
PEAK_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
PEAK_INLINE Vec Fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
PEAK_INLINE Vec Fnma(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
PEAK_INLINE Vec Sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
PEAK_INLINE Vec Abs(Vec a) { return {vabsq_f32(a.v)}; }
PEAK_INLINE Vec CopySign(Vec a, Vec sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, a.v)}; }
PEAK_INLINE Vec Round(Vec a) { return {vrndnq_f32(a.v)}; }
PEAK_INLINE Vec Max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
PEAK_INLINE Vec Min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
PEAK_INLINE Mask Greater(Vec a, Vec b) { return {vcgtq_f32(a.v, b.v)}; }
PEAK_INLINE Vec Select(Mask m, Vec a, Vec b) { return {vbslq_f32(m.v, a.v, b.v)}; }
PEAK_INLINE float Sum(Vec a) { return vaddvq_f32(a.v); }
PEAK_INLINE float MaxOf(Vec a) { return vmaxvq_f32(a.v); }
PEAK_INLINE Vec Pow2(Vec n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
}

PEAK_INLINE Pairs LoadPairs(const bf16* p) {
  return {vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)))};
}
PEAK_INLINE void StorePairs(bf16* p, Pairs a) { vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_u32(a.v)); }
PEAK_INLINE void StreamPairs(bf16* p, Pairs a) { StorePairs(p, a); }
PEAK_INLINE Pairs SetPair(const bf16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, 4);
  return {vdupq_n_u32(pair)};
}
PEAK_INLINE Pairs PackPairs(Vec even, Vec odd) {
  return {vbslq_u32(vdupq_n_u32(0xffff0000u), RoundToUpper(odd.v), vshrq_n_u32(RoundToUpper(even.v), 16))};
}
PEAK_INLINE Vec Even(Pairs a) { return {vreinterpretq_f32_u32(vshlq_n_u32(a.v, 16))}; }
PEAK_INLINE Vec Odd(Pairs a) { return {vreinterpretq_f32_u32(vandq_u32(a.v, vdupq_n_u32(0xffff0000u)))}; }
PEAK_INLINE void Transpose(Vec* rows) {
  const float32x4x2_t a = vzipq_f32(rows[0].v, rows[2].v), b = vzipq_f32(rows[1].v, rows[3].v);
  const float32x4x2_t lo = vzipq_f32(a.val[0], b.val[0]), hi = vzipq_f32(a.val[1], b.val[1]);
  rows[0].v = lo.val[0];
  rows[1].v = lo.val[1];
  rows[2].v = hi.val[0];
  rows[3].v = hi.val[1];
}

struct Words { uint32x4_t v; };
PEAK_INLINE Words SetWords(uint32_t u) { return {vdupq_n_u32(u)}; }
PEAK_INLINE Words CountWords() {
  constexpr uint32_t kCount[] = {0, 1, 2, 3};
  return {vld1q_u32(kCount)};
}
PEAK_INLINE Words operator+(Words a, Words b) { return {vaddq_u32(a.v, b.v)}; }
PEAK_INLINE Words operator^(Words a, Words b) { return {veorq_u32(a.v, b.v)}; }
PEAK_INLINE Words MultiplyWide(Words a, uint32_t m, Words* high) {
  const uint32x4_t front = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a.v), m));
  const uint32x4_t back = vreinterpretq_u32_u64(vmull_n_u32(vget_high_u32(a.v), m));
  *high = {vuzp2q_u32(front, back)};
  return {vuzp1q_u32(front, back)};
}
PEAK_INLINE Mask NotBelow(Words a, uint32_t limit) { return {vcgeq_u32(a.v, vdupq_n_u32(limit))}; }

constexpr int kQuadZero = 128;
struct Quads { uint8x16_t v; };
struct Ints { int32x4_t v; };
struct Table { uint8x16_t v; };
PEAK_INLINE Ints SetInts(int32_t i) { return {vdupq_n_s32(i)}; }
PEAK_INLINE Vec ToFloats(Ints a) { return {vcvtq_f32_s32(a.v)}; }
PEAK_INLINE Quads LoadQuads(const void* p) { return {vld1q_u8(static_cast<const uint8_t*>(p))}; }
PEAK_INLINE Quads SetQuad(const void* p) {
  uint32_t quad;
  std::memcpy(&quad, p, 4);
  return {vreinterpretq_u8_u32(vdupq_n_u32(quad))};
}
PEAK_INLINE void StoreQuads(void* p, Quads a) { vst1q_u8(static_cast<uint8_t*>(p), a.v); }
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {
  const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(a.v, vdupq_n_u8(kQuadZero))), x = vreinterpretq_s8_u8(b.v);
  const int32x4_t front = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
  const int32x4_t back = vpaddlq_s16(vmull_high_s8(w, x));
  return {vaddq_s32(acc.v, vpaddq_s32(front, back))};
}
PEAK_INLINE Quads LowerNibbles(Quads a) { return {vandq_u8(a.v, vdupq_n_u8(15))}; }
PEAK_INLINE Quads UpperNibbles(Quads a) { return {vshrq_n_u8(a.v, 4)}; }
PEAK_INLINE Table LoadTable(const uint8_t* p) { return {vld1q_u8(p)}; }
PEAK_INLINE Quads LookUp(Table t, Quads a) { return {vqtbl1q_u8(t.v, a.v)}; }
PEAK_INLINE void StoreBytes(int8_t* p, Vec a) {
  const int16x4_t halves = vmovn_s32(vcvtq_s32_f32(a.v));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  std::memcpy(p, &bytes, 4);
}

#endif

// --------------------------------------------------------------------------------------- the same on every ISA
// n elements, at most kLanes.
template <class T>
PEAK_INLINE Vec Load(const T* p, int64_t n) {
  return n >= kLanes ? Load(p) : LoadPart(p, n);
}
template <class T>
PEAK_INLINE void Store(T* p, Vec a, int64_t n) {
  n >= kLanes ? Store(p, a) : StorePart(p, a, n);
}

// The bits of one as the other.
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

// Vecs that take the same steps. A step is taken by all of them before the next one is: only so do long chains of
// operations keep the units busy, since a scheduler of 64 entries can not look past a chain of 15 to the next one.
template <int N>
struct Many { Vec v[N]; };
using Two = Many<2>;

template <class A>
struct CountOf;  // 0 for a Vec, which takes part in each step
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
template <bool kPastCaches, int kRows, class T>
PEAK_INLINE void StoreRows(T* p, int64_t stride, const Many<2 * kRows>& m) {
  for (int r = 0; r < kRows; ++r) {
    const Two t = {m.v[2 * r], m.v[2 * r + 1]};
    kPastCaches ? StreamTwo(p + r * stride, t) : StoreTwo(p + r * stride, t);
  }
}

// Asks for the elements that LoadTwo will read into L1, or L2; addresses past the end do no harm.
template <class T>
PEAK_INLINE void FetchTwo(const T* p) {
  for (size_t byte = 0; byte < 2 * kLanes * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 3);
  }
}
template <class T>
PEAK_INLINE void FetchTwoToL2(const T* p) {
  for (size_t byte = 0; byte < 2 * kLanes * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }
}

// Where element i of a row of floats lies, so that LoadTwo of them fits LoadTwo of a row of T of the same width.
template <class T>
PEAK_INLINE int64_t Place(int64_t i, int64_t width) {
  const int64_t begin = i - i % (2 * kLanes), k = i - begin;
  return sizeof(T) == 4 || begin + 2 * kLanes > width ? i : begin + k % 2 * kLanes + k / 2;
}

constexpr bool kNativeQuads = kQuadZero == 0;

#if PEAK_ISA == PEAK_AVX512BF16
PEAK_INLINE Pairs LoadPairs(const bf16* p, int64_t n) {
  return {n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p)};
}
PEAK_INLINE Pairs ZipPairs(const bf16* even, const bf16* odd, int64_t n) {
  const __mmask16 lanes = PartMask(n < 16 ? n : 16);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
  if (odd == nullptr) return {low};
  return {_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd)), 16))};
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
#if PEAK_ISA == PEAK_AVX512 || PEAK_ISA == PEAK_AVX512BF16
  return {_mm512_scalef_ps(a.v, n.v)};
#else
  // In two steps: 2^-150 and 2^128 are no floats.
  const Vec half = Round(n * Set(0.5f));
  return a * Pow2(half) * Pow2(n - half);
#endif
}

// e^a to 1.5 ulp (2 ulp without FMA, and below the normal range); e^-inf = 0, NaN stays NaN.
// r = a - n ln 2 with ln 2 in two parts (Cody and Waite), then the Taylor-like minimax of Cephes' expf.
PEAK_INLINE Vec Exp(Vec a) {
  // e^-104 rounds to 0 and e^89 to infinity. The second operand decides for NaN.
  const Vec x = Min(Set(89.0f), Max(Set(-104.0f), a));
  const Vec n = Round(x * Set(1.44269504088896341f));
  Vec r = Fnma(n, Set(0.693359375f), x);
  r = Fma(n, Set(2.12194440e-4f), r);
  Vec p = Set(1.9875691500e-4f);
  p = Fma(p, r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  return Scale(Fma(p, r * r, r) + Set(1.0f), n);
}

#if PEAK_ISA == PEAK_AVX512 || PEAK_ISA == PEAK_AVX512BF16
// a - floor(a), and p * 2^floor(a) for p in [1, 2]: a of any size, NaN stays NaN.
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

// 2^a with a relative error of 2e-7 for T = float, and of 4e-6 for bf16, whose result has 8 bits; exact limits, NaN
// stays NaN. V is Vec or Many. The polynomials are minimax on [0, 1) in the relative error.
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

// 1 / a for a of 1 to infinity, with a relative error of 1e-7 for T = float, and of 6.2e-5 for bf16.
template <class T, class V>
PEAK_INLINE V Reciprocal(const V& a) {
  const V y = Reciprocal14(a);
  if (!kReciprocal14 || sizeof(T) < 4) return y;
  return Fma(y, Max(Fnma(a, y, Set(1.0f)), Set(-0.5f)), y);  // infinity times 0 is NaN, for which Max takes its second
}

// erf(a) to 1.5 ulp: a + a P(a^2) near 0, 1 - e^Q(|a|) outside. Coefficients: N. Juffa's single-precision minimax fit.
PEAK_INLINE Vec Erf(Vec a) {
  const Vec t = Abs(a), s = a * a;
  Vec far = Fma(Set(-1.72853470e-5f), t, Set(3.83197126e-4f));
  far = Fma(far, s, Fma(Set(-3.88396438e-3f), t, Set(2.42546219e-2f)));
  far = Fma(far, t, Set(-1.06777877e-1f));
  far = Fma(far, t, Set(-6.34846687e-1f));
  far = Fma(far, t, Set(-1.28717512e-1f));
  // Past |a| = 6 the polynomial means nothing; e^-18 is below half an ulp under 1, so the result is exactly 1 there.
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

// out[i] = sum over kParts of partial[part][Place<X>(i)], in order: the second stage of a reduction over rows of X.
template <class T, class X>
void AddParts(float* partial, int64_t stride, int64_t width, void* out) {
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec sum = Set(0.0f);
    for (int64_t part = 0; part < kParts; ++part) sum = sum + Load(partial + part * stride + i, width - i);
    Store(partial + i, sum, width - i);
  }
  T* to = static_cast<T*>(out);
  int64_t i = 0;
  if (sizeof(T) == sizeof(X)) {
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) StoreTwo(to + i, LoadTwo(partial + i));
  }
  for (; i < width; ++i) Store(to + i, Load(partial + Place<X>(i, width), 1), 1);
}
