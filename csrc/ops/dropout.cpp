#include "ops/dropout.h"

#define PEAK_THIS_FILE "ops/dropout.cpp"
#include "base/foreach_isa.h"

#ifdef PEAK_ISA
#include "simd/philox.h"

// Element 64 g + 16 w + l takes word w of counter 16 g + l.
constexpr int64_t kStep = 16, kGroup = 4 * kStep;

template <class T>
void DropGroups(const DropoutArgs& args, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const Vec factor = Set(static_cast<float>(1.0 / (1.0 - args.p))), zero = Set(0.0f);
  const uint32_t limit = static_cast<uint32_t>(args.p * 4294967296.0);
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int64_t group = begin; group < end; ++group) {
    for (int64_t lane = 0; lane < kStep; lane += kLanes) {
      // The 16 counters of a group have the same upper half, since 2^32 is a multiple of 16.
      const uint64_t counter = static_cast<uint64_t>(group * kStep + lane);
      Words words[] = {SetWords(static_cast<uint32_t>(counter)) + CountWords(),
                       SetWords(static_cast<uint32_t>(counter >> 32)), SetWords(0), SetWords(0)};
      Philox(key, words);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t at = group * kGroup + w * kStep + lane, left = args.count - at;
        if (left <= 0) break;
        Store(y + at, Select(NotBelow(words[w], limit), Load(x + at, left) * factor, zero), left);
      }
    }
  }
}

#else

namespace peak {

void Dropout(const DropoutArgs& args, int threads) {
  const auto drop = PEAK_PICK_DTYPE(args.dtype, DropGroups);
  ParallelRanges((args.count + 63) / 64, kGrainBytes / 256, threads,
                 [&](int64_t begin, int64_t end) { drop(args, begin, end); });
}

}  // namespace peak

#endif  // PEAK_ISA
