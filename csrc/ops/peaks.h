// What the machine can do at best: work of a known amount, for the clock in kernels/hardware/clock.py to time.
#ifndef PEAK_PEAKS_H_
#define PEAK_PEAKS_H_

#include <cstdint>

namespace peak {

enum Loop : int { kLoopFloat32 = 0, kLoopBFloat16 = 1, kLoopInt8 = 2 };

// Multiply-adds that stay in registers, on each of `threads` threads; `loop` is a Loop. Returns the operations done by
// all of them (a multiply-add is 2), or 0 where the active instruction set has none for the type.
double PeakLoop(int loop, int64_t iterations, int threads);

// Streams of `bytes` each, `stride` apart: those read only, those updated in place, those written only.
struct PeakStreamArgs {
  void* base;  // a multiple of 64, as is stride
  int64_t stride;
  int64_t bytes;  // a multiple of 256
  int reads, writes, updates;  // the last `updates` of those read are the first of those written
  bool past_caches;            // streams that are written only; an ordinary store reads its line first
};

// Reads `reads` streams and writes 1 plus their sum to `writes` streams, each once.
void PeakStream(const PeakStreamArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_PEAKS_H_
