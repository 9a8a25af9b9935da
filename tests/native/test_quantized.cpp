// Products with weights of 8 and 4 bits: each element equals a double-precision product, with panels written by the
// formula of gemm/quantized.h, and the bits do not depend on the number of rows.
#include <algorithm>

#include "buffer.h"
#include "gemm/gemm.h"
#include "gemm/quantized.h"
#include "gemm/quantized_backward.h"

namespace peak::test {
namespace {

constexpr int kLevels[4][16] = {
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
};

double Half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double value = std::ldexp(exponent == 0 ? fraction : 1024 + fraction, std::max(exponent, 1) - 25);
  return bits >> 15 ? -value : value;
}

struct Sizes {
  int64_t rows, k, n;
};

int64_t Pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A random weight: its panels, with random padding, and its values in double.
struct Weight {
  int bits;
  int64_t n, k, block;
  int levels;  // with f16 scales and offsets, the row of kLevels; else -1
  bool zero_points;  // the offsets are zero points, and the weight's inputs have an order of their own
  std::vector<int32_t> order;
  std::vector<double> values, sizes;  // (n, k): values, and sums of the absolute values of their two terms
  Buffer<bf16> panels;  // pairs of bytes, since a Buffer has an even address
  Buffer<float> scale_8;
  Buffer<bf16> scale_4, offset;  // with levels, the bits of f16

  Weight(int bits, int64_t n, int64_t k, int64_t block, Placer& place, Random& random, int levels = -1,
         bool zero_points = false)
      : bits(bits), n(n), k(k), block(block), levels(levels), zero_points(zero_points), values(n * k), sizes(n * k),
        panels(place.In<bf16>(Pieces(n, 16) * Pieces(k, 8) * (bits == 8 ? 64 : 32))),
        scale_8(place.In<float>(bits == 8 ? n : 0)),
        scale_4(place.In<bf16>(bits == 4 || levels >= 0 ? Pieces(n, 16) * Pieces(k, block) * 16 : 0)),
        offset(place.In<bf16>(levels >= 0 ? scale_4.count() : 0)) {
    for (int64_t i = 0; i < panels.count(); ++i) panels[i] = {static_cast<uint16_t>(random.Bits())};
    scale_8.FillNormal(random);
    scale_4.FillNormal(random);
    for (int64_t i = 0; i < offset.count(); ++i) {  // from 2^-3 to 2, of both signs, and some subnormal scales
      for (Buffer<bf16>* part : {&scale_4, &offset}) {
        const uint32_t bits = random.Bits(), exponent = i % 7 == 3 ? 0 : 12 + (bits >> 16 & 3);
        (*part)[i] = {static_cast<uint16_t>((bits & 0x83FF) | exponent << 10)};
      }
    }
    for (int64_t i = 0; zero_points && i < offset.count(); ++i) {
      constexpr uint16_t kHalves[] = {0x0000, 0x3C00, 0xBC00, 0x4700, 0xC800, 0x5800, 0xD7F0};  // 0 1 -1 7 -8 128 -127
      offset[i] = {kHalves[random.Bits() % 7]};
    }
    for (int64_t p = 0; p < k; ++p) {  // Fisher-Yates
      order.push_back(static_cast<int32_t>(p));
      std::swap(order[p], order[random.Bits() % (p + 1)]);
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < k; ++p) {
        const double scale = Scale(j, p / block), scaled = Level(j, p) * scale;
        const double shift = zero_points ? -Offset(j, p / block) * scale : Offset(j, p / block);
        values[j * k + p] = scaled + shift, sizes[j * k + p] = std::fabs(scaled) + std::fabs(shift);
      }
    }
  }
  uint8_t* Bytes() const { return reinterpret_cast<uint8_t*>(panels.data()); }
  int64_t Group(int64_t j, int64_t b) const { return (j / 16 * Pieces(k, block) + b) * 16 + j % 16; }
  double Scale(int64_t j, int64_t b) const {
    if (levels >= 0) return Half(scale_4.data()[Group(j, b)].bits);
    return bits == 8 ? scale_8.At(j) : scale_4.At(Group(j, b));
  }
  double Offset(int64_t j, int64_t b) const { return levels < 0 ? 0.0 : Half(offset.data()[Group(j, b)].bits); }
  // Returns the level of a weight.
  int Level(int64_t j, int64_t p) const {
    const int64_t quads = Pieces(k, 8) * 2, quad = p / 4, lane = j % 16 * 4 + p % 4;
    if (bits == 8) return Bytes()[(j / 16 * quads + quad) * 64 + lane] - 128;
    const uint8_t byte = Bytes()[(j / 16 * quads / 2 + quad / 2) * 64 + lane];
    return kLevels[std::max(levels, 0)][quad % 2 == 0 ? byte & 15 : byte >> 4];
  }
  template <class T>
  QuantizedArgs Times(const T* x, int64_t rows, T* y) const {
    QuantizedArgs args{};
    static_cast<QuantizedMatrix&>(args) = {
        .dtype = kDtype<T>, .bits = bits, .n = n, .k = k, .block = block, .weight = Bytes(),
        .scale = bits == 8 && levels < 0 ? static_cast<const void*>(scale_8.data()) : scale_4.data(),
        .f16_scales = levels >= 0, .offset = levels < 0 ? nullptr : reinterpret_cast<const f16*>(offset.data()),
        .zero_points = zero_points, .levels = std::max(levels, 0), .order = zero_points ? order.data() : nullptr};
    args.rows = rows, args.x = x, args.x_row = k, args.y = y, args.y_row = n;
    return args;
  }
};

