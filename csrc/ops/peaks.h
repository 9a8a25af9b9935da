// Loops with a known amount of work, which measure the peak rates of the machine (kernels/hardware).
#ifndef PEAK_PEAKS_H_
#define PEAK_PEAKS_H_

#include <cstdint>

#include "base/fields.h"

namespace peak {

enum Loop : int { kLoopFloat32 = 0, kLoopBFloat16 = 1, kLoopInt8 = 2 };

// Runs multiply-adds on registers in one unit for each thread. `loop` is a Loop. Returns the number of operations of
// all units (a multiply-add is 2), or 0 if the active instruction set has no multiply-add of this type.
double PeakLoop(int loop, int64_t iterations, int threads);

// Streams of `bytes` each, `stride` bytes apart. The streams that are only read come first, then those that are updated
// in place, then those that are only written.
struct PeakStreamArgs {
  void* base;  // a multiple of 64, as is stride
  int64_t stride;
  int64_t bytes;               // of a stream; a multiple of 256
  int reads, writes, updates;  // the last `updates` of the read streams are the first of the written streams
  bool past_caches;            // bypass the caches for streams that are only written: other stores read the line first
};
PEAK_FIELDS(PeakStreamArgs, base, stride, bytes, reads, writes, updates, past_caches)

// Reads `reads` streams once and writes 1 plus their sum to `writes` streams.
void PeakStream(const PeakStreamArgs& args, int threads);

}  // namespace peak

#endif  // PEAK_PEAKS_H_
