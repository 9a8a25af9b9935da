// A model's forward pass as a list of steps over buffers, which one team of threads runs from the first to the last.
// Generation runs many small steps: opening a parallel region or returning to Python for each of them would cost more.
//
// A row is a token; the tokens of the sequences follow one another. The result of a step for a row depends on this row
// and on the past of its sequence only, to the last bit.
//
// Every buffer is float32, whatever the dtype of the weights is: the residual stream, the results of norms, products and
// attention, and the logits. Only the operands of products are rounded, where they are packed (gemm/gemm.h) or quantized
// (gemm/quantized.h), and keys and values, by the cache (attention/cache_attention.h).
#ifndef PEAK_PROGRAM_H_
#define PEAK_PROGRAM_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/fields.h"
#include "base/memory.h"
#include "base/types.h"
#include "gemm/gemm.h"
#include "gemm/quantized.h"

namespace peak {

class ExpertWeights;  // program/experts.h
struct ExpertsStep;

// One pass: the new tokens, their positions, and the memory of the results.
struct PassArgs {
  int64_t rows;
  const int64_t* ids;        // (rows)
  const int64_t* positions;  // (rows): the row of each token in the tables of positions and angles
  int64_t sequences;
  const int64_t* begins;  // (sequences + 1): first row of each sequence
  const int64_t* past;    // (sequences): tokens in the cache
  const int32_t* tables;  // (sequences, table_row): block numbers, see attention/cache_attention.h
  int64_t table_row;
  bool int8_cache;
  void* keys;  // (layers, blocks, kv_heads, kCacheBlock * width), see attention/cache_attention.h
  void* values;
  int64_t layer_bytes;
  int64_t logit_rows;       // number of rows whose logits are computed
  const int64_t* selected;  // (logit_rows): their row numbers
  float* logits;            // (logit_rows, vocabulary), or null: then the head does not run
  float* hidden = nullptr;  // (logit_rows, width): what the head reads, or null
};
PEAK_FIELDS(PassArgs, rows, ids, positions, sequences, begins, past, tables, table_row, int8_cache, keys, values,
            layer_bytes, logit_rows, selected, logits)
PEAK_OPTIONAL_FIELDS(PassArgs, hidden)

// A weight (n, k) that multiplies x (rows, k) by its transpose.
class Weight {
 public:
  Weight(int64_t n_, int64_t k_) : n(n_), k(k_) {}
  virtual ~Weight() = default;
  virtual int64_t ScratchBytes(int64_t rows, int threads) const = 0;
  // c = epilogue(a w^T), for a team (base/parallel.h). args holds m, a, c and the epilogue; all but the bias are float32.
  virtual void Multiply(const GemmArgs& args, char* scratch, int threads) const = 0;
  const int64_t n, k;
};

struct DenseMatrix {
  DType dtype;
  int64_t n, k;
  const void* w;  // element (i, p) is w[i w_row + p]
  int64_t w_row;
};
PEAK_FIELDS(DenseMatrix, dtype, n, k, w, w_row)

// A float32 or bf16 matrix in the memory of its tensor, which may be a mapped file. It is not packed: a
// copy costs fresh memory, which takes as long as tens of steps, and gains only for one row in float32. The caller keeps
// the memory.
class DenseWeight : public Weight {
 public:
  explicit DenseWeight(const DenseMatrix& matrix) : Weight(matrix.n, matrix.k), matrix_(matrix) {}
  int64_t ScratchBytes(int64_t rows, int threads) const override;
  void Multiply(const GemmArgs& args, char* scratch, int threads) const override;

 private:
  GemmArgs Completed(GemmArgs args) const;
  DenseMatrix matrix_;
};

// c = epilogue(a w^T) with a w of 8 or 4 bits; the epilogue is kStore or kActivate.
QuantizedArgs QuantizedProduct(const QuantizedMatrix& matrix, const GemmArgs& args);

// A matrix of 8 or 4 bits; its epilogue is kStore or kActivate.
class QuantizedWeight : public Weight {
 public:
  explicit QuantizedWeight(const QuantizedMatrix& matrix) : Weight(matrix.n, matrix.k), matrix_(matrix) {}
  int64_t ScratchBytes(int64_t rows, int threads) const override;
  void Multiply(const GemmArgs& args, char* scratch, int threads) const override;

