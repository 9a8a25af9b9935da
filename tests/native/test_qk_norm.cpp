#include "ops/qk_norm.h"

#include "buffer.h"

namespace peak::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 3, kQueries = 3, kKeys = 2, kHeads = kQueries + kKeys, kGap = 5;
constexpr float kEps = 1e-3f, kOffset = 0.5f;

// The tensors of one problem; a head has `width` features.
template <class T>
struct Case {
  int64_t width, pairs, stride_h, stride_t;
  bool joint, interleaved;
  Buffer<T> x, dy;
  Buffer<float> q_norm, k_norm, cos, sin;

  Case(Placer& place, Random& random, int64_t width_, bool joint_, bool interleaved_)
      : width(width_), pairs(width_ / 2 - (width_ > 4)), stride_h(width + kGap), stride_t(kHeads * stride_h),
        joint(joint_), interleaved(interleaved_), x(place.In<T>(kBatch * kTokens * stride_t - kGap)),
        dy(place.In<T>(kBatch * kTokens * stride_t - kGap)), q_norm(place.In<float>(width * (joint ? kQueries : 1))),
        k_norm(place.In<float>(width * (joint ? kKeys : 1))), cos(place.In<float>(kTokens * pairs)),
        sin(place.In<float>(kTokens * pairs)) {
    for (const auto* in : {&x, &dy}) {
      in->Fill([&](int64_t i) { return i % stride_h < width ? random.Normal() + 0.5 : kNan; });
    }
    for (const auto* in : {&q_norm, &k_norm, &cos, &sin}) in->FillNormal(random);
  }

  template <class Args>
  Args Problem() const {
    Args args{};
    args.dtype = kDtype<T>;
    args.w_dtype = DType::kFloat32;
    args.batch = kBatch;
    args.tokens = kTokens;
    args.q_heads = kQueries;
    args.k_heads = kKeys;
    args.width = width;
    args.joint = joint;
    args.x = {x.data(), kTokens * stride_t, stride_t, stride_h};
    args.q_norm = q_norm.data();
    args.k_norm = k_norm.data();
    args.offset = kOffset;
    args.cos = pairs > 0 ? cos.data() : nullptr;
    args.sin = pairs > 0 ? sin.data() : nullptr;
    args.pairs = pairs;
    args.interleaved = interleaved;
    return args;
  }

  int64_t Means() const { return joint ? 2 : kHeads; }
  int64_t MeanOf(int64_t head) const { return joint ? head >= kQueries : head; }
  bool Shares(int64_t a, int64_t b) const { return joint ? (a < kQueries) == (b < kQueries) : a == b; }
  const Buffer<float>& Norm(int64_t head) const { return head < kQueries ? q_norm : k_norm; }
  int64_t WeightAt(int64_t head, int64_t d) const { return d + (joint ? (head - (head < kQueries ? 0 : kQueries)) * width : 0); }
  double Weight(int64_t head, int64_t d) const { return Norm(head).At(WeightAt(head, d)) + kOffset; }
  double X(int64_t row, int64_t head, int64_t d) const { return x.At(row * stride_t + head * stride_h + d); }

  double R(int64_t row, int64_t head) const {
    double squares = 0.0;
    int64_t count = 0;
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t d = 0; d < width && Shares(h, head); ++d, ++count) squares += X(row, h, d) * X(row, h, d);
    }
    return 1.0 / std::sqrt(squares / count + kEps);
  }

  // Rotates feature d of values(feature); `sign` is -1 for the inverse.
  template <class F>
  Want Rotated(int64_t row, int64_t d, double sign, const F& values) const {
    const double own = values(d);
    if (d >= 2 * pairs) return {own, 8.0 * std::fabs(own)};
    const int64_t pair = interleaved ? d / 2 : d % pairs, step = interleaved ? 1 : pairs;
    const bool second = interleaved ? d % 2 == 1 : d >= pairs;
    const int64_t table = row % kTokens * pairs + pair;
    const double other = values(second ? d - step : d + step) * sin.At(table) * sign, scaled = own * cos.At(table);
    return {scaled + (second ? other : -other), 16.0 * (std::fabs(scaled) + std::fabs(other))};
  }
  double Upstream(int64_t row, int64_t head, int64_t d) const {
    return Rotated(row, d, -1.0, [&](int64_t i) { return dy.At(row * stride_t + head * stride_h + i); }).value;
  }
};

template <class F>
void ForEachLayout(const F& f) {
  for (const bool joint : {false, true}) {
    ForEachCase(joint ? "qk_norm of joint heads" : "qk_norm of heads", 1, [&](auto element, int64_t width, int placement) {
      using T = decltype(element);
      Random random(width);
      Placer place(placement);
      f(Case<T>(place, random, width, joint, placement % 2 == 1), place, placement);
    });
  }
}

