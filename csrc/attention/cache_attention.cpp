#include "attention/cache_attention.h"

#define PEAK_THIS_FILE "attention/cache_attention.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "gemm/small_products.h"

constexpr int64_t kTile = 64;     // lanes of a tile: queries times the heads that share their keys
constexpr int64_t kFewLanes = 4;  // up to which a tile is turned: keys, not queries, by the vector
constexpr int64_t kLine = 64;     // bytes that memory gives at once
constexpr float kInfinity = __builtin_inff();

// What the cache holds of an operand: bf16 stays bf16 where pairs are not multiplied.
template <class T> struct CachedOf { using type = float; };
template <bool kNative> struct CachedBf16 { using type = bf16; };
template <> struct CachedBf16<true> { using type = Pair; };
template <> struct CachedOf<bf16> : CachedBf16<kNativePairs> {};

// What the products read: in bytes, a copy that is as wide as the other operand. And what is copied.
template <class T, bool kBytes> struct ReadOf : CachedOf<T> {};
template <class T> struct ReadOf<T, true> : OperandOf<T> {};
template <class C, bool kBytes> struct StoredOf { using type = C; };
template <class C> struct StoredOf<C, true> { using type = int8_t; };

inline void SetOperand(const float* from, float* to) { *to = *from; }
inline void SetOperand(const bf16* from, float* to) { *to = Widen(*from); }
inline void SetOperand(const bf16* from, bf16* to) { *to = *from; }
inline void SetOperand(const bf16* from, Pair* to) { std::memcpy(to, from, sizeof(Pair)); }

// The keys, or values, of a block and head.
template <class X>
PEAK_INLINE X* BlockOf(const CacheAttentionArgs& args, void* base, int64_t sequence, int64_t block, int64_t head) {
  const int64_t number = args.tables[sequence * args.table_row + block];
  return reinterpret_cast<X*>(static_cast<char*>(base) + (number * args.kv_heads + head) * CacheBytes(args));
}


// Rounds a row to bytes, of which there is room for kCacheWidth; returns their scale.
template <class T>
float ToBytes(const T* x, int64_t width, int8_t* bytes) {
  Vec high = Set(0.0f), zero = Set(0.0f);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec v = Load(x + d, width - d);
    high = Max(Abs(v), high);
    zero = zero + v * Set(0.0f);  // NaN beside an infinity or NaN
  }
  const float scale = MaxOf(high) / 127.0f + Sum(zero);
  const bool some = scale >= 0x1p-126f;
  for (int64_t d = 0; d < width; d += kLanes) {
    StoreBytes(bytes + d, some ? Round(Load(x + d, width - d) / Set(scale)) : Set(0.0f));
  }
  return scale < 0x1p-126f ? 0.0f : scale;
}

// Stores one head of a token in bytes, laid out as operands that hold kDeep steps.
template <class T, int64_t kDeep>
void AppendBytes(const CacheAttentionArgs& args, const T* k, const T* v, int64_t key, int8_t* keys, int8_t* values) {
  const int64_t width = args.width;
  int8_t row[kCacheWidth];
  float scale = ToBytes(k, width, row);
  std::memcpy(keys + kCacheBlock * width + key * sizeof(scale), &scale, sizeof(scale));
  for (int64_t d = 0; d < width; ++d) keys[(d / kDeep * kCacheBlock + key) * kDeep + d % kDeep] = row[d];
  scale = ToBytes(v, width, row);
  std::memcpy(values + kCacheBlock * width + key * sizeof(scale), &scale, sizeof(scale));
  for (int64_t d = 0; d < width; ++d) values[(key / kDeep * width + d) * kDeep + key % kDeep] = row[d];
}

template <class X>
PEAK_INLINE void WidenLine(const int8_t* from, X* to) {
  for (int64_t i = 0; i < kLine; i += 2 * kLanes) {
    StoreInOrder(to + i, LoadBytes(from + i), LoadBytes(from + i + kLanes));
  }
}
PEAK_INLINE void WidenLine(const int8_t* from, Pair* to) { WidenLine(from, &to->even); }

