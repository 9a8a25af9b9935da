// How the features of one head are turned: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. Included once per set, after
// simd.h, by rotary.cpp and by attention's backward, which turns gradients back by tables with -sin.

template <class T>
PEAK_INLINE void TurnHalves(const T* x, const float* cos, const float* sin, T* y, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t n = pairs - i;
    const Vec x1 = Load(x + i, n), x2 = Load(x + pairs + i, n), c = Load(cos + i, n), s = Load(sin + i, n);
    Store(y + i, Fnma(x2, s, x1 * c), n);
    Store(y + pairs + i, Fma(x1, s, x2 * c), n);
  }
}

// In float32 on the stack, where the compiler sees plain shuffles.
template <class T>
PEAK_INLINE void TurnNeighbours(const T* x, const float* cos, const float* sin, T* y, int64_t pairs) {
  float features[2 * kMaxPairs], turned[2 * kMaxPairs];
  for (int64_t i = 0; i < 2 * pairs; i += kLanes) Store(features + i, Load(x + i, 2 * pairs - i), 2 * pairs - i);
  for (int64_t i = 0; i < pairs; ++i) {
    const float x1 = features[2 * i], x2 = features[2 * i + 1];
    turned[2 * i] = x1 * cos[i] - x2 * sin[i];
    turned[2 * i + 1] = x2 * cos[i] + x1 * sin[i];
  }
  for (int64_t i = 0; i < 2 * pairs; i += kLanes) Store(y + i, Load(turned + i, 2 * pairs - i), 2 * pairs - i);
}

// The first 2 pairs features of x into y, which may be x.
template <class T>
PEAK_INLINE void TurnHead(const T* x, const float* cos, const float* sin, T* y, int64_t pairs, bool interleaved) {
  if (interleaved) {
    TurnNeighbours(x, cos, sin, y, pairs);
  } else {
    TurnHalves(x, cos, sin, y, pairs);
  }
}
