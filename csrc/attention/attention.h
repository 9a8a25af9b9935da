// Attention with online softmax. The formulas are in kernels/ops/attention.py, the layout of the tiles is in
// attention/tiles.h.
#ifndef PEAK_ATTENTION_H_
#define PEAK_ATTENTION_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

// The inputs of both passes.
struct AttentionProblem {
  DType dtype;
  int64_t batch, queries, keys, heads, kv_heads, width;
  StridedInput q, k, v;
  bool causal;
  float scale;
  int64_t window = 0;                   // number of keys that a query sees at most; 0: no limit
  float softcap = 0.0f;                 // limit of the scaled products, before the other terms; 0: none
  const float* alibi = nullptr;         // (heads): slopes
  const float* sinks = nullptr;         // (heads): a logit without a value, which joins the softmax of each query
  const int64_t* kv_start = nullptr;    // (batch): the first key of each sequence; null: 0
  const int64_t* kv_len = nullptr;      // (batch): the number of keys of each sequence; null: all
  const int64_t* cu_seqlens = nullptr;  // (documents + 1): ascending from 0 to keys; then queries equal keys
  int64_t documents = 0;
  const void* bias = nullptr;  // (bias_batch, bias_heads, queries, keys): added to the scores
  DType bias_dtype = DType::kFloat32;
  int64_t bias_batch = 0, bias_heads = 0;  // 1: one bias for all
  int64_t bias_stride_b = 0, bias_stride_h = 0, bias_stride_t = 0, bias_stride_s = 0;
  double dropout = 0.0;           // probability of dropping a weight
  const int64_t* seed = nullptr;  // one element, read if dropout > 0
};
PEAK_FIELDS(AttentionProblem, dtype, batch, queries, keys, heads, kv_heads, width, q, k, v, causal, scale)
PEAK_OPTIONAL_FIELDS(AttentionProblem, window, softcap, alibi, sinks, kv_start, kv_len, cu_seqlens, documents, bias,
                     bias_dtype, bias_batch, bias_heads, bias_stride_b, bias_stride_h, bias_stride_t, bias_stride_s,
                     dropout, seed)

struct AttentionForwardArgs : AttentionProblem {
  using Base = AttentionProblem;
  void* out;   // (batch, queries, heads, width)
  float* lse;  // (batch, heads, queries): log of the sum of e^score, with the sink
};
PEAK_FIELDS(AttentionForwardArgs, out, lse)

// A null gradient is not computed. dk and dv are given together or not at all.
struct AttentionBackwardArgs : AttentionProblem {
  using Base = AttentionProblem;
  const void* out;   // out and lse: the results of the forward pass
  const float* lse;
  StridedInput dout;
  StridedOutput dq, dk, dv;
  // Given if rotary embedding made q and k: dq and dk become the gradients of the inputs of the rotary embedding.
  const float* cos = nullptr;        // (queries, pairs); queries equal keys
  const float* minus_sin = nullptr;  // (queries, pairs)
  int64_t pairs = 0;
  bool interleaved = false;
  float* dbias = nullptr;        // (bias_batch, bias_heads, queries, keys) contiguous, zeros on entry
  float* dalibi = nullptr;       // (heads)
  float* dalibi_rows = nullptr;  // (3, batch, heads, queries), zeros on entry: workspace for dalibi
  float* dsinks = nullptr;       // (heads)
  float* dsinks_rows = nullptr;  // (batch, heads, queries): workspace for dsinks
};
PEAK_FIELDS(AttentionBackwardArgs, out, lse, dout)
PEAK_OPTIONAL_FIELDS(AttentionBackwardArgs, dq, dk, dv, cos, minus_sin, pairs, interleaved, dbias, dalibi, dalibi_rows,
                     dsinks, dsinks_rows)

void AttentionForward(const AttentionForwardArgs& args, int threads);
void AttentionBackward(const AttentionBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_ATTENTION_H_
