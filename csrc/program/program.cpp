#include "program/program.h"

#include <algorithm>
#include <utility>

#include "attention/cache_attention.h"
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

void CombineRange(const float* x, const float* y, float* out, bool product, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t n = end - i;
    const Vec a = Load(x + i, n), b = Load(y + i, n);
    Store(out + i, product ? a * b : a + b, n);
  }
}

template <class T>
void EmbedRows(const EmbedStep& step, const PassArgs& pass, int64_t width, float* out, int64_t begin, int64_t end) {
  const Vec scale = Set(step.scale);
  for (int64_t row = begin; row < end; ++row) {
    const T* token = static_cast<const T*>(step.wte) + pass.ids[row] * step.wte_stride;
    const T* position = nullptr;
    if (step.wpe != nullptr) position = static_cast<const T*>(step.wpe) + pass.positions[row] * step.wpe_stride;
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t n = width - i;
      const Vec v = Load(token + i, n) * scale;
      Store(out + row * width + i, position == nullptr ? v : v + Load(position + i, n), n);
    }
  }
}

#else

namespace peak {

constexpr int64_t kFloatBytes = sizeof(float);

// ---------------------------------------------------------------------------------------------------------- weights
GemmArgs DenseWeight::Completed(GemmArgs args) const {
  args.dtype = matrix_.dtype;
  args.n = matrix_.n;
  args.k = matrix_.k;
  args.b = matrix_.w;
  args.b_col = matrix_.w_row;
  args.b_k = 1;
  args.float32_rows = true;
  return args;
}

int64_t DenseWeight::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return GemmScratch(Completed(args), threads) * kFloatBytes;
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
  product.float32_rows = true;
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
  std::vector<float*> buffers;
  char* scratch;
  int threads;
};

int Program::Buffer(int64_t width) {
  widths_.push_back(width);
  return static_cast<int>(widths_.size()) - 1;
}

void Program::Embed(const EmbedStep& step) {
  steps_.push_back([=, dtype = dtype_, width = widths_[step.out]](const State& s) {
    const auto embed = PEAK_PICK_DTYPE(dtype, EmbedRows);
    ParallelRanges(s.pass.rows, GrainRows(width * kFloatBytes), s.threads, [&](int64_t begin, int64_t end) {
      embed(step, s.pass, width, s.buffers[step.out], begin, end);
    });
  });
}

void Program::Norm(const NormStep& step) {
  steps_.push_back([=, width = widths_[step.x], selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    float* const statistics = reinterpret_cast<float*>(s.scratch);
    NormForwardArgs args{};
    args.dtype = DType::kFloat32;
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
    return 2 * pass.rows * kFloatBytes;
  });
}

void Program::Linear(const LinearStep& step, std::shared_ptr<Weight> weight) {
  scratch_bytes_.push_back([weight, selected = selected_](const PassArgs& pass, int threads) {
    return weight->ScratchBytes(selected ? pass.logit_rows : pass.rows, threads);
  });
  steps_.push_back([=, width = widths_[step.x], selected = selected_](const State& s) {
    if (step.out < 0 && s.pass.logits == nullptr) return;
    GemmArgs args{};
    args.m = selected ? s.pass.logit_rows : s.pass.rows;
    args.a = s.buffers[step.x];
    args.a_row = width;
    args.a_k = 1;
    args.c = step.out < 0 ? s.pass.logits : s.buffers[step.out];
    args.out_dtype = DType::kFloat32;
    args.c_row = weight->n;
    args.epilogue = step.epilogue;
    args.bias = step.bias;
    args.activation = step.activation;
    args.gate = step.gate < 0 ? nullptr : s.buffers[step.gate];
    weight->Multiply(args, s.scratch, s.threads);
  });
}

void Program::Rotary(const RotaryStep& step) {
  steps_.push_back([=, heads = widths_[step.x] / step.width](const State& s) {
    RotaryArgs args{};
    args.dtype = DType::kFloat32;
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
  steps_.push_back([=, row = widths_[step.x]](const State& s) {
    QKNormForwardArgs args{};
    args.dtype = DType::kFloat32;
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
    const float* qkv = s.buffers[step.x];
    const int64_t layer = step.layer * s.pass.layer_bytes;
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
    args.k = qkv + step.heads * step.width;
    args.v = qkv + (step.heads + step.kv_heads) * step.width;
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
  steps_.push_back([=, width = widths_[step.x], selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    const auto combine = PEAK_PICK(CombineRange);
    ParallelRanges(rows * width, kGrainBytes / kFloatBytes, s.threads, [&](int64_t begin, int64_t end) {
      combine(s.buffers[step.x], s.buffers[step.y], s.buffers[step.out], step.product, begin, end);
    });
  });
}

void Program::SelectRows(const SelectStep& step) {
  steps_.push_back([=, width = widths_[step.x]](const State& s) {
    ParallelRanges(s.pass.logit_rows, GrainRows(width * kFloatBytes), s.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(s.buffers[step.x] + s.pass.selected[i] * width, width, s.buffers[step.out] + i * width);
      }
    });
  });
  selected_ = true;
}

void Program::Hidden(const HiddenStep& step) {
  steps_.push_back([=, width = widths_[step.x], selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    if (s.pass.hidden == nullptr) return;
    ParallelRanges(rows, GrainRows(width * kFloatBytes), s.threads, [&](int64_t begin, int64_t end) {
      std::copy_n(s.buffers[step.x] + begin * width, (end - begin) * width, s.pass.hidden + begin * width);
    });
  });
}

void Program::FinishLogits(const LogitsStep& step) {
  steps_.push_back([=](const State& s) {
    if (s.pass.logits == nullptr) return;
    const auto finish = PEAK_PICK(FinishRange);
    const int64_t count = s.pass.logit_rows * step.vocabulary;
    ParallelRanges(count, kGrainBytes / kFloatBytes, s.threads, [&](int64_t begin, int64_t end) {
      finish(s.pass.logits, step.scale, step.softcap, begin, end);
    });
  });
}

void Program::Experts(const ExpertsStep& step, std::shared_ptr<Weight> router, std::shared_ptr<ExpertWeights> gate,
                      std::shared_ptr<ExpertWeights> up, std::shared_ptr<ExpertWeights> down) {
  const auto make_run = [=, selected = selected_](const PassArgs& pass, int threads, void* memory) {
    const int64_t rows = selected ? pass.logit_rows : pass.rows;
    return ExpertsRun(step, rows, *router, gate.get(), *up, *down, threads, memory);
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
    for (const int64_t width : widths_) state.buffers.push_back(arena.Take<float>(pass.rows * width));
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
