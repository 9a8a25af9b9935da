// One Muon step of matrices of one shape. The formulas are in kernels/ops/muon.py.
#ifndef PEAK_MUON_H_
#define PEAK_MUON_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

struct MuonOptions {
  DType dtype;  // of param, grad and the matrix products
  int64_t rows, columns;
  double lr, weight_decay, momentum;
  double update_lr;  // factor on the orthogonal update: lr, adjusted to the shape
  bool nesterov;
  int64_t ns_steps;
  double ns_a, ns_b, ns_c;  // coefficients of one Newton-Schulz step
  void* scratch;            // MuonScratch bytes for each worker
  int64_t workers;          // matrices that are updated at the same time, each on one thread; 1: all threads share one
  const float* norm = nullptr;  // of all gradients; the update is skipped if it is not finite
  double max_norm = 0.0;        // read if norm is given: gradients are clipped to it
  const float* rate = nullptr;  // multiplies lr and update_lr; null: 1
};
PEAK_FIELDS(MuonOptions, dtype, rows, columns, lr, weight_decay, momentum, update_lr, nesterov, ns_steps, ns_a, ns_b,
            ns_c, scratch, workers)
PEAK_OPTIONAL_FIELDS(MuonOptions, norm, max_norm, rate)

struct MuonArgs : MuonOptions {
  using Base = MuonOptions;
  void* param;
  const void* grad;
  float* momentum_buffer;
  int16_t* remainder = nullptr;  // lower half of a bf16 parameter's float32 master; null: a float32 parameter
};
PEAK_FIELDS(MuonArgs, param, grad, momentum_buffer)
PEAK_OPTIONAL_FIELDS(MuonArgs, remainder)

void Muon(const MuonArgs& args, int threads);

struct MuonEachArgs : MuonOptions {
  using Base = MuonOptions;
  int64_t count;         // of matrices
  const int64_t* table;  // (count, 5): the number of elements, then the addresses of param, grad, remainder (0: none)
                         // and momentum_buffer
};
PEAK_FIELDS(MuonEachArgs, count, table)

void MuonEach(const MuonEachArgs& args, int threads);

int64_t MuonScratch(DType dtype, int64_t rows, int64_t columns);

}  // namespace peak

#endif  // PEAK_MUON_H_
