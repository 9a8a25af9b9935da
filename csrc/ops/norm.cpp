// More than 300 lines: the forward and the backward pass share the loops over rows.
#include "ops/norm.h"

#include <vector>

#include "base/memory.h"

#define PEAK_THIS_FILE "ops/norm.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

constexpr float kZeros[4] = {};

// Number of rows in one step: their sums run in parallel, and w, b, dw and db are read once for all of them. The result
// of a row does not depend on the other rows. The backward pass has twice the operands, and L1 is small.
constexpr int kForwardRows = 4, kBackwardRows = 2;

// One value for each row, in the order of LoadRows.
template <int kRows>
PEAK_INLINE Many<2 * kRows> OfRows(const float* values) {
  Many<2 * kRows> m;
  for (int k = 0; k < 2 * kRows; ++k) m.v[k] = Set(values[k / 2]);
  return m;
}

// The same columns for every row, in the order of LoadRows.
template <int kRows>
PEAK_INLINE Many<2 * kRows> ForRows(const float* columns) {
  const Two two = LoadTwo(columns);
  Many<2 * kRows> m;
  for (int k = 0; k < 2 * kRows; ++k) m.v[k] = two.v[k % 2];
  return m;
}

template <int kRows>
PEAK_INLINE void Means(const Many<2 * kRows>& sums, int64_t width, float* means) {
  for (int r = 0; r < kRows; ++r) means[r] = Sum(sums.v[2 * r] + sums.v[2 * r + 1]) / static_cast<float>(width);
}

// x - mu; lanes after the end hold 0, not -mu.
template <class T>
PEAK_INLINE Vec CenteredPart(const T* x, float mu, int64_t n) {
  float part[kLanes] = {};
  Store(part, Load(x, n) - Set(mu), n);
  return Load(part);
}

template <class T>
struct Rows {
  T* at;
  int64_t stride;
};

// Prefetches 2 * kLanes columns of the kRows rows that start `after` rows later: without it memory is idle while a row
// is read for the second time. Does nothing if there are no rows.
template <int kRows, class T>
PEAK_INLINE void PrefetchRows(Rows<const T> x, int after, int64_t column) {
  if (x.at == nullptr) return;
  for (int r = 0; r < kRows; ++r) PrefetchTwoToL2(x.at + (after + r) * x.stride + column);
}

// sum = x + residual; also computes the means of the sum.
template <class T, int kRows>
PEAK_INLINE void AddRows(Rows<const T> x, Rows<const T> residual, Rows<T> sum, int64_t width, float* means) {
  auto total = OfRows<kRows>(kZeros);
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const auto v = LoadRows<kRows>(x.at + i, x.stride) + LoadRows<kRows>(residual.at + i, residual.stride);
    StoreRows<false, kRows>(sum.at + i, sum.stride, v);
    // The means are those of the rounded sums.
    total = total + (sizeof(T) == 4 ? v : LoadRows<kRows>(sum.at + i, sum.stride));
  }
  for (; i < width; i += kLanes) {
    const int64_t n = width - i;
    for (int r = 0; r < kRows; ++r) {
      T* s = sum.at + r * sum.stride + i;
      Store(s, Load(x.at + r * x.stride + i, n) + Load(residual.at + r * residual.stride + i, n), n);
      total.v[2 * r] = total.v[2 * r] + Load(s, n);
    }
  }
  Means<kRows>(total, width, means);
}

template <class T, int kRows>
PEAK_INLINE void RowMeans(Rows<const T> x, int64_t width, float* means) {
  auto total = OfRows<kRows>(kZeros);
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) total = total + LoadRows<kRows>(x.at + i, x.stride);
  for (; i < width; i += kLanes) {
    for (int r = 0; r < kRows; ++r) total.v[2 * r] = total.v[2 * r] + Load(x.at + r * x.stride + i, width - i);
  }
  Means<kRows>(total, width, means);
}

// mean((x - mu)^2). A second pass over a row in L1 is cheap, and a sum of squares would lose digits.
template <class T, int kRows>
PEAK_INLINE void Variances(Rows<const T> x, Rows<const T> next, int64_t width, const float* mu, float* variances) {
  const auto centre = OfRows<kRows>(mu);
  auto total = OfRows<kRows>(kZeros);
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    PrefetchRows<kRows>(next, kRows, i);
    const auto d = LoadRows<kRows>(x.at + i, x.stride) - centre;
    total = Fma(d, d, total);
  }
  for (; i < width; i += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      const Vec d = CenteredPart(x.at + r * x.stride + i, mu[r], width - i);
      total.v[2 * r] = Fma(d, d, total.v[2 * r]);
    }
  }
  Means<kRows>(total, width, variances);
}

