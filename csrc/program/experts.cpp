#include "program/experts.h"

#include <algorithm>

#include "base/memory.h"
#include "base/parallel.h"
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
  product.float32_rows = true;
  return product;
}

int64_t DenseExperts::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return GroupedGemmScratch(Completed(args), threads) * static_cast<int64_t>(sizeof(float));
}

void DenseExperts::Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch, int threads) const {
  GroupedGemmArgs product = Completed(args);
  product.offsets = offsets;
  GroupedGemm(product, reinterpret_cast<float*>(scratch), threads);
}

namespace {

// Reading an expert's weights costs as much as this number of rows.
constexpr int64_t kRowsOfWeights = 16;

// Where the quantized inputs of expert e lie in the scratch, if `first` is its first row: behind those of the experts
// before it, of which at most min(e, first) have rows. The inputs of an expert have up to kPadding rows more, and end
// with up to kEnds bytes for the alignment of their arrays.
int64_t InputsOf(const QuantizedMatrix& matrix, int64_t e, int64_t first) {
  constexpr int64_t kPadding = 3, kEnds = 4 * kCacheLine;
  const int64_t row = (matrix.k + 7) / 8 * 8 + QuantizedBlocks(matrix) * 3 * static_cast<int64_t>(sizeof(float));
  const int64_t line = (row + kCacheLine - 1) / kCacheLine * kCacheLine, before = std::min(e, first);
  return (first + kPadding * before) * line + kEnds * before;
}

}  // namespace

QuantizedArgs QuantizedExperts::Completed(const GemmArgs& args, const int64_t* offsets, int64_t expert) const {
  GroupedGemmArgs all{};
  static_cast<GemmArgs&>(all) = args;
  all.dtype = matrix_.dtype;
  all.float32_rows = true;
  all.n = matrix_.n;
  all.offsets = offsets;
  QuantizedMatrix matrix = matrix_;
  matrix.weight += expert * matrix_.weight_group;
  matrix.scale = static_cast<const char*>(matrix.scale) + expert * matrix_.scale_group;
  return QuantizedProduct(matrix, GroupOf(all, expert));
}

int64_t QuantizedExperts::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return InputsOf(matrix_, matrix_.experts, rows) + threads * UnpackedBytes(QuantizedProduct(matrix_, args));
}

void QuantizedExperts::Multiply(const GemmArgs& args, const int64_t* offsets, char* scratch, int threads) const {
  const int64_t experts = matrix_.experts, units = kUnitsPerThread * threads;
  ParallelRanges(experts, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (offsets[e] == offsets[e + 1]) continue;
      const QuantizedArgs product = Completed(args, offsets, e);
      QuantizeInputs(product, 0, QuantizedBlocks(matrix_), scratch + InputsOf(matrix_, e, offsets[e]));
    }
  });
  char* const all_unpacked = scratch + InputsOf(matrix_, experts, args.m);
  const auto cost = [&](int64_t e) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    return rows == 0 ? 0 : rows + kRowsOfWeights;
  };
  ParallelUnits(units, threads, [&](int64_t unit, int worker) {
    ForShare(unit, units, experts, QuantizedPanels(matrix_), cost, [&](int64_t e, int64_t begin, int64_t end) {
      const QuantizedArgs product = Completed(args, offsets, e);
      char* const unpacked = all_unpacked + worker * UnpackedBytes(product);
      MultiplyQuantized(product, begin, end, scratch + InputsOf(matrix_, e, offsets[e]), unpacked);
    });
  });
}

namespace {

GemmArgs Product(int64_t rows, const float* a, int64_t k, float* c, int64_t n, const void* bias) {
  GemmArgs args{};
  args.m = rows;
  args.a = a;
  args.a_row = k;
  args.a_k = 1;
  args.c = c;
  args.c_row = n;
  args.out_dtype = DType::kFloat32;
  args.bias = bias;
  return args;
}

void Activate(GemmArgs& args, Epilogue epilogue, Activation activation) {
  args.epilogue = epilogue;
  args.activation = activation;
}

}  // namespace

ExpertsRun::ExpertsRun(const ExpertsStep& step, int64_t rows, const Weight& router, const ExpertWeights* gate,
                       const ExpertWeights& up, const ExpertWeights& down, int threads, void* memory)
    : step_(step), rows_(rows), choices_(rows * step.choices), threads_(threads) {
  Arena arena(memory);
  logits_ = arena.Take<float>(rows * step.experts);
  weights_ = arena.Take<float>(choices_);
  ids_ = arena.Take<int64_t>(choices_);
  order_ = arena.Take<int64_t>(choices_);
  position_ = arena.Take<int64_t>(choices_);
  offsets_ = arena.Take<int64_t>(step.experts + 1);
  sorted_ = arena.Take<float>(choices_ * up.k);
  gate_ = arena.Take<float>(gate == nullptr ? 0 : choices_ * up.n);
  hidden_ = arena.Take<float>(choices_ * up.n);
  results_ = arena.Take<float>(choices_ * down.n);
  int64_t product = std::max(router.ScratchBytes(rows, threads), up.ScratchBytes(choices_, threads));
  product = std::max(product, down.ScratchBytes(choices_, threads));
  if (gate != nullptr) product = std::max(product, gate->ScratchBytes(choices_, threads));
  scratch_ = arena.Take<char>(product);
  bytes_ = arena.used();
}

void ExpertsRun::Route(const Weight& router, const float* x) const {
  const GemmArgs args = Product(rows_, x, router.k, logits_, router.n, step_.router_bias);
  router.Multiply(args, scratch_, threads_);
  peak::Route({rows_, step_.experts, step_.choices, logits_, step_.normalize, ids_, weights_}, threads_);
  SortChoices({choices_, step_.experts, ids_, order_, position_, offsets_}, threads_);
  GatherChoices({DType::kFloat32, choices_, step_.choices, router.k, x, order_, sorted_}, threads_);
}

void ExpertsRun::Hidden(const ExpertWeights* gate, const ExpertWeights& up) const {
  const bool fused = gate == nullptr || up.HasGate();
  if (gate != nullptr) {
    GemmArgs args = Product(choices_, sorted_, gate->k, gate_, gate->n, step_.gate_bias);
    if (!fused) Activate(args, Epilogue::kActivate, step_.activation);
    gate->Multiply(args, offsets_, scratch_, threads_);
  }
  GemmArgs args = Product(choices_, sorted_, up.k, hidden_, up.n, step_.up_bias);
  args.gate = gate_;
  if (fused) {
    Activate(args, gate == nullptr ? Epilogue::kActivate : Epilogue::kGate, step_.activation);
  } else if (step_.activation == Activation::kClampedSwiglu) {
    Activate(args, Epilogue::kActivate, Activation::kClampedUp);
  }
  up.Multiply(args, offsets_, scratch_, threads_);
  if (fused) return;
  MultiplyElements(gate_, choices_ * up.n, hidden_, threads_);
}

void ExpertsRun::Combine(const ExpertWeights& down, float* out) const {
  const GemmArgs args = Product(choices_, hidden_, down.k, results_, down.n, step_.down_bias);
  down.Multiply(args, offsets_, scratch_, threads_);
  CombineChoices({DType::kFloat32, rows_, step_.choices, down.n, results_, position_, out, weights_}, threads_);
}

}  // namespace peak