// Copies `size` bytes of a block, filled up to whole lines, and asks for as many at `next`, a line for each: asked for at
// once, they would hold up the reads that come after. Into the second cache, as the first has no room for two blocks.
// 2 cores of an EPYC, GPT-2 124M in bf16, 8 texts of 900 tokens: 18.6 ms a step where reading in place took 27.8.
template <class C>
PEAK_INLINE const C* ReadBlock(const C* from, int64_t size, const C* next, C* to) {
  for (int64_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(next) + i, 0, 2);
    std::memcpy(reinterpret_cast<char*>(to) + i, reinterpret_cast<const char*>(from) + i, kLine);
  }
  return to;
}
template <class C>
PEAK_INLINE const C* ReadBlock(const int8_t* from, int64_t size, const int8_t* next, C* to) {
  for (int64_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(next + i, 0, 2);
    WidenLine(from + i, to + i / kDepth<C>);
  }
  return to;
}

// Puts one row of values where key `key` of a block has its own.
template <class T, class C>
PEAK_INLINE void PutValue(const T* v, int64_t key, int64_t width, C* block) {
  for (int64_t d = 0; d < width; ++d) block[key * width + d] = v[d];
}
PEAK_INLINE void PutValue(const bf16* v, int64_t key, int64_t width, Pair* block) {
  Pair* row = block + key / 2 * width;
  if (key % 2 == 0) {  // the other key is not there yet: it meets a weight of 0, and may not be an earlier owner's NaN
    for (int64_t d = 0; d < width; ++d) row[d] = Pair{v[d], {0}};
  } else {
    for (int64_t d = 0; d < width; ++d) row[d].odd = v[d];
  }
}

// Stores the keys and values of one head of a sequence's new tokens.
template <class T>
void Append(const CacheAttentionArgs& args, int64_t sequence, int64_t head, int64_t rows) {
  using C = typename CachedOf<T>::type;
  const int64_t width = args.width;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t position = args.past[sequence] + i, key = position % kCacheBlock;
    const int64_t from = (args.begins[sequence] + i) * args.q_row + head * width;
    const T *k = static_cast<const T*>(args.k) + from, *v = static_cast<const T*>(args.v) + from;
    if (args.bytes) {
      AppendBytes<T, kDepth<typename OperandOf<T>::type>>(
          args, k, v, key, BlockOf<int8_t>(args, args.keys, sequence, position / kCacheBlock, head),
          BlockOf<int8_t>(args, args.values, sequence, position / kCacheBlock, head));
      continue;
    }
    C* keys = BlockOf<C>(args, args.keys, sequence, position / kCacheBlock, head);
    for (int64_t d = 0; d < width; d += kDepth<C>) SetOperand(k + d, keys + d / kDepth<C> * kCacheBlock + key);
    PutValue(v, key, width,
             BlockOf<C>(args, args.values, sequence, position / kCacheBlock, head));
  }
}

// The queries of a tile that share the keys of one head.
struct Queries {
  int64_t sequence, head, count;  // count: lanes
  int64_t begin, end;             // keys that any lane sees
  float first[kTile], last[kTile], position[kTile], slope[kTile];
  int64_t row[kTile];  // in elements of width: (row, head) of q and of out

  Queries(const CacheAttentionArgs& args, int64_t sequence_, int64_t head_, int64_t lane)
      : sequence(sequence_), head(head_) {
    const int64_t group = args.heads / args.kv_heads, rows = args.begins[sequence + 1] - args.begins[sequence];
    count = Least(kTile, rows * group - lane);
    for (int64_t l = 0; l < kTile; ++l) {
      const int64_t i = (lane + Least(l, count - 1)) / group, h = head * group + (lane + Least(l, count - 1)) % group;
      const int64_t at = args.past[sequence] + i;
      const int64_t from = args.window > 0 ? Most(0, at - args.window + 1) : 0;
      if (l == 0) begin = from;
      end = at + 1;
      first[l] = static_cast<float>(from);
      last[l] = position[l] = static_cast<float>(at);
      slope[l] = args.alibi == nullptr ? 0.0f : args.alibi[h];
      row[l] = (args.begins[sequence] + i) * args.heads + h;
    }
  }
  PEAK_INLINE bool Whole(int64_t key) const {
    return first[count - 1] <= static_cast<float>(key) && last[0] >= static_cast<float>(key + kCacheBlock - 1);
  }
};

template <class T>
PEAK_INLINE const T* QueryOf(const CacheAttentionArgs& args, const Queries& queries, int64_t lane) {
  const int64_t row = queries.row[lane] / args.heads, h = queries.row[lane] % args.heads;
  return static_cast<const T*>(args.q) + row * args.q_row + h * args.width;
}

