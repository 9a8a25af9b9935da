#include "ops/embedding.h"

#include "buffer.h"

namespace peak::test {
namespace {

constexpr int64_t kBatch = 2, kTokens = 3, kVocab = 4, kGap = 5;

PEAK_TEST(embedding_equals_double_precision) {
  ForEachCase("embedding", 0, [&](auto element, int64_t width, int placement) {
    using T = decltype(element);
    const int64_t stride = width + kGap, size = kBatch * kTokens * width;
    const bool special = placement == 1, positions = placement != 2;
    Random random(width);
    Placer place(placement);
    auto ids = place.In<int64_t>(kBatch * kTokens);
    auto wte = place.In<T>((kVocab - 1) * stride + width), wpe = place.In<T>((kTokens - 1) * stride + width);
    auto dy = place.In<T>(size);
    auto out = place.Out<T>(size), dwte = place.Out<T>(kVocab * width), dwpe = place.Out<T>(kTokens * width);
    for (int64_t i = 0; i < ids.count(); ++i) ids[i] = random.Below(kVocab - 1);  // no token has the last id
    wte.FillNormal(random);
    wpe.FillNormal(random);
    dy.FillNormal(random);
    if (special) {
      wte.FillSpecials(1);
      dy.FillSpecials(2);
    }
    const auto before = [](int64_t i) { return i % 3 - 1.0; };
    dwte.Fill(before);
    dwpe.Fill(before);
    EmbeddingForward({.dtype = kDtype<T>, .batch = kBatch, .tokens = kTokens, .width = width, .ids = ids.data(),
                      .wte = wte.data(), .wte_stride = stride, .out = out.data(),
                      .wpe = positions ? wpe.data() : nullptr, .wpe_stride = stride},
                     1 + placement % 2);
    EmbeddingBackward({.dtype = kDtype<T>, .batch = kBatch, .tokens = kTokens, .width = width, .ids = ids.data(),
                       .dy = dy.data(), .dwte = dwte.data(), .dwpe = positions ? dwpe.data() : nullptr},
                      1 + placement % 2);
    constexpr double kTerms = 2.0 * kBatch * kTokens;
    std::vector<Want> want_wte, want_wpe;
    for (int64_t i = 0; i < kVocab * width; ++i) want_wte.push_back({before(i), kTerms * std::fabs(before(i))});
    for (int64_t i = 0; i < kTokens * width; ++i) want_wpe.push_back({before(i), kTerms * std::fabs(before(i))});
    const auto add = [](Want& sum, double term) {
      sum.value += term;
      sum.slack += kTerms * std::fabs(term);
    };
    for (int64_t row = 0; row < kBatch * kTokens; ++row) {
      for (int64_t i = 0; i < width; ++i) {
        const double token = wte.At(ids[row] * stride + i);
        const double position = positions ? wpe.At(row % kTokens * stride + i) : 0.0;
        if (!Near("out", row * width + i, out[row * width + i], {token + position, 0.0})) return;
        add(want_wte[ids[row] * width + i], dy.At(row * width + i));
        add(want_wpe[row % kTokens * width + i], dy.At(row * width + i));
      }
    }
    dwte.Expect("dwte", [&](int64_t i) { return want_wte[i]; });
    if (positions) dwpe.Expect("dwpe", [&](int64_t i) { return want_wpe[i]; });
  });
}

PEAK_KERNEL(embedding_float32) {
  constexpr int64_t kManyTokens = 41, kWidth = 33, kManyIds = 17, kSize = kBatch * kManyTokens * kWidth;
  Random random(1);
  Placer place(0);
  auto ids = place.In<int64_t>(kBatch * kManyTokens);
  auto wte = place.In<float>(kManyIds * kWidth), wpe = place.In<float>(kManyTokens * kWidth);
  auto out = place.Out<float>(kSize), dwte = place.Out<float>(kManyIds * kWidth);
  auto dwpe = place.Out<float>(kManyTokens * kWidth);
  for (int64_t i = 0; i < ids.count(); ++i) ids[i] = random.Below(kManyIds);
  wte.FillNormal(random);
  wpe.FillNormal(random);
  for (auto* sums : {&dwte, &dwpe}) sums->Fill([](int64_t) { return 0.0; });
  EmbeddingForward({.dtype = DType::kFloat32, .batch = kBatch, .tokens = kManyTokens, .width = kWidth,
                    .ids = ids.data(), .wte = wte.data(), .wte_stride = kWidth, .out = out.data(), .wpe = wpe.data(),
                    .wpe_stride = kWidth},
                   threads);
  EmbeddingBackward({.dtype = DType::kFloat32, .batch = kBatch, .tokens = kManyTokens, .width = kWidth,
                     .ids = ids.data(), .dy = out.data(), .dwte = dwte.data(), .dwpe = dwpe.data()},
                    threads);
  std::vector<char> bytes;
  for (const auto* buffer : {&out, &dwte, &dwpe}) buffer->Append(bytes);
  return bytes;
}

}  // namespace
}  // namespace peak::test
