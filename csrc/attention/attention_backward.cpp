#include "attention/attention.h"
#include "ops/rotary.h"

#include <algorithm>

#ifndef PEAK_THIS_FILE
namespace peak {
namespace {
// Query and key ranges of one unit start on multiples of kTile, so that a split changes no sum.
struct BackwardUnit {
  int64_t b, kv_head, head, heads;  // query heads head .. head + heads - 1 of this kv head
  int64_t query, query_end, key, key_end;
  bool by_query, by_key;  // whether it gives what is summed over keys (dq, dbias, dalibi), over queries (dk, dv)
};
}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "attention/attention_backward.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "attention/tiles.h"
#include "ops/rotate_head.h"

// Packed per kv head (k, v and their gradients), per query head (the rest), and per pair of tiles (s, dp, p, ds).
template <class T>
struct BackwardSpace {
  using E = typename OperandOf<T>::type;
  static constexpr bool kPairs = kDepth<E> == 2;
  E *k, *k_stacked, *v, *q, *q_stacked, *dy, *dy_stacked, *p, *ds, *ds_stacked;
  float *dk, *dv, *dq, *s, *dp, *lse, *delta, *mask, *turned;

  BackwardSpace(Bump& bump, const AttentionArgs& args, int64_t queries, int64_t keys) {
    const int64_t width = args.width;
    const bool drops = args.dropout > 0.0;
    const Widths<E> widths(width);
    k = bump.Take<E>(keys * widths.natural);
    k_stacked = kPairs ? bump.Take<E>(keys / 2 * widths.stacked) : k;
    v = bump.Take<E>(keys * widths.natural);
    dk = bump.Take<float>(keys * widths.stacked);
    dv = bump.Take<float>(keys * widths.stacked);
    q = bump.Take<E>(queries * width / kDepth<E>);
    q_stacked = bump.Take<E>(queries / kDepth<E> * widths.stacked);
    dy = bump.Take<E>(queries * width / kDepth<E>);
    dy_stacked = bump.Take<E>(queries / kDepth<E> * widths.stacked);
    dq = bump.Take<float>(queries * width);
    lse = bump.Take<float>(queries);
    delta = bump.Take<float>(queries);
    s = bump.Take<float>(kTile * kTile);
    dp = bump.Take<float>(kTile * kTile);
    p = kPairs || drops ? bump.Take<E>(kTile * kTile / kDepth<E>) : reinterpret_cast<E*>(s);
    ds = kPairs ? bump.Take<E>(kTile * kTile / 2) : reinterpret_cast<E*>(dp);
    ds_stacked = kPairs ? bump.Take<E>(kTile * kTile / 2) : ds;
    mask = drops ? bump.Take<float>(kTile * kTile) : nullptr;
    turned = args.cos != nullptr ? bump.Take<float>(kTile * UpTo(width, kLanes)) : nullptr;
  }
};

PEAK_INLINE void StoreTwoRows(float* rows, float*, int64_t row, int64_t at, Vec even, Vec odd) {
  Store(rows + row * kTile + at, even);
  Store(rows + (row + 1) * kTile + at, odd);
}
PEAK_INLINE void StoreTwoRows(Pair* rows, Pair* stacked, int64_t row, int64_t at, Vec even, Vec odd) {
  bf16* halves = &rows->even;
  Store(halves + row * kTile + at, even);
  Store(halves + (row + 1) * kTile + at, odd);
  if (stacked != nullptr) StorePairs(&stacked[row / 2 * kTile + at].even, PackPairs(even, odd));
}

// p = e^(c s - lse), ds = p (dp - delta); kDrop: p times the mask, ds = p (mask dp - delta); kKeep: the plain p and ds
// as floats too, in place of s and dp.
template <bool kKeep, bool kDrop, class T>
PEAK_NOINLINE void Gradients(const BackwardSpace<T>& space, const float* lse, const float* delta, int64_t rows,
                             Lanes lanes, float c) {
  const Vec scale = Set(c);
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    const Vec base = Set(0.0f) - Load(lse + at), mean = Load(delta + at);
    for (int64_t r = 0; r < rows; r += 2) {
      const float *s = space.s + r * kTile + at, *dp = space.dp + r * kTile + at;
      const Vec even = Exp(Fma(Load(s), scale, base)), odd = Exp(Fma(Load(s + kTile), scale, base));
      const float* kept = kDrop ? space.mask + r * kTile + at : nullptr;
      const Vec even_dp = kDrop ? Load(dp) * Load(kept) : Load(dp);
      const Vec odd_dp = kDrop ? Load(dp + kTile) * Load(kept + kTile) : Load(dp + kTile);
      const Vec even_ds = even * (even_dp - mean), odd_ds = odd * (odd_dp - mean);
      const Vec even_p = kDrop ? even * Load(kept) : even, odd_p = kDrop ? odd * Load(kept + kTile) : odd;
      StoreTwoRows(space.p, static_cast<decltype(space.p)>(nullptr), r, at, even_p, odd_p);
      StoreTwoRows(space.ds, space.ds_stacked, r, at, even_ds, odd_ds);
      if (kKeep) {
        StoreTwoRows(space.s, static_cast<float*>(nullptr), r, at, even, odd);
        StoreTwoRows(space.dp, static_cast<float*>(nullptr), r, at, even_ds, odd_ds);
      }
    }
  }
}

