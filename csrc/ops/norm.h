// LayerNorm or RMSNorm over the last axis, alone or after a residual addition; math in kernels/ops/layernorm.py and
// kernels/ops/rmsnorm.py. RMSNorm is the same with means of zero: of x, and of g in the backward pass.
#ifndef PEAK_LAYERNORM_H_
#define PEAK_LAYERNORM_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

struct LayernormForwardArgs {
  DType dtype;    // of x, residual, sum, y
  DType w_dtype;  // of w and b
  int64_t rows, width;
  const void* x;
  int64_t x_stride;      // elements between rows; rows themselves are contiguous
  const void* residual;  // or null: then sum is not written
  int64_t residual_stride;
  const void* w;
  const void* b;  // or null
  void* sum;      // (rows, width): x + residual, rounded; what is normalised
  void* y;        // (rows, width)
  float* mu;      // (rows), or null for RMSNorm
  float* r;       // (rows)
  float eps;
};

struct LayernormBackwardArgs {
  DType dtype, w_dtype;
  int64_t rows, width;
  const void* dy;
  int64_t dy_stride;
  const void* dsum;  // gradient that reached the sum, or null
  int64_t dsum_stride;
  const void* x;  // what was normalised
  int64_t x_stride;
  const void* w;
  const float* mu;  // or null for RMSNorm
  const float* r;
  void* dx;  // (rows, width), or null
  void* dw;  // (width), or null; w_dtype
  void* db;  // (width), or null
};

void LayernormForward(const LayernormForwardArgs& args, int threads);
void LayernormBackward(const LayernormBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_LAYERNORM_H_
