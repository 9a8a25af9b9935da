// Attention with online softmax; math in kernels/ops/attention.py, layout of the tiles in attention_tiles.h.
#ifndef PEAK_ATTENTION_H_
#define PEAK_ATTENTION_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

// Strides count elements, in the order batch, token, head; the last axis is contiguous.
struct AttentionArgs {
  DType dtype;
  int64_t batch, queries, keys, heads, kv_heads, width;
  const void* q;
  int64_t q_b, q_t, q_h;
  const void* k;
  int64_t k_b, k_t, k_h;
  const void* v;
  int64_t v_b, v_t, v_h;
  const float* alibi;       // (heads) or null
  const int64_t* kv_start;  // (batch) or null: 0
  const int64_t* kv_len;    // (batch) or null: all keys
  const int64_t* cu_seqlens;  // (documents + 1) or null: ascending from 0 to keys, which equal queries
  int64_t documents;
  const void* bias;  // (bias_batch, bias_heads, queries, keys), added to the scores, or null
  DType bias_dtype;
  int64_t bias_batch, bias_heads;  // all, or 1: shared
  int64_t bias_b, bias_h, bias_t, bias_s;
  bool causal;
  int64_t window;  // how many keys a query sees at most; 0: any number
  float scale;
  double dropout;       // probability of dropping a weight
  const int64_t* seed;  // one, read where dropout > 0
  void* out;   // (batch, queries, heads, width)
  float* lse;  // (batch, heads, queries)
  // The backward pass only; a gradient that is not wanted is null, dk and dv are wanted together.
  const void* dout;
  int64_t dout_b, dout_t, dout_h;
  void* dq;
  int64_t dq_b, dq_t, dq_h;
  void* dk;
  int64_t dk_b, dk_t, dk_h;
  void* dv;
  int64_t dv_b, dv_t, dv_h;
  // Where q and k came turned by rotary embedding: dq and dk are turned back, token by token, before they are rounded.
  const float* cos;        // (queries, pairs), as many keys; or null
  const float* minus_sin;  // (queries, pairs)
  int64_t pairs;
  bool interleaved;
  float* dbias;  // (bias_batch, bias_heads, queries, keys) contiguous, zeros on entry
  float* dalibi;       // (heads)
  float* dalibi_rows;  // (3, batch, heads, queries), zeros on entry: what dalibi is made of, for each query
};

void AttentionForward(const AttentionArgs& args, int threads);
void AttentionBackward(const AttentionArgs& args, int threads);

// This thread's workspace, 64-byte aligned; kept between calls, because fresh pages cost more than the work in them.
char* AttentionScratch(int64_t bytes);

}  // namespace peak

#endif  // PEAK_ATTENTION_H_
