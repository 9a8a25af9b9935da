// The test harness. Tests register themselves, and a failed check prints its case. main.cpp runs all tests once for
// each instruction set.
#ifndef PEAK_TESTS_NATIVE_CHECK_H_
#define PEAK_TESTS_NATIVE_CHECK_H_

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/types.h"

namespace peak::test {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

#define PEAK_TEST(name)                                                                                       \
  static void name();                                                                                         \
  [[maybe_unused]] static const bool name##_registered = (::peak::test::Tests().push_back({#name, name}), true); \
  static void name()

// A typical call of a kernel on `threads` threads. It fills the inputs from a fixed seed and returns the bytes of the
// outputs. test_threads.cpp checks that the bytes are the same for any number of threads, and test_memory.cpp that a
// failed allocation does not end the process.
struct Kernel {
  const char* name;
  std::vector<char> (*run)(int threads);
};
inline std::vector<Kernel>& Kernels() {
  static std::vector<Kernel> kernels;
  return kernels;
}

#define PEAK_KERNEL(name)                                                                                           \
  static std::vector<char> name(int threads);                                                                       \
  [[maybe_unused]] static const bool name##_registered = (::peak::test::Kernels().push_back({#name, name}), true); \
  static std::vector<char> name(int threads)

// ------------------------------------------------------------------------------------------------------- failures
struct Tally {
  int64_t checks = 0, failures = 0;
};
inline Tally& Count() {
  static Tally tally;
  return tally;
}

// Describes the case that runs now. A failed check prints it first.
inline char (&CurrentCase())[256] {
  static char text[256];
  return text;
}
__attribute__((format(printf, 1, 2))) inline void SetCase(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(CurrentCase(), sizeof(CurrentCase()), format, values);
  va_end(values);
}

constexpr int kShown = 20;  // number of failures that are printed; later ones are only counted

__attribute__((format(printf, 2, 3))) inline bool Check(bool good, const char* format, ...) {
  ++Count().checks;
  if (good) return true;
  if (++Count().failures <= kShown) {
    std::printf("FAIL %s: ", CurrentCase());
    va_list values;
    va_start(values, format);
    std::vprintf(format, values);
    va_end(values);
    std::printf("\n");
  }
  return false;
}

// ---------------------------------------------------------------------------------------------------------- dtypes
template <class T>
constexpr DType kDtype = std::is_same_v<T, float> ? DType::kFloat32 : DType::kBFloat16;
template <class T>
constexpr const char* kName = std::is_same_v<T, float> ? "float32" : "bfloat16";
// The relative error of rounding to T: half a unit in the last place.
template <class T>
constexpr double kUnit = std::is_same_v<T, float> ? 0x1p-24 : 0x1p-8;
// The absolute error near 0: native bf16 instructions flush subnormal numbers, float arithmetic does not.
template <class T>
constexpr double kFloor = std::is_same_v<T, float> ? 0x1p-149 : 0x1p-126;

inline double Widen(float x) { return x; }
inline double Widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T>
T Narrow(double x);
template <>
inline float Narrow<float>(double x) {
  return static_cast<float>(x);
}
// Rounds to nearest even. x is rounded to float first, which is good enough for inputs.
template <>
inline bf16 Narrow<bf16>(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ----------------------------------------------------------------------------------------------------- comparison
// The value of the reference in double, and the error that float32 arithmetic may have, in units of 2^-24: `slack` is
// the sum of the magnitudes of all added terms, each times the number of its roundings.
struct Want {
  double value, slack;
};

template <class T>
bool Near(const char* what, int64_t index, T got_narrow, Want want) {
  const double got = Widen(got_narrow), rounded = Widen(Narrow<T>(want.value));
  bool good;
  if (std::isnan(rounded)) {
    good = std::isnan(got);
  } else if (std::isinf(rounded)) {
    good = got == rounded;
  } else {
    good = std::fabs(got - want.value) <= kUnit<T> * std::fabs(want.value) + 0x1p-24 * want.slack + kFloor<T>;
  }
  return Check(good, "%s[%lld] is %.9g, expected %.9g (slack %.3g)", what, static_cast<long long>(index), got,
               want.value, want.slack);
}

// ---------------------------------------------------------------------------------------------------------- sweeps
constexpr int kLanesOfWidestSet = 16;

// 0 .. 2 * lanes, and larger counts, which run the unrolled loops and end in a partial vector.
inline std::vector<int64_t> Counts(int64_t from = 0) {
  std::vector<int64_t> counts;
  for (int64_t n = from; n <= 2 * kLanesOfWidestSet; ++n) counts.push_back(n);
  counts.insert(counts.end(), {4 * kLanesOfWidestSet + 1, 131, 261});
  return counts;
}

template <class F>
void ForEachDtype(const F& f) {
  f(float{});
  f(bf16{});
}

constexpr int kPlacements = 4;  // of a tensor in memory, see Buffer

// Calls f(element, count, placement) for both dtypes, all counts and all placements.
template <class F>
void ForEachCase(const char* what, int64_t first_count, const F& f) {
  ForEachDtype([&](auto element) {
    for (const int64_t count : Counts(first_count)) {
      for (int placement = 0; placement < kPlacements; ++placement) {
        SetCase("%s %s count %lld placement %d", what, kName<decltype(element)>, static_cast<long long>(count),
                placement);
        f(element, count, placement);
      }
    }
  });
}

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Zeros, subnormals, the smallest normal, the largest numbers, infinities and NaN.
constexpr double kSpecials[] = {0.0,   -0.0, 0x1p-149, -0x1p-140, 0x1p-127, 0x1p-126, -1e-30, 1.0,
                                1e4,   -1e4, 1e18,     -1e18,     3e38,     -3e38,    kInf,   -kInf, kNan};

// A small counter-based generator: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t Bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Bits() % static_cast<uint64_t>(n)); }
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  // Approximately normal: a sum of twelve uniform numbers. A logarithm would differ between libraries.
  double Normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += Uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

// Special values, then `count` uniform ones, then zeros up to a multiple of the widest vector.
inline std::vector<float> Samples(double low, double high, int count) {
  std::vector<float> values;
  for (const double special : kSpecials) values.push_back(static_cast<float>(special));
  Random random(1);
  for (int i = 0; i < count; ++i) values.push_back(static_cast<float>(low + (high - low) * random.Uniform()));
  while (values.size() % kLanesOfWidestSet != 0) values.push_back(0.0f);
  return values;
}

}  // namespace peak::test

#endif  // PEAK_TESTS_NATIVE_CHECK_H_
