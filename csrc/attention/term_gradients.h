// Gradients of the bias, of the ALiBi slopes and of the sinks. Included once per instruction set by
// attention_backward.cpp.

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

// Adds to the three planes of `rows`, for each query i, the sums over keys j of ds (j - i), ds and p (j - i).
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

// rows[i] = -e^(sink - lse) delta, the part of query i in the gradient of the sink.
inline void SinkGradients(float sink, const float* lse, const float* delta, int64_t queries, float* rows) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    const int64_t n = Least(kLanes, queries - i);
    const Vec weight = Exp(Set(sink) - Load(lse + i, n));
    Store(rows + i, Set(0.0f) - weight * Load(delta + i, n), n);
  }
}

// Addresses of one head's gradients of the score terms and the sink, or null.
struct TermGradients {
  float *bias, *slope_rows, *sink_rows;
  int64_t plane;

  TermGradients(const AttentionBackwardArgs& args, const BackwardUnit& unit, int64_t h)
      : bias(nullptr), slope_rows(nullptr), sink_rows(nullptr), plane(args.batch * args.heads * args.queries) {
    if (!unit.by_query) return;
    const int64_t row = (unit.b * args.heads + h) * args.queries;
    if (args.dalibi != nullptr) slope_rows = args.dalibi_rows + row;
    if (args.dsinks != nullptr) sink_rows = args.dsinks_rows + row;
    if (args.dbias == nullptr) return;
    const int64_t slice = (args.bias_batch > 1 ? unit.b * args.bias_heads : 0) + (args.bias_heads > 1 ? h : 0);
    bias = args.dbias + slice * args.queries * args.keys;
  }
  // Whether a gradient needs p and ds as floats.
  bool Any() const { return bias != nullptr || slope_rows != nullptr; }
};
