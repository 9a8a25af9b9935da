#include "attention/attention.h"

#include <algorithm>

#include "buffer.h"
#include "base/isa.h"

namespace peak::test {
namespace {

constexpr int64_t kGap = 5;  // elements of NaN after each token's heads
constexpr float kScale = 0.3f;

// The keys of a sequence: all, or a start and a length for each sequence, or packed documents.
enum class Range { kAll, kPadded, kDocuments };

// An additive bias: none, one for all, one for each head, one for each head and sequence.
enum class Bias { kNone, kShared, kByHead, kFull };

struct Problem {
  int64_t batch, queries, keys, heads, kv_heads, width;
  bool causal;
  int64_t window;
  bool alibi;
  Range range;
  Bias bias = Bias::kNone;
  double dropout = 0.0;
  int64_t pairs = 0;  // of rotary embedding: dq and dk are rotated back
  bool interleaved = false;

  int64_t BiasBatch() const { return bias == Bias::kFull ? batch : 1; }
  int64_t BiasHeads() const { return bias == Bias::kFull || bias == Bias::kByHead ? heads : 1; }
};

// Widths of whole and ragged vectors; sizes around a tile of 64 and around the limit of few queries; every mask; groups
// of heads; padding that leaves a sequence without a key or ends after the last key.
constexpr Problem kProblems[] = {
    {1, 1, 1, 1, 1, 8, true, 0, false, Range::kAll},       {2, 1, 70, 4, 2, 16, true, 0, false, Range::kPadded},
    {2, 4, 37, 2, 1, 40, false, 0, true, Range::kPadded},  {1, 3, 133, 2, 2, 64, true, 20, false, Range::kAll},
    {3, 5, 5, 2, 2, 24, true, 0, true, Range::kPadded},    {1, 17, 40, 3, 1, 72, false, 9, false, Range::kAll},
    {1, 64, 64, 1, 1, 64, true, 0, false, Range::kAll},    {3, 65, 65, 2, 1, 16, true, 0, true, Range::kPadded},
    {1, 130, 130, 2, 2, 8, true, 33, false, Range::kAll},  {1, 131, 131, 1, 1, 16, true, 0, false, Range::kDocuments},
    {1, 90, 90, 2, 1, 8, false, 0, true, Range::kDocuments}, {1, 70, 20, 1, 1, 8, true, 0, false, Range::kAll},
    {1, 20, 90, 2, 1, 128, true, 0, false, Range::kAll},  {1, 33, 70, 1, 1, 256, false, 0, false, Range::kPadded},
    {1, 0, 3, 1, 1, 8, true, 0, false, Range::kAll},       {1, 3, 0, 1, 1, 8, false, 0, false, Range::kAll},
    {1, 7, 0, 1, 1, 8, false, 0, false, Range::kAll},
    {2, 2, 37, 2, 1, 16, true, 0, true, Range::kPadded, Bias::kByHead},
    {3, 70, 70, 2, 2, 8, true, 0, false, Range::kPadded, Bias::kShared},
    {2, 67, 133, 4, 2, 16, true, 25, true, Range::kAll, Bias::kFull},
    {1, 130, 130, 3, 1, 24, false, 0, true, Range::kAll, Bias::kByHead},
    {1, 90, 90, 2, 1, 8, true, 0, false, Range::kDocuments, Bias::kFull},
    {2, 70, 70, 2, 1, 16, true, 0, true, Range::kPadded, Bias::kNone, 0.25},
    {2, 3, 37, 2, 2, 8, false, 0, false, Range::kAll, Bias::kShared, 0.5},
    {2, 67, 67, 4, 2, 24, true, 0, false, Range::kAll, Bias::kNone, 0.0, 5},
    {1, 130, 130, 1, 1, 16, true, 9, false, Range::kAll, Bias::kNone, 0.0, 8},
    {1, 70, 70, 2, 1, 72, true, 0, false, Range::kAll, Bias::kNone, 0.0, 17, true}};

// (batch, tokens, heads, width) with gaps.
template <class T>
struct Tensor4 {
  int64_t tokens, heads, width;
  Buffer<T> buffer;

