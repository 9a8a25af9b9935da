// A mixture of experts as a step of a program: the weights of all experts, and the calls of the step.
#ifndef PEAK_PROGRAM_EXPERTS_H_
#define PEAK_PROGRAM_EXPERTS_H_

#include <cstdint>

#include "base/fields.h"
#include "gemm/gemm.h"
#include "gemm/grouped_gemm.h"
#include "gemm/quantized.h"
#include "program/program.h"

namespace peak {

// The weights (n, k) of one linear layer of every expert. They multiply rows that are sorted by expert.
class ExpertWeights {
 public:
  ExpertWeights(int64_t n_, int64_t k_) : n(n_), k(k_) {}
  virtual ~ExpertWeights() = default;
  virtual int64_t ScratchBytes(int64_t rows, int threads) const = 0;
  // c = epilogue(a w[e]^T) for the rows offsets[e] to offsets[e + 1] of each expert e. args holds m, a, c and the
  // epilogue with a bias (experts, n); all but the bias are float32. For a team (base/parallel.h).
  virtual void Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch, int threads) const = 0;
  // Whether Multiply has Epilogue::kGate.
  virtual bool HasGate() const = 0;
  const int64_t n, k;
};

struct DenseExpertsMatrix : DenseMatrix {
  using Base = DenseMatrix;  // of the first expert
  int64_t experts, w_group;  // w_group: elements between two experts
};
PEAK_FIELDS(DenseExpertsMatrix, experts, w_group)

class DenseExperts : public ExpertWeights {
 public:
  explicit DenseExperts(const DenseExpertsMatrix& matrix) : ExpertWeights(matrix.n, matrix.k), matrix_(matrix) {}
  int64_t ScratchBytes(int64_t rows, int threads) const override;
  void Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch, int threads) const override;
  bool HasGate() const override { return true; }

 private:
  GroupedGemmArgs Completed(const GemmArgs& args) const;
  DenseExpertsMatrix matrix_;
};

struct QuantizedExpertsMatrix : QuantizedMatrix {
  using Base = QuantizedMatrix;  // of the first expert
  int64_t experts, weight_group, scale_group;  // bytes between two experts
};
PEAK_FIELDS(QuantizedExpertsMatrix, experts, weight_group, scale_group)

class QuantizedExperts : public ExpertWeights {
 public:
  explicit QuantizedExperts(const QuantizedExpertsMatrix& matrix)
      : ExpertWeights(matrix.n, matrix.k), matrix_(matrix) {}
  int64_t ScratchBytes(int64_t rows, int threads) const override;
  void Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch, int threads) const override;
  bool HasGate() const override { return false; }

 private:
  QuantizedArgs Completed(const GemmArgs& args, const int64_t* offsets, int64_t expert) const;
  QuantizedExpertsMatrix matrix_;
};

// out = the weighted sum of the chosen experts of each row of x (ops/experts.h). The router is a float32 weight.
struct ExpertsStep {
  int x, out;
  int64_t experts, choices;
  bool normalize;
  Activation activation;
  const float* router_bias = nullptr;  // (experts)
  const void* gate_bias = nullptr;     // (experts, n of the weight), as the others
  const void* up_bias = nullptr;
  const void* down_bias = nullptr;
};
PEAK_FIELDS(ExpertsStep, x, out, experts, choices, normalize, activation)
PEAK_OPTIONAL_FIELDS(ExpertsStep, router_bias, gate_bias, up_bias, down_bias)

// The memory and the calls of one ExpertsStep in a pass. `gate` is null if the experts are not gated.
class ExpertsRun {
 public:
  // Without `memory` only `bytes` is valid.
  ExpertsRun(const ExpertsStep& step, int64_t rows, const Weight& router, const ExpertWeights* gate,
             const ExpertWeights& up, const ExpertWeights& down, int threads, void* memory);
  int64_t bytes() const { return bytes_; }

  // The calls, in this order, for a team.
  void Route(const Weight& router, const float* x) const;
  void Hidden(const ExpertWeights* gate, const ExpertWeights& up) const;
  void Combine(const ExpertWeights& down, float* out) const;

 private:
  const ExpertsStep& step_;
  int64_t rows_, choices_;
  int threads_;
  float *logits_, *weights_, *sorted_, *gate_, *hidden_, *results_;
  int64_t *ids_, *order_, *position_, *offsets_;
  char* scratch_;
  int64_t bytes_;
};

}  // namespace peak

#endif  // PEAK_PROGRAM_EXPERTS_H_
