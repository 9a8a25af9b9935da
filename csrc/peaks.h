// What the machine can do at best: work of a known amount, for the clock in kernels/clock.py to time.
#ifndef PEAK_PEAKS_H_
#define PEAK_PEAKS_H_

#include <cstdint>

namespace peak {

enum Loop : int { kLoopFloat32 = 0, kLoopBFloat16 = 1, kLoopInt8 = 2 };

// Multiply-adds that stay in registers, on each of `threads` threads; `loop` is a Loop. Returns the operations done by
// all of them (a multiply-add is 2), or 0 where the active instruction set has none for the type.
double PeakLoop(int loop, int64_t iterations, int threads);

struct PeakReadArgs {
  const void* from;
  int64_t bytes;  // a multiple of 256
};

struct PeakCopyArgs {
  void* to;  // both addresses multiples of 64
  const void* from;
  int64_t bytes;  // a multiple of 256
};

// Reads everything once.
void PeakRead(const PeakReadArgs& args, int threads);

// Copies past the caches: an ordinary store reads its line first, which is a third more traffic.
void PeakCopy(const PeakCopyArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_PEAKS_H_
