#include "ops/sum_of_squares.h"

#include "buffer.h"

namespace peak::test {
namespace {

PEAK_TEST(sum_of_squares_equals_double_precision) {
  // Special values: a subnormal, values whose square overflows a float, infinity, NaN.
  for (const double special : {1.0, 0x1p-149, 1e18, 3e38, kInf, kNan}) {
    ForEachCase("sum_of_squares", 0, [&](auto element, int64_t count, int placement) {
      using T = decltype(element);
      Random random(count);
      Placer place(placement);
      auto x = place.In<T>(count);
      auto total = place.Out<float>(1);
      x.FillNormal(random, 1.0);
      total[0] = 0.5f;
      if (count > 0) x[count / 2] = Narrow<T>(special);
      double want = 0.5;
      for (const double value : x.Values()) want += value * value;
      SumOfSquares({.dtype = kDtype<T>, .count = count, .x = x.data(), .total = total.data()}, 1 + placement % 2);
      Near("total", 0, total[0], {want, 16.0 * want});
    });
  }
}

PEAK_KERNEL(sum_of_squares_bfloat16) {
  Random random(1);
  Placer place(0);
  auto x = place.In<bf16>(40000);
  auto total = place.Out<float>(1);
  x.FillNormal(random);
  total[0] = 0.0f;
  SumOfSquares({.dtype = DType::kBFloat16, .count = x.count(), .x = x.data(), .total = total.data()}, threads);
  std::vector<char> bytes;
  total.Append(bytes);
  return bytes;
}

}  // namespace
}  // namespace peak::test
