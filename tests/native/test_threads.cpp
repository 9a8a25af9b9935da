// No thread count changes a bit of any kernel's results.
#include "check.h"

namespace peak::test {
namespace {

PEAK_TEST(threads_change_no_bit) {
  for (const Kernel& kernel : Kernels()) {
    const std::vector<char> alone = kernel.run(1);
    for (const int threads : {1, 2, 3, 4}) {
      SetCase("%s on %d threads", kernel.name, threads);
      Check(!alone.empty() && kernel.run(threads) == alone, "differs from one thread");
    }
  }
}

// A kernel that is called on a thread of somebody's team, or past OMP_THREAD_LIMIT, gets fewer threads than it wants.
PEAK_TEST(threads_that_do_not_come) {
  for (const Kernel& kernel : Kernels()) {
    SetCase("%s", kernel.name);
    const std::vector<char> alone = kernel.run(1);
    std::vector<char> nested;
#pragma omp parallel num_threads(2)
#pragma omp single
    nested = kernel.run(4);
    Check(nested == alone, "differs where it wants 4 threads and gets 1");
  }
}

}  // namespace
}  // namespace peak::test
