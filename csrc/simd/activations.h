// Activations and their derivatives (slopes) of Vecs. Included once per instruction set, after simd.h.

// A gated layer computes h = Act::Value(gate) Act::Up(up). UpSlope is d Up'(up). This is Up of most activations.
struct PlainUp {
  static PEAK_INLINE Vec Up(Vec up) { return up; }
  static PEAK_INLINE Vec UpSlope(Vec, Vec d) { return d; }
};

// x/2 (1 + tanh u) = x s with s = 1 / (1 + 2^t), t = -2 u log2 e: no cancellation in the left tail.
// u = k (x + 0.044715 x^3), k = sqrt(2 / pi). The precision is that of T, the type of the operands. V is Vec or Many.
template <class T>
struct GeluTanh : PlainUp {
  template <class V>
  static PEAK_INLINE V Gate(const V& x, const V& square) {
    const V t = x * Fma(square, Set(-0.1029432396f), Set(-2.3022081981f));
    return Reciprocal<T>(Exp2<T>(t) + Set(1.0f));
  }
  template <class V>
  static PEAK_INLINE V Value(const V& x) {
    return x * Gate(x, x * x);
  }
  // Returns act(x); slope = s + x s (1 - s) 2 u'.
  template <class V>
  static PEAK_INLINE V ValueAndSlope(const V& x, V* slope) {
    const V square = Min(Set(1e18f), x * x), s = Gate(x, square);  // finite, because infinity times 0 is NaN
    const V du2 = Fma(square, Set(6.0f * 0.7978845608f * 0.044715f), Set(2.0f * 0.7978845608f)), value = x * s;
    *slope = Fma(Fnma(value, s, value), du2, s);
    return value;
  }
};

struct GeluErf : PlainUp {
  static PEAK_INLINE Vec Cdf(Vec x) { return Fma(Erf(x * Set(0.70710678118f)), Set(0.5f), Set(0.5f)); }
  static PEAK_INLINE Vec Value(Vec x) { return x * Cdf(x); }
  // slope = Phi(x) + x phi(x).
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    const Vec cdf = Cdf(x);
    *slope = Fma(x * Set(0.3989422804f), Exp(x * x * Set(-0.5f)), cdf);
    return x * cdf;
  }
};

struct Relu : PlainUp {
  static PEAK_INLINE Vec Value(Vec x) { return Max(Set(0.0f), x); }
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    *slope = Select(Greater(x, Set(0.0f)), Set(1.0f), Set(0.0f));
    return Value(x);
  }
};

// x s with s = 1 / (1 + e^-x); slope = s + x s (1 - s).
template <class T>
struct Silu : PlainUp {
  static PEAK_INLINE Vec Gate(Vec x) { return Reciprocal<T>(Exp2<T>(x * Set(-1.4426950409f)) + Set(1.0f)); }
  static PEAK_INLINE Vec Value(Vec x) { return x * Gate(x); }
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    const Vec s = Gate(x), value = x * s;
    *slope = Fnma(value, s, s + value);
    return value;
  }
};

// The clamped SwiGLU (kernels/ops/mlp.py). Act is of a = min(gate, limit): a s with s = 1 / (1 + e^(-alpha a)), slope =
// s + alpha a s (1 - s) up to the limit. Up is 1 + up, with up clamped to +-limit. NaN stays NaN.
template <class T>
struct ClampedSwiglu {
  static constexpr float kLimit = 7.0f, kAlpha = 1.702f;
  static PEAK_INLINE Vec Gate(Vec a) { return Reciprocal<T>(Exp2<T>(a * Set(-1.4426950409f * kAlpha)) + Set(1.0f)); }
  static PEAK_INLINE Vec Value(Vec x) {
    const Vec a = Min(Set(kLimit), x);
    return a * Gate(a);
  }
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    const Vec a = Min(Set(kLimit), x), s = Gate(a), value = a * s;
    *slope = Select(Greater(x, Set(kLimit)), Set(0.0f), Fma(Fnma(value, s, value), Set(kAlpha), s));
    return value;
  }
  static PEAK_INLINE Vec Up(Vec up) { return Max(Set(-kLimit), Min(Set(kLimit), up)) + Set(1.0f); }
  static PEAK_INLINE Vec UpSlope(Vec up, Vec d) { return Select(Greater(Abs(up), Set(kLimit)), Set(0.0f), d); }
};

// tanh(x) with a relative error of 2e-7: x + x^3 P(x^2) near 0, 1 - 2 g outside, with g = 1 / (1 + e^(2 |x|)); P is that
// of S. Moshier's Cephes, tanhf. slope = 4 g (1 - g), with a relative error of 3e-6 up to |x| = 12. An infinity gives 1
// with its sign, NaN stays NaN.
struct Tanh {
  static PEAK_INLINE Vec Gate(Vec x) { return Reciprocal<float>(Exp2<float>(Abs(x) * Set(2.8853900818f)) + Set(1.0f)); }
  static PEAK_INLINE Vec Value(Vec x, Vec gate) {
    const Vec square = x * x;
    Vec near = Set(-5.70498872745e-3f);
    near = Fma(near, square, Set(2.06390887954e-2f));
    near = Fma(near, square, Set(-5.37397155531e-2f));
    near = Fma(near, square, Set(1.33314422036e-1f));
    near = Fma(near, square, Set(-3.33332819422e-1f));
    near = Fma(near * square, x, x);
    return Select(Greater(Abs(x), Set(0.625f)), CopySign(Fma(gate, Set(-2.0f), Set(1.0f)), x), near);
  }
  static PEAK_INLINE Vec Value(Vec x) { return Value(x, Gate(x)); }
  static PEAK_INLINE Vec ValueAndSlope(Vec x, Vec* slope) {
    const Vec gate = Gate(x);
    *slope = gate * Set(4.0f) * (Set(1.0f) - gate);
    return Value(x, gate);
  }
};
