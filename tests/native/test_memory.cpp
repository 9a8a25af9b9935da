// Memory that runs out is an exception for the caller, also where it runs out inside a parallel region, and leaves
// nothing behind that a later call trips over.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "check.h"

namespace {

// How many more allocations succeed before one, and only one, fails; negative: none will.
std::atomic<int64_t> allowed{-1};

void Reserve() {
  if (allowed.load() >= 0 && allowed.fetch_sub(1) == 0) throw std::bad_alloc();
}

void* Allocate(size_t bytes) {
  Reserve();
  void* memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return Allocate(bytes); }
void* operator new[](size_t bytes) { return Allocate(bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return Allocate(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  const size_t unit = static_cast<size_t>(alignment);
  Reserve();
  void* memory = std::aligned_alloc(unit, (bytes + unit) / unit * unit);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

namespace peak::test {
namespace {

// Lets the allocation after `successes` others fail; false where there is none. A kernel may do without the memory,
// as std::stable_sort does, else std::bad_alloc must arrive here.
bool FailOne(const Kernel& kernel, int threads, int64_t successes, const std::vector<char>& whole) {
  SetCase("%s on %d threads, allocation %lld fails", kernel.name, threads, static_cast<long long>(successes));
  allowed.store(successes);
  try {
    const std::vector<char> bytes = kernel.run(threads);
    const bool all_succeeded = allowed.exchange(-1) >= 0;
    Check(bytes == whole, "gave another result");
    return !all_succeeded;
  } catch (const std::bad_alloc&) {
    allowed.store(-1);
  }
  Check(kernel.run(threads) == whole, "gives another result afterwards");
  return true;
}

// Each allocation of each kernel fails once. What ends the process ends this test.
PEAK_TEST(memory_runs_out) {
  constexpr int kThreads = 3;
  for (const Kernel& kernel : Kernels()) {
    const std::vector<char> whole = kernel.run(kThreads);
    int64_t failed = 0;
    // On a thread of its own each time: it and its team have no workspace yet.
    for (bool more = true; more; failed += more) {
      std::thread([&] { more = FailOne(kernel, kThreads, failed, whole); }).join();
    }
    Check(failed > 0, "allocates nothing, so nothing was tested");
  }
}

}  // namespace
}  // namespace peak::test
