#include "attention/cache_attention.h"

#include "base/memory.h"

#define PEAK_THIS_FILE "attention/cache_attention.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "attention/softmax.h"
#include "attention/cache_blocks.h"

// With up to this number of queries a tile is transposed: keys lie along the lanes, not queries.
constexpr int64_t kFewLanes = 4;

// The queries of a tile, one in each lane. They share the keys of one head.
struct Queries {
  int64_t sequence, head, count;  // count: lanes in use
  int64_t begin, end;             // keys that any lane sees
  float first[kTile], last[kTile], position[kTile], slope[kTile], sink[kTile];
  int64_t row[kTile];  // in units of width: (row, head) of q and of out

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
      sink[l] = args.sinks == nullptr ? -kInfinity : args.sinks[h];
      row[l] = (args.begins[sequence] + i) * args.heads + h;
    }
  }
  // Whether every lane sees every key of the block that starts at `key`.
  PEAK_INLINE bool Whole(int64_t key) const {
    return first[count - 1] <= static_cast<float>(key) && last[0] >= static_cast<float>(key + kCacheBlock - 1);
  }
};

PEAK_INLINE const float* QueryOf(const CacheAttentionArgs& args, const Queries& queries, int64_t lane) {
  const int64_t row = queries.row[lane] / args.heads, h = queries.row[lane] % args.heads;
  return args.q + row * args.q_row + h * args.width;
}

template <bool kCap>
PEAK_INLINE Vec ScoreOf(Vec product, Vec scale, const Softcap& cap, Vec slope, Vec distance) {
  const Vec scaled = product * scale;
  return Fma(slope, distance, kCap ? cap(scaled) : scaled);
}
PEAK_INLINE Vec Masked(Vec score, Vec key, Vec first, Vec last) {
  const Vec masked = Set(-kInfinity);
  return Select(Greater(first, key), masked, Select(Greater(key, last), masked, score));
}

// Turns products s[key][lane] into weights p and updates m, l and alpha.
template <bool kInt8, bool kCap, class E>
void SoftmaxOfKeys(const Queries& queries, const BlockScales& scales, const Softcap& cap, int64_t key, float* s, E* p,
                   const OnlineSoftmax& state) {
  const bool whole = queries.Whole(key);
  for (int64_t at = 0; at < queries.count; at += kLanes) {
    const Vec slope = Load(queries.slope + at), position = Load(queries.position + at);
    const Vec first = Load(queries.first + at), last = Load(queries.last + at);
    Vec m = Load(state.m + at);
    for (int64_t r = 0; r < kCacheBlock; ++r) {
      const Vec j = Set(static_cast<float>(key + r));
      Vec x = ScoreOf<kCap>(Load(s + r * kTile + at), Set(scales.scores[r]), cap, slope, j - position);
      if (!whole) x = Masked(x, j, first, last);
      Store(s + r * kTile + at, x);
      m = Max(x, m);
    }
    if constexpr (kInt8) {
      UpdateSoftmax(s, kCacheBlock, at, Set(1.0f), m, FactorByKey{scales.weights}, p, state);
    } else {
      UpdateSoftmax(s, kCacheBlock, at, Set(1.0f), m, NoFactor{}, p, state);
    }
  }
}

inline void PackWeights(const float* x, float* p) { std::memcpy(p, x, kCacheBlock * sizeof(float)); }
inline void PackWeights(const float* x, Pair* p) {
  for (int64_t r = 0; r < kCacheBlock; r += kLanes) Store(&p->even + r, Load(x + r));
}

// The same for one query whose keys lie along the lanes. Sums are taken one by one, in the order of the keys, so they
// have the bits of SoftmaxOfKeys.
template <bool kInt8, bool kCap, class E>
void SoftmaxOfLane(const Queries& queries, int64_t lane, const BlockScales& scales, const Softcap& cap, int64_t key,
                   float* s, E* p, const OnlineSoftmax& state) {
  alignas(64) float counts[kLanes];
  for (int i = 0; i < kLanes; ++i) counts[i] = static_cast<float>(i);
  const Vec slope = Set(queries.slope[lane]), position = Set(queries.position[lane]);
  Vec high = Set(-kInfinity);
  for (int64_t r = 0; r < kCacheBlock; r += kLanes) {
    const Vec j = Set(static_cast<float>(key + r)) + Load(counts);
    Vec x = ScoreOf<kCap>(Load(s + r), Load(scales.scores + r), cap, slope, j - position);
    x = Masked(x, j, Set(queries.first[lane]), Set(queries.last[lane]));
    Store(s + r, x);
    high = Max(x, high);
  }
  const float before = state.m[lane], m = MaxOf(Max(high, Set(before)));
  const Vec base = MinusMax(Set(m));
  for (int64_t r = 0; r < kCacheBlock; r += kLanes) Store(s + r, Exp(Load(s + r) + base));
  float even_sum = 0.0f, odd_sum = 0.0f;
  for (int64_t r = 0; r < kCacheBlock; r += 2) {
    even_sum += s[r];
    odd_sum += s[r + 1];
  }
  const Vec alpha = Exp(Set(before) + base);
  Store(state.alpha + lane, alpha, 1);
  Store(state.l + lane, Fma(Set(state.l[lane]), alpha, Set(even_sum + odd_sum)), 1);
  state.m[lane] = m;
  if (kInt8) {
    for (int64_t r = 0; r < kCacheBlock; r += kLanes) Store(s + r, Load(s + r) * Load(scales.weights + r));
  }
  PackWeights(s, p);
}

