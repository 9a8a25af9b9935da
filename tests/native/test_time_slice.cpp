// When a thread offers its core: just before its time slice ends, and not after.
#include "base/time_slice.h"
#include "check.h"

namespace peak::test {
namespace {

using std::chrono::microseconds;

// Runs units of `unit_us` in a slice of 1600 us. Returns the end of the first one after which the thread offers its core,
// or 0 if there is none before `until_us`.
int FirstOffer(TimeSlice& slice, int begin_us, int unit_us, int until_us) {
  for (int now = begin_us + unit_us; now < until_us; now += unit_us) {
    if (slice.EndUnit(TimeSlice::Clock::time_point(microseconds(now)))) return now;
  }
  return 0;
}

PEAK_TEST(a_thread_offers_its_core_before_a_unit_that_ends_too_late) {
  for (const int unit_us : {10, 100, 700}) {
    SetCase("units of %d us", unit_us);
    TimeSlice slice(microseconds(1600));
    for (const int begin_us : {5000, 9000}) {
      slice.Begin(TimeSlice::Clock::time_point(microseconds(begin_us)));
      const int offer_us = FirstOffer(slice, begin_us, unit_us, begin_us + 5000) - begin_us;
      Check(offer_us + unit_us >= 1500 && offer_us < 1500, "offered after %d us", offer_us);
      Check(slice.unit() == microseconds(unit_us), "measured another unit");
    }
  }
}

PEAK_TEST(a_thread_that_stood_still_has_a_new_slice) {
  TimeSlice slice(microseconds(1600));
  slice.Begin(TimeSlice::Clock::time_point(microseconds(0)));
  Check(!slice.EndUnit(TimeSlice::Clock::time_point(microseconds(4000))), "offered at the begin of a slice");
  const int offer_us = FirstOffer(slice, 4000, 100, 9000) - 4000;
  Check(offer_us == 1400, "offered after %d us", offer_us);
}

// A pause between two jobs is no part of a unit.
PEAK_TEST(a_unit_begins_after_the_job_before) {
  TimeSlice slice(microseconds(1600));
  slice.Begin(TimeSlice::Clock::time_point(microseconds(0)));
  slice.BeginUnits(TimeSlice::Clock::time_point(microseconds(900)));
  Check(!slice.EndUnit(TimeSlice::Clock::time_point(microseconds(1000))) && slice.unit() == microseconds(100),
        "counted the pause");
}

PEAK_TEST(the_system_states_a_slice) {
  const auto length = SliceLength();
  Check(length >= microseconds(100) && length <= microseconds(100'000), "got another one");
}

}  // namespace
}  // namespace peak::test
