#include "ops/muon.h"

#include <algorithm>
#include <vector>

#include "base/memory.h"
#include "gemm/gemm.h"

#ifndef PEAK_ISA
namespace peak {
namespace {

struct MuonMatrix {
  void* param;
  const void* grad;
  int16_t* remainder;
  float* momentum_buffer;
};

// The values that are the same for every element.
struct MuonStep {
  float gradient_scale, momentum, fresh, decay, size, a, b, c;
  bool nesterov;
};

}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "ops/muon.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "ops/master_weights.h"

// Updates the momentum of elements [begin, end), writes the update and returns the sum of its squares. Short chains in
// float32 are summed in double.
template <class T>
double AddMomentum(const MuonMatrix& matrix, const MuonStep& step, int64_t begin, int64_t end, float* update) {
  constexpr int64_t kChain = 4096;
  const T* grad = static_cast<const T*>(matrix.grad);
  const Vec scale = Set(step.gradient_scale), momentum = Set(step.momentum), fresh = Set(step.fresh);
  double total = 0.0;
  for (int64_t start = begin; start < end; start += kChain) {
    const int64_t stop = start + kChain < end ? start + kChain : end;
    Vec sum = Set(0.0f);
    for (int64_t i = start; i < stop; i += kLanes) {
      const Vec g = Load(grad + i, stop - i) * scale, old = Load(matrix.momentum_buffer + i, stop - i);
      const Vec m = Fma(fresh, g - old, old);
      const Vec u = step.nesterov ? Fma(momentum, m - g, g) : m;
      Store(matrix.momentum_buffer + i, m, stop - i);
      Store(update + i, u, stop - i);
      sum = Fma(u, u, sum);
    }
    total += Sum(sum);
  }
  return total;
}

// out = factor * in, elements [begin, end).
template <class T>
void Scale(const float* in, float factor, int64_t begin, int64_t end, void* out) {
  const Vec f = Set(factor);
  for (int64_t i = begin; i < end; i += kLanes) Store(static_cast<T*>(out) + i, f * Load(in + i, end - i), end - i);
}

// out = a I + b gram + c square, rows [begin, end) of matrices of `size` rows.
template <class T>
void Polynomial(const float* gram, const float* square, const MuonStep& step, int64_t size, int64_t begin, int64_t end,
                void* out) {
  const Vec b = Set(step.b), c = Set(step.c);
  T* to = static_cast<T*>(out);
  for (int64_t i = begin * size; i < end * size; i += kLanes) {
    const int64_t n = end * size - i;
    Store(to + i, Fma(c, Load(square + i, n), b * Load(gram + i, n)), n);
  }
  for (int64_t i = begin * (size + 1); i < end * (size + 1) && i < size * size; i += size + 1) {
    Store(to + i, Fma(c, Load(square + i, 1), Fma(b, Load(gram + i, 1), Set(step.a))), 1);
  }
}

// param = decay * param - size * update, elements [begin, end).
template <class T>
void Apply(const MuonMatrix& matrix, const MuonStep& step, const void* update, int64_t begin, int64_t end) {
  T* param = static_cast<T*>(matrix.param);
  const Vec decay = Set(step.decay), size = Set(step.size);
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec u = Load(static_cast<const T*>(update) + i, end - i);
    const Vec p = LoadMaster(param, matrix.remainder, i, end - i) * decay;
    StoreMaster(param, matrix.remainder, Fnma(size, u, p), i, end - i);
  }
}

#else

