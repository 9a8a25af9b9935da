// Vec on AVX2 with FMA. simd.h describes the functions and includes this file.

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
constexpr bool kNativePairs = false;
struct Vec { __m256 v; };
struct Mask { __m256 v; };
struct Pairs { __m256i v; };

PEAK_INLINE __m256i PartMask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The upper 16 bits of each lane hold the rounded value; the lower 16 bits are undefined.
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
PEAK_INLINE Vec Load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
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

PEAK_INLINE Vec LoadHalves(const float* low, const float* high) { return {_mm256_loadu2_m128(high, low)}; }
PEAK_INLINE void StoreHalves(float* low, float* high, Vec a) { _mm256_storeu2_m128(high, low, a.v); }
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
// Columns 4l + j of rows 4i .. 4i + 3 are gathered in lane l of row 4i + j; then lanes are exchanged.
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
// maddubs multiplies unsigned by signed bytes, and its sums saturate at 16 bits. So b takes the sign of a - 128, and
// |a - 128| is at most 128.
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
PEAK_INLINE Vec LoadBytes(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
