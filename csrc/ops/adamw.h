// One AdamW step over a flat buffer; math in kernels/ops/adamw.py.
#ifndef PEAK_ADAMW_H_
#define PEAK_ADAMW_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

struct AdamwArgs {
  DType dtype;  // of param and grad
  int64_t count;
  void* param;
  const void* grad;
  int16_t* remainder;  // of bf16 param's float32 master; null: param is float32 and its own master
  float* exp_avg;
  float* exp_avg_sq;
  float* step;        // updates made so far; incremented
  const float* norm;  // of all gradients, or null; where it is not finite nothing happens
  double lr, beta1, beta2, eps, weight_decay, max_norm;
};

void Adamw(const AdamwArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_ADAMW_H_
