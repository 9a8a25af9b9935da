#include "ops/cross_entropy.h"

#include "base/memory.h"

#ifndef PEAK_ISA
namespace peak {
namespace {

// A row is read from memory once, in chunks that stay in L1 between their two passes.
constexpr int64_t kChunk = 4096;
constexpr float kLog2E = 1.4426950408889634f;

// Workspace of a row.
struct Scratch {
  float* powers;  // (vocab): e^(z - m) for the m of their chunk; unused for float32, whose powers overwrite the logits
  float* maxima;  // m after each chunk
  float* capped;  // (vocab): the logits after the softcap; unused without one
};

}  // namespace
}  // namespace peak
#endif

#define PEAK_THIS_FILE "ops/cross_entropy.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

#include "simd/activations.h"

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
  float m = MaxOf(Max(Max(a.v[0], a.v[1]), Max(a.v[2], a.v[3])));
  for (; i < n; ++i) m = At(z + i) > m ? At(z + i) : m;
  return m;
}

// Returns the sum of e^(z - m). kKeep: also stores these powers, in the order of LoadTwo.
template <class T, bool kKeep>
PEAK_INLINE float ChunkPowers(const T* z, int64_t n, float m, float* powers) {
  const Vec log2e = Set(kLog2E), minus = Set(m), zero = Set(0.0f);
  Many<4> sum = {{zero, zero, zero, zero}};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    PrefetchTwo(z + i + kChunk);
    PrefetchTwo(z + i + kChunk + 2 * kLanes);
    const Many<4> p = Exp2<float>((LoadRows<2>(z + i, 2 * kLanes) - minus) * log2e);
    if (kKeep) StoreRows<false, 2>(powers + i, 2 * kLanes, p);
    sum = sum + p;
  }
  float tail = 0.0f;
  for (; i < n; ++i) {
    float lanes[kLanes];
    Store(lanes, Exp2<float>((Load(z + i, 1) - minus) * log2e));
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

// The online softmax of a row: its largest logit m and l, the sum of e^(z - m).
struct Stats {
  float m, l;
  PEAK_INLINE double Log() const { return std::log(static_cast<double>(l)); }
  PEAK_INLINE double Lse() const { return m + Log(); }
  PEAK_INLINE double LogProbability(float z) const { return static_cast<double>(z) - m - Log(); }
  PEAK_INLINE void Save(float* to) const { to[0] = m, to[1] = l; }
};

// The gradient of a row of logits: e^(z - m) / l * share - even. At() is the gradient of the target, without
// cancellation.
struct RowGradient {
  float scale, share, even, spread;
  PEAK_INLINE RowGradient(float scale_, const Stats& stats, float smoothing, float z_loss, int64_t vocab)
      : scale(scale_), even(smoothing / vocab * scale_) {
    const float pull = z_loss == 0.0f ? 0.0f : static_cast<float>(2.0 * z_loss * stats.Lse());  // may be infinite
    share = (1.0f + pull) * scale;
    spread = pull + smoothing;
  }
  // e^d - 1 keeps its digits if the probability of the target is near 1.
  PEAK_INLINE float At(double log_probability) const {
    return share * std::expm1(static_cast<float>(log_probability)) + scale * spread - even;
  }
};

// out = powers * scale - even. Prefetches the next row.
template <class T>
PEAK_INLINE void ChunkScale(const float* powers, int64_t n, float scale, float even, T* out, const T* next) {
  const Vec s = Set(scale), e = Set(-even);
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    PrefetchTwoToL2(next + i);
    PrefetchTwoToL2(next + i + 2 * kLanes);
    StoreRows<false, 2>(out + i, 2 * kLanes, Fma(LoadRows<2>(powers + i, 2 * kLanes), s, e));
  }
  for (; i < n; i += kLanes) Store(out + i, Fma(Load(powers + i, n - i), s, e), n - i);
}

PEAK_INLINE float* Powers(float* z, const Scratch&) { return z; }
PEAK_INLINE float* Powers(bf16*, const Scratch& scratch) { return scratch.powers; }