  Tensor4(Placer& place, Role role, int64_t batch, int64_t tokens_, int64_t heads_, int64_t width_)
      : tokens(tokens_), heads(heads_), width(width_),
        buffer(role == Role::kInput ? place.In<T>(batch * StrideB()) : place.Out<T>(batch * StrideB())) {}
  StridedInput Input() const { return {buffer.data(), StrideB(), StrideT(), width}; }
  StridedOutput Output() const { return {buffer.data(), StrideB(), StrideT(), width}; }
  int64_t StrideT() const { return heads * width + kGap; }
  int64_t StrideB() const { return tokens * StrideT(); }
  int64_t Index(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return b * StrideB() + t * StrideT() + h * width + d;
  }
  double At(int64_t b, int64_t t, int64_t h, int64_t d) const { return buffer.At(Index(b, t, h, d)); }
  void FillRow(int64_t b, int64_t t, double value) const {
    for (int64_t i = 0; i < heads * width; ++i) buffer[Index(b, t, 0, i)] = Narrow<T>(value);
  }
  void FillNormal(Random& random) const {
    for (int64_t row = 0; row < buffer.count(); row += StrideT()) {
      for (int64_t i = 0; i < heads * width; ++i) buffer[row + i] = Narrow<T>(random.Normal());
    }
  }
};

// The tensors of one call and its arguments.
template <class T>
struct Attention {
  Problem p;
  Placer place;
  Tensor4<T> q, k, v, dout, dq, dk, dv;
  Buffer<T> out;
  Buffer<float> lse, alibi, cos, minus_sin;
  Buffer<int64_t> start, length, documents, dropout_seed;
  int64_t bias_s, bias_t, bias_h, bias_b;
  Buffer<T> bias;
  Buffer<float> dbias, dalibi, dalibi_rows;
  AttentionForwardArgs forward{};
  AttentionBackwardArgs backward{};

