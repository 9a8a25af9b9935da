// Python's view of the kernels: one line per function, no math.
//
// Tensors arrive as addresses (uintptr_t of Tensor.data_ptr()) with their sizes, so the extension links no libtorch and
// one build serves every torch. The Python side has checked shapes, dtypes and strides. Every function releases the GIL.
//
// A kernel takes (const Args&, int threads). In Python it takes the fields of Args in their order, then threads:
// an address for a pointer (0 for null), an int for a DType.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "adamw.h"
#include "attention.h"
#include "cross_entropy.h"
#include "dropout.h"
#include "embedding.h"
#include "gemm.h"
#include "isa.h"
#include "layernorm.h"
#include "memory.h"
#include "peaks.h"
#include "quantized.h"
#include "rotary.h"
#include "sum_of_squares.h"

namespace py = pybind11;

namespace peak {
extern const char kSourceDigest[];  // written by setup.py
}

namespace {

// Converts to whatever field it initialises.
struct Field {
  PyObject* value;
  template <class T>
  operator T() const {
    const py::handle handle(value);
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(handle.cast<uintptr_t>());
    } else if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(handle.cast<int>());
    } else {
      return handle.cast<T>();
    }
  }
};

template <class Args, class, size_t... I>
struct TakesFields : std::false_type {};
template <class Args, size_t... I>
struct TakesFields<Args, decltype(void(Args{(void(I), Field{})...})), I...> : std::true_type {};

template <class Args, size_t... I>
constexpr size_t CountFields(std::index_sequence<I...>) {
  if constexpr (TakesFields<Args, void, I..., sizeof...(I)>::value) {
    return CountFields<Args>(std::make_index_sequence<sizeof...(I) + 1>());
  } else {
    return sizeof...(I);
  }
}

template <class Args, size_t... I>
Args FromTuple(const py::args& values, std::index_sequence<I...>) {
  return Args{Field{PyTuple_GET_ITEM(values.ptr(), I)}...};
}

template <class Args>
void Define(py::module_& m, const char* name, void (*kernel)(const Args&, int)) {
  constexpr size_t kFields = CountFields<Args>(std::index_sequence<>());
  m.def(name, [name, kernel](const py::args& values) {
    if (values.size() != kFields + 1) {
      throw py::type_error(std::string(name) + ": got " + std::to_string(values.size()) + " arguments, expected " +
                           std::to_string(kFields + 1));
    }
    const Args args = FromTuple<Args>(values, std::make_index_sequence<kFields>());
    const int threads = values[kFields].cast<int>();
    py::gil_scoped_release release;
    kernel(args, threads);
  });
}

// The instruction sets that this machine runs, narrowest first.
py::tuple Isas() {
  py::tuple names(peak::BestIsa() + 1);
  for (size_t i = 0; i < names.size(); ++i) names[i] = peak::kIsaNames[i];
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of peakgpt.";
  m.attr("source_digest") = py::str(peak::kSourceDigest);
  peak::ActiveIsa();  // a bad PEAKGPT_ISA fails the import
  m.def("isa", &peak::ActiveIsa, "The instruction set that runs now.");
  m.def("set_isa_cap", &peak::SetIsaCap, py::arg("name").none(true), "Run at most this set; None lifts the cap.");
  m.attr("isas") = Isas();
  m.def("keep_pages", &peak::KeepPages, py::arg("bytes"), "Keep freed memory in the process, as memory.h says.");
  Define(m, "attention_forward", peak::AttentionForward);
  Define(m, "attention_backward", peak::AttentionBackward);
  Define(m, "layernorm_forward", peak::LayernormForward);
  Define(m, "layernorm_backward", peak::LayernormBackward);
  m.def("peak_loop", &peak::PeakLoop, py::call_guard<py::gil_scoped_release>());
  Define(m, "peak_stream", peak::PeakStream);
  Define(m, "cross_entropy_forward", peak::CrossEntropyForward);
  Define(m, "cross_entropy_backward", peak::CrossEntropyBackward);
  Define(m, "dropout", peak::Dropout);
  Define(m, "gemm", peak::Gemm);
  Define(m, "linear_quantized", peak::LinearQuantized);
  Define(m, "adamw", peak::Adamw);
  Define(m, "rotary", peak::Rotary);
  Define(m, "sum_of_squares", peak::SumOfSquares);
  Define(m, "embedding_forward", peak::EmbeddingForward);
  Define(m, "embedding_backward", peak::EmbeddingBackward);
}
