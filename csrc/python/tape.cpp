#include "python/tape.h"

#include <utility>

#include "base/parallel.h"

namespace peak::python {

void Tape::Append(std::function<void()> kernel, PyObject* const* arguments, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    const py::handle argument(arguments[i]);
    if (!py::hasattr(argument, "data_ptr")) continue;
    const auto address = argument.attr("data_ptr")().cast<uintptr_t>();
    if (address < begin_ || address >= end_) kept_.push_back(py::reinterpret_borrow<py::object>(argument));
  }
  steps_.push_back({std::move(kernel), py::object()});
}

void Tape::AppendParallel(std::vector<std::shared_ptr<Tape>> tapes, int threads) {
  const auto replay_all = [tapes = std::move(tapes), threads] {
    ParallelUnits(static_cast<int64_t>(tapes.size()), threads, [&](int64_t i) {
      const py::gil_scoped_acquire acquired;
      tapes[static_cast<size_t>(i)]->Replay();
    });
  };
  steps_.push_back({replay_all, py::object()});
}

void Tape::Replay() const {
  auto step = steps_.begin();
  while (step != steps_.end()) {
    if (step->call) {
      step->call();
      ++step;
      continue;
    }
    const py::gil_scoped_release released;
    for (; step != steps_.end() && !step->call; ++step) step->kernel();
  }
}

}  // namespace peak::python