  Attention(const Problem& problem, int placement, uint64_t seed)
      : p(problem),
        place(placement),
        q(place, Role::kInput, p.batch, p.queries, p.heads, p.width),
        k(place, Role::kInput, p.batch, p.keys, p.kv_heads, p.width),
        v(place, Role::kInput, p.batch, p.keys, p.kv_heads, p.width),
        dout(place, Role::kInput, p.batch, p.queries, p.heads, p.width),
        dq(place, Role::kOutput, p.batch, p.queries, p.heads, p.width),
        dk(place, Role::kOutput, p.batch, p.keys, p.kv_heads, p.width),
        dv(place, Role::kOutput, p.batch, p.keys, p.kv_heads, p.width),
        out(place.Out<T>(p.batch * p.queries * p.heads * p.width)),
        lse(place.Out<float>(p.batch * p.heads * p.queries)),
        alibi(place.In<float>(p.heads)),
        cos(place.In<float>(p.queries * p.pairs)),
        minus_sin(place.In<float>(p.queries * p.pairs)),
        start(place.In<int64_t>(p.batch)),
        length(place.In<int64_t>(p.batch)),
        documents(place.In<int64_t>(4)),
        dropout_seed(place.In<int64_t>(1)),
        bias_s(p.bias == Bias::kByHead ? 2 : 1),
        bias_t(p.keys * bias_s + kGap),
        bias_h(p.queries * bias_t),
        bias_b(p.BiasHeads() * bias_h),
        bias(place.In<T>(p.BiasBatch() * bias_b)),
        dbias(place.Out<float>(p.BiasBatch() * p.BiasHeads() * p.queries * p.keys)),
        dalibi(place.Out<float>(p.heads)),
        dalibi_rows(place.Out<float>(3 * p.batch * p.heads * p.queries)) {
    Random random(seed);
    for (const auto* tensor : {&q, &k, &v, &dout}) tensor->FillNormal(random);
    cos.FillNormal(random);
    minus_sin.FillNormal(random);
    for (int64_t h = 0; h < p.heads; ++h) alibi[h] = 0.125f * static_cast<float>(h + 1);
    for (int64_t slice = 0; slice < p.BiasBatch() * p.BiasHeads(); ++slice) {
      for (int64_t i = 0; i < p.queries; ++i) {
        for (int64_t j = 0; j < p.keys; ++j) {
          const bool masks = (i + j) % 7 == 3 && j % 3 == 2;  // leaves every query at least one of its keys
          bias[slice * bias_h + i * bias_t + j * bias_s] = Narrow<T>(masks ? -kInf : random.Normal());
        }
      }
    }
    dropout_seed[0] = -123456789012345;
    dbias.Fill([](int64_t) { return 0.0; });
    dalibi_rows.Fill([](int64_t) { return 0.0; });
    const int64_t starts[] = {3, 0, p.keys + 2}, lengths[] = {p.keys, p.keys / 2, 4};
    for (int64_t b = 0; b < p.batch; ++b) {
      start[b] = starts[b % 3];
      length[b] = lengths[b % 3];
    }
    const int64_t ends[] = {0, p.keys / 3, p.keys / 3, p.keys};  // the second is empty
    for (int i = 0; i < 4; ++i) documents[i] = ends[i];
    // Padded keys must not matter.
    for (int64_t b = 0; p.range == Range::kPadded && b < p.batch; ++b) {
      for (int64_t j = 0; j < p.keys; ++j) {
        if (j >= start[b] && j < start[b] + length[b]) continue;
        k.FillRow(b, j, kNan);
        v.FillRow(b, j, kNan);
      }
    }
    const bool padded = p.range == Range::kPadded, packed = p.range == Range::kDocuments;
    const AttentionProblem problem_args = {
        .dtype = kDtype<T>, .batch = p.batch, .queries = p.queries, .keys = p.keys, .heads = p.heads,
        .kv_heads = p.kv_heads, .width = p.width, .q = q.Input(), .k = k.Input(), .v = v.Input(), .causal = p.causal,
        .scale = kScale, .window = p.window, .alibi = p.alibi ? alibi.data() : nullptr,
        .kv_start = padded ? start.data() : nullptr, .kv_len = padded ? length.data() : nullptr,
        .cu_seqlens = packed ? documents.data() : nullptr, .documents = packed ? 3 : 0,
        .bias = p.bias == Bias::kNone ? nullptr : bias.data(), .bias_dtype = kDtype<T>, .bias_batch = p.BiasBatch(),
        .bias_heads = p.BiasHeads(), .bias_stride_b = bias_b, .bias_stride_h = bias_h, .bias_stride_t = bias_t,
        .bias_stride_s = bias_s, .dropout = p.dropout, .seed = p.dropout > 0.0 ? dropout_seed.data() : nullptr};
    static_cast<AttentionProblem&>(forward) = problem_args;
    forward.out = out.data();
    forward.lse = lse.data();
    static_cast<AttentionProblem&>(backward) = problem_args;
    backward.out = out.data();
    backward.lse = lse.data();
    backward.dout = dout.Input();
    backward.dq = dq.Output();
    backward.dk = dk.Output();
    backward.dv = dv.Output();
    backward.cos = p.pairs > 0 ? cos.data() : nullptr;
    backward.minus_sin = minus_sin.data();
    backward.pairs = p.pairs;
    backward.interleaved = p.interleaved;
    backward.dbias = p.bias == Bias::kNone ? nullptr : dbias.data();
    backward.dalibi = p.alibi ? dalibi.data() : nullptr;
    backward.dalibi_rows = p.alibi ? dalibi_rows.data() : nullptr;
  }

  // The dropout factor of a weight, by Philox4x32-7.
  double Factor(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (p.dropout == 0.0) return 1.0;
    const uint64_t key = static_cast<uint64_t>(dropout_seed[0]);
    uint64_t c[] = {static_cast<uint64_t>(i), static_cast<uint64_t>(j / 4), static_cast<uint64_t>(b),
                    static_cast<uint64_t>(h)};
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 7; ++round, low += 0x9e3779b9, high += 0xbb67ae85) {
      const uint64_t first = c[0] * 0xd2511f53, second = c[2] * 0xcd9e8d57;
      c[0] = (second >> 32) ^ c[1] ^ low;
      c[1] = second & 0xffffffff;
      c[2] = (first >> 32) ^ c[3] ^ high;
      c[3] = first & 0xffffffff;
    }
    return static_cast<double>(c[j % 4]) >= p.dropout * 0x1p32 ? 1.0 / (1.0 - p.dropout) : 0.0;
  }

