#include "ops/adamw.h"

#include "buffer.h"

namespace peak::test {
namespace {

// The float32 master of a bf16 parameter: its magnitude bits in the upper half, plus the remainder.
float Master(bf16 param, int16_t remainder) {
  const int32_t magnitude = (param.bits & 0x7fff) * 0x10000 + remainder;
  const uint32_t bits = static_cast<uint32_t>(magnitude) | static_cast<uint32_t>(param.bits & 0x8000) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float Master(float param, int16_t) { return param; }

// The tensors of one step.
template <class T>
struct Step {
  Placer place;
  Buffer<T> param, grad;
  Buffer<int16_t> remainder;
  Buffer<float> exp_avg, exp_avg_sq, step, norm;
  AdamwArgs args;

  Step(int64_t count, int placement)
      : place(placement),
        param(place.Out<T>(count)),
        grad(place.In<T>(count)),
        remainder(place.Out<int16_t>(count)),
        exp_avg(place.Out<float>(count)),
        exp_avg_sq(place.Out<float>(count)),
        step(place.Out<float>(1)),
        norm(place.In<float>(1)) {
    Random random(count);
    param.FillNormal(random);
    grad.FillNormal(random);
    exp_avg.FillNormal(random, 0.0, 0.1);
    exp_avg_sq.Fill([&](int64_t) { return random.Uniform(); });
    for (int64_t i = 0; i < count; ++i) remainder[i] = static_cast<int16_t>(random.Below(65536) - 32768);
    step[0] = 6.0f;
    norm[0] = 4.0f;
    args = {.dtype = kDtype<T>, .count = count, .param = param.data(), .grad = grad.data(),
            .exp_avg = exp_avg.data(), .exp_avg_sq = exp_avg_sq.data(), .step = step.data(), .lr = 0.01, .beta1 = 0.9,
            .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1,
            .remainder = std::is_same_v<T, float> ? nullptr : remainder.data(), .norm = norm.data(), .max_norm = 1.0};
  }
  double MasterAt(int64_t i) const { return Master(param[i], remainder[i]); }
};

PEAK_TEST(adamw_equals_double_precision) {
  ForEachCase("adamw", 0, [&](auto element, int64_t count, int placement) {
    using T = decltype(element);
    const bool clipped = placement != 2;
    Step<T> s(count, placement);
    if (!clipped) s.args.norm = nullptr;
    std::vector<double> master(count);
    for (int64_t i = 0; i < count; ++i) master[i] = s.MasterAt(i);
    const std::vector<double> m = s.exp_avg.Values(), v = s.exp_avg_sq.Values();
    Adamw(s.args, 1 + placement % 2);
    Check(s.step[0] == 7.0f, "step is %g, expected 7", s.step[0]);
    const double scale = clipped ? 1.0 / (4.0 + 1e-6) : 1.0;
    const double correction1 = 1.0 - std::pow(0.9, 7), correction2 = 1.0 - std::pow(0.99, 7);
    for (int64_t i = 0; i < count; ++i) {
      const double g = s.grad.At(i) * scale, new_m = 0.9 * m[i] + 0.1 * g, new_v = 0.99 * v[i] + 0.01 * g * g;
      const double update = 0.01 * (new_m / correction1) / (std::sqrt(new_v / correction2) + 1e-8);
      const double want = master[i] * (1.0 - 0.01 * 0.1) - update;
      const double m_slack = 4.0 * (std::fabs(0.9 * m[i]) + std::fabs(0.1 * g));
      Near("exp_avg", i, s.exp_avg[i], {new_m, m_slack});
      Near("exp_avg_sq", i, s.exp_avg_sq[i], {new_v, 6.0 * new_v});
      const double relative = m_slack / std::max(std::fabs(new_m), 1e-30) + 12.0;
      const Want param{want, 4.0 * std::fabs(master[i]) + std::fabs(update) * relative};
      Near("master", i, static_cast<float>(s.MasterAt(i)), param);
      if (!Near("param", i, s.param[i], param)) return;
    }
  });
}

// Nothing changes if the norm of the gradients is not finite.
PEAK_TEST(adamw_skips_the_step_if_the_norm_is_not_finite) {
  ForEachDtype([&](auto element) {
    for (const double norm : {kInf, kNan}) {
      SetCase("adamw %s norm %g", kName<decltype(element)>, norm);
      Step<decltype(element)> s(37, 0);
      s.norm[0] = static_cast<float>(norm);
      const std::vector<double> param = s.param.Values(), m = s.exp_avg.Values(), v = s.exp_avg_sq.Values();
      Adamw(s.args, 2);
      Check(s.param.Values() == param && s.exp_avg.Values() == m && s.exp_avg_sq.Values() == v && s.step[0] == 6.0f,
            "a skipped step changed a tensor");
    }
  });
}

// A gradient that is not finite changes its own element only; subnormal gradients keep the element finite.
PEAK_TEST(adamw_gradient_that_is_not_finite_stays_in_its_element) {
  ForEachCase("adamw specials", 1, [&](auto element, int64_t count, int placement) {
    Step<decltype(element)> s(count, placement);
    s.grad.FillSpecials(placement);
    s.args.norm = nullptr;
    Adamw(s.args, 1);
    for (int64_t i = 0; i < count; ++i) {
      const bool finite = std::fabs(s.grad.At(i)) < 1e19;  // its square is a float
      Check(std::isfinite(s.exp_avg[i]) == std::isfinite(s.grad.At(i)), "exp_avg[%d] is %g", static_cast<int>(i),
            s.exp_avg[i]);
      Check(!finite || std::isfinite(s.param.At(i)), "param[%d] is %g after a gradient of %g", static_cast<int>(i),
            s.param.At(i), s.grad.At(i));
    }
  });
}

template <class T>
std::vector<char> Call(int threads) {
  Step<T> s(10007, 0);
  Adamw(s.args, threads);
  std::vector<char> bytes;
  s.param.Append(bytes);
  s.remainder.Append(bytes);
  s.exp_avg.Append(bytes);
  s.exp_avg_sq.Append(bytes);
  return bytes;
}
PEAK_KERNEL(adamw_float32) { return Call<float>(threads); }
PEAK_KERNEL(adamw_bfloat16) { return Call<bf16>(threads); }

}  // namespace
}  // namespace peak::test
