// Rotary position embedding; math in kernels/ops/rotary.py.
#ifndef PEAK_ROTARY_H_
#define PEAK_ROTARY_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

constexpr int64_t kMaxPairs = 512;

struct RotaryArgs {
  DType dtype;
  int64_t batch, tokens, heads, width, pairs;
  int64_t turned;    // of the heads, the first ones; the others are copied
  bool interleaved;  // a pair is features 2i and 2i + 1; else i and i + pairs
  const void* x;     // (batch, tokens, heads, width)
  int64_t stride_b, stride_t, stride_h;  // elements; features themselves are contiguous
  const float* cos;                      // (tokens, pairs)
  const float* sin;
  void* y;  // (batch, tokens, heads, width); may be x
  const int64_t* positions;  // (tokens): rows of cos and sin; or null: token by token
};

void Rotary(const RotaryArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_ROTARY_H_
