// Vec on NEON. simd.h describes the functions and includes this file.

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
PEAK_INLINE Vec Load(const f16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
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
PEAK_INLINE void Stream(float* p, Vec a) { Store(p, a); }  // aarch64 has no streaming store of one register
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
PEAK_INLINE Vec LoadBytes(const int8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, 4);
  const int16x4_t halves = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes))));
  return {vcvtq_f32_s32(vmovl_s16(halves))};
}
