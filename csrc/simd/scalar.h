// Vec of one float, in plain C++ for any machine. simd.h describes the functions and includes this file.

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
PEAK_INLINE Vec Load(const f16* p) {
  const uint32_t sign = (p->bits & 0x8000u) << 16, rest = (p->bits & 0x7FFFu) << 13;
  if (rest >= 0x0F800000u) return {FromBits(sign | 0x70000000u | rest)};  // infinity and NaN
  return {FromBits(sign | Bits(FromBits(rest) * 0x1p112f))};  // moves the exponent, also that of subnormals
}
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
// Not std::fma: without the instruction it is a library call that is a hundred times slower.
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
// Values above 127 come from rows that are not finite, whose bytes are not used. Converting them would be undefined.
PEAK_INLINE void StoreBytes(int8_t* p, Vec a) { *p = static_cast<int8_t>(a.v < 127.0f ? a.v : 127.0f); }
PEAK_INLINE Vec LoadBytes(const int8_t* p) { return {static_cast<float>(*p)}; }
