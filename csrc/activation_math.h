// Activations and their slopes, over Vec. Included once per set, after simd.h.

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