PEAK_INLINE void AddTo(float* p, Vec x, int64_t n) { Store(p, Load(p, n) + x, n); }

// dbias[query][key] += ds[key][query].
PEAK_NOINLINE void AddBiasGradient(const QueryTile& tile, const float* ds, int64_t key, int64_t keys, Lanes lanes,
                                   float* dbias, int64_t stride) {
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    for (int64_t r = 0; r < keys; r += kLanes) {
      const int64_t n = Least(kLanes, keys - r);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = i < n ? Load(ds + (r + i) * kTile + at) : Set(0.0f);
      Transpose(square);
      for (int64_t i = 0; i < Least(kLanes, tile.count - at); ++i) {
        AddTo(dbias + (tile.query + at + i) * stride + key + r, square[i], n);
      }
    }
  }
}

// For each query, into the three planes of `rows`: the sums over keys of ds (j - i), ds and p (j - i).
PEAK_NOINLINE void AddSlopeGradient(const QueryTile& tile, const float* p, const float* ds, int64_t key, int64_t keys,
                                    Lanes lanes, float* rows, int64_t plane) {
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    const Vec position = Load(tile.position + at);
    Vec slope = Set(0.0f), total = slope, mean = slope;
    for (int64_t r = 0; r < keys; ++r) {
      const Vec distance = Set(static_cast<float>(key + r)) - position, x = Load(ds + r * kTile + at);
      slope = Fma(x, distance, slope);
      total = total + x;
      mean = Fma(Load(p + r * kTile + at), distance, mean);
    }
    float* row = rows + tile.query + at;
    AddTo(row, slope, tile.count - at);
    AddTo(row + plane, total, tile.count - at);
    AddTo(row + 2 * plane, mean, tile.count - at);
  }
}

// Where one head's gradients of the score terms go, or null.
struct TermGradients {
  float *bias, *slope_rows;
  int64_t plane;

  TermGradients(const AttentionArgs& args, const BackwardUnit& unit, int64_t h) 
      : bias(nullptr), slope_rows(nullptr), plane(args.batch * args.heads * args.queries) {
    if (!unit.by_query) return;
    if (args.dalibi != nullptr) slope_rows = args.dalibi_rows + (unit.b * args.heads + h) * args.queries;
    if (args.dbias == nullptr) return;
    const int64_t slice = (args.bias_batch > 1 ? unit.b * args.bias_heads : 0) + (args.bias_heads > 1 ? h : 0);
    bias = args.dbias + slice * args.queries * args.keys;
  }
  bool Any() const { return bias != nullptr || slope_rows != nullptr; }
};

