#include "program/program.h"

#include <algorithm>
#include <utility>

#include "attention/cache_attention.h"
#include "ops/embedding.h"
#include "ops/norm.h"
#include "ops/qk_norm.h"
#include "ops/rotary.h"
#include "program/experts.h"

#define PEAK_THIS_FILE "program/program.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"

void FinishRange(float* logits, float scale, float softcap, int64_t begin, int64_t end) {
  const float inverse = softcap == 0.0f ? 1.0f : 1.0f / softcap;
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec z = Load(logits + i, end - i) * Set(scale);
    Store(logits + i, softcap == 0.0f ? z : Tanh::Value(z * Set(inverse)) * Set(softcap), end - i);
  }
}

template <class T>
void CombineRange(const void* x, const void* y, void* out, bool product, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const Vec a = Load(static_cast<const T*>(x) + i, n), b = Load(static_cast<const T*>(y) + i, n);
    Store(static_cast<T*>(out) + i, product ? a * b : a + b, n);
  }
}

template <class T>
void ScaleRange(void* x, float scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    T* const at = static_cast<T*>(x) + i;
    Store(at, Load(at, end - i) * Set(scale), end - i);
  }
}

#else

namespace peak {

// ---------------------------------------------------------------------------------------------------------- weights
GemmArgs DenseWeight::Completed(GemmArgs args) const {
  args.dtype = matrix_.dtype;
  args.n = matrix_.n;
  args.k = matrix_.k;
  args.b = matrix_.w;
  args.b_col = matrix_.w_row;
  args.b_k = 1;
  return args;
}

int64_t DenseWeight::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return GemmScratch(Completed(args), threads) * static_cast<int64_t>(sizeof(float));
}

void DenseWeight::Multiply(const GemmArgs& args, char* scratch, int threads) const {
  Gemm(Completed(args), reinterpret_cast<float*>(scratch), threads);
}

QuantizedArgs QuantizedProduct(const QuantizedMatrix& matrix, const GemmArgs& args) {
  QuantizedArgs product{};
  static_cast<QuantizedMatrix&>(product) = matrix;
  product.rows = args.m;
  product.x = args.a;
  product.x_row = args.a_row;
  product.bias = args.bias;
  product.activation = args.epilogue == Epilogue::kActivate ? static_cast<int>(args.activation) : -1;
  product.y = args.c;
  product.y_row = args.c_row;
  product.float32_out = args.out_dtype == DType::kFloat32;
  return product;
}

int64_t QuantizedWeight::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return QuantizedScratch(QuantizedProduct(matrix_, args), threads);
}

void QuantizedWeight::Multiply(const GemmArgs& args, char* scratch, int threads) const {
  LinearQuantized(QuantizedProduct(matrix_, args), scratch, threads);
}

// ------------------------------------------------------------------------------------------------------------ steps
// The state of a pass that its steps read.
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

void Program::Embed(const EmbedStep& step) {
  steps_.push_back([=, dtype = dtype_, width = widths_[step.out]](const State& s) {
    EmbeddingForwardArgs args{};
    args.dtype = dtype;
    args.batch = 1;
    args.tokens = s.pass.rows;
    args.width = width;
    args.ids = s.pass.ids;
    args.wte = step.wte;
    args.wte_stride = step.wte_stride;
    args.wpe = step.wpe;
    args.wpe_stride = step.wpe_stride;
    args.positions = s.pass.positions;
    args.out = s.buffers[step.out];
    EmbeddingForward(args, s.threads);
    if (step.scale == 1.0f) return;
    const auto scale = PEAK_PICK_DTYPE(dtype, ScaleRange);
    ParallelRanges(s.pass.rows * width, kGrainBytes / SizeOf(dtype), s.threads, [&](int64_t begin, int64_t end) {
      scale(args.out, step.scale, begin, end);
    });
  });
}

