// Deliberate faults that a sanitizer must report: `planted_faults overread|undefined|race|shared_partial|order`. The Makefile
// fails if one is not reported. The faults happen inside the kernels, called with tensors that are too short,
// misaligned or overlapping, because csrc must be instrumented and the sanitizer must understand OpenMP.
#include <cstdio>
#include <cstring>
#include <vector>

#include "ops/cross_entropy.h"
#include "base/parallel.h"
#include "ops/sum_of_squares.h"

namespace {

// Reads one element after the end of a heap block.
void Overread() {
  const std::vector<float> x(1000);
  float total = 0.0f;
  peak::SumOfSquares({.dtype = peak::DType::kFloat32, .count = 1001, .x = x.data(), .total = &total}, 1);
}

// Reads and writes a float at an odd address.
void Undefined() {
  std::vector<char> bytes(8);
  peak::SumOfSquares({.dtype = peak::DType::kFloat32, .count = 0, .x = nullptr,
                      .total = reinterpret_cast<float*>(bytes.data() + 1)},
                     1);
}

// stats start at loss + 1, so threads write losses and stats of other threads' rows.
void Race() {
  constexpr int64_t kRows = 20000;
  std::vector<float> logits(2 * kRows), loss(2 * kRows + 1);
  const std::vector<int64_t> target(kRows);
  peak::CrossEntropyForward({.dtype = peak::DType::kFloat32, .rows = kRows, .vocab = 2, .logits = logits.data(),
                             .target = target.data(), .ignore_index = -100, .loss = loss.data(),
                             .stats = loss.data() + 1},
                            4);
}

// All threads add to one variable.
void SharedPartial() {
  int64_t total = 0;
  peak::ParallelParts(1 << 22, 4, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++total;  // long enough for every thread to come in time
  });
  std::printf("%lld\n", static_cast<long long>(total));
}

// Code between jobs reads what a job writes, which base/parallel.h forbids: a thread that is late reads what a later job
// wrote.
void Order() {
  int64_t value = 0, wrong = 0;
  for (int round = 0; round < 1000; ++round) {
    peak::Team::Open(4, [&] {
      for (int64_t job = 0; job < 8; ++job) {
        peak::ParallelUnits(1, 4, [&](int64_t) { value = job; });
        const int64_t seen = value;
        peak::ParallelUnits(4, 4, [&](int64_t) {
          if (seen != job) ++wrong;
        });
      }
    });
  }
  std::printf("%lld units with the value of another job\n", static_cast<long long>(wrong));
}

constexpr struct {
  const char* name;
  void (*run)();
} kFaults[] = {{"overread", Overread}, {"undefined", Undefined}, {"race", Race}, {"shared_partial", SharedPartial}, {"order", Order}};

}  // namespace

int main(int argc, char** argv) {
  for (const auto& fault : kFaults) {
    if (argc == 2 && std::strcmp(argv[1], fault.name) == 0) return fault.run(), 0;
  }
  std::fprintf(stderr, "got %d arguments, expected one of overread, undefined, race, shared_partial, order\n", argc - 1);
  return 2;
}
