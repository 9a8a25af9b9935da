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

// The same for many tensors in one parallel pass. The bits are those of one buffer in which every tensor starts at a
// multiple of kSumAlign elements and zeros fill the gaps.
constexpr int64_t kSumAlign = 64;

struct SumOfSquaresEachArgs {
  DType dtype;
  int64_t count;         // of tensors
  const int64_t* table;  // (count, 2): the number of elements and the address
  float* total;
};
PEAK_FIELDS(SumOfSquaresEachArgs, dtype, count, table, total)

void SumOfSquaresEach(const SumOfSquaresEachArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_SUM_OF_SQUARES_H_
