#include "ops/cross_entropy.h"

#include <algorithm>

#include "buffer.h"

namespace peak::test {
namespace {

constexpr int64_t kRows = 4, kIgnored = -100, kIgnoredRow = 2;

double LogSumExp(const double* z, int64_t vocab) {
  double m = -kInf, l = 0.0;
  for (int64_t i = 0; i < vocab; ++i) m = std::max(m, z[i]);
  for (int64_t i = 0; i < vocab; ++i) l += std::exp(z[i] - m);
  return m + std::log(l);
}

// An absolute error of z - m is a relative error of e^(z - m).
Want Gradient(double z, double lse, bool target, double scale) {
  const double p = std::exp(z - lse), value = (target ? std::expm1(z - lse) : p) * scale;
  const double relative_slack = std::isinf(z) ? 1.0 : 8.0 + 2.0 * std::fabs(z - lse);
  return {value, std::fabs(scale) * p * relative_slack + 2.0 * std::fabs(value)};
}

// Checks m and l of a row. A NaN appears in l only.
void NearStats(int64_t row, const float* stats, const double* z, int64_t vocab, bool ignored) {
  double m = -kInf, l = 0.0;
  for (int64_t i = 0; i < vocab; ++i) m = std::max(m, z[i]);
  for (int64_t i = 0; i < vocab; ++i) l += std::exp(z[i] - m);
  if (ignored) m = l = 0.0;
  if (!std::isnan(l)) Near("m", row, stats[0], {m, 0.0});
  Near("l", row, stats[1], {l, 16.0 * l});
}

// One special value in each row. Infinity and NaN make the row NaN, as in PyTorch.
constexpr double kSpecialValues[] = {1.0, 0x1p-149, 88.0, -1e30, -kInf, kInf, kNan};

PEAK_TEST(cross_entropy_equals_double_precision) {
  for (const double special : kSpecialValues) {
    ForEachCase("cross_entropy", 1, [&](auto element, int64_t vocab, int placement) {
      using T = decltype(element);
      if (special == -kInf && vocab == 1) return;  // a row without a finite logit has no softmax
      const bool with_gradient = placement % 2 == 0;
      const float scale = 0.25f;
      Random random(vocab);
      Placer place(placement);
      auto logits = place.Out<T>(kRows * vocab);
      auto target = place.In<int64_t>(kRows);
      auto loss = place.Out<float>(kRows), stats = place.Out<float>(2 * kRows);
      auto dloss = place.In<float>(kRows);
      logits.FillNormal(random, 3.0, 4.0);
      dloss.FillNormal(random);
      for (int64_t row = 0; row < kRows; ++row) {
        const int64_t at = random.Below(vocab);
        target[row] = row == kIgnoredRow ? kIgnored : at;
        if (vocab > 1) logits[row * vocab + (at + 1) % vocab] = Narrow<T>(special);
      }
      const std::vector<double> z = logits.Values();
      CrossEntropyForward({.dtype = kDtype<T>, .rows = kRows, .vocab = vocab, .logits = logits.data(),
                           .target = target.data(), .ignore_index = kIgnored, .loss = loss.data(),
                           .stats = stats.data(), .with_gradient = with_gradient, .scale = &scale},
                          1 + placement % 2);
      if (!with_gradient) {
        logits.Expect("logits", [&](int64_t i) { return Want{z[i], 0.0}; });  // unchanged
        CrossEntropyBackward({.dtype = kDtype<T>, .rows = kRows, .vocab = vocab, .logits = logits.data(),
                              .target = target.data(), .ignore_index = kIgnored, .stats = stats.data(),
                              .dloss = dloss.data(), .total = vocab},
                             1 + placement % 2);
      }
      for (int64_t row = 0; row < kRows; ++row) {
        const bool ignored = row == kIgnoredRow;
        const double lse = ignored ? 0.0 : LogSumExp(&z[row * vocab], vocab);
        const double z_target = ignored ? 0.0 : z[row * vocab + target[row]];
        NearStats(row, &stats[2 * row], &z[row * vocab], vocab, ignored);
        Near("loss", row, loss[row], {lse - z_target, ignored ? 0.0 : 16.0});
        const double factor = ignored ? 0.0 : with_gradient ? scale : dloss.At(row);
        for (int64_t i = 0; i < vocab; ++i) {
          const Want want = ignored ? Want{0.0, 0.0} : Gradient(z[row * vocab + i], lse, i == target[row], factor);
          if (!Near("dlogits", i, logits[row * vocab + i], want)) return;
        }
      }
    });
  }
}

PEAK_TEST(cross_entropy_with_smoothing_and_z_loss_equals_double_precision) {
  ForEachCase("cross_entropy_smoothed", 1, [&](auto element, int64_t vocab, int placement) {
    using T = decltype(element);
    const bool with_gradient = placement % 2 == 0;
    const float scale = 0.25f, smoothing = 0.3f, z_loss = 0.125f;
    Random random(vocab);
    Placer place(placement);
    auto logits = place.Out<T>(kRows * vocab);
    auto target = place.In<int64_t>(kRows);
    auto weight = place.In<float>(kRows), dloss = place.In<float>(kRows);
    auto loss = place.Out<float>(kRows), stats = place.Out<float>(2 * kRows);
    logits.FillNormal(random, 3.0, 4.0);
    weight.FillNormal(random);
    dloss.FillNormal(random);
    for (int64_t row = 0; row < kRows; ++row) target[row] = row == kIgnoredRow ? kIgnored : random.Below(vocab);
    const std::vector<double> z = logits.Values();
    CrossEntropyForward({.dtype = kDtype<T>, .rows = kRows, .vocab = vocab, .logits = logits.data(),
                         .target = target.data(), .ignore_index = kIgnored, .loss = loss.data(),
                         .stats = stats.data(), .with_gradient = with_gradient, .smoothing = smoothing,
                         .z_loss = z_loss, .scale = &scale, .weight = weight.data()},
                        1 + placement % 2);
    if (!with_gradient) {
      CrossEntropyBackward({.dtype = kDtype<T>, .rows = kRows, .vocab = vocab, .logits = logits.data(),
                            .target = target.data(), .ignore_index = kIgnored, .stats = stats.data(),
                            .dloss = dloss.data(), .smoothing = smoothing, .z_loss = z_loss, .total = vocab},
                           1 + placement % 2);
    }
    for (int64_t row = 0; row < kRows; ++row) {
      if (row == kIgnoredRow) continue;
      const double* at = &z[row * vocab];
      const double lse = LogSumExp(at, vocab), pull = 2.0 * z_loss * lse;
      double sum = 0.0, size = 0.0;
      for (int64_t i = 0; i < vocab; ++i) sum += at[i], size += std::fabs(at[i]);
      const double target_term = (1.0 - smoothing) * at[target[row]], z_term = z_loss * lse * lse;
      const double value = lse - target_term - smoothing * sum / vocab + z_term;
      Near("loss", row, loss[row], {value, 16.0 + 8.0 * (std::fabs(lse) + size / vocab + z_loss * lse * lse)});
      const double factor = with_gradient ? scale * weight.At(row) : dloss.At(row);
      for (int64_t i = 0; i < vocab; ++i) {
        const bool is_target = i == target[row];
        const Want plain = Gradient(at[i], lse, false, factor * (1.0 + pull));
        const double want = plain.value - factor * (smoothing / vocab + (is_target ? 1.0 - smoothing : 0.0));
        const double slack = plain.slack + std::fabs(factor) * (4.0 + 4.0 * std::fabs(pull));
        if (!Near("dlogits", i, logits[row * vocab + i], {want, slack})) return;
      }
    }
  });
}

// A shard that begins at kFirst of a vocabulary of vocab + kOthers, with targets before it, in it and after it.
PEAK_TEST(cross_entropy_of_a_shard_equals_double_precision) {
  ForEachCase("cross_entropy_of_a_shard", 1, [&](auto element, int64_t vocab, int placement) {
    using T = decltype(element);
    constexpr int64_t kFirst = 100, kOthers = 150;
    const float smoothing = 0.3f, z_loss = 0.125f;
    Random random(vocab);
    Placer place(placement);
    auto logits = place.Out<T>(kRows * vocab);
    auto target = place.In<int64_t>(kRows);
    auto parts = place.Out<float>(4 * kRows);
    auto whole = place.In<float>(2 * kRows), dloss = place.In<float>(kRows);
    logits.FillNormal(random, 3.0, 4.0);
    dloss.FillNormal(random);
    // The second target minus kFirst equals ignore_index. It is a class of another shard and not ignored.
    const int64_t targets[kRows] = {kFirst + random.Below(vocab), kFirst + kIgnored, kIgnored, kFirst + vocab};
    for (int64_t row = 0; row < kRows; ++row) target[row] = targets[row];
    const std::vector<double> z = logits.Values();
    CrossEntropyShard({.dtype = kDtype<T>, .rows = kRows, .vocab = vocab, .logits = logits.data(),
                       .target = target.data(), .ignore_index = kIgnored, .first = kFirst, .width = 4,
                       .parts = parts.data()},
                      1 + placement % 2);
    logits.Expect("logits", [&](int64_t i) { return Want{z[i], 0.0}; });  // unchanged
    for (int64_t row = 0; row < kRows; ++row) {
      const double* at = &z[row * vocab];
      const bool ignored = row == kIgnoredRow;
      double total = 0.0, size = 0.0;
      for (int64_t i = 0; i < vocab; ++i) total += at[i], size += std::fabs(at[i]);
      NearStats(row, &parts[4 * row], at, vocab, ignored);
      Near("z_target", row, parts[4 * row + 2], {row == 0 ? at[target[row] - kFirst] : 0.0, 0.0});
      Near("sum", row, parts[4 * row + 3], {ignored ? 0.0 : total, ignored ? 0.0 : 8.0 + 8.0 * size});
      whole[2 * row] = parts[4 * row] + 1.0f;
      whole[2 * row + 1] = parts[4 * row + 1] + 0.5f;
    }
    CrossEntropyBackward({.dtype = kDtype<T>, .rows = kRows, .vocab = vocab, .logits = logits.data(),
                          .target = target.data(), .ignore_index = kIgnored, .stats = whole.data(),
                          .dloss = dloss.data(), .smoothing = smoothing, .z_loss = z_loss, .first = kFirst,
                          .total = vocab + kOthers},
                         1 + placement % 2);
    for (int64_t row = 0; row < kRows; ++row) {
      const double lse = whole.At(2 * row) + std::log(whole.At(2 * row + 1));
      const double pull = 2.0 * z_loss * lse, factor = row == kIgnoredRow ? 0.0 : dloss.At(row);
      for (int64_t i = 0; i < vocab; ++i) {
        const bool is_target = row == 0 && i == target[row] - kFirst;
        const Want plain = Gradient(z[row * vocab + i], lse, false, factor * (1.0 + pull));
        const double onehot = is_target ? 1.0 - smoothing : 0.0;
        const double want = plain.value - factor * (smoothing / (vocab + kOthers) + onehot);
        const double slack = plain.slack + std::fabs(factor) * (4.0 + 4.0 * std::fabs(pull));
        if (!Near("dlogits", i, logits[row * vocab + i], {want, slack})) return;
      }
    }
  });
}

template <class T>
std::vector<char> Call(int threads) {
  constexpr int64_t kManyRows = 53, kVocab = 259;
  Random random(1);
  Placer place(0);
  auto logits = place.Out<T>(kManyRows * kVocab);
  auto target = place.In<int64_t>(kManyRows);
  auto loss = place.Out<float>(kManyRows), stats = place.Out<float>(2 * kManyRows);
  logits.FillNormal(random);
  for (int64_t row = 0; row < kManyRows; ++row) target[row] = random.Below(kVocab);
  CrossEntropyForward({.dtype = kDtype<T>, .rows = kManyRows, .vocab = kVocab, .logits = logits.data(),
                       .target = target.data(), .ignore_index = kIgnored, .loss = loss.data(), .stats = stats.data(),
                       .with_gradient = true},
                      threads);
  std::vector<char> bytes;
  logits.Append(bytes);
  loss.Append(bytes);
  stats.Append(bytes);
  return bytes;
}
PEAK_KERNEL(cross_entropy_float32) { return Call<float>(threads); }
PEAK_KERNEL(cross_entropy_bfloat16) { return Call<bf16>(threads); }

}  // namespace
}  // namespace peak::test
