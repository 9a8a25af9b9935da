// Epilogues of a tile of sums (gemm/gemm.h). Included once per instruction set by gemm.cpp.

#include "simd/activations.h"

PEAK_INLINE Vec LoadBias(const GemmArgs& args, int64_t j, int64_t n) {
  return args.dtype == DType::kFloat32 ? Load(static_cast<const float*>(args.bias) + j, n)
                                       : Load(static_cast<const bf16*>(args.bias) + j, n);
}

// Writes one Vec of sums of row i and the n columns from j on. T is the type of pre, act, gate and dgate.
template <class T, class Out, Epilogue kEpilogue, class Act>
PEAK_INLINE void FinishVec(const GemmArgs& args, Vec sum, int64_t i, int64_t j, int64_t n) {
  Out* c = static_cast<Out*>(args.c) + i * args.c_row + j;
  T* pre = args.pre == nullptr ? nullptr : static_cast<T*>(args.pre) + i * args.n + j;
  if constexpr (kEpilogue == Epilogue::kAdd) {
    Store(c, sum + Load(c, n), n);
  } else if constexpr (kEpilogue == Epilogue::kSlope) {
    Vec slope;
    const Vec value = Act::ValueAndSlope(Load(pre, n), &slope);
    Store(c, sum * slope, n);
    if (args.act != nullptr) Store(static_cast<T*>(args.act) + i * args.n + j, value, n);
  } else if constexpr (kEpilogue == Epilogue::kGateSlope) {
    Vec slope;
    const int64_t at = i * args.n + j;
    const Vec gate = Act::ValueAndSlope(Load(static_cast<const T*>(args.gate) + at, n), &slope);
    const Vec value = Load(pre, n), up = Act::Up(value);
    Store(static_cast<T*>(args.dgate) + at, sum * up * slope, n);
    Store(c, Act::UpSlope(value, sum * gate), n);
    if (args.act != nullptr) Store(static_cast<T*>(args.act) + at, gate * up, n);
  } else {
    if (args.bias != nullptr) sum = sum + LoadBias(args, j, n);
    if constexpr (kEpilogue == Epilogue::kActivate) {
      if (pre != nullptr) Store(pre, sum, n);
      sum = Act::Value(sum);
    } else if constexpr (kEpilogue == Epilogue::kGate) {
      if (pre != nullptr) Store(pre, sum, n);
      sum = Act::Value(Load(static_cast<const T*>(args.gate) + i * args.n + j, n)) * Act::Up(sum);
    }
    Store(c, sum, n);
  }
}

// Requests the memory that FinishTile reads and writes. A tile of few slots is computed in less time than its rows need
// to arrive from the last-level cache.
PEAK_INLINE void PrefetchTile(const GemmArgs& args, int64_t row, int64_t column) {
  const int64_t size = SizeOf(args.out_dtype), pre_size = SizeOf(RowsDType(args));
  for (int64_t i = row; i < std::min<int64_t>(row + kRows, args.m); ++i) {
    const char* const c = static_cast<const char*>(args.c) + (i * args.c_row + column) * size;
    for (int64_t at = 0; at < kColumns * size; at += kCacheLine) __builtin_prefetch(c + at, 1);
    if (args.pre == nullptr) continue;
    const char* const pre = static_cast<const char*>(args.pre) + (i * args.n + column) * pre_size;
    for (int64_t at = 0; at < kColumns * pre_size; at += kCacheLine) __builtin_prefetch(pre + at, 1);
  }
}

template <class T, class Out, Epilogue kEpilogue, class Act>
void Finish(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  const int64_t rows = std::min<int64_t>(kRows, args.m - row), columns = std::min<int64_t>(kColumns, args.n - column);
  for (int64_t i = 0; i < rows; ++i, sums += kColumns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      FinishVec<T, Out, kEpilogue, Act>(args, Load(sums + j), row + i, column + j, columns - j);
    }
  }
}

// The result of an activation has the type of the rows: every other combination would cost a second of compilation.
template <class T, Epilogue kEpilogue>
void FinishWith(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  switch (args.activation) {
    case Activation::kGeluTanh: return Finish<T, T, kEpilogue, GeluTanh<T>>(args, sums, row, column);
    case Activation::kGeluErf: return Finish<T, T, kEpilogue, GeluErf>(args, sums, row, column);
    case Activation::kRelu: return Finish<T, T, kEpilogue, Relu>(args, sums, row, column);
    case Activation::kSilu: return Finish<T, T, kEpilogue, Silu<T>>(args, sums, row, column);
    case Activation::kClampedSwiglu: return Finish<T, T, kEpilogue, ClampedSwiglu<T>>(args, sums, row, column);
    case Activation::kClampedUp: return;
  }
}

template <class T, Epilogue kEpilogue>
void FinishSum(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  args.out_dtype == DType::kFloat32 ? Finish<T, float, kEpilogue, void>(args, sums, row, column)
                                    : Finish<T, bf16, kEpilogue, void>(args, sums, row, column);
}

template <class T>
void FinishTileOf(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  switch (args.epilogue) {
    case Epilogue::kStore: return FinishSum<T, Epilogue::kStore>(args, sums, row, column);
    case Epilogue::kAdd: return FinishSum<T, Epilogue::kAdd>(args, sums, row, column);
    case Epilogue::kActivate: return FinishWith<T, Epilogue::kActivate>(args, sums, row, column);
    case Epilogue::kSlope: return FinishWith<T, Epilogue::kSlope>(args, sums, row, column);
    case Epilogue::kGate: return FinishWith<T, Epilogue::kGate>(args, sums, row, column);
    case Epilogue::kGateSlope: return FinishWith<T, Epilogue::kGateSlope>(args, sums, row, column);
  }
}

void FinishTile(const GemmArgs& args, const float* sums, int64_t row, int64_t column) {
  RowsDType(args) == DType::kFloat32 ? FinishTileOf<float>(args, sums, row, column)
                                     : FinishTileOf<bf16>(args, sums, row, column);
}
