// Every function of simd/simd.h, on each instruction set, equals double precision or its definition.
#include "buffer.h"
#include "base/isa.h"

#ifndef PEAK_ISA
namespace peak::test {
namespace {

enum class Unary { kExp, kErf, kExp2, kExp2Of8Bits, kReciprocal, kReciprocalOf8Bits, kRound, kSqrt, kAbs };
enum class Binary { kAdd, kSubtract, kMultiply, kDivide, kMax, kMin, kCopySign, kScale };

constexpr int kMost = kLanesOfWidestSet;

}  // namespace
}  // namespace peak::test
#endif

#define PEAK_THIS_FILE "test_simd.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

using test::Binary;
using test::Unary;

inline int64_t LaneCount() { return kLanes; }

inline void RunUnary(Unary f, const float* a, float* out) {
  const Vec x = Load(a);
  switch (f) {
    case Unary::kExp: return Store(out, Exp(x));
    case Unary::kErf: return Store(out, Erf(x));
    case Unary::kExp2: return Store(out, Exp2<float>(x));
    case Unary::kExp2Of8Bits: return Store(out, Exp2<bf16>(x));
    case Unary::kReciprocal: return Store(out, Reciprocal<float>(x));
    case Unary::kReciprocalOf8Bits: return Store(out, Reciprocal<bf16>(x));
    case Unary::kRound: return Store(out, Round(x));
    case Unary::kSqrt: return Store(out, Sqrt(x));
    case Unary::kAbs: return Store(out, Abs(x));
  }
}

inline void RunBinary(Binary f, const float* a, const float* b, float* out) {
  const Vec x = Load(a), y = Load(b);
  switch (f) {
    case Binary::kAdd: return Store(out, x + y);
    case Binary::kSubtract: return Store(out, x - y);
    case Binary::kMultiply: return Store(out, x * y);
    case Binary::kDivide: return Store(out, x / y);
    case Binary::kMax: return Store(out, Max(x, y));
    case Binary::kMin: return Store(out, Min(x, y));
    case Binary::kCopySign: return Store(out, CopySign(x, y));
    case Binary::kScale: return Store(out, Scale(x, y));
  }
}

inline void RunFused(const float* a, const float* b, const float* c, float* sum, float* difference, float* larger) {
  Store(sum, Fma(Load(a), Load(b), Load(c)));
  Store(difference, Fnma(Load(a), Load(b), Load(c)));
  Store(larger, Select(Greater(Load(a), Load(b)), Load(c), Set(-7.0f)));
}

template <class T>
void Widened(const T* in, int64_t n, float* lanes) {
  Store(lanes, Load(in, n));
}
template <class T>
void Narrowed(const float* lanes, T* out, int64_t n) {
  Store(out, Load(lanes), n);
}
// 2 x lanes elements, aligned to 64 bytes: stored, streamed, and as floats at the places that a row of T asks for.
template <class T>
void Twos(const T* in, const float* placed, T* stored, T* streamed, float* difference) {
  const Two two = LoadTwo(in);
  StoreTwo(stored, two);
  StreamTwo(streamed, two);
  EndStream();
  StoreTwo(difference, two - LoadTwo(placed));
}
template <class T>
int64_t PlaceOf(int64_t i, int64_t width) {
  return PermutedIndex<T>(i, width);
}
inline float LaneSum(const float* in) { return Sum(Load(in)); }
inline float LaneMax(const float* in) { return MaxOf(Load(in)); }

inline void TransposeSquare(float* square) {
  Vec rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = Load(square + i * kLanes);
  Transpose(rows);
  for (int i = 0; i < kLanes; ++i) Store(square + i * kLanes, rows[i]);
}

inline void PairsOf(const float* even, const float* odd, bf16* out) {
  StorePairs(out, PackPairs(Load(even), Load(odd)));
}
inline void Split(const float* in, bf16* upper, int16_t* lower, float* joined, int64_t n) {
  StoreSplit(upper, lower, Load(in), n);
  Store(joined, LoadSplit(upper, lower, n));
}
inline void RepeatPair(const bf16* pair, bf16* out) { StorePairs(out, SetPair(pair)); }
inline void PairProducts(const float* acc, const bf16* a, const bf16* b, float* out) {
  Store(out, DotPairs(Load(acc), LoadPairs(a), LoadPairs(b)));
}

