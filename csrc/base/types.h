// Element types and strided tensors as the kernels see them.
#ifndef PEAK_TYPES_H_
#define PEAK_TYPES_H_

#include <cstdint>

namespace peak {

// Upper half of a float's bits.
struct bf16 {
  uint16_t bits;
};

// A half-precision float of IEEE 754: the scales of weights in .gguf files.
struct f16 {
  uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

constexpr int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A tensor (batch, token, head, feature), or null. Strides count elements; features are contiguous.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  int64_t stride_b = 0, stride_t = 0, stride_h = 0;
};
using StridedInput = Strided<const void*>;
using StridedOutput = Strided<void*>;

}  // namespace peak

#endif  // PEAK_TYPES_H_