// Returns x after quantization. Computes in float like the kernel, so that every element rounds to the same byte.
template <class T>
std::vector<double> Rounded(const Buffer<T>& x, int64_t rows, int64_t row, const Weight& weight) {
  const int64_t k = weight.k, block = weight.block;
  const auto input = [&](int64_t i, int64_t p) {
    return static_cast<float>(x.At(i * row + (weight.zero_points ? weight.order[p] : p)));
  };
  std::vector<double> rounded(rows * k);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t begin = 0; begin < k; begin += block) {
      const int64_t end = std::min(begin + block, k);
      float largest = 0.0f;
      for (int64_t p = begin; p < end; ++p) {
        largest = std::max(largest, std::fabs(input(i, p)));
      }
      const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
      for (int64_t p = begin; p < end; ++p) {
        const double byte = std::nearbyint(input(i, p) * inverse);
        rounded[i * k + p] = byte * scale;
      }
    }
  }
  return rounded;
}

PEAK_TEST(quantized_product_equals_double_precision) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    // With f16 scales ten times the bits, plus the table of levels, plus 100 with zero points and an order.
    for (const int kind : {8, 4, 80, 40, 41, 42, 43, 141, 180}) {
      const bool zero_points = kind > 100;
      const int form = kind % 100, bits = form > 8 ? form / 10 : form, levels = form > 8 ? form % 10 : -1;
      for (const Sizes s : {Sizes{1, 1, 1}, Sizes{2, 7, 15}, Sizes{3, 8, 16}, Sizes{4, 33, 17}, Sizes{5, 64, 47},
                            Sizes{8, 65, 48}, Sizes{9, 130, 49}, Sizes{16, 32, 97}, Sizes{33, 72, 33},
                            Sizes{43, 200, 70}}) {
        for (int placement = 0; placement < kPlacements; ++placement) {
          const int64_t block = levels >= 0 ? 16 << placement % 4 : bits == 8 ? 128 : 32 << placement % 3;
          const int64_t gap = placement;
          SetCase("kind %d %s rows %lld k %lld n %lld placement %d", kind, kName<T>, static_cast<long long>(s.rows),
                  static_cast<long long>(s.k), static_cast<long long>(s.n), placement);
          Random random(s.n + placement);
          Placer place(placement);
          const Weight weight(bits, s.n, s.k, block, place, random, levels, zero_points);
          const int64_t x_row = s.k + gap, y_row = s.n + gap;
          auto x = place.In<T>(s.rows * x_row), bias = place.In<T>(s.n), y = place.Out<T>(s.rows * y_row);
          x.Fill([&](int64_t i) { return i % x_row < s.k ? random.Normal() : kNan; });
          bias.FillNormal(random);
          QuantizedArgs args = weight.Times(x.data(), s.rows, y.data());
          args.x_row = x_row, args.y_row = y_row, args.bias = placement % 2 ? bias.data() : nullptr;
          LinearQuantized(args, 1 + placement % 3);
          const std::vector<double> left = Rounded(x, s.rows, x_row, weight);
          for (int64_t at = 0; at < s.rows * y_row; ++at) {
            const int64_t i = at / y_row, j = at % y_row;
            if (j >= s.n) {
              if (!Check(std::isnan(y.At(at)), "wrote between rows of y")) return;
              continue;
            }
            Want want{args.bias == nullptr ? 0.0 : bias.At(j), args.bias == nullptr ? 0.0 : std::fabs(bias.At(j))};
            for (int64_t p = 0; p < s.k; ++p) {
              const double product = left[i * s.k + p] * weight.values[j * s.k + p];
              want.value += product, want.slack += 4.0 * std::fabs(left[i * s.k + p]) * weight.sizes[j * s.k + p];
            }
            if (!Near("y", at, y[at], want)) return;
          }
        }
      }
    }
  });
}

