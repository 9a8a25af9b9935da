#include "ops/rotary.h"

#include "buffer.h"

namespace peak::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 3, kHeads = 3, kRotated = 2, kRest = 3, kGap = 5;

PEAK_TEST(rotary_equals_double_precision) {
  for (const bool interleaved : {false, true}) {
    const char* name = interleaved ? "interleaved rotary" : "rotary of halves";
    ForEachCase(name, 0, [&](auto element, int64_t pairs, int placement) {
      using T = decltype(element);
      const int64_t width = 2 * pairs + kRest, stride_h = width + kGap, stride_t = kHeads * stride_h;
      Random random(pairs);
      Placer place(placement);
      auto x = place.In<T>(kBatch * kTokens * stride_t - kGap);
      auto cos = place.In<float>(kTokens * pairs), sin = place.In<float>(kTokens * pairs);
      auto y = place.Out<T>(kBatch * kTokens * kHeads * width);
      const bool special = placement == 1;
      x.Fill([&](int64_t i) { return i % stride_h < width ? random.Normal() : kNan; });
      // A product of such values is infinite in float but not in the reference.
      const auto replace_huge = [&](int64_t i) {
        return std::fabs(x.At(i)) > 1e37 && !std::isinf(x.At(i)) ? 2.0 : x.At(i);
      };
      if (special) x.FillSpecials(placement).Fill(replace_huge);
      cos.FillNormal(random);
      sin.FillNormal(random);
      Rotary({.dtype = kDtype<T>, .batch = kBatch, .tokens = kTokens, .heads = kHeads, .width = width, .pairs = pairs,
              .rotated_heads = kRotated, .interleaved = interleaved,
              .x = {x.data(), kTokens * stride_t, stride_t, stride_h}, .cos = cos.data(), .sin = sin.data(),
              .y = y.data()},
             1 + placement % 2);
      y.Expect("y", [&](int64_t at) -> Want {
        const int64_t feature = at % width, head = at / width % kHeads, row = at / width / kHeads;
        const int64_t from = row * stride_t + head * stride_h;
        if (head >= kRotated || feature >= 2 * pairs) return {x.At(from + feature), 0.0};
        const int64_t pair = interleaved ? feature / 2 : feature % pairs, step = interleaved ? 1 : pairs;
        const bool second = interleaved ? feature % 2 == 1 : feature >= pairs;
        const int64_t table = row % kTokens * pairs + pair;
        const double other = x.At(from + feature + (second ? -step : step)) * sin.At(table);
        const double own = x.At(from + feature) * cos.At(table);
        return {second ? own + other : own - other, 2.0 * (std::fabs(own) + std::fabs(other))};
      });
    });
  }
}

PEAK_KERNEL(rotary_float32) {
  constexpr int64_t kMany = 50, kWidth = 24;
  Random random(1);
  Placer place(0);
  auto x = place.In<float>(kMany * kWidth), cos = place.In<float>(kMany * 9), sin = place.In<float>(kMany * 9);
  auto y = place.Out<float>(kMany * kWidth);
  for (const auto* in : {&x, &cos, &sin}) in->FillNormal(random);
  Rotary({.batch = 1, .tokens = kMany, .heads = 1, .width = kWidth, .pairs = 9, .rotated_heads = 1, .interleaved = true,
          .x = {x.data(), kMany * kWidth, kWidth, kWidth}, .cos = cos.data(), .sin = sin.data(), .y = y.data()},
         threads);
  std::vector<char> bytes;
  y.Append(bytes);
  return bytes;
}

}  // namespace
}  // namespace peak::test
