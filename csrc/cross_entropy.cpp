#include "cross_entropy.h"

#include <vector>

#ifndef PEAK_ISA
namespace peak {
namespace {

// A row is read from memory once, by chunks that stay in L1 between their maximum and their powers.
constexpr int64_t kChunk = 4096;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// What a row needs beside itself.
struct Scratch {
  float* powers;  // (vocab): e^(z - the maximum so far); unused for float32, whose powers lie in place of the logits
  float* shifts;  // a chunk's maximum so far, times log2 e
};

}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "cross_entropy.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

template <class T>
PEAK_INLINE float At(const T* z) {
  float lanes[kLanes];
  Store(lanes, Load(z, 1));
  return lanes[0];
}

template <class T>
PEAK_INLINE float ChunkMax(const T* z, int64_t n, float before) {
  Many<4> a = {{Set(before), Set(before), Set(before), Set(before)}};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) a = Max(a, LoadRows<2>(z + i, 2 * kLanes));
  float most = MaxOf(Max(Max(a.v[0], a.v[1]), Max(a.v[2], a.v[3])));
  for (; i < n; ++i) most = At(z + i) > most ? At(z + i) : most;
  return most;
}

// The sum of 2^(z log2 e - shift); with kKeep also these powers, in the order of LoadTwo.
template <class T, bool kKeep>
PEAK_INLINE float ChunkPowers(const T* z, int64_t n, float shift, float* powers) {
  const Vec log2e = Set(static_cast<float>(kLog2E)), minus = Set(-shift), zero = Set(0.0f);
  Many<4> sum = {{zero, zero, zero, zero}};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    FetchTwo(z + i + kChunk);
    FetchTwo(z + i + kChunk + 2 * kLanes);
    const Many<4> p = Exp2<float>(Fma(LoadRows<2>(z + i, 2 * kLanes), log2e, minus));
    if (kKeep) StoreRows<false, 2>(powers + i, 2 * kLanes, p);
    sum = sum + p;
  }
  float tail = 0.0f;
  for (; i < n; ++i) {
    float lanes[kLanes];
    Store(lanes, Exp2<float>(Fma(Load(z + i, 1), log2e, minus)));
    if (kKeep) powers[i] = lanes[0];
    tail += lanes[0];
  }
  return Sum((sum.v[0] + sum.v[1]) + (sum.v[2] + sum.v[3])) + tail;
}

// Sum of a row of logits.
template <class T>
PEAK_INLINE float SumRow(const T* z, int64_t vocab) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t end = vocab - begin < kChunk ? vocab : begin + kChunk;
    Vec sum = Set(0.0f);
    for (int64_t i = begin; i < end; i += kLanes) sum = sum + Load(z + i, end - i);
    total += Sum(sum);
  }
  return static_cast<float>(total);
}

// The gradient of a row of logits: probability * share - even, and at the target, without cancelling, `At`.
struct RowGradient {
  float scale, share, even, spread;
  PEAK_INLINE RowGradient(float scale_, float lse, float smoothing, float z_loss, int64_t vocab)
      : scale(scale_), even(smoothing / vocab * scale_) {
    const float pull = z_loss == 0.0f ? 0.0f : 2.0f * z_loss * lse;  // lse may be infinite
    share = (1.0f + pull) * scale;
    spread = pull + smoothing;
  }
  // e^d - 1 keeps its digits where the model is sure of the target.
  PEAK_INLINE float At(float log_probability) const {
    return share * std::expm1(log_probability) + scale * spread - even;
  }
};

// out = powers * scale - even; meanwhile the next row is fetched.
template <class T>
PEAK_INLINE void ChunkScale(const float* powers, int64_t n, float scale, float even, T* out, const T* next) {
  const Vec s = Set(scale), e = Set(-even);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    FetchTwoToL2(next + i);
    FetchTwoToL2(next + i + 2 * kLanes);
    StoreRows<false, 2>(out + i, 2 * kLanes, Fma(LoadRows<2>(powers + i, 2 * kLanes), s, e));
  }
  for (; i < n; i += kLanes) Store(out + i, Fma(Load(powers + i, n - i), s, e), n - i);
}

PEAK_INLINE float* Powers(float* z, const Scratch&) { return z; }
PEAK_INLINE float* Powers(bf16*, const Scratch& scratch) { return scratch.powers; }

// Returns the row's lse; with kKeep z becomes its gradient. A NaN or infinite row gives NaN,
// as torch does: the maximum may miss a NaN, the sum does not.
template <class T, bool kKeep>
PEAK_INLINE float Row(T* z, int64_t vocab, int64_t target, float scale, float smoothing, float z_loss,
                      const Scratch& scratch) {
  const float at_target = kKeep ? At(z + target) : 0.0f;
  float* powers = Powers(z, scratch);
  float most = -INFINITY, shift = 0.0f, total = 0.0f;
  for (int64_t begin = 0, chunk = 0; begin < vocab; begin += kChunk, ++chunk) {
    const int64_t n = vocab - begin < kChunk ? vocab - begin : kChunk;
    most = ChunkMax(z + begin, n, most);
    // Finite, or a chunk of -inf alone would give powers of -inf - -inf.
    const float next = (most < -1e30f ? -1e30f : most) * static_cast<float>(kLog2E);
    total = (chunk == 0 ? 0.0f : total * std::exp2(shift - next)) +
            ChunkPowers<T, kKeep>(z + begin, n, next, powers + begin);
    scratch.shifts[chunk] = shift = next;
  }
  const float lse = static_cast<float>(shift * kLn2 + std::log(static_cast<double>(total)));
  if (!kKeep) return lse;
  const RowGradient gradient(scale, lse, smoothing, z_loss, vocab);
  for (int64_t begin = 0, chunk = 0; begin < vocab; begin += kChunk, ++chunk) {
    const int64_t n = vocab - begin < kChunk ? vocab - begin : kChunk;
    const float factor = gradient.share / total * std::exp2(scratch.shifts[chunk] - shift);
    ChunkScale(powers + begin, n, factor, gradient.even, z + begin, z + begin + vocab);
  }
  Store(z + target, Set(gradient.At(at_target - lse)), 1);
  return lse;
}

