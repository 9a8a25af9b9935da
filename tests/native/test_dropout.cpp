#include "ops/dropout.h"

#include "buffer.h"

namespace peak::test {
namespace {

// Philox4x32-7, one counter at a time (kernels/ops/philox.py has the source).
uint32_t Word(uint64_t seed, uint64_t counter, int which) {
  uint32_t c[] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c[0], b = uint64_t{0xcd9e8d57u} * c[2];
    const uint32_t next[] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ low, static_cast<uint32_t>(b),
                             static_cast<uint32_t>(a >> 32) ^ c[3] ^ high, static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return c[which];
}

PEAK_TEST(dropout_keeps_the_elements_of_the_philox_mask) {
  const double p = 0.3;
  const int64_t seed = -0x123456789abcdef;
  ForEachCase("dropout", 0, [&](auto element, int64_t count, int placement) {
    using T = decltype(element);
    Random random(count);
    Placer place(placement);
    auto x = place.In<T>(count);
    auto y = place.Out<T>(count);
    x.FillNormal(random);
    Dropout({.dtype = kDtype<T>, .count = count, .x = x.data(), .seed = &seed, .p = p, .y = y.data()},
            1 + placement % 2);
    y.Expect("y", [&](int64_t n) -> Want {
      const uint32_t word = Word(static_cast<uint64_t>(seed), n / 64 * 16 + n % 16, static_cast<int>(n / 16 % 4));
      const double kept = x.At(n) / (1.0 - p);
      return word >= static_cast<uint32_t>(p * 4294967296.0) ? Want{kept, std::fabs(kept)} : Want{0.0, 0.0};
    });
  });
}

PEAK_KERNEL(dropout_float32) {
  Random random(1);
  Placer place(0);
  auto x = place.In<float>(4000);
  auto y = place.Out<float>(4000);
  x.FillNormal(random);
  const int64_t seed = 7;
  Dropout({.count = x.count(), .x = x.data(), .seed = &seed, .p = 0.5, .y = y.data()}, threads);
  std::vector<char> bytes;
  y.Append(bytes);
  return bytes;
}

}  // namespace
}  // namespace peak::test
