// One AdamW step of one tensor, or of many. The formulas are in kernels/ops/adamw.py.
#ifndef PEAK_ADAMW_H_
#define PEAK_ADAMW_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct AdamwArgs {
  DType dtype;  // of param and grad
  int64_t count;
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* step;  // number of updates so far; incremented
  double lr, beta1, beta2, eps, weight_decay;
  int16_t* remainder = nullptr;  // lower half of a bf16 parameter's float32 master; null: a float32 parameter
  const float* norm = nullptr;   // of all gradients; the update is skipped if it is not finite
  double max_norm = 0.0;         // read if norm is given: gradients are clipped to it
  const float* rate = nullptr;   // multiplies lr; null: 1
};
PEAK_FIELDS(AdamwArgs, dtype, count, param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay)
PEAK_OPTIONAL_FIELDS(AdamwArgs, remainder, norm, max_norm, rate)

void Adamw(const AdamwArgs& args, int threads);

// The same for many parameters in one parallel pass: hundreds of small tensors cost no more than a large one.
struct AdamwEachArgs {
  DType dtype;
  int64_t count;         // of parameters
  const int64_t* table;  // (count, 7): the number of elements, then the addresses of param, grad, remainder (0: none),
                         // exp_avg, exp_avg_sq and step
  double lr, beta1, beta2, eps, weight_decay;
  const float* norm = nullptr;
  double max_norm = 0.0;
  const float* rate = nullptr;
};
PEAK_FIELDS(AdamwEachArgs, dtype, count, table, lr, beta1, beta2, eps, weight_decay)
PEAK_OPTIONAL_FIELDS(AdamwEachArgs, norm, max_norm, rate)

void AdamwEach(const AdamwEachArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_ADAMW_H_
