#include "gemm/grouped_gemm.h"

#include <algorithm>

#include "base/memory.h"
#include "base/parallel.h"

namespace peak {
namespace {

// Reading b costs as much as this number of rows: experts with fewer rows are about equal work.
constexpr int64_t kRowsOfB = 16;

template <class T>
void Advance(const T*& pointer, int64_t bytes) {
  if (pointer != nullptr) pointer = reinterpret_cast<const T*>(reinterpret_cast<const char*>(pointer) + bytes);
}
void Advance(void*& pointer, int64_t bytes) {
  if (pointer != nullptr) pointer = static_cast<char*>(pointer) + bytes;
}

bool HasWork(const GroupedGemmArgs& args, int64_t group) {
  const bool writes = args.grouping == Grouping::kDepth && args.epilogue != Epilogue::kAdd;
  return writes || args.offsets[group + 1] > args.offsets[group];
}

int64_t Cost(const GroupedGemmArgs& args, int64_t group) {
  return HasWork(args, group) ? args.offsets[group + 1] - args.offsets[group] + kRowsOfB : 0;
}

}  // namespace

GemmArgs GroupOf(const GroupedGemmArgs& args, int64_t group) {
  GemmArgs g = args;
  const int64_t first = args.offsets[group], rows = args.offsets[group + 1] - first;
  const int64_t size = SizeOf(args.dtype), row_size = SizeOf(RowsDType(args)), c_size = SizeOf(args.out_dtype);
  const int64_t hidden = first * args.n * row_size;
  if (args.grouping == Grouping::kDepth) {
    g.k = rows;
    Advance(g.a, first * args.a_k * row_size);
    Advance(g.b, first * args.b_k * size);
    Advance(g.c, group * args.c_group * c_size);
    if (g.a_sums != nullptr) g.a_sums += group * args.m;
    return g;
  }
  g.m = rows;
  Advance(g.a, first * args.a_row * row_size);
  Advance(g.c, first * args.c_row * c_size);
  Advance(g.b, group * args.b_group * size);
  Advance(g.bias, group * args.n * size);
  Advance(g.pre, hidden);
  Advance(g.act, hidden);
  Advance(g.gate, hidden);
  Advance(g.dgate, hidden);
  return g;
}

int64_t GroupedGemmScratch(const GroupedGemmArgs& args, int threads) { return GemmPartScratch(args) * threads; }

void GroupedGemm(const GroupedGemmArgs& args, float* scratch, int threads) {
  const int64_t units = kUnitsPerThread * threads, panels = GemmPanels(args), size = GemmPartScratch(args);
  ParallelUnits(units, threads, [&](int64_t unit, int worker) {
    const auto cost = [&](int64_t group) { return Cost(args, group); };
    ForShare(unit, units, args.groups, panels, cost, [&](int64_t group, int64_t begin, int64_t end) {
      GemmPart(GroupOf(args, group), begin, end, scratch + worker * size, 1);
    });
  });
}

void GroupedGemm(const GroupedGemmArgs& args, int threads) {
  float* const scratch = reinterpret_cast<float*>(
      Workspace(GroupedGemmScratch(args, threads) * static_cast<int64_t>(sizeof(float))));
  Team::Open(threads, [&] { GroupedGemm(args, scratch, threads); });
}

}  // namespace peak