void Program::Norm(const NormStep& step) {
  steps_.push_back([=, dtype = dtype_, width = widths_[step.x], selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    float* const statistics = reinterpret_cast<float*>(s.scratch);
    NormForwardArgs args{};
    args.dtype = dtype;
    args.w_dtype = step.w_dtype;
    args.rows = rows;
    args.width = width;
    args.x = s.buffers[step.x];
    args.x_stride = width;
    args.w = step.w;
    args.b = step.b;
    args.y = s.buffers[step.out];
    args.mu = step.rms ? nullptr : statistics;
    args.r = statistics + rows;
    args.eps = step.eps;
    args.offset = step.offset;
    if (step.residual >= 0) {
      args.residual = args.sum = s.buffers[step.residual];
      args.residual_stride = width;
    }
    NormForward(args, s.threads);
  });
  scratch_bytes_.push_back([](const PassArgs& pass, int) {
    return 2 * pass.rows * static_cast<int64_t>(sizeof(float));
  });
}

void Program::Linear(const LinearStep& step, std::shared_ptr<Weight> weight) {
  scratch_bytes_.push_back([weight, selected = selected_](const PassArgs& pass, int threads) {
    return weight->ScratchBytes(selected ? pass.logit_rows : pass.rows, threads);
  });
  const int64_t width = widths_[step.x];
  steps_.push_back([=, dtype = dtype_, selected = selected_](const State& s) {
    if (step.out < 0 && s.pass.logits == nullptr) return;
    GemmArgs args{};
    args.m = selected ? s.pass.logit_rows : s.pass.rows;
    args.a = s.buffers[step.x];
    args.a_row = width;
    args.a_k = 1;
    args.c = step.out < 0 ? static_cast<void*>(s.pass.logits) : s.buffers[step.out];
    args.out_dtype = step.out < 0 ? DType::kFloat32 : dtype;
    args.c_row = weight->n;
    args.epilogue = step.epilogue;
    args.bias = step.bias;
    args.activation = step.activation;
    args.gate = step.gate < 0 ? nullptr : s.buffers[step.gate];
    weight->Multiply(args, s.scratch, s.threads);
  });
}

void Program::Rotary(const RotaryStep& step) {
  steps_.push_back([=, dtype = dtype_, heads = widths_[step.x] / step.width](const State& s) {
    RotaryArgs args{};
    args.dtype = dtype;
    args.batch = 1;
    args.tokens = s.pass.rows;
    args.heads = heads;
    args.width = step.width;
    args.pairs = step.pairs;
    args.rotated_heads = step.rotated_heads;
    args.interleaved = step.interleaved;
    args.x = {s.buffers[step.x], 0, heads * step.width, step.width};
    args.cos = step.cos;
    args.sin = step.sin;
    args.positions = s.pass.positions;
    args.y = s.buffers[step.x];
    peak::Rotary(args, s.threads);
  });
}

void Program::QKNorm(const QKNormStep& step) {
  steps_.push_back([=, dtype = dtype_, row = widths_[step.x]](const State& s) {
    QKNormForwardArgs args{};
    args.dtype = dtype;
    args.w_dtype = step.w_dtype;
    args.batch = 1;
    args.tokens = s.pass.rows;
    args.q_heads = step.q_heads;
    args.k_heads = step.k_heads;
    args.width = step.width;
    args.joint = step.joint;
    args.x = {s.buffers[step.x], 0, row, step.width};
    args.q_norm = step.q_norm;
    args.k_norm = step.k_norm;
    args.offset = step.offset;
    args.cos = step.cos;
    args.sin = step.sin;
    args.pairs = step.pairs;
    args.interleaved = step.interleaved;
    args.eps = step.eps;
    args.y = {s.buffers[step.x], 0, row, step.width};
    args.positions = s.pass.positions;
    QKNormForward(args, s.threads);
  });
}

void Program::Attention(const AttentionStep& step) {
  steps_.push_back([=, dtype = dtype_](const State& s) {
    const char* qkv = s.buffers[step.x];
    const int64_t head_bytes = step.width * SizeOf(dtype), layer = step.layer * s.pass.layer_bytes;
    CacheAttentionArgs args{};
    args.dtype = dtype;
    args.heads = step.heads;
    args.kv_heads = step.kv_heads;
    args.width = step.width;
    args.sequences = s.pass.sequences;
    args.begins = s.pass.begins;
    args.past = s.pass.past;
    args.tables = s.pass.tables;
    args.table_row = s.pass.table_row;
    args.q = qkv;
    args.k = qkv + step.heads * head_bytes;
    args.v = qkv + (step.heads + step.kv_heads) * head_bytes;
    args.q_row = (step.heads + 2 * step.kv_heads) * step.width;
    args.int8_cache = s.pass.int8_cache;
    args.keys = static_cast<char*>(s.pass.keys) + layer;
    args.values = static_cast<char*>(s.pass.values) + layer;
    args.window = step.window;
    args.scale = step.scale;
    args.alibi = step.alibi;
    args.softcap = step.softcap;
    args.sinks = step.sinks;
    args.out = s.buffers[step.out];
    CacheAttention(args, s.scratch, s.threads);
  });
  scratch_bytes_.push_back([width = step.width](const PassArgs&, int threads) {
    return CacheAttentionScratch(width, threads);
  });
}

