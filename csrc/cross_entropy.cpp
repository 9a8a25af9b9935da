#include "cross_entropy.h"

#define PEAK_THIS_FILE "cross_entropy.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

template <class T>
PEAK_INLINE float At(const T* z) {
  float lanes[kLanes];
  Store(lanes, Load(z, 1));
  return lanes[0];
}

template <class T>
PEAK_INLINE float RowMax(const T* z, int64_t vocab) {
  const Vec lowest = Set(-INFINITY);
  Vec a = lowest, b = lowest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= vocab; i += 2 * kLanes) {
    a = Max(a, Load(z + i));
    b = Max(b, Load(z + i + kLanes));
  }
  float most = MaxOf(Max(a, b));
  for (; i < vocab; ++i) most = At(z + i) > most ? At(z + i) : most;
  return most;
}

// A NaN or infinite row gives NaN, as torch does: the maximum may miss a NaN, the sum does not.
template <class T>
PEAK_INLINE float RowLogSumExp(const T* z, int64_t vocab) {
  const float most = RowMax(z, vocab);
  const Vec m = Set(most);
  Vec a = Set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= vocab; i += 2 * kLanes) {
    a = a + Exp(Load(z + i) - m);
    b = b + Exp(Load(z + i + kLanes) - m);
  }
  float tail = 0.0f;
  for (; i < vocab; ++i) tail += std::exp(At(z + i) - most);
  return most + std::log(Sum(a + b) + tail);
}

// z becomes (e^(z - lse) - onehot(target)) * scale.
template <class T>
PEAK_INLINE void GradientRow(T* z, int64_t vocab, int64_t target, float lse, float scale) {
  // e^d - 1 keeps its digits where the model is sure of the target.
  const float hit = std::expm1(At(z + target) - lse) * scale;
  const Vec shift = Set(lse), s = Set(scale);
  for (int64_t i = 0; i < vocab; i += kLanes) Store(z + i, Exp(Load(z + i, vocab - i) - shift) * s, vocab - i);
  Store(z + target, Set(hit), 1);
}

template <class T>
PEAK_INLINE void ZeroRow(T* z, int64_t vocab) {
  for (int64_t i = 0; i < vocab; i += kLanes) Store(z + i, Set(0.0f), vocab - i);
}

template <class T>
void ForwardRows(const CrossEntropyForwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    const int64_t target = args.target[row];
    args.loss[row] = args.lse[row] = 0.0f;
    if (target == args.ignore_index) {
      if (args.with_gradient) ZeroRow(z, args.vocab);
      continue;
    }
    const float lse = RowLogSumExp(z, args.vocab);
    args.lse[row] = lse;
    args.loss[row] = lse - At(z + target);
    if (args.with_gradient) GradientRow(z, args.vocab, target, lse, args.scale);
  }
}

template <class T>
void BackwardRows(const CrossEntropyBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      ZeroRow(z, args.vocab);
    } else {
      GradientRow(z, args.vocab, target, args.lse[row], args.dloss[row]);
    }
  }
}

#else

namespace peak {

void CrossEntropyForward(const CrossEntropyForwardArgs& args, int threads) {
  const auto rows = PEAK_PICK_DTYPE(args.dtype, ForwardRows);
  ParallelParts(args.rows, threads, threads, [&](int64_t, int64_t begin, int64_t end) { rows(args, begin, end); });
}

void CrossEntropyBackward(const CrossEntropyBackwardArgs& args, int threads) {
  const auto rows = PEAK_PICK_DTYPE(args.dtype, BackwardRows);
  ParallelParts(args.rows, threads, threads, [&](int64_t, int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace peak

#endif  // PEAK_ISA
