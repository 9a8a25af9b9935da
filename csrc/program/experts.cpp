#include "program/experts.h"

#include <algorithm>

#include "base/memory.h"
#include "ops/experts.h"

namespace peak {

GroupedGemmArgs DenseExperts::Completed(const GemmArgs& args) const {
  GroupedGemmArgs product{};
  static_cast<GemmArgs&>(product) = args;
  product.dtype = matrix_.dtype;
  product.n = matrix_.n;
  product.k = matrix_.k;
  product.b = matrix_.w;
  product.b_col = matrix_.w_row;
  product.b_k = 1;
  product.b_group = matrix_.w_group;
  product.grouping = Grouping::kRows;
  product.groups = matrix_.experts;
  return product;
}

int64_t DenseExperts::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return GroupedGemmScratch(Completed(args), threads) * static_cast<int64_t>(sizeof(float));
}

void DenseExperts::Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch) const {
  GroupedGemmArgs product = Completed(args);
  product.offsets = offsets;
  TeamGroupedGemm(product, reinterpret_cast<float*>(scratch));
}

int64_t QuantizedExperts::ScratchBytes(int64_t rows, int threads) const {
  return QuantizedWeight(matrix_).ScratchBytes(rows, threads);
}

void QuantizedExperts::Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch) const {
  GroupedGemmArgs product{};
  static_cast<GemmArgs&>(product) = args;
  product.dtype = matrix_.dtype;
  product.n = matrix_.n;
  product.offsets = offsets;
  for (int64_t expert = 0; expert < matrix_.experts; ++expert) {
    if (offsets[expert] == offsets[expert + 1]) continue;
    QuantizedMatrix matrix = matrix_;
    matrix.weight += expert * matrix_.weight_group;
    matrix.scale = static_cast<const char*>(matrix.scale) + expert * matrix_.scale_group;
    QuantizedWeight(matrix).Multiply(GroupOf(product, expert), scratch);
  }
}

namespace {

GemmArgs Product(int64_t rows, const void* a, int64_t k, void* c, int64_t n, DType out_dtype, const void* bias) {
  GemmArgs args{};
  args.m = rows;
  args.a = a;
  args.a_row = k;
  args.a_k = 1;
  args.c = c;
  args.c_row = n;
  args.out_dtype = out_dtype;
  args.bias = bias;
  return args;
}

void Activate(GemmArgs& args, Epilogue epilogue, Activation activation) {
  args.epilogue = epilogue;
  args.activation = activation;
}

}  // namespace

ExpertsRun::ExpertsRun(const ExpertsStep& step, DType dtype, int64_t rows, const Weight& router,
                       const ExpertWeights* gate, const ExpertWeights& up, const ExpertWeights& down, int threads,
                       void* memory)
    : step_(step), dtype_(dtype), rows_(rows), choices_(rows * step.choices), threads_(threads) {
  Arena arena(memory);
  const int64_t size = SizeOf(dtype), hidden = choices_ * up.n * size;
  wide_ = arena.Take<float>(rows * up.k);
  logits_ = arena.Take<float>(rows * step.experts);
  weights_ = arena.Take<float>(choices_);
  ids_ = arena.Take<int64_t>(choices_);
  order_ = arena.Take<int64_t>(choices_);
  position_ = arena.Take<int64_t>(choices_);
  offsets_ = arena.Take<int64_t>(step.experts + 1);
  sorted_ = arena.Take<char>(choices_ * up.k * size);
  gate_ = arena.Take<char>(gate == nullptr ? 0 : hidden);
  hidden_ = arena.Take<char>(hidden);
  results_ = arena.Take<char>(choices_ * down.n * size);
  int64_t product = std::max(router.ScratchBytes(rows, threads), up.ScratchBytes(choices_, threads));
  product = std::max(product, down.ScratchBytes(choices_, threads));
  if (gate != nullptr) product = std::max(product, gate->ScratchBytes(choices_, threads));
  scratch_ = arena.Take<char>(product);
  bytes_ = arena.used();
}

void ExpertsRun::Route(const Weight& router, const char* x) const {
  Widen(dtype_, x, rows_ * router.k, wide_, threads_);
  GemmArgs args = Product(rows_, wide_, router.k, logits_, router.n, DType::kFloat32, step_.router_bias);
  router.Multiply(args, scratch_);
  peak::Route({rows_, step_.experts, step_.choices, logits_, step_.normalize, ids_, weights_}, threads_);
  SortChoices({choices_, step_.experts, ids_, order_, position_, offsets_}, threads_);
  GatherChoices({dtype_, choices_, step_.choices, router.k, x, order_, sorted_}, threads_);
}

void ExpertsRun::Hidden(const ExpertWeights* gate, const ExpertWeights& up) const {
  const bool fused = gate == nullptr || up.HasGate();
  if (gate != nullptr) {
    GemmArgs args = Product(choices_, sorted_, gate->k, gate_, gate->n, dtype_, step_.gate_bias);
    if (!fused) Activate(args, Epilogue::kActivate, step_.activation);
    gate->Multiply(args, offsets_, scratch_);
  }
  GemmArgs args = Product(choices_, sorted_, up.k, hidden_, up.n, dtype_, step_.up_bias);
  args.gate = gate_;
  if (fused) {
    Activate(args, gate == nullptr ? Epilogue::kActivate : Epilogue::kGate, step_.activation);
  } else if (step_.activation == Activation::kClampedSwiglu) {
    Activate(args, Epilogue::kActivate, Activation::kClampedUp);
  }
  up.Multiply(args, offsets_, scratch_);
  if (fused) return;
  MultiplyElements(dtype_, gate_, choices_ * up.n, hidden_, threads_);
}

void ExpertsRun::Combine(const ExpertWeights& down, char* out) const {
  const GemmArgs args = Product(choices_, hidden_, down.k, results_, down.n, dtype_, step_.down_bias);
  down.Multiply(args, offsets_, scratch_);
  CombineChoices({dtype_, rows_, step_.choices, down.n, results_, position_, out, weights_}, threads_);
}

}  // namespace peak
