#include "memory.h"

#include <cstdint>
#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace peak {

#ifdef __GLIBC__

bool KeepPages(std::size_t bytes) {
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  constexpr int kNever = -1;
  // Large blocks come from the heap instead of a mapping of their own, and the heap never shrinks.
  if (!mallopt(M_MMAP_MAX, 0) || !mallopt(M_TRIM_THRESHOLD, kNever) || !mallopt(M_TOP_PAD, 64 << 20)) return false;
  // Grow the heap once, mark it for huge pages, and give it back to malloc untouched: no page is resident yet.
  void* block = std::malloc(bytes);
  if (block == nullptr) return false;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(block) + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(block) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  std::free(block);
  return true;
}

#else

bool KeepPages(std::size_t) { return false; }

#endif

}  // namespace peak