// lse, +inf (all weights 0) for a dead or padded query; delta = rowsum(dy * y).
template <class T>
void RowStatistics(const Rows<T>& dy, const Rows<T>& y, const float* lse, int64_t first, int64_t count, float* lse_out,
                   float* delta) {
  for (int64_t i = 0; i < count; ++i) {
    const bool live = dy.Has(first + i) && lse[first + i] != -kInfinity;
    lse_out[i] = live ? lse[first + i] : kInfinity;
    // In four parts, or dp - delta, exactly 0 where a query sees one key, is left with what a long chain loses.
    Vec sums[4] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
    for (int64_t d = 0, part = 0; d < dy.width; d += kLanes, part = (part + 1) % 4) {
      sums[part] = Fma(dy.At(first + i, d), y.At(first + i, d), sums[part]);
    }
    delta[i] = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// One query tile against the keys of one key tile; offsets are relative to the unit's ranges.
template <class T>
void BackwardTile(const BackwardUnit& unit, const BackwardSpace<T>& space, const QueryTile& tile, int64_t width,
                  int64_t key, int64_t keys, const ScoreTerms& terms, const TermGradients& into,
                  const Dropout& dropout) {
  using E = typename OperandOf<T>::type;
  const Widths<E> widths(width);
  const int64_t rows = UpTo(keys, kBlockRows);
  const Lanes lanes = tile.LanesAt(key, rows);
  const int64_t lane = lanes.begin * kLanes, vecs = lanes.end - lanes.begin;
  const int64_t i = tile.query - unit.query, j = key - unit.key;
  Multiply(space.k + j * widths.natural, widths.natural, 1, space.q + i * width / kDepth<E> + lane, kTile,
           width / kDepth<E>, space.s + lane, kTile, rows, vecs, false);
  Multiply(space.v + j * widths.natural, widths.natural, 1, space.dy + i * width / kDepth<E> + lane, kTile,
           width / kDepth<E>, space.dp + lane, kTile, rows, vecs, false);
  const float c = Scores(terms, tile, space.s, key, rows, lanes);
  if (dropout.On()) dropout.Draw(tile, key, rows, lanes, space.mask);
  const auto gradients = into.Any() ? (dropout.On() ? Gradients<true, true, T> : Gradients<true, false, T>)
                                    : (dropout.On() ? Gradients<false, true, T> : Gradients<false, false, T>);
  gradients(space, space.lse + i, space.delta + i, rows, lanes, c);
  if (into.bias != nullptr) AddBiasGradient(tile, space.dp, key, keys, lanes, into.bias, terms.keys);
  if (into.slope_rows != nullptr) {
    AddSlopeGradient(tile, space.s, space.dp, key, keys, lanes, into.slope_rows, into.plane);
  }
  if (unit.by_key) {
    const int64_t line = kTile / kDepth<E>, at = (i + lane) / kDepth<E> * widths.stacked;
    // Not the lanes past the last query: of a single one they would be all but one step.
    const int64_t depth = UpTo(Least(vecs * kLanes, tile.count - lane), kDepth<E>) / kDepth<E>;
    const int64_t columns = widths.stacked / kLanes;
    Multiply(space.p + lane / kDepth<E>, line, 1, space.dy_stacked + at, widths.stacked, depth,
             space.dv + j * widths.stacked, widths.stacked, rows, columns, true);
    Multiply(space.ds + lane / kDepth<E>, line, 1, space.q_stacked + at, widths.stacked, depth,
             space.dk + j * widths.stacked, widths.stacked, rows, columns, true);
  }
  if (unit.by_query) {
    Multiply(space.k_stacked + j / kDepth<E> * widths.stacked, 1, widths.stacked, space.ds_stacked + lane, kTile,
             rows / kDepth<E>, space.dq + i * width + lane, kTile, width, vecs, true);
  }
}

// out[row] = in[row] * factor.
template <class T>
void StoreRows(const float* in, int64_t in_stride, float factor, T* out, int64_t stride, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < width; d += kLanes) {
      Store(out + r * stride + d, Load(in + r * in_stride + d) * Set(factor), width - d);
    }
  }
}

// Turns `count` rows of a gradient back, those of the tokens from `token` on, in place.
inline void TurnBack(const AttentionArgs& args, int64_t token, float* rows, int64_t stride, int64_t count) {
  if (args.cos == nullptr) return;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = (token + r) * args.pairs;
    TurnHead(rows + r * stride, args.cos + at, args.minus_sin + at, rows + r * stride, args.pairs, args.interleaved);
  }
}

// The finished dq of the tile of queries from `query` on, from [width][query].
template <class T>
void StoreQueries(const AttentionArgs& args, const float* tile, float* turned, int64_t query, int64_t count, T* dq) {
  const int64_t width = args.width, stride = UpTo(width, kLanes);
  float factor[kTile];
  for (int64_t i = 0; i < kTile; ++i) factor[i] = args.scale;
  if (args.cos == nullptr) return StoreTransposed(tile, factor, dq, args.dq_t, count, width);
  StoreTransposed(tile, factor, turned, stride, count, width);
  TurnBack(args, query, turned, stride, count);
  StoreRows(turned, stride, 1.0f, dq, args.dq_t, count, width);
}

