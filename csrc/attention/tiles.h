// Tiles, packing and masks that both passes of attention share. Included once per instruction set, after simd/simd.h.
// More than 300 lines: packing, masks, score terms and dropout share the layout that this comment defines.
//
// Scores are transposed, with one query a lane: a tile S[key][query] is K times Q^T. Row maxima, sums and corrections
// are then plain vector operations without a horizontal step, and every product has one form,
//     C[row][lane] += sum_k A(row, k) * B[k][lane],
// where A is broadcast from memory and B and C are read as vectors:
//     S   = K  Q^T     dP  = V  dO^T      k over the width     A natural   B transposed   C[key][query]
//     O^T = V^T P      dQ^T = K^T dS      k over the keys      A stacked   B a tile       C[width][query]
//     dV  = P  dO      dK  = dS Q         k over the queries   A a tile    B stacked      C[key][width]
// An operand is float, or Pair if the instruction set multiplies pairs of bf16; then two steps of k lie together:
//     natural [row][width / 2]   stacked [row / 2][width]   transposed [width / 2][row]
// Without such an instruction, packing converts bf16 to float. Packing also pads ragged sizes with zeros to whole
// vectors, and it removes strides that make rows collide in the L1 cache.

#include "attention/softmax.h"
#include "simd/philox.h"

// Number of keys in a tile that the mask cuts. A smaller tile has fewer dead elements. Causal T 256, D 64 on Zen 4: 16
// beats 32 by 2 to 5 % and 64 by 10 to 15 %.
constexpr int64_t kEdgeTile = 16;

// --------------------------------------------------------------------------------------------------------- packing
// A strided matrix. Rows outside [begin, end) read as zeros, whatever memory holds there.
template <class T>
struct Rows {
  const T* p;
  int64_t stride, begin, end, width;

  PEAK_INLINE bool Has(int64_t row) const { return row >= begin && row < end; }
  PEAK_INLINE Vec At(int64_t row, int64_t column) const {
    return Has(row) ? Load(p + row * stride + column, width - column) : Set(0.0f);
  }
};

// One head of a sequence of a tensor.
template <class T>
PEAK_INLINE const T* HeadOf(const StridedInput& x, int64_t b, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.stride_b + h * x.stride_h;
}
template <class T>
PEAK_INLINE T* HeadOf(const StridedOutput& x, int64_t b, int64_t h) {
  return static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h;
}
template <class T>
PEAK_INLINE Rows<T> RowsOf(const StridedInput& x, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t width) {
  return {HeadOf<T>(x, b, h), x.stride_t, begin, end, width};
}

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

// Packs kTile rows from `first` on.
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
  // A pair moves as one float; no arithmetic touches it.
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

// ------------------------------------------------------------------------------------------------------------ mask
// Every mask is one range of keys for each query: First(i) .. End(i) - 1. Both bounds grow with i.
struct LiveKeys {
  int64_t offset, begin, end, window, documents;
  const int64_t* starts;  // first tokens of the documents and the number of tokens, or null
  bool causal;