// dx = dpre W, in the order of x. With 1100 outputs the sum over them has more than one block.
PEAK_TEST(quantized_backward_equals_double_precision) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (const int kind : {8, 4, 80, 40, 43, 141, 180}) {
      const bool zero_points = kind > 100;
      const int form = kind % 100, bits = form > 8 ? form / 10 : form, levels = form > 8 ? form % 10 : -1;
      for (const Sizes s : {Sizes{1, 1, 1}, Sizes{2, 7, 15}, Sizes{5, 33, 17}, Sizes{9, 65, 48}, Sizes{17, 130, 33},
                            Sizes{3, 24, 1100}}) {
        for (int placement = 0; placement < kPlacements; ++placement) {
          const int64_t block = levels >= 0 ? 8 << placement : bits == 8 ? 128 : 32 << placement % 3;
          SetCase("backward kind %d %s rows %lld k %lld n %lld placement %d", kind, kName<T>,
                  static_cast<long long>(s.rows), static_cast<long long>(s.k), static_cast<long long>(s.n), placement);
          Random random(s.n + placement);
          Placer place(placement);
          const Weight weight(bits, s.n, s.k, block, place, random, levels, zero_points);
          auto dpre = place.In<T>(s.rows * s.n);
          auto dx = place.Out<T>(s.rows * s.k), unordered = place.Out<T>(s.rows * s.k);
          dpre.FillNormal(random);
          QuantizedBackwardArgs args{};
          static_cast<QuantizedMatrix&>(args) = weight.Times(static_cast<const T*>(nullptr), 0, dx.data());
          args.rows = s.rows, args.dpre = dpre.data(), args.dx = dx.data(), args.unordered = unordered.data();
          QuantizedBackward(args, 1 + placement % 3);
          for (int64_t at = 0; at < s.rows * s.k; ++at) {
            const int64_t i = at / s.k, p = at % s.k;
            Want want{0.0, 0.0};
            for (int64_t j = 0; j < s.n; ++j) {
              const double product = dpre.At(i * s.n + j) * Widen(Narrow<T>(weight.values[j * s.k + p]));
              want.value += product, want.slack += 8.0 * std::fabs(dpre.At(i * s.n + j)) * weight.sizes[j * s.k + p];
            }
            const int64_t to = i * s.k + (zero_points ? weight.order[p] : p);
            if (!Near("dx", to, dx[to], want)) return;
          }
        }
      }
    }
  });
}

