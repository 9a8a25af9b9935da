#include "base/isa.h"
#include "base/parallel.h"
#include "buffer.h"
#include "gemm/gemm.h"

namespace peak::test {
namespace {

struct Sizes {
  int64_t m, k, n;
};

// Operands without padding, each in one of two layouts.
GemmArgs Product(DType dtype, DType out, Sizes s, const void* a, const void* b, void* c, bool a_across = false,
                 bool b_across = true) {
  GemmArgs args{};
  args.dtype = dtype, args.out_dtype = out;
  args.m = s.m, args.n = s.n, args.k = s.k;
  args.a = a, args.a_row = a_across ? 1 : s.k, args.a_k = a_across ? s.m : 1;
  args.b = b, args.b_col = b_across ? 1 : s.k, args.b_k = b_across ? s.n : 1;
  args.c = c, args.c_row = s.n;
  return args;
}

// Sums of products of small integers are exact in float.
PEAK_TEST(gemm_is_exact_on_integers) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (const int64_t m : {1, 5, 8, 17}) {
      for (const int64_t k : {1, 2, 7, 33}) {
        for (const int64_t n : {1, 15, 16, 17, 47, 49}) {
          for (int placement = 0; placement < kPlacements; ++placement) {
            SetCase("gemm %s %lld %lld %lld placement %d", kName<T>, static_cast<long long>(m),
                    static_cast<long long>(k), static_cast<long long>(n), placement);
            const bool a_across = placement & 1, b_across = placement & 2;
            Random random(m * n + k);
            Placer place(placement);
            auto a = place.In<T>(m * k), b = place.In<T>(k * n);
            auto c = place.Out<float>(m * n), sums = place.Out<float>(m);
            for (const auto* operand : {&a, &b}) operand->Fill([&](int64_t) { return random.Below(9) - 4.0; });
            const auto left = [&](int64_t i, int64_t p) { return a.At(a_across ? p * m + i : i * k + p); };
            const auto right = [&](int64_t p, int64_t j) { return b.At(b_across ? p * n + j : j * k + p); };
            GemmArgs args = Product(kDtype<T>, DType::kFloat32, {m, k, n}, a.data(), b.data(), c.data(), a_across,
                                    b_across);
            args.a_sums = sums.data();
            Gemm(args, 1 + placement % 3);
            args.epilogue = Epilogue::kAdd;
            Gemm(args, 1);
            c.Expect("c", [&](int64_t at) -> Want {
              double sum = 0.0;
              for (int64_t p = 0; p < k; ++p) sum += left(at / n, p) * right(p, at % n);
              return {2.0 * sum, 0.0};
            });
            sums.Expect("sums", [&](int64_t i) -> Want {
              double sum = 0.0;
              for (int64_t p = 0; p < k; ++p) sum += left(i, p);
              return {sum, 0.0};
            });
          }
        }
      }
    }
  });
}

