// Online softmax of a tile of scores, one query a lane. Included once per instruction set, after gemm/small_products.h.
//
//   m' = max(m, max_j s_j)     alpha = e^(m - m')     p_j = e^(s_j - m')
//   l' = alpha l + sum_j p_j   acc' = alpha acc + P V
//
// Milakov, Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867, algorithm 3; Dao et al.
// 2022, "FlashAttention", arXiv:2205.14135, algorithm 1.

#include "gemm/small_products.h"
#include "simd/activations.h"

// Number of queries and number of keys in a tile: four operands of 64 x 64 floats fill L1 and part of L2.
constexpr int64_t kTile = 64;
constexpr float kInfinity = __builtin_inff();

// m, l and alpha of kTile queries.
struct OnlineSoftmax {
  float *m, *l, *alpha;

  explicit OnlineSoftmax(Arena& arena)
      : m(arena.Take<float>(kTile)), l(arena.Take<float>(kTile)), alpha(arena.Take<float>(kTile)) {}
  // Starts query i with its sink, a logit without a value; -inf: no sink.
  void Reset(int64_t i, float sink) const {
    m[i] = sink;
    l[i] = sink == -kInfinity ? 0.0f : 1.0f;
  }
};

// -m, or 0 where m is -inf because no key is live yet: -inf - -inf is NaN.
PEAK_INLINE Vec MinusMax(Vec m) {
  const Vec zero = Set(0.0f);
  return zero - Select(Greater(m, Set(-kInfinity)), m, zero);
}

// Limits scores: limit tanh(x / limit). Not used with limit 0.
struct Softcap {
  float limit, inverse;
  explicit Softcap(float limit_) : limit(limit_), inverse(limit_ == 0.0f ? 0.0f : 1.0f / limit_) {}
  PEAK_INLINE Vec operator()(Vec x) const { return Tanh::Value(x * Set(inverse)) * Set(limit); }
};

// Weights of two keys. Rows of p have kTile lanes; a row of pairs holds both keys.
PEAK_INLINE void StoreWeights(float* p, int64_t row, Vec even, Vec odd) {
  Store(p + row * kTile, even);
  Store(p + (row + 1) * kTile, odd);
}
PEAK_INLINE void StoreWeights(Pair* p, int64_t row, Vec even, Vec odd) {
  StorePairs(&p[row / 2 * kTile].even, PackPairs(even, odd));
}

// Factors of the stored weights; l is the sum of the weights without them.
struct NoFactor {
  PEAK_INLINE Vec operator()(Vec p, int64_t) const { return p; }
};
struct FactorByKeyAndQuery {
  const float* factors;  // [key][kTile]
  PEAK_INLINE Vec operator()(Vec p, int64_t row) const { return p * Load(factors + row * kTile); }
};
struct FactorByKey {
  const float* factors;  // [key]
  PEAK_INLINE Vec operator()(Vec p, int64_t row) const { return p * Set(factors[row]); }
};

// Updates m, l and alpha of one vector of queries, from lane `at` on, with `rows` new scores c s[key][at]. m_new is the
// maximum of m and these scores. Stores the weights times their factor in p.
template <class Factor, class E>
PEAK_INLINE void UpdateSoftmax(const float* s, int64_t rows, int64_t at, Vec c, Vec m_new, const Factor& factor, E* p,
                               const OnlineSoftmax& state) {
  const Vec base = MinusMax(m_new);
  Vec even_sum = Set(0.0f), odd_sum = Set(0.0f);
  for (int64_t r = 0; r < rows; r += 2) {
    const Vec even = Exp(Fma(Load(s + r * kTile + at), c, base));
    const Vec odd = Exp(Fma(Load(s + (r + 1) * kTile + at), c, base));
    even_sum = even_sum + even;
    odd_sum = odd_sum + odd;
    StoreWeights(p + at, r, factor(even, r), factor(odd, r + 1));
  }
  const Vec alpha = Exp(Load(state.m + at) + base);
  Store(state.alpha + at, alpha);
  Store(state.l + at, Fma(Load(state.l + at), alpha, even_sum + odd_sum));
  Store(state.m + at, m_new);
}

// acc[row][lane] *= alpha[lane] for the vectors of lanes [begin, end).
PEAK_INLINE void Rescale(float* acc, int64_t rows, int64_t begin, int64_t end, const float* alpha) {
  for (int64_t at = begin; at < end; at += kLanes) {
    const Vec factor = Load(alpha + at);
    for (int64_t d = 0; d < rows; ++d) Store(acc + d * kTile + at, Load(acc + d * kTile + at) * factor);
  }
}
