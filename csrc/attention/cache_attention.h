// Attention of new tokens to the keys and values of all before them, which lie in blocks of a cache, and to themselves.
//
// One query's result is a function of its own query and keys alone, to the last bit: blocks of kCacheBlock keys, counted
// from the sequence's first, are taken in order, and inside of one every sum has one order. So it does not matter how
// many queries come at once, what else is in the batch, where a sequence's blocks lie, nor how many threads there are.
#ifndef PEAK_CACHE_ATTENTION_H_
#define PEAK_CACHE_ATTENTION_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

constexpr int64_t kCacheBlock = 64;  // keys
constexpr int64_t kCacheWidth = 256;  // of a head, at most

// A block holds, for each key head, keys as [width / n][key][n] and values as [key / n][width][n] with n = 2 where the
// set multiplies bf16 pairs, else 1: the products read both by the vector. 64 bytes beyond the last block are read.
//
// In bytes each head of each token has a scale, the largest size in it over 127 (kernels/ops/cache_store.py has the rules).
// The bytes of kCacheBlock tokens lie as above, then their scales. They are widened a block at a time, which the first
// cache holds; scales multiply scores and weights.
struct CacheAttentionArgs {
  DType dtype;
  int64_t heads, kv_heads, width;
  int64_t sequences;
  const int64_t* begins;  // (sequences + 1), ascending: rows of each one's new tokens
  const int64_t* past;    // (sequences): tokens before those
  const int32_t* tables;  // (sequences, table_row): numbers of their blocks
  int64_t table_row;
  const void* q;  // (rows, heads, width), rows q_row apart, as are those of k and v
  const void* k;  // (rows, kv_heads, width)
  const void* v;
  int64_t q_row;
  bool bytes;  // in the cache
  void* keys;  // (blocks, kv_heads, kCacheBlock x width), this layer's; of bytes kCacheBlock x (width + 4)
  void* values;
  int64_t window;      // how many keys a query sees at most; 0: any number
  float scale;
  const float* alibi;  // (heads) or null
  void* out;           // (rows, heads, width)
};

// Of the keys, or the values, of a block and head.
inline int64_t CacheBytes(const CacheAttentionArgs& args) {
  const int64_t token = args.bytes ? args.width + static_cast<int64_t>(sizeof(float)) : args.width * SizeOf(args.dtype);
  return kCacheBlock * token;
}

// Stores k and v in the cache and attends; called by each thread of a team, with scratch for all of them.
void TeamCacheAttention(const CacheAttentionArgs& args, char* scratch);
int64_t CacheAttentionScratch(int64_t width, int threads);

}  // namespace peak

#endif  // PEAK_CACHE_ATTENTION_H_
