// The instruction sets of this build, and the choice of the active one at run time. Tests limit it.
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

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
#define PEAK_INLINE inline __attribute__((always_inline))
// For code that few calls run. If it were inlined, it would take registers from all calls and prevent the inlining of
// other code.
#define PEAK_NOINLINE __attribute__((noinline))
#else
#error "peakgpt's C++ kernels support x86-64 and aarch64"
#endif

namespace peak {

// The order of the names is that of PEAK_PICK, which returns the copy of a function for the active instruction set.
#if defined(__x86_64__)
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"};
#define PEAK_PICK(...)                                                                     \
  ::peak::Pick<decltype(&scalar::__VA_ARGS__)>({&scalar::__VA_ARGS__, &avx2::__VA_ARGS__, \
                                                &avx512::__VA_ARGS__, &avx512vnni::__VA_ARGS__, &avx512bf16::__VA_ARGS__})
#else
constexpr const char* kIsaNames[] = {"scalar", "neon"};
#define PEAK_PICK(...) ::peak::Pick<decltype(&scalar::__VA_ARGS__)>({&scalar::__VA_ARGS__, &neon::__VA_ARGS__})
#endif
// The same for a template whose first argument is the element type. Other template arguments follow the name.
#define PEAK_PICK_DTYPE(dtype, name, ...)                                    \
  ((dtype) == ::peak::DType::kFloat32 ? PEAK_PICK(name<float, ##__VA_ARGS__>) \
                                      : PEAK_PICK(name<::peak::bf16, ##__VA_ARGS__>))
constexpr int kIsaCount = sizeof(kIsaNames) / sizeof(kIsaNames[0]);

#if defined(__x86_64__)
// Clang's builtin knows F16C only since version 15.
inline bool HasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// The widest instruction set that the machine and the operating system support (the builtins read XCR0).
inline int WidestIsa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !HasF16c()) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 1;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return 2;
  return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
#else
  return 1;
#endif
}

// The fastest of them. Intel's CPUs multiply pairs of bf16 at half of float32's rate (measured on Emerald Rapids: 0.187
// and 0.370 TFLOP/s on two cores), AMD's at twice that rate. So products of bf16 are faster in float32 on Intel's.
inline int FastestIsa() {
  const int widest = WidestIsa();
#if defined(__x86_64__)
  if (widest == 4 && __builtin_cpu_is("intel")) return 3;
#endif
  return widest;
}

// The widest instruction set that runs here and is not wider than `name`; nullptr: the fastest. Throws for an unknown
// name.
inline int CapIsa(const char* name) {
  if (name == nullptr) return FastestIsa();
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) return std::min(i, WidestIsa());
    known += std::string(i > 0 ? ", " : "") + kIsaNames[i];
  }
  throw std::invalid_argument("instruction set (PEAKGPT_ISA) is '" + std::string(name) + "', expected one of " + known);
}

inline std::atomic<int>& ActiveIsaSlot() {
  static std::atomic<int> slot{CapIsa(std::getenv("PEAKGPT_ISA"))};
  return slot;
}

inline const char* ActiveIsa() { return kIsaNames[ActiveIsaSlot().load()]; }

// Limits the active instruction set to `name`; nullptr chooses the fastest. Returns the active one.
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
