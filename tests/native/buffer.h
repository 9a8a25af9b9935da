// Memory of a tensor between guard words.
//
// The guard words of an input are NaNs (huge negative numbers for integers), so a read outside of the input changes a
// result. The destructor checks that no guard word has changed. The elements of every tensor start as NaN. In the last
// placement the tensor ends at a page without access: reading one byte too many ends the test on every machine and in
// every build. AddressSanitizer knows the bounds in all placements.
#ifndef PEAK_TESTS_NATIVE_BUFFER_H_
#define PEAK_TESTS_NATIVE_BUFFER_H_

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "check.h"

#if defined(__SANITIZE_ADDRESS__)
#define PEAK_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PEAK_ASAN 1
#endif
#endif
#ifdef PEAK_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes) ((void)(begin), (void)(bytes))
#endif

namespace peak::test {

// Whole pages, followed by a page without access. Free pages are kept for the next Buffer of the same size.
class Pages {
 public:
  static char* Take(size_t bytes) {
    char*& first = Free()[bytes];
    if (first != nullptr) {
      char* pages = first;
      std::memcpy(&first, pages, sizeof(first));
      return pages;
    }
    void* pages = mmap(nullptr, bytes + Size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + bytes, Size(), PROT_NONE) != 0) std::abort();
    return static_cast<char*>(pages);
  }
  // Allocates no memory: destructors call it while allocations fail on purpose (test_memory.cpp).
  static void Give(char* pages, size_t bytes) {
    char*& first = Free().find(bytes)->second;
    std::memcpy(pages, &first, sizeof(first));
    first = pages;
  }
  static size_t Size() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }

 private:
  // Lists of free pages by their size. The first bytes of free pages hold the address of the next ones.
  static std::map<size_t, char*>& Free() {
    static std::map<size_t, char*> free;
    return free;
  }
};

enum class Role { kInput, kOutput };

template <class T>
class Buffer {
 public:
  // Placements 0, 1 and 2 begin 0, 1 and 3 elements past a multiple of 64 bytes. Placement 3 ends at the page without
  // access.
  Buffer(Role role, int64_t count, int placement) : role_(role), count_(count) {
    constexpr size_t kGuard = 128, kShift[] = {0, 1, 3};
    const size_t bytes = count * sizeof(T), page = Pages::Size();
    size_ = (2 * kGuard + 3 * sizeof(T) + bytes + page - 1) / page * page;
    pages_ = Pages::Take(size_);
    data_ = reinterpret_cast<T*>(placement % kPlacements == 3 ? pages_ + size_ - bytes
                                                              : pages_ + kGuard + kShift[placement % 3] * sizeof(T));
    FillWords(pages_, size_, role == Role::kInput ? kNanWord : kGuardWord);
    FillWords(begin(), bytes, kNanWord);
    ASAN_POISON_MEMORY_REGION(pages_, begin() - pages_);
    ASAN_POISON_MEMORY_REGION(begin() + bytes, pages_ + size_ - begin() - bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(pages_, size_);
    const uint16_t word = role_ == Role::kInput ? kNanWord : kGuardWord;
    const char* end = begin() + count_ * sizeof(T);
    Check(HoldsWords(pages_, begin() - pages_, word), "the kernel wrote before a tensor");
    Check(HoldsWords(end, pages_ + size_ - end, word), "the kernel wrote after a tensor");
    Pages::Give(pages_, size_);
  }

  T* data() const { return data_; }
  int64_t count() const { return count_; }
  T& operator[](int64_t i) const { return data_[i]; }
  double At(int64_t i) const { return Widen(data_[i]); }

  // Sets each element i to value(i).
  template <class F>
  const Buffer& Fill(const F& value) const {
    for (int64_t i = 0; i < count_; ++i) data_[i] = Narrow<T>(value(i));
    return *this;
  }
  const Buffer& FillNormal(Random& random, double mean = 0.0, double deviation = 1.0) const {
    return Fill([&](int64_t) { return mean + deviation * random.Normal(); });
  }
  const Buffer& FillSpecials(int64_t shift) const {
    constexpr int64_t kCount = sizeof(kSpecials) / sizeof(kSpecials[0]);
    return Fill([&](int64_t i) { return kSpecials[(i + shift) % kCount]; });
  }

  std::vector<double> Values() const {
    std::vector<double> values(count_);
    for (int64_t i = 0; i < count_; ++i) values[i] = At(i);
    return values;
  }
  void Append(std::vector<char>& bytes) const { bytes.insert(bytes.end(), begin(), begin() + count_ * sizeof(T)); }

  // Checks each element i against want(i), up to the first failure.
  template <class F>
  void Expect(const char* what, const F& want) const {
    for (int64_t i = 0; i < count_; ++i) {
      if (!Near(what, i, data_[i], want(i))) return;
    }
  }

 private:
  static constexpr uint16_t kNanWord = 0xffc5, kGuardWord = 0xa5a5;  // kNanWord: NaN in bf16, two of them in float

  char* begin() const { return reinterpret_cast<char*>(data_); }
  // `at` is even in every placement.
  static void FillWords(char* at, size_t bytes, uint16_t word) {
    std::fill_n(reinterpret_cast<uint16_t*>(at), bytes / 2, word);
  }
  static bool HoldsWords(const char* at, size_t bytes, uint16_t word) {
    for (size_t i = 0; i < bytes; i += 2) {
      if (std::memcmp(at + i, &word, 2) != 0) return false;
    }
    return true;
  }

  Role role_;
  int64_t count_;
  size_t size_;
  char* pages_;
  T* data_;
};

// Makes the buffers of one call. Each buffer takes the placement after that of the buffer before, so a loop over all
// placements gives every pointer every placement.
class Placer {
 public:
  explicit Placer(int placement) : placement_(placement) {}
  template <class T>
  Buffer<T> In(int64_t count) {
    return Buffer<T>(Role::kInput, count, placement_++);
  }
  template <class T>
  Buffer<T> Out(int64_t count) {
    return Buffer<T>(Role::kOutput, count, placement_++);
  }

 private:
  int placement_;
};

}  // namespace peak::test

#endif  // PEAK_TESTS_NATIVE_BUFFER_H_
