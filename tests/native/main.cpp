// Runs every test once per instruction set that the machine has and PEAKGPT_ISA allows: `native [part of a test's
// name]`. PEAKGPT_TEST_SHARD=1/3 runs every third test from the second one on, so that processes share the work.
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "check.h"
#include "base/isa.h"

int main(int argc, char** argv) {
  using namespace peak::test;
  const char* const cap = std::getenv("PEAKGPT_ISA");
  const int widest = cap == nullptr ? peak::WidestIsa() : peak::CapIsa(cap);
  int64_t run = 0, shard = 0, shards = 1;
  const char* const share = std::getenv("PEAKGPT_TEST_SHARD");
  if (share != nullptr && (std::sscanf(share, "%" SCNd64 "/%" SCNd64, &shard, &shards) != 2 || shard < 0 ||
                           shard >= shards)) {
    std::printf("PEAKGPT_TEST_SHARD is %s, expected NUMBER/COUNT such as 0/2\n", share);
    return 1;
  }
  for (int isa = 0; isa <= widest; ++isa) {
    peak::SetIsaCap(peak::kIsaNames[isa]);
    for (const Test& test : Tests()) {
      if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
      if (run++ % shards != shard) continue;
      const Tally before = Count();
      const auto start = std::chrono::steady_clock::now();
      SetCase("%s", test.name);
      test.run();
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      std::printf("%-10s %-72s %9lld checks %6.2f s%s\n", peak::ActiveIsa(), test.name,
                  static_cast<long long>(Count().checks - before.checks), seconds,
                  Count().failures > before.failures ? "  FAILED" : "");
      std::fflush(stdout);
    }
  }
  if (run == 0) std::printf("no test name contains '%s'\n", argv[1]);
  std::printf("%lld checks, %lld failed\n", static_cast<long long>(Count().checks),
              static_cast<long long>(Count().failures));
  return run == 0 || Count().failures > 0;
}
