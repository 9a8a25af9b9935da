// The backward pass of attention. More than 300 lines: the work of a unit and the division into units belong together.
#include "attention/attention.h"

#include <algorithm>

#include "base/memory.h"
#include "ops/rotary.h"

#ifndef PEAK_THIS_FILE
namespace peak {
namespace {
// A unit of work. Its ranges of queries and keys start on multiples of kTile, so that a split changes no sum.
struct BackwardUnit {
  int64_t b, kv_head, head, heads;  // query heads head .. head + heads - 1 of this kv head
  int64_t query, query_end, key, key_end;
  bool by_query;  // computes the sums over keys: dq, dbias, dalibi
  bool by_key;    // computes the sums over queries: dk, dv
};
}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "attention/attention_backward.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "attention/tiles.h"
#include "attention/term_gradients.h"
#include "ops/rotate_head.h"

// Workspace: k, v and their gradients for a kv head; s, dp, p and ds for a pair of tiles; the rest for a query head.
template <class T>
struct BackwardSpace {
  using E = typename OperandOf<T>::type;
  static constexpr bool kPairs = kDepth<E> == 2;
  E *k, *k_stacked, *v, *q, *q_stacked, *dy, *dy_stacked, *p, *ds, *ds_stacked;
  float *dk, *dv, *dq, *s, *dp, *lse, *delta, *mask, *cap_slopes, *rotated;