inline int QuadProducts(const uint8_t* a, const int8_t* b, int32_t* out) {
  const Ints sums = DotQuads(DotQuads(SetInts(5), LoadQuads(a), LoadQuads(b)), LoadQuads(a), SetQuad(b));
  std::memcpy(out, &sums, sizeof(sums));
  return kQuadZero;
}
inline void IntsAsFloats(const int32_t* in, float* out) {
  Ints ints;
  std::memcpy(&ints, in, sizeof(ints));
  Store(out, ToFloats(ints));
}
inline void Nibbles(const uint8_t* table, const uint8_t* in, uint8_t* lower, uint8_t* upper) {
  StoreQuads(lower, LookUp(LoadTable(table), LowerNibbles(LoadQuads(in))));
  StoreQuads(upper, LookUp(LoadTable(table), UpperNibbles(LoadQuads(in))));
}
inline void FloatsToBytes(const float* in, int8_t* out) { StoreBytes(out, Load(in)); }
// `out` twice as long as a vector.
template <class T>
inline void BytesInOrder(const int8_t* in, T* out) {
  StoreInOrder(out, LoadBytes(in), LoadBytes(in + kLanes));
}

#else

namespace peak::test {
namespace {

int64_t Lanes() { return PEAK_PICK(LaneCount)(); }
bool HasFma() { return std::strcmp(ActiveIsa(), "scalar") != 0; }
bool FlushesBf16() { return std::strcmp(ActiveIsa(), "avx512bf16") == 0; }

double Inverse(double x) { return 1.0 / x; }

// The distance between neighbouring floats at x.
double Ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(std::fabs(x)), -126) - 23); }

// f over `values`, a vector at a time; the last one may overlap the one before.
void ExpectWithin(const char* name, Unary f, double (*truth)(double), const std::vector<float>& values, double ulps) {
  const int64_t lanes = Lanes();
  float out[kMost];
  for (size_t i = 0; i + lanes <= values.size(); i += lanes) {
    PEAK_PICK(RunUnary)(f, &values[i], out);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double x = values[i + lane], want = truth(x), rounded = static_cast<float>(want), got = out[lane];
      bool good = std::isnan(want) ? std::isnan(got) : got == rounded;
      if (!good && std::isfinite(want)) good = std::fabs(got - want) <= (want == 0.0 ? 0.0 : ulps * Ulp(want));
      if (!Check(good, "%s %s(%.9g) is %.9g, expected %.9g", ActiveIsa(), name, x, got, want)) return;
    }
  }
}

std::vector<float> Samples(double low, double high, int count) {
  std::vector<float> values;
  for (const double special : kSpecials) values.push_back(static_cast<float>(special));
  Random random(1);
  for (int i = 0; i < count; ++i) values.push_back(static_cast<float>(low + (high - low) * random.Uniform()));
  while (values.size() % kMost != 0) values.push_back(0.0f);
  return values;
}

PEAK_TEST(simd_exp_and_erf) {
  // To a little past where the results are 0, infinite, or +-1. Errors as simd.h states them.
  ExpectWithin("exp", Unary::kExp, std::exp, Samples(-87.0, 89.0, 200000), HasFma() ? 1.5 : 2.0);
  ExpectWithin("exp", Unary::kExp, std::exp, Samples(-105.0, -87.0, 50000), 2.0);
  ExpectWithin("erf", Unary::kErf, std::erf, Samples(-7.0, 7.0, 200000), 1.5);
  ExpectWithin("erf", Unary::kErf, std::erf, Samples(-1e-3, 1e-3, 50000), 1.5);
}

