// The time slice of a thread: the time for which the system lets it run while others want its core.
#ifndef PEAK_TIME_SLICE_H_
#define PEAK_TIME_SLICE_H_

#include <chrono>

namespace peak {

// A thread that works in short units offers its core just before its slice ends. The system would stop it soon, most
// likely within a unit, and others would wait for that unit. Earlier is worse: from Linux 6.18 on, a thread that offers
// its core pays for the whole slice.
class TimeSlice {
 public:
  using Clock = std::chrono::steady_clock;

  explicit TimeSlice(Clock::duration length) : length_(length) {}

  // A new slice begins.
  void Begin(Clock::time_point now) { begin_ = last_ = now; }
  // The first of several units that follow one another begins.
  void BeginUnits(Clock::time_point now) { last_ = now; }
  // A unit ended. Returns whether the thread should offer its core: a second one would end too late.
  bool EndUnit(Clock::time_point now) {
    unit_ = now - last_;
    last_ = now;
    if (now - begin_ < length_) return now + unit_ - begin_ >= length_ - length_ / 16;
    begin_ = now;  // the system has stopped this thread, or nobody wanted its core
    return false;
  }
  // The time of the last unit.
  Clock::duration unit() const { return unit_; }

 private:
  const Clock::duration length_;
  Clock::duration unit_{0};
  Clock::time_point begin_, last_;
};

// The length of this thread's slices.
TimeSlice::Clock::duration SliceLength();

}  // namespace peak

#endif  // PEAK_TIME_SLICE_H_