  int64_t Slice(int64_t b, int64_t h) const {
    return (p.BiasBatch() > 1 ? b * p.BiasHeads() : 0) + (p.BiasHeads() > 1 ? h : 0);
  }
  double BiasAt(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return p.bias == Bias::kNone ? 0.0 : bias.At(Slice(b, h) * bias_h + i * bias_t + j * bias_s);
  }
  // The distance of key j from query i, as in ALiBi.
  double Distance(int64_t i, int64_t j) const { return static_cast<double>(j - i - (p.keys - p.queries)); }

  bool Lives(int64_t b, int64_t i, int64_t j) const {
    const int64_t position = i + p.keys - p.queries;
    if (p.causal && j > position) return false;
    if (p.window > 0 && j <= position - p.window) return false;
    if (p.range == Range::kPadded) return j >= start[b] && j < start[b] + length[b];
    return p.range == Range::kAll || (i < documents[1]) == (j < documents[1]);
  }
};

// The weights of a query and the scale of their rounding errors.
struct Weights {
  std::vector<double> p;
  double lse = -kInf, reach = 0.0;  // reach: the error of a score, in roundings of 1
};

template <class T>
Weights WeightsOf(const Attention<T>& a, int64_t b, int64_t h, int64_t i) {
  const int64_t kv_head = h / (a.p.heads / a.p.kv_heads);
  Weights weights;
  weights.p.assign(a.p.keys, 0.0);
  double m = -kInf, l = 0.0;
  std::vector<double> scores(a.p.keys, -kInf);
  for (int64_t j = 0; j < a.p.keys; ++j) {
    if (!a.Lives(b, i, j)) continue;
    double dot = 0.0, magnitude = 0.0;
    for (int64_t d = 0; d < a.p.width; ++d) {
      const double term = a.q.At(b, i, h, d) * a.k.At(b, j, kv_head, d) * kScale;
      dot += term;
      magnitude += std::fabs(term);
    }
    const double slope = a.p.alibi ? a.alibi.At(h) * a.Distance(i, j) : 0.0, bias = a.BiasAt(b, h, i, j);
    scores[j] = dot + slope + bias;
    magnitude = 4.0 * magnitude + 2.0 * std::fabs(slope) + 2.0 * std::fabs(bias);
    if (std::isfinite(magnitude)) weights.reach = std::max(weights.reach, magnitude);
    m = std::isnan(scores[j]) ? kNan : std::max(m, scores[j]);
  }
  if (m == -kInf) return weights;
  for (int64_t j = 0; j < a.p.keys; ++j) {
    if (a.Lives(b, i, j)) l += weights.p[j] = std::exp(scores[j] - m);
  }
  for (double& p : weights.p) p /= l;
  weights.lse = m + std::log(l);
  weights.reach += 8.0 + 2.0 * (std::isfinite(weights.lse) ? std::fabs(weights.lse) : 0.0);
  return weights;
}

// Weights are rounded to the dtype before a product if the product is an instruction on bf16 pairs.
template <class T>
constexpr double kOperand = kUnit<T> / 0x1p-24;

template <class T>
void ExpectForward(const Attention<T>& a) {
  for (int64_t b = 0; b < a.p.batch; ++b) {
    for (int64_t h = 0; h < a.p.heads; ++h) {
      for (int64_t i = 0; i < a.p.queries; ++i) {
        const Weights weights = WeightsOf(a, b, h, i);
        const int64_t row = (b * a.p.heads + h) * a.p.queries + i, kv_head = h / (a.p.heads / a.p.kv_heads);
        if (!Near("lse", row, a.lse[row], {weights.lse, weights.reach})) return;
        for (int64_t d = 0; d < a.p.width; ++d) {
          Want want{0.0, 0.0};
          for (int64_t j = 0; j < a.p.keys; ++j) {
            if (!a.Lives(b, i, j)) continue;
            const double term = weights.p[j] * a.Factor(b, h, i, j) * a.v.At(b, j, kv_head, d);
            want.value += term;
            want.slack += std::fabs(term) * (kOperand<T> + 2.0 * weights.reach);
          }
          const int64_t at = ((b * a.p.queries + i) * a.p.heads + h) * a.p.width + d;
          if (!Near("out", at, a.out[at], want)) return;
        }
      }
    }
  }
}

// A sum with its slack.
void Add(Want& sum, double term, double magnitude) {
  sum.value += term;
  sum.slack += magnitude;
}

// Applies the inverse rotation to one head's gradient of a token.
template <class T>
void RotateBack(const Attention<T>& a, int64_t token, Want* head) {
  for (int64_t i = 0; i < a.p.pairs; ++i) {
    Want& first = head[a.p.interleaved ? 2 * i : i];
    Want& second = head[a.p.interleaved ? 2 * i + 1 : a.p.pairs + i];
    const double cos = a.cos.At(token * a.p.pairs + i), minus_sin = a.minus_sin.At(token * a.p.pairs + i);
    const Want x1 = first, x2 = second;
    first = {0.0, 0.0}, second = {0.0, 0.0};
    const auto add = [](Want& sum, const Want& x, double factor) {
      Add(sum, x.value * factor, (x.slack + 4.0 * std::fabs(x.value)) * std::fabs(factor));
    };
    add(first, x1, cos);
    add(first, x2, -minus_sin);
    add(second, x2, cos);
    add(second, x1, minus_sin);
  }
}

template <class T>
void ExpectBackward(const Attention<T>& a, bool with_dq, bool with_dkv) {
  const Problem& p = a.p;
  std::vector<Want> dbias(a.dbias.count(), {0.0, 0.0}), dalibi(p.heads, {0.0, 0.0});
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<Want> dk(p.keys * p.kv_heads * p.width, {0.0, 0.0}), dv = dk;
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t kv_head = h / (p.heads / p.kv_heads);
      for (int64_t i = 0; i < p.queries; ++i) {
        const Weights weights = WeightsOf(a, b, h, i);
        std::vector<Want> dq(p.width, {0.0, 0.0});
        double delta = 0.0, delta_magnitude = 0.0;
        for (int64_t d = 0; d < p.width; ++d) {
          const double term = a.dout.At(b, i, h, d) * a.out.At(((b * p.queries + i) * p.heads + h) * p.width + d);
          delta += term;
          delta_magnitude += std::fabs(term);
        }
        for (int64_t j = 0; j < p.keys; ++j) {
          if (!a.Lives(b, i, j)) continue;
          const double factor = a.Factor(b, h, i, j);
          double dp = 0.0, dp_magnitude = 0.0;
          for (int64_t d = 0; d < p.width; ++d) {
            const double term = a.dout.At(b, i, h, d) * a.v.At(b, j, kv_head, d);
            dp += term * factor;
            dp_magnitude += std::fabs(term) * factor;
          }
          const double rounding = kOperand<T> + 2.0 * weights.reach + 8.0;
          const double ds = weights.p[j] * (dp - delta) * kScale;
          const double ds_slack =
              weights.p[j] * kScale *
              (std::fabs(dp - delta) * rounding + 8.0 * (dp_magnitude + delta_magnitude));
          Add(dbias[(a.Slice(b, h) * p.queries + i) * p.keys + j], ds / kScale, ds_slack / kScale);
          Add(dalibi[h], ds / kScale * a.Distance(i, j), ds_slack / kScale * std::fabs(a.Distance(i, j)));
          for (int64_t d = 0; d < p.width; ++d) {
            const int64_t at = (j * p.kv_heads + kv_head) * p.width + d;
            const double q = a.q.At(b, i, h, d), k = a.k.At(b, j, kv_head, d), dy = a.dout.At(b, i, h, d);
            Add(dq[d], ds * k, ds_slack * std::fabs(k));
            Add(dk[at], ds * q, ds_slack * std::fabs(q));
            Add(dv[at], weights.p[j] * factor * dy, weights.p[j] * factor * std::fabs(dy) * rounding);
          }
        }
        RotateBack(a, i, dq.data());
        for (int64_t d = 0; with_dq && d < p.width; ++d) {
          const int64_t at = a.dq.Index(b, i, h, d);
          if (!Near("dq", at, a.dq.buffer[at], dq[d])) return;
        }
      }
    }
    for (int64_t j = 0; with_dkv && j < p.keys; ++j) {
      for (int64_t h = 0; h < p.kv_heads; ++h) RotateBack(a, j, &dk[(j * p.kv_heads + h) * p.width]);
      for (int64_t i = 0; i < p.kv_heads * p.width; ++i) {
        const int64_t at = a.dk.Index(b, j, 0, i), want = j * p.kv_heads * p.width + i;
        if (!Near("dk", at, a.dk.buffer[at], dk[want]) || !Near("dv", at, a.dv.buffer[at], dv[want])) return;
      }
    }
  }
  if (p.bias != Bias::kNone) a.dbias.Expect("dbias", [&](int64_t i) { return dbias[i]; });
  if (p.alibi) a.dalibi.Expect("dalibi", [&](int64_t h) { return dalibi[h]; });
}