template <class T>
void BackwardHead(const AttentionArgs& args, const BackwardUnit& unit, const BackwardSpace<T>& space, const Live& live,
                  int64_t h) {
  using E = typename OperandOf<T>::type;
  const int64_t width = args.width, count = UpTo(unit.query_end - unit.query, kTile);
  const Rows<T> q{At<T>(args.q, unit.b, args.q_b, h, args.q_h), args.q_t, 0, args.queries, width};
  const Rows<T> dy{At<T>(args.dout, unit.b, args.dout_b, h, args.dout_h), args.dout_t, 0, args.queries, width};
  const Rows<T> y{static_cast<const T*>(args.out) + (unit.b * args.queries * args.heads + h) * width,
                  args.heads * width, 0, args.queries, width};
  const ScoreTerms terms(args, unit.b, h);
  const TermGradients into(args, unit, h);
  const Dropout dropout(args, unit.b, h);
  for (int64_t i = 0; i < count; i += kTile) {
    PackTransposed(q, unit.query + i, space.q + i * width / kDepth<E>);
    PackTransposed(dy, unit.query + i, space.dy + i * width / kDepth<E>);
  }
  PackStacked(q, unit.query, count, space.q_stacked);
  PackStacked(dy, unit.query, count, space.dy_stacked);
  RowStatistics(dy, y, args.lse + (unit.b * args.heads + h) * args.queries, unit.query, count, space.lse, space.delta);
  std::memset(space.dq, 0, count * width * sizeof(float));

  QueryTile tile;
  for (int64_t query = unit.query; query < unit.query_end; query += kTile) {
    tile.Place(live, query, args.queries);
    for (int64_t block = unit.key; block < unit.key_end; block += kTile) {
      const int64_t stop = Least(tile.end, block + kTile);
      int64_t keys;
      for (int64_t key = Most(block, tile.begin / kEdgeTile * kEdgeTile); key < stop; key += keys) {
        keys = tile.KeysAt(key, stop);
        BackwardTile(unit, space, tile, width, key, keys, terms, into, dropout);
      }
    }
  }
  if (!unit.by_query || args.dq == nullptr) return;
  T* dq = static_cast<T*>(args.dq) + unit.b * args.dq_b + h * args.dq_h;
  for (int64_t query = unit.query; query < unit.query_end; query += kTile) {
    StoreQueries(args, space.dq + (query - unit.query) * width, space.turned, query,
                 Least(kTile, unit.query_end - query), dq + query * args.dq_t);
  }
}

template <class T>
void RunBackwardUnit(const AttentionArgs& args, const BackwardUnit& unit) {
  using E = typename OperandOf<T>::type;
  const int64_t width = args.width, queries = UpTo(unit.query_end - unit.query, kTile);
  const int64_t count = unit.key_end - unit.key, keys = UpTo(count, kTile);
  Bump counted{nullptr};
  BackwardSpace<T>(counted, args, queries, keys);
  Bump bump{AttentionScratch(counted.used)};
  const BackwardSpace<T> space(bump, args, queries, keys);
  const Live live(args, unit.b);
  const Widths<E> widths(width);

  const Rows<T> k{At<T>(args.k, unit.b, args.k_b, unit.kv_head, args.k_h), args.k_t, live.begin, live.end, width};
  const Rows<T> v{At<T>(args.v, unit.b, args.v_b, unit.kv_head, args.v_h), args.v_t, live.begin, live.end, width};
  PackNatural(k, unit.key, keys, space.k);
  PackNatural(v, unit.key, keys, space.v);
  if (kDepth<E> == 2) PackStacked(k, unit.key, keys, space.k_stacked);
  std::memset(space.dk, 0, keys * widths.stacked * sizeof(float));
  std::memset(space.dv, 0, keys * widths.stacked * sizeof(float));
  for (int64_t h = unit.head; h < unit.head + unit.heads; ++h) BackwardHead(args, unit, space, live, h);
  if (!unit.by_key) return;
  T* dk = static_cast<T*>(args.dk) + unit.b * args.dk_b + unit.kv_head * args.dk_h + unit.key * args.dk_t;
  T* dv = static_cast<T*>(args.dv) + unit.b * args.dv_b + unit.kv_head * args.dv_h + unit.key * args.dv_t;
  TurnBack(args, unit.key, space.dk, widths.stacked, count);
  StoreRows(space.dk, widths.stacked, args.scale, dk, args.dk_t, count, width);
  StoreRows(space.dv, widths.stacked, 1.0f, dv, args.dv_t, count, width);
}

#else

namespace peak {
namespace {

// The run of units that one kind of pass is cut into: `ranges` pieces of [0, length) on multiples of a tile.
struct Cut {
  int64_t length, ranges;
  static constexpr int64_t kUnit = 64;  // a multiple of every set's tile