PEAK_TEST(activation_backward_is_the_slope_of_the_activation) {
  constexpr int64_t kCount = 100;
  constexpr double kStep = 1e-5;
  Random random(5);
  Placer place(1);
  auto pre = place.In<float>(kCount), dy = place.In<float>(kCount), dpre = place.Out<float>(kCount);
  pre.FillNormal(random, 0.0, 4.0);
  dy.FillNormal(random);
  const auto value = [](Activation activation, double v) {
    const double u = std::sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v), low = std::min(v, 7.0);
    switch (activation) {
      case Activation::kGeluTanh: return v / (1.0 + std::exp(-2.0 * u));
      case Activation::kGeluErf: return v * 0.5 * std::erfc(-v / std::sqrt(2.0));
      case Activation::kRelu: return std::max(v, 0.0);
      case Activation::kSilu: return v / (1.0 + std::exp(-v));
      case Activation::kClampedSwiglu: return low / (1.0 + std::exp(-1.702 * low));
      default: return std::max(-7.0, low) + 1.0;
    }
  };
  for (int kind = 0; kind <= static_cast<int>(Activation::kClampedUp); ++kind) {
    SetCase("activation %d", kind);
    const Activation activation = static_cast<Activation>(kind);
    ActivationBackward({DType::kFloat32, kCount, kind, dy.data(), pre.data(), dpre.data()}, 2);
    dpre.Expect("dpre", [&](int64_t i) -> Want {
      const double v = pre.At(i);
      const double slope = (value(activation, v + kStep) - value(activation, v - kStep)) / (2.0 * kStep);
      return {dy.At(i) * slope, 64.0 * std::fabs(dy.At(i)) * (1.0 + std::fabs(v))};
    });
  }
}

// A row has the same bits in a product of any number of rows: tiles of 1, 2, 4 and 8 rows, 4 bits unpacked or not.
PEAK_TEST(quantized_row_does_not_depend_on_other_rows) {
  constexpr int64_t kRows = 45, kK = 200, kN = 70;
  for (const int kind : {8, 4, 80, 42}) {
    const int bits = kind > 8 ? kind / 10 : kind;
    Random random(bits);
    Placer place(0);
    const Weight weight(bits, kN, kK, kind == 8 ? 128 : 64, place, random, kind > 8 ? kind % 10 : -1);
    auto x = place.In<float>(kRows * kK), all = place.Out<float>(kRows * kN), part = place.Out<float>(kRows * kN);
    x.FillNormal(random);
    LinearQuantized(weight.Times(x.data(), kRows, all.data()), 2);
    for (int64_t rows = 1; rows < kRows; ++rows) {
      SetCase("kind %d, %lld rows", kind, static_cast<long long>(rows));
      LinearQuantized(weight.Times(x.data() + kK, rows, part.data()), 1);
      Check(std::memcmp(part.data(), all.data() + kN, rows * kN * sizeof(float)) == 0,
            "the rows differ from those of the whole product");
    }
  }
}

// Rows of floats in a product whose bias is bf16 have the bits of a product in float32.
PEAK_TEST(quantized_float32_rows_have_the_bits_of_float32) {
  constexpr int64_t kRows = 5, kK = 200, kN = 70;
  for (const int kind : {8, 4, 80, 42}) {
    SetCase("kind %d", kind);
    Random random(kind);
    Placer place(3);
    const Weight weight(kind > 8 ? kind / 10 : kind, kN, kK, kind == 8 ? 128 : 64, place, random,
                        kind > 8 ? kind % 10 : -1);
    auto x = place.In<float>(kRows * kK), wide = place.In<float>(kN);
    auto expected = place.Out<float>(kRows * kN), y = place.Out<float>(kRows * kN);
    auto bias = place.In<bf16>(kN);
    x.FillNormal(random);
    bias.FillNormal(random);
    wide.Fill([&](int64_t j) { return bias.At(j); });
    QuantizedArgs args = weight.Times(x.data(), kRows, expected.data());
    args.activation = static_cast<int>(Activation::kGeluTanh), args.bias = wide.data();
    LinearQuantized(args, 2);
    args.dtype = DType::kBFloat16, args.float32_rows = true, args.bias = bias.data(), args.y = y.data();
    LinearQuantized(args, 1);
    Check(std::memcmp(y.data(), expected.data(), kRows * kN * sizeof(float)) == 0, "other bits");
  }
}

