// Division of work among threads. Results never depend on it.
//
// A job is a number of units of work. Threads take units until none is left. If another process takes the core of a
// thread, the other threads take its units. No thread waits for a thread, only for units that a thread has begun,
// until the end of a team: it waits for all threads.
// OpenMP provides the threads, because torch's kernels use the same ones: two pools would compete for the cores.
#ifndef PEAK_PARALLEL_H_
#define PEAK_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

namespace peak {

// Threads that run a sequence of jobs together, such as a program (program/program.cpp). Every thread of a team runs
// the same code, so all come to the same jobs in the same order. A thread that was without a core comes to a job when
// it is finished, and goes on to the next.
//
// Code between jobs runs once on each thread, possibly while others are several jobs ahead. So it must not read what
// jobs write, and the number of jobs and of their units must not depend on such values. It may throw.
class Team {
 public:
  // What a thread of a team knows.
  struct Member {
    Team* team;
    int id;
    uint32_t job;  // the last one that this thread came to
    bool in_unit;  // jobs inside a unit run on this thread alone
  };

  // This thread's membership, or null.
  static Member*& Current() {
    static thread_local Member* member = nullptr;
    return member;
  }

  // Runs f on every thread of a team of up to `threads`, or just runs it on a thread of a team. Rethrows the first
  // exception of f or of a unit; units that begin after it are skipped.
  template <class F>
  static void Open(int threads, const F& f) {
    if (threads <= 1 || Current() != nullptr) return f();
    Team(threads).Fork([](const void* body) { (*static_cast<const F*>(body))(); }, &f);
  }

  // Runs f(unit, worker) for each unit of [0, units) of the next job.
  template <class F>
  void Run(Member& member, int64_t units, const F& f) {
    const uint32_t job = ++member.job;
    uint32_t finished = 0;
    BeginUnits();
    for (int i = 0; i < size_; ++i) {
      const int share = (member.id + i) % size_;
      for (int64_t unit; (unit = Take(share, job, units, i == 0)) >= 0;) {
        member.in_unit = true;
        Try([&] { f(unit, member.id); });
        member.in_unit = false;
        ++finished;
        if (!MustRest()) continue;
        Finish(job, finished);
        finished = 0;
        Rest();
      }
    }
    if (finished > 0) Finish(job, finished);
    Wait(job, units);
  }

  static constexpr int64_t kMostUnits = 0xffff;  // of a job

 private:
  // The units of a thread that are left. The thread takes the first one, others take the last one.
  //
  // A word with the number of an earlier job means that all units of the share are left: nobody has to prepare a job.
  struct alignas(64) Share {
    std::atomic<uint64_t> word{0};  // the number of a job in 32 bits, begin and end of the units in 16 bits each
  };

  explicit Team(int size) : size_(size), shares_(size) {}

  // Runs body(f) on all threads.
  void Fork(void (*body)(const void*), const void* f);
  // Takes a unit of a share, or returns -1.
  int64_t Take(int share, uint32_t job, int64_t units, bool first);
  void Finish(uint32_t job, uint32_t units);
  void Wait(uint32_t job, int64_t units) const;
  static void BeginUnits();
  // Whether this thread will soon lose its core, because its time slice (base/time_slice.h) ends. Called after each unit.
  static bool MustRest();
  // Lets another process have the core, if one waits for it.
  static void Rest();

  // Runs f, unless something has thrown before. Keeps the first exception.
  template <class F>
  void Try(const F& f) noexcept {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  const int size_;
  std::vector<Share> shares_;
  alignas(64) std::atomic<uint64_t> finished_{0};  // the number of a job and of its finished units, 32 bits each
  std::atomic<int> ended_{0};  // threads that came to the end
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// Calls f(unit, worker) or f(unit) for each unit of [0, units) on up to `threads` threads. In a team, `threads` is the
// number that it was opened with. `worker` numbers the threads from 0, below `threads`, for memory of their own.
template <class F>
void ParallelUnits(int64_t units, int threads, const F& f) {
  Team::Member* const member = Team::Current();
  const auto call = [&](int64_t unit, int worker) {
    if constexpr (std::is_invocable_v<F, int64_t, int>) {
      f(unit, worker);
    } else {
      f(unit);
    }
  };
  if (member != nullptr && !member->in_unit) {
    const int64_t step = (units + Team::kMostUnits - 1) / Team::kMostUnits;
    if (step <= 1) return member->team->Run(*member, units, call);
    return member->team->Run(*member, (units + step - 1) / step, [&](int64_t group, int worker) {
      for (int64_t unit = group * step; unit < std::min(units, (group + 1) * step); ++unit) call(unit, worker);
    });
  }
  const int team = static_cast<int>(std::min<int64_t>(threads, units));
  if (member == nullptr && team > 1) return Team::Open(team, [&] { ParallelUnits(units, team, f); });
  for (int64_t unit = 0; unit < units; ++unit) call(unit, 0);
}

// Units for each thread: enough that the rest of a unit is short, and that threads with different speeds end together.
constexpr int64_t kUnitsPerThread = 32;

// The least memory that is worth a unit, and the number of rows that have it.
constexpr int64_t kGrainBytes = 4 << 10;
inline int64_t GrainRows(int64_t row_bytes) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
}

// Calls f(begin, end, worker) or f(begin, end) for ranges of [0, n). All but the last have a multiple of `grain`, the
// least that is worth a unit.
template <class F>
void ParallelRanges(int64_t n, int64_t grain, int threads, const F& f) {
  const int64_t grains = (n + grain - 1) / grain, most = kUnitsPerThread * threads;
  const int64_t step = std::max<int64_t>(1, (grains + most - 1) / most) * grain;
  ParallelUnits((n + step - 1) / step, threads, [&](int64_t i, int worker) {
    const int64_t begin = i * step, end = std::min(n, begin + step);
    if constexpr (std::is_invocable_v<F, int64_t, int64_t, int>) {
      f(begin, end, worker);
    } else {
      f(begin, end);
    }
  });
}

// Number of partial sums of a two-stage reduction. It does not depend on the number of threads, so neither do the sums.
constexpr int64_t kParts = 32;

// Calls f(part, begin, end) for kParts contiguous ranges of [0, n), without the empty ones.
template <class F>
void ParallelParts(int64_t n, int threads, const F& f) {
  ParallelUnits(kParts, threads, [&](int64_t part) {
    const int64_t begin = n * part / kParts, end = n * (part + 1) / kParts;
    if (begin < end) f(part, begin, end);
  });
}

}  // namespace peak

#endif  // PEAK_PARALLEL_H_
