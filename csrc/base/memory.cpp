#include "base/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>

#ifdef __GLIBC__
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace peak {
namespace {

// From sysfs, not from sysconf: in a virtual machine sysconf gives the cache of the host, which can be ten times
// larger.
int64_t LastLevelCacheBytes() {
  constexpr int64_t kUnknown = int64_t{32} << 20;
  int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t kib = 0;
    if (file >> kib) largest = std::max(largest, kib << 10);
  }
  return largest > 0 ? largest : kUnknown;
}

}  // namespace

char* AlignedMemory::Reserve(int64_t bytes) {
  if (bytes > size_) {
    memory_.reset();
    size_ = 0;  // remains 0 if the allocation throws
    memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{kCacheLine})));
    size_ = bytes;
  }
  return memory_.get();
}

char* Workspace(int64_t bytes) {
  static thread_local AlignedMemory memory;
  return memory.Reserve(bytes);
}

bool BypassCaches(const void* out, int64_t bytes, int64_t row_bytes) {
  static const int64_t cache = LastLevelCacheBytes();
  return out != nullptr && bytes > cache / 2 && reinterpret_cast<std::uintptr_t>(out) % kCacheLine == 0 &&
         row_bytes % kCacheLine == 0;
}

#ifdef __GLIBC__

constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;

void RequestHugePages(void* memory, int64_t bytes) {
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
  RequestHugePages(block, bytes);
  std::free(block);
  return true;
}

#else

void RequestHugePages(void*, int64_t) {}
bool KeepPages(std::size_t) { return false; }

#endif

}  // namespace peak
