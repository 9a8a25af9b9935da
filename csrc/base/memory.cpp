#include "base/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <string>

#ifdef __GLIBC__
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace peak {
namespace {

// From the system, not from sysconf: in a virtual machine that gives the host's, ten times too much.
int64_t LastLevelCacheBytes() {
  constexpr int64_t kUnknown = int64_t{32} << 20;
  int64_t most = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t kib = 0;
    if (file >> kib) most = std::max(most, kib << 10);
  }
  return most > 0 ? most : kUnknown;
}

}  // namespace

bool GoPast(const void* out, int64_t bytes, int64_t row_bytes) {
  static const int64_t cache = LastLevelCacheBytes();
  constexpr int64_t kLine = 64;
  return out != nullptr && bytes > cache / 2 && reinterpret_cast<std::uintptr_t>(out) % kLine == 0 &&
         row_bytes % kLine == 0;
}

void* Workspace(int64_t bytes) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kLine); }
  };
  static thread_local std::unique_ptr<void, Free> held;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    held.reset();
    size = 0;
    held.reset(::operator new(bytes, kLine));
    size = bytes;
  }
  return held.get();
}

#ifdef __GLIBC__

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

void AskHugePages(void* memory, int64_t bytes) {
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

bool KeepPages(std::size_t bytes) {
  constexpr int kNever = -1;
  // Large blocks come from the heap instead of a mapping of their own, and the heap never shrinks.
  if (!mallopt(M_MMAP_MAX, 0) || !mallopt(M_TRIM_THRESHOLD, kNever) || !mallopt(M_TOP_PAD, 64 << 20)) return false;
  // Grow the heap once, mark it for huge pages, and give it back to malloc untouched: no page is resident yet.
  void* block = std::malloc(bytes);
  if (block == nullptr) return false;
  AskHugePages(block, bytes);
  std::free(block);
  return true;
}

#else

void AskHugePages(void*, int64_t) {}
bool KeepPages(std::size_t) { return false; }

#endif

}  // namespace peak
