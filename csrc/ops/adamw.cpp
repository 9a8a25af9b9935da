#include "ops/adamw.h"

#include <vector>

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

#include "ops/master_weights.h"

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
namespace {

AdamwStep StepOf(const AdamwArgs& args) {
  const double scale = args.norm == nullptr ? 1.0 : std::min(1.0, args.max_norm / (*args.norm + 1e-6));
  const double t = *args.step + 1.0, lr = args.rate == nullptr ? args.lr : args.lr * *args.rate;
  // Powers in double: 1 - 0.999^1 in float has three digits.
  return {static_cast<float>(scale),
          static_cast<float>(1.0 - lr * args.weight_decay),
          static_cast<float>(args.beta1),
          static_cast<float>(args.beta2),
          static_cast<float>(lr / (1.0 - std::pow(args.beta1, t))),
          static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(args.beta2, t))),
          static_cast<float>(args.eps)};
}

// The parameters share dtype and norm.
void UpdateAll(const std::vector<AdamwArgs>& all, int threads) {
  if (all.empty() || (all[0].norm != nullptr && !std::isfinite(*all[0].norm))) return;
  std::vector<AdamwStep> steps;
  std::vector<int64_t> starts{0};  // of each parameter, if all lay end to end
  for (const AdamwArgs& args : all) {
    steps.push_back(StepOf(args));
    starts.push_back(starts.back() + args.count);
  }
  const auto update = PEAK_PICK_DTYPE(all[0].dtype, Update);
  ParallelRanges(starts.back(), kGrainBytes / 16, threads, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < all.size() && starts[i] < end; ++i) {
      update(all[i], steps[i], std::max(begin - starts[i], int64_t{0}), std::min(end - starts[i], all[i].count));
    }
  });
  for (const AdamwArgs& args : all) *args.step += 1.0f;
}

template <class T>
T* Address(int64_t bits) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(bits));
}

}  // namespace

void Adamw(const AdamwArgs& args, int threads) { UpdateAll({args}, threads); }

void AdamwEach(const AdamwEachArgs& args, int threads) {
  std::vector<AdamwArgs> all;
  for (const int64_t* row = args.table; row != args.table + 7 * args.count; row += 7) {
    all.push_back({.dtype = args.dtype, .count = row[0], .param = Address<void>(row[1]),
                   .grad = Address<const void>(row[2]), .exp_avg = Address<float>(row[4]),
                   .exp_avg_sq = Address<float>(row[5]), .step = Address<float>(row[6]), .lr = args.lr,
                   .beta1 = args.beta1, .beta2 = args.beta2, .eps = args.eps, .weight_decay = args.weight_decay,
                   .remainder = Address<int16_t>(row[3]), .norm = args.norm, .max_norm = args.max_norm,
                   .rate = args.rate});
  }
  UpdateAll(all, threads);
}

}  // namespace peak

#endif  // PEAK_ISA
