// What both passes of attention share. Included once per set by attention*.cpp, after simd.h.
//
// Scores are held transposed, one query a lane: a tile S[key][query] is K times Q^T. Row maxima, sums and corrections
// are then plain vector operations without a horizontal step, and every product has one form,
//     C[row][lane] += sum_k A(row, k) * B[k][lane],
// with A broadcast from memory and B and C read by the vector:
//     S   = K  Q^T     dP  = V  dO^T      k over the width     A natural   B transposed   C[key][query]
//     O^T = V^T P      dQ^T = K^T dS      k over the keys      A stacked   B a tile       C[width][query]
//     dV  = P  dO      dK  = dS Q         k over the queries   A a tile    B stacked      C[key][width]
// An operand is float, or Pair where the set multiplies bf16 pairs; then two steps of k lie together in each packing:
//     natural [row][width / 2]   stacked [row / 2][width]   transposed [width / 2][row]
// Without such an instruction bf16 is widened when it is packed. Packing also ends ragged sizes (zeros up to whole
// vectors) and strides that make rows collide in the L1 cache.

#include "simd/philox.h"
#include "gemm/small_products.h"

constexpr int64_t kTile = 64;  // queries a tile, and keys: four operands of 64 x 64 floats fill L1 and part of L2
// Keys a tile where the mask cuts through, so that less of it is dead. Causal T 256, D 64 on Zen 4: 16 beats 32 by 2 to
// 5 % and 64 by 10 to 15 %.
constexpr int64_t kEdgeTile = 16;
constexpr float kInfinity = __builtin_inff();

// -------------------------------------------------------------------------------------------------------- packing
// A strided matrix; rows outside [begin, end) read as zeros, whatever memory holds there.
template <class T>
struct Rows {
  const T* p;
  int64_t stride, begin, end, width;

  PEAK_INLINE bool Has(int64_t row) const { return row >= begin && row < end; }
  PEAK_INLINE Vec At(int64_t row, int64_t column) const {
    return Has(row) ? Load(p + row * stride + column, width - column) : Set(0.0f);
  }
};

// Row lengths of the packings, in operands.
template <class E>
struct Widths {
  int64_t natural, stacked, transposed;
  explicit Widths(int64_t width)
      : natural(kDepth<E> == 1 ? UpTo(width, kLanes) : width / 2), stacked(UpTo(width, kLanes)), transposed(kTile) {}
};

// Packs `count` rows from `first` on; count is a multiple of kDepth.
template <class T>
void PackStacked(const Rows<T>& rows, int64_t first, int64_t count, float* out) {
  const int64_t stacked = UpTo(rows.width, kLanes);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < stacked; d += kLanes) Store(out + r * stacked + d, rows.At(first + r, d));
  }
}
template <class T>
void PackStacked(const Rows<T>& rows, int64_t first, int64_t count, Pair* out) {
  const int64_t stacked = UpTo(rows.width, kLanes);
  for (int64_t r = 0; r < count; r += 2) {
    for (int64_t d = 0; d < stacked; d += kLanes) {
      StorePairs(&out[r / 2 * stacked + d].even, PackPairs(rows.At(first + r, d), rows.At(first + r + 1, d)));
    }
  }
}

template <class T>
void PackNatural(const Rows<T>& rows, int64_t first, int64_t count, float* out) {
  PackStacked(rows, first, count, out);
}
inline void PackNatural(const Rows<bf16>& rows, int64_t first, int64_t count, Pair* out) {
  const int64_t bytes = rows.width * 2;
  for (int64_t r = 0; r < count; ++r, out += rows.width / 2) {
    if (rows.Has(first + r)) {
      std::memcpy(out, rows.p + (first + r) * rows.stride, bytes);
    } else {
      std::memset(out, 0, bytes);
    }
  }
}

// kTile rows from `first` on.
template <class T>
void PackTransposed(const Rows<T>& rows, int64_t first, float* out) {
  for (int64_t r = 0; r < kTile; r += kLanes) {
    for (int64_t d = 0; d < rows.width; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = rows.At(first + r + i, d);
      Transpose(square);
      for (int64_t i = 0; i < Least(kLanes, rows.width - d); ++i) Store(out + (d + i) * kTile + r, square[i]);
    }
  }
}
inline void PackTransposed(const Rows<bf16>& rows, int64_t first, Pair* out) {
  // Pairs move as whole floats; no arithmetic touches them.
  Rows<float> pairs{nullptr, 0, 0, 1, rows.width / 2};
  for (int64_t r = 0; r < kTile; r += kLanes) {
    for (int64_t d = 0; d < pairs.width; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = first + r + i;
        pairs.p = reinterpret_cast<const float*>(rows.p + row * rows.stride);
        square[i] = rows.Has(row) ? pairs.At(0, d) : Set(0.0f);
      }
      Transpose(square);
      for (int64_t i = 0; i < Least(kLanes, pairs.width - d); ++i) {
        Store(reinterpret_cast<float*>(out + (d + i) * kTile + r), square[i]);
      }
    }
  }
}

