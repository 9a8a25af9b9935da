// Faults on purpose, for the sanitizers to find: `plant overread|undefined|race`. A build that lets its own pass is
// blind, so the Makefile wants each to end badly. The kernels themselves commit them, called with tensors that are too
// short, misaligned or overlapping: it is csrc that must be instrumented, and OpenMP that must be understood.
#include <cstdio>
#include <cstring>
#include <vector>

#include "activation.h"
#include "parallel.h"
#include "sum_of_squares.h"

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

// Out starts one element into pre: where two threads' pieces meet, one writes what the other reads.
void Race() {
  std::vector<float> x(100001);
  peak::ActivationForward({peak::DType::kFloat32, peak::Activation::kRelu, 100000, x.data(), x.data() + 1}, 4);
}

// A sum that all threads add to.
void SharedPartial() {
  double total = 0.0;
  peak::ParallelParts(1000, 4, 4, [&](int64_t, int64_t begin, int64_t end) { total += static_cast<double>(end - begin); });
  std::printf("%g\n", total);
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