// y = (x - mu) r w + b. Copies x to `copy` if it is not null.
template <class T, bool kBypass, int kRows>
PEAK_INLINE void Normalize(Rows<const T> x, Rows<const T> next, const float* mu, const float* r, const float* w,
                           const float* b, Rows<T> y, T* copy, int64_t width) {
  const auto centre = OfRows<kRows>(mu), scale = OfRows<kRows>(r);
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    PrefetchRows<kRows>(next, kRows, i);
    const auto v = LoadRows<kRows>(x.at + i, x.stride);
    const auto z = (v - centre) * scale;
    StoreRows<kBypass, kRows>(y.at + i, y.stride, Fma(z, ForRows<kRows>(w + i), ForRows<kRows>(b + i)));
    if (copy != nullptr) StoreRows<kBypass, kRows>(copy + i, y.stride, v);
  }
  for (; i < width; i += kLanes) {
    const int64_t n = width - i;
    for (int row = 0; row < kRows; ++row) {
      const Vec v = Load(x.at + row * x.stride + i, n), z = (v - Set(mu[row])) * Set(r[row]);
      Store(y.at + row * y.stride + i, Fma(z, Load(w + i, n), Load(b + i, n)), n);
      if (copy != nullptr) Store(copy + row * y.stride + i, v, n);
    }
  }
}

// sum_rows has space for kRows rows of x + residual: if stores bypass the caches, the sums stay here until they are
// normalized.
template <class T, bool kBypass, int kRows>
PEAK_INLINE void ForwardStep(const NormForwardArgs& args, const float* w, const float* b, T* sum_rows, int64_t row) {
  const int64_t width = args.width;
  const Rows<const T> first = {static_cast<const T*>(args.x) + row * args.x_stride, args.x_stride};
  Rows<const T> x = first, residual = {nullptr, args.residual_stride};
  T* sum = static_cast<T*>(args.sum) + row * width;
  float mu[kRows] = {};
  if (args.residual != nullptr) {
    const Rows<T> total = {kBypass ? sum_rows : sum, width};
    residual.at = static_cast<const T*>(args.residual) + row * args.residual_stride;
    AddRows<T, kRows>(first, residual, total, width, mu);
    x = {total.at, total.stride};
  } else if (args.mu != nullptr) {
    RowMeans<T, kRows>(x, width, mu);
  }
  for (int k = 0; k < kRows; ++k) {
    if (args.mu == nullptr) {
      mu[k] = 0.0f;
    } else {
      args.mu[row + k] = mu[k];
    }
  }
  float* r = args.r + row;
  Variances<T, kRows>(x, first, width, mu, r);
  for (int k = 0; k < kRows; ++k) r[k] = 1.0f / std::sqrt(r[k] + args.eps);
  const Rows<T> y = {static_cast<T*>(args.y) + row * width, width};
  T* copy = kBypass && args.residual != nullptr ? sum : nullptr;
  Normalize<T, kBypass, kRows>(x, residual, mu, r, w, b, y, copy, width);
}

template <class T, bool kBypass>
void ForwardRows(const NormForwardArgs& args, const float* w, const float* b, float* workspace, int64_t begin,
                 int64_t end) {
  T* sum_rows = reinterpret_cast<T*>(workspace);
  int64_t row = begin;
  for (; row + kForwardRows <= end; row += kForwardRows) {
    ForwardStep<T, kBypass, kForwardRows>(args, w, b, sum_rows, row);
  }
  for (; row < end; ++row) ForwardStep<T, kBypass, 1>(args, w, b, sum_rows, row);
  if (kBypass) EndStream();
}