  BackwardSpace(Arena& arena, const AttentionBackwardArgs& args, int64_t queries, int64_t keys) {
    const int64_t width = args.width;
    const bool drops = args.dropout > 0.0, capped = args.softcap > 0.0f;
    const Widths<E> widths(width);
    k = arena.Take<E>(keys * widths.natural);
    k_stacked = kPairs ? arena.Take<E>(keys / 2 * widths.stacked) : k;
    v = arena.Take<E>(keys * widths.natural);
    dk = arena.Take<float>(keys * widths.stacked);
    dv = arena.Take<float>(keys * widths.stacked);
    q = arena.Take<E>(queries * width / kDepth<E>);
    q_stacked = arena.Take<E>(queries / kDepth<E> * widths.stacked);
    dy = arena.Take<E>(queries * width / kDepth<E>);
    dy_stacked = arena.Take<E>(queries / kDepth<E> * widths.stacked);
    dq = arena.Take<float>(queries * width);
    lse = arena.Take<float>(queries);
    delta = arena.Take<float>(queries);
    s = arena.Take<float>(kTile * kTile);
    dp = arena.Take<float>(kTile * kTile);
    p = kPairs || drops ? arena.Take<E>(kTile * kTile / kDepth<E>) : reinterpret_cast<E*>(s);
    ds = kPairs || capped ? arena.Take<E>(kTile * kTile / kDepth<E>) : reinterpret_cast<E*>(dp);
    ds_stacked = kPairs ? arena.Take<E>(kTile * kTile / 2) : ds;
    mask = drops ? arena.Take<float>(kTile * kTile) : nullptr;
    cap_slopes = capped ? arena.Take<float>(kTile * kTile) : nullptr;
    rotated = args.cos != nullptr ? arena.Take<float>(kTile * UpTo(width, kLanes)) : nullptr;
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

// p = e^(c s - lse), ds = p (dp - delta). kDrop: p times the mask, ds = p (mask dp - delta). kCap: ds times the slope
// of the cap. kFloats: also writes p without the mask and ds without the slope as floats, over s and dp.
template <bool kFloats, bool kDrop, bool kCap, class T>
PEAK_NOINLINE void Gradients(const BackwardSpace<T>& space, const float* lse, const float* delta, int64_t rows,
                             Lanes lanes, float c) {
  const Vec scale = Set(c);
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    const Vec base = Set(0.0f) - Load(lse + at), mean = Load(delta + at);
    for (int64_t r = 0; r < rows; r += 2) {
      const float *s = space.s + r * kTile + at, *dp = space.dp + r * kTile + at;
      const Vec even = Exp(Fma(Load(s), scale, base)), odd = Exp(Fma(Load(s + kTile), scale, base));
      const float* mask = kDrop ? space.mask + r * kTile + at : nullptr;
      const Vec even_dp = kDrop ? Load(dp) * Load(mask) : Load(dp);
      const Vec odd_dp = kDrop ? Load(dp + kTile) * Load(mask + kTile) : Load(dp + kTile);
      const Vec even_ds = even * (even_dp - mean), odd_ds = odd * (odd_dp - mean);
      const Vec even_p = kDrop ? even * Load(mask) : even, odd_p = kDrop ? odd * Load(mask + kTile) : odd;
      StoreTwoRows(space.p, static_cast<decltype(space.p)>(nullptr), r, at, even_p, odd_p);
      const float* slope = kCap ? space.cap_slopes + r * kTile + at : nullptr;
      const Vec even_du = kCap ? even_ds * Load(slope) : even_ds, odd_du = kCap ? odd_ds * Load(slope + kTile) : odd_ds;
      StoreTwoRows(space.ds, space.ds_stacked, r, at, even_du, odd_du);
      if (kFloats) {
        StoreTwoRows(space.s, static_cast<float*>(nullptr), r, at, even, odd);
        StoreTwoRows(space.dp, static_cast<float*>(nullptr), r, at, even_ds, odd_ds);
      }
    }
  }
}

// The variant of Gradients for the options of a call.
template <class T, bool... kOptions>
auto GradientsFor() {
  return Gradients<kOptions..., T>;
}
template <class T, bool... kOptions, class... Rest>
auto GradientsFor(bool option, Rest... rest) {
  return option ? GradientsFor<T, kOptions..., true>(rest...) : GradientsFor<T, kOptions..., false>(rest...);
}

// lse_out = lse, or +inf for a masked or padded query, which makes its weights 0. delta = rowsum(dy * y).
template <class T>
void RowStatistics(const Rows<T>& dy, const Rows<T>& y, const float* lse, int64_t first, int64_t count, float* lse_out,
                   float* delta) {
  for (int64_t i = 0; i < count; ++i) {
    const bool live = dy.Has(first + i) && lse[first + i] != -kInfinity;
    lse_out[i] = live ? lse[first + i] : kInfinity;
    // Four partial sums: dp - delta is exactly 0 for a query with one key, and one long chain would leave a rounding
    // error.
    Vec sums[4] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
    for (int64_t d = 0, part = 0; d < dy.width; d += kLanes, part = (part + 1) % 4) {
      sums[part] = Fma(dy.At(first + i, d), y.At(first + i, d), sums[part]);
    }
    delta[i] = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// One query tile against the keys of one key tile. Offsets are relative to the ranges of the unit.
template <class T>
void BackwardTile(const BackwardUnit& unit, const BackwardSpace<T>& space, const QueryTile& tile, int64_t width,
                  int64_t key, int64_t keys, const ScoreTerms& terms, const TermGradients& dterms,
                  const DropoutMask& dropout) {
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
  const float c = Scores(terms, tile, space.s, key, rows, lanes, space.cap_slopes);
  if (dropout.On()) dropout.Draw(tile, key, rows, lanes, space.mask);
  const auto gradients = GradientsFor<T>(dterms.Any(), dropout.On(), terms.softcap > 0.0f);
  gradients(space, space.lse + i, space.delta + i, rows, lanes, c);
  if (dterms.bias != nullptr) AddBiasGradient(tile, space.dp, key, keys, lanes, dterms.bias, terms.keys);
  if (dterms.slope_rows != nullptr) {
    AddSlopeGradient(tile, space.s, space.dp, key, keys, lanes, dterms.slope_rows, dterms.plane);
  }
  if (unit.by_key) {
    const int64_t line = kTile / kDepth<E>, at = (i + lane) / kDepth<E> * widths.stacked;
    // Skips the lanes after the last query: with a single query they would be all steps except one.
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

// Applies the inverse rotation to `count` rows of a gradient, in place; the first row is that of `token`.
inline void RotateBack(const AttentionBackwardArgs& args, int64_t token, float* rows, int64_t stride, int64_t count) {
  if (args.cos == nullptr) return;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = (token + r) * args.pairs;
    RotateHead(rows + r * stride, args.cos + at, args.minus_sin + at, rows + r * stride, args.pairs, args.interleaved);
  }
}

// Finishes and stores the rows of dq from `query` on; tile is [width][query].
template <class T>
void StoreQueries(const AttentionBackwardArgs& args, const float* tile, float* rotated, int64_t query, int64_t count,
                  T* dq) {
  const int64_t width = args.width, stride = UpTo(width, kLanes);
  float factor[kTile];
  for (int64_t i = 0; i < kTile; ++i) factor[i] = args.scale;
  if (args.cos == nullptr) return StoreTransposed(tile, factor, dq, args.dq.stride_t, count, width);
  StoreTransposed(tile, factor, rotated, stride, count, width);
  RotateBack(args, query, rotated, stride, count);
  StoreRows(rotated, stride, 1.0f, dq, args.dq.stride_t, count, width);
}

template <class T>
void BackwardHead(const AttentionBackwardArgs& args, const BackwardUnit& unit, const BackwardSpace<T>& space,
                  const LiveKeys& live, int64_t h) {
  using E = typename OperandOf<T>::type;
  const int64_t width = args.width, count = UpTo(unit.query_end - unit.query, kTile);
  const Rows<T> q = RowsOf<T>(args.q, unit.b, h, 0, args.queries, width);
  const Rows<T> dy = RowsOf<T>(args.dout, unit.b, h, 0, args.queries, width);
  const Rows<T> y{static_cast<const T*>(args.out) + (unit.b * args.queries * args.heads + h) * width,
                  args.heads * width, 0, args.queries, width};
  const ScoreTerms terms(args, unit.b, h);
  const TermGradients dterms(args, unit, h);
  const DropoutMask dropout(args, unit.b, h);
  for (int64_t i = 0; i < count; i += kTile) {
    PackTransposed(q, unit.query + i, space.q + i * width / kDepth<E>);
    PackTransposed(dy, unit.query + i, space.dy + i * width / kDepth<E>);
  }
  PackStacked(q, unit.query, count, space.q_stacked);
  PackStacked(dy, unit.query, count, space.dy_stacked);
  RowStatistics(dy, y, args.lse + (unit.b * args.heads + h) * args.queries, unit.query, count, space.lse, space.delta);
  // The gradients of a query's scores and of its sink sum to 0; see SumSlopeGradients.
  const bool has_totals = args.sinks != nullptr && dterms.slope_rows != nullptr;
  float* const totals = has_totals ? dterms.slope_rows + dterms.plane : nullptr;
  for (float* rows : {dterms.sink_rows, totals}) {
    if (rows == nullptr) continue;
    SinkGradients(terms.sink, space.lse, space.delta, unit.query_end - unit.query, rows + unit.query);
  }
  std::memset(space.dq, 0, count * width * sizeof(float));

  QueryTile tile;
  for (int64_t query = unit.query; query < unit.query_end; query += kTile) {
    tile.Place(live, query, args.queries);
    for (int64_t block = unit.key; block < unit.key_end; block += kTile) {
      const int64_t stop = Least(tile.end, block + kTile);
      int64_t keys;
      for (int64_t key = Most(block, tile.begin / kEdgeTile * kEdgeTile); key < stop; key += keys) {
        keys = tile.KeysAt(key, stop);
        BackwardTile(unit, space, tile, width, key, keys, terms, dterms, dropout);
      }
    }
  }
  if (!unit.by_query || args.dq.data == nullptr) return;
  T* dq = HeadOf<T>(args.dq, unit.b, h);
  for (int64_t query = unit.query; query < unit.query_end; query += kTile) {
    StoreQueries(args, space.dq + (query - unit.query) * width, space.rotated, query,
                 Least(kTile, unit.query_end - query), dq + query * args.dq.stride_t);
  }
}

template <class T>
void RunBackwardUnit(const AttentionBackwardArgs& args, const BackwardUnit& unit) {
  using E = typename OperandOf<T>::type;
  const int64_t width = args.width, queries = UpTo(unit.query_end - unit.query, kTile);
  const int64_t count = unit.key_end - unit.key, keys = UpTo(count, kTile);
  Arena counted;
  BackwardSpace<T>(counted, args, queries, keys);
  Arena arena(Workspace(counted.used()));
  const BackwardSpace<T> space(arena, args, queries, keys);
  const LiveKeys live(args, unit.b);
  const Widths<E> widths(width);

  const Rows<T> k = RowsOf<T>(args.k, unit.b, unit.kv_head, live.begin, live.end, width);
  const Rows<T> v = RowsOf<T>(args.v, unit.b, unit.kv_head, live.begin, live.end, width);
  PackNatural(k, unit.key, keys, space.k);
  PackNatural(v, unit.key, keys, space.v);
  if (kDepth<E> == 2) PackStacked(k, unit.key, keys, space.k_stacked);
  std::memset(space.dk, 0, keys * widths.stacked * sizeof(float));
  std::memset(space.dv, 0, keys * widths.stacked * sizeof(float));
  for (int64_t h = unit.head; h < unit.head + unit.heads; ++h) BackwardHead(args, unit, space, live, h);
  if (!unit.by_key) return;
  T* dk = HeadOf<T>(args.dk, unit.b, unit.kv_head) + unit.key * args.dk.stride_t;
  T* dv = HeadOf<T>(args.dv, unit.b, unit.kv_head) + unit.key * args.dv.stride_t;
  RotateBack(args, unit.key, space.dk, widths.stacked, count);
  StoreRows(space.dk, widths.stacked, args.scale, dk, args.dk.stride_t, count, width);
  StoreRows(space.dv, widths.stacked, 1.0f, dv, args.dv.stride_t, count, width);
}

#else

namespace peak {
namespace {

// Divides [0, length) dterms about `count` ranges that start on multiples of a tile.
struct Ranges {
  int64_t length, ranges;
  static constexpr int64_t kUnit = 64;  // the tile of every instruction set

  Ranges(int64_t length_, int64_t count) : length(length_), ranges(std::clamp<int64_t>(count, 1, Tiles())) {}
  int64_t Tiles() const { return std::max<int64_t>(1, (length + kUnit - 1) / kUnit); }
  int64_t Begin(int64_t range) const { return std::min(length, Tiles() * range / ranges * kUnit); }
};

// The units that sum over keys. A unit runs the heads that share a slice of the bias one after another, so that one
// thread sums each element of the gradient of the bias in one order. Without this gradient each head is a slice.
struct QueryUnits {
  int64_t batch, heads;  // number of slices
  Ranges queries;

  QueryUnits(const AttentionBackwardArgs& args, int64_t count)
      : batch(args.dbias == nullptr ? args.batch : args.bias_batch),
        heads(args.dbias == nullptr ? args.heads : args.bias_heads),
        queries(args.queries, count / std::max<int64_t>(1, batch * heads)) {}
  int64_t Count() const { return batch * heads * queries.ranges; }

  template <class Run>
  void Do(const AttentionBackwardArgs& args, Run run, int64_t unit) const {
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

// A row of ds, with its sink, should sum to 0, but delta comes from the rounded output, so it sums to an error that
// the distances magnify. Subtracting p times this sum reduces an error of 1e-2 of the gradient in bf16 to 1e-6.
void SumSlopeGradients(const AttentionBackwardArgs& args) {
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

void SumSinkGradients(const AttentionBackwardArgs& args) {
  for (int64_t h = 0; h < args.heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < args.batch; ++b) {
      const float* rows = args.dsinks_rows + (b * args.heads + h) * args.queries;
      for (int64_t i = 0; i < args.queries; ++i) sum += rows[i];
    }
    args.dsinks[h] = static_cast<float>(sum);
  }
}

}  // namespace

void AttentionBackward(const AttentionBackwardArgs& args, int threads) {
  const bool by_query = args.dq.data != nullptr || args.dbias != nullptr || args.dalibi != nullptr ||
                        args.dsinks != nullptr;
  const bool by_key = args.dk.data != nullptr;
  const int64_t group = args.heads / args.kv_heads, kv_heads = args.batch * args.kv_heads;
  const auto run = PEAK_PICK_DTYPE(args.dtype, RunBackwardUnit);
  // One pass over a whole kv head takes five products. Two passes over parts of it take four and three, so 7/5 of the
  // work. Two passes are faster if whole heads would leave this share of the threads idle, and they are needed if heads
  // share a bias that has a gradient. The sums are the same to the last bit.
  const int64_t rounds = (kv_heads + threads - 1) / threads;
  const bool shared = args.dbias != nullptr && (args.bias_batch < args.batch || args.bias_heads < args.heads);
  if (by_query && by_key && !shared && 7 * kv_heads >= 5 * rounds * threads) {
    ParallelUnits(kv_heads, threads, [&](int64_t i) {
      const int64_t b = i / args.kv_heads, kv_head = i % args.kv_heads;
      run(args, {b, kv_head, kv_head * group, group, 0, args.queries, 0, args.keys, true, true});
    });
  } else if (kv_heads > 0) {
    const int64_t units = 4 * threads;  // in total, so that threads end at about the same time
    const Ranges keys(args.keys, units / kv_heads);
    const QueryUnits queries(args, units);
    const int64_t key_units = by_key ? kv_heads * keys.ranges : 0, query_units = by_query ? queries.Count() : 0;
    ParallelUnits(key_units + query_units, threads, [&](int64_t i) {
      if (i >= key_units) return queries.Do(args, run, i - key_units);
      const int64_t range = i % keys.ranges, b = i / keys.ranges / args.kv_heads;
      const int64_t kv_head = i / keys.ranges % args.kv_heads;
      run(args, {b, kv_head, kv_head * group, group, 0, args.queries, keys.Begin(range), keys.Begin(range + 1), false,
                 true});
    });
  }
  if (args.dalibi != nullptr) SumSlopeGradients(args);
  if (args.dsinks != nullptr) SumSinkGradients(args);
}

}  // namespace peak

#endif  // PEAK_ISA
