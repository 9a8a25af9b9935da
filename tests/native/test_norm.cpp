#include "ops/norm.h"

#include <algorithm>

#include "buffer.h"
#include "base/memory.h"

namespace peak::test {
namespace {

constexpr int64_t kRows = 3, kGap = 5;  // kGap elements of NaN follow each row of x
constexpr float kEps = 1e-5f, kOffset = 0.25f;

struct Row {
  double mu, r, mean_slack, spread;  // spread: the largest |x| + |mu|, to which the rounding of x - mu is relative
};

// Returns the statistics of a row. If not centered (RMSNorm), the mean is zero.
Row Statistics(const double* x, int64_t width, bool centered) {
  double sum = 0.0, magnitude = 0.0, squares = 0.0, largest = 0.0;
  for (int64_t i = 0; i < width; ++i) {
    sum += x[i];
    magnitude += std::fabs(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  const double mu = centered ? sum / width : 0.0;
  for (int64_t i = 0; i < width; ++i) squares += (x[i] - mu) * (x[i] - mu);
  return {mu, 1.0 / std::sqrt(squares / width + kEps), centered ? magnitude : 0.0,
          centered ? largest + std::fabs(mu) : 0.0};
}

// Fills rows of `width` elements, `stride` apart. The gaps between them stay NaN.
template <class T>
void FillRows(const Buffer<T>& x, Random& random, int64_t width, int64_t stride, double mean) {
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < width; ++i) x[row * stride + i] = Narrow<T>(mean + random.Normal());
  }
}

// One special value in each row: none, a subnormal, a large one, infinity, NaN.
constexpr double kSpecialValues[] = {1.0, 0x1p-149, 1e18, kInf, kNan};

PEAK_TEST(norm_forward_equals_double_precision) {
  for (const double special : kSpecialValues) {
    ForEachCase("norm", 1, [&](auto element, int64_t width, int placement) {
      using T = decltype(element);
      const int64_t stride = width + kGap, size = (kRows - 1) * stride + width;
      const bool with_residual = placement % 2 == 1, with_b = placement != 3, centered = placement < 2;
      Random random(width);
      Placer place(placement);
      auto x = place.In<T>(size), residual = place.In<T>(size);
      auto w = place.In<float>(width), b = place.In<float>(width);
      auto sum = place.Out<T>(kRows * width), y = place.Out<T>(kRows * width);
      auto mu = place.Out<float>(kRows), r = place.Out<float>(kRows);
      FillRows(x, random, width, stride, 3.0);
      FillRows(residual, random, width, stride, -1.0);
      w.FillNormal(random, 1.0);
      b.FillNormal(random);
      for (int64_t row = 0; row < kRows; ++row) x[row * stride + width / 2] = Narrow<T>(special);
      NormForward({.dtype = kDtype<T>, .w_dtype = DType::kFloat32, .rows = kRows, .width = width, .x = x.data(),
                   .x_stride = stride, .w = w.data(), .y = y.data(), .r = r.data(), .eps = kEps, .offset = kOffset,
                   .b = with_b ? b.data() : nullptr, .residual = with_residual ? residual.data() : nullptr,
                   .residual_stride = stride, .sum = sum.data(), .mu = centered ? mu.data() : nullptr},
                  1 + placement % 2);
      for (int64_t row = 0; row < kRows; ++row) {
        std::vector<double> in(width);
        for (int64_t i = 0; i < width; ++i) {
          in[i] = x.At(row * stride + i);
          if (!with_residual) continue;
          const double exact = in[i] + residual.At(row * stride + i);
          Near("sum", i, sum[row * width + i], {exact, 0.0});
          in[i] = sum.At(row * width + i);  // the norm takes the rounded sum
        }
        const Row want = Statistics(in.data(), width, centered);
        const double shift = 4.0 * want.mean_slack / width + want.spread;
        if (centered) Near("mu", row, mu[row], {want.mu, shift});
        Near("r", row, r[row], {want.r, 16.0 * want.r * (1.0 + shift * want.r)});
        for (int64_t i = 0; i < width; ++i) {
          const double z = (in[i] - want.mu) * want.r, bias = with_b ? b.At(i) : 0.0;
          const double z_slack = want.r * 2.0 * shift + 16.0 * std::fabs(z) * (1.0 + shift * want.r);
          const double weight = w.At(i) + kOffset, slack = std::fabs(weight) * z_slack;
          if (!Near("y", i, y[row * width + i], {z * weight + bias, slack + std::fabs(bias)})) return;
        }
      }
    });
  }
}

PEAK_TEST(norm_backward_equals_double_precision) {
  ForEachCase("norm", 1, [&](auto element, int64_t width, int placement) {
    using T = decltype(element);
    const int64_t stride = width + kGap, size = (kRows - 1) * stride + width;
    const bool with_dsum = placement % 2 == 1, with_dx = placement != 2, with_dwb = placement != 3;
    const bool centered = placement != 1, add_dw = placement == 2, add_db = placement == 1;
    Random random(width);
    Placer place(placement);
    auto x = place.In<T>(size), dy = place.In<T>(size), dsum = place.In<T>(size), w = place.In<T>(width);
    auto mu = place.In<float>(kRows), r = place.In<float>(kRows);
    auto dx = place.Out<T>(kRows * width), dw = place.Out<T>(width), db = place.Out<T>(width);
    FillRows(x, random, width, stride, 3.0);
    FillRows(dy, random, width, stride, 0.5);
    FillRows(dsum, random, width, stride, 0.0);
    w.FillNormal(random, 1.0);
    const double before = 2.5;  // in the buffers that are added to
    for (int64_t i = 0; i < width; ++i) {
      if (add_dw) dw[i] = Narrow<T>(before);
      if (add_db) db[i] = Narrow<T>(before);
    }
    for (int64_t row = 0; row < kRows; ++row) {
      std::vector<double> in(width);
      for (int64_t i = 0; i < width; ++i) in[i] = x.At(row * stride + i);
      const Row statistics = Statistics(in.data(), width, centered);
      mu[row] = static_cast<float>(statistics.mu);
      r[row] = static_cast<float>(statistics.r);
    }
    NormBackward({.dtype = kDtype<T>, .w_dtype = kDtype<T>, .rows = kRows, .width = width, .dy = dy.data(),
                  .dy_stride = stride, .x = x.data(), .x_stride = stride, .w = w.data(), .r = r.data(),
                  .offset = kOffset, .dsum = with_dsum ? dsum.data() : nullptr, .dsum_stride = stride,
                  .mu = centered ? mu.data() : nullptr, .dx = with_dx ? dx.data() : nullptr,
                  .dw = with_dwb ? dw.data() : nullptr, .db = with_dwb ? db.data() : nullptr, .add_dw = add_dw,
                  .add_db = add_db},
                 1 + placement % 2);
    const auto z = [&](int64_t row, int64_t i) { return (x.At(row * stride + i) - mu.At(row)) * r.At(row); };
    // The rounding error of x - mu is relative to |x| and |mu|.
    const auto z_slack = [&](int64_t row, int64_t i) {
      return 2.0 * r.At(row) * (std::fabs(x.At(row * stride + i)) + std::fabs(mu.At(row)));
    };
    for (int64_t row = 0; with_dx && row < kRows; ++row) {
      double mean_g = 0.0, mean_gz = 0.0, slack_g = 0.0, slack_gz = 0.0;
      for (int64_t i = 0; i < width; ++i) {
        const double g = dy.At(row * stride + i) * (w.At(i) + kOffset);
        mean_g += centered ? g / width : 0.0;
        mean_gz += g * z(row, i) / width;
        slack_g += 8.0 * std::fabs(g) / width;
        slack_gz += 8.0 * std::fabs(g) * (std::fabs(z(row, i)) + z_slack(row, i)) / width;
      }
      for (int64_t i = 0; i < width; ++i) {
        const double g = dy.At(row * stride + i) * (w.At(i) + kOffset), extra = with_dsum ? dsum.At(row * stride + i) : 0.0;
        const double value = r.At(row) * (g - mean_g - z(row, i) * mean_gz) + extra;
        const double slack = r.At(row) * (4.0 * std::fabs(g) + slack_g + std::fabs(z(row, i)) * slack_gz +
                                          std::fabs(mean_gz) * (4.0 * std::fabs(z(row, i)) + z_slack(row, i)));
        if (!Near("dx", row * width + i, dx[row * width + i], {value, slack + 4.0 * std::fabs(extra)})) return;
      }
    }
    if (!with_dwb) return;
    for (int64_t i = 0; i < width; ++i) {
      Want want_w{add_dw ? before : 0.0, 0.0}, want_b{add_db ? before : 0.0, 0.0};
      for (int64_t row = 0; row < kRows; ++row) {
        const double g = dy.At(row * stride + i);
        want_w.value += g * z(row, i);
        want_w.slack += std::fabs(g) * (4.0 * std::fabs(z(row, i)) + z_slack(row, i));
        want_b.value += g;
        want_b.slack += 4.0 * std::fabs(g);
      }
      if (!Near("dw", i, dw[i], want_w) || !Near("db", i, db[i], want_b)) return;
    }
  });
}

// Large outputs, whose stores bypass the caches, have the same bits as the same rows in small calls.
template <class T>
void ExpectSameBitsWithoutCaches() {
  constexpr int64_t kWidth = 1024;
  int64_t rows = 64;
  while (!BypassCaches(reinterpret_cast<void*>(64), rows * kWidth * sizeof(T), kWidth * sizeof(T))) rows *= 2;
  // The cache of this machine is too large for a test.
  if (rows * kWidth * static_cast<int64_t>(sizeof(T)) > (int64_t{64} << 20)) return;
  const int64_t size = rows * kWidth, pieces = 8, some = rows / pieces * kWidth;
  SetCase("norm %s of %lld rows", kName<T>, static_cast<long long>(rows));
  Random random(1);
  Placer place(0);
  auto x = Buffer<T>(Role::kInput, size, 0), residual = Buffer<T>(Role::kInput, size, 0);
  auto sum = Buffer<T>(Role::kOutput, size, 0), y = Buffer<T>(Role::kOutput, size, 0);
  auto dx = Buffer<T>(Role::kOutput, size, 0);
  auto w = place.In<T>(kWidth), b = place.In<T>(kWidth);
  auto mu = place.Out<float>(rows), r = place.Out<float>(rows);
  x.Fill([](int64_t i) { return static_cast<double>(i * 37 & 1023); });
  residual.Fill([](int64_t i) { return static_cast<double>(i * 41 & 511); });
  w.FillNormal(random);
  b.FillNormal(random);
  const auto run = [&](int64_t first, int64_t count) {
    const int64_t at = first * kWidth;
    NormForward({.dtype = kDtype<T>, .w_dtype = kDtype<T>, .rows = count, .width = kWidth, .x = x.data() + at,
                 .x_stride = kWidth, .w = w.data(), .y = y.data() + at, .r = r.data() + first, .eps = kEps,
                 .b = b.data(), .residual = residual.data() + at, .residual_stride = kWidth, .sum = sum.data() + at,
                 .mu = mu.data() + first},
                2);
    NormBackward({.dtype = kDtype<T>, .w_dtype = kDtype<T>, .rows = count, .width = kWidth, .dy = residual.data() + at,
                  .dy_stride = kWidth, .x = sum.data() + at, .x_stride = kWidth, .w = w.data(), .r = r.data() + first,
                  .dsum = y.data() + at, .dsum_stride = kWidth, .mu = mu.data() + first, .dx = dx.data() + at},
                 2);
  };
  run(0, rows);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    std::vector<char> whole, part;
    const auto append = [&](std::vector<char>& bytes) {
      for (const auto* out : {&sum, &y, &dx}) {
        const char* begin = reinterpret_cast<const char*>(out->data() + piece * some);
        bytes.insert(bytes.end(), begin, begin + some * sizeof(T));
      }
    };
    append(whole);
    for (auto* out : {&sum, &y, &dx}) std::memset(out->data() + piece * some, 0xff, some * sizeof(T));
    run(piece * some / kWidth, some / kWidth);
    append(part);
    Check(whole == part, "part %d of 8 differs", static_cast<int>(piece));
  }
}
PEAK_TEST(norm_stores_that_bypass_the_caches_give_the_same_bits) {
  ExpectSameBitsWithoutCaches<float>();
  ExpectSameBitsWithoutCaches<bf16>();
}

PEAK_TEST(norm_of_no_rows_gives_zero_parameter_gradients) {
  Placer place(0);
  auto w = place.In<float>(8);
  auto dw = place.Out<float>(8), db = place.Out<float>(8);
  w.Fill([](int64_t) { return 1.0; });
  NormForward({.width = 8, .w = w.data()}, 2);
  NormBackward({.width = 8, .w = w.data(), .dw = dw.data(), .db = db.data()}, 2);
  dw.Expect("dw", [](int64_t) { return Want{0.0, 0.0}; });
  db.Expect("db", [](int64_t) { return Want{0.0, 0.0}; });
}

template <class T>
std::vector<char> Call(int threads) {
  constexpr int64_t kManyRows = 77, kWidth = 129, kSize = kManyRows * kWidth;
  Random random(1);
  Placer place(0);
  auto x = place.In<T>(kSize), dy = place.In<T>(kSize), w = place.In<T>(kWidth), b = place.In<T>(kWidth);
  auto sum = place.Out<T>(kSize), y = place.Out<T>(kSize), dx = place.Out<T>(kSize);
  auto dw = place.Out<T>(kWidth), db = place.Out<T>(kWidth);
  auto mu = place.Out<float>(kManyRows), r = place.Out<float>(kManyRows);
  for (auto* in : {&x, &dy, &w, &b}) in->FillNormal(random, 1.0);
  NormForward({.dtype = kDtype<T>, .w_dtype = kDtype<T>, .rows = kManyRows, .width = kWidth, .x = x.data(),
               .x_stride = kWidth, .w = w.data(), .y = y.data(), .r = r.data(), .eps = kEps, .b = b.data(),
               .residual = dy.data(), .residual_stride = kWidth, .sum = sum.data(), .mu = mu.data()},
              threads);
  NormBackward({.dtype = kDtype<T>, .w_dtype = kDtype<T>, .rows = kManyRows, .width = kWidth, .dy = dy.data(),
                .dy_stride = kWidth, .x = sum.data(), .x_stride = kWidth, .w = w.data(), .r = r.data(),
                .dsum = x.data(), .dsum_stride = kWidth, .mu = mu.data(), .dx = dx.data(), .dw = dw.data(),
                .db = db.data()},
               threads);
  std::vector<char> bytes;
  for (const auto* out : {&sum, &y, &dx, &dw, &db}) out->Append(bytes);
  for (const auto* out : {&mu, &r}) out->Append(bytes);
  return bytes;
}
PEAK_KERNEL(norm_float32) { return Call<float>(threads); }
PEAK_KERNEL(norm_bfloat16) { return Call<bf16>(threads); }

}  // namespace
}  // namespace peak::test
