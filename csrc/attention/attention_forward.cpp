#include "attention/attention.h"

#include "base/memory.h"

#define PEAK_THIS_FILE "attention/attention_forward.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "attention/tiles.h"

// ------------------------------------------------------------------------------------------------ tiles of queries
template <class T>
struct ForwardSpace {
  using E = typename OperandOf<T>::type;
  E *k, *v, *q, *p;
  float *s, *acc, *mask;
  OnlineSoftmax softmax;

  ForwardSpace(Arena& arena, int64_t keys, int64_t width)
      : k(arena.Take<E>(keys * Widths<E>(width).natural)),
        v(arena.Take<E>(keys / kDepth<E> * Widths<E>(width).stacked)),
        q(arena.Take<E>(width / kDepth<E> * kTile)),
        p(kDepth<E> == 1 ? nullptr : arena.Take<E>(kTile / 2 * kTile)),
        s(arena.Take<float>(kTile * kTile)),
        acc(arena.Take<float>(width * kTile)),
        mask(arena.Take<float>(kTile * kTile)),
        softmax(arena) {
    if (kDepth<E> == 1) p = reinterpret_cast<E*>(s);  // float weights overwrite the scores
  }
};

// Turns scores c s into weights p and updates m, l and alpha. kDrop: the stored weights are multiplied by the mask.
template <bool kDrop, class T>
void Softmax(const ForwardSpace<T>& space, int64_t rows, Lanes lanes, float c) {
  const Vec scale = Set(c), nothing = Set(-kInfinity);
  const float* s = space.s;
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    Vec m = Load(space.softmax.m + at), m_odd = nothing;
    for (int64_t r = 0; r < rows; r += 2) {
      m = Max(Load(s + r * kTile + at) * scale, m);
      m_odd = Max(Load(s + (r + 1) * kTile + at) * scale, m_odd);
    }
    m = Max(m_odd, m);
    if (kDrop) {
      UpdateSoftmax(s, rows, at, scale, m, FactorByKeyAndQuery{space.mask + at}, space.p, space.softmax);
    } else {
      UpdateSoftmax(s, rows, at, scale, m, NoFactor{}, space.p, space.softmax);
    }
  }
}

// One query tile against the `keys` keys from `key` on; `base` is the first packed key.
template <class T>
PEAK_INLINE void ForwardTile(const ForwardSpace<T>& space, const QueryTile& tile, const ScoreTerms& terms,
                             const DropoutMask& dropout, int64_t width, int64_t base, int64_t key, int64_t keys) {
  using E = typename OperandOf<T>::type;
  const Widths<E> widths(width);
  const int64_t rows = UpTo(keys, kBlockRows);
  const Lanes lanes = tile.LanesAt(key, rows);
  const int64_t lane = lanes.begin * kLanes, vecs = lanes.end - lanes.begin;
  Multiply(space.k + (key - base) * widths.natural, widths.natural, 1, space.q + lane, kTile, width / kDepth<E>,
           space.s + lane, kTile, rows, vecs, false);
  const float c = Scores(terms, tile, space.s, key, rows, lanes, nullptr);
  if (dropout.On()) {
    dropout.Draw(tile, key, rows, lanes, space.mask);
    Softmax<true>(space, rows, lanes, c);
  } else {
    Softmax<false>(space, rows, lanes, c);
  }
  Rescale(space.acc, width, lane, lanes.end * kLanes, space.softmax.alpha);
  Multiply(space.v + (key - base) / kDepth<E> * widths.stacked, 1, widths.stacked, space.p + lane, kTile,
           rows / kDepth<E>, space.acc + lane, kTile, width, vecs, true);
}

