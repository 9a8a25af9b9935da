// LayerNorm and RMSNorm over the last axis, each alone or after a residual addition. The formulas are in
// kernels/ops/norm.py. RMSNorm is LayerNorm with two means set to zero: the mean of x,
// and the mean of g in the backward pass.
#ifndef PEAK_NORM_H_
#define PEAK_NORM_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct NormForwardArgs {
  DType dtype;    // of x, residual, sum and y
  DType w_dtype;  // of w and b
  int64_t rows, width;
  const void* x;
  int64_t x_stride;  // elements between rows; each row is contiguous
  const void* w;     // (width)
  void* y;           // (rows, width)
  float* r;          // (rows): 1 / sqrt(variance + eps)
  float eps;
  float offset = 0.0f;             // added to w
  const void* b = nullptr;         // (width)
  const void* residual = nullptr;  // (rows, width): x + residual is normalized instead of x
  int64_t residual_stride = 0;
  void* sum = nullptr;  // (rows, width): x + residual, rounded; written if residual is given
  float* mu = nullptr;  // (rows): the means; null: RMSNorm
};
PEAK_FIELDS(NormForwardArgs, dtype, w_dtype, rows, width, x, x_stride, w, y, r, eps)
PEAK_OPTIONAL_FIELDS(NormForwardArgs, offset, b, residual, residual_stride, sum, mu)

struct NormBackwardArgs {
  DType dtype, w_dtype;
  int64_t rows, width;
  const void* dy;
  int64_t dy_stride;
  const void* x;  // the input of the norm: x + residual if there is a residual
  int64_t x_stride;
  const void* w;
  const float* r;
  float offset = 0.0f;         // added to w
  const void* dsum = nullptr;  // gradient of the sum output
  int64_t dsum_stride = 0;
  const float* mu = nullptr;  // null: RMSNorm
  void* dx = nullptr;         // (rows, width)
  void* dw = nullptr;         // (width), w_dtype
  void* db = nullptr;         // (width), w_dtype
  bool add_dw = false;        // dw += the gradient of w instead of dw = it
  bool add_db = false;
};
PEAK_FIELDS(NormBackwardArgs, dtype, w_dtype, rows, width, dy, dy_stride, x, x_stride, w, r)
PEAK_OPTIONAL_FIELDS(NormBackwardArgs, offset, dsum, dsum_stride, mu, dx, dw, db, add_dw, add_db)

void NormForward(const NormForwardArgs& args, int threads);
void NormBackward(const NormBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_NORM_H_
