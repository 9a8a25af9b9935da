// The arithmetic of simd/simd.h, on each instruction set, equals double precision or its definition.
#include "buffer.h"
#include "base/isa.h"

#ifndef PEAK_ISA
namespace peak::test {
namespace {

enum class Unary { kExp, kErf, kExp2, kExp2Of8Bits, kReciprocal, kReciprocalOf8Bits, kRound, kSqrt, kAbs, kTanh, kTanhSlope };
enum class Binary { kAdd, kSubtract, kMultiply, kDivide, kMax, kMin, kCopySign, kScale };

constexpr int kMost = kLanesOfWidestSet;

}  // namespace
}  // namespace peak::test
#endif

#define PEAK_THIS_FILE "test_simd_math.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"

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
    case Unary::kTanh: return Store(out, Tanh::Value(x));
    case Unary::kTanhSlope: {
      Vec slope;
      Tanh::ValueAndSlope(x, &slope);
      return Store(out, slope);
    }
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

#else

namespace peak::test {
namespace {

int64_t Lanes() { return PEAK_PICK(LaneCount)(); }
bool HasFma() { return std::strcmp(ActiveIsa(), "scalar") != 0; }

double Inverse(double x) { return 1.0 / x; }
double TanhSlope(double x) { return 1.0 / (std::cosh(x) * std::cosh(x)); }

// The distance between neighboring floats at x.
double Ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(std::fabs(x)), -126) - 23); }

// Checks f on `values`, one vector at a time. `ulps` is the largest error that is allowed.
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

PEAK_TEST(simd_exp_and_erf_have_the_stated_errors) {
  // simd.h states the errors. The ranges reach a little beyond the arguments whose results are 0, infinite or +-1.
  ExpectWithin("exp", Unary::kExp, std::exp, Samples(-87.0, 89.0, 200000), HasFma() ? 1.5 : 2.0);
  ExpectWithin("exp", Unary::kExp, std::exp, Samples(-105.0, -87.0, 50000), 2.0);
  // Masked scores are -inf. Lanes of one Vec with and without a result do not change each other.
  std::vector<float> masked = {-3e38f, static_cast<float>(kInf), -static_cast<float>(kInf), static_cast<float>(kNan)};
  for (const float x : Samples(-209.0, 1.0, 50000)) masked.push_back(x);
  ExpectWithin("exp", Unary::kExp, std::exp, masked, 2.0);
  ExpectWithin("erf", Unary::kErf, std::erf, Samples(-7.0, 7.0, 200000), 1.5);
  ExpectWithin("erf", Unary::kErf, std::erf, Samples(-1e-3, 1e-3, 50000), 1.5);
}

PEAK_TEST(simd_exp2_and_reciprocal_have_the_stated_errors) {
  // simd.h states the relative errors; an ulp is at least 2^-24 of the result.
  constexpr double kUlps = 0x1p24;
  ExpectWithin("exp2", Unary::kExp2, std::exp2, Samples(-126.0, 129.0, 50000), 2e-7 * kUlps);
  ExpectWithin("exp2", Unary::kExp2Of8Bits, std::exp2, Samples(-126.0, 129.0, 50000), 4e-6 * kUlps);
  ExpectWithin("exp2", Unary::kExp2, std::exp2, Samples(-152.0, -126.0, 5000), 2.0);
  std::vector<float> large = {1.0f, 3e38f, static_cast<float>(kInf), static_cast<float>(kNan)};
  for (const float x : Samples(0.0, 120.0, 50000)) large.push_back(x > 0.0f && x < 120.0f ? std::exp2(x) : 1.0f);
  ExpectWithin("1 /", Unary::kReciprocal, Inverse, large, 1e-7 * kUlps);
  ExpectWithin("1 /", Unary::kReciprocalOf8Bits, Inverse, large, 6.2e-5 * kUlps);
}

PEAK_TEST(simd_tanh_and_its_slope_have_the_stated_errors) {
  // activations.h states the relative errors; an ulp is at least 2^-24 of the result.
  constexpr double kUlps = 0x1p24;
  ExpectWithin("tanh", Unary::kTanh, std::tanh, Samples(-12.0, 12.0, 200000), 2e-7 * kUlps);
  ExpectWithin("tanh", Unary::kTanh, std::tanh, Samples(-1e-3, 1e-3, 50000), 2e-7 * kUlps);
  ExpectWithin("slope of tanh", Unary::kTanhSlope, TanhSlope, Samples(-12.0, 12.0, 200000), 3e-6 * kUlps);
}

PEAK_TEST(simd_round_sqrt_and_abs_are_correctly_rounded) {
  std::vector<float> values = Samples(-9.0, 9.0, 1000);
  for (int i = -20; i < 20; ++i) values.push_back(i + 0.5f);  // ties go to even
  while (values.size() % kMost != 0) values.push_back(8388607.5f);
  ExpectWithin("round", Unary::kRound, std::nearbyint, values, 0.0);
  ExpectWithin("sqrt", Unary::kSqrt, std::sqrt, values, 0.5);
  ExpectWithin("abs", Unary::kAbs, std::fabs, values, 0.0);
}

PEAK_TEST(simd_binary_operations_equal_float_arithmetic) {
  // Float arithmetic is the reference: the results are exact or correctly rounded. Max and Min return b if either
  // operand is NaN.
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

PEAK_TEST(simd_scale_equals_ldexp) {
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

PEAK_TEST(simd_fma_fnma_and_select_equal_their_definition) {
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
      Check(larger[lane] == (a[lane] > b[lane] ? c[lane] : -7.0f), "%s Select is wrong in lane %d", ActiveIsa(),
            static_cast<int>(lane));
    }
  }
}

}  // namespace
}  // namespace peak::test

#endif  // PEAK_ISA