// Computes query tiles part, part + parts, ... of one head.
template <class T>
void ForwardHead(const AttentionForwardArgs& args, int64_t b, int64_t h, int64_t part, int64_t parts) {
  const int64_t width = args.width, kv_head = h / (args.heads / args.kv_heads);
  const LiveKeys live(args, b);
  const int64_t base = live.First(0) / kEdgeTile * kEdgeTile;
  const int64_t packed = Most(0, UpTo(live.End(args.queries - 1) - base, kEdgeTile));
  Arena counted;
  ForwardSpace<T>(counted, packed, width);
  Arena arena(Workspace(counted.used()));
  const ForwardSpace<T> space(arena, packed, width);

  const Rows<T> q = RowsOf<T>(args.q, b, h, 0, args.queries, width);
  T* out = static_cast<T*>(args.out) + (b * args.queries * args.heads + h) * width;
  float* lse = args.lse + (b * args.heads + h) * args.queries;
  const ScoreTerms terms(args, b, h);
  const DropoutMask dropout(args, b, h);
  PackNatural(RowsOf<T>(args.k, b, kv_head, live.begin, live.end, width), base, packed, space.k);
  PackStacked(RowsOf<T>(args.v, b, kv_head, live.begin, live.end, width), base, packed, space.v);

  const float *m = space.softmax.m, *l = space.softmax.l;
  QueryTile tile;
  for (int64_t query = part * kTile; query < args.queries; query += parts * kTile) {
    tile.Place(live, query, args.queries);
    PackTransposed(q, query, space.q);
    std::memset(space.acc, 0, width * kTile * sizeof(float));
    for (int64_t i = 0; i < kTile; ++i) space.softmax.Reset(i, terms.sink);
    int64_t keys;
    for (int64_t key = tile.begin / kEdgeTile * kEdgeTile; key < tile.end; key += keys) {
      keys = tile.KeysAt(key, tile.end);
      ForwardTile(space, tile, terms, dropout, width, base, key, keys);
    }
    for (int64_t i = 0; i < tile.count; ++i) lse[query + i] = l[i] == 0.0f ? -kInfinity : m[i] + std::log(l[i]);
    float* inverse = space.softmax.alpha;
    for (int64_t i = 0; i < kTile; ++i) inverse[i] = l[i] == 0.0f ? 0.0f : 1.0f / l[i];
    StoreTransposed(space.acc, inverse, out + query * args.heads * width, args.heads * width, tile.count, width);
  }
}

// ------------------------------------------------------------------ few queries: one at a time, without packing K, V
template <class T>
PEAK_INLINE float Dot(const float* q, const T* k, int64_t width) {
  Vec even = Set(0.0f), odd = even;
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    even = Fma(Load(q + d), Load(k + d), even);
    odd = Fma(Load(q + d + kLanes), Load(k + d + kLanes), odd);
  }
  for (; d < width; d += kLanes) even = Fma(Load(q + d), Load(k + d, width - d), even);
  return Sum(even + odd);
}

template <class B>
void AddBiasRow(const ScoreTerms& terms, float* s, int64_t query, int64_t first, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t left = n - j;
    Store(s + j, Load(s + j, left) + terms.Biases<B>(query, first + j, left), left);
  }
}

// s = softcap tanh(s / softcap) + slope (j + distance), for n scaled products s[j].
inline void CapRow(const ScoreTerms& terms, float* s, int64_t n, int64_t distance) {
  const Softcap cap(terms.softcap);
  for (int64_t j = 0; j < n; j += kLanes) Store(s + j, cap(Load(s + j, n - j)), n - j);
  for (int64_t j = 0; j < n; ++j) s[j] += terms.slope * static_cast<float>(j + distance);
}

// Turns n scores into weights e^(s - m), where m is the maximum of them and the sink. Returns l, the sum of the weights
// and of that of the sink.
inline float WeightsOfRow(float* s, int64_t n, float sink, float* m) {
  Vec high = Set(-kInfinity), sum = Set(0.0f);
  for (int64_t j = 0; j < n; j += kLanes) high = Max(Load(s + j), high);
  *m = std::max(MaxOf(high), sink);
  const float base = *m == -kInfinity ? 0.0f : *m;  // if every bias is -inf: -inf - -inf is NaN
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec p = Exp(Load(s + j) - Set(base));
    Store(s + j, p);
    sum = sum + p;
  }
  return Sum(sum) + (sink == -kInfinity ? 0.0f : std::exp(sink - base));
}