template <class T>
PEAK_INLINE void ZeroRow(T* z, int64_t vocab) {
  for (int64_t i = 0; i < vocab; i += kLanes) Store(z + i, Set(0.0f), vocab - i);
}

template <class T>
void ForwardRows(const CrossEntropyForwardArgs& args, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    const int64_t target = args.target[row];
    args.loss[row] = args.lse[row] = 0.0f;
    if (target == args.ignore_index) {
      if (args.with_gradient) ZeroRow(z, args.vocab);
      continue;
    }
    const float at_target = At(z + target), e = args.smoothing;
    const float even = e == 0.0f ? 0.0f : e * SumRow(z, args.vocab) / args.vocab;
    const float scale = args.weight == nullptr ? args.scale : args.scale * args.weight[row];
    const float lse = args.with_gradient ? Row<T, true>(z, args.vocab, target, scale, e, args.z_loss, scratch)
                                         : Row<T, false>(z, args.vocab, target, 0.0f, e, args.z_loss, scratch);
    args.lse[row] = lse;
    args.loss[row] = lse - at_target;
    if (e != 0.0f) args.loss[row] += e * at_target - even;
    if (args.z_loss != 0.0f) args.loss[row] += args.z_loss * lse * lse;
  }
}

PEAK_INLINE bool Within(int64_t i, int64_t n) { return i >= 0 && i < n; }

template <class T>
void PartsRows(const CrossEntropyPartsArgs& args, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    const bool live = args.target[row] != args.ignore_index;
    const int64_t target = args.target[row] - args.first;
    args.lse[row] = live ? Row<T, false>(z, args.vocab, target, 0.0f, 0.0f, 0.0f, scratch) : 0.0f;
    args.z_target[row] = live && Within(target, args.vocab) ? At(z + target) : 0.0f;
    if (args.sum != nullptr) args.sum[row] = live ? SumRow(z, args.vocab) : 0.0f;
  }
}

// A target outside of the row belongs to another shard.
template <class T>
PEAK_INLINE void GradientRow(T* z, int64_t vocab, int64_t target, float lse, const RowGradient& gradient) {
  const bool here = Within(target, vocab);
  const float hit = here ? gradient.At(At(z + target) - lse) : 0.0f;
  const Vec minus = Set(lse), log2e = Set(static_cast<float>(kLog2E)), s = Set(gradient.share), e = Set(-gradient.even);
  int64_t i = 0;
  for (; i + 4 * kLanes <= vocab; i += 4 * kLanes) {
    const Many<4> x = LoadRows<2>(z + i, 2 * kLanes);
    StoreRows<false, 2>(z + i, 2 * kLanes, Fma(Exp2<T>((x - minus) * log2e), s, e));
  }
  for (; i < vocab; i += kLanes) {
    const int64_t n = vocab - i;
    Store(z + i, Fma(Exp2<T>((Load(z + i, n) - minus) * log2e), s, e), n);
  }
  if (here) Store(z + target, Set(hit), 1);
}

template <class T>
void BackwardRows(const CrossEntropyBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      ZeroRow(z, args.vocab);
    } else {
      GradientRow(z, args.vocab, target - args.first, args.lse[row],
                  RowGradient(args.dloss[row], args.lse[row], args.smoothing, args.z_loss, args.total));
    }
  }
}

#else

namespace peak {

void CrossEntropyForward(const CrossEntropyForwardArgs& args, int threads) {
  const auto rows = PEAK_PICK_DTYPE(args.dtype, ForwardRows);
  const int64_t powers = args.dtype == DType::kBFloat16 && args.with_gradient ? args.vocab : 0;
  ParallelParts(args.rows, threads, threads, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> held(powers + args.vocab / kChunk + 1);
    rows(args, {held.data(), held.data() + powers}, begin, end);
  });
}

void CrossEntropyParts(const CrossEntropyPartsArgs& args, int threads) {
  const auto rows = PEAK_PICK_DTYPE(args.dtype, PartsRows);
  ParallelParts(args.rows, threads, threads, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> shifts(args.vocab / kChunk + 1);
    rows(args, {nullptr, shifts.data()}, begin, end);
  });
}

void CrossEntropyBackward(const CrossEntropyBackwardArgs& args, int threads) {
  const auto rows = PEAK_PICK_DTYPE(args.dtype, BackwardRows);
  ParallelParts(args.rows, threads, threads, [&](int64_t, int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace peak

#endif  // PEAK_ISA