// Several blocks of rows, of columns and of k; gaps between rows of the operands and of C; a bias; each layout.
PEAK_TEST(gemm_of_several_blocks_equals_double_precision) {
  constexpr int64_t kGap = 3;
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (const Sizes s : {Sizes{1029, 5, 7}, Sizes{5, 3, 3079}, Sizes{9, 2053, 19}, Sizes{1030, 2049, 1}}) {
      for (int layout = 0; layout < 4; ++layout) {
        SetCase("gemm %s %lld %lld %lld layout %d", kName<T>, static_cast<long long>(s.m), static_cast<long long>(s.k),
                static_cast<long long>(s.n), layout);
        const bool a_across = layout & 1, b_across = layout & 2;
        const int64_t a_line = (a_across ? s.m : s.k) + kGap, b_line = (b_across ? s.n : s.k) + kGap;
        const int64_t c_row = s.n + kGap;
        Random random(layout);
        Placer place(layout);
        auto a = place.In<T>((a_across ? s.k : s.m) * a_line), b = place.In<T>((b_across ? s.k : s.n) * b_line);
        auto bias = place.In<T>(s.n), c = place.Out<T>(s.m * c_row);
        auto sums = place.Out<float>(s.m);
        // The gaps hold NaN.
        a.Fill([&](int64_t i) { return i % a_line < a_line - kGap ? random.Normal() : kNan; });
        b.Fill([&](int64_t i) { return i % b_line < b_line - kGap ? random.Normal() : kNan; });
        bias.FillNormal(random);
        GemmArgs args = Product(kDtype<T>, kDtype<T>, s, a.data(), b.data(), c.data(), a_across, b_across);
        (a_across ? args.a_k : args.a_row) = a_line;
        (b_across ? args.b_k : args.b_col) = b_line;
        args.c_row = c_row, args.bias = bias.data(), args.a_sums = sums.data();
        Gemm(args, 1 + layout);
        const std::vector<double> left = a.Values(), right = b.Values();
        for (int64_t i = 0; i < s.m; ++i) {
          Want total{0.0, 0.0};
          for (int64_t j = 0; j < c_row; ++j) {
            if (j >= s.n) {
              if (!Check(std::isnan(c.At(i * c_row + j)), "wrote between rows of c")) return;
              continue;
            }
            Want want{bias.At(j), std::fabs(bias.At(j))};
            for (int64_t p = 0; p < s.k; ++p) {
              const double x = left[i * args.a_row + p * args.a_k], product = x * right[p * args.b_k + j * args.b_col];
              want.value += product;
              want.slack += 8.0 * std::fabs(product);  // the error of a chain grows with the root of its length
              if (j > 0) continue;
              total.value += x;
              total.slack += 8.0 * std::fabs(x);
            }
            if (!Near("c", i * c_row + j, c[i * c_row + j], want)) return;
          }
          if (!Near("sums", i, sums[i], total)) return;
        }
      }
    }
  });
}

// Few rows are multiplied without packing b, in another loop. Each row has the bits that it has among many rows:
// several blocks of k, an odd k, parts of a vector of columns and of words, both layouts of b.
PEAK_TEST(gemm_rows_have_the_same_bits_in_any_batch) {
  constexpr int64_t kMany = 19;
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (const int64_t k : {1, 31, 33, 130, 2051}) {
      for (const int64_t n : {1, 16, 51}) {
        for (const bool b_across : {false, true}) {
          Random random(k + n);
          Placer place(3);  // ends at a page without access
          auto a = place.In<T>(kMany * k), b = place.In<T>(k * n);
          a.FillNormal(random);
          b.FillNormal(random);
          std::vector<float> many(kMany * n), few(kMany * n);
          const auto multiply = [&](int64_t rows, float* c, int threads) {
            Gemm(Product(kDtype<T>, DType::kFloat32, {rows, k, n}, a.data(), b.data(), c, false, b_across), threads);
          };
          multiply(kMany, many.data(), 1);
          for (int64_t m = 1; m <= 16; ++m) {
            SetCase("gemm %s of %lld rows, k %lld, n %lld, b_across %d", kName<T>, static_cast<long long>(m),
                    static_cast<long long>(k), static_cast<long long>(n), b_across);
            multiply(m, few.data(), 2);
            Check(std::memcmp(few.data(), many.data(), m * n * sizeof(float)) == 0, "%s bits depend on the batch",
                  ActiveIsa());
          }
        }
      }
    }
  });
}

