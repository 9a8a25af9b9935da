#include "ops/rotary.h"

#define PEAK_THIS_FILE "ops/rotary.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "ops/rotate_head.h"

// x may be y, with nothing to do.
template <class T>
PEAK_INLINE void CopyFeatures(const T* x, T* y, int64_t count) {
  if (x != y) std::memcpy(y, x, count * sizeof(T));
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
      TurnHead(x, cos, sin, y, args.pairs, args.interleaved);
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
