// Rotary position embedding. The formulas are in kernels/ops/rotary.py.
#ifndef PEAK_ROTARY_H_
#define PEAK_ROTARY_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

constexpr int64_t kMaxPairs = 512;

struct RotaryArgs {
  DType dtype;
  int64_t batch, tokens, heads, width;
  int64_t pairs;          // half the number of rotated features of a head
  int64_t rotated_heads;  // the first heads are rotated, the others are copied
  bool interleaved;       // a pair is features 2i and 2i + 1; else i and i + pairs
  StridedInput x;
  const float* cos;  // (tokens, pairs), or (positions, pairs) if positions are given
  const float* sin;
  void* y;  // (batch, tokens, heads, width) contiguous; may be x
  const int64_t* positions = nullptr;  // (tokens): rows of cos and sin; null: token t takes row t
};
PEAK_FIELDS(RotaryArgs, dtype, batch, tokens, heads, width, pairs, rotated_heads, interleaved, x, cos, sin, y)
PEAK_OPTIONAL_FIELDS(RotaryArgs, positions)

void Rotary(const RotaryArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_ROTARY_H_
