// Memory of the process and of the kernels: fresh pages cost a training step more than its norms do.
#ifndef PEAK_MEMORY_H_
#define PEAK_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "base/isa.h"

namespace peak {

constexpr int64_t kCacheLine = 64;

// Uninitialized memory, aligned to cache lines, that only grows.
class AlignedMemory {
 public:
  // Returns memory of at least `bytes`. It is valid until the next call.
  char* Reserve(int64_t bytes);

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{kCacheLine}); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

// Memory of this thread that is kept between calls: fresh pages cost more than the packing that fills them. It is valid
// until the next call on this thread.
char* Workspace(int64_t bytes);

// A bump allocator: places arrays one after another, each on its own cache lines. Without memory it only counts bytes.
// Its methods are inlined, or the linker could merge copies that were compiled for different instruction sets.
class Arena {
 public:
  Arena() = default;
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class X>
  PEAK_INLINE X* Take(int64_t count) {
    char* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(X)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<X*>(at);
  }
  PEAK_INLINE int64_t used() const { return used_; }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

// Whether stores to an output of `bytes` in rows of `row_bytes` should bypass the caches. An ordinary store reads its
// line first, which is a third of the traffic of a copy, but it leaves the line in the cache for the next kernel. True
// if the output would evict most of itself from the last-level cache, and if its rows are whole lines.
bool BypassCaches(const void* out, int64_t bytes, int64_t row_bytes);

// Makes malloc keep freed memory, for the whole process and forever, and requests huge pages for the first `bytes` of
// it. Returns false if the C library has no such settings.
bool KeepPages(std::size_t bytes);

// Requests huge pages for memory that has not been touched yet: reading a long stream is a third faster if it crosses
// fewer page borders.
void RequestHugePages(void* begin, int64_t bytes);

}  // namespace peak

#endif  // PEAK_MEMORY_H_
