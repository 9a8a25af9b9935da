#include "peaks.h"

#define PEAK_THIS_FILE "peaks.cpp"
#include "foreach_isa.h"

#ifdef PEAK_ISA

// Independent sums: two units times a latency of up to six cycles, and with both factors no more than 16 registers.
constexpr int kChains = 12;

PEAK_INLINE Vec Step(Vec sum, Vec a, Vec b) { return Fma(a, b, sum); }
PEAK_INLINE Vec Step(Vec sum, Pairs a, Pairs b) { return DotPairs(sum, a, b); }
#if PEAK_HAS_QUADS
PEAK_INLINE Ints Step(Ints sum, Quads a, Quads b) { return DotQuads(sum, a, b); }
#endif

template <class Sum, class Factor>
PEAK_INLINE void RunChains(Sum zero, Factor a, Factor b, int64_t iterations, void* out) {
  Sum sum[kChains];
  for (Sum& s : sum) s = zero;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = Step(sum[c], a, b);
  }
  std::memcpy(out, sum, sizeof(sum));  // or the compiler would see that nobody reads the sums
}

// Returns operations per iteration. `in` holds 64 bytes of factors, unknown to the compiler; `out` takes the sums.
double RunLoop(int loop, const void* in, int64_t iterations, void* out) {
  const float* f = static_cast<const float*>(in);
  const bf16* h = static_cast<const bf16*>(in);
  switch (loop) {
    case kLoopFloat32:
      RunChains(Set(0.0f), Load(f), Load(f), iterations, out);
      return 2.0 * kLanes * kChains;
    case kLoopBFloat16:
      RunChains(Set(0.0f), LoadPairs(h), LoadPairs(h), iterations, out);
      return 4.0 * kLanes * kChains;
    case kLoopInt8:
#if PEAK_HAS_QUADS
      RunChains(ZeroInts(), LoadQuads(in), LoadQuads(in), iterations, out);
      return 8.0 * kLanes * kChains;
#endif
      break;
  }
  return 0.0;
}

void ReadPart(const float* from, int64_t n, float* out) {
  Vec a = Set(0.0f), b = a, c = a, d = a;
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    a = a + Load(from + i);
    b = b + Load(from + i + kLanes);
    c = c + Load(from + i + 2 * kLanes);
    d = d + Load(from + i + 3 * kLanes);
  }
  *out = Sum((a + b) + (c + d));
}

void CopyPart(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    Stream(to + i, Load(from + i));
    Stream(to + i + kLanes, Load(from + i + kLanes));
    Stream(to + i + 2 * kLanes, Load(from + i + 2 * kLanes));
    Stream(to + i + 3 * kLanes, Load(from + i + 3 * kLanes));
  }
  EndStream();
}

#else

#include <vector>

namespace peak {
namespace {

constexpr int64_t kUnit = 64;  // floats: whole for every kLanes, and 256 bytes keep the threads' lines apart

// Room for the sums of any set, on lines of its own.
struct alignas(64) Sums {
  char bytes[12 * 64];
};

}  // namespace

double PeakLoop(int loop, int64_t iterations, int threads) {
  const std::vector<float> in(16, 1.0f);
  std::vector<Sums> out(threads);
  std::vector<double> ops(threads);
  const auto run = PEAK_PICK(RunLoop);
  ParallelParts(threads, threads, threads, [&](int64_t part, int64_t, int64_t) {
    ops[part] = run(loop, in.data(), iterations, out[part].bytes) * static_cast<double>(iterations);
  });
  double total = 0.0;
  for (const double o : ops) total += o;
  return total;
}

void PeakRead(const PeakReadArgs& args, int threads) {
  std::vector<Sums> out(threads);
  const auto read = PEAK_PICK(ReadPart);
  const float* from = static_cast<const float*>(args.from);
  ParallelParts(args.bytes / 4 / kUnit, threads, threads, [&](int64_t part, int64_t begin, int64_t end) {
    read(from + begin * kUnit, (end - begin) * kUnit, reinterpret_cast<float*>(out[part].bytes));
  });
}

void PeakCopy(const PeakCopyArgs& args, int threads) {
  const auto copy = PEAK_PICK(CopyPart);
  float* to = static_cast<float*>(args.to);
  const float* from = static_cast<const float*>(args.from);
  ParallelParts(args.bytes / 4 / kUnit, threads, threads, [&](int64_t, int64_t begin, int64_t end) {
    copy(to + begin * kUnit, from + begin * kUnit, (end - begin) * kUnit);
  });
}

}  // namespace peak

#endif  // PEAK_ISA
