// The pointwise passes between the products of an MLP; math in kernels/mlp.py.
#ifndef PEAK_ACTIVATION_H_
#define PEAK_ACTIVATION_H_

#include <cstdint>

#include "types.h"

namespace peak {

enum class Activation : int { kGeluTanh = 0, kGeluErf = 1, kRelu = 2 };

struct ActivationForwardArgs {
  DType dtype;
  Activation activation;
  int64_t count;
  const void* pre;
  void* out;  // may be pre
};

struct ActivationBackwardArgs {
  DType dtype;
  Activation activation;
  int64_t rows, width;
  const void* pre;  // (rows, width)
  void* dout;       // (rows, width), becomes dpre = dout * act'(pre)
  void* out;        // (rows, width), becomes act(pre), or null; may be pre
  void* db;         // (width) column sums of dpre before rounding, or null
};

void ActivationForward(const ActivationForwardArgs& args, int threads);
void ActivationBackward(const ActivationBackwardArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_ACTIVATION_H_
