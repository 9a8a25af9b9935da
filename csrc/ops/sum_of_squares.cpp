#include "ops/sum_of_squares.h"

#include <vector>

#ifndef PEAK_ISA
namespace peak {
namespace {

// A tensor and its place in the buffer that all tensors of a call form.
struct SumPiece {
  const void* x;
  int64_t start, count;
  int64_t stop() const { return start + count; }
};
struct SumPieces {
  const SumPiece* at;
  int64_t count;
};

}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "ops/sum_of_squares.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

// Short chains in float32 are summed in double: one float32 chain over 124 million elements has an error of a percent.
constexpr int64_t kChain = 4096;

template <class T>
PEAK_INLINE float SumChain(const T* p, int64_t stop) {
  Vec a = Set(0.0f), b = Set(0.0f), c = Set(0.0f), d = Set(0.0f);
  int64_t i = 0;
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
  return Sum(a + b + (c + d));
}

// Copies elements [start, stop) of the buffer that the pieces from `piece` on form.
template <class T>
void Gather(const SumPieces& pieces, int64_t piece, int64_t start, int64_t stop, T* out) {
  std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(stop - start));
  for (; piece < pieces.count && pieces.at[piece].start < stop; ++piece) {
    const SumPiece& from = pieces.at[piece];
    const int64_t first = from.start > start ? from.start : start, last = from.stop() < stop ? from.stop() : stop;
    if (first >= last) continue;
    std::memcpy(static_cast<void*>(out + (first - start)), static_cast<const T*>(from.x) + (first - from.start),
                sizeof(T) * static_cast<size_t>(last - first));
  }
}

template <class T>
double SumRange(const SumPieces& pieces, int64_t begin, int64_t end) {
  T gathered[kChain];
  double total = 0.0;
  int64_t piece = 0;
  for (int64_t start = begin; start < end; start += kChain) {
    const int64_t stop = start + kChain < end ? start + kChain : end;
    while (piece + 1 < pieces.count && pieces.at[piece].stop() <= start) ++piece;
    const SumPiece& current = pieces.at[piece];
    if (current.start <= start && stop <= current.stop()) {
      total += SumChain(static_cast<const T*>(current.x) + (start - current.start), stop - start);
    } else {
      Gather<T>(pieces, piece, start, stop, gathered);
      total += SumChain<T>(gathered, stop - start);
    }
  }
  return total;
}

#else

namespace peak {
namespace {

void SumPiecesOf(const std::vector<SumPiece>& all, DType dtype, float* result, int threads) {
  const auto sum = PEAK_PICK_DTYPE(dtype, SumRange);
  const SumPieces pieces{all.data(), static_cast<int64_t>(all.size())};
  double partial[kParts] = {};
  ParallelParts(all.back().stop(), threads,
                [&](int64_t part, int64_t begin, int64_t end) { partial[part] = sum(pieces, begin, end); });
  double total = 0.0;
  for (const double p : partial) total += p;
  *result = static_cast<float>(*result + total);
}

}  // namespace

void SumOfSquares(const SumOfSquaresArgs& args, int threads) {
  SumPiecesOf({{args.x, 0, args.count}}, args.dtype, args.total, threads);
}

void SumOfSquaresEach(const SumOfSquaresEachArgs& args, int threads) {
  if (args.count == 0) return;
  std::vector<SumPiece> pieces;
  int64_t start = 0;
  for (const int64_t* row = args.table; row != args.table + 2 * args.count; row += 2) {
    pieces.push_back({reinterpret_cast<const void*>(static_cast<uintptr_t>(row[1])), start, row[0]});
    start += (row[0] + kSumAlign - 1) / kSumAlign * kSumAlign;
  }
  SumPiecesOf(pieces, args.dtype, args.total, threads);
}

}  // namespace peak

#endif  // PEAK_ISA
