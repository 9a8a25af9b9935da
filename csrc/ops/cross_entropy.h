// Softmax cross-entropy over a block of logits, turned into its gradient in place; math in
// kernels/ops/linear_cross_entropy.py.
#ifndef PEAK_CROSS_ENTROPY_H_
#define PEAK_CROSS_ENTROPY_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

struct CrossEntropyForwardArgs {
  DType dtype;
  int64_t rows, vocab;
  void* logits;           // (rows, vocab) contiguous
  const int64_t* target;  // (rows)
  const float* weight;    // (rows), or null: 1
  int64_t ignore_index;
  float* loss;           // (rows), without its weight; 0 where ignored
  float* stats;          // (rows, 2): the largest logit m, and the sum of e^(z - m); 0 where ignored
  bool with_gradient;    // then logits become the gradient of scale * sum(weight * loss)
  float scale, smoothing, z_loss;
};

// Of a shard of the vocabulary: its logits are those of [first, first + vocab), and the targets count over all shards.
struct CrossEntropyPartsArgs {
  DType dtype;
  int64_t rows, vocab;
  void* logits;           // (rows, vocab) contiguous, left as they are
  const int64_t* target;  // (rows)
  int64_t ignore_index, first;
  int64_t width;  // 4, or 3 without the last:
  float* parts;   // (rows, width): both stats of these logits alone, the target's logit or 0 where another shard has it,
                  // the sum of the logits; 0 where ignored
};

struct CrossEntropyBackwardArgs {
  DType dtype;
  int64_t rows, vocab;
  void* logits;  // (rows, vocab), becomes the gradient
  const int64_t* target;
  int64_t ignore_index;
  const float* stats;  // (rows, 2), from forward
  const float* dloss;  // (rows), times the weight
  float smoothing, z_loss;
  int64_t first, total;  // of a shard of `total` logits a row, as above; 0 and vocab where there is one
};

void CrossEntropyForward(const CrossEntropyForwardArgs& args, int threads);
void CrossEntropyParts(const CrossEntropyPartsArgs& args, int threads);
void CrossEntropyBackward(const CrossEntropyBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_CROSS_ENTROPY_H_
