#include "attention/attention.h"

#include <memory>

#define PEAK_THIS_FILE "attention/attention_forward.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "attention/tiles.h"

template <class T>
struct ForwardSpace {
  using E = typename OperandOf<T>::type;
  E *k, *v, *q, *p;
  float *s, *o, *top, *sum, *factor, *mask;

  ForwardSpace(Bump& bump, int64_t keys, int64_t width) {
    const Widths<E> widths(width);
    k = bump.Take<E>(keys * widths.natural);
    v = bump.Take<E>(keys / kDepth<E> * widths.stacked);
    q = bump.Take<E>(width / kDepth<E> * kTile);
    s = bump.Take<float>(kTile * kTile);
    p = kDepth<E> == 1 ? reinterpret_cast<E*>(s) : bump.Take<E>(kTile / 2 * kTile);
    o = bump.Take<float>(width * kTile);
    top = bump.Take<float>(kTile);
    sum = bump.Take<float>(kTile);
    factor = bump.Take<float>(kTile);
    mask = bump.Take<float>(kTile * kTile);
  }
};

PEAK_INLINE void StoreWeights(float* p, int64_t row, Vec even, Vec odd) {
  Store(p + row * kTile, even);
  Store(p + (row + 1) * kTile, odd);
}
PEAK_INLINE void StoreWeights(Pair* p, int64_t row, Vec even, Vec odd) {
  StorePairs(&p[row / 2 * kTile].even, PackPairs(even, odd));
}

