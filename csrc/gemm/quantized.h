// y = act(Q(x) W^T + b): a linear layer with weights of 8 or 4 bits. Its inputs are quantized to bytes on the fly.
//
//   Q(x) = s round(x / s), s = max|x| / 127 over each block of a row      W: kernels/ops/quantize.py
//
// Sums of byte products are exact within a block. Over the blocks each element of y adds floats in the order of the
// blocks. So a row of y depends on its own row of x only: not on the other rows, their number or the threads.
#ifndef PEAK_QUANTIZED_H_
#define PEAK_QUANTIZED_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

// Weights lie in panels of kPanelOutputs outputs. A cache line holds 4 inputs of each output, output by output; a byte
// is level + 128. With 4 bits a byte holds two indices into a row of kQuantizedLevels, the upper one for the input 4
// further on, so a line holds 8 inputs. The padding of the last panel and of the last 8 inputs may hold anything.
//
// A weight is scale * level + offset, or scale * (level - zero point). The scale belongs to an output, or to a block of
// inputs of an output, as an offset or a zero point does.
constexpr int64_t kPanelOutputs = 16;
constexpr int64_t kMaxBlock = 128;
constexpr int64_t kLine = kPanelOutputs * 4;  // bytes

// LEVEL_TABLES of kernels/ops/quantize.py in their order, plus 128.
constexpr uint8_t kQuantizedLevels[4][16] = {
    {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241},
    {120, 121, 122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135},
    {128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 141, 142, 143},
    {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116},
};

struct QuantizedMatrix {
  DType dtype;  // of bias, x and y
  int bits;     // of a weight: 8 or 4
  int64_t n, k;
  int64_t block;  // inputs that share a scale of x, and one of W if it has several: a multiple of 8 up to kMaxBlock
  const uint8_t* weight;  // (panels, k rounded up to 8 / (4 or 8), kPanelOutputs, 4)
  const void* scale;      // 8 bits: float (n); 4 bits: bf16 (panels, blocks, kPanelOutputs)
  bool f16_scales = false;      // scale is f16 (panels, blocks, kPanelOutputs), for 8 bits too
  const f16* offset = nullptr;  // as such scales: offsets or zero points
  bool zero_points = false;     // offset has zero points
  int levels = 0;               // 4 bits: the row of kQuantizedLevels
  // (k): input i of the weight multiplies input order[i] of x, a permutation; null: each the same.
  const int32_t* order = nullptr;
};
PEAK_FIELDS(QuantizedMatrix, dtype, bits, n, k, block, weight, scale)
PEAK_OPTIONAL_FIELDS(QuantizedMatrix, f16_scales, offset, zero_points, levels, order)

// Whether each block of inputs of an output has a scale; else an output has one.
inline bool HasBlockScales(const QuantizedMatrix& matrix) { return matrix.f16_scales || matrix.bits == 4; }

struct QuantizedArgs : QuantizedMatrix {
  using Base = QuantizedMatrix;
  int64_t rows;
  const void* x;  // (rows, k), rows x_row elements apart
  int64_t x_row;
  void* y;  // (rows, n), rows y_row elements apart
  int64_t y_row;
  const void* bias = nullptr;  // (n)
  int activation = -1;         // an Activation (gemm/gemm.h), or -1
  bool float32_rows = false;   // x, y and pre are float32 whatever the dtype is
  void* pre = nullptr;         // (rows, n): written if given, y before the activation
};
PEAK_FIELDS(QuantizedArgs, rows, x, x_row, y, y_row)
PEAK_OPTIONAL_FIELDS(QuantizedArgs, bias, activation, float32_rows, pre)

inline DType RowsDType(const QuantizedArgs& args) { return args.float32_rows ? DType::kFloat32 : args.dtype; }

void LinearQuantized(const QuantizedArgs& args, int threads);

// The same for a team (base/parallel.h) with a common scratch of QuantizedScratch bytes, 64-byte aligned.
int64_t QuantizedScratch(const QuantizedArgs& args, int threads);
void LinearQuantized(const QuantizedArgs& args, char* scratch, int threads);

// Its parts: quantizes blocks [begin, end) of the inputs of all rows, then computes the outputs of panels [begin, end).
// `inputs` has QuantizedInputBytes bytes, 64-byte aligned, and `unpacked`, which a thread needs for itself,
// UnpackedBytes.
inline int64_t QuantizedBlocks(const QuantizedMatrix& matrix) { return (matrix.k + matrix.block - 1) / matrix.block; }
inline int64_t QuantizedPanels(const QuantizedMatrix& matrix) { return (matrix.n + kPanelOutputs - 1) / kPanelOutputs; }
int64_t QuantizedInputBytes(const QuantizedArgs& args);
int64_t UnpackedBytes(const QuantizedArgs& args);
void QuantizeInputs(const QuantizedArgs& args, int64_t begin, int64_t end, void* inputs);
void MultiplyQuantized(const QuantizedArgs& args, int64_t begin, int64_t end, void* inputs, void* unpacked);

}  // namespace peak

#endif  // PEAK_QUANTIZED_H_