  Cut(int64_t length_, int64_t wanted) : length(length_), ranges(std::clamp<int64_t>(wanted, 1, Tiles())) {}
  int64_t Tiles() const { return std::max<int64_t>(1, (length + kUnit - 1) / kUnit); }
  int64_t Begin(int64_t range) const { return std::min(length, Tiles() * range / ranges * kUnit); }
};

// What is summed over keys, for queries [begin, end): the heads that share a slice of the bias one after another, so
// that each element of its gradient is summed in one order by one thread. Without that gradient a head is a slice.
struct QuerySide {
  int64_t batch, heads;  // slices
  Cut queries;

  QuerySide(const AttentionArgs& args, int64_t wanted)
      : batch(args.dbias == nullptr ? args.batch : args.bias_batch),
        heads(args.dbias == nullptr ? args.heads : args.bias_heads),
        queries(args.queries, wanted / std::max<int64_t>(1, batch * heads)) {}
  int64_t Units() const { return batch * heads * queries.ranges; }

  template <class Run>
  void Do(const AttentionArgs& args, Run run, int64_t unit) const {
    const int64_t range = unit % queries.ranges, b = unit / queries.ranges / heads, h = unit / queries.ranges % heads;
    const int64_t group = args.heads / args.kv_heads;
    for (int64_t i = b; i < args.batch; i += batch) {
      for (int64_t head = h; head < args.heads; head += heads) {
        run(args, {i, head / group, head, 1, queries.Begin(range), queries.Begin(range + 1), 0, args.keys, true,
                   false});
      }
    }
  }
};

// A row of ds sums to 0, but delta comes from the rounded output, and what it is off times p weighs by the distance.
// So p times what the row sums to is taken out: in bf16 an error of 1e-2 of the gradient becomes one of 1e-6.
void SumSlopeGradients(const AttentionArgs& args) {
  const int64_t plane = args.batch * args.heads * args.queries;
  for (int64_t h = 0; h < args.heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < args.batch; ++b) {
      const float* rows = args.dalibi_rows + (b * args.heads + h) * args.queries;
      for (int64_t i = 0; i < args.queries; ++i) {
        const double total = rows[plane + i], mean = rows[2 * plane + i];
        sum += rows[i] - total * mean;
      }
    }
    args.dalibi[h] = static_cast<float>(sum);
  }
}

}  // namespace

void AttentionBackward(const AttentionArgs& args, int threads) {
  const bool by_query = args.dq != nullptr || args.dbias != nullptr || args.dalibi != nullptr;
  const bool by_key = args.dk != nullptr;
  const int64_t group = args.heads / args.kv_heads, kv_heads = args.batch * args.kv_heads;
  const auto run = PEAK_PICK_DTYPE(args.dtype, RunBackwardUnit);
  // One pass over a kv head takes five products. Two passes, which cut it, take four and three: 7/5 of the work, worth
  // it where whole heads would leave that share of the threads idle, and needed where they add up in the gradient of a
  // shared bias. The sums are the same to the last bit.
  const int64_t rounds = (kv_heads + threads - 1) / threads;
  const bool shared = args.dbias != nullptr && (args.bias_batch < args.batch || args.bias_heads < args.heads);
  if (by_query && by_key && !shared && 7 * kv_heads >= 5 * rounds * threads) {
    ParallelUnits(kv_heads, threads, [&](int64_t i) {
      const int64_t b = i / args.kv_heads, kv_head = i % args.kv_heads;
      run(args, {b, kv_head, kv_head * group, group, 0, args.queries, 0, args.keys, true, true});
    });
  } else if (kv_heads > 0) {
    const int64_t wanted = 4 * threads;  // units in all, so that threads end together
    const Cut keys(args.keys, wanted / kv_heads);
    const QuerySide side(args, wanted);
    const int64_t key_units = by_key ? kv_heads * keys.ranges : 0, query_units = by_query ? side.Units() : 0;
    ParallelUnits(key_units + query_units, threads, [&](int64_t i) {
      if (i >= key_units) return side.Do(args, run, i - key_units);
      const int64_t range = i % keys.ranges, b = i / keys.ranges / args.kv_heads;
      const int64_t kv_head = i / keys.ranges % args.kv_heads;
      run(args, {b, kv_head, kv_head * group, group, 0, args.queries, keys.Begin(range), keys.Begin(range + 1), false,
                 true});
    });
  }
  if (args.dalibi != nullptr) SumSlopeGradients(args);
}

}  // namespace peak

#endif  // PEAK_ISA
