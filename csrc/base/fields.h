// Names of the fields of an argument struct, so that Python fills the struct by name (python/arguments.h):
//
//   struct ScaleArgs {
//     int64_t count;
//     const float* x;
//     float factor = 1.0f;
//   };
//   PEAK_FIELDS(ScaleArgs, count, x)
//   PEAK_OPTIONAL_FIELDS(ScaleArgs, factor)
//
// A caller must pass every required field; an optional field has its default value in the struct. A struct that derives
// from another one declares it with `using Base` and lists its own fields only.
#ifndef PEAK_FIELDS_H_
#define PEAK_FIELDS_H_

#include <cstddef>

namespace peak {

template <class Args>
struct RequiredFields {
  static constexpr size_t kCount = 0;
  template <class Visit>
  static void ForEach(const Visit&) {}
};

template <class Args>
struct OptionalFields : RequiredFields<void> {};

}  // namespace peak

// PEAK_FOR_EACH(macro, a, b, ...) expands to macro(a) macro(b) ..., for up to 85 arguments: each level rescans four
// times.
#define PEAK_PARENS ()
#define PEAK_RESCAN_1(...) __VA_ARGS__
#define PEAK_RESCAN_2(...) PEAK_RESCAN_1(PEAK_RESCAN_1(PEAK_RESCAN_1(PEAK_RESCAN_1(__VA_ARGS__))))
#define PEAK_RESCAN_3(...) PEAK_RESCAN_2(PEAK_RESCAN_2(PEAK_RESCAN_2(PEAK_RESCAN_2(__VA_ARGS__))))
#define PEAK_RESCAN_4(...) PEAK_RESCAN_3(PEAK_RESCAN_3(PEAK_RESCAN_3(PEAK_RESCAN_3(__VA_ARGS__))))
#define PEAK_FOR_EACH(macro, ...) PEAK_RESCAN_4(PEAK_FOR_EACH_STEP(macro, __VA_ARGS__))
#define PEAK_FOR_EACH_STEP(macro, first, ...) \
  macro(first) __VA_OPT__(PEAK_FOR_EACH_AGAIN PEAK_PARENS(macro, __VA_ARGS__))
#define PEAK_FOR_EACH_AGAIN() PEAK_FOR_EACH_STEP

#define PEAK_COUNT_FIELD(name) +1
#define PEAK_VISIT_FIELD(name) visit(#name, &Struct::name);
#define PEAK_LIST_FIELDS(List, Args, ...)                                   \
  template <>                                                               \
  struct List<Args> {                                                       \
    using Struct = Args;                                                    \
    static constexpr size_t kCount = PEAK_FOR_EACH(PEAK_COUNT_FIELD, __VA_ARGS__); \
    template <class Visit>                                                  \
    static void ForEach(const Visit& visit) {                               \
      PEAK_FOR_EACH(PEAK_VISIT_FIELD, __VA_ARGS__)                          \
    }                                                                       \
  };
#define PEAK_FIELDS(Args, ...) PEAK_LIST_FIELDS(RequiredFields, Args, __VA_ARGS__)
#define PEAK_OPTIONAL_FIELDS(Args, ...) PEAK_LIST_FIELDS(OptionalFields, Args, __VA_ARGS__)

#endif  // PEAK_FIELDS_H_
