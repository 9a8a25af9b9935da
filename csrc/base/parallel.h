// Division of work among threads. Results never depend on the schedule.
#ifndef PEAK_PARALLEL_H_
#define PEAK_PARALLEL_H_

#include <algorithm>
#include <cstdint>
#include <exception>

#include <omp.h>

namespace peak {

// The threads of one parallel region that run a program together (program/program.cpp). Every thread calls every
// kernel. Inside a team, ParallelParts and ParallelUnits open no region: they run the part of this thread and wait for
// the others.
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

// Runs f on every thread of a team of up to `threads`. f must not throw: the other threads would wait forever.
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

// Carries the first exception out of a parallel region (such as a failed allocation): an exception that leaves a region
// ends the process.
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
  // Call it after the parallel region.
  void Rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// Number of partial sums of a two-stage reduction. It does not depend on the number of threads, so neither do the sums.
constexpr int64_t kParts = 32;

// Calls f(part, begin, end) for `parts` contiguous ranges of [0, n) on up to `threads` threads. A thread gets the same
// ranges in every run.
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

// Calls f(unit) for each unit of [0, units) on `threads` threads. The next free thread takes the next unit, for units
// of unequal work.
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