PEAK_TEST(simd_approximations) {
  // Relative errors as simd.h states them, in ulps of at least 2^-24.
  constexpr double kUlps = 0x1p24;
  ExpectWithin("exp2", Unary::kExp2, std::exp2, Samples(-126.0, 129.0, 50000), 2e-7 * kUlps);
  ExpectWithin("exp2", Unary::kExp2Of8Bits, std::exp2, Samples(-126.0, 129.0, 50000), 4e-6 * kUlps);
  ExpectWithin("exp2", Unary::kExp2, std::exp2, Samples(-152.0, -126.0, 5000), 2.0);
  std::vector<float> large = {1.0f, 3e38f, static_cast<float>(kInf), static_cast<float>(kNan)};
  for (const float x : Samples(0.0, 120.0, 50000)) large.push_back(x > 0.0f && x < 120.0f ? std::exp2(x) : 1.0f);
  ExpectWithin("1 /", Unary::kReciprocal, Inverse, large, 1e-7 * kUlps);
  ExpectWithin("1 /", Unary::kReciprocalOf8Bits, Inverse, large, 6.2e-5 * kUlps);
}

PEAK_TEST(simd_twos) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    const int64_t width = 2 * Lanes();
    alignas(64) T in[2 * kMost], stored[2 * kMost], streamed[2 * kMost];
    float placed[2 * kMost], difference[2 * kMost];
    for (int64_t i = 0; i < width; ++i) {
      in[i] = Narrow<T>(static_cast<double>(i));
      placed[PEAK_PICK(PlaceOf<T>)(i, width)] = static_cast<float>(i);
    }
    PEAK_PICK(Twos<T>)(in, placed, stored, streamed, difference);
    for (int64_t i = 0; i < width; ++i) {
      Check(Widen(stored[i]) == i && Widen(streamed[i]) == i && difference[i] == 0.0f,
            "%s %s element %d of two vectors", ActiveIsa(), kName<T>, static_cast<int>(i));
      Check(PEAK_PICK(PlaceOf<T>)(width + i, width + i + 1) == width + i, "%s a ragged end is in order", ActiveIsa());
    }
  });
}

PEAK_TEST(simd_unary) {
  std::vector<float> values = Samples(-9.0, 9.0, 1000);
  for (int i = -20; i < 20; ++i) values.push_back(i + 0.5f);  // ties go to even
  while (values.size() % kMost != 0) values.push_back(8388607.5f);
  ExpectWithin("round", Unary::kRound, std::nearbyint, values, 0.0);
  ExpectWithin("sqrt", Unary::kSqrt, std::sqrt, values, 0.5);
  ExpectWithin("abs", Unary::kAbs, std::fabs, values, 0.0);
}

PEAK_TEST(simd_binary) {
  // Float has the exact result of these or its rounding; Max and Min give b where either is NaN.
  constexpr struct {
    const char* name;
    Binary code;
    float (*truth)(float, float);
  } kOps[] = {{"+", Binary::kAdd, [](float a, float b) { return a + b; }},
              {"-", Binary::kSubtract, [](float a, float b) { return a - b; }},
              {"*", Binary::kMultiply, [](float a, float b) { return a * b; }},
              {"/", Binary::kDivide, [](float a, float b) { return a / b; }},
              {"max", Binary::kMax, [](float a, float b) { return a > b ? a : b; }},
              {"min", Binary::kMin, [](float a, float b) { return a < b ? a : b; }},
              {"copysign", Binary::kCopySign, [](float a, float b) { return std::copysign(a, b); }}};
  const std::vector<float> values = Samples(-3.0, 3.0, 40);
  float a[kMost], b[kMost], out[kMost];
  for (const auto& op : kOps) {
    for (size_t shift = 0; shift < values.size(); ++shift) {
      for (size_t i = 0; i < values.size(); i += Lanes()) {
        for (int64_t lane = 0; lane < Lanes(); ++lane) {
          a[lane] = values[i + lane];
          b[lane] = values[(i + lane + shift) % values.size()];
        }
        PEAK_PICK(RunBinary)(op.code, a, b, out);
        for (int64_t lane = 0; lane < Lanes(); ++lane) {
          const float want = op.truth(a[lane], b[lane]);
          const bool good = std::isnan(want) ? std::isnan(out[lane]) : std::memcmp(&want, &out[lane], 4) == 0;
          if (!Check(good, "%s: %g %s %g is %g, expected %g", ActiveIsa(), a[lane], op.name, b[lane], out[lane],
                     want)) {
            return;
          }
        }
      }
    }
  }
}

