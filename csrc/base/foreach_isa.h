// Includes PEAK_THIS_FILE once per instruction set, each time inside namespace peak::<isa>::(anonymous) with the Vec of
// that set from simd/simd.h. The namespace is anonymous, since the linker could merge copies that were compiled for
// different instruction sets. The technique is that of Highway's foreach_target.h (github.com/google/highway). A kernel
// file looks like this:
//
//     #include "ops/norm.h"
//     #define PEAK_THIS_FILE "ops/norm.cpp"
//     #include "base/foreach_isa.h"
//     #ifdef PEAK_ISA
//       template <class T> void Forward(...)   uses simd/simd.h; no lambda (GCC compiles lambdas for the base target),
//                                              no std:: template unless it is inlined (else every set shares one copy)
//     #else
//       the rest, compiled once: threads, and PEAK_PICK(Forward<float>)(...)
//     #endif
#ifndef PEAK_FOREACH_ISA_H_
#define PEAK_FOREACH_ISA_H_

#include "base/isa.h"
#include "base/parallel.h"
#include "base/types.h"

// Every system header comes before the first target pragma, or its inline functions would be compiled for that target.
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#define PEAK_SCALAR 0
#define PEAK_AVX2 1
#define PEAK_AVX512 2
#define PEAK_AVX512VNNI 3
#define PEAK_AVX512BF16 4
#define PEAK_NEON 5

#define PEAK_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PEAK_PUSH_TARGET(isa) PEAK_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PEAK_POP_TARGET PEAK_PRAGMA(clang attribute pop)
#else
#define PEAK_PUSH_TARGET(isa) PEAK_PRAGMA(GCC push_options) PEAK_PRAGMA(GCC target(isa))
#define PEAK_POP_TARGET PEAK_PRAGMA(GCC pop_options)
#endif

#define PEAK_ISA PEAK_SCALAR
namespace peak::scalar {
namespace {
#include "simd/simd.h"
#include PEAK_THIS_FILE
}  // namespace
}  // namespace peak::scalar
#undef PEAK_ISA

#if defined(__x86_64__)

#define PEAK_ISA PEAK_AVX2
PEAK_PUSH_TARGET("avx2,fma,f16c")
namespace peak::avx2 {
namespace {
#include "simd/simd.h"
#include PEAK_THIS_FILE
}  // namespace
}  // namespace peak::avx2
PEAK_POP_TARGET
#undef PEAK_ISA

#define PEAK_ISA PEAK_AVX512
PEAK_PUSH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace peak::avx512 {
namespace {
#include "simd/simd.h"
#include PEAK_THIS_FILE
}  // namespace
}  // namespace peak::avx512
PEAK_POP_TARGET
#undef PEAK_ISA

#define PEAK_ISA PEAK_AVX512VNNI
PEAK_PUSH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace peak::avx512vnni {
namespace {
#include "simd/simd.h"
#include PEAK_THIS_FILE
}  // namespace
}  // namespace peak::avx512vnni
PEAK_POP_TARGET
#undef PEAK_ISA

#define PEAK_ISA PEAK_AVX512BF16
PEAK_PUSH_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
namespace peak::avx512bf16 {
namespace {
#include "simd/simd.h"
#include PEAK_THIS_FILE
}  // namespace
}  // namespace peak::avx512bf16
PEAK_POP_TARGET
#undef PEAK_ISA

#else

#define PEAK_ISA PEAK_NEON
namespace peak::neon {
namespace {
#include "simd/simd.h"
#include PEAK_THIS_FILE
}  // namespace
}  // namespace peak::neon
#undef PEAK_ISA

#endif

#endif  // PEAK_FOREACH_ISA_H_
