// Sum of squares of a buffer, for the global gradient norm (kernels/ops/sum_of_squares.py).
#ifndef PEAK_SUM_OF_SQUARES_H_
#define PEAK_SUM_OF_SQUARES_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct SumOfSquaresArgs {
  DType dtype;
  int64_t count;
  const void* x;
  float* total;  // the sum is added to it
};
PEAK_FIELDS(SumOfSquaresArgs, dtype, count, x, total)

void SumOfSquares(const SumOfSquaresArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_SUM_OF_SQUARES_H_