// Computes mean(g) and mean(g (x - mu)) of each row, where g = dy w. Adds dy z to dw and dy to db.
template <class T, int kRows>
PEAK_INLINE void Reduce(Rows<const T> dy, Rows<const T> dsum, Rows<const T> x, const float* w, const float* mu,
                        const float* r, float* dw, float* db, int64_t width, float* mean_g, float* mean_gd) {
  const auto centre = OfRows<kRows>(mu), scale = OfRows<kRows>(r);
  auto sum_g = OfRows<kRows>(kZeros), sum_gd = sum_g;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    PrefetchRows<kRows>(dsum, 0, i);
    const auto up = LoadRows<kRows>(dy.at + i, dy.stride), d = LoadRows<kRows>(x.at + i, x.stride) - centre;
    const auto g = up * ForRows<kRows>(w + i), z = d * scale;
    sum_g = sum_g + g;
    sum_gd = Fma(g, d, sum_gd);
    Two dw_i = LoadTwo(dw + i), db_i = LoadTwo(db + i);
    for (int k = 0; k < 2 * kRows; ++k) {
      dw_i.v[k % 2] = Fma(up.v[k], z.v[k], dw_i.v[k % 2]);
      db_i.v[k % 2] = db_i.v[k % 2] + up.v[k];
    }
    StoreTwo(dw + i, dw_i);
    StoreTwo(db + i, db_i);
  }
  for (; i < width; i += kLanes) {
    const int64_t n = width - i;
    for (int row = 0; row < kRows; ++row) {
      const Vec up = Load(dy.at + row * dy.stride + i, n), g = up * Load(w + i, n);
      const Vec d = Load(x.at + row * x.stride + i, n) - Set(mu[row]);
      sum_g.v[2 * row] = sum_g.v[2 * row] + g;
      sum_gd.v[2 * row] = Fma(g, d, sum_gd.v[2 * row]);
      Store(dw + i, Fma(up, d * Set(r[row]), Load(dw + i, n)), n);
      Store(db + i, up + Load(db + i, n), n);
    }
  }
  Means<kRows>(sum_g, width, mean_g);
  Means<kRows>(sum_gd, width, mean_gd);
}

// dx = r (g - mean(g)) - (x - mu) r^3 mean(g (x - mu)) + dsum.
template <class T, bool kBypass, int kRows>
PEAK_INLINE void InputGradient(Rows<const T> dy, Rows<const T> dsum, Rows<const T> x, const float* w, const float* mu,
                               const float* r, const float* mean_g, const float* slopes, Rows<T> dx, int64_t width) {
  const auto centre = OfRows<kRows>(mu), scale = OfRows<kRows>(r);
  const auto mean = OfRows<kRows>(mean_g), slope = OfRows<kRows>(slopes);
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    PrefetchRows<kRows>(x, kRows, i);
    PrefetchRows<kRows>(dy, kRows, i);
    const auto d = LoadRows<kRows>(x.at + i, x.stride) - centre;
    const auto g = Fma(LoadRows<kRows>(dy.at + i, dy.stride), ForRows<kRows>(w + i), mean);
    const auto scaled = dsum.at == nullptr ? g * scale : Fma(g, scale, LoadRows<kRows>(dsum.at + i, dsum.stride));
    StoreRows<kBypass, kRows>(dx.at + i, dx.stride, Fma(d, slope, scaled));
  }
  for (; i < width; i += kLanes) {
    const int64_t n = width - i;
    for (int row = 0; row < kRows; ++row) {
      const Vec d = Load(x.at + row * x.stride + i, n) - Set(mu[row]);
      const Vec g = Fma(Load(dy.at + row * dy.stride + i, n), Load(w + i, n), Set(mean_g[row]));
      const Vec sum = dsum.at == nullptr ? Set(0.0f) : Load(dsum.at + row * dsum.stride + i, n);
      Store(dx.at + row * dx.stride + i, Fma(d, Set(slopes[row]), Fma(g, Set(r[row]), sum)), n);
    }
  }
}

template <class T, bool kBypass, int kRows>
PEAK_INLINE void BackwardStep(const NormBackwardArgs& args, const float* w, float* dw, float* db, int64_t row) {
  const int64_t width = args.width;
  const Rows<const T> dy = {static_cast<const T*>(args.dy) + row * args.dy_stride, args.dy_stride};
  const Rows<const T> x = {static_cast<const T*>(args.x) + row * args.x_stride, args.x_stride};
  const T* up = args.dsum == nullptr ? nullptr : static_cast<const T*>(args.dsum) + row * args.dsum_stride;
  const Rows<const T> dsum = {up, args.dsum_stride};
  const bool centered = args.mu != nullptr;
  const float *mu = centered ? args.mu + row : kZeros, *r = args.r + row;
  float mean[kRows], slope[kRows];
  Reduce<T, kRows>(dy, dsum, x, w, mu, r, dw, db, width, mean, slope);
  if (args.dx == nullptr) return;
  for (int k = 0; k < kRows; ++k) {
    mean[k] = centered ? -mean[k] : 0.0f;
    slope[k] = -(slope[k] * r[k]) * r[k] * r[k];
  }
  const Rows<T> dx = {static_cast<T*>(args.dx) + row * width, width};
  InputGradient<T, kBypass, kRows>(dy, dsum, x, w, mu, r, mean, slope, dx, width);
}

