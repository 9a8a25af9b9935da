// y = act(Q(x) W^T + b): a linear layer whose weights have 8 or 4 bits and whose inputs become bytes on the way.
//
//   Q(x) = s round(x / s), s = max|x| / 127 over each block of a row      W: kernels/ops/quantize.py
//
// Sums of byte products are exact within a block; across blocks each element of y adds floats in the order of the
// blocks. So its bits follow its own row of x alone: not the other rows, their number or the threads.
#ifndef PEAK_QUANTIZED_H_
#define PEAK_QUANTIZED_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

// Weights lie in panels of kPanelOutputs outputs: a cache line holds 4 inputs of each, output by output. A byte is
// level + 128. With 4 bits it is two indices into kQuantizedLevels, the upper for the inputs 4 further on: a line holds
// 8 inputs. What fills up the last panel and the last 8 inputs may be anything.
constexpr int64_t kPanelOutputs = 16;
constexpr int64_t kMaxBlock = 128;

struct QuantizedArgs {
  DType dtype;  // of x, bias, y
  int64_t rows;
  const void* x;  // (rows, k), rows x_row apart
  int64_t x_row;
  int bits;  // of the weight: 8 or 4
  int64_t n, k;
  int64_t block;  // inputs that share a scale of x, with 4 bits of the weight too: a multiple of 8, up to kMaxBlock
  const uint8_t* weight;  // (panels, Up(k, 8) / (4 or 8), kPanelOutputs, 4)
  const void* scale;      // 8 bits: float (n); 4 bits: bf16 (panels, blocks, kPanelOutputs)
  const void* bias;       // (n), or null
  int activation;         // Activation in gemm.h, or -1
  void* y;                // (rows, n), rows y_row apart
  int64_t y_row;
  bool wide;  // y is float32, whatever x is
};

void LinearQuantized(const QuantizedArgs& args, int threads);

// The same in two steps for a team that is already there: everybody calls the first, waits for the others, calls the
// second. `scratch` is the team's: 64-byte aligned, QuantizedScratch bytes.
int64_t QuantizedScratch(const QuantizedArgs& args, int parts);
void QuantizeInputs(const QuantizedArgs& args, int part, int parts, void* scratch);
void MultiplyQuantized(const QuantizedArgs& args, int part, int parts, void* scratch);

}  // namespace peak

#endif  // PEAK_QUANTIZED_H_
