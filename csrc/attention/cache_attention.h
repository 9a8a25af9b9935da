// Attention of new tokens over a paged KV cache and over themselves. Queries, new keys and values and the result are
// float32. The cache stores keys and values in its dtype, for the new tokens too. Where an instruction multiplies pairs of
// bf16, queries and weights are rounded before a product; elsewhere they are not.
//
// The result of a query depends on the query and its keys only, to the last bit: blocks of kCacheBlock keys, counted
// from the first key of the sequence, are taken in order, and every sum inside a block has one order. It does not
// depend on the number of queries in a step, on the other sequences of the batch, on the place of the blocks or on the
// threads.
#ifndef PEAK_CACHE_ATTENTION_H_
#define PEAK_CACHE_ATTENTION_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

constexpr int64_t kCacheBlock = 64;       // keys in a block
constexpr int64_t kMaxCacheWidth = 256;  // features of a head

// A block holds, for each key head, keys as [width / n][key][n] and values as [key / n][width][n]. n is 2 if the
// instruction set multiplies pairs of bf16, else 1: the products read whole vectors of both. Up to 64 bytes after the
// last block are read.
//
// In an int8 cache each head of each token has a scale: its largest absolute value over 127 (kernels/ops/cache_store.py
// has the rules). The bytes of kCacheBlock tokens lie as above and their scales follow. A block is converted to floats
// when it is read, into memory that stays in the first-level cache; the scales multiply scores and weights.
struct CacheAttentionArgs {
  DType dtype;  // of the cache, unless it is int8
  int64_t heads, kv_heads, width;
  int64_t sequences;
  const int64_t* begins;  // (sequences + 1), ascending: first row of each sequence
  const int64_t* past;    // (sequences): tokens in the cache
  const int32_t* tables;  // (sequences, table_row): block numbers
  int64_t table_row;
  const float* q;  // (rows, heads, width), rows q_row elements apart, as are those of k and v
  const float* k;  // (rows, kv_heads, width)
  const float* v;
  int64_t q_row;
  bool int8_cache;
  void* keys;  // (blocks, kv_heads, kCacheBlock * width) of this layer; int8: kCacheBlock * (width + 4) bytes
  void* values;
  int64_t window;  // number of keys that a query sees at most; 0: no limit
  float scale;
  const float* alibi;  // (heads), or null
  float* out;          // (rows, heads, width)
  float softcap = 0.0f;          // limit of the scaled products; 0: none
  const float* sinks = nullptr;  // (heads): a logit without a value, which joins the softmax of each query
};

// Bytes of the keys, or of the values, of one head in one block.
inline int64_t CacheHeadBytes(const CacheAttentionArgs& args) {
  const int64_t scale = static_cast<int64_t>(sizeof(float));
  return kCacheBlock * (args.int8_cache ? args.width + scale : args.width * SizeOf(args.dtype));
}

// Stores k and v in the cache and computes out, for a team (base/parallel.h) with a common scratch of
// CacheAttentionScratch bytes.
void CacheAttention(const CacheAttentionArgs& args, char* scratch, int threads);
int64_t CacheAttentionScratch(int64_t width, int threads);

}  // namespace peak

#endif  // PEAK_CACHE_ATTENTION_H_
