// Work over threads. Its division never follows scheduling, so neither do results.
#ifndef PEAK_PARALLEL_H_
#define PEAK_PARALLEL_H_

#include <algorithm>
#include <cstdint>
#include <exception>

#include <omp.h>

namespace peak {

// The threads of one parallel region that run op after op together (csrc/program.cpp). Every thread calls each op; inside
// one, ParallelParts and ParallelUnits open no region, but do this thread's share and wait for the others.
struct Team {
  int id, size;
  static const Team*& Current() {
    static thread_local const Team* team = nullptr;
    return team;
  }
};

inline void Barrier() {
#pragma omp barrier
}

// Runs f on every thread of a team of up to `threads`. f may not throw: the others would wait for ever.
template <class F>
void RunTeam(int threads, const F& f) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    Team::Current() = &team;
    f();
    Team::Current() = nullptr;
  }
}

// Runs parts of a parallel region. An exception (a workspace that does not fit in memory) may not leave a region, that
// ends the process: the first one waits here for the thread that called.
class Catcher {
 public:
  template <class F>
  void Run(const F& f) noexcept {
    try {
      f();
    } catch (...) {
#pragma omp critical(peak_catcher)
      if (!first_) first_ = std::current_exception();
    }
  }
  // After the region.
  void Rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// Partial sums of a two-stage reduction: a count that does not follow the thread count, so neither do the sums.
constexpr int64_t kParts = 32;

// Calls f(part, begin, end) for `parts` contiguous pieces of [0, n), on up to `threads` threads; the same thread gets
// the same pieces every run.
template <class F>
void ParallelParts(int64_t n, int64_t parts, int threads, const F& f) {
  if (const Team* team = Team::Current()) {
    for (int64_t part = parts * team->id / team->size; part < parts * (team->id + 1) / team->size; ++part) {
      const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
      if (begin < end) f(part, begin, end);
    }
    return Barrier();
  }
  [[maybe_unused]] const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(parts, threads)));
  Catcher catcher;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    if (begin < end) catcher.Run([&] { f(part, begin, end); });
  }
  catcher.Rethrow();
}

// Calls f(unit) for each of [0, units) on `threads` threads, whichever is free: for units of unequal work.
template <class F>
void ParallelUnits(int64_t units, int threads, const F& f) {
  if (const Team* team = Team::Current()) {
    for (int64_t unit = team->id; unit < units; unit += team->size) f(unit);
    return Barrier();
  }
  Catcher catcher;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t unit = 0; unit < units; ++unit) catcher.Run([&] { f(unit); });
  catcher.Rethrow();
}

}  // namespace peak

#endif  // PEAK_PARALLEL_H_
