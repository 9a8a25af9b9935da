#include "program/program.h"

#include <algorithm>
#include <utility>

#include "attention/cache_attention.h"
#include "ops/embedding.h"
#include "ops/norm.h"
#include "ops/rotary.h"

#define PEAK_THIS_FILE "program/program.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

template <class T>
void CombineRange(const void* x, const void* y, void* out, bool product, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const Vec a = Load(static_cast<const T*>(x) + i, n), b = Load(static_cast<const T*>(y) + i, n);
    Store(static_cast<T*>(out) + i, product ? a * b : a + b, n);
  }
}

#else

namespace peak {

namespace {

GemmArgs Completed(GemmArgs args, const Weight& weight, DType dtype, const float* packed) {
  args.dtype = dtype;
  args.n = weight.n;
  args.k = weight.k;
  args.packed_b = packed;
  return args;
}

}  // namespace

int64_t DenseWeight::Scratch(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return GemmScratch(Completed(args, *this, dtype_, packed_), threads);
}

void DenseWeight::Multiply(const GemmArgs& args, float* scratch) const {
  TeamGemm(Completed(args, *this, dtype_, packed_), scratch);
}

int64_t QuantizedWeight::Scratch(int64_t rows, int threads) const {
  QuantizedArgs args = weight_;
  args.rows = rows;
  return (QuantizedScratch(args, threads) + sizeof(float) - 1) / sizeof(float);
}

void QuantizedWeight::Multiply(const GemmArgs& args, float* scratch) const {
  const Team& team = *Team::Current();
  QuantizedArgs product = weight_;
  product.rows = args.m;
  product.x = args.a;
  product.x_row = args.a_row;
  product.bias = args.bias;
  product.activation = args.epilogue == Epilogue::kActivate ? static_cast<int>(args.activation) : -1;
  product.y = args.c;
  product.y_row = args.c_row;
  product.wide = args.out_dtype == DType::kFloat32;
  QuantizeInputs(product, team.id, team.size, scratch);
  Barrier();
  MultiplyQuantized(product, team.id, team.size, scratch);
  Barrier();
}

// What a step sees of a pass.
struct Program::State {
  const PassArgs& pass;
  std::vector<char*> buffers;
  char* scratch;
  int threads;
};

int Program::Buffer(int64_t width) {
  widths_.push_back(width);
  return static_cast<int>(widths_.size()) - 1;
}

void Program::Embed(int out, const void* wte, int64_t wte_row, const void* wpe, int64_t wpe_row) {
  steps_.push_back([=, dtype = dtype_, width = widths_[out]](const State& s) {
    EmbeddingForward({dtype, 1, s.pass.rows, width, s.pass.ids, wte, wte_row, wpe, wpe_row, s.buffers[out],
                      s.pass.positions}, s.threads);
  });
}

void Program::Norm(int x, int residual, int sum, int out, const void* w, DType w_dtype, const void* b, float eps,
                   bool rms) {
  const int64_t width = widths_[x];
  steps_.push_back([=, dtype = dtype_, taken = taken_](const State& s) {
    const int64_t rows = taken ? s.pass.taken : s.pass.rows;
    const bool adds = residual >= 0;
    float* const statistics = reinterpret_cast<float*>(s.scratch);
    LayernormForward({dtype, w_dtype, rows, width, s.buffers[x], width, adds ? s.buffers[residual] : nullptr, width, w,
                      b, adds ? s.buffers[sum] : nullptr, s.buffers[out], rms ? nullptr : statistics, statistics + rows,
                      eps},
                     s.threads);
  });
  scratch_.push_back([](const PassArgs& pass, int) { return 2 * pass.rows * static_cast<int64_t>(sizeof(float)); });
}

void Program::Linear(int x, int out, std::shared_ptr<Weight> weight, const void* bias, Epilogue epilogue,
                     Activation activation, int gate) {
  scratch_.push_back([weight, taken = taken_](const PassArgs& pass, int threads) {
    return weight->Scratch(taken ? pass.taken : pass.rows, threads) * static_cast<int64_t>(sizeof(float));
  });
  const int64_t width = widths_[x];
  steps_.push_back([=, dtype = dtype_, taken = taken_](const State& s) {
    GemmArgs args{};
    args.m = taken ? s.pass.taken : s.pass.rows;
    args.a = s.buffers[x];
    args.a_row = width;
    args.a_k = 1;
    args.c = out < 0 ? static_cast<void*>(s.pass.logits) : s.buffers[out];
    args.out_dtype = out < 0 ? DType::kFloat32 : dtype;
    args.c_row = weight->n;
    args.epilogue = epilogue;
    args.bias = bias;
    args.activation = activation;
    args.gate = gate < 0 ? nullptr : s.buffers[gate];
    weight->Multiply(args, reinterpret_cast<float*>(s.scratch));
  });
}

void Program::Rotary(int x, int64_t width, int64_t turned, const float* cos, const float* sin, int64_t pairs,
                     bool interleaved) {
  const int64_t heads = widths_[x] / width;
  steps_.push_back([=, dtype = dtype_](const State& s) {
    peak::Rotary({dtype, 1, s.pass.rows, heads, width, pairs, turned, interleaved, s.buffers[x], 0, heads * width,
                  width, cos, sin, s.buffers[x], s.pass.positions}, s.threads);
  });
}

void Program::Attend(int x, int out, int64_t layer, int64_t heads, int64_t kv_heads, int64_t width, int64_t window,
                     float scale, const float* alibi) {
  const int64_t q_row = (heads + 2 * kv_heads) * width, size = SizeOf(dtype_);
  steps_.push_back([=, dtype = dtype_](const State& s) {
    const char* qkv = s.buffers[x];
    const int64_t at = layer * s.pass.layer_bytes;
    TeamCacheAttention({dtype, heads, kv_heads, width, s.pass.sequences, s.pass.begins, s.pass.past, s.pass.tables,
                        s.pass.table_row, qkv, qkv + heads * width * size, qkv + (heads + kv_heads) * width * size,
                        q_row, s.pass.bytes, static_cast<char*>(s.pass.keys) + at, static_cast<char*>(s.pass.values) + at, window,
                        scale, alibi, s.buffers[out]}, s.scratch);
  });
  scratch_.push_back([width](const PassArgs&, int threads) { return CacheAttentionScratch(width, threads); });
}

void Program::Combine(int x, int y, int out, bool product) {
  steps_.push_back([=, dtype = dtype_, width = widths_[x], taken = taken_](const State& s) {
    const int64_t rows = taken ? s.pass.taken : s.pass.rows;
    const auto combine = PEAK_PICK_DTYPE(dtype, CombineRange);
    ParallelParts(rows * width, s.threads, s.threads, [&](int64_t, int64_t begin, int64_t end) {
      combine(s.buffers[x], s.buffers[y], s.buffers[out], product, begin, end);
    });
  });
}

void Program::Take(int x, int out) {
  const int64_t bytes = widths_[x] * SizeOf(dtype_);
  steps_.push_back([=](const State& s) {
    ParallelParts(s.pass.taken, s.threads, s.threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(s.buffers[out] + i * bytes, s.buffers[x] + s.pass.take[i] * bytes, bytes);
      }
    });
  });
  taken_ = true;
}

void Program::Run(const PassArgs& pass, int threads) {
  const auto up = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  int64_t scratch = 0, used = 0;
  for (const auto& needs : scratch_) scratch = std::max(scratch, up(needs(pass, threads)));
  for (const int64_t width : widths_) used += up(pass.rows * width * SizeOf(dtype_));
  if (used + scratch > size_) {
    memory_.reset();
    size_ = 0;
    memory_.reset(static_cast<char*>(::operator new(used + scratch, std::align_val_t{64})));
    size_ = used + scratch;
  }
  State state{pass, {}, memory_.get(), threads};
  char* at = memory_.get() + scratch;
  for (const int64_t width : widths_) {
    state.buffers.push_back(at);
    at += up(pass.rows * width * SizeOf(dtype_));
  }
  RunTeam(threads, [&] {
    for (const Step& step : steps_) step(state);
  });
}

}  // namespace peak

#endif  // PEAK_ISA