// Rows of floats times bf16: the epilogue computes in float32, with a bf16 bias. Pairs of bf16 round the rows. The bits of
// a row do not depend on the number of rows.
PEAK_TEST(gemm_of_float32_rows_equals_double_precision) {
  const bool rounds = std::strcmp(ActiveIsa(), "avx512bf16") == 0;
  for (const Sizes s : {Sizes{1, 33, 51}, Sizes{7, 2051, 17}, Sizes{21, 64, 49}}) {
    for (const Epilogue epilogue : {Epilogue::kStore, Epilogue::kActivate, Epilogue::kGate}) {
      for (int layout = 0; layout < 4; ++layout) {
        const bool a_across = layout & 1, b_across = layout & 2;
        SetCase("gemm of float32 rows %lld %lld %lld epilogue %d layout %d", static_cast<long long>(s.m),
                static_cast<long long>(s.k), static_cast<long long>(s.n), static_cast<int>(epilogue), layout);
        Random random(s.k);
        Placer place(layout);
        auto a = place.In<float>(s.m * s.k), gate = place.In<float>(s.m * s.n);
        auto b = place.In<bf16>(s.k * s.n), bias = place.In<bf16>(s.n);
        auto c = place.Out<float>(s.m * s.n), pre = place.Out<float>(s.m * s.n);
        a.FillNormal(random);
        gate.FillNormal(random);
        b.FillNormal(random);
        bias.FillNormal(random);
        GemmArgs args = Product(DType::kBFloat16, DType::kFloat32, s, a.data(), b.data(), c.data(), a_across, b_across);
        args.float32_rows = true, args.bias = bias.data(), args.gate = gate.data(), args.epilogue = epilogue;
        args.activation = Activation::kRelu;
        if (epilogue != Epilogue::kStore) args.pre = pre.data();
        Gemm(args, 1 + layout % 2);
        c.Expect("c", [&](int64_t at) -> Want {
          const int64_t i = at / s.n, j = at % s.n;
          Want want{bias.At(j), std::fabs(bias.At(j))};
          for (int64_t p = 0; p < s.k; ++p) {
            const double x = a.At(a_across ? p * s.m + i : i * s.k + p);
            const double product = (rounds ? Widen(Narrow<bf16>(x)) : x) * b.At(b_across ? p * s.n + j : j * s.k + p);
            want.value += product;
            want.slack += 8.0 * std::fabs(product);
          }
          if (epilogue == Epilogue::kActivate) want.value = std::max(want.value, 0.0);
          if (epilogue == Epilogue::kGate) {
            const double factor = std::max(gate.At(at), 0.0);
            want.value *= factor, want.slack *= factor;
          }
          return want;
        });
        if (epilogue == Epilogue::kActivate) {
          for (int64_t at = 0; at < s.m * s.n; ++at) {
            if (!Check(c[at] == std::max(pre[at], 0.0f), "pre is not what was activated")) return;
          }
        }
        if (a_across) continue;
        std::vector<float> alone(s.n);
        args.m = 1, args.c = alone.data(), args.pre = nullptr;
        Gemm(args, 1);
        Check(std::memcmp(alone.data(), c.data(), s.n * sizeof(float)) == 0, "bits depend on the number of rows");
      }
    }
  }
}

// Odd sizes, fewer panels than threads, no k. The scratch ends at a page without access.
PEAK_TEST(gemm_on_many_threads_has_the_bits_of_one_and_stays_in_its_scratch) {
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (const Sizes s : {Sizes{1, 1, 1}, Sizes{1, 300, 2000}, Sizes{20, 0, 50}, Sizes{17, 33, 49},
                          Sizes{200, 2051, 100}, Sizes{1, 2500, 1}, Sizes{1030, 5, 3100}}) {
      Random random(s.k);
      Placer place(0);
      auto a = place.In<T>(s.m * s.k), b = place.In<T>(s.k * s.n);
      a.FillNormal(random);
      b.FillNormal(random);
      std::vector<float> alone(s.m * s.n), together(s.m * s.n), sums(s.m);
      GemmArgs args = Product(kDtype<T>, DType::kFloat32, s, a.data(), b.data(), alone.data());
      args.a_sums = sums.data();
      Gemm(args, 1);
      const std::vector<float> expected_sums = sums;
      args.c = together.data();
      for (const int threads : {2, 3, 7, 64}) {
        SetCase("gemm %s %lld %lld %lld on %d threads", kName<T>, static_cast<long long>(s.m),
                static_cast<long long>(s.k), static_cast<long long>(s.n), threads);
        for (std::vector<float>* out : {&together, &sums}) std::fill(out->begin(), out->end(), NAN);
        const Buffer<float> scratch(Role::kOutput, GemmScratch(args, threads), 3);
        Team::Open(threads, [&] { Gemm(args, scratch.data(), threads); });
        Check(together == alone && sums == expected_sums, "differs from one thread");
      }
    }
  });
}