// Returns m and l. kKeep: overwrites z with its gradient. A row with NaN or infinity gives NaN, as in torch: the
// maximum may miss a NaN, but the sum does not.
template <class T, bool kKeep>
PEAK_INLINE Stats Row(T* z, int64_t vocab, int64_t target, float scale, float smoothing, float z_loss,
                      const Scratch& scratch) {
  const float at_target = kKeep ? At(z + target) : 0.0f;
  float* powers = Powers(z, scratch);
  float m = -1e30f, l = 0.0f;  // m is finite: a chunk of -inf only would give -inf - -inf
  for (int64_t begin = 0, chunk = 0; begin < vocab; begin += kChunk, ++chunk) {
    const int64_t n = vocab - begin < kChunk ? vocab - begin : kChunk;
    const float m_new = ChunkMax(z + begin, n, m), alpha = std::exp(m - m_new);
    l = l * alpha + ChunkPowers<T, kKeep>(z + begin, n, m_new, powers + begin);
    scratch.maxima[chunk] = m = m_new;
  }
  const Stats stats = {m, l};
  if (!kKeep) return stats;
  const RowGradient gradient(scale, stats, smoothing, z_loss, vocab);
  for (int64_t begin = 0, chunk = 0; begin < vocab; begin += kChunk, ++chunk) {
    const int64_t n = vocab - begin < kChunk ? vocab - begin : kChunk;
    const float factor = gradient.share / l * std::exp(scratch.maxima[chunk] - m);
    ChunkScale(powers + begin, n, factor, gradient.even, z + begin, z + begin + vocab);
  }
  Store(z + target, Set(gradient.At(stats.LogProbability(at_target))), 1);
  return stats;
}

template <class T>
PEAK_INLINE void ZeroRow(T* z, int64_t vocab) {
  for (int64_t i = 0; i < vocab; i += kLanes) Store(z + i, Set(0.0f), vocab - i);
}

// capped = softcap tanh(z / softcap).
template <class T>
PEAK_NOINLINE void CapRow(const T* z, int64_t vocab, float softcap, float* capped) {
  const Vec limit = Set(softcap), inverse = Set(1.0f / softcap);
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const int64_t n = vocab - i;
    Store(capped + i, Tanh::Value(Load(z + i, n) * inverse) * limit, n);
  }
}

// Overwrites a row of logits with their gradient: that of the capped logits times the slope of the cap.
template <class T>
PEAK_NOINLINE void UncapGradient(const float* gradient, int64_t vocab, float softcap, T* z) {
  const Vec inverse = Set(1.0f / softcap);
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const int64_t n = vocab - i;
    Vec slope;
    Tanh::ValueAndSlope(Load(z + i, n) * inverse, &slope);
    Store(z + i, Load(gradient + i, n) * slope, n);
  }
}

// The loss of a row, and its gradient over z. z are logits after any softcap.
template <class T>
PEAK_INLINE void ForwardRow(const CrossEntropyForwardArgs& args, T* z, float factor, const Scratch& scratch,
                            int64_t row) {
  const int64_t target = args.target[row];
  const float at_target = At(z + target), e = args.smoothing;
  const float mean = e == 0.0f ? 0.0f : SumRow(z, args.vocab) / args.vocab;
  const float scale = factor * (args.weight == nullptr ? 1.0f : args.weight[row]);
  const Stats stats = args.with_gradient ? Row<T, true>(z, args.vocab, target, scale, e, args.z_loss, scratch)
                                         : Row<T, false>(z, args.vocab, target, 0.0f, e, args.z_loss, scratch);
  stats.Save(args.stats + 2 * row);
  double loss = -stats.LogProbability(at_target);
  if (e != 0.0f) loss += e * (static_cast<double>(at_target) - mean);
  if (args.z_loss != 0.0f) loss += args.z_loss * stats.Lse() * stats.Lse();
  args.loss[row] = static_cast<float>(loss);
}

template <class T>
void ForwardRows(const CrossEntropyForwardArgs& args, const Scratch& scratch, int64_t begin, int64_t end) {
  const float factor = args.scale == nullptr ? 1.0f : *args.scale;
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    args.loss[row] = 0.0f;
    Stats{0.0f, 0.0f}.Save(args.stats + 2 * row);
    if (args.target[row] == args.ignore_index) {
      if (args.with_gradient) ZeroRow(z, args.vocab);
    } else if (args.softcap == 0.0f) {
      ForwardRow(args, z, factor, scratch, row);
    } else {
      CapRow(z, args.vocab, args.softcap, scratch.capped);
      ForwardRow(args, scratch.capped, factor, scratch, row);
      if (args.with_gradient) UncapGradient(scratch.capped, args.vocab, args.softcap, z);
    }
  }
}

PEAK_INLINE bool Within(int64_t i, int64_t n) { return i >= 0 && i < n; }

