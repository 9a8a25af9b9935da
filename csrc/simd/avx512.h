// Vec on AVX-512 (F, BW, DQ, VL), with VNNI on avx512vnni, with VNNI and BF16 on avx512bf16. simd.h describes the
// functions and includes this file.

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
PEAK_INLINE Vec Load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
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

PEAK_INLINE Vec LoadHalves(const float* low, const float* high) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1)};
}
PEAK_INLINE void StoreHalves(float* low, float* high, Vec a) {
  _mm256_storeu_ps(low, _mm512_castps512_ps256(a.v));
  _mm256_storeu_ps(high, _mm512_extractf32x8_ps(a.v, 1));
}
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
  // Element 2i comes from i, element 2i + 1 from 16 + i.
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
// The same steps as in avx2.h, with four 128-bit lanes.
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
template <class T>
PEAK_INLINE __m128i LoadBlock(const T* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
// Lane l of 128 bits in x[i] is loaded from row 4l + i, which saves half of the shuffles of Transpose.
template <class T>
PEAK_INLINE void LoadTransposed(const T* p, int64_t stride, Vec* rows) {
#pragma GCC unroll 4
  for (int64_t c = 0; c < 4; ++c, p += 16 / sizeof(T)) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      x[i] = _mm512_castsi128_si512(LoadBlock(p + i * stride));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00f0, LoadBlock(p + (4 + i) * stride));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0f00, LoadBlock(p + (8 + i) * stride));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xf000, LoadBlock(p + (12 + i) * stride));
    }
    const __m512i lo0 = _mm512_unpacklo_epi32(x[0], x[1]), hi0 = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i lo1 = _mm512_unpacklo_epi32(x[2], x[3]), hi1 = _mm512_unpackhi_epi32(x[2], x[3]);
    rows[4 * c].v = _mm512_castsi512_ps(_mm512_unpacklo_epi64(lo0, lo1));
    rows[4 * c + 1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi64(lo0, lo1));
    rows[4 * c + 2].v = _mm512_castsi512_ps(_mm512_unpacklo_epi64(hi0, hi1));
    rows[4 * c + 3].v = _mm512_castsi512_ps(_mm512_unpackhi_epi64(hi0, hi1));
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

constexpr int kQuadZero = PEAK_ISA == PEAK_AVX512 ? 128 : 0;
struct Quads { __m512i v; };
using IntLanes = int __attribute__((vector_size(64)));  // with __m512i GCC keeps a second copy in the loops
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
#if PEAK_ISA != PEAK_AVX512
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {
  return {reinterpret_cast<IntLanes>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc.v), a.v, b.v))};
}
#else
PEAK_INLINE Ints DotQuads(Ints acc, Quads a, Quads b) {  // avx2.h explains the signs
  const __m512i w = _mm512_xor_si512(a.v, _mm512_set1_epi8(-128));
  const __m512i signed_b = _mm512_mask_sub_epi8(b.v, _mm512_movepi8_mask(w), _mm512_setzero_si512(), b.v);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_b);
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
PEAK_INLINE Vec LoadBytes(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
