// Gather of token and position rows, and its deterministic scatter; math in kernels/ops/embedding.py.
#ifndef PEAK_EMBEDDING_H_
#define PEAK_EMBEDDING_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

struct EmbeddingForwardArgs {
  DType dtype;
  int64_t batch, tokens, width;
  const int64_t* ids;  // (batch, tokens)
  const void* wte;
  int64_t wte_stride;
  const void* wpe;  // row of the first position, or null
  int64_t wpe_stride;
  void* out;  // (batch, tokens, width)
  const int64_t* positions;  // (batch, tokens): rows of wpe counted from its first; or null: token by token
};

struct EmbeddingBackwardArgs {
  DType dtype;
  int64_t batch, tokens, width;
  const int64_t* ids;
  const void* dy;  // (batch, tokens, width)
  void* dwte;      // (vocab, width), or null; added to, as is dwpe
  void* dwpe;      // row of the first position in (positions, width), or null
};

void EmbeddingForward(const EmbeddingForwardArgs& args, int threads);
void EmbeddingBackward(const EmbeddingBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_EMBEDDING_H_