PEAK_TEST(qk_norm_forward_equals_double_precision) {
  ForEachLayout([](const auto& in, Placer& place, int placement) {
    using T = std::decay_t<decltype(in.x[0])>;
    auto y = place.In<T>(in.x.count());  // with the strides of x: the gaps stay NaN
    auto r = place.Out<float>(kBatch * kTokens * in.Means());
    auto args = in.template Problem<QKNormForwardArgs>();
    args.eps = kEps;
    args.y = {y.data(), kTokens * in.stride_t, in.stride_t, in.stride_h};
    args.r = r.data();
    QKNormForward(args, 1 + placement % 2);
    for (int64_t row = 0; row < kBatch * kTokens; ++row) {
      for (int64_t head = 0; head < kHeads; ++head) {
        const double want_r = in.R(row, head);
        Near("r", row, r[row * in.Means() + in.MeanOf(head)], {want_r, 16.0 * want_r});
        for (int64_t d = 0; d < in.width; ++d) {
          const auto n = [&](int64_t i) { return in.X(row, head, i) * want_r * in.Weight(head, i); };
          if (!Near("y", d, y[row * in.stride_t + head * in.stride_h + d], in.Rotated(row, d, 1.0, n))) return;
        }
      }
    }
    y.Expect("gap", [&](int64_t i) { return Want{i % in.stride_h < in.width ? y.At(i) : kNan, 0.0}; });
  });
}

PEAK_TEST(qk_norm_backward_equals_double_precision) {
  ForEachLayout([](const auto& in, Placer& place, int placement) {
    using T = std::decay_t<decltype(in.x[0])>;
    const bool in_place = placement >= 2;
    auto dx = place.In<T>(in.x.count());
    auto r = place.In<float>(kBatch * kTokens * in.Means()), minus_sin = place.In<float>(in.sin.count());
    auto dq = place.Out<float>(in.q_norm.count()), dk = place.Out<float>(in.k_norm.count());
    for (int64_t i = 0; i < in.x.count(); ++i) dx[i] = in.dy[i];
    minus_sin.Fill([&](int64_t i) { return -in.sin.At(i); });
    for (int64_t row = 0; row < kBatch * kTokens; ++row) {
      for (int64_t h = 0; h < kHeads; ++h) r[row * in.Means() + in.MeanOf(h)] = static_cast<float>(in.R(row, h));
    }
    auto args = in.template Problem<QKNormBackwardArgs>();
    args.sin = in.pairs > 0 ? minus_sin.data() : nullptr;
    args.r = r.data();
    args.dx = {dx.data(), kTokens * in.stride_t, in.stride_t, in.stride_h};
    args.dy = {in_place ? dx.data() : in.dy.data(), kTokens * in.stride_t, in.stride_t, in.stride_h};
    args.dq_norm = dq.data();
    args.dk_norm = dk.data();
    QKNormBackward(args, 1 + placement % 2);
    std::vector<Want> sums[2] = {std::vector<Want>(dq.count()), std::vector<Want>(dk.count())};
    for (int64_t row = 0; row < kBatch * kTokens; ++row) {
      for (int64_t head = 0; head < kHeads; ++head) {
        const double scale = in.R(row, head);
        double mean = 0.0, slack = 0.0;
        int64_t count = 0;
        for (int64_t h = 0; h < kHeads; ++h) {
          for (int64_t d = 0; d < in.width && in.Shares(h, head); ++d, ++count) {
            const double term = in.Upstream(row, h, d) * in.Weight(h, d) * in.X(row, h, d) * scale;
            mean += term;
            slack += 32.0 * (std::fabs(term) + 4.0 * std::fabs(in.X(row, h, d)));
          }
        }
        for (int64_t d = 0; d < in.width; ++d) {
          const double up = in.Upstream(row, head, d), z = in.X(row, head, d) * scale, g = up * in.Weight(head, d);
          const Want want = {scale * (g - z * mean / count),
                             scale * (32.0 * (std::fabs(g) + 4.0) + std::fabs(z) * slack / count)};
          if (!Near("dx", d, dx[row * in.stride_t + head * in.stride_h + d], want)) return;
          Want& sum = sums[head >= kQueries][in.WeightAt(head, d)];
          sum.value += up * z;
          sum.slack += 32.0 * (std::fabs(up * z) + std::fabs(z) * 4.0);
        }
      }
    }
    dq.Expect("dq_norm", [&](int64_t i) { return sums[0][i]; });
    dk.Expect("dk_norm", [&](int64_t i) { return sums[1][i]; });
  });
}

// Forward over a copy of x, then backward, for any number of threads.
template <class T>
std::vector<char> Call(int threads) {
  Random random(1);
  Placer place(0);
  const Case<T> in(place, random, 24, false, false);
  auto r = place.Out<float>(kBatch * kTokens * kHeads);
  auto y = place.In<T>(in.x.count()), dx = place.In<T>(in.x.count());
  auto dq = place.Out<float>(24), dk = place.Out<float>(24);
  auto forward = in.template Problem<QKNormForwardArgs>();
  forward.eps = kEps;
  forward.y = {y.data(), kTokens * in.stride_t, in.stride_t, in.stride_h};
  forward.r = r.data();
  QKNormForward(forward, threads);
  auto backward = in.template Problem<QKNormBackwardArgs>();
  backward.r = r.data();
  backward.dy = {in.dy.data(), kTokens * in.stride_t, in.stride_t, in.stride_h};
  backward.dx = {dx.data(), kTokens * in.stride_t, in.stride_t, in.stride_h};
  backward.dq_norm = dq.data();
  backward.dk_norm = dk.data();
  QKNormBackward(backward, threads);
  std::vector<char> bytes;
  for (const auto* out : {&y, &dx}) out->Append(bytes);
  for (const auto* out : {&r, &dq, &dk}) out->Append(bytes);
  return bytes;
}
PEAK_KERNEL(qk_norm_float32) { return Call<float>(threads); }
PEAK_KERNEL(qk_norm_bfloat16) { return Call<bf16>(threads); }

}  // namespace
}  // namespace peak::test
