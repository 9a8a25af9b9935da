#include "ops/experts.h"

#include <algorithm>

#define PEAK_THIS_FILE "ops/experts.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"

template <class T>
void CombineTokens(const CombineChoicesArgs& args, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(args.y);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* rows = args.position + token * args.choices;
    const float* weights = args.weights == nullptr ? nullptr : args.weights + token * args.choices;
    T* out = static_cast<T*>(args.out) + token * args.width;
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const int64_t n = args.width - i;
      Vec sum = Set(0.0f);
      for (int64_t j = 0; j < args.choices; ++j) {
        const Vec row = Load(y + rows[j] * args.width + i, n);
        sum = weights == nullptr ? sum + row : Fma(Set(weights[j]), row, sum);
      }
      Store(out + i, sum, n);
    }
  }
}

template <class T, class Act>
void HiddenRows(const HiddenBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * args.width, choice = args.order[row];
    const Vec weight = Set(args.weights[choice]);
    T* g = static_cast<T*>(args.g) + first;
    const T* up = static_cast<const T*>(args.up) + first;
    const T* gate = args.gate == nullptr ? nullptr : static_cast<const T*>(args.gate) + first;
    Vec sum = Set(0.0f);
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const int64_t n = args.width - i;
      const Vec dh = Load(g + i, n), value = Load(up + i, n);
      Vec slope, hidden;
      if (gate == nullptr) {
        hidden = Act::ValueAndSlope(value, &slope);
        Store(g + i, dh * slope * weight, n);
      } else {
        const Vec act = Act::ValueAndSlope(Load(gate + i, n), &slope);
        const Vec other = Act::Up(value);
        hidden = act * other;
        Store(static_cast<T*>(args.dgate) + first + i, dh * other * slope * weight, n);
        Store(g + i, Act::UpSlope(value, dh * act * weight), n);
      }
      if (args.hidden != nullptr) Store(static_cast<T*>(args.hidden) + first + i, hidden * weight, n);
      sum = Fma(dh, hidden, sum);
    }
    args.dweights[choice] = Sum(sum);
  }
}

template <class T>
void HiddenRowsOf(const HiddenBackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::kGeluTanh: return HiddenRows<T, GeluTanh<T>>(args, begin, end);
    case Activation::kGeluErf: return HiddenRows<T, GeluErf>(args, begin, end);
    case Activation::kRelu: return HiddenRows<T, Relu>(args, begin, end);
    case Activation::kSilu: return HiddenRows<T, Silu<T>>(args, begin, end);
    case Activation::kClampedSwiglu: return HiddenRows<T, ClampedSwiglu<T>>(args, begin, end);
    case Activation::kClampedUp: return;
  }
}

void MultiplyRange(const float* x, int64_t begin, int64_t end, float* y) {
  for (int64_t i = begin; i < end; i += kLanes) Store(y + i, Load(x + i, end - i) * Load(y + i, end - i), end - i);
}

#else

namespace peak {
namespace {

// A NaN counts as the largest logit, as in torch.
bool IsLarger(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// Finds the k largest logits, the earlier expert of two equal ones first.
void RouteToken(const RouteArgs& args, int64_t token) {
  const float* logits = args.logits + token * args.experts;
  int64_t* ids = args.ids + token * args.choices;
  float* weights = args.weights + token * args.choices;
  for (int64_t j = 0; j < args.choices; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < args.experts; ++e) {
      const bool taken = std::find(ids, ids + j, e) != ids + j;
      if (!taken && (best < 0 || IsLarger(logits[e], logits[best]))) best = e;
    }
    ids[j] = best;
  }
  const float most = logits[ids[0]];
  float chosen = 0.0f, all = 0.0f;
  for (int64_t j = 0; j < args.choices; ++j) chosen += weights[j] = std::exp(logits[ids[j]] - most);
  if (!args.normalize) {
    for (int64_t e = 0; e < args.experts; ++e) all += std::exp(logits[e] - most);
  }
  const float total = args.normalize ? chosen : all;
  for (int64_t j = 0; j < args.choices; ++j) weights[j] /= total;
}

}  // namespace

void Route(const RouteArgs& args, int threads) {
  ParallelRanges(args.tokens, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) RouteToken(args, token);
  });
}

void SortChoices(const SortChoicesArgs& args, int threads) {
  // A counting sort on one thread: it takes microseconds.
  ParallelUnits(1, threads, [&](int64_t) {
    std::fill_n(args.offsets, args.experts + 1, 0);
    for (int64_t c = 0; c < args.choices; ++c) ++args.offsets[args.ids[c] + 1];
    for (int64_t e = 0; e < args.experts; ++e) args.offsets[e + 1] += args.offsets[e];
    // offsets[e] runs from the first row of e to that of e + 1, and is moved back afterwards.
    for (int64_t c = 0; c < args.choices; ++c) {
      const int64_t row = args.offsets[args.ids[c]]++;
      args.order[row] = c;
      args.position[c] = row;
    }
    for (int64_t e = args.experts; e > 0; --e) args.offsets[e] = args.offsets[e - 1];
    args.offsets[0] = 0;
  });
}

void GatherChoices(const GatherChoicesArgs& args, int threads) {
  const int64_t bytes = args.width * SizeOf(args.dtype);
  ParallelRanges(args.rows, GrainRows(bytes), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(static_cast<char*>(args.out) + row * bytes,
                  static_cast<const char*>(args.x) + args.order[row] / args.choices * bytes, bytes);
    }
  });
}

void CombineChoices(const CombineChoicesArgs& args, int threads) {
  const auto combine = PEAK_PICK_DTYPE(args.dtype, CombineTokens);
  ParallelRanges(args.tokens, GrainRows(args.choices * args.width * SizeOf(args.dtype)), threads,
                 [&](int64_t begin, int64_t end) { combine(args, begin, end); });
}

void HiddenBackward(const HiddenBackwardArgs& args, int threads) {
  const auto backward = PEAK_PICK_DTYPE(args.dtype, HiddenRowsOf);
  ParallelRanges(args.rows, GrainRows(args.width * SizeOf(args.dtype)), threads,
                 [&](int64_t begin, int64_t end) { backward(args, begin, end); });
}

void MultiplyElements(const float* x, int64_t count, float* y, int threads) {
  const auto multiply = PEAK_PICK(MultiplyRange);
  ParallelRanges(count, kGrainBytes / 4, threads, [&](int64_t begin, int64_t end) { multiply(x, begin, end, y); });
}

}  // namespace peak

#endif  // PEAK_ISA
