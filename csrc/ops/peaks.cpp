#include "ops/peaks.h"

#define PEAK_THIS_FILE "ops/peaks.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA

// Independent sums: two units times a latency of up to six cycles. With both factors they fit in 16 registers.
constexpr int kChains = 12;

PEAK_INLINE Vec Step(Vec sum, Vec a, Vec b) { return Fma(a, b, sum); }
PEAK_INLINE Vec Step(Vec sum, Pairs a, Pairs b) { return DotPairs(sum, a, b); }
PEAK_INLINE Ints Step(Ints sum, Quads a, Quads b) { return DotQuads(sum, a, b); }

template <class Sum, class Factor>
PEAK_INLINE void RunChains(Sum zero, Factor a, Factor b, int64_t iterations, void* out) {
  Sum sum[kChains];
  for (Sum& s : sum) s = zero;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = Step(sum[c], a, b);
  }
  std::memcpy(out, sum, sizeof(sum));  // otherwise the compiler drops the unused sums
}

// Returns the operations of one iteration. `in` holds 64 bytes of factors that the compiler does not know. `out`
// receives the sums.
double RunLoop(int loop, const void* in, int64_t iterations, void* out) {
  const float* f = static_cast<const float*>(in);
  const bf16* h = static_cast<const bf16*>(in);
  switch (loop) {
    case kLoopFloat32:
      RunChains(Set(0.0f), Load(f), Load(f), iterations, out);
      return 2.0 * kLanes * kChains;
    case kLoopBFloat16:
      if (!kNativePairs) return RunLoop(kLoopFloat32, in, iterations, out);  // products convert their operands
      RunChains(Set(0.0f), LoadPairs(h), LoadPairs(h), iterations, out);
      return 4.0 * kLanes * kChains;
    case kLoopInt8:
      if (!kNativeQuads) break;
      RunChains(SetInts(0), LoadQuads(in), LoadQuads(in), iterations, out);
      return 8.0 * kLanes * kChains;
  }
  return 0.0;
}

// Reads four vectors of each stream in turn, as a kernel reads its operands, and writes 1 plus their sum.
template <bool kBypass>
void StreamPart(const PeakStreamArgs& args, int64_t begin, int64_t end, float* out) {
  float* const base = static_cast<float*>(args.base);
  const int64_t stride = args.stride / 4;
  float* const to = base + (args.reads - args.updates) * stride;
  Vec total[4] = {Set(0.0f), Set(0.0f), Set(0.0f), Set(0.0f)};
  for (int64_t i = begin; i < end; i += 4 * kLanes) {
    Vec v[4] = {Set(1.0f), Set(1.0f), Set(1.0f), Set(1.0f)};
    for (int s = 0; s < args.reads; ++s) {
      for (int k = 0; k < 4; ++k) v[k] = v[k] + Load(base + s * stride + i + k * kLanes);
    }
    for (int s = 0; s < args.writes; ++s) {
      for (int k = 0; k < 4; ++k) {
        float* const p = to + s * stride + i + k * kLanes;
        kBypass && s >= args.updates ? Stream(p, v[k]) : Store(p, v[k]);
      }
    }
    for (int k = 0; k < 4; ++k) total[k] = total[k] + v[k];
  }
  if (kBypass) EndStream();
  *out = Sum((total[0] + total[1]) + (total[2] + total[3]));  // otherwise the compiler drops reads without writes
}

#else

#include <vector>

namespace peak {
namespace {

constexpr int64_t kUnit = 64;  // floats: a multiple of every 4 * kLanes, so that threads share no cache line

// Memory for the sums of any instruction set, on its own cache lines.
struct alignas(64) Sums {
  char bytes[12 * 64];
};

}  // namespace

double PeakLoop(int loop, int64_t iterations, int threads) {
  const std::vector<float> in(16, 1.0f);
  std::vector<Sums> out(threads);
  std::vector<double> ops(threads);
  const auto run = PEAK_PICK(RunLoop);
  ParallelUnits(threads, threads, [&](int64_t part) {
    ops[part] = run(loop, in.data(), iterations, out[part].bytes) * static_cast<double>(iterations);
  });
  double total = 0.0;
  for (const double o : ops) total += o;
  return total;
}

void PeakStream(const PeakStreamArgs& args, int threads) {
  std::vector<Sums> out(threads);
  const auto stream = args.past_caches ? PEAK_PICK(StreamPart<true>) : PEAK_PICK(StreamPart<false>);
  ParallelRanges(args.bytes / 4 / kUnit, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    stream(args, begin * kUnit, end * kUnit, reinterpret_cast<float*>(out[worker].bytes));
  });
}

}  // namespace peak

#endif  // PEAK_ISA
