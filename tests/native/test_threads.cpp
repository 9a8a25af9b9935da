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

}  // namespace
}  // namespace peak::test