PEAK_TEST(simd_scale) {
  float a[kMost], n[kMost], out[kMost];
  for (int power = -150; power <= 128; ++power) {
    for (int lane = 0; lane < kMost; ++lane) {
      a[lane] = 0.75f + lane / 32.0f;
      n[lane] = static_cast<float>(power);
    }
    PEAK_PICK(RunBinary)(Binary::kScale, a, n, out);
    for (int64_t lane = 0; lane < Lanes(); ++lane) {
      const double want = std::ldexp(a[lane], power);
      Near("scale", power, out[lane], {want, 0.0});
    }
  }
}

PEAK_TEST(simd_fused) {
  Random random(1);
  float a[kMost], b[kMost], c[kMost], sum[kMost], difference[kMost], larger[kMost];
  for (int round = 0; round < 200; ++round) {
    for (int lane = 0; lane < kMost; ++lane) {
      a[lane] = static_cast<float>(random.Normal());
      b[lane] = lane % 5 == 0 ? a[lane] : static_cast<float>(random.Normal());
      c[lane] = static_cast<float>(random.Normal());
    }
    PEAK_PICK(RunFused)(a, b, c, sum, difference, larger);
    for (int64_t lane = 0; lane < Lanes(); ++lane) {
      const double product = static_cast<double>(a[lane]) * b[lane], slack = HasFma() ? 0.0 : std::fabs(product);
      Near("fma", lane, sum[lane], {c[lane] + product, slack});
      Near("fnma", lane, difference[lane], {c[lane] - product, slack});
      Check(larger[lane] == (a[lane] > b[lane] ? c[lane] : -7.0f), "%s select in lane %d", ActiveIsa(),
            static_cast<int>(lane));
    }
  }
}

PEAK_TEST(simd_parts) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (int64_t n = 1; n <= Lanes(); ++n) {
      for (int placement = 0; placement < kPlacements; ++placement) {
        SetCase("%s %s part of %lld placement %d", ActiveIsa(), kName<T>, static_cast<long long>(n), placement);
        Random random(n);
        Placer place(placement);
        auto in = place.In<T>(n), out = place.Out<T>(n);
        in.FillNormal(random);
        float lanes[kMost];
        PEAK_PICK(Widened<T>)(in.data(), n, lanes);
        for (int64_t lane = 0; lane < Lanes(); ++lane) {
          Check(lanes[lane] == (lane < n ? in.At(lane) : 0.0), "lane %d", static_cast<int>(lane));
        }
        PEAK_PICK(Narrowed<T>)(lanes, out.data(), n);
        out.Expect("out", [&](int64_t i) { return Want{in.At(i), 0.0}; });
      }
    }
  });
}

uint16_t StoredAsBf16(float x) {
  float lanes[kMost];
  bf16 out[kMost];
  for (float& lane : lanes) lane = x;
  PEAK_PICK(Narrowed<bf16>)(lanes, out, Lanes());
  for (int64_t lane = 1; lane < Lanes(); ++lane) {
    if (out[lane].bits != out[0].bits) return 0xdead;
  }
  return out[0].bits;
}

PEAK_TEST(simd_bf16) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    bf16 in[kMost];
    float lanes[kMost];
    for (bf16& half : in) half.bits = static_cast<uint16_t>(bits);
    PEAK_PICK(Widened<bf16>)(in, Lanes(), lanes);
    const uint32_t wide = bits << 16;
    Check(std::memcmp(&lanes[Lanes() - 1], &wide, 4) == 0, "%s widened %04x", ActiveIsa(), bits);
    // The float itself, its neighbours, the tie above it and the tie's neighbours.
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const uint32_t pattern = wide | low;
      float x;
      std::memcpy(&x, &pattern, 4);
      const uint16_t want = Narrow<bf16>(x).bits, got = StoredAsBf16(x);
      const bool flushed = FlushesBf16() && std::fabs(x) < 0x1p-126 && got == (pattern >> 31 << 15);
      const bool both_nan = std::isnan(x) && std::isnan(Widen(bf16{got}));
      if (!Check(got == want || flushed || both_nan, "%s rounded %08x to %04x, expected %04x", ActiveIsa(), pattern,
                 got, want)) {
        return;
      }
    }
  }
}

