// Rotary embedding of one head: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. Included once per instruction set, after
// simd/simd.h, by ops/rotary.cpp and by the backward pass of attention, which inverts the rotation with -sin.

template <class T>
PEAK_INLINE void RotateHalves(const T* x, const float* cos, const float* sin, T* y, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t n = pairs - i;
    const Vec x1 = Load(x + i, n), x2 = Load(x + pairs + i, n), c = Load(cos + i, n), s = Load(sin + i, n);
    Store(y + i, Fnma(x2, s, x1 * c), n);
    Store(y + pairs + i, Fma(x1, s, x2 * c), n);
  }
}

// Works in float32 on the stack, so that the compiler uses plain shuffles.
template <class T>
PEAK_INLINE void RotateInterleaved(const T* x, const float* cos, const float* sin, T* y, int64_t pairs) {
  float features[2 * kMaxPairs], rotated[2 * kMaxPairs];
  for (int64_t i = 0; i < 2 * pairs; i += kLanes) Store(features + i, Load(x + i, 2 * pairs - i), 2 * pairs - i);
  for (int64_t i = 0; i < pairs; ++i) {
    const float x1 = features[2 * i], x2 = features[2 * i + 1];
    rotated[2 * i] = x1 * cos[i] - x2 * sin[i];
    rotated[2 * i + 1] = x2 * cos[i] + x1 * sin[i];
  }
  for (int64_t i = 0; i < 2 * pairs; i += kLanes) Store(y + i, Load(rotated + i, 2 * pairs - i), 2 * pairs - i);
}

// Rotates the first 2 * pairs features of x to y, which may be x.
template <class T>
PEAK_INLINE void RotateHead(const T* x, const float* cos, const float* sin, T* y, int64_t pairs, bool interleaved) {
  if (interleaved) {
    RotateInterleaved(x, cos, sin, y, pairs);
  } else {
    RotateHalves(x, cos, sin, y, pairs);
  }
}
