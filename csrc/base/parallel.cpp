#include "base/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "base/time_slice.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace peak {
namespace {

using Clock = TimeSlice::Clock;
using std::chrono::microseconds;

TimeSlice& Slice() {
  static thread_local TimeSlice slice(SliceLength());
  return slice;
}

uint32_t JobOf(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
uint64_t Word(uint32_t job, uint64_t rest) { return uint64_t{job} << 32 | rest; }
// Positive if `job` is later than the job of a word. Job numbers may wrap around.
int32_t Age(uint32_t job, uint64_t word) { return static_cast<int32_t>(job - JobOf(word)); }

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `holds`. Another thread makes it true, usually in the time of a unit. If that takes twice as long, the
// thread has no core. Then this one sleeps: its core may take the other thread, and its time slice is not used up.
// (To offer the core instead would end the slice, from Linux 6.18 on.)
template <class F>
void WaitUntil(const F& holds) {
  constexpr Clock::duration kShortest = microseconds(150), kLongest = microseconds(500);
  const auto end = Clock::now() + std::clamp(2 * Slice().unit(), kShortest, kLongest);
  do {
    for (int look = 0; look < 16; ++look, Pause()) {
      if (holds()) return;
    }
  } while (Clock::now() < end);
  while (!holds()) std::this_thread::sleep_for(microseconds(50));
  Slice().Begin(Clock::now());
}

// OpenMP has threads after the first team, which a forked child lacks: its teams would wait for them forever.
std::atomic<bool> had_teams{false}, lacks_threads{false};
void AfterFork() { lacks_threads = had_teams.load(); }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, AfterFork);

// Delays of random length at the places where threads meet, for tests (tests/native/Makefile).
void RandomDelay() {
#ifdef PEAK_RANDOM_DELAYS
  static std::atomic<uint32_t> threads{0};
  static thread_local uint32_t state = 2654435769u * ++threads;
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  if (state % 16 == 0) std::this_thread::yield();
  if (state % 256 == 0) std::this_thread::sleep_for(std::chrono::microseconds(state >> 8 & 127));
#endif
}

}  // namespace

void Team::Fork(void (*body)(const void*), const void* f) {
  if (lacks_threads) {
    throw std::runtime_error(
        "got a kernel call on several threads in a process that was forked after such calls, expected one thread: call "
        "torch.set_num_threads(1) in the forked process, or start it with multiprocessing's 'spawn'");
  }
  had_teams = true;
#pragma omp parallel num_threads(size_)
  {
    Member member{this, omp_get_thread_num(), 0, false};
    Current() = &member;
    Try([&] { body(f); });
    Current() = nullptr;
    // Here and not in OpenMP's barrier, which spins for milliseconds while a thread has no core.
    ended_.fetch_add(1, std::memory_order_release);
    if (member.id == 0) {
      WaitUntil([&, all = omp_get_num_threads()] { return ended_.load(std::memory_order_acquire) == all; });
    }
  }
  if (error_) std::rethrow_exception(error_);
}

int64_t Team::Take(int share, uint32_t job, int64_t units, bool first) {
  RandomDelay();
  std::atomic<uint64_t>& word = shares_[share].word;
  uint64_t seen = word.load(std::memory_order_acquire);
  for (;;) {
    const int32_t age = Age(job, seen);
    uint64_t begin = seen >> 16 & 0xffff, end = seen & 0xffff;
    if (age > 0) begin = units * share / size_, end = units * (share + 1) / size_;
    if (age < 0 || begin >= end) return -1;
    const uint64_t unit = first ? begin++ : --end;
    if (word.compare_exchange_weak(seen, Word(job, begin << 16 | end), std::memory_order_acq_rel)) {
      return static_cast<int64_t>(unit);
    }
  }
}

void Team::Finish(uint32_t job, uint32_t units) {
  RandomDelay();
  uint64_t seen = finished_.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t before = Age(job, seen) == 0 ? seen & 0xffffffff : 0;
    if (finished_.compare_exchange_weak(seen, Word(job, before + units), std::memory_order_acq_rel)) return;
  }
}

void Team::Wait(uint32_t job, int64_t units) const {
  if (units == 0) return;
  WaitUntil([&] {
    const uint64_t seen = finished_.load(std::memory_order_acquire);
    const int32_t age = Age(job, seen);
    return age < 0 || (age == 0 && static_cast<int64_t>(seen & 0xffffffff) == units);
  });
}

void Team::BeginUnits() { Slice().BeginUnits(Clock::now()); }

bool Team::MustRest() { return Slice().EndUnit(Clock::now()); }

void Team::Rest() {
  std::this_thread::yield();
  Slice().Begin(Clock::now());
}

}  // namespace peak
