// A tensor without elements has a null address. No kernel may read it or divide by its size.
#include "ops/adamw.h"
#include "attention/attention.h"
#include "check.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "gemm/gemm.h"
#include "ops/norm.h"
#include "gemm/quantized.h"
#include "ops/qk_norm.h"
#include "ops/rotary.h"
#include "ops/sum_of_squares.h"

namespace peak::test {
namespace {

PEAK_TEST(kernels_accept_empty_tensors) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int threads : {1, 2}) {
      float zero = 0.0f;
      Adamw({.dtype = dtype, .step = &zero}, threads);
      Check(zero == 1.0f, "step is %g, expected 1", zero);
      CrossEntropyForward({.dtype = dtype, .vocab = 7}, threads);
      CrossEntropyShard({.dtype = dtype, .vocab = 7}, threads);
      CrossEntropyBackward({.dtype = dtype, .vocab = 7, .total = 7}, threads);
      const int64_t seed = 0;
      Dropout({.dtype = dtype, .seed = &seed, .p = 0.5}, threads);
      EmbeddingForward({.dtype = dtype, .width = 8}, threads);
      EmbeddingForward({.dtype = dtype, .batch = 2, .width = 8}, threads);
      EmbeddingBackward({.dtype = dtype, .batch = 2, .width = 8}, threads);
      Gemm({.dtype = dtype, .n = 3, .k = 5}, threads);
      Gemm({.dtype = dtype, .m = 3, .k = 5}, threads);
      NormForward({.dtype = dtype}, threads);
      NormBackward({.dtype = dtype}, threads);
      QKNormForwardArgs no_heads{};
      no_heads.dtype = dtype;
      QKNormForward(no_heads, threads);
      QKNormBackwardArgs no_gradients{};
      no_gradients.dtype = dtype;
      QKNormBackward(no_gradients, threads);
      QuantizedArgs no_rows{}, no_outputs{};
      static_cast<QuantizedMatrix&>(no_rows) = {.dtype = dtype, .bits = 8, .n = 3, .k = 5, .block = 128};
      LinearQuantized(no_rows, threads);
      LinearQuantized(no_rows, nullptr, threads);
      static_cast<QuantizedMatrix&>(no_outputs) = {.dtype = dtype, .bits = 4, .k = 5, .block = 64,
                                                      .scales = Scales::kBf16OfBlocks};
      no_outputs.rows = 3;
      LinearQuantized(no_outputs, threads);
      const float scales[3] = {1.0f, 1.0f, 1.0f};
      std::vector<char> y(9 * 3 * SizeOf(dtype), 1);  // 9 rows: two tiles
      QuantizedArgs no_inputs{};
      static_cast<QuantizedMatrix&>(no_inputs) = {.dtype = dtype, .bits = 8, .n = 3, .block = 128, .scale = scales};
      no_inputs.weight = reinterpret_cast<const uint8_t*>(scales);  // not read
      no_inputs.rows = 9, no_inputs.y = y.data(), no_inputs.y_row = 3;
      LinearQuantized(no_inputs, threads);
      Check(y == std::vector<char>(y.size()), "a product without inputs is not 0");
      Rotary({.dtype = dtype, .heads = 3, .width = 8, .pairs = 4, .rotated_heads = 2}, threads);
      SumOfSquares({.dtype = dtype, .total = &zero}, threads);
      Check(zero == 1.0f, "the sum of nothing is %g, expected 0", zero - 1.0f);
      for (const int64_t queries : {0, 3}) {
        for (const int64_t batch : {0, 1}) {
          if (queries > 0 && batch > 0) continue;
          const AttentionProblem problem = {
              .dtype = dtype, .batch = batch, .queries = queries, .heads = 1, .kv_heads = 1, .width = 8};
          AttentionForwardArgs forward{};
          static_cast<AttentionProblem&>(forward) = problem;
          AttentionForward(forward, threads);
          AttentionBackwardArgs backward{};
          static_cast<AttentionProblem&>(backward) = problem;
          AttentionBackward(backward, threads);
        }
      }
    }
  }
}

}  // namespace
}  // namespace peak::test
