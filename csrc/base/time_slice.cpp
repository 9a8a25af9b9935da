#include "base/time_slice.h"

#include <cstdint>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peak {
namespace {

using std::chrono::microseconds;
constexpr microseconds kUsual{1000}, kLeast{100}, kMost{100'000};

// The slice in nanoseconds that the scheduler of Linux 6.12 or later states; 0 elsewhere.
int64_t StatedSlice() {
#if defined(__linux__) && defined(SYS_sched_getattr)
  // The first version of struct sched_attr (linux/sched/types.h), for which old C libraries have no header.
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes = {};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) == 0) {
    return static_cast<int64_t>(attributes.runtime);
  }
#endif
  return 0;
}

}  // namespace

TimeSlice::Clock::duration SliceLength() {
  const std::chrono::nanoseconds stated(StatedSlice());
  return stated >= kLeast && stated <= kMost ? stated : kUsual;
}

}  // namespace peak