PEAK_INLINE Vec ScoreOf(Vec product, Vec scale, Vec slope, Vec distance) {
  return Fma(slope, distance, product * scale);
}
PEAK_INLINE Vec Masked(Vec score, Vec key, Vec first, Vec last) {
  const Vec gone = Set(-kInfinity);
  return Select(Greater(first, key), gone, Select(Greater(key, last), gone, score));
}
// Minus the maximum, or 0 where no key is live yet: not -inf - -inf.
PEAK_INLINE Vec BaseOf(Vec high) {
  const Vec zero = Set(0.0f);
  return zero - Select(Greater(high, Set(-kInfinity)), high, zero);
}

PEAK_INLINE void StoreWeights(float* p, int64_t row, Vec even, Vec odd) {
  Store(p + row * kTile, even);
  Store(p + (row + 1) * kTile, odd);
}
PEAK_INLINE void StoreWeights(Pair* p, int64_t row, Vec even, Vec odd) {
  StorePairs(&p[row / 2 * kTile].even, PackPairs(even, odd));
}

// Of a block's keys: what products are multiplied by to be scores; and in bytes, what weights are before they meet values.
struct BlockScales {
  alignas(64) float scores[kCacheBlock], weights[kCacheBlock];
  explicit BlockScales(float scale) {
    for (float& score : scores) score = scale;
  }
  // What is not live has scales of earlier owners, which may be NaN.
  void Fill(float scale, const int8_t* keys, const int8_t* values, int64_t live) {
    std::memcpy(scores, keys, sizeof(scores));
    std::memcpy(weights, values, sizeof(weights));
    for (int64_t r = 0; r < kCacheBlock; ++r) {
      scores[r] = r < live ? scale * scores[r] : 0.0f;
      weights[r] = r < live ? weights[r] : 0.0f;
    }
  }
};

// s[key][lane], products, become weights p; top and sum are brought up to date, factor is what o must be multiplied by.
template <bool kBytes, class E>
void SoftmaxOfKeys(const Queries& queries, const BlockScales& scales, int64_t key, float* s, E* p, float* top,
                   float* sum, float* factor) {
  const bool whole = queries.Whole(key);
  for (int64_t at = 0; at < queries.count; at += kLanes) {
    const Vec slope = Load(queries.slope + at), position = Load(queries.position + at);
    const Vec first = Load(queries.first + at), last = Load(queries.last + at), before = Load(top + at);
    Vec high = before;
    for (int64_t r = 0; r < kCacheBlock; ++r) {
      const Vec j = Set(static_cast<float>(key + r));
      Vec x = ScoreOf(Load(s + r * kTile + at), Set(scales.scores[r]), slope, j - position);
      if (!whole) x = Masked(x, j, first, last);
      Store(s + r * kTile + at, x);
      high = Max(x, high);
    }
    const Vec base = BaseOf(high);
    Vec even_sum = Set(0.0f), odd_sum = Set(0.0f);
    for (int64_t r = 0; r < kCacheBlock; r += 2) {
      const Vec even = Exp(Load(s + r * kTile + at) + base), odd = Exp(Load(s + (r + 1) * kTile + at) + base);
      even_sum = even_sum + even;
      odd_sum = odd_sum + odd;
      if constexpr (kBytes) {
        StoreWeights(p + at, r, even * Set(scales.weights[r]), odd * Set(scales.weights[r + 1]));
      } else {
        StoreWeights(p + at, r, even, odd);
      }
    }
    const Vec f = Exp(before + base);
    Store(factor + at, f);
    Store(sum + at, Fma(Load(sum + at), f, even_sum + odd_sum));
    Store(top + at, high);
  }
}

inline void PackWeights(const float* x, float* p) { std::memcpy(p, x, kCacheBlock * sizeof(float)); }
inline void PackWeights(const float* x, Pair* p) {
  for (int64_t r = 0; r < kCacheBlock; r += kLanes) Store(&p->even + r, Load(x + r));
}