template <class T, bool kBypass>
void BackwardRows(const NormBackwardArgs& args, const float* w, float* dw, float* db, int64_t begin,
                  int64_t end) {
  int64_t row = begin;
  for (; row + kBackwardRows <= end; row += kBackwardRows) {
    BackwardStep<T, kBypass, kBackwardRows>(args, w, dw, db, row);
  }
  for (; row < end; ++row) BackwardStep<T, kBypass, 1>(args, w, dw, db, row);
  if (kBypass) EndStream();
}

// Converts parameters of type W to floats, in the order in which LoadTwo reads a row of X.
template <class X, class W>
void Widen(const void* in, int64_t width, float* out) {
  const W* from = static_cast<const W*>(in);
  int64_t i = 0;
  if (sizeof(X) == 4) {
    for (; i < width; i += kLanes) Store(out + i, Load(from + i, width - i), width - i);
  } else if (sizeof(X) == sizeof(W)) {
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) StoreTwo(out + i, LoadTwo(from + i));
  }
  for (; i < width; ++i) Store(out + PermutedIndex<X>(i, width), Load(from + i, 1), 1);
}

#else

namespace peak {
namespace {

// A parameter plus `offset`, in the order of a row of `dtype`; zeros if there is no parameter.
std::vector<float> ToFloats(const void* in, float offset, DType dtype, DType w_dtype, int64_t width) {
  std::vector<float> out(width);
  if (in == nullptr) return out;
  const auto widen = w_dtype == DType::kFloat32 ? PEAK_PICK_DTYPE(dtype, Widen, float)
                                                : PEAK_PICK_DTYPE(dtype, Widen, bf16);
  widen(in, width, out.data());
  if (offset != 0.0f) {  // 0 would change the sign of a weight of -0
    for (float& w : out) w += offset;
  }
  return out;
}

constexpr int64_t kMaxStepRows = 4;

}  // namespace

void NormForward(const NormForwardArgs& args, int threads) {
  const int64_t width = args.width, row_bytes = width * SizeOf(args.dtype), bytes = args.rows * row_bytes;
  const auto w = ToFloats(args.w, args.offset, args.dtype, args.w_dtype, width);
  const auto b = ToFloats(args.b, 0.0f, args.dtype, args.w_dtype, width);
  const bool bypass = BypassCaches(args.y, args.residual == nullptr ? bytes : 2 * bytes, row_bytes) &&
                      (args.residual == nullptr || BypassCaches(args.sum, 2 * bytes, row_bytes));
  const auto rows = bypass ? PEAK_PICK_DTYPE(args.dtype, ForwardRows, true)
                           : PEAK_PICK_DTYPE(args.dtype, ForwardRows, false);
  ParallelRanges(args.rows, GrainRows(row_bytes), threads, [&](int64_t begin, int64_t end) {
    std::vector<float> workspace(bypass && args.residual != nullptr ? kMaxStepRows * width : 0);
    rows(args, w.data(), b.data(), workspace.data(), begin, end);
  });
}

void NormBackward(const NormBackwardArgs& args, int threads) {
  const int64_t width = args.width, row_bytes = width * SizeOf(args.dtype);
  const auto w = ToFloats(args.w, args.offset, args.dtype, args.w_dtype, width);
  const bool bypass = BypassCaches(args.dx, args.rows * row_bytes, row_bytes);
  const auto rows = bypass ? PEAK_PICK_DTYPE(args.dtype, BackwardRows, true)
                           : PEAK_PICK_DTYPE(args.dtype, BackwardRows, false);
  std::vector<float> partial(2 * kParts * width);
  ParallelParts(args.rows, threads, [&](int64_t part, int64_t begin, int64_t end) {
    float* dw = partial.data() + 2 * part * width;
    rows(args, w.data(), dw, dw + width, begin, end);
  });
  const auto add = args.dtype == DType::kFloat32 ? PEAK_PICK_DTYPE(args.w_dtype, AddParts, float)
                                                 : PEAK_PICK_DTYPE(args.w_dtype, AddParts, bf16);
  if (args.dw != nullptr) add(partial.data(), 2 * width, width, args.dw, args.add_dw);
  if (args.db != nullptr) add(partial.data() + width, 2 * width, width, args.db, args.add_db);
}

}  // namespace peak

#endif  // PEAK_ISA
