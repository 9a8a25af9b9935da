#include "attention/attention.h"

#include <algorithm>

#include "attention_case.h"
#include "base/isa.h"

namespace peak::test {
namespace {

// Widths that are and are not multiples of a vector; sizes around a tile of 64 and around the limit of few queries;
// every mask; groups of heads; padding that leaves a sequence without a key or ends after the last key.
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
    {1, 70, 70, 2, 1, 72, true, 0, false, Range::kAll, Bias::kNone, 0.0, 17, true},
    {2, 70, 70, 2, 1, 16, true, 0, false, Range::kPadded, Bias::kNone, 0.0, 0, false, 2.0f, true},
    {1, 130, 130, 2, 2, 24, true, 33, true, Range::kDocuments, Bias::kByHead, 0.25, 0, false, 2.0f, true},
    {2, 3, 37, 4, 2, 16, true, 0, true, Range::kPadded, Bias::kShared, 0.0, 0, false, 3.0f, true},
    {1, 67, 67, 2, 1, 8, false, 0, false, Range::kAll, Bias::kNone, 0.0, 3, false, 3.0f, false}};

// The softmax weights of a query, and the error of its scores.
struct Weights {
  std::vector<double> p, cap_slopes;  // cap_slopes: 1 - tanh^2 of the soft cap
  double lse = -kInf, score_slack = 0.0;  // score_slack: the largest error of a score, in units of 2^-24
};

template <class T>
Weights WeightsOf(const Attention<T>& a, int64_t b, int64_t h, int64_t i) {
  const int64_t kv_head = h / (a.p.heads / a.p.kv_heads);
  Weights weights;
  weights.p.assign(a.p.keys, 0.0);
  weights.cap_slopes.assign(a.p.keys, 1.0);
  double m = -kInf, l = 0.0;
  std::vector<double> scores(a.p.keys, -kInf);
  for (int64_t j = 0; j < a.p.keys; ++j) {
    if (!a.Sees(b, i, j)) continue;
    double dot = 0.0, magnitude = 0.0;
    for (int64_t d = 0; d < a.p.width; ++d) {
      const double term = a.q.At(b, i, h, d) * a.k.At(b, j, kv_head, d) * kScale;
      dot += term;
      magnitude += std::fabs(term);
    }
    if (a.p.softcap > 0.0f) {
      const double t = std::tanh(dot / a.p.softcap);
      dot = a.p.softcap * t;
      weights.cap_slopes[j] = 1.0 - t * t;
      magnitude += 4.0 * std::fabs(dot);
    }
    const double slope = a.p.alibi ? a.alibi.At(h) * a.Distance(i, j) : 0.0, bias = a.BiasAt(b, h, i, j);
    scores[j] = dot + slope + bias;
    magnitude = 4.0 * magnitude + 2.0 * std::fabs(slope) + 2.0 * std::fabs(bias);
    if (std::isfinite(magnitude)) weights.score_slack = std::max(weights.score_slack, magnitude);
    m = std::isnan(scores[j]) ? kNan : std::max(m, scores[j]);
  }
  const double sink = a.p.sinks ? a.sinks.At(h) : -kInf;
  m = std::isnan(m) ? m : std::max(m, sink);
  if (m == -kInf) return weights;
  l += std::exp(sink - m);
  for (int64_t j = 0; j < a.p.keys; ++j) {
    if (a.Sees(b, i, j)) l += weights.p[j] = std::exp(scores[j] - m);
  }
  for (double& p : weights.p) p /= l;
  weights.lse = m + std::log(l);
  weights.score_slack += 8.0 + 2.0 * (std::isfinite(weights.lse) ? std::fabs(weights.lse) : 0.0);
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
        if (!Near("lse", row, a.lse[row], {weights.lse, weights.score_slack})) return;
        for (int64_t d = 0; d < a.p.width; ++d) {
          Want want{0.0, 0.0};
          for (int64_t j = 0; j < a.p.keys; ++j) {
            if (!a.Sees(b, i, j)) continue;
            const double term = weights.p[j] * a.Factor(b, h, i, j) * a.v.At(b, j, kv_head, d);
            want.value += term;
            want.slack += std::fabs(term) * (kOperand<T> + 2.0 * weights.score_slack);
          }
          const int64_t at = ((b * a.p.queries + i) * a.p.heads + h) * a.p.width + d;
          if (!Near("out", at, a.out[at], want)) return;
        }
      }
    }
  }
}