struct ValueAndSlope {
  Want value, slope;
};

ValueAndSlope GeluTanh(double x) {
  const double k = std::sqrt(2.0 / M_PI), u = k * (x + 0.044715 * x * x * x);
  const double s = 1.0 / (1.0 + std::exp(-2.0 * u)), du2 = 2.0 * k * (1.0 + 3.0 * 0.044715 * x * x);
  // An error of the exponent's argument is relative to u; past |2u| = 104 the result is below the subnormals.
  const double error = 4.0 + 4.0 * std::min(std::fabs(2.0 * u), 104.0);
  return {{x * s, std::fabs(x * s) * error}, {s + x * s * (1.0 - s) * du2, s * error * (1.0 + std::fabs(x) * du2)}};
}

ValueAndSlope GeluErf(double x) {
  // The kernel computes (1 + erf) / 2: its tail has an error of half an ulp of 1, until erf is -1.
  const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0)), phi = std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI);
  const bool tail = x < -9.0;
  return {{x * cdf, tail ? 0x1p-30 : 4.0 * std::fabs(x)},
          {cdf + x * phi, (tail ? 0x1p-30 : 4.0) + 4.0 * std::fabs(x * phi) * (1.0 + x * x)}};
}

ValueAndSlope Relu(double x) { return {{x > 0 || std::isnan(x) ? x : 0.0, 0.0}, {x > 0 ? 1.0 : 0.0, 0.0}}; }

ValueAndSlope Silu(double x) {
  const double s = 1.0 / (1.0 + std::exp(-x)), error = 4.0 + 4.0 * std::min(std::fabs(x), 104.0);
  return {{x * s, std::fabs(x * s) * error}, {s + x * s * (1.0 - s), s * error * (1.0 + std::fabs(x))}};
}

constexpr struct {
  const char* name;
  Activation code;
  ValueAndSlope (*reference)(double);
} kActivations[] = {{"gelu_tanh", Activation::kGeluTanh, GeluTanh},
                    {"gelu_erf", Activation::kGeluErf, GeluErf},
                    {"relu", Activation::kRelu, Relu},
                    {"silu", Activation::kSilu, Silu}};

// The product of 1 and one row is this row, so the result shows the epilogue alone.
PEAK_TEST(gemm_activation_equals_double_precision) {
  for (const auto& activation : kActivations) {
    ForEachCase(activation.name, 1, [&](auto element, int64_t count, int placement) {
      using T = decltype(element);
      Random random(count);
      Placer place(placement);
      auto one = place.In<T>(1), x = place.In<T>(count);
      auto pre = place.Out<T>(count), out = place.Out<T>(count);
      one.Fill([](int64_t) { return 1.0; });
      placement % 2 ? x.FillSpecials(placement) : x.FillNormal(random, 0.0, 3.0);
      GemmArgs args = Product(kDtype<T>, kDtype<T>, {1, 1, count}, one.data(), x.data(), out.data());
      args.epilogue = Epilogue::kActivate, args.activation = activation.code, args.pre = pre.data();
      Gemm(args, 1 + placement % 2);
      pre.Expect("pre", [&](int64_t i) -> Want { return {x.At(i), 0.0}; });
      out.Expect("out", [&](int64_t i) { return activation.reference(x.At(i)).value; });
    });
  }
}

// Replaces values of 1e18 and more, whose derivative is 0 * inf = NaN, as in PyTorch.
double ReplaceHuge(double x) { return std::fabs(x) < 1e18 ? x : 3.0; }

