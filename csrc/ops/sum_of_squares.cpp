#include "ops/sum_of_squares.h"

#define PEAK_THIS_FILE "ops/sum_of_squares.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

// Short chains in float32 are summed in double: one float32 chain over 124 million elements has an error of a percent.
template <class T>
double SumRange(const void* x, int64_t begin, int64_t end) {
  constexpr int64_t kChain = 4096;
  const T* p = static_cast<const T*>(x);
  double total = 0.0;
  for (int64_t start = begin; start < end; start += kChain) {
    const int64_t stop = start + kChain < end ? start + kChain : end;
    Vec a = Set(0.0f), b = Set(0.0f), c = Set(0.0f), d = Set(0.0f);
    int64_t i = start;
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
      const Vec e = Load(p + i), f = Load(p + i + kLanes), g = Load(p + i + 2 * kLanes), h = Load(p + i + 3 * kLanes);
      a = Fma(e, e, a);
      b = Fma(f, f, b);
      c = Fma(g, g, c);
      d = Fma(h, h, d);
    }
    for (; i < stop; i += kLanes) {
      const Vec e = Load(p + i, stop - i);
      a = Fma(e, e, a);
    }
    total += Sum(a + b + (c + d));
  }
  return total;
}

#else

namespace peak {

void SumOfSquares(const SumOfSquaresArgs& args, int threads) {
  const auto sum = PEAK_PICK_DTYPE(args.dtype, SumRange);
  double partial[kParts] = {};
  ParallelParts(args.count, kParts, threads,
                [&](int64_t part, int64_t begin, int64_t end) { partial[part] = sum(args.x, begin, end); });
  double total = 0.0;
  for (const double p : partial) total += p;
  *args.total = static_cast<float>(*args.total + total);
}

}  // namespace peak

#endif  // PEAK_ISA