// A float as its nearest bf16 and the rest: nothing is lost, whatever the float.
PEAK_TEST(simd_split) {
  std::vector<float> values = Samples(-3.0, 3.0, 1000);
  for (const uint32_t bits : {0x3f807fffu, 0x3f808000u, 0x3f808001u, 0xbf80ffffu, 0x00008000u, 0x807fffffu}) {
    float x;
    std::memcpy(&x, &bits, 4);
    for (int i = 0; i < kMost; ++i) values.push_back(x);
  }
  for (size_t at = 0; at + Lanes() <= values.size(); at += Lanes()) {
    for (const int64_t n : {Lanes(), (Lanes() + 1) / 2}) {
      SetCase("%s split of %d floats from %g on", ActiveIsa(), static_cast<int>(n), values[at]);
      Placer place(3);  // up to the forbidden page
      auto upper = place.Out<bf16>(n);
      Buffer<int16_t> lower(Role::kOutput, n, 3);
      float joined[kMost];
      PEAK_PICK(Split)(&values[at], upper.data(), lower.data(), joined, n);
      for (int64_t i = 0; i < n; ++i) {
        const float x = values[at + i];
        Check(std::isnan(x) ? std::isnan(joined[i]) : std::memcmp(&x, &joined[i], 4) == 0, "got %.9g back of %.9g",
              joined[i], x);
        const double half_ulp = std::ldexp(1.0, std::max(std::ilogb(x == 0.0f ? 1.0f : x), -126) - 8);
        if (std::isfinite(x) && std::fabs(x) < 3e38f) {
          Check(std::fabs(upper.At(i) - x) <= half_ulp, "%.9g is not the nearest to %.9g", upper.At(i), x);
        }
      }
    }
  }
}

PEAK_TEST(simd_across_lanes) {
  const int64_t lanes = Lanes();
  float in[kMost], square[kMost * kMost];
  for (int64_t most = 0; most < lanes; ++most) {
    double sum = 0.0, magnitude = 0.0;
    for (int64_t i = 0; i < lanes; ++i) {
      in[i] = static_cast<float>(i == most ? 5.0 : -0.1 * (i + 1));
      sum += in[i];
      magnitude += std::fabs(in[i]);
    }
    Near("sum", most, PEAK_PICK(LaneSum)(in), {sum, 4.0 * magnitude});
    Check(PEAK_PICK(LaneMax)(in) == 5.0f, "%s max in lane %d", ActiveIsa(), static_cast<int>(most));
  }
  for (int64_t i = 0; i < lanes * lanes; ++i) square[i] = static_cast<float>(i);
  PEAK_PICK(TransposeSquare)(square);
  for (int64_t i = 0; i < lanes * lanes; ++i) {
    Check(square[i] == static_cast<float>(i % lanes * lanes + i / lanes), "%s transposed element %d", ActiveIsa(),
          static_cast<int>(i));
  }
}

