// Mixture of experts without its matrix products, which are gemm/grouped_gemm.h (kernels/ops/experts.py).
//
// Each of N tokens has k choices of an expert. Choice c = n k + j belongs to token n. Rows of the grouped products are
// the choices sorted by expert, those of one expert in ascending order.
#ifndef PEAK_EXPERTS_H_
#define PEAK_EXPERTS_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"
#include "gemm/gemm.h"

namespace peak {

// The router's decision for each token: the k experts with the largest logits, and their shares of softmax(logits).
struct RouteArgs {
  int64_t tokens, experts, choices;
  const float* logits;  // (tokens, experts)
  bool normalize;       // divide the shares of a token by their sum
  int64_t* ids;         // (tokens, choices), by descending share
  float* weights;       // (tokens, choices)
};
void Route(const RouteArgs& args, int threads);

struct SortChoicesArgs {
  int64_t choices, experts;
  const int64_t* ids;  // (choices): expert of each choice
  int64_t* order;      // (choices): choice of each row
  int64_t* position;   // (choices): row of each choice
  int64_t* offsets;    // (experts + 1): first row of each expert
};
PEAK_FIELDS(SortChoicesArgs, choices, experts, ids, order, position, offsets)

void SortChoices(const SortChoicesArgs& args, int threads);

// out[row] = x[token of the row].
struct GatherChoicesArgs {
  DType dtype;
  int64_t rows, choices, width;  // choices: k
  const void* x;                 // (tokens, width)
  const int64_t* order;          // (rows)
  void* out;                     // (rows, width)
};
PEAK_FIELDS(GatherChoicesArgs, dtype, rows, choices, width, x, order, out)

void GatherChoices(const GatherChoicesArgs& args, int threads);

// out[n] = sum_j weight[n, j] y[row of choice (n, j)], a float32 sum in the order of j.
struct CombineChoicesArgs {
  DType dtype;
  int64_t tokens, choices, width;
  const void* y;            // (rows, width)
  const int64_t* position;  // (tokens, choices)
  void* out;                // (tokens, width)
  const float* weights = nullptr;  // (tokens, choices); null: 1
};
PEAK_FIELDS(CombineChoicesArgs, dtype, tokens, choices, width, y, position, out)
PEAK_OPTIONAL_FIELDS(CombineChoicesArgs, weights)

void CombineChoices(const CombineChoicesArgs& args, int threads);

// Backward of w h with h = act(up), or act(gate) Up(up) (simd/activations.h), for the weight w of each row; g is the
// gradient of w h / w:
// dweight = g . h, dup and dgate are overwritten or written, scaled by w.
struct HiddenBackwardArgs {
  DType dtype;
  int64_t rows, width;
  Activation activation;
  void* g;               // (rows, width); overwritten by the gradient of up
  const void* up;        // (rows, width)
  const int64_t* order;  // (rows)
  const float* weights;  // by choice
  float* dweights;       // by choice
  const void* gate = nullptr;  // (rows, width)
  void* dgate = nullptr;       // (rows, width), if there is a gate
  void* hidden = nullptr;      // (rows, width): w h, if given
};
PEAK_FIELDS(HiddenBackwardArgs, dtype, rows, width, activation, g, up, order, weights, dweights)
PEAK_OPTIONAL_FIELDS(HiddenBackwardArgs, gate, dgate, hidden)

void HiddenBackward(const HiddenBackwardArgs& args, int threads);

// y = x y, element by element.
void MultiplyElements(const float* x, int64_t count, float* y, int threads);

}  // namespace peak

#endif  // PEAK_EXPERTS_H_
