#include "program/program.h"

#include <algorithm>
#include <utility>

#include "attention/cache_attention.h"
#include "ops/embedding.h"
#include "ops/experts.h"
#include "ops/norm.h"
#include "ops/qk_norm.h"
#include "ops/rotary.h"

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
  args.packed_b = matrix_.packed;
  return args;
}

int64_t DenseWeight::ScratchBytes(int64_t rows, int threads) const {
  GemmArgs args{};
  args.m = rows;
  return GemmScratch(Completed(args), threads) * static_cast<int64_t>(sizeof(float));
}

void DenseWeight::Multiply(const GemmArgs& args, char* scratch) const {
  TeamGemm(Completed(args), reinterpret_cast<float*>(scratch));
}

QuantizedArgs QuantizedWeight::Completed(int64_t rows) const {
  QuantizedArgs args{};
  static_cast<QuantizedMatrix&>(args) = matrix_;
  args.rows = rows;
  return args;
}

int64_t QuantizedWeight::ScratchBytes(int64_t rows, int threads) const {
  return QuantizedScratch(Completed(rows), threads);
}

void QuantizedWeight::Multiply(const GemmArgs& args, char* scratch) const {
  const Team& team = *Team::Current();
  QuantizedArgs product = Completed(args.m);
  product.x = args.a;
  product.x_row = args.a_row;
  product.bias = args.bias;
  product.activation = args.epilogue == Epilogue::kActivate ? static_cast<int>(args.activation) : -1;
  product.y = args.c;
  product.y_row = args.c_row;
  product.float32_out = args.out_dtype == DType::kFloat32;
  QuantizeInputs(product, team.id, team.size, scratch);
  Barrier();
  MultiplyQuantized(product, team.id, team.size, scratch);
  Barrier();
}

GroupedGemmArgs DenseExperts::Completed(const GemmArgs& args) const {
  GroupedGemmArgs product{};
  static_cast<GemmArgs&>(product) = args;
  product.dtype = matrix_.dtype;
  product.n = matrix_.n;
  product.k = matrix_.k;
  product.packed_b = matrix_.packed;
  product.packed_group = matrix_.packed_group;
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
    ParallelParts(s.pass.rows * width, s.threads, s.threads, [&](int64_t, int64_t begin, int64_t end) {
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
    weight->Multiply(args, s.scratch);
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
    TeamCacheAttention(args, s.scratch);
  });
  scratch_bytes_.push_back([width = step.width](const PassArgs&, int threads) {
    return CacheAttentionScratch(width, threads);
  });
}

void Program::Combine(const CombineStep& step) {
  steps_.push_back([=, dtype = dtype_, width = widths_[step.x], selected = selected_](const State& s) {
    const int64_t rows = selected ? s.pass.logit_rows : s.pass.rows;
    const auto combine = PEAK_PICK_DTYPE(dtype, CombineRange);
    ParallelParts(rows * width, s.threads, s.threads, [&](int64_t, int64_t begin, int64_t end) {
      combine(s.buffers[step.x], s.buffers[step.y], s.buffers[step.out], step.product, begin, end);
    });
  });
}

void Program::SelectRows(const SelectStep& step) {
  const int64_t bytes = widths_[step.x] * SizeOf(dtype_);
  steps_.push_back([=](const State& s) {
    ParallelParts(s.pass.logit_rows, s.threads, s.threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(s.buffers[step.out] + i * bytes, s.buffers[step.x] + s.pass.selected[i] * bytes, bytes);
      }
    });
  });
  selected_ = true;
}

void Program::FinishLogits(const LogitsStep& step) {
  steps_.push_back([=](const State& s) {
    const auto finish = PEAK_PICK(FinishRange);
    ParallelParts(s.pass.logit_rows * step.vocabulary, s.threads, s.threads, [&](int64_t, int64_t begin, int64_t end) {
      finish(s.pass.logits, step.scale, step.softcap, begin, end);
    });
  });
}

// The memory and the calls of one ExpertsStep.
class Program::ExpertsRun {
 public:
  ExpertsRun(const ExpertsStep& step, DType dtype, int64_t rows, const Weight& router, const ExpertWeights* gate,
             const ExpertWeights& up, const ExpertWeights& down, int threads, void* memory)
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
  int64_t bytes() const { return bytes_; }

  void Route(const Weight& router, const char* x) const {
    Widen(dtype_, x, rows_ * router.k, wide_, threads_);
    GemmArgs args = Product(rows_, wide_, router.k, logits_, router.n, DType::kFloat32, step_.router_bias);
    router.Multiply(args, scratch_);
    peak::Route({rows_, step_.experts, step_.choices, logits_, step_.normalize, ids_, weights_}, threads_);
    SortChoices({choices_, step_.experts, ids_, order_, position_, offsets_}, threads_);
    GatherChoices({dtype_, choices_, step_.choices, router.k, x, order_, sorted_}, threads_);
  }

  void Hidden(const ExpertWeights* gate, const ExpertWeights& up) const {
    const bool fused = gate == nullptr || up.HasGate();
    if (gate != nullptr) {
      GemmArgs args = Product(choices_, sorted_, gate->k, gate_, gate->n, dtype_, step_.gate_bias);
      if (!fused) Activate(args, Epilogue::kActivate);
      gate->Multiply(args, offsets_, scratch_);
    }
    GemmArgs args = Product(choices_, sorted_, up.k, hidden_, up.n, dtype_, step_.up_bias);
    args.gate = gate_;
    if (fused) Activate(args, gate == nullptr ? Epilogue::kActivate : Epilogue::kGate);
    up.Multiply(args, offsets_, scratch_);
    if (fused) return;
    const auto combine = PEAK_PICK_DTYPE(dtype_, CombineRange);
    ParallelParts(choices_ * up.n, threads_, threads_, [&](int64_t, int64_t begin, int64_t end) {
      combine(gate_, hidden_, hidden_, true, begin, end);
    });
  }

  void Combine(const ExpertWeights& down, char* out) const {
    const GemmArgs args = Product(choices_, hidden_, down.k, results_, down.n, dtype_, step_.down_bias);
    down.Multiply(args, offsets_, scratch_);
    CombineChoices({dtype_, rows_, step_.choices, down.n, results_, position_, out, weights_}, threads_);
  }

 private:
  static GemmArgs Product(int64_t rows, const void* a, int64_t k, void* c, int64_t n, DType out_dtype,
                          const void* bias) {
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
  void Activate(GemmArgs& args, Epilogue epilogue) const {
    args.epilogue = epilogue;
    args.activation = step_.activation;
  }

  const ExpertsStep& step_;
  DType dtype_;
  int64_t rows_, choices_;
  int threads_;
  float *wide_, *logits_, *weights_;
  int64_t *ids_, *order_, *position_, *offsets_;
  char *sorted_, *gate_, *hidden_, *results_, *scratch_;
  int64_t bytes_;
};

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
  RunTeam(threads, [&] {
    for (const Step& step : steps_) step(state);
  });
}

}  // namespace peak

#endif  // PEAK_ISA
