#include "rotary.h"

#include "buffer.h"

namespace peak::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 2, kHeads = 3, kTurned = 2, kPassed = 3, kGap = 5;

PEAK_TEST(rotary) {
  ForEachCase("rotary", 0, [&](auto element, int64_t pairs, int placement) {
    using T = decltype(element);
    const int64_t width = 2 * pairs + kPassed, stride = width + kGap;
    const int64_t rows = kBatch * kTokens * kHeads;
    for (const bool interleaved : {false, true}) {
      Random random(pairs);
      Placer place(placement);
      auto x = place.In<T>((rows - 1) * stride + width);
      auto cos = place.In<float>(kTokens * pairs), sin = place.In<float>(kTokens * pairs);
      auto y = place.Out<T>(rows * width);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; ++i) x[row * stride + i] = Narrow<T>(random.Normal());
      }
      cos.FillNormal(random);
      sin.FillNormal(random);
      Rotary({.dtype = kDtype<T>, .batch = kBatch, .tokens = kTokens, .heads = kHeads, .width = width, .pairs = pairs,
              .turned = kTurned, .interleaved = interleaved, .x = x.data(), .stride_b = kTokens * kHeads * stride,
              .stride_t = kHeads * stride, .stride_h = stride, .cos = cos.data(), .sin = sin.data(), .y = y.data()},
             1 + placement % 2);
      y.Expect("y", [&](int64_t index) -> Want {
        const int64_t row = index / width, d = index % width, token = row / kHeads % kTokens;
        const double own = x.At(row * stride + d);
        if (row % kHeads >= kTurned || d >= 2 * pairs) return {own, 0.0};
        const int64_t pair = interleaved ? d / 2 : d % pairs;
        const bool second = interleaved ? d % 2 == 1 : d >= pairs;
        const int64_t step = interleaved ? 1 : pairs;
        const double other = x.At(row * stride + (second ? d - step : d + step));
        const double a = own * cos.At(token * pairs + pair), b = other * sin.At(token * pairs + pair);
        return {second ? a + b : a - b, 2.0 * (std::fabs(a) + std::fabs(b))};
      });
    }
  });
}

PEAK_KERNEL(rotary_float32) {
  constexpr int64_t kManyTokens = 41, kPairs = 17, kWidth = 40, kSize = kBatch * kManyTokens * kHeads * kWidth;
  Random random(1);
  Placer place(0);
  auto x = place.In<float>(kSize), cos = place.In<float>(kManyTokens * kPairs), sin = place.In<float>(cos.count());
  auto y = place.Out<float>(kSize);
  for (const auto* buffer : {&x, &cos, &sin}) buffer->FillNormal(random);
  Rotary({.dtype = DType::kFloat32, .batch = kBatch, .tokens = kManyTokens, .heads = kHeads, .width = kWidth,
          .pairs = kPairs, .turned = kTurned, .x = x.data(), .stride_b = kManyTokens * kHeads * kWidth,
          .stride_t = kHeads * kWidth, .stride_h = kWidth, .cos = cos.data(), .sin = sin.data(), .y = y.data()},
         threads);
  std::vector<char> bytes;
  y.Append(bytes);
  return bytes;
}

}  // namespace
}  // namespace peak::test
