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

#include "ops/adamw.h"
#include "attention/attention.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "gemm/gemm.h"
#include "program/program.h"
#include "attention/cache_attention.h"
#include "base/isa.h"
#include "ops/norm.h"
#include "base/memory.h"
#include "ops/peaks.h"
#include "gemm/quantized.h"
#include "ops/rotary.h"
#include "ops/sum_of_squares.h"

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

const void* At(uintptr_t address) { return reinterpret_cast<const void*>(address); }

void DefineProgram(py::module_& m) {
  using peak::DType, peak::Program, peak::Weight, peak::DenseWeight, peak::QuantizedWeight;
  py::class_<Weight, std::shared_ptr<Weight>>(m, "Weight");
  py::class_<DenseWeight, Weight, std::shared_ptr<DenseWeight>>(m, "DenseWeight")
      .def(py::init([](int dtype, int64_t n, int64_t k, uintptr_t packed) {
        return std::make_shared<DenseWeight>(static_cast<DType>(dtype), n, k, static_cast<const float*>(At(packed)));
      }));
  py::class_<QuantizedWeight, Weight, std::shared_ptr<QuantizedWeight>>(m, "QuantizedWeight")
      .def(py::init([](int dtype, int bits, int64_t n, int64_t k, int64_t block, uintptr_t weight, uintptr_t scale) {
        peak::QuantizedArgs args{};
        args.dtype = static_cast<DType>(dtype);
        args.bits = bits;
        args.n = n;
        args.k = k;
        args.block = block;
        args.weight = static_cast<const uint8_t*>(At(weight));
        args.scale = At(scale);
        return std::make_shared<QuantizedWeight>(args);
      }));
  py::class_<Program>(m, "Program")
      .def(py::init([](int dtype) { return Program(static_cast<DType>(dtype)); }))
      .def("buffer", &Program::Buffer)
      .def("embed", [](Program& p, int out, uintptr_t wte, int64_t wte_row, uintptr_t wpe, int64_t wpe_row) {
        p.Embed(out, At(wte), wte_row, At(wpe), wpe_row);
      })
      .def("norm", [](Program& p, int x, int residual, int sum, int out, uintptr_t w, int w_dtype, uintptr_t b,
                      float eps, bool rms) {
        p.Norm(x, residual, sum, out, At(w), static_cast<DType>(w_dtype), At(b), eps, rms);
      })
      .def("linear", [](Program& p, int x, int out, std::shared_ptr<Weight> weight, uintptr_t bias, int epilogue,
                        int activation, int gate) {
        p.Linear(x, out, std::move(weight), At(bias), static_cast<peak::Epilogue>(epilogue),
                 static_cast<peak::Activation>(activation), gate);
      })
      .def("rotary", [](Program& p, int x, int64_t width, int64_t turned, uintptr_t cos, uintptr_t sin, int64_t pairs,
                        bool interleaved) {
        p.Rotary(x, width, turned, static_cast<const float*>(At(cos)), static_cast<const float*>(At(sin)), pairs,
                 interleaved);
      })
      .def("attend", [](Program& p, int x, int out, int64_t layer, int64_t heads, int64_t kv_heads, int64_t width,
                        int64_t window, float scale, uintptr_t alibi) {
        p.Attend(x, out, layer, heads, kv_heads, width, window, scale, static_cast<const float*>(At(alibi)));
      })
      .def("combine", &Program::Combine)
      .def("take", &Program::Take)
      .def("run", [](Program& p, const py::args& values) {
        constexpr size_t kFields = CountFields<peak::PassArgs>(std::index_sequence<>());
        if (values.size() != kFields + 1) throw py::type_error("run: expected the fields of PassArgs and the threads");
        const auto pass = FromTuple<peak::PassArgs>(values, std::make_index_sequence<kFields>());
        const int threads = values[kFields].cast<int>();
        py::gil_scoped_release release;
        p.Run(pass, threads);
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
  m.def("ask_huge_pages", [](uintptr_t memory, int64_t bytes) {
    peak::AskHugePages(reinterpret_cast<void*>(memory), bytes);
  });
  m.def("keep_pages", &peak::KeepPages, py::arg("bytes"), "Keep freed memory in the process, as memory.h says.");
  Define(m, "attention_forward", peak::AttentionForward);
  Define(m, "attention_backward", peak::AttentionBackward);
  Define(m, "layernorm_forward", peak::LayernormForward);
  Define(m, "layernorm_backward", peak::LayernormBackward);
  m.def("peak_loop", &peak::PeakLoop, py::call_guard<py::gil_scoped_release>());
  Define(m, "peak_stream", peak::PeakStream);
  Define(m, "cross_entropy_forward", peak::CrossEntropyForward);
  Define(m, "cross_entropy_parts", peak::CrossEntropyParts);
  Define(m, "cross_entropy_backward", peak::CrossEntropyBackward);
  Define(m, "dropout", peak::Dropout);
  Define(m, "gemm", peak::Gemm);
  Define(m, "linear_quantized", peak::LinearQuantized);
  Define(m, "pack_b", peak::PackB);
  m.def("packed_floats", [](int dtype, int64_t n, int64_t k) {
    return peak::PackedFloats(static_cast<peak::DType>(dtype), n, k);
  });
  DefineProgram(m);
  m.attr("cache_block") = peak::kCacheBlock;
  Define(m, "adamw", peak::Adamw);
  Define(m, "rotary", peak::Rotary);
  Define(m, "sum_of_squares", peak::SumOfSquares);
  Define(m, "embedding_forward", peak::EmbeddingForward);
  Define(m, "embedding_backward", peak::EmbeddingBackward);
}