// out = factor * sum_j p[j] v[j].
template <class T>
void WeightedRow(const float* p, int64_t n, const T* v, int64_t stride, int64_t width, float factor, T* out) {
  for (int64_t d = 0; d < width; d += 4 * kLanes) {
    Vec acc[4] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
    const T* row = v + d;
    for (int64_t j = 0; j < n; ++j, row += stride) {
      const Vec weight = Set(p[j]);
      for (int i = 0; i < 4; ++i) {
        if (d + i * kLanes < width) acc[i] = Fma(weight, Load(row + i * kLanes, width - d - i * kLanes), acc[i]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int64_t at = d + i * kLanes;
      if (at < width) Store(out + at, acc[i] * Set(factor), width - at);
    }
  }
}

template <class T>
void ForwardRows(const AttentionForwardArgs& args, int64_t b, int64_t h) {
  const int64_t width = args.width, kv_head = h / (args.heads / args.kv_heads);
  const LiveKeys live(args, b);
  const ScoreTerms terms(args, b, h);
  Arena arena(Workspace((UpTo(width, kLanes) + UpTo(args.keys, kLanes)) * sizeof(float) + 2 * kCacheLine));
  float* q = arena.Take<float>(UpTo(width, kLanes));
  float* s = arena.Take<float>(UpTo(args.keys, kLanes));
  const float slope = terms.softcap > 0.0f ? 0.0f : terms.slope;  // CapRow adds it after the cap
  for (int64_t i = 0; i < args.queries; ++i) {
    const int64_t first = live.First(i), n = Most(0, live.End(i) - first);
    const T* q_row = HeadOf<T>(args.q, b, h) + i * args.q.stride_t;
    const T* k = HeadOf<T>(args.k, b, kv_head) + first * args.k.stride_t;
    const T* v = HeadOf<T>(args.v, b, kv_head) + first * args.v.stride_t;
    for (int64_t d = 0; d < width; d += kLanes) Store(q + d, Load(q_row + d, width - d) * Set(terms.scale));
    const int64_t distance = first - i - live.offset;  // of the first key
    for (int64_t j = 0; j < n; ++j) {
      s[j] = Dot(q, k + j * args.k.stride_t, width) + slope * static_cast<float>(distance + j);
    }
    if (terms.softcap > 0.0f) CapRow(terms, s, n, distance);
    if (terms.bias != nullptr) {
      terms.bias_dtype == DType::kFloat32 ? AddBiasRow<float>(terms, s, i, first, n)
                                          : AddBiasRow<bf16>(terms, s, i, first, n);
    }
    for (int64_t j = n; j < UpTo(n, kLanes); ++j) s[j] = -kInfinity;
    float m = -kInfinity;
    const float l = WeightsOfRow(s, n, terms.sink, &m);
    T* out = static_cast<T*>(args.out) + ((b * args.queries + i) * args.heads + h) * width;
    WeightedRow(s, n, v, args.v.stride_t, width, l == 0.0f ? 0.0f : 1.0f / l, out);
    args.lse[(b * args.heads + h) * args.queries + i] = l == 0.0f ? -kInfinity : m + std::log(l);
  }
}

#else

namespace peak {

// With up to this number of queries most lanes of a tile would be dead.
constexpr int64_t kFewQueries = 4;

void AttentionForward(const AttentionForwardArgs& args, int threads) {
  const bool few = args.queries <= kFewQueries && args.dropout == 0.0;  // ForwardRows has no dropout
  const int64_t heads = args.batch * args.heads, tiles = (args.queries + 63) / 64;
  if (heads * args.queries == 0) return;
  // Four units of work for each thread: with fewer, causal heads of unequal tiles would leave a thread idle.
  const int64_t parts = few ? 1 : std::clamp<int64_t>((4 * threads + heads - 1) / heads, 1, tiles);
  const auto rows = PEAK_PICK_DTYPE(args.dtype, ForwardRows);
  const auto head = PEAK_PICK_DTYPE(args.dtype, ForwardHead);
  ParallelUnits(heads * parts, threads, [&](int64_t unit) {
    const int64_t b = unit / parts / args.heads, h = unit / parts % args.heads;
    few ? rows(args, b, h) : head(args, b, h, unit % parts, parts);
  });
}

}  // namespace peak

#endif  // PEAK_ISA
