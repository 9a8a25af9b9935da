// RMSNorm of queries and keys and their rotary embedding, in one pass. The formulas are in kernels/ops/qk_norm.py.
#ifndef PEAK_QK_NORM_H_
#define PEAK_QK_NORM_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

// The inputs of both passes. A head of x is contiguous.
struct QKNormProblem {
  DType dtype;    // of x, y and their gradients
  DType w_dtype;  // of both weights
  int64_t batch, tokens, q_heads, k_heads, width;
  bool joint;  // one mean for all query heads of a token and one for its key heads; else one for each head
  StridedInput x;      // (batch, tokens, q_heads + k_heads, width)
  const void* q_norm;  // (width), or (q_heads * width) if joint
  const void* k_norm;  // (width), or (k_heads * width) if joint
  float offset;        // added to the weights
  const float* cos = nullptr;  // as in ops/rotary.h; null: no rotation
  const float* sin = nullptr;  // -sin in the backward pass
  int64_t pairs = 0;
  bool interleaved = false;

  int64_t Heads() const { return q_heads + k_heads; }
  int64_t Means() const { return joint ? 2 : Heads(); }  // of a token
  // The number of heads from `head` on that share a mean.
  int64_t SharedHeads(int64_t head) const { return !joint ? 1 : head == 0 ? q_heads : k_heads; }
  // The weights of a head in the concatenation of both.
  int64_t WeightAt(int64_t head) const { return joint ? head * width : head < q_heads ? 0 : width; }
  int64_t QWeights() const { return joint ? q_heads * width : width; }
  int64_t KWeights() const { return joint ? k_heads * width : width; }
};
PEAK_FIELDS(QKNormProblem, dtype, w_dtype, batch, tokens, q_heads, k_heads, width, joint, x, q_norm, k_norm, offset)
PEAK_OPTIONAL_FIELDS(QKNormProblem, cos, sin, pairs, interleaved)

struct QKNormForwardArgs : QKNormProblem {
  using Base = QKNormProblem;
  float eps;
  StridedOutput y;     // may be x
  float* r = nullptr;  // (batch, tokens, Means()): 1 / sqrt(mean square + eps); null: not written
  const int64_t* positions = nullptr;  // (tokens): rows of cos and sin; null: token t takes row t
};
PEAK_FIELDS(QKNormForwardArgs, eps, y)
PEAK_OPTIONAL_FIELDS(QKNormForwardArgs, r, positions)

struct QKNormBackwardArgs : QKNormProblem {
  using Base = QKNormProblem;
  const float* r;
  StridedInput dy;
  StridedOutput dx;          // may be dy; null: not computed
  void* dq_norm = nullptr;   // shape and dtype of q_norm
  void* dk_norm = nullptr;
};
PEAK_FIELDS(QKNormBackwardArgs, r, dy)
PEAK_OPTIONAL_FIELDS(QKNormBackwardArgs, dx, dq_norm, dk_norm)

void QKNormForward(const QKNormForwardArgs& args, int threads);
void QKNormBackward(const QKNormBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_QK_NORM_H_
