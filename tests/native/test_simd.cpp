// Loads, stores, conversions and integer operations of simd/simd.h, on each instruction set, equal their definition.
#include "buffer.h"
#include "base/isa.h"

#ifndef PEAK_ISA
namespace peak::test {
namespace {

constexpr int kMost = kLanesOfWidestSet;

}  // namespace
}  // namespace peak::test
#endif

#define PEAK_THIS_FILE "test_simd.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

inline int64_t LaneCount() { return kLanes; }

template <class T>
void Widened(const T* in, int64_t n, float* lanes) {
  Store(lanes, Load(in, n));
}
template <class T>
void Narrowed(const float* lanes, T* out, int64_t n) {
  Store(out, Load(lanes), n);
}
// Stores and streams 2 * kLanes elements, aligned to 64 bytes. `permuted` holds the same values as floats, in the order
// of PermutedIndex, so that `difference` is 0.
template <class T>
void Twos(const T* in, const float* permuted, T* stored, T* streamed, float* difference) {
  const Two two = LoadTwo(in);
  StoreTwo(stored, two);
  StreamTwo(streamed, two);
  EndStream();
  StoreTwo(difference, two - LoadTwo(permuted));
}
template <class T>
int64_t PermutedIndexOf(int64_t i, int64_t width) {
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

template <class T>
void TransposedWords(const T* p, int64_t stride, void* out) {
  Vec rows[kLanes];
  LoadTransposed(p, stride, rows);
  std::memcpy(out, rows, sizeof(rows));
}
// The words of one row of n elements.
template <class T>
void WordsOf(const T* p, int64_t n, void* out) {
  const Vec words = LoadWords(p, n);
  std::memcpy(out, &words, sizeof(words));
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
// `out` has 2 * kLanes elements.
template <class T>
inline void BytesInOrder(const int8_t* in, T* out) {
  StoreInOrder(out, LoadBytes(in), LoadBytes(in + kLanes));
}

#else

namespace peak::test {
namespace {

int64_t Lanes() { return PEAK_PICK(LaneCount)(); }
bool FlushesBf16() { return std::strcmp(ActiveIsa(), "avx512bf16") == 0; }

PEAK_TEST(simd_two_vectors_match_permuted_index) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    const int64_t width = 2 * Lanes();
    alignas(64) T in[2 * kMost], stored[2 * kMost], streamed[2 * kMost];
    float permuted[2 * kMost], difference[2 * kMost];
    for (int64_t i = 0; i < width; ++i) {
      in[i] = Narrow<T>(static_cast<double>(i));
      permuted[PEAK_PICK(PermutedIndexOf<T>)(i, width)] = static_cast<float>(i);
    }
    PEAK_PICK(Twos<T>)(in, permuted, stored, streamed, difference);
    for (int64_t i = 0; i < width; ++i) {
      Check(Widen(stored[i]) == i && Widen(streamed[i]) == i && difference[i] == 0.0f,
            "%s %s element %d of LoadTwo, StoreTwo or StreamTwo is wrong", ActiveIsa(), kName<T>, static_cast<int>(i));
      Check(PEAK_PICK(PermutedIndexOf<T>)(width + i, width + i + 1) == width + i,
            "%s the partial vector at the end of a row is permuted", ActiveIsa());
    }
  });
}

PEAK_TEST(simd_partial_loads_and_stores_stay_in_bounds) {
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
          Check(lanes[lane] == (lane < n ? in.At(lane) : 0.0), "Load is wrong in lane %d", static_cast<int>(lane));
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

PEAK_TEST(simd_every_bf16_converts_and_rounds_to_nearest_even) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    bf16 in[kMost];
    float lanes[kMost];
    for (bf16& half : in) half.bits = static_cast<uint16_t>(bits);
    PEAK_PICK(Widened<bf16>)(in, Lanes(), lanes);
    const uint32_t wide = bits << 16;
    Check(std::memcmp(&lanes[Lanes() - 1], &wide, 4) == 0, "%s Load is wrong for the bf16 %04x", ActiveIsa(), bits);
    // The lower halves: 0, the smallest, the values next to a tie and the tie itself, and the largest.
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

// StoreSplit and LoadSplit lose no bit of any float, and the upper half is the nearest bf16.
PEAK_TEST(simd_split_loses_no_bit) {
  std::vector<float> values = Samples(-3.0, 3.0, 1000);
  for (const uint32_t bits : {0x3f807fffu, 0x3f808000u, 0x3f808001u, 0xbf80ffffu, 0x00008000u, 0x807fffffu}) {
    float x;
    std::memcpy(&x, &bits, 4);
    for (int i = 0; i < kMost; ++i) values.push_back(x);
  }
  for (size_t at = 0; at + Lanes() <= values.size(); at += Lanes()) {
    for (const int64_t n : {Lanes(), (Lanes() + 1) / 2}) {
      SetCase("%s split of %d floats from %g on", ActiveIsa(), static_cast<int>(n), values[at]);
      Placer place(3);  // ends at a page without access
      auto upper = place.Out<bf16>(n);
      Buffer<int16_t> lower(Role::kOutput, n, 3);
      float joined[kMost];
      PEAK_PICK(Split)(&values[at], upper.data(), lower.data(), joined, n);
      for (int64_t i = 0; i < n; ++i) {
        const float x = values[at + i];
        Check(std::isnan(x) ? std::isnan(joined[i]) : std::memcmp(&x, &joined[i], 4) == 0,
              "LoadSplit returned %.9g, expected %.9g", joined[i], x);
        const double half_ulp = std::ldexp(1.0, std::max(std::ilogb(x == 0.0f ? 1.0f : x), -126) - 8);
        if (std::isfinite(x) && std::fabs(x) < 3e38f) {
          Check(std::fabs(upper.At(i) - x) <= half_ulp, "%.9g is not the nearest to %.9g", upper.At(i), x);
        }
      }
    }
  }
}

PEAK_TEST(simd_sum_max_and_transpose_equal_their_definition) {
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
    Check(PEAK_PICK(LaneMax)(in) == 5.0f, "%s MaxOf misses the maximum in lane %d", ActiveIsa(),
          static_cast<int>(most));
  }
  for (int64_t i = 0; i < lanes * lanes; ++i) square[i] = static_cast<float>(i);
  PEAK_PICK(TransposeSquare)(square);
  for (int64_t i = 0; i < lanes * lanes; ++i) {
    Check(square[i] == static_cast<float>(i % lanes * lanes + i / lanes), "%s element %d of Transpose is wrong",
          ActiveIsa(), static_cast<int>(i));
  }
}

PEAK_TEST(simd_words_and_their_transpose_equal_their_definition) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    const int64_t lanes = Lanes(), width = lanes * 4 / sizeof(T), stride = width + 3;
    Random random(1);
    Placer place(3);  // ends at a page without access
    auto in = place.In<T>((lanes - 1) * stride + width);
    in.FillNormal(random);
    uint32_t got[kMost * kMost];
    PEAK_PICK(TransposedWords<T>)(in.data(), stride, got);
    for (int64_t row = 0; row < lanes; ++row) {
      uint32_t words[kMost];
      std::memcpy(words, in.data() + row * stride, width * sizeof(T));
      for (int64_t i = 0; i < lanes; ++i) {
        Check(got[i * lanes + row] == words[i], "%s %s word %d of row %d of LoadTransposed is wrong", ActiveIsa(),
              kName<T>, static_cast<int>(i), static_cast<int>(row));
      }
    }
    for (int64_t n = 1; n <= width; ++n) {
      T part[2 * kMost] = {};
      const T* const end = in.data() + (lanes - 1) * stride + width;
      std::memcpy(part, end - n, n * sizeof(T));
      PEAK_PICK(WordsOf<T>)(end - n, n, got);
      Check(std::memcmp(got, part, width * sizeof(T)) == 0, "%s %s LoadWords of %d elements is wrong", ActiveIsa(),
            kName<T>, static_cast<int>(n));
    }
  });
}