 private:
  QuantizedMatrix matrix_;
};

// The steps. A field of type int is the number of a buffer; -1 means no buffer.

// out = scale * wte[id], or wte[id] + wpe[position] with scale 1.
struct EmbedStep {
  int out;
  const void* wte;
  int64_t wte_stride;
  const void* wpe = nullptr;
  int64_t wpe_stride = 0;
  float scale = 1.0f;
};
PEAK_FIELDS(EmbedStep, out, wte, wte_stride)
PEAK_OPTIONAL_FIELDS(EmbedStep, wpe, wpe_stride, scale)

// out = norm(x). With a residual: residual += x, out = norm(residual).
struct NormStep {
  int x, out;
  const void* w;
  DType w_dtype;
  float eps;
  bool rms;
  float offset = 0.0f;  // added to w
  int residual = -1;
  const void* b = nullptr;
};
PEAK_FIELDS(NormStep, x, out, w, w_dtype, eps, rms)
PEAK_OPTIONAL_FIELDS(NormStep, offset, residual, b)

// out = epilogue(x weight^T + bias).
struct LinearStep {
  int x;
  int out = -1;  // -1: the logits of the pass
  const void* bias = nullptr;
  Epilogue epilogue = Epilogue::kStore;
  Activation activation = Activation::kRelu;
  int gate = -1;  // the gate of Epilogue::kGate
};
PEAK_FIELDS(LinearStep, x)
PEAK_OPTIONAL_FIELDS(LinearStep, out, bias, epilogue, activation, gate)

// Rotates the first heads of x in place.
struct RotaryStep {
  int x;
  int64_t width;  // of a head
  int64_t rotated_heads;
  const float* cos;  // (positions, pairs)
  const float* sin;
  int64_t pairs;
  bool interleaved;
};
PEAK_FIELDS(RotaryStep, x, width, rotated_heads, cos, sin, pairs, interleaved)

// Normalizes the queries and keys of x in place, and rotates them if there are tables. Fields as in ops/qk_norm.h.
struct QKNormStep {
  int x;
  int64_t width, q_heads, k_heads;
  bool joint;
  const void* q_norm;
  const void* k_norm;
  DType w_dtype;
  float eps, offset;
  const float* cos = nullptr;  // (positions, pairs)
  const float* sin = nullptr;
  int64_t pairs = 0;
  bool interleaved = false;
};
PEAK_FIELDS(QKNormStep, x, width, q_heads, k_heads, joint, q_norm, k_norm, w_dtype, eps, offset)
PEAK_OPTIONAL_FIELDS(QKNormStep, cos, sin, pairs, interleaved)

// out = attention over the cache of `layer`. A row of x holds heads + 2 kv_heads heads: queries, keys, values.
struct AttentionStep {
  int x, out;
  int64_t layer, heads, kv_heads, width;
  float scale;
  int64_t window = 0;
  float softcap = 0.0f;
  const float* alibi = nullptr;  // (heads)
  const float* sinks = nullptr;  // (heads)
};
PEAK_FIELDS(AttentionStep, x, out, layer, heads, kv_heads, width, scale)
PEAK_OPTIONAL_FIELDS(AttentionStep, window, softcap, alibi, sinks)

// out = x + y, or x * y if `product`.
struct CombineStep {
  int x, y, out;
  bool product;
};
PEAK_FIELDS(CombineStep, x, y, out, product)

// Copies the selected rows of x to out. All later steps work on the selected rows.
struct SelectStep {
  int x, out;
};
PEAK_FIELDS(SelectStep, x, out)

// Copies x to the hidden states of the pass, if it wants them.
struct HiddenStep {
  int x;
};
PEAK_FIELDS(HiddenStep, x)

// The logits of the pass become scale * logits, then softcap tanh(logits / softcap) unless softcap is 0.
struct LogitsStep {
  int64_t vocabulary;
  float scale, softcap;
};
PEAK_FIELDS(LogitsStep, vocabulary, scale, softcap)

class Program {
 public:
  // dtype: of the embedding tables and of the KV cache.
  explicit Program(DType dtype) : dtype_(dtype) {}

  // Adds a buffer with rows of `width` floats; returns its number.
  int Buffer(int64_t width);

  void Embed(const EmbedStep& step);
  void Norm(const NormStep& step);
  void Linear(const LinearStep& step, std::shared_ptr<Weight> weight);
  void Rotary(const RotaryStep& step);
  void QKNorm(const QKNormStep& step);
  void Attention(const AttentionStep& step);
  void Combine(const CombineStep& step);
  void SelectRows(const SelectStep& step);
  void Hidden(const HiddenStep& step);
  void FinishLogits(const LogitsStep& step);
  // `gate` is null if the experts are not gated.
  void Experts(const ExpertsStep& step, std::shared_ptr<Weight> router, std::shared_ptr<ExpertWeights> gate,
               std::shared_ptr<ExpertWeights> up, std::shared_ptr<ExpertWeights> down);

  // Runs all steps. Two threads must not call it at once.
  void Run(const PassArgs& pass, int threads);

 private:
  struct State;
  using Step = std::function<void(const State&)>;

  DType dtype_;
  std::vector<int64_t> widths_;
  std::vector<Step> steps_;
  std::vector<std::function<int64_t(const PassArgs&, int)>> scratch_bytes_;  // of the steps that have a scratch
  bool selected_ = false;  // whether the steps that were added so far include SelectRows
  AlignedMemory memory_;
};

}  // namespace peak

#endif  // PEAK_PROGRAM_H_
