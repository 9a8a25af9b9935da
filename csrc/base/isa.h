// Which instruction sets this build carries, which one runs (run-time choice, cap for tests).
#ifndef PEAK_ISA_H_
#define PEAK_ISA_H_

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "base/types.h"

#if defined(__x86_64__) || defined(__aarch64__)
#define PEAK_INLINE inline __attribute__((always_inline))
// What few calls need: inlined, it costs the others registers and the inlining of what they do need.
#define PEAK_NOINLINE __attribute__((noinline))
#else
#error "peakgpt's C++ kernels support x86-64 and aarch64"
#endif

namespace peak {

// Position in this list = position in PEAK_PICK, which gives the active set's copy of a function of a kernel file.
#if defined(__x86_64__)
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
#define PEAK_PICK(...)                       \
  ::peak::Pick<decltype(&scalar::__VA_ARGS__)>( \
      {&scalar::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__, &avx512bf16::__VA_ARGS__})
#else
constexpr const char* kIsaNames[] = {"scalar", "neon"};
#define PEAK_PICK(...) ::peak::Pick<decltype(&scalar::__VA_ARGS__)>({&scalar::__VA_ARGS__, &neon::__VA_ARGS__})
#endif
// The copy of a template for an element type; further template arguments follow the name.
#define PEAK_PICK_DTYPE(dtype, name, ...)                                    \
  ((dtype) == ::peak::DType::kFloat32 ? PEAK_PICK(name<float, ##__VA_ARGS__>) \
                                      : PEAK_PICK(name<::peak::bf16, ##__VA_ARGS__>))
constexpr int kIsaCount = sizeof(kIsaNames) / sizeof(kIsaNames[0]);

// The widest set that this machine runs; operating system support included (the builtins read XCR0).
inline int BestIsa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 1;
  }
  // Every CPU with the first has the second.
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
  return 1;
#endif
}

// The widest set that runs here and is not wider than `name`; nullptr is no cap. Throws on an unknown name.
inline int CapIsa(const char* name) {
  if (name == nullptr) return BestIsa();
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) return std::min(i, BestIsa());
    known += std::string(i > 0 ? ", " : "") + kIsaNames[i];
  }
  throw std::invalid_argument("instruction set (PEAKGPT_ISA) is '" + std::string(name) + "', expected one of " + known);
}

inline std::atomic<int>& ActiveIsaSlot() {
  static std::atomic<int> slot{CapIsa(std::getenv("PEAKGPT_ISA"))};
  return slot;
}

inline const char* ActiveIsa() { return kIsaNames[ActiveIsaSlot().load()]; }

// Runs at most `name` from now on, nullptr lifts the cap; returns what runs.
inline const char* SetIsaCap(const char* name) {
  ActiveIsaSlot().store(CapIsa(name));
  return ActiveIsa();
}

template <class F>
F Pick(std::initializer_list<F> functions) {
  return functions.begin()[ActiveIsaSlot().load(std::memory_order_relaxed)];
}

}  // namespace peak

#endif  // PEAK_ISA_H_
