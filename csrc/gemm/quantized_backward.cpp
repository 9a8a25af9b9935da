#include "gemm/quantized_backward.h"

#include <algorithm>

#include "base/parallel.h"
#include "gemm/gemm.h"

#define PEAK_THIS_FILE "gemm/quantized_backward.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"

template <class T, class Act>
void Slopes(const ActivationBackwardArgs& args, int64_t begin, int64_t end) {
  const T *dy = static_cast<const T*>(args.dy), *pre = static_cast<const T*>(args.pre);
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec slope;
    Act::ValueAndSlope(Load(pre + i, end - i), &slope);
    Store(static_cast<T*>(args.dpre) + i, Load(dy + i, end - i) * slope, end - i);
  }
}

template <class T>
struct ClampedUpSlope {
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    *slope = ClampedSwiglu<T>::UpSlope(x, Set(1.0f));
    return x;
  }
};

template <class T>
void SlopesOf(const ActivationBackwardArgs& args, int64_t begin, int64_t end) {
  switch (static_cast<Activation>(args.activation)) {
    case Activation::kGeluTanh: return Slopes<T, GeluTanh<T>>(args, begin, end);
    case Activation::kGeluErf: return Slopes<T, GeluErf>(args, begin, end);
    case Activation::kRelu: return Slopes<T, Relu>(args, begin, end);
    case Activation::kSilu: return Slopes<T, Silu<T>>(args, begin, end);
    case Activation::kClampedSwiglu: return Slopes<T, ClampedSwiglu<T>>(args, begin, end);
    case Activation::kClampedUp: return Slopes<T, ClampedUpSlope<T>>(args, begin, end);
  }
}

// Puts the gradients of rows [begin, end) in the order of x.
template <class T>
void Reorder(const QuantizedBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t at = begin * args.k; at < end * args.k; at += args.k) {
    const T* from = static_cast<const T*>(args.unordered) + at;
    T* to = static_cast<T*>(args.dx) + at;
    for (int64_t i = 0; i < args.k; ++i) to[args.order[i]] = from[i];
  }
}

#else

namespace peak {

void QuantizedBackward(const QuantizedBackwardArgs& args, int threads) {
  GemmArgs gemm{};
  gemm.dtype = gemm.out_dtype = args.dtype;
  gemm.m = args.rows, gemm.n = args.k, gemm.k = args.n;
  gemm.a = args.dpre, gemm.a_row = args.n, gemm.a_k = 1;
  gemm.c = args.order == nullptr ? args.dx : args.unordered, gemm.c_row = args.k;
  gemm.weight = &args;
  Gemm(gemm, threads);
  if (args.order == nullptr) return;
  const auto reorder = PEAK_PICK_DTYPE(args.dtype, Reorder);
  ParallelRanges(args.rows, GrainRows(args.k * SizeOf(args.dtype)), threads,
                 [&](int64_t begin, int64_t end) { reorder(args, begin, end); });
}

void ActivationBackward(const ActivationBackwardArgs& args, int threads) {
  const auto slopes = PEAK_PICK_DTYPE(args.dtype, SlopesOf);
  ParallelRanges(args.count, kGrainBytes / 4, threads, [&](int64_t begin, int64_t end) { slopes(args, begin, end); });
}

}  // namespace peak

#endif  // PEAK_ISA
