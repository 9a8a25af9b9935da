// A failed allocation is an exception for the caller, even inside a parallel region, and later calls still work.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "check.h"

namespace {

// The number of allocations that succeed before exactly one fails; negative: none fails.
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

// Makes the allocation after `successes` others fail. Returns false if there is no such allocation. A kernel may work
// without the memory, as std::stable_sort does; otherwise std::bad_alloc must arrive here.
bool FailOne(const Kernel& kernel, int threads, int64_t successes, const std::vector<char>& whole) {
  SetCase("%s on %d threads, allocation %lld fails", kernel.name, threads, static_cast<long long>(successes));
  allowed.store(successes);
  try {
    const std::vector<char> bytes = kernel.run(threads);
    const bool all_succeeded = allowed.exchange(-1) >= 0;
    Check(bytes == whole, "gave a different result");
    return !all_succeeded;
  } catch (const std::bad_alloc&) {
    allowed.store(-1);
  }
  Check(kernel.run(threads) == whole, "gives a different result afterwards");
  return true;
}

// Each allocation of each kernel fails once. A crash of the process fails this test.
PEAK_TEST(every_failed_allocation_is_an_exception) {
  constexpr int kThreads = 3;
  for (const Kernel& kernel : Kernels()) {
    const std::vector<char> whole = kernel.run(kThreads);
    int64_t failed = 0;
    // On a new thread each time: it and its team have no workspace yet.
    for (bool more = true; more; failed += more) {
      std::thread([&] { more = FailOne(kernel, kThreads, failed, whole); }).join();
    }
    Check(failed > 0, "allocates nothing, so this test checks nothing");
  }
}

}  // namespace
}  // namespace peak::test
