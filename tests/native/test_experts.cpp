// Products of groups of rows: each panel of each group is computed once, with the bits of a product of its own, and
// within the scratch. The scratch ends at a page without access.
#include <algorithm>
#include <numeric>

#include "base/parallel.h"
#include "buffer.h"
#include "gemm/grouped_gemm.h"
#include "gemm/quantized.h"
#include "program/experts.h"

namespace peak::test {
namespace {

constexpr int kAtEnd = 3;  // the placement that ends at a page without access

// Offsets of groups with `rows` rows in total. Many groups are empty.
std::vector<int64_t> Offsets(int64_t groups, int64_t rows, Random& random) {
  std::vector<int64_t> offsets{0, rows};
  for (int64_t group = 1; group < groups; ++group) {
    offsets.push_back(random.Below(3) == 0 ? offsets[random.Below(offsets.size())] : random.Below(rows + 1));
  }
  std::sort(offsets.begin(), offsets.end());
  return offsets;
}

PEAK_TEST(shares_of_groups_cover_each_panel_once) {
  Random random(1);
  for (int round = 0; round < 500; ++round) {
    const int64_t groups = 1 + random.Below(9), panels = random.Below(20), units = 1 + random.Below(70);
    std::vector<int64_t> costs(groups);
    for (int64_t& cost : costs) cost = random.Below(3) == 0 ? 0 : 1 + random.Below(round % 2 == 0 ? 5 : 1 << 30);
    SetCase("round %d: %lld groups of %lld panels, %lld shares", round, static_cast<long long>(groups),
            static_cast<long long>(panels), static_cast<long long>(units));
    const double total = std::accumulate(costs.begin(), costs.end(), 0.0);
    const double largest = *std::max_element(costs.begin(), costs.end());
    std::vector<int> counts(groups * panels);
    for (int64_t unit = 0; unit < units; ++unit) {
      double work = 0.0;
      ForShare(unit, units, groups, panels, [&](int64_t group) { return costs[group]; },
               [&](int64_t group, int64_t begin, int64_t end) {
                 for (int64_t panel = begin; panel < end; ++panel) ++counts[group * panels + panel];
                 work += static_cast<double>(costs[group]) * (end - begin) / panels;
               });
      if (panels > 0) Check(work <= total / units + largest / panels + 1.0, "a share has a work of %g", work);
    }
    for (int64_t i = 0; i < groups * panels; ++i) {
      if (!Check(counts[i] == (costs[i / panels] > 0), "a panel was visited %d times", counts[i])) return;
    }
  }
}

// Runs a grouped product on a team of `threads`.
void RunOnTeam(const GroupedGemmArgs& args, int threads) {
  const Buffer<float> scratch(Role::kOutput, GroupedGemmScratch(args, threads), kAtEnd);
  Team::Open(threads, [&] { GroupedGemm(args, scratch.data(), threads); });
}

PEAK_TEST(grouped_products_have_the_bits_of_single_products) {
  constexpr struct {
    int64_t rows, k, n, groups;
  } kCases[] = {{1, 5, 7, 4}, {6, 33, 49, 9}, {40, 130, 100, 5}, {70, 2051, 51, 3}, {0, 9, 20, 2}};
  ForEachDtype([&](auto element) {
    using T = decltype(element);
    for (const auto& s : kCases) {
      for (const int threads : {1, 2, 3}) {
        for (const Grouping grouping : {Grouping::kRows, Grouping::kDepth}) {
          const bool by_rows = grouping == Grouping::kRows;
          SetCase("%s of %lld rows, grouping %d, %d threads", kName<T>, static_cast<long long>(s.rows),
                  static_cast<int>(grouping), threads);
          Random random(s.k + threads);
          const std::vector<int64_t> offsets = Offsets(s.groups, s.rows, random);
          // kRows: a (rows, k), b (groups, n, k). kDepth: a (rows, k) transposed, b (rows, n), c (groups, k, n).
          Placer place(threads);
          const int64_t results = by_rows ? s.rows * s.n : s.groups * s.k * s.n;
          auto a = place.In<T>(s.rows * s.k), b = place.In<T>(by_rows ? s.groups * s.n * s.k : s.rows * s.n);
          auto bias = place.In<T>(s.groups * s.n);
          auto c = place.Out<float>(results), expected = place.Out<float>(results);
          for (const auto* operand : {&a, &b, &bias}) operand->FillNormal(random);
          GroupedGemmArgs args{};
          args.dtype = kDtype<T>, args.out_dtype = DType::kFloat32;
          args.m = by_rows ? s.rows : s.k, args.n = s.n, args.k = by_rows ? s.k : s.rows;
          args.a = a.data(), args.a_row = by_rows ? s.k : 1, args.a_k = by_rows ? 1 : s.k;
          args.b = b.data(), args.b_col = by_rows ? s.k : 1, args.b_k = by_rows ? 1 : s.n;
          args.c = c.data(), args.c_row = s.n, args.bias = by_rows ? bias.data() : nullptr;
          args.grouping = grouping, args.groups = s.groups, args.offsets = offsets.data();
          args.b_group = by_rows ? s.n * s.k : 0, args.c_group = by_rows ? 0 : s.k * s.n;
          RunOnTeam(args, threads);
          args.c = expected.data();
          for (int64_t group = 0; group < s.groups; ++group) Gemm(GroupOf(args, group), 1);
          Check(std::memcmp(c.data(), expected.data(), results * sizeof(float)) == 0, "differs");
        }
      }
    }
  });
}

// 8 and 4 bits, and 4 bits with offsets, whose inputs need an array more. The experts share the offsets.
PEAK_TEST(quantized_experts_have_the_bits_of_single_products) {
  constexpr int64_t kN = 33, kPanels = 3, kBlock = 32, kMostK = 600, kMostRows = 40, kExperts = 6;
  enum Kind { k8, k4, k4WithOffsets };
  for (const Kind kind : {k8, k4, k4WithOffsets}) {
    Random random(kind);
    Placer place(0);
    const int64_t most_blocks = (kMostK + kBlock - 1) / kBlock, most_scales = kPanels * most_blocks * kPanelOutputs;
    const Buffer<bf16> weights(Role::kInput, kExperts * kPanels * ((kMostK + 7) / 8) * 64, 0);
    const Buffer<bf16> scales(Role::kInput, 2 * kExperts * most_scales, 0), shifts(Role::kInput, most_scales, 0);
    auto x = place.In<float>(kMostRows * kMostK), bias = place.In<float>(kExperts * kN);
    for (int64_t i = 0; i < weights.count(); ++i) weights[i] = {static_cast<uint16_t>(random.Bits())};
    scales.FillNormal(random);
    const auto fill_halves = [&](const Buffer<bf16>& halves) {  // f16 from 1 to 1.5
      for (int64_t i = 0; i < halves.count(); ++i) halves[i] = {static_cast<uint16_t>(0x3C00 + random.Below(512))};
    };
    fill_halves(shifts);
    if (kind == k4WithOffsets) fill_halves(scales);
    x.FillNormal(random);
    bias.FillNormal(random);
    // With k of 600 the padding of an expert with five rows is larger than what rounding to cache lines leaves.
    for (const int64_t k : {1, 12, 64, 130, 600}) {
      const int64_t blocks = (k + kBlock - 1) / kBlock, octets = (k + 7) / 8;
      QuantizedExpertsMatrix matrix{};
      matrix.dtype = DType::kFloat32, matrix.bits = kind == k8 ? 8 : 4, matrix.n = kN, matrix.k = k;
      matrix.block = kBlock, matrix.f16_scales = kind == k4WithOffsets;
      matrix.weight = reinterpret_cast<const uint8_t*>(weights.data()), matrix.scale = scales.data();
      if (kind == k4WithOffsets) matrix.offset = reinterpret_cast<const f16*>(shifts.data());
      matrix.weight_group = kPanels * octets * (kind == k8 ? 128 : 64);
      matrix.scale_group = kind == k8 ? kN * 4 : kPanels * blocks * kPanelOutputs * 2;
      for (int64_t rows = 0; rows <= kMostRows; ++rows) {
        const int threads = 1 + static_cast<int>(rows % 3);
        matrix.experts = 1 + random.Below(kExperts);
        SetCase("kind %d, k %lld, %lld rows, %lld experts, %d threads", kind, static_cast<long long>(k),
                static_cast<long long>(rows), static_cast<long long>(matrix.experts), threads);
        const std::vector<int64_t> offsets = Offsets(matrix.experts, rows, random);
        const Buffer<float> got(Role::kOutput, rows * kN, 0), expected(Role::kOutput, rows * kN, 0);
        const QuantizedExperts experts(matrix);
        GemmArgs args{};
        args.m = rows, args.a = x.data(), args.a_row = k, args.a_k = 1, args.out_dtype = DType::kFloat32;
        args.c = got.data(), args.c_row = kN, args.bias = bias.data();
        const Buffer<float> scratch(Role::kOutput, experts.ScratchBytes(rows, threads) / 4, kAtEnd);
        char* const memory = reinterpret_cast<char*>(scratch.data());
        Team::Open(threads, [&] { experts.Multiply(args, offsets.data(), memory, threads); });
        for (int64_t e = 0; e < matrix.experts; ++e) {
          QuantizedArgs one{};
          static_cast<QuantizedMatrix&>(one) = matrix;
          one.weight += e * matrix.weight_group;
          one.scale = static_cast<const char*>(one.scale) + e * matrix.scale_group;
          one.rows = offsets[e + 1] - offsets[e], one.x_row = k, one.y_row = kN;
          one.x = x.data() + offsets[e] * k, one.y = expected.data() + offsets[e] * kN, one.bias = bias.data() + e * kN;
          LinearQuantized(one, 1);
        }
        Check(std::memcmp(got.data(), expected.data(), rows * kN * sizeof(float)) == 0, "differs");
      }
    }
  }
}

}  // namespace
}  // namespace peak::test