PEAK_TEST(simd_pairs_equal_their_definition) {
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
      Check(a[2 * i].bits == Narrow<bf16>(even[i]).bits && a[2 * i + 1].bits == Narrow<bf16>(odd[i]).bits,
            "%s PackPairs is wrong", ActiveIsa());
      Check(std::memcmp(repeated + 2 * i, b + 2, 4) == 0, "%s SetPair is wrong", ActiveIsa());
      const double first = Widen(a[2 * i]) * Widen(b[2 * i]), second = Widen(a[2 * i + 1]) * Widen(b[2 * i + 1]);
      Near("dot of pairs", i, out[i],
           {acc[i] + first + second, 2.0 * (std::fabs(acc[i]) + std::fabs(first) + std::fabs(second))});
    }
  }
}

// Random bytes, then the largest positive and negative sums, which do not fit in 16 bits.
PEAK_TEST(simd_dot_of_quads_is_exact) {
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

PEAK_TEST(simd_bytes_and_nibbles_convert_exactly) {
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
      Check(lower[i] == table[in[i] & 15] && upper[i] == table[in[i] >> 4],
            "%s the nibbles of %d are wrong", ActiveIsa(), in[i]);
    }
    for (int i = 0; i < kMost; ++i) ints[i] = first - 128 + (first == 252 ? i % 4 : i - 3);
    PEAK_PICK(IntsAsFloats)(ints, floats);
    for (int i = 0; i < lanes; ++i) Check(floats[i] == ints[i], "%s ToFloats(%d) is wrong", ActiveIsa(), ints[i]);
    for (int i = 0; i < kMost; ++i) floats[i] = static_cast<float>(first + i % 4 - 128);
    PEAK_PICK(FloatsToBytes)(floats, bytes);
    for (int i = 0; i < lanes; ++i) Check(bytes[i] == floats[i], "%s StoreBytes(%g) is wrong", ActiveIsa(), floats[i]);
    int8_t both[2 * kMost];
    float wide[2 * kMost];
    bf16 halves[2 * kMost];
    for (int i = 0; i < 2 * lanes; ++i) both[i] = static_cast<int8_t>(first - 128 + i % 4);
    PEAK_PICK(BytesInOrder<float>)(both, wide);
    PEAK_PICK(BytesInOrder<bf16>)(both, halves);
    for (int i = 0; i < 2 * lanes; ++i) {
      Check(wide[i] == both[i] && Widen(halves[i]) == both[i],
            "%s LoadBytes or StoreInOrder of %d is wrong", ActiveIsa(), both[i]);
    }
  }
}

}  // namespace
}  // namespace peak::test

#endif  // PEAK_ISA
