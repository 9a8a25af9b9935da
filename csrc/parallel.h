// Fixed partition of a range over threads: the same pieces every run, so results do not depend on scheduling.
#ifndef PEAK_PARALLEL_H_
#define PEAK_PARALLEL_H_

#include <algorithm>
#include <cstdint>

namespace peak {

// Partial sums of a two-stage reduction: a count that does not follow the thread count, so neither do the sums.
constexpr int64_t kParts = 32;

// Calls f(part, begin, end) for `parts` contiguous pieces of [0, n), on up to `threads` threads.
template <class F>
void ParallelParts(int64_t n, int64_t parts, int threads, const F& f) {
  [[maybe_unused]] const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(parts, threads)));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    if (begin < end) f(part, begin, end);
  }
}

}  // namespace peak

#endif  // PEAK_PARALLEL_H_