void Program::Combine(const CombineStep& step) {
  steps_.push_back([=, dtype = dtype_, width = widths_[step.x], selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    const auto combine = PEAK_PICK_DTYPE(dtype, CombineRange);
    ParallelRanges(rows * width, kGrainBytes / SizeOf(dtype), s.threads, [&](int64_t begin, int64_t end) {
      combine(s.buffers[step.x], s.buffers[step.y], s.buffers[step.out], step.product, begin, end);
    });
  });
}

void Program::SelectRows(const SelectStep& step) {
  const int64_t bytes = widths_[step.x] * SizeOf(dtype_);
  steps_.push_back([=](const State& s) {
    ParallelRanges(s.pass.logit_rows, GrainRows(bytes), s.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(s.buffers[step.out] + i * bytes, s.buffers[step.x] + s.pass.selected[i] * bytes, bytes);
      }
    });
  });
  selected_ = true;
}

void Program::Hidden(const HiddenStep& step) {
  const int64_t bytes = widths_[step.x] * SizeOf(dtype_);
  steps_.push_back([=, selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    char* const out = static_cast<char*>(s.pass.hidden);
    if (out == nullptr) return;
    ParallelRanges(rows, GrainRows(bytes), s.threads, [&](int64_t begin, int64_t end) {
      std::memcpy(out + begin * bytes, s.buffers[step.x] + begin * bytes, (end - begin) * bytes);
    });
  });
}

void Program::FinishLogits(const LogitsStep& step) {
  steps_.push_back([=](const State& s) {
    if (s.pass.logits == nullptr) return;
    const auto finish = PEAK_PICK(FinishRange);
    const int64_t count = s.pass.logit_rows * step.vocabulary;
    ParallelRanges(count, kGrainBytes / 4, s.threads, [&](int64_t begin, int64_t end) {
      finish(s.pass.logits, step.scale, step.softcap, begin, end);
    });
  });
}

void Program::Experts(const ExpertsStep& step, std::shared_ptr<Weight> router, std::shared_ptr<ExpertWeights> gate,
                      std::shared_ptr<ExpertWeights> up, std::shared_ptr<ExpertWeights> down) {
  const auto make_run = [=, dtype = dtype_, selected = selected_](const PassArgs& pass, int threads, void* memory) {
    const int64_t rows = selected ? pass.logit_rows : pass.rows;
    return ExpertsRun(step, dtype, rows, *router, gate.get(), *up, *down, threads, memory);
  };
  scratch_bytes_.push_back([=](const PassArgs& pass, int threads) { return make_run(pass, threads, nullptr).bytes(); });
  steps_.push_back([=](const State& s) {
    const ExpertsRun run = make_run(s.pass, s.threads, s.scratch);
    run.Route(*router, s.buffers[step.x]);
    run.Hidden(gate.get(), *up);
    run.Combine(*down, s.buffers[step.out]);
  });
}

// ------------------------------------------------------------------------------------------------------------- pass
void Program::Run(const PassArgs& pass, int threads) {
  int64_t scratch_bytes = 0;
  for (const auto& bytes : scratch_bytes_) scratch_bytes = std::max(scratch_bytes, bytes(pass, threads));
  const auto place = [&](Arena& arena) {
    State state{pass, {}, arena.Take<char>(scratch_bytes), threads};
    for (const int64_t width : widths_) state.buffers.push_back(arena.Take<char>(pass.rows * width * SizeOf(dtype_)));
    return state;
  };
  Arena counted;
  place(counted);
  Arena arena(memory_.Reserve(counted.used()));
  const State state = place(arena);
  Team::Open(threads, [&] {
    for (const Step& step : steps_) step(state);
  });
}

}  // namespace peak

#endif  // PEAK_ISA