template <class T>
void ExpectBothPasses(const Problem& problem, int placement) {
  const bool with_dq = placement != 1, with_dkv = placement != 2;
  const int threads = 1 + 2 * (placement % 2);
  Attention<T> a(problem, placement, 1);
  AttentionForward(a.forward, threads);
  ExpectForward(a);
  if (!with_dq) a.backward.dq = {};
  if (!with_dkv) a.backward.dk = a.backward.dv = {};
  AttentionBackward(a.backward, threads);
  ExpectBackward(a, with_dq, with_dkv);
}

PEAK_TEST(attention_equals_double_precision) {
  ForEachDtype([&](auto element) {
    for (const Problem& p : kProblems) {
      const int number = static_cast<int>(&p - kProblems);
      for (const int placement : {number % kPlacements, (number + 2) % kPlacements}) {
        SetCase("attention %s %s problem %d placement %d", ActiveIsa(), kName<decltype(element)>, number, placement);
        ExpectBothPasses<decltype(element)>(p, placement);
      }
    }
  });
}

PEAK_TEST(attention_of_every_length_equals_double_precision) {
  ForEachCase("attention", 1, [&](auto element, int64_t count, int placement) {
    const int64_t queries = placement % 2 == 0 ? count : 5;
    ExpectBothPasses<decltype(element)>({1, queries, count, 1, 1, 8, true, 0, false, Range::kAll}, placement);
  });
}

