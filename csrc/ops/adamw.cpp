#include "ops/adamw.h"

#ifndef PEAK_ISA
namespace peak {
namespace {

// The values that are the same for every element.
struct AdamwStep {
  float gradient_scale, decay, beta1, beta2, step_size, inverse_root_correction, eps;
};

}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "ops/adamw.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

PEAK_INLINE Vec LoadMaster(const float* param, const int16_t*, int64_t i, int64_t n) { return Load(param + i, n); }
PEAK_INLINE Vec LoadMaster(const bf16* param, const int16_t* remainder, int64_t i, int64_t n) {
  return LoadSplit(param + i, remainder + i, n);
}
PEAK_INLINE void StoreMaster(float* param, int16_t*, Vec p, int64_t i, int64_t n) { Store(param + i, p, n); }
PEAK_INLINE void StoreMaster(bf16* param, int16_t* remainder, Vec p, int64_t i, int64_t n) {
  StoreSplit(param + i, remainder + i, p, n);
}

struct Constants {
  Vec scale, decay, size, beta1, beta2, fresh1, fresh2, correction, eps;
};

template <class T>
PEAK_INLINE void UpdateLanes(const AdamwArgs& args, const Constants& c, int64_t i, int64_t n) {
  T* param = static_cast<T*>(args.param);
  const Vec g = Load(static_cast<const T*>(args.grad) + i, n) * c.scale;
  const Vec m = Fma(c.fresh1, g, c.beta1 * Load(args.exp_avg + i, n));
  const Vec v = Fma(c.fresh2 * g, g, c.beta2 * Load(args.exp_avg_sq + i, n));
  const Vec old = LoadMaster(param, args.remainder, i, n);
  const Vec p = Fnma(c.size, m / Fma(Sqrt(v), c.correction, c.eps), old * c.decay);
  Store(args.exp_avg + i, m, n);
  Store(args.exp_avg_sq + i, v, n);
  StoreMaster(param, args.remainder, p, i, n);
}

template <class T>
void Update(const AdamwArgs& args, const AdamwStep& step, int64_t begin, int64_t end) {
  const Constants c{Set(step.gradient_scale), Set(step.decay), Set(step.step_size), Set(step.beta1), Set(step.beta2),
                    Set(static_cast<float>(1.0 - args.beta1)), Set(static_cast<float>(1.0 - args.beta2)),
                    Set(step.inverse_root_correction), Set(step.eps)};
  int64_t i = begin;
  // The tail is separate: its calls of memcpy would leave no constant in a register.
  for (; i + kLanes <= end; i += kLanes) UpdateLanes<T>(args, c, i, kLanes);
  if (i < end) UpdateLanes<T>(args, c, i, end - i);
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
