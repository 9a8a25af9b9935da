#include "ops/qk_norm.h"

#include <algorithm>
#include <vector>

#include "ops/rotary.h"

#define PEAK_THIS_FILE "ops/qk_norm.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "ops/rotate_head.h"

// Heads of one token.
template <class T>
struct TokenHeads {
  T* first;
  int64_t stride;
  PEAK_INLINE T* operator[](int64_t head) const { return first + head * stride; }
};

template <class T, class Pointer>
PEAK_INLINE TokenHeads<T> HeadsOf(const Strided<Pointer>& x, int64_t sequence, int64_t token) {
  return {static_cast<T*>(x.data) + sequence * x.stride_b + token * x.stride_t, x.stride_h};
}

// out = weights + offset, as floats.
template <class W>
void WidenWeights(const void* weights, int64_t count, float offset, float* out) {
  const W* w = static_cast<const W*>(weights);
  for (int64_t i = 0; i < count; i += kLanes) Store(out + i, Load(w + i, count - i) + Set(offset), count - i);
}

// 1 / sqrt(mean square + eps) of `count` heads.
template <class T>
PEAK_INLINE float InverseRms(const TokenHeads<const T>& x, int64_t head, int64_t count, int64_t width, float eps) {
  Vec sums[4] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
  for (int64_t h = head; h < head + count; ++h) {
    for (int64_t d = 0, part = 0; d < width; d += kLanes, part = (part + 1) % 4) {
      const Vec v = Load(x[h] + d, width - d);
      sums[part] = Fma(v, v, sums[part]);
    }
  }
  const float sum = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / std::sqrt(sum / static_cast<float>(count * width) + eps);
}

// y = rotary(x r w). `row` has space for a head.
template <class T>
PEAK_INLINE void NormalizeHead(const QKNormProblem& args, const T* x, float r, const float* w, int64_t position,
                               float* row, T* y) {
  const int64_t width = args.width;
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t n = width - d;
    Store(row + d, Load(x + d, n) * Set(r) * Load(w + d, n), n);
  }
  if (args.cos != nullptr) {
    const int64_t at = position * args.pairs;
    RotateHead(row, args.cos + at, args.sin + at, row, args.pairs, args.interleaved);
  }
  for (int64_t d = 0; d < width; d += kLanes) Store(y + d, Load(row + d, width - d), width - d);
}

template <class T>
void ForwardTokens(const QKNormForwardArgs& args, const float* weights, float* row, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i % args.tokens, position = args.positions == nullptr ? token : args.positions[token];
    const auto x = HeadsOf<const T>(args.x, i / args.tokens, token);
    const auto y = HeadsOf<T>(args.y, i / args.tokens, token);
    int64_t count, mean = i * args.Means();
    for (int64_t head = 0; head < args.Heads(); head += count, ++mean) {
      count = args.SharedHeads(head);
      const float r = InverseRms(x, head, count, args.width, args.eps);
      if (args.r != nullptr) args.r[mean] = r;
      for (int64_t h = head; h < head + count; ++h) {
        NormalizeHead(args, x[h], r, weights + args.WeightAt(h), position, row, y[h]);
      }
    }
  }
}

// g = rotary^-1(dy) w, in floats. Adds rotary^-1(dy) z to dw and g z to *sum, where z = x r.
template <class T>
PEAK_INLINE void HeadGradient(const QKNormProblem& args, const T* x, const T* dy, float r, const float* w,
                              int64_t token, float* g, float* dw, Vec* sum) {
  const int64_t width = args.width;
  for (int64_t d = 0; d < width; d += kLanes) Store(g + d, Load(dy + d, width - d), width - d);
  if (args.cos != nullptr) {
    const int64_t at = token * args.pairs;
    RotateHead(g, args.cos + at, args.sin + at, g, args.pairs, args.interleaved);
  }
  for (int64_t d = 0; d < width; d += kLanes) {
    const int64_t n = width - d;
    const Vec up = Load(g + d, n), z = Load(x + d, n) * Set(r), product = up * Load(w + d, n);
    Store(dw + d, Fma(up, z, Load(dw + d, n)), n);
    Store(g + d, product, n);
    *sum = Fma(product, z, *sum);
  }
}

// `rows` has space for the heads that share a mean. Adds to dw, in the order of the weights.
template <class T>
void BackwardTokens(const QKNormBackwardArgs& args, const float* weights, float* rows, float* dw, int64_t begin,
                    int64_t end) {
  const int64_t width = args.width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sequence = i / args.tokens, token = i % args.tokens;
    const auto x = HeadsOf<const T>(args.x, sequence, token), dy = HeadsOf<const T>(args.dy, sequence, token);
    const auto dx = HeadsOf<T>(args.dx, sequence, token);
    int64_t count, mean = i * args.Means();
    for (int64_t head = 0; head < args.Heads(); head += count, ++mean) {
      count = args.SharedHeads(head);
      const float r = args.r[mean];
      Vec sum = Set(0.0f);
      for (int64_t h = 0; h < count; ++h) {
        const int64_t at = args.WeightAt(head + h);
        HeadGradient(args, x[head + h], dy[head + h], r, weights + at, token, rows + h * width, dw + at, &sum);
      }
      if (args.dx.data == nullptr) continue;
      const Vec slope = Set(-r * r * (Sum(sum) / static_cast<float>(count * width)));  // of x: dx = r g + slope x
      for (int64_t h = 0; h < count; ++h) {
        for (int64_t d = 0; d < width; d += kLanes) {
          const int64_t n = width - d;
          const Vec g = Load(rows + h * width + d, n) * Set(r);
          Store(dx[head + h] + d, Fma(Load(x[head + h] + d, n), slope, g), n);
        }
      }
    }
  }
}

#else

namespace peak {
namespace {

// Both weights plus the offset, one after the other.
std::vector<float> Weights(const QKNormProblem& args) {
  std::vector<float> weights(args.QWeights() + args.KWeights());
  const auto widen = PEAK_PICK_DTYPE(args.w_dtype, WidenWeights);
  widen(args.q_norm, args.QWeights(), args.offset, weights.data());
  widen(args.k_norm, args.KWeights(), args.offset, weights.data() + args.QWeights());
  return weights;
}

}  // namespace

void QKNormForward(const QKNormForwardArgs& args, int threads) {
  const auto weights = Weights(args);
  const auto normalize = PEAK_PICK_DTYPE(args.dtype, ForwardTokens);
  ParallelParts(args.batch * args.tokens, threads, threads, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> row(args.width);
    normalize(args, weights.data(), row.data(), begin, end);
  });
}

void QKNormBackward(const QKNormBackwardArgs& args, int threads) {
  const auto weights = Weights(args);
  const int64_t count = static_cast<int64_t>(weights.size());
  const int64_t shared = std::max(args.SharedHeads(0), args.SharedHeads(args.q_heads));
  const auto differentiate = PEAK_PICK_DTYPE(args.dtype, BackwardTokens);
  std::vector<float> partial(kParts * count);
  ParallelParts(args.batch * args.tokens, kParts, threads, [&](int64_t part, int64_t begin, int64_t end) {
    std::vector<float> rows(shared * args.width);
    differentiate(args, weights.data(), rows.data(), partial.data() + part * count, begin, end);
  });
  const auto add = PEAK_PICK_DTYPE(args.w_dtype, AddParts, float);
  if (args.dq_norm != nullptr) add(partial.data(), count, args.QWeights(), args.dq_norm, false);
  if (args.dk_norm != nullptr) add(partial.data() + args.QWeights(), count, args.KWeights(), args.dk_norm, false);
}

}  // namespace peak

#endif  // PEAK_ISA
