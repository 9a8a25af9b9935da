// Dropout with a counter-based mask. The formulas are in kernels/ops/dropout.py.
#ifndef PEAK_DROPOUT_H_
#define PEAK_DROPOUT_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct DropoutArgs {
  DType dtype;
  int64_t count;
  const void* x;        // (count)
  const int64_t* seed;  // one element
  double p;             // probability of dropping an element
  void* y;              // (count)
};
PEAK_FIELDS(DropoutArgs, dtype, count, x, seed, p, y)

void Dropout(const DropoutArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_DROPOUT_H_