// Scores to weights p = e^(c s - top), with the running maximum and sum of each query brought up to date; factor is
// what earlier results must be multiplied by. kDrop: the sum is of all weights, those stored are times the mask.
template <bool kDrop, class E>
void Softmax(const float* s, int64_t rows, Lanes lanes, float c, const float* mask, E* p, float* top, float* sum,
             float* factor) {
  const Vec scale = Set(c), nothing = Set(-kInfinity), zero = Set(0.0f);
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    const Vec before = Load(top + at);
    Vec high = before, high2 = nothing;
    for (int64_t r = 0; r < rows; r += 2) {
      high = Max(Load(s + r * kTile + at) * scale, high);
      high2 = Max(Load(s + (r + 1) * kTile + at) * scale, high2);
    }
    high = Max(high2, high);
    const Vec base = zero - Select(Greater(high, nothing), high, zero);  // no live key yet: not -inf - -inf
    Vec even_sum = zero, odd_sum = zero;
    for (int64_t r = 0; r < rows; r += 2) {
      const Vec even = Exp(Fma(Load(s + r * kTile + at), scale, base));
      const Vec odd = Exp(Fma(Load(s + (r + 1) * kTile + at), scale, base));
      even_sum = even_sum + even;
      odd_sum = odd_sum + odd;
      if (kDrop) {
        const float* kept = mask + r * kTile + at;
        StoreWeights(p + at, r, even * Load(kept), odd * Load(kept + kTile));
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

PEAK_INLINE void Rescale(float* o, int64_t width, Lanes lanes, const float* factor) {
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    const Vec f = Load(factor + at);
    for (int64_t d = 0; d < width; ++d) Store(o + d * kTile + at, Load(o + d * kTile + at) * f);
  }
}

// Query tiles part, part + parts, ... of one head.
template <class T>
void ForwardHead(const AttentionArgs& args, int64_t b, int64_t h, int64_t part, int64_t parts) {
  using E = typename OperandOf<T>::type;
  const int64_t width = args.width, kv_head = h / (args.heads / args.kv_heads);
  const Live live(args, b);
  const Widths<E> widths(width);
  const int64_t base = live.First(0) / kEdgeTile * kEdgeTile;
  const int64_t packed = Most(0, UpTo(live.End(args.queries - 1) - base, kEdgeTile));
  Bump count{nullptr};
  ForwardSpace<T>(count, packed, width);
  Bump bump{AttentionScratch(count.used)};
  const ForwardSpace<T> space(bump, packed, width);

  const Rows<T> q{At<T>(args.q, b, args.q_b, h, args.q_h), args.q_t, 0, args.queries, width};
  const Rows<T> k{At<T>(args.k, b, args.k_b, kv_head, args.k_h), args.k_t, live.begin, live.end, width};
  const Rows<T> v{At<T>(args.v, b, args.v_b, kv_head, args.v_h), args.v_t, live.begin, live.end, width};
  T* out = static_cast<T*>(args.out) + (b * args.queries * args.heads + h) * width;
  float* lse = args.lse + (b * args.heads + h) * args.queries;
  const ScoreTerms terms(args, b, h);
  const Dropout dropout(args, b, h);
  PackNatural(k, base, packed, space.k);
  PackStacked(v, base, packed, space.v);

  QueryTile tile;
  for (int64_t query = part * kTile; query < args.queries; query += parts * kTile) {
    tile.Place(live, query, args.queries);
    PackTransposed(q, query, space.q);
    std::memset(space.o, 0, width * kTile * sizeof(float));
    for (int64_t i = 0; i < kTile; ++i) {
      space.top[i] = -kInfinity;
      space.sum[i] = 0.0f;
    }
    int64_t keys;
    for (int64_t key = tile.begin / kEdgeTile * kEdgeTile; key < tile.end; key += keys) {
      keys = tile.KeysAt(key, tile.end);
      const int64_t rows = UpTo(keys, kBlockRows);
      const Lanes lanes = tile.LanesAt(key, rows);
      const int64_t lane = lanes.begin * kLanes, vecs = lanes.end - lanes.begin;
      Multiply(space.k + (key - base) * widths.natural, widths.natural, 1, space.q + lane, kTile, width / kDepth<E>,
               space.s + lane, kTile, rows, vecs, false);
      const float c = Scores(terms, tile, space.s, key, rows, lanes);
      if (dropout.On()) {
        dropout.Draw(tile, key, rows, lanes, space.mask);
        Softmax<true>(space.s, rows, lanes, c, space.mask, space.p, space.top, space.sum, space.factor);
      } else {
        Softmax<false>(space.s, rows, lanes, c, nullptr, space.p, space.top, space.sum, space.factor);
      }
      Rescale(space.o, width, lanes, space.factor);
      Multiply(space.v + (key - base) / kDepth<E> * widths.stacked, 1, widths.stacked, space.p + lane, kTile,
               rows / kDepth<E>, space.o + lane, kTile, width, vecs, true);
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      const float sum = space.sum[i];
      lse[query + i] = sum == 0.0f ? -kInfinity : space.top[i] + std::log(sum);
    }
    for (int64_t i = 0; i < kTile; ++i) space.factor[i] = space.sum[i] == 0.0f ? 0.0f : 1.0f / space.sum[i];
    StoreTransposed(space.o, space.factor, out + query * args.heads * width, args.heads * width, tile.count, width);
  }
}

// ------------------------------------------------------------------------- few queries: each alone, straight from K, V
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

// p = e^(s - max s) over n scores; returns their sum, and the maximum through *top.
inline float WeightsOfRow(float* s, int64_t n, float* top) {
  Vec high = Set(-kInfinity), sum = Set(0.0f);
  for (int64_t j = 0; j < n; j += kLanes) high = Max(Load(s + j), high);
  *top = MaxOf(high);
  const Vec base = Set(*top == -kInfinity ? 0.0f : *top);  // biases of -inf alone: not -inf - -inf
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec p = Exp(Load(s + j) - base);
    Store(s + j, p);
    sum = sum + p;
  }
  return Sum(sum);
}

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
void ForwardRows(const AttentionArgs& args, int64_t b, int64_t h) {
  const int64_t width = args.width, kv_head = h / (args.heads / args.kv_heads);
  const Live live(args, b);
  const ScoreTerms terms(args, b, h);
  Bump bump{AttentionScratch(UpTo(width, kLanes) * 4 + UpTo(args.keys, kLanes) * 4 + 128)};
  float* q = bump.Take<float>(UpTo(width, kLanes));
  float* s = bump.Take<float>(UpTo(args.keys, kLanes));
  for (int64_t i = 0; i < args.queries; ++i) {
    const int64_t first = live.First(i), n = Most(0, live.End(i) - first);
    const T* q_row = At<T>(args.q, b, args.q_b, h, args.q_h) + i * args.q_t;
    const T* k = At<T>(args.k, b, args.k_b, kv_head, args.k_h) + first * args.k_t;
    const T* v = At<T>(args.v, b, args.v_b, kv_head, args.v_h) + first * args.v_t;
    for (int64_t d = 0; d < width; d += kLanes) Store(q + d, Load(q_row + d, width - d) * Set(terms.scale));
    for (int64_t j = 0; j < n; ++j) {
      s[j] = Dot(q, k + j * args.k_t, width) + terms.slope * static_cast<float>(first + j - i - live.offset);
    }
    if (terms.bias != nullptr) {
      terms.bias_dtype == DType::kFloat32 ? AddBiasRow<float>(terms, s, i, first, n)
                                          : AddBiasRow<bf16>(terms, s, i, first, n);
    }
    for (int64_t j = n; j < UpTo(n, kLanes); ++j) s[j] = -kInfinity;
    float top = -kInfinity;
    const float sum = WeightsOfRow(s, n, &top);
    T* out = static_cast<T*>(args.out) + ((b * args.queries + i) * args.heads + h) * width;
    WeightedRow(s, n, v, args.v_t, width, sum == 0.0f ? 0.0f : 1.0f / sum, out);
    args.lse[(b * args.heads + h) * args.queries + i] = sum == 0.0f ? -kInfinity : top + std::log(sum);
  }
}

#else

namespace peak {

// Up to here a tile would mostly hold dead lanes.
constexpr int64_t kFewQueries = 4;

char* AttentionScratch(int64_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;  // in case the next line throws
    memory.reset(new char[bytes + 64]);
    size = bytes;
  }
  return memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) & 63);
}

void AttentionForward(const AttentionArgs& args, int threads) {
  const bool few = args.queries <= kFewQueries && args.dropout == 0.0;  // those rows draw no masks
  const int64_t heads = args.batch * args.heads, tiles = (args.queries + 63) / 64;
  if (heads * args.queries == 0) return;
  // Four units of work a thread, or causal heads of unequal tiles would leave one waiting.
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