// The parts of a row; z are logits after any softcap.
template <class T>
PEAK_INLINE void ShardRow(const CrossEntropyShardArgs& args, T* z, const Scratch& scratch, int64_t row) {
  const bool live = args.target[row] != args.ignore_index;
  const int64_t target = args.target[row] - args.first;
  float* parts = args.parts + row * args.width;
  (live ? Row<T, false>(z, args.vocab, target, 0.0f, 0.0f, 0.0f, scratch) : Stats{0.0f, 0.0f}).Save(parts);
  parts[2] = live && Within(target, args.vocab) ? At(z + target) : 0.0f;
  if (args.width == 4) parts[3] = live ? SumRow(z, args.vocab) : 0.0f;
}

template <class T>
void ShardRows(const CrossEntropyShardArgs& args, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(const_cast<void*>(args.logits)) + row * args.vocab;  // Row<T, false> only reads
    if (args.softcap == 0.0f || args.target[row] == args.ignore_index) {
      ShardRow(args, z, scratch, row);
    } else {
      CapRow(z, args.vocab, args.softcap, scratch.capped);
      ShardRow(args, scratch.capped, scratch, row);
    }
  }
}

// Overwrites a row with its gradient. A target outside of the row belongs to another shard.
template <class T>
PEAK_INLINE void GradientRow(T* z, int64_t vocab, int64_t target, const Stats& stats, const RowGradient& gradient) {
  const bool in_shard = Within(target, vocab);
  const float target_gradient = in_shard ? gradient.At(stats.LogProbability(At(z + target))) : 0.0f;
  const Vec minus = Set(stats.m), log2e = Set(kLog2E);
  const Vec s = Set(gradient.share / stats.l), e = Set(-gradient.even);
  int64_t i = 0;
  for (; i + 4 * kLanes <= vocab; i += 4 * kLanes) {
    const Many<4> x = LoadRows<2>(z + i, 2 * kLanes);
    StoreRows<false, 2>(z + i, 2 * kLanes, Fma(Exp2<T>((x - minus) * log2e), s, e));
  }
  for (; i < vocab; i += kLanes) {
    const int64_t n = vocab - i;
    Store(z + i, Fma(Exp2<T>((Load(z + i, n) - minus) * log2e), s, e), n);
  }
  if (in_shard) Store(z + target, Set(target_gradient), 1);
}

template <class T>
void BackwardRows(const CrossEntropyBackwardArgs& args, const Scratch& scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = static_cast<T*>(args.logits) + row * args.vocab;
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      ZeroRow(z, args.vocab);
    } else {
      const Stats stats = {args.stats[2 * row], args.stats[2 * row + 1]};
      const RowGradient gradient(args.dloss[row], stats, args.smoothing, args.z_loss, args.total);
      if (args.softcap == 0.0f) {
        GradientRow(z, args.vocab, target - args.first, stats, gradient);
      } else {
        CapRow(z, args.vocab, args.softcap, scratch.capped);
        GradientRow(scratch.capped, args.vocab, target - args.first, stats, gradient);
        UncapGradient(scratch.capped, args.vocab, args.softcap, z);
      }
    }
  }
}

#else

namespace peak {
namespace {

// Calls rows(args, scratch, begin, end) for ranges of the rows, each with a workspace of its own.
template <class Args, class Rows>
void ForRows(const Args& args, bool with_powers, int threads, const Rows& rows) {
  const int64_t powers = with_powers ? args.vocab : 0, capped = args.softcap == 0.0f ? 0 : args.vocab;
  ParallelRanges(args.rows, GrainRows(args.vocab * SizeOf(args.dtype)), threads, [&](int64_t begin, int64_t end) {
    const int64_t count = powers + capped + args.vocab / kChunk + 1;
    float* const memory = reinterpret_cast<float*>(Workspace(count * static_cast<int64_t>(sizeof(float))));
    float* const rest = memory + powers;
    rows(args, {memory, rest + capped, rest}, begin, end);
  });
}

}  // namespace

void CrossEntropyForward(const CrossEntropyForwardArgs& args, int threads) {
  const bool with_powers = args.dtype == DType::kBFloat16 && args.with_gradient && args.softcap == 0.0f;
  ForRows(args, with_powers, threads, PEAK_PICK_DTYPE(args.dtype, ForwardRows));
}

void CrossEntropyShard(const CrossEntropyShardArgs& args, int threads) {
  ForRows(args, false, threads, PEAK_PICK_DTYPE(args.dtype, ShardRows));
}

void CrossEntropyBackward(const CrossEntropyBackwardArgs& args, int threads) {
  ForRows(args, false, threads, PEAK_PICK_DTYPE(args.dtype, BackwardRows));
}

}  // namespace peak

#endif  // PEAK_ISA
