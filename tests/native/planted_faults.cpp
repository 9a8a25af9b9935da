// Faults on purpose, for the sanitizers to find: `plant overread|undefined|race|shared_partial`. A build that lets its
// own pass is blind, so the Makefile wants each to end badly. The kernels themselves commit them, called with tensors
// that are too short, misaligned or overlapping: it is csrc that must be instrumented, and OpenMP that must be
// understood.
#include <cstdio>
#include <cstring>
#include <vector>

#include "ops/cross_entropy.h"
#include "base/parallel.h"
#include "ops/sum_of_squares.h"

namespace {

// A vector past the end of a heap block.
void Overread() {
  const std::vector<float> x(1000);
  float total = 0.0f;
  peak::SumOfSquares({peak::DType::kFloat32, 1001, x.data(), &total}, 1);
}

// A float at an odd address.
void Undefined() {
  std::vector<char> bytes(8);
  peak::SumOfSquares({peak::DType::kFloat32, 0, nullptr, reinterpret_cast<float*>(bytes.data() + 1)}, 1);
}

// stats start one element into loss: those of one thread's rows are other threads' losses.
void Race() {
  constexpr int64_t kRows = 1000;
  std::vector<float> logits(2 * kRows), loss(2 * kRows + 1);
  const std::vector<int64_t> target(kRows);
  peak::CrossEntropyForward({.dtype = peak::DType::kFloat32, .rows = kRows, .vocab = 2, .logits = logits.data(),
                             .target = target.data(), .ignore_index = -100, .loss = loss.data(),
                             .stats = loss.data() + 1, .scale = 1.0f},
                            4);
}

// A sum that all threads add to.
void SharedPartial() {
  int64_t total = 0;
  peak::ParallelParts(1000, 4, 4, [&](int64_t, int64_t begin, int64_t end) { total += end - begin; });
  std::printf("%lld\n", static_cast<long long>(total));
}

constexpr struct {
  const char* name;
  void (*run)();
} kFaults[] = {{"overread", Overread}, {"undefined", Undefined}, {"race", Race}, {"shared_partial", SharedPartial}};

}  // namespace

int main(int argc, char** argv) {
  for (const auto& fault : kFaults) {
    if (argc == 2 && std::strcmp(argv[1], fault.name) == 0) return fault.run(), 0;
  }
  std::fprintf(stderr, "got %d arguments, expected one of overread, undefined, race, shared_partial\n", argc - 1);
  return 2;
}