  LiveKeys(const AttentionProblem& args, int64_t b)
      : offset(args.keys - args.queries), documents(args.documents), starts(args.cu_seqlens), causal(args.causal) {
    const int64_t start = args.kv_start == nullptr ? 0 : args.kv_start[b];
    begin = Most(0, start);
    end = args.kv_len == nullptr ? args.keys : Least(args.keys, start + args.kv_len[b]);
    window = args.window > 0 ? args.window : args.queries + args.keys;
    // Empty documents at the end, which pad the list to a fixed length, would lengthen every search.
    if (starts != nullptr) documents = Document(args.keys - 1) + 1;
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

// A range of a tile's vectors of queries: begin .. end - 1.
struct Lanes {
  int64_t begin, end;
};

// A tile of queries. The bounds of their keys are floats (exact up to 2^24 keys), one in each lane.
struct QueryTile {
  int64_t query, count, vecs;
  int64_t begin, end;        // keys that any of the queries sees
  int64_t all_from, all_to;  // keys that all of the queries see
  float first[kTile], last[kTile], position[kTile];

  void Place(const LiveKeys& live, int64_t query_, int64_t queries) {
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
  // The number of keys of the tile that starts at `key`: kTile if all queries see them, else at most kEdgeTile.
  PEAK_INLINE int64_t KeysAt(int64_t key, int64_t stop) const {
    const bool whole = key >= all_from && key + kTile <= Least(all_to, stop);
    return whole ? kTile : Least(kEdgeTile, stop - key);
  }
  PEAK_INLINE bool Whole(int64_t key, int64_t rows) const { return key >= all_from && key + rows <= all_to; }
  // The vectors of the queries that see any of the keys from `key` on. Both bounds of a query grow with it.
  PEAK_INLINE Lanes LanesAt(int64_t key, int64_t rows) const {
    Lanes lanes{0, vecs};
    while (lanes.begin < vecs && last[lanes.begin * kLanes + kLanes - 1] < static_cast<float>(key)) ++lanes.begin;
    while (lanes.end > lanes.begin && first[(lanes.end - 1) * kLanes] >= static_cast<float>(key + rows)) --lanes.end;
    return lanes;
  }
};

// ---------------------------------------------------------------------------------------------------------- scores
// How the scores of a query head follow from q k^T.
struct ScoreTerms {
  float scale, softcap, slope;  // softcap: 0 if there is none
  float sink;                   // -inf if there is none
  const char* bias;  // of query 0 and key 0, or null
  DType bias_dtype;
  int64_t bias_stride_t, bias_stride_s, keys;

  ScoreTerms(const AttentionProblem& args, int64_t b, int64_t h)
      : scale(args.scale), softcap(args.softcap), slope(args.alibi == nullptr ? 0.0f : args.alibi[h]),
        sink(args.sinks == nullptr ? -kInfinity : args.sinks[h]), bias(nullptr),
        bias_dtype(args.bias_dtype), bias_stride_t(args.bias_stride_t), bias_stride_s(args.bias_stride_s),
        keys(args.keys) {
    if (args.bias == nullptr) return;
    const int64_t at = (args.bias_batch > 1 ? b * args.bias_stride_b : 0) +
                       (args.bias_heads > 1 ? h * args.bias_stride_h : 0);
    bias = static_cast<const char*>(args.bias) + at * SizeOf(bias_dtype);
  }
  // The biases of one query for n keys from `key` on. The other lanes are 0.
  template <class B>
  PEAK_INLINE Vec Biases(int64_t query, int64_t key, int64_t n) const {
    const B* p = reinterpret_cast<const B*>(bias) + query * bias_stride_t + key * bias_stride_s;
    if (bias_stride_s == 1) return Load(p, n);
    B part[kLanes] = {};
    for (int64_t i = 0; i < Least(n, kLanes); ++i) part[i] = p[i * bias_stride_s];
    return Load(part);
  }
};

// s = softcap tanh(scale s / softcap). Stores 1 - tanh^2, the slope of the cap, in `slopes` unless it is null.
inline void CapScores(const ScoreTerms& terms, float* s, int64_t rows, Lanes lanes, float* slopes) {
  const Vec inner = Set(terms.scale / terms.softcap), limit = Set(terms.softcap);
  for (int64_t v = lanes.begin * kLanes; v < lanes.end * kLanes; v += kLanes) {
    for (int64_t at = v; at < rows * kTile; at += kTile) {
      Vec slope;
      Store(s + at, Tanh::ValueAndSlope(Load(s + at) * inner, &slope) * limit);
      if (slopes != nullptr) Store(slopes + at, slope);
    }
  }
}

// s = c s + bias.
template <class B>
PEAK_NOINLINE void AddBias(const ScoreTerms& terms, const QueryTile& tile, float* s, int64_t key, int64_t rows,
                           Lanes lanes, float c) {
  for (int64_t at = lanes.begin * kLanes; at < lanes.end * kLanes; at += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t n = Least(kLanes, terms.keys - key - r);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool exists = n > 0 && at + i < tile.count;
        square[i] = exists ? terms.Biases<B>(tile.query + at + i, key + r, n) : Set(0.0f);
      }
      Transpose(square);
      for (int64_t i = 0; i < Least(kLanes, rows - r); ++i) {
        float* score = s + (r + i) * kTile + at;
        Store(score, Fma(Load(score), Set(c), square[i]));
      }
    }
  }
}

// s = c s + slope (j - i), or -inf for a masked key. Rows after the tile's keys are masked too.
inline void MaskScores(const QueryTile& tile, float* s, int64_t key, int64_t rows, Lanes lanes, float c, float slope) {
  const Vec masked = Set(-kInfinity);
  for (int64_t v = lanes.begin; v < lanes.end; ++v) {
    const Vec first = Load(tile.first + v * kLanes), last = Load(tile.last + v * kLanes);
    const Vec position = Load(tile.position + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec j = Set(static_cast<float>(key + r));
      float* at = s + r * kTile + v * kLanes;
      const Vec x = Fma(Set(slope), j - position, Load(at) * Set(c));
      Store(at, Select(Greater(first, j), masked, Select(Greater(j, last), masked, x)));
    }
  }
}

// Turns the products in s into scores. Returns the factor that the scores still lack: the scale if there is no other
// term. `cap_slopes` is that of CapScores.
inline float Scores(const ScoreTerms& terms, const QueryTile& tile, float* s, int64_t key, int64_t rows, Lanes lanes,
                    float* cap_slopes) {
  float c = terms.scale;
  if (terms.softcap > 0.0f) {
    CapScores(terms, s, rows, lanes, cap_slopes);
    c = 1.0f;
  }
  if (terms.bias != nullptr) {
    terms.bias_dtype == DType::kFloat32 ? AddBias<float>(terms, tile, s, key, rows, lanes, c)
                                        : AddBias<bf16>(terms, tile, s, key, rows, lanes, c);
    c = 1.0f;
  }
  if (terms.slope == 0.0f && tile.Whole(key, rows)) return c;
  MaskScores(tile, s, key, rows, lanes, c, terms.slope);
  return 1.0f;
}

// --------------------------------------------------------------------------------------------------------- dropout
// The mask of a head's weights. The weight of query i and key j is kept if word j % 4 of Philox's counter (i, j / 4, b,
// h) under the seed is at least dropout * 2^32. The mask depends on i and j only, not on the tile or the thread.
struct DropoutMask {
  float factor = 0.0f;  // of the weights that are kept; 0: no dropout
  uint32_t limit = 0, b, h;
  PhiloxKey key;

  DropoutMask(const AttentionProblem& args, int64_t b_, int64_t h_)
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
