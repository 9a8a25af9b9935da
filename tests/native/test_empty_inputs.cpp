// Tensors without elements have no address: null goes in, and no kernel may reach for it or divide by its size.
#include "ops/adamw.h"
#include "attention/attention.h"
#include "check.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "gemm/gemm.h"
#include "ops/norm.h"
#include "gemm/quantized.h"
#include "ops/rotary.h"
#include "ops/sum_of_squares.h"

namespace peak::test {
namespace {

PEAK_TEST(nothing_to_do) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int threads : {1, 2}) {
      float zero = 0.0f;
      Adamw({.dtype = dtype, .step = &zero}, threads);
      Check(zero == 1.0f, "step is %g, expected 1", zero);
      CrossEntropyForward({.dtype = dtype, .vocab = 7}, threads);
      CrossEntropyParts({.dtype = dtype, .vocab = 7}, threads);
      CrossEntropyBackward({.dtype = dtype, .vocab = 7, .total = 7}, threads);
      const int64_t seed = 0;
      Dropout({.dtype = dtype, .seed = &seed, .p = 0.5}, threads);
      EmbeddingForward({.dtype = dtype, .width = 8}, threads);
      EmbeddingForward({.dtype = dtype, .batch = 2, .width = 8}, threads);
      EmbeddingBackward({.dtype = dtype, .batch = 2, .width = 8}, threads);
      Gemm({.dtype = dtype, .n = 3, .k = 5}, threads);
      Gemm({.dtype = dtype, .m = 3, .k = 5}, threads);
      LayernormForward({.dtype = dtype}, threads);
      LayernormBackward({.dtype = dtype}, threads);
      LinearQuantized({.dtype = dtype, .bits = 8, .n = 3, .k = 5, .block = 128}, threads);
      LinearQuantized({.dtype = dtype, .rows = 3, .bits = 4, .k = 5, .block = 64}, threads);
      Rotary({.dtype = dtype, .heads = 3, .width = 8, .pairs = 4, .turned = 2}, threads);
      SumOfSquares({.dtype = dtype, .total = &zero}, threads);
      Check(zero == 1.0f, "the sum of nothing is %g, expected 0", zero - 1.0f);
      for (const int64_t queries : {0, 3}) {
        for (const int64_t batch : {0, 1}) {
          if (queries > 0 && batch > 0) continue;
          const AttentionArgs args = {.dtype = dtype, .batch = batch, .queries = queries, .heads = 1, .kv_heads = 1,
                                      .width = 8};
          AttentionForward(args, threads);
          AttentionBackward(args, threads);
        }
      }
    }
  }
}

}  // namespace
}  // namespace peak::test