// The same for one lane whose keys lie by the vector; the sums are taken one by one, in the order of the keys.
template <bool kBytes, class E>
void SoftmaxOfLane(const Queries& queries, int64_t lane, const BlockScales& scales, int64_t key, float* s, E* p,
                   float* top, float* sum, float* factor) {
  alignas(64) float counts[kLanes];
  for (int i = 0; i < kLanes; ++i) counts[i] = static_cast<float>(i);
  const Vec slope = Set(queries.slope[lane]), position = Set(queries.position[lane]);
  Vec high = Set(-kInfinity);
  for (int64_t r = 0; r < kCacheBlock; r += kLanes) {
    const Vec j = Set(static_cast<float>(key + r)) + Load(counts);
    Vec x = ScoreOf(Load(s + r), Load(scales.scores + r), slope, j - position);
    x = Masked(x, j, Set(queries.first[lane]), Set(queries.last[lane]));
    Store(s + r, x);
    high = Max(x, high);
  }
  const float before = *top;
  *top = MaxOf(Max(high, Set(before)));
  const Vec base = BaseOf(Set(*top));
  for (int64_t r = 0; r < kCacheBlock; r += kLanes) Store(s + r, Exp(Load(s + r) + base));
  float even_sum = 0.0f, odd_sum = 0.0f;
  for (int64_t r = 0; r < kCacheBlock; r += 2) {
    even_sum += s[r];
    odd_sum += s[r + 1];
  }
  const Vec f = Exp(Set(before) + base);
  Store(factor, f, 1);
  Store(sum, Fma(Set(*sum), f, Set(even_sum + odd_sum)), 1);
  if (kBytes) {
    for (int64_t r = 0; r < kCacheBlock; r += kLanes) Store(s + r, Load(s + r) * Load(scales.weights + r));
  }
  PackWeights(s, p);
}