// out[row][d] = tile[d][row] * factor[row] for `count` rows.
template <class T>
void StoreTransposed(const float* tile, const float* factor, T* out, int64_t stride, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; r += kLanes) {
    const Vec f = Load(factor + r);
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t n = Least(kLanes, width - d);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = i < n ? Load(tile + (d + i) * kTile + r) * f : Set(0.0f);
      Transpose(square);
      for (int64_t i = 0; i < Least(kLanes, count - r); ++i) Store(out + (r + i) * stride + d, square[i], n);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- mask
// Every mask is one range of keys a query: First(i) .. End(i) - 1, both growing with i.
struct Live {
  int64_t offset, begin, end, window, documents;
  const int64_t* starts;  // of documents, one more than there are, or null
  bool causal;

  Live(const AttentionArgs& args, int64_t b)
      : offset(args.keys - args.queries), documents(args.documents), starts(args.cu_seqlens), causal(args.causal) {
    begin = args.kv_start == nullptr ? 0 : Most(0, args.kv_start[b]);
    end = args.kv_len == nullptr ? args.keys
                                 : Least(args.keys, (args.kv_start == nullptr ? 0 : args.kv_start[b]) + args.kv_len[b]);
    window = args.window > 0 ? args.window : args.queries + args.keys;
  }
  // The last document that starts at or before token i.
  PEAK_INLINE int64_t Document(int64_t i) const {
    int64_t low = 0, high = documents - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (starts[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  PEAK_INLINE int64_t First(int64_t i) const {
    const int64_t first = Most(begin, i + offset - window + 1);
    return starts == nullptr ? first : Most(first, starts[Document(i)]);
  }
  PEAK_INLINE int64_t End(int64_t i) const {
    const int64_t last = causal ? Least(end, i + offset + 1) : end;
    return starts == nullptr ? last : Least(last, starts[Document(i) + 1]);
  }
};

// Vectors begin .. end - 1 of a tile's queries.
struct Lanes {
  int64_t begin, end;
};

// A tile of queries: their bounds as floats (exact to 2^24 keys), one a lane.
struct QueryTile {
  int64_t query, count, vecs;
  int64_t begin, end;        // keys that any of them sees
  int64_t all_from, all_to;  // keys that all of them see
  float first[kTile], last[kTile], position[kTile];

  void Place(const Live& live, int64_t query_, int64_t queries) {
    query = query_;
    count = Least(kTile, queries - query);
    vecs = UpTo(count, kLanes) / kLanes;
    begin = live.First(query);
    all_from = live.First(query + count - 1);
    all_to = live.End(query);
    end = live.End(query + count - 1);
    for (int64_t i = 0; i < kTile; ++i) {
      first[i] = static_cast<float>(live.First(query + i));
      last[i] = static_cast<float>(live.End(query + i) - 1);
      position[i] = static_cast<float>(query + i + live.offset);
    }
  }
  // Keys of the tile that starts at `key`: whole where all see them, else an edge.
  PEAK_INLINE int64_t KeysAt(int64_t key, int64_t stop) const {
    const bool whole = key >= all_from && key + kTile <= Least(all_to, stop);
    return whole ? kTile : Least(kEdgeTile, stop - key);
  }
  PEAK_INLINE bool Whole(int64_t key, int64_t rows) const { return key >= all_from && key + rows <= all_to; }
  // The vectors of queries that see any of the keys from `key` on: both bounds of a query grow with it.
  PEAK_INLINE Lanes LanesAt(int64_t key, int64_t rows) const {
    Lanes lanes{0, vecs};
    while (lanes.begin < vecs && last[lanes.begin * kLanes + kLanes - 1] < static_cast<float>(key)) ++lanes.begin;
    while (lanes.end > lanes.begin && first[(lanes.end - 1) * kLanes] >= static_cast<float>(key + rows)) --lanes.end;
    return lanes;
  }
};

// What a query head does to its products q k^T.
struct ScoreTerms {
  float scale, slope;
  const char* bias;  // of query 0 and key 0, or null
  DType bias_dtype;
  int64_t bias_t, bias_s, keys;

  ScoreTerms(const AttentionArgs& args, int64_t b, int64_t h)
      : scale(args.scale), slope(args.alibi == nullptr ? 0.0f : args.alibi[h]), bias(nullptr),
        bias_dtype(args.bias_dtype), bias_t(args.bias_t), bias_s(args.bias_s), keys(args.keys) {
    if (args.bias == nullptr) return;
    const int64_t at = (args.bias_batch > 1 ? b * args.bias_b : 0) + (args.bias_heads > 1 ? h * args.bias_h : 0);
    bias = static_cast<const char*>(args.bias) + at * SizeOf(bias_dtype);
  }
  // Biases of n keys from `key` on, for one query; zeros after them.
  template <class B>
  PEAK_INLINE Vec Biases(int64_t query, int64_t key, int64_t n) const {
    const B* p = reinterpret_cast<const B*>(bias) + query * bias_t + key * bias_s;
    if (bias_s == 1) return Load(p, n);
    B part[kLanes] = {};
    for (int64_t i = 0; i < Least(n, kLanes); ++i) part[i] = p[i * bias_s];
    return Load(part);
  }
};

// s = scale s + bias.
template <class B>
PEAK_NOINLINE void AddBias(const ScoreTerms& terms, const QueryTile& tile, float* s, int64_t key, int64_t rows,
                           Lanes lanes) {
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t n = Least(kLanes, terms.keys - key - r);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool there = n > 0 && at + i < tile.count;
        square[i] = there ? terms.Biases<B>(tile.query + at + i, key + r, n) : Set(0.0f);
      }
      Transpose(square);
      for (int64_t i = 0; i < Least(kLanes, rows - r); ++i) {
        float* score = s + (r + i) * kTile + at;
        Store(score, Fma(Load(score), Set(terms.scale), square[i]));
      }
    }
  }
}

// s = c s + slope (j - i), -inf where dead; rows past the tile's keys are dead too.
inline void MaskScores(const QueryTile& tile, float* s, int64_t key, int64_t rows, Lanes lanes, float c, float slope) {
  const Vec gone = Set(-kInfinity);
  for (int64_t v = lanes.begin; v < lanes.end; ++v) {
    const Vec first = Load(tile.first + v * kLanes), last = Load(tile.last + v * kLanes);
    const Vec position = Load(tile.position + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec j = Set(static_cast<float>(key + r));
      float* at = s + r * kTile + v * kLanes;
      const Vec x = Fma(Set(slope), j - position, Load(at) * Set(c));
      Store(at, Select(Greater(first, j), gone, Select(Greater(j, last), gone, x)));
    }
  }
}

// Makes scores of the products in s; returns the factor that they still lack: the scale, where nothing else is due.
inline float Scores(const ScoreTerms& terms, const QueryTile& tile, float* s, int64_t key, int64_t rows, Lanes lanes) {
  float c = terms.scale;
  if (terms.bias != nullptr) {
    terms.bias_dtype == DType::kFloat32 ? AddBias<float>(terms, tile, s, key, rows, lanes)
                                        : AddBias<bf16>(terms, tile, s, key, rows, lanes);
    c = 1.0f;
  }
  if (terms.slope == 0.0f && tile.Whole(key, rows)) return c;
  MaskScores(tile, s, key, rows, lanes, c, terms.slope);
  return 1.0f;
}

// Which weights of a head are dropped. The weight of query i and key j is kept where word j % 4 of Philox's counter
// (i, j / 4, b, h) under the seed is at least dropout * 2^32: its place decides, not the tile or thread that asks.
struct Dropout {
  float factor = 0.0f;  // of what is kept; 0: nothing is dropped
  uint32_t limit = 0, b, h;
  PhiloxKey key;

  Dropout(const AttentionArgs& args, int64_t b_, int64_t h_)
      : b(static_cast<uint32_t>(b_)), h(static_cast<uint32_t>(h_)), key{0, 0} {
    if (args.dropout == 0.0) return;
    factor = static_cast<float>(1.0 / (1.0 - args.dropout));
    limit = static_cast<uint32_t>(args.dropout * 4294967296.0);
    const uint64_t seed = static_cast<uint64_t>(*args.seed);
    key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  }
  bool On() const { return factor != 0.0f; }
  // mask[key][query] = factor or 0, for `rows` keys from `from` on, both multiples of 4.
  PEAK_NOINLINE void Draw(const QueryTile& tile, int64_t from, int64_t rows, Lanes lanes, float* mask) const {
    for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
      const Words query = SetWords(static_cast<uint32_t>(tile.query + at)) + CountWords();
      for (int64_t r = 0; r < rows; r += 4) {
        Words words[] = {query, SetWords(static_cast<uint32_t>((from + r) / 4)), SetWords(b), SetWords(h)};
        Philox(key, words);
        for (int w = 0; w < 4; ++w) {
          Store(mask + (r + w) * kTile + at, Select(NotBelow(words[w], limit), Set(factor), Set(0.0f)));
        }
      }
    }
  }
};

// Places arrays one after another from `base` on, each on its own cache lines; from null it only counts.
struct Bump {
  char* base;
  int64_t used = 0;
  template <class X>
  X* Take(int64_t count) {
    char* at = base == nullptr ? nullptr : base + used;
    used += UpTo(count * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(at);
  }
};

template <class T>
PEAK_INLINE const T* At(const void* p, int64_t b, int64_t stride_b, int64_t h, int64_t stride_h) {
  return static_cast<const T*>(p) + b * stride_b + h * stride_h;
}
