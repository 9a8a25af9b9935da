// A tape: the kernel calls of one thread, recorded instead of run, and replayed without Python between them.
#ifndef PEAK_PYTHON_TAPE_H_
#define PEAK_PYTHON_TAPE_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace peak::python {

namespace py = pybind11;

class Tape {
 public:
  // Tensors with addresses from `begin` to below `end` belong to the memory of the recording, whose owner keeps it.
  Tape(uintptr_t begin, uintptr_t end) : begin_(begin), end_(end) {}

  // The tape that records the kernel calls of this thread, or null. A recording thread runs no kernel.
  static Tape*& Recording() {
    static thread_local Tape* tape = nullptr;
    return tape;
  }

  void Start() { Recording() = this; }
  static void Stop() { Recording() = nullptr; }

  // Appends a kernel call. The tape keeps its arguments alive, except tensors in the memory of the recording.
  void Append(std::function<void()> kernel, PyObject* const* arguments, Py_ssize_t count);
  // Appends a call of a Python function without arguments.
  void AppendCall(py::object call) { steps_.push_back({nullptr, std::move(call)}); }

  // Appends the replay of tapes at the same time, each on one thread. They write to no common memory.
  void AppendParallel(std::vector<std::shared_ptr<Tape>> tapes, int threads);

  // Makes all calls in their order, with the GIL held. An exception ends the replay.
  void Replay() const;

 private:
  struct Step {
    std::function<void()> kernel;  // runs without the GIL; null: `call`
    py::object call;
  };

  uintptr_t begin_, end_;
  std::vector<Step> steps_;
  std::vector<py::object> kept_;
};

}  // namespace peak::python

#endif  // PEAK_PYTHON_TAPE_H_