// Divides the accumulator of one lane by l and stores it; `row` is a workspace of args.width floats.
void StoreOut(const CacheAttentionArgs& args, const Queries& queries, int64_t lane, const float* acc, int64_t step,
              float l, float* row) {
  for (int64_t d = 0; d < args.width; ++d) row[d] = acc[d * step];
  float* out = args.out + queries.row[lane] * args.width;
  const Vec factor = Set(1.0f / l);  // not 0: a query sees its own key
  for (int64_t d = 0; d < args.width; d += kLanes) Store(out + d, Load(row + d) * factor, args.width - d);
}

// Workspace of a tile. With few queries q, s, p and acc are [lane][...], else [...][lane].
template <class T, class C>
struct CacheSpace {
  using E = typename OperandOf<T>::type;
  E* q;
  float* s;
  E* p;
  float* acc;
  OnlineSoftmax softmax;
  C* copy;  // of a block; its last row is read as whole vectors

  CacheSpace(Arena& arena, int64_t width)
      : q(arena.Take<E>(width / kDepth<E> * kTile)),
        s(arena.Take<float>(kTile * kCacheBlock)),
        p(arena.Take<E>(kTile * kCacheBlock / kDepth<E>)),
        acc(arena.Take<float>(UpTo(width, kLanes) * kTile)),
        softmax(arena),
        copy(arena.Take<C>(kCacheBlock * width / kDepth<C> + kLanes)) {}
};

