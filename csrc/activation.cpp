#include "activation.h"

#include <vector>

#define PEAK_THIS_FILE "activation.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

// x/2 (1 + tanh u) = x s(2u) with the logistic s: no cancellation in the left tail.
// u = k (x + 0.044715 x^3), k = sqrt(2 / pi).
struct GeluTanh {
  static PEAK_INLINE Vec Gate(Vec x, Vec square) {
    const Vec minus_2u = x * Fma(square, Set(-2.0f * 0.7978845608f * 0.044715f), Set(-2.0f * 0.7978845608f));
    return Set(1.0f) / (Set(1.0f) + Exp(minus_2u));
  }
  static PEAK_INLINE Vec Value(Vec x) { return x * Gate(x, x * x); }
  // Returns act(x); slope = s + x s (1 - s) 2 u'.
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    const Vec square = x * x, s = Gate(x, square);
    const Vec du2 = Fma(square, Set(6.0f * 0.7978845608f * 0.044715f), Set(2.0f * 0.7978845608f));
    *slope = Fma(x * s * (Set(1.0f) - s), du2, s);
    return x * s;
  }
};

struct GeluErf {
  static PEAK_INLINE Vec Cdf(Vec x) { return Fma(Erf(x * Set(0.70710678118f)), Set(0.5f), Set(0.5f)); }
  static PEAK_INLINE Vec Value(Vec x) { return x * Cdf(x); }
  // slope = Phi(x) + x phi(x).
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    const Vec cdf = Cdf(x);
    *slope = Fma(x * Set(0.3989422804f), Exp(x * x * Set(-0.5f)), cdf);
    return x * cdf;
  }
};

struct Relu {
  static PEAK_INLINE Vec Value(Vec x) { return Max(Set(0.0f), x); }
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    *slope = Select(Greater(x, Set(0.0f)), Set(1.0f), Set(0.0f));
    return Value(x);
  }
};

template <class T, class Act>
void Forward(const ActivationForwardArgs& args, int64_t begin, int64_t end) {
  const T* pre = static_cast<const T*>(args.pre);
  T* out = static_cast<T*>(args.out);
  for (int64_t i = begin; i < end; i += kLanes) Store(out + i, Act::Value(Load(pre + i, end - i)), end - i);
}

template <class T, class Act>
void Backward(const ActivationBackwardArgs& args, float* db, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* pre = static_cast<const T*>(args.pre) + row * width;
    T* dout = static_cast<T*>(args.dout) + row * width;
    T* out = args.out == nullptr ? nullptr : static_cast<T*>(args.out) + row * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t n = width - i;
      Vec slope;
      const Vec value = Act::ValueAndSlope(Load(pre + i, n), &slope);
      const Vec dpre = Load(dout + i, n) * slope;
      Store(dout + i, dpre, n);
      if (out != nullptr) Store(out + i, value, n);
      if (db != nullptr) Store(db + i, Load(db + i, n) + dpre, n);
    }
  }
}

template <class T>
void ForwardPart(const ActivationForwardArgs& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::kGeluTanh: return Forward<T, GeluTanh>(args, begin, end);
    case Activation::kGeluErf: return Forward<T, GeluErf>(args, begin, end);
    case Activation::kRelu: return Forward<T, Relu>(args, begin, end);
  }
}

template <class T>
void BackwardPart(const ActivationBackwardArgs& args, float* db, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::kGeluTanh: return Backward<T, GeluTanh>(args, db, begin, end);
    case Activation::kGeluErf: return Backward<T, GeluErf>(args, db, begin, end);
    case Activation::kRelu: return Backward<T, Relu>(args, db, begin, end);
  }
}

#else

namespace peak {

void ActivationForward(const ActivationForwardArgs& args, int threads) {
  const auto part = PEAK_PICK_DTYPE(args.dtype, ForwardPart);
  ParallelParts(args.count, threads, threads,
                [&](int64_t, int64_t begin, int64_t end) { part(args, begin, end); });
}

void ActivationBackward(const ActivationBackwardArgs& args, int threads) {
  const auto rows = PEAK_PICK_DTYPE(args.dtype, BackwardPart);
  if (args.db == nullptr) {
    return ParallelParts(args.rows, threads, threads,
                         [&](int64_t, int64_t begin, int64_t end) { rows(args, nullptr, begin, end); });
  }
  std::vector<float> partial(kParts * args.width);
  ParallelParts(args.rows, kParts, threads, [&](int64_t part, int64_t begin, int64_t end) {
    rows(args, partial.data() + part * args.width, begin, end);
  });
  PEAK_PICK_DTYPE(args.dtype, AddParts)(partial.data(), args.width, args.width, args.db);
}

}  // namespace peak

#endif  // PEAK_ISA