PEAK_TEST(gemm_activation_derivative_equals_double_precision) {
  for (const auto& activation : kActivations) {
    ForEachCase(activation.name, 1, [&](auto element, int64_t count, int placement) {
      using T = decltype(element);
      Random random(count);
      Placer place(placement);
      auto one = place.In<T>(1), dy = place.In<T>(count);
      auto pre = place.Out<T>(count), dpre = place.Out<T>(count), act = place.Out<T>(count);
      one.Fill([](int64_t) { return 1.0; });
      dy.FillNormal(random, 0.5);
      pre.FillNormal(random, 0.0, 3.0);
      if (placement % 2) pre.FillSpecials(placement).Fill([&](int64_t i) { return ReplaceHuge(pre.At(i)); });
      GemmArgs args = Product(kDtype<T>, kDtype<T>, {1, 1, count}, one.data(), dy.data(), dpre.data());
      args.epilogue = Epilogue::kSlope, args.activation = activation.code, args.pre = pre.data();
      args.act = placement == 2 ? nullptr : act.data();
      Gemm(args, 1 + placement % 2);
      dpre.Expect("dpre", [&](int64_t i) -> Want {
        const Want slope = activation.reference(pre.At(i)).slope;
        return {dy.At(i) * slope.value, std::fabs(dy.At(i)) * (slope.slack + std::fabs(slope.value))};
      });
      if (args.act) act.Expect("act", [&](int64_t i) { return activation.reference(pre.At(i)).value; });
    });
  }
}

Want Times(double factor, Want want) {
  return {factor * want.value, std::fabs(factor) * (want.slack + 2.0 * std::fabs(want.value))};
}

PEAK_TEST(gemm_gate_equals_double_precision) {
  for (const auto& activation : kActivations) {
    ForEachCase(activation.name, 1, [&](auto element, int64_t count, int placement) {
      using T = decltype(element);
      Random random(count);
      Placer place(placement);
      auto one = place.In<T>(1), dh = place.In<T>(count), gate = place.In<T>(count), up = place.In<T>(count);
      auto pre = place.Out<T>(count), h = place.Out<T>(count), recomputed = place.Out<T>(count);
      auto dup = place.Out<T>(count), dgate = place.Out<T>(count);
      one.Fill([](int64_t) { return 1.0; });
      for (const auto* in : {&dh, &gate, &up}) in->FillNormal(random, 0.5, 2.0);
      GemmArgs args = Product(kDtype<T>, kDtype<T>, {1, 1, count}, one.data(), up.data(), h.data());
      args.epilogue = Epilogue::kGate, args.activation = activation.code, args.gate = gate.data();
      args.pre = placement == 1 ? nullptr : pre.data();
      Gemm(args, 1 + placement % 2);
      if (args.pre) pre.Expect("pre", [&](int64_t i) -> Want { return {up.At(i), 0.0}; });
      h.Expect("h", [&](int64_t i) { return Times(up.At(i), activation.reference(gate.At(i)).value); });

      args.epilogue = Epilogue::kGateSlope, args.b = dh.data(), args.c = dup.data(), args.dgate = dgate.data();
      args.pre = up.data(), args.act = placement == 2 ? nullptr : recomputed.data();
      Gemm(args, 1 + placement % 2);
      dup.Expect("dup", [&](int64_t i) { return Times(dh.At(i), activation.reference(gate.At(i)).value); });
      dgate.Expect("dgate",
                   [&](int64_t i) { return Times(dh.At(i) * up.At(i), activation.reference(gate.At(i)).slope); });
      if (!args.act) return;
      recomputed.Expect("recomputed h",
                        [&](int64_t i) { return Times(up.At(i), activation.reference(gate.At(i)).value); });
    });
  }
}

template <class T>
std::vector<char> Call(int threads) {
  constexpr Sizes s{77, 300, 129};
  Random random(1);
  Placer place(0);
  auto a = place.In<T>(s.m * s.k), b = place.In<T>(s.k * s.n);
  auto c = place.Out<T>(s.m * s.n);
  auto sums = place.Out<float>(s.m);
  a.FillNormal(random);
  b.FillNormal(random);
  GemmArgs args = Product(kDtype<T>, kDtype<T>, s, a.data(), b.data(), c.data());
  args.a_sums = sums.data();
  Gemm(args, threads);
  std::vector<char> bytes;
  c.Append(bytes);
  sums.Append(bytes);
  return bytes;
}
PEAK_KERNEL(gemm_float32) { return Call<float>(threads); }
PEAK_KERNEL(gemm_bfloat16) { return Call<bf16>(threads); }

}  // namespace
}  // namespace peak::test
