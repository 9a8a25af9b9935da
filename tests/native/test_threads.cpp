// The results of every kernel have the same bits for every number of threads.
#include "check.h"

namespace peak::test {
namespace {

PEAK_TEST(results_do_not_depend_on_the_thread_count) {
  for (const Kernel& kernel : Kernels()) {
    const std::vector<char> alone = kernel.run(1);
    for (const int threads : {1, 2, 3, 4}) {
      SetCase("%s on %d threads", kernel.name, threads);
      Check(!alone.empty() && kernel.run(threads) == alone, "differs from one thread");
    }
  }
}

// Inside a parallel region, or with OMP_THREAD_LIMIT, a kernel gets fewer threads than it requests.
PEAK_TEST(results_do_not_depend_on_the_granted_threads) {
  for (const Kernel& kernel : Kernels()) {
    SetCase("%s", kernel.name);
    const std::vector<char> alone = kernel.run(1);
    std::vector<char> nested;
#pragma omp parallel num_threads(2)
#pragma omp single
    nested = kernel.run(4);
    Check(nested == alone, "differs when it requests 4 threads and gets 1");
  }
}

}  // namespace
}  // namespace peak::test
