// Backward of a linear layer with a quantized weight (gemm/quantized.h). The weight is frozen, and the rounding Q of the
// inputs counts as the identity:
//
//   y = act(pre), pre = Q(x) W^T + b      dpre = dy act'(pre)      dx = dpre W
#ifndef PEAK_QUANTIZED_BACKWARD_H_
#define PEAK_QUANTIZED_BACKWARD_H_

#include <cstdint>

#include "base/fields.h"
#include "gemm/quantized.h"

namespace peak {

struct QuantizedBackwardArgs : QuantizedMatrix {
  using Base = QuantizedMatrix;
  int64_t rows;
  const void* dpre;           // (rows, n)
  void* dx;                   // (rows, k)
  void* unordered = nullptr;  // (rows, k): scratch for dx in the order of the weight's inputs, if `order` is given
};
PEAK_FIELDS(QuantizedBackwardArgs, rows, dpre, dx)
PEAK_OPTIONAL_FIELDS(QuantizedBackwardArgs, unordered)

void QuantizedBackward(const QuantizedBackwardArgs& args, int threads);

// dpre = dy act'(pre), element by element.
struct ActivationBackwardArgs {
  DType dtype;
  int64_t count;
  int activation;  // an Activation (gemm/gemm.h)
  const void* dy;
  const void* pre;
  void* dpre;
};
PEAK_FIELDS(ActivationBackwardArgs, dtype, count, activation, dy, pre, dpre)

void ActivationBackward(const ActivationBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_QUANTIZED_BACKWARD_H_
