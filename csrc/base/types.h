// Element types of tensors as the kernels see them.
#ifndef PEAK_TYPES_H_
#define PEAK_TYPES_H_

#include <cstdint>

namespace peak {

// Upper half of a float's bits.
struct bf16 {
  uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace peak

#endif  // PEAK_TYPES_H_
