// Python's view of the kernels: one line per function, no math.
//
// Tensors arrive as addresses (uintptr_t of Tensor.data_ptr()) with their sizes, so the extension links no libtorch and
// one build serves every torch. The Python side has checked shapes, dtypes and strides. Every function releases the GIL.

#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

namespace peak {
extern const char kSourceDigest[];  // written by setup.py
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of peakgpt.";
  m.attr("source_digest") = py::str(peak::kSourceDigest);
}
