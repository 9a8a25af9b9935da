// Softmax cross-entropy over a block of logits, which are overwritten by their gradient. The formulas are in
// kernels/ops/linear_cross_entropy.py. m is the largest logit of a row and l the sum of e^(logit - m).
#ifndef PEAK_CROSS_ENTROPY_H_
#define PEAK_CROSS_ENTROPY_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct CrossEntropyForwardArgs {
  DType dtype;
  int64_t rows, vocab;
  void* logits;           // (rows, vocab) contiguous
  const int64_t* target;  // (rows)
  int64_t ignore_index;
  float* loss;         // (rows), not multiplied by weight; 0 for an ignored row
  float* stats;        // (rows, 2): m and l; 0 for an ignored row
  bool with_gradient;  // overwrite the logits with the gradient of scale * sum(weight * loss)
  float smoothing, z_loss;
  const float* scale = nullptr;   // one number; null: 1
  const float* weight = nullptr;  // (rows); null: 1
  float softcap = 0.0f;           // limit of the logits, see kernels/ops/linear_cross_entropy.py; 0: none
};
PEAK_FIELDS(CrossEntropyForwardArgs, dtype, rows, vocab, logits, target, ignore_index, loss, stats, with_gradient,
            smoothing, z_loss)
PEAK_OPTIONAL_FIELDS(CrossEntropyForwardArgs, scale, weight, softcap)

// One shard of the vocabulary: its logits are those of the classes [first, first + vocab). Targets are global classes.
struct CrossEntropyShardArgs {
  DType dtype;
  int64_t rows, vocab;
  const void* logits;     // (rows, vocab) contiguous
  const int64_t* target;  // (rows)
  int64_t ignore_index, first;
  int64_t width;  // of parts: 4, or 3 without the sum of the logits
  float* parts;   // (rows, width): m and l of this shard, the target's logit or 0 if it is in another shard, the sum of
                  // the logits; 0 for an ignored row
  float softcap = 0.0f;
};
PEAK_FIELDS(CrossEntropyShardArgs, dtype, rows, vocab, logits, target, ignore_index, first, width, parts)
PEAK_OPTIONAL_FIELDS(CrossEntropyShardArgs, softcap)

struct CrossEntropyBackwardArgs {
  DType dtype;
  int64_t rows, vocab;
  void* logits;  // (rows, vocab), overwritten by the gradient
  const int64_t* target;
  int64_t ignore_index;
  const float* stats;  // (rows, 2), from the forward pass
  const float* dloss;  // (rows), multiplied by the weight
  float smoothing, z_loss;
  int64_t first, total;  // of a shard: its first class, and the number of all classes; else 0 and vocab
  float softcap = 0.0f;
};
PEAK_FIELDS(CrossEntropyBackwardArgs, dtype, rows, vocab, logits, target, ignore_index, stats, dloss, smoothing, z_loss,
            first, total)
PEAK_OPTIONAL_FIELDS(CrossEntropyBackwardArgs, softcap)

void CrossEntropyForward(const CrossEntropyForwardArgs& args, int threads);
void CrossEntropyShard(const CrossEntropyShardArgs& args, int threads);
void CrossEntropyBackward(const CrossEntropyBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_CROSS_ENTROPY_H_
