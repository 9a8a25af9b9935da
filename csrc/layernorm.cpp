#include "layernorm.h"

#include <vector>

#define PEAK_THIS_FILE "layernorm.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

template <class T>
PEAK_INLINE float RowMean(const T* x, int64_t width) {
  Vec a = Set(0.0f), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    a = a + Load(x + i);
    b = b + Load(x + i + kLanes);
    c = c + Load(x + i + 2 * kLanes);
    d = d + Load(x + i + 3 * kLanes);
  }
  for (; i < width; i += kLanes) a = a + Load(x + i, width - i);
  return Sum((a + b) + (c + d)) / static_cast<float>(width);
}

// mean((x - mu)^2): the second pass over a row that is in L1 costs less than the digits a sum of squares loses.
template <class T>
PEAK_INLINE float RowVariance(const T* x, int64_t width, float mean) {
  const Vec mu = Set(mean);
  Vec a = Set(0.0f), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    const Vec x0 = Load(x + i) - mu, x1 = Load(x + i + kLanes) - mu;
    const Vec x2 = Load(x + i + 2 * kLanes) - mu, x3 = Load(x + i + 3 * kLanes) - mu;
    a = Fma(x0, x0, a);
    b = Fma(x1, x1, b);
    c = Fma(x2, x2, c);
    d = Fma(x3, x3, d);
  }
  for (; i + kLanes <= width; i += kLanes) {
    const Vec x0 = Load(x + i) - mu;
    a = Fma(x0, x0, a);
  }
  if (i < width) {
    // Lanes past the end hold 0, not mu: subtract through the mask of what was loaded.
    float tail[kLanes] = {};
    Store(tail, Load(x + i, width - i) - mu, width - i);
    const Vec x0 = Load(tail);
    b = Fma(x0, x0, b);
  }
  return Sum((a + b) + (c + d)) / static_cast<float>(width);
}

template <class T>
PEAK_INLINE void AddRow(const T* x, const T* residual, T* sum, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    Store(sum + i, Load(x + i, n) + Load(residual + i, n), n);
  }
}

template <class T>
PEAK_INLINE void NormalizeRow(const T* x, const float* w, const float* b, T* y, int64_t width, float mean, float rstd) {
  const Vec mu = Set(mean), r = Set(rstd);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    Store(y + i, Fma((Load(x + i, n) - mu) * r, Load(w + i, n), Load(b + i, n)), n);
  }
}

template <class T>
void ForwardRows(const LayernormForwardArgs& args, const float* w, const float* b, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    if (args.residual != nullptr) {
      T* sum = static_cast<T*>(args.sum) + row * width;
      AddRow(x, static_cast<const T*>(args.residual) + row * args.residual_stride, sum, width);
      x = sum;
    }
    const float mu = RowMean(x, width);
    const float r = 1.0f / std::sqrt(RowVariance(x, width, mu) + args.eps);
    args.mu[row] = mu;
    args.r[row] = r;
    NormalizeRow(x, w, b, static_cast<T*>(args.y) + row * width, width, mu, r);
  }
}

// One row's mean(g) and mean(g z); adds dy z to dw and dy to db.
template <class T>
PEAK_INLINE void ReduceRow(const T* dy, const T* x, const float* w, float mean, float rstd, float* dw, float* db,
                           int64_t width, float* mean_g, float* mean_gz) {
  const Vec mu = Set(mean), r = Set(rstd);
  Vec sum_g = Set(0.0f), sum_gz = sum_g;
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    const Vec g = Load(dy + i, n);
    const Vec z = (Load(x + i, n) - mu) * r;
    const Vec gw = g * Load(w + i, n);
    sum_g = sum_g + gw;
    sum_gz = Fma(gw, z, sum_gz);
    Store(dw + i, Fma(g, z, Load(dw + i, n)), n);
    Store(db + i, g + Load(db + i, n), n);
  }
  *mean_g = Sum(sum_g) / static_cast<float>(width);
  *mean_gz = Sum(sum_gz) / static_cast<float>(width);
}

template <class T>
PEAK_INLINE void InputGradientRow(const T* dy, const T* dsum, const T* x, const float* w, float mean, float rstd,
                                  float mean_g, float mean_gz, T* dx, int64_t width) {
  const Vec mu = Set(mean), r = Set(rstd), mg = Set(mean_g), mgz = Set(mean_gz);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    const Vec z = (Load(x + i, n) - mu) * r;
    const Vec centred = Fnma(z, mgz, Fma(Load(dy + i, n), Load(w + i, n), Set(0.0f) - mg));
    Store(dx + i, dsum == nullptr ? centred * r : Fma(centred, r, Load(dsum + i, n)), n);
  }
}

template <class T>
void BackwardRows(const LayernormBackwardArgs& args, const float* w, float* dw, float* db, int64_t begin,
                  int64_t end) {
  const int64_t width = args.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride;
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    const float mu = args.mu[row], r = args.r[row];
    float mean_g, mean_gz;
    ReduceRow(dy, x, w, mu, r, dw, db, width, &mean_g, &mean_gz);
    if (args.dx == nullptr) continue;
    const T* dsum = args.dsum == nullptr ? nullptr : static_cast<const T*>(args.dsum) + row * args.dsum_stride;
    InputGradientRow(dy, dsum, x, w, mu, r, mean_g, mean_gz, static_cast<T*>(args.dx) + row * width, width);
  }
}

template <class T>
void Widen(const void* in, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += kLanes) Store(out + i, Load(static_cast<const T*>(in) + i, width - i), width - i);
}

#else

namespace peak {
namespace {

std::vector<float> ToFloats(const void* in, DType dtype, int64_t width) {
  std::vector<float> out(width);
  if (in == nullptr) return out;
  PEAK_PICK_DTYPE(dtype, Widen)(in, width, out.data());
  return out;
}

}  // namespace

void LayernormForward(const LayernormForwardArgs& args, int threads) {
  const auto w = ToFloats(args.w, args.w_dtype, args.width), b = ToFloats(args.b, args.w_dtype, args.width);
  const auto rows = PEAK_PICK_DTYPE(args.dtype, ForwardRows);
  ParallelParts(args.rows, threads, threads,
                [&](int64_t, int64_t begin, int64_t end) { rows(args, w.data(), b.data(), begin, end); });
}

void LayernormBackward(const LayernormBackwardArgs& args, int threads) {
  const int64_t width = args.width;
  const auto w = ToFloats(args.w, args.w_dtype, width);
  const auto rows = PEAK_PICK_DTYPE(args.dtype, BackwardRows);
  std::vector<float> partial(2 * kParts * width);
  ParallelParts(args.rows, kParts, threads, [&](int64_t part, int64_t begin, int64_t end) {
    float* dw = partial.data() + 2 * part * width;
    rows(args, w.data(), dw, dw + width, begin, end);
  });
  const auto add = PEAK_PICK_DTYPE(args.w_dtype, AddParts, float);
  if (args.dw != nullptr) add(partial.data(), 2 * width, width, args.dw);
  if (args.db != nullptr) add(partial.data() + width, 2 * width, width, args.db);
}

}  // namespace peak

#endif  // PEAK_ISA
