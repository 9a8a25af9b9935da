#include "ops/embedding.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/memory.h"

#define PEAK_THIS_FILE "ops/embedding.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

// Prefetches the table row of the token that is kAhead positions later: the processor cannot predict the order of the
// rows, and it has to translate the address of each.
template <class T, bool kBypass>
void GatherRows(const EmbeddingForwardArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 2;
  const int64_t width = args.width;
  const T* table = static_cast<const T*>(args.wte);
  for (int64_t row = begin; row < end; ++row) {
    const T* token = table + args.ids[row] * args.wte_stride;
    const T* ahead = table + args.ids[row + kAhead < end ? row + kAhead : row] * args.wte_stride;
    T* out = static_cast<T*>(args.out) + row * width;
    if (args.wpe == nullptr) {
      std::memcpy(out, token, width * sizeof(T));
      continue;
    }
    const T* position = static_cast<const T*>(args.wpe) + row % args.tokens * args.wpe_stride;
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      PrefetchTwoToL2(ahead + i);
      StoreRows<kBypass, 1>(out + i, width, LoadTwo(token + i) + LoadTwo(position + i));
    }
    for (; i < width; i += kLanes) {
      const int64_t n = width - i;
      Store(out + i, Load(token + i, n) + Load(position + i, n), n);
    }
  }
  if (kBypass) EndStream();
}

// out += the sum in float32 of the rows of dy whose numbers are in `rows`, in this order.
template <class T>
void SumRows(const void* dy_data, const int64_t* rows, int64_t count, int64_t width, void* out) {
  const T* dy = static_cast<const T*>(dy_data);
  T* total = static_cast<T*>(out);
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec sum = Load(total + i, width - i);
    for (int64_t k = 0; k < count; ++k) sum = sum + Load(dy + rows[k] * width + i, width - i);
    Store(total + i, sum, width - i);
  }
}

#else

namespace peak {
namespace {

void ScatterTokens(const EmbeddingBackwardArgs& args, int threads) {
  // Rows sorted by id, then by row: one thread sums all rows of an id, in a fixed order.
  std::vector<int64_t> rows(args.batch * args.tokens);
  std::iota(rows.begin(), rows.end(), 0);
  std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return args.ids[a] < args.ids[b]; });
  std::vector<int64_t> starts;
  for (size_t k = 0; k < rows.size(); ++k) {
    if (k == 0 || args.ids[rows[k]] != args.ids[rows[k - 1]]) starts.push_back(k);
  }
  starts.push_back(rows.size());
  const auto sum = PEAK_PICK_DTYPE(args.dtype, SumRows);
  const int64_t row_bytes = args.width * SizeOf(args.dtype);
  ParallelRanges(starts.size() - 1, GrainRows(row_bytes), threads, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = starts[k];
      sum(args.dy, &rows[first], starts[k + 1] - first, args.width,
          static_cast<char*>(args.dwte) + args.ids[rows[first]] * row_bytes);
    }
  });
}

void SumPositions(const EmbeddingBackwardArgs& args, int threads) {
  const auto sum = PEAK_PICK_DTYPE(args.dtype, SumRows);
  const int64_t row_bytes = args.width * SizeOf(args.dtype);
  ParallelRanges(args.tokens, GrainRows(args.batch * row_bytes), threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> rows(args.batch);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t b = 0; b < args.batch; ++b) rows[b] = b * args.tokens + t;
      sum(args.dy, rows.data(), args.batch, args.width, static_cast<char*>(args.dwpe) + t * row_bytes);
    }
  });
}

}  // namespace

void EmbeddingForward(const EmbeddingForwardArgs& args, int threads) {
  const int64_t row_bytes = args.width * SizeOf(args.dtype);
  const bool bypass = BypassCaches(args.out, args.batch * args.tokens * row_bytes, row_bytes);
  const auto rows = bypass ? PEAK_PICK_DTYPE(args.dtype, GatherRows, true)
                           : PEAK_PICK_DTYPE(args.dtype, GatherRows, false);
  ParallelRanges(args.batch * args.tokens, GrainRows(row_bytes), threads,
                 [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

void EmbeddingBackward(const EmbeddingBackwardArgs& args, int threads) {
  if (args.dwte != nullptr) ScatterTokens(args, threads);
  if (args.dwpe != nullptr) SumPositions(args, threads);
}

}  // namespace peak

#endif  // PEAK_ISA