// Computes the tile of one sequence and key head that starts at `lane`.
template <class T, bool kInt8>
void AttendTileOf(const CacheAttentionArgs& args, int64_t sequence, int64_t head, int64_t lane, char* scratch) {
  using C = typename ReadOf<T, kInt8>::type;
  using S = typename StoredOf<C, kInt8>::type;
  using E = typename OperandOf<T>::type;
  const Queries queries(args, sequence, head, lane);
  const bool few = queries.count <= kFewLanes;
  const int64_t width = args.width, depth = width / kDepth<E>, acc_row = UpTo(width, kLanes);
  const int64_t row_bytes = kInt8 ? width : width * static_cast<int64_t>(sizeof(C)) / kDepth<C>;
  const int64_t vecs = (queries.count + kLanes - 1) / kLanes, lanes = few ? queries.count : vecs * kLanes;
  Arena arena(scratch);
  const CacheSpace<T, C> space(arena, width);
  float *const s = space.s, *const acc = space.acc;
  BlockScales scales(args.scale);
  const Softcap cap(args.softcap);
  const bool capped = args.softcap > 0.0f;
  for (int64_t l = 0; l < lanes; ++l) {
    typename ElementOf<E>::type row[kMaxCacheWidth];
    const auto* from = Rounded(QueryOf(args, queries, Least(l, queries.count - 1)), width, row);
    for (int64_t d = 0; d < depth; ++d) {
      SetOperand(from + d * kDepth<E>, space.q + (few ? l * depth + d : d * kTile + l));
    }
    space.softmax.Reset(l, queries.sink[l]);
  }
  std::memset(acc, 0, acc_row * (few ? lanes : kTile) * sizeof(float));

  for (int64_t block = queries.begin / kCacheBlock; block * kCacheBlock < queries.end; ++block) {
    const int64_t key = block * kCacheBlock, live = Least(kCacheBlock, queries.end - key);
    const int64_t steps = UpTo(live, kDepth<E>) / kDepth<E>;  // later keys have weight 0, and their values may be NaN
    const int64_t next = block + (key + kCacheBlock < queries.end);
    const S* keys = BlockOf<S>(args, args.keys, sequence, block, head);
    const S* values = BlockOf<S>(args, args.values, sequence, block, head);
    const S* next_keys = BlockOf<S>(args, args.keys, sequence, next, head);
    const S* next_values = BlockOf<S>(args, args.values, sequence, next, head);
    if constexpr (kInt8) scales.Fill(args.scale, keys + kCacheBlock * width, values + kCacheBlock * width, live);
    const C* read = ReadBlock(keys, kCacheBlock * row_bytes, next_keys, space.copy);
    if (few) {
      Multiply(space.q, depth, 1, read, kCacheBlock, depth, s, kCacheBlock, queries.count, kCacheBlock / kLanes, false);
      read = ReadBlock(values, steps * kDepth<E> * row_bytes, next_values, space.copy);
      for (int64_t l = 0; l < queries.count; ++l) {
        float* const row = s + l * kCacheBlock;
        E* const weights = space.p + l * (kCacheBlock / kDepth<E>);
        capped ? SoftmaxOfLane<kInt8, true>(queries, l, scales, cap, key, row, weights, space.softmax)
               : SoftmaxOfLane<kInt8, false>(queries, l, scales, cap, key, row, weights, space.softmax);
        const Vec alpha = Set(space.softmax.alpha[l]);
        for (int64_t d = 0; d < acc_row; d += kLanes) Store(acc + l * acc_row + d, Load(acc + l * acc_row + d) * alpha);
      }
      Multiply(space.p, kCacheBlock / kDepth<E>, 1, read, width, steps, acc, acc_row, queries.count, acc_row / kLanes,
               true);
    } else {
      Multiply(read, 1, kCacheBlock, space.q, kTile, depth, s, kTile, kCacheBlock, vecs, false);
      capped ? SoftmaxOfKeys<kInt8, true>(queries, scales, cap, key, s, space.p, space.softmax)
             : SoftmaxOfKeys<kInt8, false>(queries, scales, cap, key, s, space.p, space.softmax);
      read = ReadBlock(values, steps * kDepth<E> * row_bytes, next_values, space.copy);
      Rescale(acc, width, 0, vecs * kLanes, space.softmax.alpha);
      Multiply(read, 1, width, space.p, kTile, steps, acc, kTile, width, vecs, true);
    }
  }
  for (int64_t l = 0; l < queries.count; ++l) {
    StoreOut(args, queries, l, few ? acc + l * acc_row : acc + l, few ? 1 : kTile, space.softmax.l[l], s);
  }
}

template <class T>
void AttendTile(const CacheAttentionArgs& args, int64_t sequence, int64_t head, int64_t lane, char* scratch) {
  args.int8_cache ? AttendTileOf<T, true>(args, sequence, head, lane, scratch)
                  : AttendTileOf<T, false>(args, sequence, head, lane, scratch);
}

inline int64_t TileLanes() { return kTile; }

#else

namespace peak {

int64_t CacheAttentionScratch(int64_t width, int threads) {
  constexpr int64_t kLaneBytes = 64 * sizeof(float);  // one row of a tile
  return threads * (3 * kLaneBytes * (width + 16) + 2 * kLaneBytes * kCacheBlock + 4 * kLaneBytes);
}

void CacheAttention(const CacheAttentionArgs& args, char* scratch, int threads) {
  const auto append = PEAK_PICK_DTYPE(args.dtype, Append);
  const auto attend = PEAK_PICK_DTYPE(args.dtype, AttendTile);
  constexpr int64_t kAppendHeads = 16;  // as many as are worth a unit if each has one token
  const int64_t heads = args.kv_heads;
  ParallelRanges(args.sequences * heads, kAppendHeads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / heads;
      append(args, sequence, i % heads, args.begins[sequence + 1] - args.begins[sequence]);
    }
  });
  const int64_t lanes = PEAK_PICK(TileLanes)(), group = args.heads / heads;
  const auto tiles = [&](int64_t sequence) {
    return ((args.begins[sequence + 1] - args.begins[sequence]) * group + lanes - 1) / lanes;
  };
  int64_t units = 0;
  for (int64_t i = 0; i < args.sequences; ++i) units += tiles(i) * heads;
  int64_t sequence = 0, first = 0;  // the sequence of the last unit of this thread, and its first unit
  ParallelUnits(units, threads, [&](int64_t unit, int worker) {
    while (unit < first) first -= tiles(--sequence) * heads;
    while (unit >= first + tiles(sequence) * heads) first += tiles(sequence++) * heads;
    const int64_t at = unit - first;
    attend(args, sequence, at % heads, at / heads * lanes, scratch + worker * CacheAttentionScratch(args.width, 1));
  });
}

}  // namespace peak

#endif  // PEAK_ISA
