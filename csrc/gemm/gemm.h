// C = A B with an epilogue in the same pass: a bias, an activation, or the derivative of an activation.
//
// The blocking is the classic one (Goto, van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM
// TOMS 34(3)): both operands are packed into panels that the innermost loop reads in order; a tile of C stays in
// registers. Every element of C is one sum over k. Only k decides the order of this sum: not the threads and not the
// other rows or columns.
#ifndef PEAK_GEMM_H_
#define PEAK_GEMM_H_

#include <cstdint>

#include "base/fields.h"
#include "base/types.h"

namespace peak {

// kClampedUp is the other factor of a layer that kClampedSwiglu gates; only quantized products have it.
enum class Activation : int {
  kGeluTanh = 0,
  kGeluErf = 1,
  kRelu = 2,
  kSilu = 3,
  kClampedSwiglu = 4,
  kClampedUp = 5,
};

// How a tile of sums s = a b is written. act is the activation, act' its derivative; up is as in simd/activations.h, the
// identity for most activations.
enum class Epilogue : int {
  kStore = 0,      // c = s + bias
  kAdd = 1,        // c += s
  kActivate = 2,   // pre = s + bias, c = act(pre)
  kSlope = 3,      // c = s act'(pre), act = act(pre)
  kGate = 4,       // pre = s + bias, c = act(gate) up(pre)
  kGateSlope = 5,  // c = s act(gate) up'(pre), dgate = s up(pre) act'(gate), act = act(gate) up(pre)
};

struct QuantizedMatrix;  // gemm/quantized.h

struct GemmArgs {
  DType dtype;      // of everything but c and a_sums; with float32_rows, of b and bias
  DType out_dtype;  // of c; that of a if the epilogue has an activation
  int64_t m, n, k;
  const void* a;  // element (i, p) is a[i a_row + p a_k]; one of the strides is 1
  int64_t a_row, a_k;
  void* c;  // (m, n), rows c_row elements apart
  int64_t c_row;
  const void* b = nullptr;  // element (p, j) is b[j b_col + p b_k]; one of the strides is 1
  int64_t b_col = 0, b_k = 0;
  Epilogue epilogue = Epilogue::kStore;
  const void* bias = nullptr;  // (n)
  Activation activation = Activation::kRelu;
  void* pre = nullptr;         // (m, n): written by kActivate and kGate if given, read by kSlope and kGateSlope
  void* act = nullptr;         // (m, n): written by kSlope and kGateSlope if given; may be pre
  const void* gate = nullptr;  // (m, n): read by kGate and kGateSlope
  void* dgate = nullptr;       // (m, n): written by kGateSlope
  float* a_sums = nullptr;     // (m): sums over k of a
  // a, pre, act, gate and dgate are float32 whatever the dtype is. Where an instruction multiplies pairs of bf16, a is
  // rounded when it is packed; elsewhere b is converted to float, and nothing is rounded.
  bool float32_rows = false;
  // The b of the product if it is given, by C++ only: element (p, j) is the weight of output p for input j in dtype.
  const QuantizedMatrix* weight = nullptr;
};
PEAK_FIELDS(GemmArgs, dtype, out_dtype, m, n, k, a, a_row, a_k, c, c_row)
PEAK_OPTIONAL_FIELDS(GemmArgs, b, b_col, b_k, epilogue, bias, activation, pre, act, gate, dgate, a_sums, float32_rows,
                     weight)

inline DType RowsDType(const GemmArgs& args) { return args.float32_rows ? DType::kFloat32 : args.dtype; }

void Gemm(const GemmArgs& args, int threads);

// The same for a team (base/parallel.h) with a common scratch of GemmScratch floats.
int64_t GemmScratch(const GemmArgs& args, int threads);
void Gemm(const GemmArgs& args, float* scratch, int threads);

// Column panels [begin, end) of the GemmPanels panels of a product. On one thread the scratch of GemmPartScratch floats
// suffices for every product that is not larger in m, n or k.
int64_t GemmPanels(const GemmArgs& args);
int64_t GemmPartScratch(const GemmArgs& args);
void GemmPart(const GemmArgs& args, int64_t begin, int64_t end, float* scratch, int threads);

}  // namespace peak

#endif  // PEAK_GEMM_H_
