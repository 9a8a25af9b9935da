#include "adamw.h"

#ifndef PEAK_ISA
namespace peak {
namespace {

// What is the same for every element.
struct AdamwStep {
  float gradient_scale, decay, beta1, beta2, step_size, inverse_root_correction, eps;
};

}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "adamw.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

template <class T>
void Update(const AdamwArgs& args, const AdamwStep& step, int64_t begin, int64_t end) {
  T* param = static_cast<T*>(args.param);
  const T* grad = static_cast<const T*>(args.grad);
  const Vec scale = Set(step.gradient_scale), decay = Set(step.decay), size = Set(step.step_size);
  const Vec beta1 = Set(step.beta1), beta2 = Set(step.beta2);
  const Vec fresh1 = Set(static_cast<float>(1.0 - args.beta1)), fresh2 = Set(static_cast<float>(1.0 - args.beta2));
  const Vec correction = Set(step.inverse_root_correction), eps = Set(step.eps);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const Vec g = Load(grad + i, n) * scale;
    const Vec m = Fma(fresh1, g, beta1 * Load(args.exp_avg + i, n));
    const Vec v = Fma(fresh2 * g, g, beta2 * Load(args.exp_avg_sq + i, n));
    const Vec old = args.master == nullptr ? Load(param + i, n) : Load(args.master + i, n);
    const Vec p = Fnma(size, m / Fma(Sqrt(v), correction, eps), old * decay);
    Store(args.exp_avg + i, m, n);
    Store(args.exp_avg_sq + i, v, n);
    if (args.master != nullptr) Store(args.master + i, p, n);
    Store(param + i, p, n);
  }
}

#else

namespace peak {

void Adamw(const AdamwArgs& args, int threads) {
  double scale = 1.0;
  if (args.norm != nullptr) {
    if (!std::isfinite(*args.norm)) return;
    scale = std::min(1.0, args.max_norm / (*args.norm + 1e-6));
  }
  const double t = *args.step + 1.0;
  // Powers in double: 1 - 0.999^1 in float has three digits.
  const AdamwStep step{static_cast<float>(scale),
                       static_cast<float>(1.0 - args.lr * args.weight_decay),
                       static_cast<float>(args.beta1),
                       static_cast<float>(args.beta2),
                       static_cast<float>(args.lr / (1.0 - std::pow(args.beta1, t))),
                       static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(args.beta2, t))),
                       static_cast<float>(args.eps)};
  const auto update = PEAK_PICK_DTYPE(args.dtype, Update);
  ParallelParts(args.count, threads, threads,
                [&](int64_t, int64_t begin, int64_t end) { update(args, step, begin, end); });
  *args.step = static_cast<float>(t);
}

}  // namespace peak

#endif  // PEAK_ISA
