#include "activation.h"
#include "buffer.h"

namespace peak::test {
namespace {

struct ValueAndSlope {
  Want value, slope;
};

ValueAndSlope GeluTanh(double x) {
  const double k = std::sqrt(2.0 / M_PI), u = k * (x + 0.044715 * x * x * x);
  const double s = 1.0 / (1.0 + std::exp(-2.0 * u)), du2 = 2.0 * k * (1.0 + 3.0 * 0.044715 * x * x);
  // An error of the exponent's argument is relative to u; past |2u| = 104 the result is below the subnormals.
  const double loss = 4.0 + 4.0 * std::min(std::fabs(2.0 * u), 104.0);
  return {{x * s, std::fabs(x * s) * loss}, {s + x * s * (1.0 - s) * du2, s * loss * (1.0 + std::fabs(x) * du2)}};
}

ValueAndSlope GeluErf(double x) {
  // Half of 1 + erf: an error of half an ulp of 1 stays in the tail, until erf is -1.
  const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0)), phi = std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI);
  return {{x * cdf, x < -9.0 ? 0x1p-30 : 4.0 * std::fabs(x)}, {cdf + x * phi, (x < -9.0 ? 0x1p-30 : 4.0) + 4.0 * std::fabs(x * phi) * (1.0 + x * x)}};
}

ValueAndSlope Relu(double x) { return {{x > 0 || std::isnan(x) ? x : 0.0, 0.0}, {x > 0 ? 1.0 : 0.0, 0.0}}; }

constexpr struct {
  const char* name;
  Activation code;
  ValueAndSlope (*reference)(double);
} kActivations[] = {{"gelu_tanh", Activation::kGeluTanh, GeluTanh},
                    {"gelu_erf", Activation::kGeluErf, GeluErf},
                    {"relu", Activation::kRelu, Relu}};

PEAK_TEST(activation_forward) {
  for (const auto& activation : kActivations) {
    ForEachCase(activation.name, 0, [&](auto element, int64_t count, int placement) {
      using T = decltype(element);
      for (const bool special : {false, true}) {
        Random random(count);
        Placer place(placement);
        auto pre = place.In<T>(count);
        auto out = place.Out<T>(count);
        special ? pre.FillSpecials(placement) : pre.FillNormal(random, 0.0, 3.0);
        ActivationForward({kDtype<T>, activation.code, count, pre.data(), out.data()}, 1 + placement % 2);
        out.Expect("out", [&](int64_t i) { return activation.reference(pre.At(i)).value; });
      }
    });
  }
}

// The slope of a pre-activation past 1e18 is 0 * inf = NaN, in PyTorch too, so specials end there.
double Tame(double x) { return std::fabs(x) < 1e18 ? x : 3.0; }

PEAK_TEST(activation_backward) {
  constexpr int64_t kRows = 3;
  for (const auto& activation : kActivations) {
    ForEachCase(activation.name, 1, [&](auto element, int64_t width, int placement) {
      using T = decltype(element);
      const bool special = placement % 2 == 1, with_out = placement != 2, with_db = placement != 3;
      Random random(width);
      Placer place(placement);
      auto pre = place.In<T>(kRows * width);
      auto dout = place.Out<T>(kRows * width), out = place.Out<T>(kRows * width);
      auto db = place.Out<T>(width);
      pre.FillNormal(random, 0.0, 3.0);
      if (special) pre.FillSpecials(placement).Fill([&](int64_t i) { return Tame(pre.At(i)); });
      dout.FillNormal(random, 0.5);
      const std::vector<double> dy = dout.Values();
      ActivationBackward({kDtype<T>, activation.code, kRows, width, pre.data(), dout.data(),
                          with_out ? out.data() : nullptr, with_db ? db.data() : nullptr},
                         1 + placement % 2);
      const auto dpre = [&](int64_t i) -> Want {
        const Want slope = activation.reference(pre.At(i)).slope;
        return {dy[i] * slope.value, std::fabs(dy[i]) * (slope.slack + std::fabs(slope.value))};
      };
      dout.Expect("dpre", dpre);
      if (with_out) out.Expect("out", [&](int64_t i) { return activation.reference(pre.At(i)).value; });
      if (!with_db) return;
      db.Expect("db", [&](int64_t column) -> Want {
        Want sum{0.0, 0.0};
        for (int64_t row = 0; row < kRows; ++row) {
          const Want term = dpre(row * width + column);
          sum.value += term.value;
          sum.slack += term.slack + kRows * std::fabs(term.value);
        }
        return sum;
      });
    });
  }
}

// As the MLP's backward calls it: the activation overwrites what it was computed from.
PEAK_TEST(activation_in_place) {
  ForEachCase("gelu_tanh", 0, [&](auto element, int64_t count, int placement) {
    using T = decltype(element);
    Random random(count);
    Placer place(placement);
    auto x = place.Out<T>(count);
    x.FillNormal(random);
    const std::vector<double> pre = x.Values();
    ActivationForward({kDtype<T>, Activation::kGeluTanh, count, x.data(), x.data()}, 1);
    x.Expect("out", [&](int64_t i) { return GeluTanh(pre[i]).value; });
  });
}

template <class T>
std::vector<char> Call(int threads) {
  constexpr int64_t kRows = 77, kWidth = 129;
  Random random(1);
  Placer place(0);
  auto pre = place.In<T>(kRows * kWidth);
  auto dout = place.Out<T>(kRows * kWidth), out = place.Out<T>(kRows * kWidth), db = place.Out<T>(kWidth);
  pre.FillNormal(random);
  dout.FillNormal(random);
  ActivationForward({kDtype<T>, Activation::kGeluErf, kRows * kWidth, pre.data(), out.data()}, threads);
  std::vector<char> bytes;
  out.Append(bytes);
  ActivationBackward({kDtype<T>, Activation::kGeluTanh, kRows, kWidth, pre.data(), dout.data(), out.data(), db.data()},
                     threads);
  for (const auto* buffer : {&dout, &out, &db}) buffer->Append(bytes);
  return bytes;
}
PEAK_KERNEL(activation_float32) { return Call<float>(threads); }
PEAK_KERNEL(activation_bfloat16) { return Call<bf16>(threads); }

}  // namespace
}  // namespace peak::test