namespace peak {
namespace {

constexpr float kEps = 1e-7f;             // the least norm by which a matrix is divided
constexpr int64_t kSymmetricRows = 256;   // of a product that fills the threads; smaller blocks would skip more

MuonStep StepOf(const MuonOptions& o) {
  const double scale = o.norm == nullptr ? 1.0 : std::min(1.0, o.max_norm / (*o.norm + 1e-6));
  const double rate = o.rate == nullptr ? 1.0 : *o.rate;
  return {static_cast<float>(scale),
          static_cast<float>(o.momentum),
          static_cast<float>(1.0 - o.momentum),
          static_cast<float>(1.0 - o.lr * rate * o.weight_decay),
          static_cast<float>(o.update_lr * rate),
          static_cast<float>(o.ns_a),
          static_cast<float>(o.ns_b),
          static_cast<float>(o.ns_c),
          o.nesterov};
}

// What the update of one matrix needs besides its tensors.
struct Buffers {
  Buffers(DType dtype, int64_t rows, int64_t columns, void* memory) {
    Arena arena(memory);
    const int64_t count = rows * columns, side = std::min(rows, columns), bytes = SizeOf(dtype);
    update = arena.Take<float>(count);
    for (char*& x : iterates) x = arena.Take<char>(count * bytes);
    gram = arena.Take<float>(side * side);
    square = arena.Take<float>(side * side);
    polynomial = arena.Take<char>(side * side * bytes);
    rounded = dtype == DType::kFloat32 ? reinterpret_cast<char*>(gram) : arena.Take<char>(side * side * bytes);
    used = arena.used();
  }
  float *update, *gram, *square;
  char *iterates[2], *polynomial, *rounded;  // rounded: gram in the dtype of the products
  int64_t used;
};

// c = x x^T. Only the blocks on and above the diagonal are multiplied: up to half of the FLOPs are saved.
// x (side, depth): element (i, k) is x[i row_step + k k_step].
void SymmetricProduct(DType dtype, int64_t side, int64_t depth, const char* x, int64_t row_step, int64_t k_step,
                      float* c, int threads) {
  for (int64_t i = 0; i < side; i += kSymmetricRows) {
    const char* rows = x + i * row_step * SizeOf(dtype);
    Gemm({.dtype = dtype, .out_dtype = DType::kFloat32, .m = std::min(kSymmetricRows, side - i), .n = side - i,
          .k = depth, .a = rows, .a_row = row_step, .a_k = k_step, .c = c + i * (side + 1), .c_row = side, .b = rows,
          .b_col = row_step, .b_k = k_step},
         threads);
  }
  ParallelUnits((side + kSymmetricRows - 1) / kSymmetricRows, threads, [&](int64_t unit) {
    const int64_t end = std::min(side, (unit + 1) * kSymmetricRows);
    for (int64_t j = 0; j < unit * kSymmetricRows; ++j) {
      for (int64_t i = unit * kSymmetricRows; i < end; ++i) c[i * side + j] = c[j * side + i];
    }
  });
}

void Update(const MuonMatrix& matrix, const MuonOptions& o, const MuonStep& step, void* scratch, int threads) {
  const Buffers at(o.dtype, o.rows, o.columns, scratch);
  const int64_t count = o.rows * o.columns, side = std::min(o.rows, o.columns), depth = std::max(o.rows, o.columns);
  const auto for_parts = [&](int64_t n, const auto& f) { ParallelParts(n, threads, f); };
  const auto add_momentum = PEAK_PICK_DTYPE(o.dtype, AddMomentum);
  const auto scale = PEAK_PICK_DTYPE(o.dtype, Scale);
  const auto polynomial = PEAK_PICK_DTYPE(o.dtype, Polynomial);
  const auto apply = PEAK_PICK_DTYPE(o.dtype, Apply);
  double partial[kParts] = {}, total = 0.0;
  for_parts(count, [&](int64_t part, int64_t begin, int64_t end) {
    partial[part] = add_momentum(matrix, step, begin, end, at.update);
  });
  for (const double p : partial) total += p;
  const float factor = 1.0f / std::max(static_cast<float>(std::sqrt(total)), kEps);
  char *x = at.iterates[0], *next = at.iterates[1];
  for_parts(count, [&](int64_t, int64_t begin, int64_t end) { scale(at.update, factor, begin, end, x); });

  const bool is_wide = o.rows <= o.columns;
  const int64_t row_step = is_wide ? o.columns : 1, k_step = is_wide ? 1 : o.columns;
  for (int64_t i = 0; i < o.ns_steps; ++i, std::swap(x, next)) {
    SymmetricProduct(o.dtype, side, depth, x, row_step, k_step, at.gram, threads);
    if (o.dtype != DType::kFloat32) {
      for_parts(side * side, [&](int64_t, int64_t begin, int64_t end) { scale(at.gram, 1.0f, begin, end, at.rounded); });
    }
    SymmetricProduct(o.dtype, side, side, at.rounded, side, 1, at.square, threads);
    for_parts(side, [&](int64_t, int64_t begin, int64_t end) {
      polynomial(at.gram, at.square, step, side, begin, end, at.polynomial);
    });
    // The polynomial is symmetric, so it may be the left or the right operand: x keeps its layout.
    const char *left = is_wide ? at.polynomial : x, *right = is_wide ? x : at.polynomial;
    Gemm({.dtype = o.dtype, .out_dtype = o.dtype, .m = o.rows, .n = o.columns, .k = side, .a = left, .a_row = side,
          .a_k = 1, .c = next, .c_row = o.columns, .b = right, .b_col = 1, .b_k = o.columns},
         threads);
  }
  for_parts(count, [&](int64_t, int64_t begin, int64_t end) { apply(matrix, step, x, begin, end); });
}

void UpdateAll(const std::vector<MuonMatrix>& all, const MuonOptions& o, int threads) {
  if (o.rows * o.columns == 0 || (o.norm != nullptr && !std::isfinite(*o.norm))) return;
  const MuonStep step = StepOf(o);
  const int64_t bytes = MuonScratch(o.dtype, o.rows, o.columns);
  if (o.workers == 1) {
    for (const MuonMatrix& matrix : all) Update(matrix, o, step, o.scratch, threads);
    return;
  }
  ParallelUnits(static_cast<int64_t>(all.size()), static_cast<int>(o.workers), [&](int64_t i, int worker) {
    Update(all[static_cast<size_t>(i)], o, step, static_cast<char*>(o.scratch) + worker * bytes, 1);
  });
}

template <class T>
T* Address(int64_t bits) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(bits));
}

}  // namespace

int64_t MuonScratch(DType dtype, int64_t rows, int64_t columns) { return Buffers(dtype, rows, columns, nullptr).used; }

void Muon(const MuonArgs& args, int threads) {
  UpdateAll({{args.param, args.grad, args.remainder, args.momentum_buffer}}, args, threads);
}

void MuonEach(const MuonEachArgs& args, int threads) {
  std::vector<MuonMatrix> all;
  for (const int64_t* row = args.table; row != args.table + 5 * args.count; row += 5) {
    all.push_back({Address<void>(row[1]), Address<const void>(row[2]), Address<int16_t>(row[3]),
                   Address<float>(row[4])});
  }
  UpdateAll(all, args, threads);
}

}  // namespace peak

#endif  // PEAK_ISA
