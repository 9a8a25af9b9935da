// C = A B with what follows it in the same pass: bias, activation, or the activation's slope.
//
// The classic blocking (Goto, van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3)):
// both operands are packed into panels that the innermost loop reads in order; a tile of C stays in registers. Every
// element of C is one sum over k in an order that only k decides: not the threads, not the other rows or columns.
#ifndef PEAK_GEMM_H_
#define PEAK_GEMM_H_

#include <cstdint>

#include "activation.h"
#include "types.h"

namespace peak {

enum class Epilogue : int {
  kStore = 0,     // c = ab + bias
  kAdd = 1,       // c += ab + bias
  kActivate = 2,  // pre = ab + bias; c = act(pre); pre may be null
  kSlope = 3,     // c = ab * act'(pre); pre becomes act(pre) when keep_act
};

struct GemmArgs {
  DType dtype;      // of a, b, bias, pre
  DType out_dtype;  // of c
  int64_t m, n, k;
  const void* a;  // a(i, p) at a + i a_row + p a_k; one of the strides is 1
  int64_t a_row, a_k;
  const void* b;  // b(p, j) at b + j b_col + p b_k; one of the strides is 1
  int64_t b_col, b_k;
  void* c;  // rows of n, c_row apart
  int64_t c_row;
  const void* bias;  // (n) or null
  Epilogue epilogue;
  Activation activation;
  void* pre;  // (m, n), rows pre_row apart, or null
  int64_t pre_row;
};

void Gemm(const GemmArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_GEMM_H_