struct CacheSpace {
  char* base;
  int64_t used = 0;
  template <class X>
  X* Take(int64_t count) {
    char* at = base + used;
    used += UpTo(count * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(at);
  }
};

// Divides by the sum of weights and writes one lane's output.
template <class T>
void StoreOut(const CacheAttentionArgs& args, const Queries& queries, int64_t lane, const float* o, int64_t step,
              float sum, float* row) {
  for (int64_t d = 0; d < args.width; ++d) row[d] = o[d * step];
  T* out = static_cast<T*>(args.out) + queries.row[lane] * args.width;
  const Vec factor = Set(1.0f / sum);  // a query sees itself: never 0
  for (int64_t d = 0; d < args.width; d += kLanes) Store(out + d, Load(row + d) * factor, args.width - d);
}

// A tile of one sequence and key head, from `lane` on.
template <class T, bool kBytes>
void AttendTileOf(const CacheAttentionArgs& args, int64_t sequence, int64_t head, int64_t lane, char* scratch) {
  using C = typename ReadOf<T, kBytes>::type;
  using S = typename StoredOf<C, kBytes>::type;
  using E = typename OperandOf<T>::type;
  const Queries queries(args, sequence, head, lane);
  const bool few = queries.count <= kFewLanes;
  const int64_t width = args.width, depth = width / kDepth<E>, o_row = UpTo(width, kLanes);
  const int64_t row_bytes = kBytes ? width : width * static_cast<int64_t>(sizeof(C)) / kDepth<C>;
  const int64_t vecs = (queries.count + kLanes - 1) / kLanes;
  CacheSpace space{scratch};
  E* q = space.Take<E>(depth * kTile);  // few: [lane][width], else [width][lane]; alike s, p and o
  float* s = space.Take<float>(kTile * kCacheBlock);
  E* p = space.Take<E>(kTile * kCacheBlock / kDepth<E>);
  float* o = space.Take<float>(o_row * kTile);
  float* top = space.Take<float>(kTile);
  float* sum = space.Take<float>(kTile);
  float* factor = space.Take<float>(kTile);
  C* copy = space.Take<C>(kCacheBlock * width / kDepth<C> + kLanes);  // the last row is read by whole vectors
  BlockScales scales(args.scale);
  for (int64_t l = 0; l < kTile; ++l) {
    const T* from = QueryOf<T>(args, queries, Least(l, queries.count - 1));
    for (int64_t d = 0; d < depth; ++d) SetOperand(from + d * kDepth<E>, q + (few ? l * depth + d : d * kTile + l));
    top[l] = -kInfinity;
    sum[l] = 0.0f;
  }
  std::memset(o, 0, o_row * kTile * sizeof(float));

  for (int64_t block = queries.begin / kCacheBlock; block * kCacheBlock < queries.end; ++block) {
    const int64_t key = block * kCacheBlock, live = Least(kCacheBlock, queries.end - key);
    const int64_t steps = UpTo(live, kDepth<E>) / kDepth<E>;  // what is not live has weight 0, and may hold anything
    const int64_t next = block + (key + kCacheBlock < queries.end);
    const S* keys = BlockOf<S>(args, args.keys, sequence, block, head);
    const S* values = BlockOf<S>(args, args.values, sequence, block, head);
    const S* next_keys = BlockOf<S>(args, args.keys, sequence, next, head);
    const S* next_values = BlockOf<S>(args, args.values, sequence, next, head);
    if constexpr (kBytes) scales.Fill(args.scale, keys + kCacheBlock * width, values + kCacheBlock * width, live);
    const C* read = ReadBlock(keys, kCacheBlock * row_bytes, next_keys, copy);
    if (few) {
      Multiply(q, depth, 1, read, kCacheBlock, depth, s, kCacheBlock, queries.count, kCacheBlock / kLanes, false);
      read = ReadBlock(values, steps * kDepth<E> * row_bytes, next_values, copy);
      for (int64_t l = 0; l < queries.count; ++l) {
        SoftmaxOfLane<kBytes>(queries, l, scales, key, s + l * kCacheBlock, p + l * (kCacheBlock / kDepth<E>), top + l,
                              sum + l, factor + l);
        for (int64_t d = 0; d < o_row; d += kLanes) Store(o + l * o_row + d, Load(o + l * o_row + d) * Set(factor[l]));
      }
      Multiply(p, kCacheBlock / kDepth<E>, 1, read, width, steps, o, o_row, queries.count, o_row / kLanes, true);
    } else {
      Multiply(read, 1, kCacheBlock, q, kTile, depth, s, kTile, kCacheBlock, vecs, false);
      SoftmaxOfKeys<kBytes>(queries, scales, key, s, p, top, sum, factor);
      read = ReadBlock(values, steps * kDepth<E> * row_bytes, next_values, copy);
      for (int64_t d = 0; d < width; ++d) {
        for (int64_t at = 0; at < vecs * kLanes; at += kLanes) {
          Store(o + d * kTile + at, Load(o + d * kTile + at) * Load(factor + at));
        }
      }
      Multiply(read, 1, width, p, kTile, steps, o, kTile, width, vecs, true);
    }
  }
  for (int64_t l = 0; l < queries.count; ++l) {
    StoreOut<T>(args, queries, l, few ? o + l * o_row : o + l, few ? 1 : kTile, sum[l], s);
  }
}

template <class T>
void AttendTile(const CacheAttentionArgs& args, int64_t sequence, int64_t head, int64_t lane, char* scratch) {
  args.bytes ? AttendTileOf<T, true>(args, sequence, head, lane, scratch)
             : AttendTileOf<T, false>(args, sequence, head, lane, scratch);
}

inline int64_t TileLanes() { return kTile; }

#else

namespace peak {

int64_t CacheAttentionScratch(int64_t width, int threads) {
  constexpr int64_t kMost = 64 * sizeof(float);  // a tile's lanes
  return threads * (3 * kMost * (width + 16) + 2 * kMost * kCacheBlock + 4 * kMost);
}

void TeamCacheAttention(const CacheAttentionArgs& args, char* scratch) {
  const Team& team = *Team::Current();
  const auto append = PEAK_PICK_DTYPE(args.dtype, Append);
  const auto attend = PEAK_PICK_DTYPE(args.dtype, AttendTile);
  const int64_t lanes = PEAK_PICK(TileLanes)(), group = args.heads / args.kv_heads;
  scratch += CacheAttentionScratch(args.width, 1) * team.id;
  for (int64_t i = 0; i < args.sequences; ++i) {
    const int64_t rows = args.begins[i + 1] - args.begins[i];
    for (int64_t head = 0; head < args.kv_heads; ++head) {
      if ((i + head) % team.size == team.id) append(args, i, head, rows);
    }
  }
  Barrier();
  for (int64_t i = 0; i < args.sequences; ++i) {
    const int64_t all = (args.begins[i + 1] - args.begins[i]) * group;
    for (int64_t head = 0; head < args.kv_heads; ++head) {
      // From tile to tile there is more to do: the next head's begin with another thread.
      for (int64_t tile = 0; tile * lanes < all; ++tile) {
        if ((i + head + tile) % team.size == team.id) attend(args, i, head, tile * lanes, scratch);
      }
    }
  }
  Barrier();
}

}  // namespace peak

#endif  // PEAK_ISA
