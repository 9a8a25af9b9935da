// A model's forward pass as a list of steps over buffers, run by one team of threads from the first to the last: what
// generates text makes many small steps, and a region of threads, or a call from Python, for each would cost more.
//
// Rows are tokens, of any number of sequences one after the other. Every step's result for a row depends on that row and
// its sequence's past alone, to the last bit.
#ifndef PEAK_PROGRAM_H_
#define PEAK_PROGRAM_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "gemm/gemm.h"
#include "gemm/quantized.h"
#include "base/types.h"

namespace peak {

// One pass: the new tokens, where they stand, and where results go.
struct PassArgs {
  int64_t rows;
  const int64_t* ids;        // (rows)
  const int64_t* positions;  // (rows): tokens before each in its sequence
  int64_t sequences;
  const int64_t* begins;  // (sequences + 1): rows of each
  const int64_t* past;    // (sequences): tokens in the cache
  const int32_t* tables;  // (sequences, table_row): their blocks, see cache_attention.h
  int64_t table_row;
  bool bytes;  // in the cache
  void* keys;  // (layers, blocks, kv_heads, kCacheBlock x width), see cache_attention.h
  void* values;
  int64_t layer_bytes;
  int64_t taken;        // rows whose logits are wanted
  const int64_t* take;  // (taken)
  float* logits;        // (taken, vocabulary)
};

// A weight (n, k), and what multiplies x (rows, k) by its transpose.
class Weight {
 public:
  Weight(int64_t n_, int64_t k_) : n(n_), k(k_) {}
  virtual ~Weight() = default;
  virtual int64_t Scratch(int64_t rows, int threads) const = 0;  // floats
  // c = epilogue(a w^T); args holds rows, a, c and the epilogue. Called by each thread of a team.
  virtual void Multiply(const GemmArgs& args, float* scratch) const = 0;
  const int64_t n, k;
};

// float32 or bf16, as PackB left it in memory that outlives this.
class DenseWeight : public Weight {
 public:
  DenseWeight(DType dtype, int64_t n, int64_t k, const float* packed) : Weight(n, k), dtype_(dtype), packed_(packed) {}
  int64_t Scratch(int64_t rows, int threads) const override;
  void Multiply(const GemmArgs& args, float* scratch) const override;

 private:
  DType dtype_;
  const float* packed_;
};

// 8 or 4 bits; kStore and kActivate only.
class QuantizedWeight : public Weight {
 public:
  explicit QuantizedWeight(const QuantizedArgs& weight) : Weight(weight.n, weight.k), weight_(weight) {}
  int64_t Scratch(int64_t rows, int threads) const override;
  void Multiply(const GemmArgs& args, float* scratch) const override;

 private:
  QuantizedArgs weight_;  // dtype, bits, n, k, block, weight and scale of it
};

class Program {
 public:
  explicit Program(DType dtype) : dtype_(dtype) {}

  // Rows of a new buffer are this wide; returns its number.
  int Buffer(int64_t width);

  // out = wte[id] + wpe[position].
  void Embed(int out, const void* wte, int64_t wte_row, const void* wpe, int64_t wpe_row);
  // sum = x + residual, out = norm(sum); residual < 0: out = norm(x). rms: RMSNorm.
  void Norm(int x, int residual, int sum, int out, const void* w, DType w_dtype, const void* b, float eps, bool rms);
  // out = epilogue(x w^T + bias); gate is the buffer of kGate. out < 0: the logits.
  void Linear(int x, int out, std::shared_ptr<Weight> weight, const void* bias, Epilogue epilogue,
              Activation activation, int gate);
  // Turns the first heads of x in place; cos and sin: (positions, pairs).
  void Rotary(int x, int64_t width, int64_t turned, const float* cos, const float* sin, int64_t pairs,
              bool interleaved);
  // x holds heads + 2 kv_heads of this width: queries, keys, values.
  void Attend(int x, int out, int64_t layer, int64_t heads, int64_t kv_heads, int64_t width, int64_t window,
              float scale, const float* alibi);
  // out = x + y, or x y.
  void Combine(int x, int y, int out, bool product);
  // Leaves the rows whose logits are wanted: all steps that follow are for those.
  void Take(int x, int out);

  // Not for two callers at once.
  void Run(const PassArgs& pass, int threads);

 private:
  struct State;
  using Step = std::function<void(const State&)>;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };

  DType dtype_;
  std::vector<int64_t> widths_;
  std::vector<Step> steps_;
  std::vector<std::function<int64_t(const PassArgs&, int)>> scratch_;  // bytes that a step takes
  bool taken_ = false;  // while steps are added: whether Take was
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace peak

#endif  // PEAK_PROGRAM_H_
