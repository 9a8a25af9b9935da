// Teams of threads: every unit runs once, and no thread waits for a thread.
#include <time.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "base/parallel.h"
#include "check.h"

namespace peak::test {
namespace {

// Waits until a condition holds, for at most ten seconds. Returns whether it holds.
template <class F>
bool WaitUntil(const F& holds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!holds()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

bool AllOnes(const std::vector<int>& counts) {
  for (const int count : counts) {
    if (count != 1) return false;
  }
  return true;
}

PEAK_TEST(every_unit_runs_once) {
  for (const int64_t units : {0, 1, 2, 7, 100, 0xffff, 0x10000, 200001}) {
    for (const int threads : {1, 2, 3, 4}) {
      SetCase("%lld units on %d threads", static_cast<long long>(units), threads);
      std::vector<int> counts(units);
      std::atomic<int> wrong{0};
      ParallelUnits(units, threads, [&](int64_t unit, int worker) {
        ++counts[unit];
        wrong += worker < 0 || worker >= threads;
      });
      Check(AllOnes(counts), "a unit did not run once");
      Check(wrong == 0, "a worker has a number outside [0, %d)", threads);
    }
  }
}

PEAK_TEST(ranges_and_parts_cover_all_elements) {
  for (const int64_t n : {0, 1, 15, 16, 17, 1000}) {
    for (const int threads : {1, 3}) {
      SetCase("%lld elements on %d threads", static_cast<long long>(n), threads);
      std::vector<int> counts(n), parts(n);
      std::atomic<int> unaligned{0};
      ParallelRanges(n, 16, threads, [&](int64_t begin, int64_t end) {
        unaligned += begin % 16 != 0 || (end % 16 != 0 && end != n);
        for (int64_t i = begin; i < end; ++i) ++counts[i];
      });
      ParallelParts(n, threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++parts[i];
      });
      Check(AllOnes(counts) && AllOnes(parts), "an element was not visited once");
      Check(unaligned == 0, "a range does not end at a multiple of the grain");
    }
  }
}

// Each job reads what the last one wrote, so a job that begins too early gives a wrong sum.
PEAK_TEST(jobs_of_a_team_run_one_after_the_other) {
  constexpr int kJobs = 200, kUnits = 13;
  for (const int threads : {1, 2, 4}) {
    SetCase("%d threads", threads);
    std::vector<int64_t> last(kUnits, 1), next(kUnits);
    Team::Open(threads, [&] {
      for (int job = 0; job < kJobs; ++job) {
        const std::vector<int64_t>& from = job % 2 == 0 ? last : next;
        std::vector<int64_t>& to = job % 2 == 0 ? next : last;
        ParallelUnits(kUnits, threads, [&](int64_t unit) {
          to[unit] = std::accumulate(from.begin(), from.end(), unit) % 1009;
        });
      }
    });
    std::vector<int64_t> expected(kUnits, 1);
    for (int job = 0; job < kJobs; ++job) {
      const int64_t sum = std::accumulate(expected.begin(), expected.end(), int64_t{0});
      for (int64_t unit = 0; unit < kUnits; ++unit) expected[unit] = (sum + unit) % 1009;
    }
    Check(last == expected, "got another result than one thread");
  }
}

// Thread 1 comes to the first job only after the others have finished the last one.
PEAK_TEST(no_job_waits_for_a_thread_without_a_core) {
  constexpr int kJobs = 50, kUnits = 20;
  std::atomic<int> members{0}, finished{0};
  std::atomic<bool> in_time{true};
  std::vector<int> counts(kJobs * kUnits);
  Team::Open(2, [&] {
    ++members;
    const int id = Team::Current()->id;
    if (!WaitUntil([&] { return members == 2; })) return;  // the machine grants one thread
    if (id == 1) in_time = WaitUntil([&] { return finished == kJobs; });
    for (int job = 0; job < kJobs; ++job) {
      ParallelUnits(kUnits, 2, [&](int64_t unit) { ++counts[job * kUnits + unit]; });
      if (id == 0) ++finished;
    }
  });
  Check(in_time, "the jobs waited for a thread that took no unit");
  Check(AllOnes(counts), "a unit did not run once");
}

// Thread 1 comes to the first job while thread 0 runs a unit of the second one. It takes no unit of the second job there.
PEAK_TEST(a_late_thread_takes_no_unit_of_a_later_job) {
  constexpr int kUnits = 20;
  std::atomic<int> members{0};
  std::atomic<bool> begun{false}, passed{false};
  std::vector<int> counts(2 * kUnits);
  Team::Open(2, [&] {
    ++members;
    const int id = Team::Current()->id;
    if (!WaitUntil([&] { return members == 2; })) return;  // the machine grants one thread
    if (id == 1) WaitUntil([&] { return begun.load(); });
    ParallelUnits(kUnits, 2, [&](int64_t unit) { ++counts[unit]; });
    if (id == 1) passed = true;
    ParallelUnits(kUnits, 2, [&](int64_t unit) {
      ++counts[kUnits + unit];
      if (id == 0 && !begun.exchange(true)) WaitUntil([&] { return passed.load(); });
    });
  });
  Check(AllOnes(counts), "a unit did not run once");
}

// The first unit of each thread ends after all other units: the other thread must take them.
PEAK_TEST(units_of_a_thread_that_stands_still_run_on_others) {
  constexpr int kUnits = 40;
  std::atomic<int> others{0};
  std::atomic<bool> in_time{true};
  ParallelUnits(kUnits, 2, [&](int64_t unit) {
    if (unit == 0) {
      in_time = WaitUntil([&] { return others == kUnits - 1; });
    } else {
      ++others;
    }
  });
  Check(in_time, "the units behind one that takes long did not run");
}

// CPU time of this thread.
double ThreadSeconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Thread 0 waits for a unit of thread 1 that takes 200 ms, as if another process had its core.
PEAK_TEST(a_thread_that_waits_for_a_long_unit_sleeps) {
  std::atomic<int> members{0}, begun{0};
  double start = 0.0, used = 0.0;
  Team::Open(2, [&] {
    ++members;
    const int id = Team::Current()->id;
    if (!WaitUntil([&] { return members == 2; })) return;  // the machine grants one thread
    ParallelUnits(2, 2, [&](int64_t, int worker) {
      ++begun;
      WaitUntil([&] { return begun == 2; });
      if (worker == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
      if (worker == 0) start = ThreadSeconds();
    });
    if (id == 0) used = ThreadSeconds() - start;
  });
  Check(used < 0.1, "it used its core for %g s", used);
}

PEAK_TEST(an_exception_of_a_unit_reaches_the_caller) {
  for (const int threads : {1, 3}) {
    SetCase("%d threads", threads);
    std::atomic<int> caught{0};
    for (int round = 0; round < 3; ++round) {
      try {
        Team::Open(threads, [&] {
          ParallelUnits(10, threads, [&](int64_t unit) {
            if (unit == 4) throw std::runtime_error("unit 4");
          });
          ParallelUnits(10, threads, [&](int64_t) {});
        });
      } catch (const std::runtime_error& error) {
        caught += std::string(error.what()) == "unit 4";
      }
    }
    Check(caught == 3, "got %d of 3 exceptions", caught.load());
    std::atomic<int> after{0};
    ParallelUnits(10, threads, [&](int64_t) { ++after; });
    Check(after == 10, "%d of 10 units ran after an exception", after.load());
  }
}

// Between two jobs the thread `leaver` throws; if it is -1, every thread does.
PEAK_TEST(an_exception_between_jobs_reaches_the_caller) {
  for (const int leaver : {0, -1}) {
    SetCase("thread %d", leaver);
    bool caught = false;
    try {
      Team::Open(3, [&] {
        ParallelUnits(10, 3, [](int64_t) {});
        if (leaver < 0 || Team::Current()->id == leaver) throw std::runtime_error("between");
        ParallelUnits(10, 3, [](int64_t) {});
      });
    } catch (const std::runtime_error& error) {
      caught = std::string(error.what()) == "between";
    }
    Check(caught && Team::Current() == nullptr, "the exception did not reach the caller");
  }
}

PEAK_TEST(a_job_inside_a_unit_runs_on_its_thread) {
  std::atomic<int> wrong{0}, inner{0};
  ParallelUnits(4, 2, [&](int64_t) {
    const auto thread = std::this_thread::get_id();
    ParallelUnits(5, 2, [&](int64_t, int worker) {
      wrong += std::this_thread::get_id() != thread || worker != 0;
      ++inner;
    });
    Team::Open(2, [&] { wrong += std::this_thread::get_id() != thread; });
  });
  Check(wrong == 0 && inner == 20, "%d of 20 units ran, %d on another thread", inner.load(), wrong.load());
}

PEAK_TEST(teams_of_several_callers_do_not_mix) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::vector<int> counts(17);
        ParallelUnits(17, 2, [&](int64_t unit) { ++counts[unit]; });
        wrong += !AllOnes(counts);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  Check(wrong == 0, "%d jobs were wrong", wrong.load());
}

PEAK_TEST(ten_thousand_teams_start_and_stop) {
  int64_t total = 0;
  for (int round = 0; round < 10000; ++round) {
    std::atomic<int64_t> sum{0};
    ParallelUnits(5, 2 + round % 2, [&](int64_t unit) { sum += unit; });
    total += sum;
  }
  Check(total == 100000, "got a sum of %lld, expected 100000", static_cast<long long>(total));
}

}  // namespace
}  // namespace peak::test