// Adds a term to a sum. The slack grows by `magnitude`.
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
  std::vector<Want> dbias(a.dbias.count(), {0.0, 0.0}), dalibi(p.heads, {0.0, 0.0}), dsinks = dalibi;
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
        if (p.sinks) {
          const double weight = std::exp(a.sinks.At(h) - weights.lse);
          const double slack = 8.0 * delta_magnitude + 2.0 * std::fabs(delta) * weights.score_slack;
          Add(dsinks[h], -weight * delta, weight * slack);
        }
        for (int64_t j = 0; j < p.keys; ++j) {
          if (!a.Sees(b, i, j)) continue;
          const double factor = a.Factor(b, h, i, j);
          double dp = 0.0, dp_magnitude = 0.0;
          for (int64_t d = 0; d < p.width; ++d) {
            const double term = a.dout.At(b, i, h, d) * a.v.At(b, j, kv_head, d);
            dp += term * factor;
            dp_magnitude += std::fabs(term) * factor;
          }
          const double rounding = kOperand<T> + 2.0 * weights.score_slack + 8.0;
          const double ds = weights.p[j] * (dp - delta) * kScale;
          const double ds_slack =
              weights.p[j] * kScale *
              (std::fabs(dp - delta) * rounding + 8.0 * (dp_magnitude + delta_magnitude));
          Add(dbias[(a.Slice(b, h) * p.queries + i) * p.keys + j], ds / kScale, ds_slack / kScale);
          Add(dalibi[h], ds / kScale * a.Distance(i, j), ds_slack / kScale * std::fabs(a.Distance(i, j)));
          for (int64_t d = 0; d < p.width; ++d) {
            const int64_t at = (j * p.kv_heads + kv_head) * p.width + d;
            const double q = a.q.At(b, i, h, d), k = a.k.At(b, j, kv_head, d), dy = a.dout.At(b, i, h, d);
            Add(dq[d], ds * weights.cap_slopes[j] * k, ds_slack * std::fabs(k));
            Add(dk[at], ds * weights.cap_slopes[j] * q, ds_slack * std::fabs(q));
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
  if (p.sinks) a.dsinks.Expect("dsinks", [&](int64_t h) { return dsinks[h]; });
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
    for (const double special : {0x1p-149, 0x1p-127, kInf, -kInf, kNan}) {
      for (const int64_t queries : {4, 70}) {
        for (const bool in_q : {false, true}) {
          SetCase("attention %s %s queries %d special value %g in %s", ActiveIsa(), kName<decltype(element)>,
                  static_cast<int>(queries), special, in_q ? "q" : "k");
          Attention<decltype(element)> a({1, queries, 70, 1, 1, 16, true, 0, false, Range::kAll}, 0, 3);
          const auto& changed = in_q ? a.q : a.k;
          changed.buffer[changed.Index(0, in_q ? queries / 2 : 34, 0, 3)] = Narrow<decltype(element)>(special);
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
  a.dsinks.Append(bytes);
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
constexpr Problem kCapped = {2, 130, 130, 2, 1,          16,  true, 0, true,
                             Range::kAll, Bias::kByHead, 0.1, 0, false, 2.0f, true};
PEAK_KERNEL(attention_capped) { return Call<float>(kCapped, threads); }
PEAK_KERNEL(attention_few_queries) { return Call<bf16>(kFew, threads); }

}  // namespace
}  // namespace peak::test