// Infinity and NaN make their row NaN and no other row. Rows of zeros and of subnormals give the bias.
PEAK_TEST(quantized_infinity_and_nan_stay_in_their_row) {
  constexpr int64_t kRows = 5, kK = 300, kN = 20;
  const double specials[kRows] = {kInf, kNan, 0.0, 0x1p-149, 1.0};
  for (const int bits : {8, 4}) {
    SetCase("%d bits", bits);
    Random random(bits);
    Placer place(bits);
    const Weight weight(bits, kN, kK, bits == 8 ? 128 : 32, place, random);
    auto x = place.In<float>(kRows * kK), y = place.Out<float>(kRows * kN), bias = place.In<float>(kN);
    x.Fill([&](int64_t i) { return i % kK == 200 ? specials[i / kK] : i / kK < 2 ? random.Normal() : 0.0; });
    bias.Fill([](int64_t j) { return 1.0 + j; });
    QuantizedArgs args = weight.Times(x.data(), kRows, y.data());
    args.bias = bias.data();
    LinearQuantized(args, 2);
    for (int64_t i = 0; i < kRows * kN; ++i) {
      if (i / kN < 2) Check(std::isnan(y[i]), "y[%d] is %g, expected NaN", static_cast<int>(i), y[i]);
      if (i / kN == 2 || i / kN == 3) Check(y[i] == bias[i % kN], "y[%d] is %g", static_cast<int>(i), y[i]);
      if (i / kN == 4) Near("y", i, y[i], {bias.At(i % kN) + weight.values[i % kN * kK + 200], 40.0});
    }
  }
}

PEAK_TEST(quantized_activations_equal_double_precision) {
  Random random(3);
  Placer place(1);
  const Weight weight(8, 50, 40, 128, place, random);
  auto x = place.In<float>(3 * 40), plain = place.Out<float>(150), y = place.Out<float>(150);
  x.FillNormal(random, 0.0, 0.01);
  QuantizedArgs args = weight.Times(x.data(), 3, plain.data());
  LinearQuantized(args, 1);
  for (const Activation activation : {Activation::kGeluTanh, Activation::kGeluErf, Activation::kRelu}) {
    SetCase("activation %d", static_cast<int>(activation));
    args.activation = static_cast<int>(activation), args.y = y.data();
    LinearQuantized(args, 1);
    y.Expect("y", [&](int64_t i) -> Want {
      const double v = plain.At(i), u = std::sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v);
      const double gelu = activation == Activation::kGeluTanh ? v / (1.0 + std::exp(-2.0 * u))
                                                             : v * 0.5 * std::erfc(-v / std::sqrt(2.0));
      return {activation == Activation::kRelu ? std::max(v, 0.0) : gelu, 16.0 * std::fabs(v)};
    });
  }
}

template <class T>
std::vector<char> Call(int bits, int64_t rows, int threads) {
  Random random(bits);
  Placer place(0);
  const Weight weight(bits, 150, 200, bits == 8 ? 128 : 64, place, random);
  auto x = place.In<T>(rows * 200), y = place.Out<T>(rows * 150);
  x.FillNormal(random);
  LinearQuantized(weight.Times(x.data(), rows, y.data()), threads);
  std::vector<char> bytes;
  y.Append(bytes);
  return bytes;
}
template <class T>
std::vector<char> CallBackward(int bits, int64_t rows, int threads) {
  Random random(bits);
  Placer place(0);
  const Weight weight(bits, 150, 200, bits == 8 ? 128 : 64, place, random);
  auto dpre = place.In<T>(rows * 150), dx = place.Out<T>(rows * 200);
  dpre.FillNormal(random);
  QuantizedBackwardArgs args{};
  static_cast<QuantizedMatrix&>(args) = weight.Times(static_cast<const T*>(nullptr), 0, dx.data());
  args.rows = rows, args.dpre = dpre.data(), args.dx = dx.data();
  QuantizedBackward(args, threads);
  std::vector<char> bytes;
  dx.Append(bytes);
  return bytes;
}
PEAK_KERNEL(quantized_8_backward) { return CallBackward<float>(8, 43, threads); }
PEAK_KERNEL(quantized_4_backward) { return CallBackward<bf16>(4, 43, threads); }
PEAK_KERNEL(quantized_8_one_row) { return Call<float>(8, 1, threads); }
PEAK_KERNEL(quantized_8) { return Call<bf16>(8, 43, threads); }
PEAK_KERNEL(quantized_4_one_row) { return Call<bf16>(4, 1, threads); }
PEAK_KERNEL(quantized_4) { return Call<float>(4, 43, threads); }

}  // namespace
}  // namespace peak::test
