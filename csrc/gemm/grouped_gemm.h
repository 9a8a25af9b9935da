// One matrix product for each of several groups, such as the experts of a mixture. There are two kinds. In kRows each
// row of a and c belongs to a group, and each group has a b of its own. In kDepth each step of k belongs to a group, and
// each group has a c of its own:
//
//   kRows    c[i] = epilogue(a[i] b[g])             for the rows i of group g, offsets[g] to offsets[g + 1]
//   kDepth   c[g] = epilogue(sum_p a[:, p] b[p])    for the p of group g
//
// All groups together are one job (base/parallel.h). Only groups with rows read their b. The bits of a row
// are those of Gemm, whatever the other rows are.
#ifndef PEAK_GROUPED_GEMM_H_
#define PEAK_GROUPED_GEMM_H_

#include <algorithm>
#include <cstdint>

#include "base/fields.h"
#include "gemm/gemm.h"

namespace peak {

enum class Grouping : int { kRows = 0, kDepth = 1 };

// GemmArgs of all groups together: m or k counts the rows of all of them, and pointers point to the first group.
struct GroupedGemmArgs : GemmArgs {
  using Base = GemmArgs;
  Grouping grouping;
  int64_t groups;
  const int64_t* offsets;    // (groups + 1)
  int64_t b_group = 0;       // kRows: elements between the b of two groups
  int64_t c_group = 0;       // kDepth: elements between the c of two groups
};
PEAK_FIELDS(GroupedGemmArgs, grouping, groups, offsets)
PEAK_OPTIONAL_FIELDS(GroupedGemmArgs, b_group, c_group)

// The product of one group.
GemmArgs GroupOf(const GroupedGemmArgs& args, int64_t group);

// bias is (groups, n) and a_sums is (groups, m). With kDepth and kAdd a group without rows is left alone.
void GroupedGemm(const GroupedGemmArgs& args, int threads);

// The same for a team (base/parallel.h) with a common scratch of GroupedGemmScratch floats.
int64_t GroupedGemmScratch(const GroupedGemmArgs& args, int threads);
void GroupedGemm(const GroupedGemmArgs& args, float* scratch, int threads);

// One of `units` equal shares of the work of all groups, which have `panels` panels each: calls f(group, begin, end) for
// the panels that start within the share. cost(group) is the work of a group.
template <class Cost, class F>
void ForShare(int64_t unit, int64_t units, int64_t groups, int64_t panels, const Cost& cost, const F& f) {
  int64_t total = 0, start = 0;
  for (int64_t group = 0; group < groups; ++group) total += cost(group);
  const int64_t begin = total * unit / units, end = total * (unit + 1) / units;
  for (int64_t group = 0; group < groups && start < end; ++group) {
    const int64_t work = cost(group);
    if (work > 0 && start + work > begin) {
      const auto panel = [&](int64_t at) {
        return std::clamp<int64_t>(((at - start) * panels + work - 1) / work, 0, panels);
      };
      const int64_t first = panel(std::max(begin, start)), last = panel(end);
      if (first < last) f(group, first, last);
    }
    start += work;
  }
}

}  // namespace peak

#endif  // PEAK_GROUPED_GEMM_H_
