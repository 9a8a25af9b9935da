#include "rotary.h"

#define PEAK_THIS_FILE "rotary.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

template <class T>
PEAK_INLINE void CopyFeatures(const T* x, T* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i];
}

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

template <class T>
void TurnTokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, rotated = 2 * args.pairs;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % args.tokens;
    const int64_t place = args.positions == nullptr ? token : args.positions[token];
    const float* cos = args.cos + place * args.pairs;
    const float* sin = args.sin + place * args.pairs;
    const T* x_row = static_cast<const T*>(args.x) + row / args.tokens * args.stride_b + token * args.stride_t;
    T* y = static_cast<T*>(args.y) + row * args.heads * width;
    for (int64_t head = 0; head < args.heads; ++head, y += width) {
      const T* x = x_row + head * args.stride_h;
      if (head >= args.turned) {
        CopyFeatures(x, y, width);
        continue;
      }
      if (args.interleaved) {
        TurnNeighbours(x, cos, sin, y, args.pairs);
      } else {
        TurnHalves(x, cos, sin, y, args.pairs);
      }
      CopyFeatures(x + rotated, y + rotated, width - rotated);
    }
  }
}

#else

namespace peak {

void Rotary(const RotaryArgs& args, int threads) {
  const auto turn = PEAK_PICK_DTYPE(args.dtype, TurnTokens);
  ParallelParts(args.batch * args.tokens, threads, threads,
                [&](int64_t, int64_t begin, int64_t end) { turn(args, begin, end); });
}

}  // namespace peak

#endif  // PEAK_ISA
