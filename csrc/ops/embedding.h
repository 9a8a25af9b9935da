// Sum of token and position embeddings, and its deterministic backward pass (kernels/ops/embedding.py).
#ifndef PEAK_EMBEDDING_H_
#define PEAK_EMBEDDING_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct EmbeddingForwardArgs {
  DType dtype;
  int64_t batch, tokens, width;
  const int64_t* ids;  // (batch, tokens)
  const void* wte;     // (vocabulary, width)
  int64_t wte_stride;  // elements between rows
  void* out;           // (batch, tokens, width)
  const void* wpe = nullptr;  // row of the first position; null: no position embedding
  int64_t wpe_stride = 0;
};
PEAK_FIELDS(EmbeddingForwardArgs, dtype, batch, tokens, width, ids, wte, wte_stride, out)
PEAK_OPTIONAL_FIELDS(EmbeddingForwardArgs, wpe, wpe_stride)

struct EmbeddingBackwardArgs {
  DType dtype;
  int64_t batch, tokens, width;
  const int64_t* ids;
  const void* dy;        // (batch, tokens, width)
  void* dwte = nullptr;  // (vocabulary, width); the gradient is added to it
  void* dwpe = nullptr;  // row of the first position in (positions, width); the gradient is added to it
};
PEAK_FIELDS(EmbeddingBackwardArgs, dtype, batch, tokens, width, ids, dy)
PEAK_OPTIONAL_FIELDS(EmbeddingBackwardArgs, dwte, dwpe)

void EmbeddingForward(const EmbeddingForwardArgs& args, int threads);
void EmbeddingBackward(const EmbeddingBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_EMBEDDING_H_
