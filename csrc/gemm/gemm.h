// C = A B with what follows it in the same pass: bias, activation, or the activation's slope.
//
// The classic blocking (Goto, van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3)):
// both operands are packed into panels that the innermost loop reads in order; a tile of C stays in registers. Every
// element of C is one sum over k in an order that only k decides: not the threads, not the other rows or columns.
#ifndef PEAK_GEMM_H_
#define PEAK_GEMM_H_

#include <cstdint>

#include "base/types.h"

namespace peak {

enum class Activation : int { kGeluTanh = 0, kGeluErf = 1, kRelu = 2, kSilu = 3 };

// What becomes of a tile of sums s = a b before it is written.
enum class Epilogue : int {
  kStore = 0,      // c = s + bias
  kAdd = 1,        // c += s
  kActivate = 2,   // pre = s + bias, c = act(pre)
  kSlope = 3,      // c = s act'(pre), act = act(pre)
  kGate = 4,       // pre = s + bias, c = act(gate) pre
  kGateSlope = 5,  // c = s act(gate), dgate = s pre act'(gate), act = act(gate) pre
};

struct GemmArgs {
  DType dtype;      // of all but c and a_sums
  DType out_dtype;  // of c; that of a where an activation follows
  int64_t m, n, k;
  const void* a;  // element (i, p) at a + i a_row + p a_k; one of the strides is 1
  int64_t a_row, a_k;
  const void* b;  // element (p, j) at b + j b_col + p b_k; one of the strides is 1
  int64_t b_col, b_k;
  void* c;  // (m, n), rows c_row apart
  int64_t c_row;
  Epilogue epilogue;
  const void* bias;  // (n), or null
  Activation activation;
  void* pre;         // (m, n): written by kActivate and kGate where it is not null, read by kSlope and kGateSlope
  void* act;         // (m, n): written by kSlope and kGateSlope where it is not null; may be pre
  const void* gate;  // (m, n): read by kGate and kGateSlope
  void* dgate;       // (m, n): written by kGateSlope
  float* a_sums;     // (m) sums over k of a, or null
  const float* packed_b;  // b as PackB left it: then b itself is not read; or null
};

void Gemm(const GemmArgs& args, int threads);

// b packed once, for weights that many products use.
struct PackArgs {
  DType dtype;
  int64_t n, k;
  const void* b;
  int64_t b_col, b_k;
  float* out;  // as many as PackedFloats says
};

int64_t PackedFloats(DType dtype, int64_t n, int64_t k);
void PackB(const PackArgs& args, int threads);

// What a product takes of the scratch of a team (parallel.h), and the product, called by each thread of it.
int64_t GemmScratch(const GemmArgs& args, int threads);
void TeamGemm(const GemmArgs& args, float* scratch);

}  // namespace peak

#endif  // PEAK_GEMM_H_