// One special value in q or k reaches the queries that see it and no other query.
PEAK_TEST(attention_infinity_and_nan_reach_only_queries_that_see_them) {
  ForEachDtype([&](auto element) {
    for (const double intruder : {0x1p-149, 0x1p-127, kInf, -kInf, kNan}) {
      for (const int64_t queries : {4, 70}) {
        for (const bool in_q : {false, true}) {
          SetCase("attention %s %s queries %d intruder %g in %s", ActiveIsa(), kName<decltype(element)>,
                  static_cast<int>(queries), intruder, in_q ? "q" : "k");
          Attention<decltype(element)> a({1, queries, 70, 1, 1, 16, true, 0, false, Range::kAll}, 0, 3);
          const auto& into = in_q ? a.q : a.k;
          into.buffer[into.Index(0, in_q ? queries / 2 : 34, 0, 3)] = Narrow<decltype(element)>(intruder);
          AttentionForward(a.forward, 1);
          ExpectForward(a);
        }
      }
    }
  });
}

template <class T>
std::vector<char> Call(const Problem& problem, int threads) {
  Attention<T> a(problem, 0, 1);
  AttentionForward(a.forward, threads);
  AttentionBackward(a.backward, threads);
  std::vector<char> bytes;
  for (const auto* tensor : {&a.dq, &a.dk, &a.dv}) tensor->buffer.Append(bytes);
  a.out.Append(bytes);
  a.lse.Append(bytes);
  a.dbias.Append(bytes);
  a.dalibi.Append(bytes);
  return bytes;
}
constexpr Problem kMany = {1, 200, 200, 2, 1, 16, true, 0, true, Range::kAll};
constexpr Problem kBiased = {2, 130, 130, 2, 2, 16, true, 0, true, Range::kAll, Bias::kByHead};
constexpr Problem kFew = {2, 2, 40, 2, 1, 16, true, 0, false, Range::kPadded};
PEAK_KERNEL(attention_float32) { return Call<float>(kMany, threads); }
PEAK_KERNEL(attention_bfloat16) { return Call<bf16>(kMany, threads); }
PEAK_KERNEL(attention_biased) { return Call<bf16>(kBiased, threads); }
constexpr Problem kDropped = {1, 150, 150, 2, 1, 16, true, 0, true, Range::kAll, Bias::kNone, 0.1};
PEAK_KERNEL(attention_dropped) { return Call<float>(kDropped, threads); }
PEAK_KERNEL(attention_few_queries) { return Call<bf16>(kFew, threads); }

}  // namespace
}  // namespace peak::test