PEAK_TEST(simd_pairs) {
  const int64_t lanes = Lanes();
  Random random(1);
  for (int round = 0; round < 200; ++round) {
    float even[kMost], odd[kMost], acc[kMost], out[kMost];
    bf16 a[2 * kMost], b[2 * kMost], repeated[2 * kMost];
    for (int i = 0; i < kMost; ++i) {
      even[i] = static_cast<float>(random.Normal());
      odd[i] = static_cast<float>(random.Normal());
      acc[i] = static_cast<float>(random.Normal());
    }
    for (bf16& half : b) half = Narrow<bf16>(random.Normal());
    PEAK_PICK(PairsOf)(even, odd, a);
    PEAK_PICK(RepeatPair)(b + 2, repeated);
    PEAK_PICK(PairProducts)(acc, a, b, out);
    for (int64_t i = 0; i < lanes; ++i) {
      Check(a[2 * i].bits == Narrow<bf16>(even[i]).bits && a[2 * i + 1].bits == Narrow<bf16>(odd[i]).bits, "%s pack",
            ActiveIsa());
      Check(std::memcmp(repeated + 2 * i, b + 2, 4) == 0, "%s set pair", ActiveIsa());
      const double first = Widen(a[2 * i]) * Widen(b[2 * i]), second = Widen(a[2 * i + 1]) * Widen(b[2 * i + 1]);
      Near("dot of pairs", i, out[i],
           {acc[i] + first + second, 2.0 * (std::fabs(acc[i]) + std::fabs(first) + std::fabs(second))});
    }
  }
}

// Random bytes; then the largest sums of either sign, which 16 bits do not hold.
PEAK_TEST(simd_quads) {
  uint8_t a[4 * kMost];
  int8_t b[4 * kMost];
  int32_t out[kMost] = {};
  Random random(1);
  const int64_t lanes = Lanes();
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < 4 * kMost; ++i) {
      a[i] = static_cast<uint8_t>(round < 16 ? random.Bits() : round % 2 * 255);
      b[i] = static_cast<int8_t>(round < 16 ? random.Below(255) - 127 : round % 4 < 2 ? 127 : -127);
    }
    const int zero = PEAK_PICK(QuadProducts)(a, b, out);
    for (int i = 0; i < lanes; ++i) {
      int want = 5;
      for (int j = 0; j < 4; ++j) want += (a[4 * i + j] - zero) * (b[4 * i + j] + b[j]);
      Check(out[i] == want, "%s quad %d is %d, expected %d", ActiveIsa(), i, out[i], want);
    }
  }
}

PEAK_TEST(simd_bytes) {
  uint8_t table[16], in[4 * kMost], lower[4 * kMost], upper[4 * kMost];
  int32_t ints[kMost];
  float floats[kMost];
  int8_t bytes[kMost];
  const int64_t lanes = Lanes();
  for (int first = 0; first < 256; first += 4) {
    for (int i = 0; i < 16; ++i) table[i] = static_cast<uint8_t>(251 * i + 3);
    for (int i = 0; i < 4 * kMost; ++i) in[i] = static_cast<uint8_t>(first + 37 * i);
    PEAK_PICK(Nibbles)(table, in, lower, upper);
    for (int i = 0; i < 4 * lanes; ++i) {
      Check(lower[i] == table[in[i] & 15] && upper[i] == table[in[i] >> 4], "%s nibbles of %d", ActiveIsa(), in[i]);
    }
    for (int i = 0; i < kMost; ++i) ints[i] = first - 128 + (first == 252 ? i % 4 : i - 3);
    PEAK_PICK(IntsAsFloats)(ints, floats);
    for (int i = 0; i < lanes; ++i) Check(floats[i] == ints[i], "%s %d as a float", ActiveIsa(), ints[i]);
    for (int i = 0; i < kMost; ++i) floats[i] = static_cast<float>(first + i % 4 - 128);
    PEAK_PICK(FloatsToBytes)(floats, bytes);
    for (int i = 0; i < lanes; ++i) Check(bytes[i] == floats[i], "%s %g as a byte", ActiveIsa(), floats[i]);
    int8_t both[2 * kMost];
    float wide[2 * kMost];
    bf16 halves[2 * kMost];
    for (int i = 0; i < 2 * lanes; ++i) both[i] = static_cast<int8_t>(first - 128 + i % 4);
    PEAK_PICK(BytesInOrder<float>)(both, wide);
    PEAK_PICK(BytesInOrder<bf16>)(both, halves);
    for (int i = 0; i < 2 * lanes; ++i) {
      Check(wide[i] == both[i] && Widen(halves[i]) == both[i], "%s %d widened", ActiveIsa(), both[i]);
    }
  }
}

}  // namespace
}  // namespace peak::test

#endif  // PEAK_ISA
