#include "ops/rotary.h"

#define PEAK_THIS_FILE "ops/rotary.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "ops/rotate_head.h"

// x may be y.
template <class T>
PEAK_INLINE void CopyFeatures(const T* x, T* y, int64_t count) {
  if (x != y) std::memcpy(y, x, count * sizeof(T));
}

template <class T>
void RotateTokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width, rotated = 2 * args.pairs;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % args.tokens;
    const int64_t position = args.positions == nullptr ? token : args.positions[token];
    const float* cos = args.cos + position * args.pairs;
    const float* sin = args.sin + position * args.pairs;
    const T* x_row = static_cast<const T*>(args.x.data) + row / args.tokens * args.x.stride_b + token * args.x.stride_t;
    T* y = static_cast<T*>(args.y) + row * args.heads * width;
    for (int64_t head = 0; head < args.heads; ++head, y += width) {
      const T* x = x_row + head * args.x.stride_h;
      if (head >= args.rotated_heads) {
        CopyFeatures(x, y, width);
        continue;
      }
      RotateHead(x, cos, sin, y, args.pairs, args.interleaved);
      CopyFeatures(x + rotated, y + rotated, width - rotated);
    }
  }
}

#else

namespace peak {

void Rotary(const RotaryArgs& args, int threads) {
  const auto rotate = PEAK_PICK_DTYPE(args.dtype, RotateTokens);
  ParallelRanges(args.batch * args.tokens, GrainRows(args.heads * args.width * SizeOf(args.dtype)), threads,
                [&](int64_t begin, int64_t end) { rotate(args, begin, end); });
}

}  // namespace peak

#endif  // PEAK_ISA
