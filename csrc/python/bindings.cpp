// The Python module peakgpt._C: one line for each function, no math.
//
// Tensors arrive with their sizes and strides, so the extension links no libtorch and one build serves every torch. The
// Python side has checked shapes, dtypes and strides. Kernels release the GIL. Arguments are passed by name, as
// python/arguments.h describes.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "attention/attention.h"
#include "attention/cache_attention.h"
#include "base/isa.h"
#include "base/memory.h"
#include "gemm/gemm.h"
#include "gemm/grouped_gemm.h"
#include "gemm/quantized.h"
#include "gemm/quantized_backward.h"
#include "ops/adamw.h"
#include "ops/cross_entropy.h"
#include "ops/dropout.h"
#include "ops/embedding.h"
#include "ops/experts.h"
#include "ops/muon.h"
#include "ops/norm.h"
#include "ops/peaks.h"
#include "ops/qk_norm.h"
#include "ops/rotary.h"
#include "ops/sum_of_squares.h"
#include "program/experts.h"
#include "program/program.h"
#include "python/arguments.h"
#include "python/tape.h"

namespace py = pybind11;

namespace peak {

extern const char kSourceDigest[];  // written by setup.py

namespace {

using python::DefineKernel, python::DefineMethod, python::DefineMethodWithThreads, python::FromKeywords;

// The instruction sets that this machine runs, narrowest first.
py::tuple Isas() {
  py::tuple names(WidestIsa() + 1);
  for (size_t i = 0; i < names.size(); ++i) names[i] = kIsaNames[i];
  return names;
}

void DefineIsa(py::module_& m) {
  ActiveIsa();  // an unknown PEAKGPT_ISA fails the import
  m.attr("isas") = Isas();
  m.def("isa", &ActiveIsa, "Return the active instruction set.");
  m.def("set_isa_cap", &SetIsaCap, py::arg("name").none(true),
        "Set the widest instruction set to use and return the active one; None chooses the fastest.");
}

void DefineKernels(py::module_& m) {
  DefineKernel<ActivationBackwardArgs, ActivationBackward>(m, "activation_backward");
  DefineKernel<AdamwArgs, Adamw>(m, "adamw");
  DefineKernel<AdamwEachArgs, AdamwEach>(m, "adamw_each");
  DefineKernel<AttentionForwardArgs, AttentionForward>(m, "attention_forward");
  DefineKernel<AttentionBackwardArgs, AttentionBackward>(m, "attention_backward");
  DefineKernel<CrossEntropyForwardArgs, CrossEntropyForward>(m, "cross_entropy_forward");
  DefineKernel<CrossEntropyShardArgs, CrossEntropyShard>(m, "cross_entropy_shard");
  DefineKernel<CrossEntropyBackwardArgs, CrossEntropyBackward>(m, "cross_entropy_backward");
  DefineKernel<DropoutArgs, Dropout>(m, "dropout");
  DefineKernel<EmbeddingForwardArgs, EmbeddingForward>(m, "embedding_forward");
  DefineKernel<EmbeddingBackwardArgs, EmbeddingBackward>(m, "embedding_backward");
  DefineKernel<SortChoicesArgs, SortChoices>(m, "sort_choices");
  DefineKernel<GatherChoicesArgs, GatherChoices>(m, "gather_choices");
  DefineKernel<CombineChoicesArgs, CombineChoices>(m, "combine_choices");
  DefineKernel<HiddenBackwardArgs, HiddenBackward>(m, "hidden_backward");
  DefineKernel<GemmArgs, Gemm>(m, "gemm");
  DefineKernel<GroupedGemmArgs, GroupedGemm>(m, "grouped_gemm");
  DefineKernel<QuantizedArgs, LinearQuantized>(m, "linear_quantized");
  DefineKernel<QuantizedBackwardArgs, QuantizedBackward>(m, "linear_quantized_backward");
  DefineKernel<MuonArgs, Muon>(m, "muon");
  DefineKernel<MuonEachArgs, MuonEach>(m, "muon_each");
  DefineKernel<NormForwardArgs, NormForward>(m, "norm_forward");
  DefineKernel<NormBackwardArgs, NormBackward>(m, "norm_backward");
  DefineKernel<QKNormForwardArgs, QKNormForward>(m, "qk_norm_forward");
  DefineKernel<QKNormBackwardArgs, QKNormBackward>(m, "qk_norm_backward");
  DefineKernel<RotaryArgs, Rotary>(m, "rotary");
  DefineKernel<SumOfSquaresArgs, SumOfSquares>(m, "sum_of_squares");
  DefineKernel<SumOfSquaresEachArgs, SumOfSquaresEach>(m, "sum_of_squares_each");
  DefineKernel<PeakStreamArgs, PeakStream>(m, "peak_stream");
  m.def("peak_loop", &PeakLoop, py::kw_only(), py::arg("loop"), py::arg("iterations"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "Run a loop of multiply-adds and return its number of operations.");
  m.def(
      "muon_scratch",
      [](int dtype, int64_t rows, int64_t columns) { return MuonScratch(static_cast<DType>(dtype), rows, columns); },
      py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
      "Return the bytes of scratch that one worker of muon needs.");
}

void DefineMemory(py::module_& m) {
  m.def(
      "request_huge_pages",
      [](uintptr_t memory, int64_t bytes) { RequestHugePages(reinterpret_cast<void*>(memory), bytes); },
      py::kw_only(), py::arg("memory"), py::arg("bytes"), "Request huge pages for untouched memory.");
  m.def("keep_pages", &KeepPages, py::kw_only(), py::arg("bytes"), "Keep freed memory in the process.");
}

void DefineTape(py::module_& m) {
  py::class_<python::Tape, std::shared_ptr<python::Tape>>(m, "Tape")
      .def(py::init<uintptr_t, uintptr_t>(), py::kw_only(), py::arg("begin"), py::arg("end"))
      .def("start", &python::Tape::Start, "Record the kernel calls of this thread instead of running them.")
      .def_static("stop", &python::Tape::Stop, "Run the kernel calls of this thread again.")
      .def("append", &python::Tape::AppendCall, py::arg("call"), "Append a call of a Python function.")
      .def("append_parallel", &python::Tape::AppendParallel, py::kw_only(), py::arg("tapes"), py::arg("threads"),
           "Append the replay of several tapes, each on one thread.")
      .def("replay", &python::Tape::Replay, "Make all recorded calls.");
}

void DefineProgram(py::module_& m) {
  m.attr("cache_block") = kCacheBlock;
  py::class_<Weight, std::shared_ptr<Weight>>(m, "Weight");
  py::class_<DenseWeight, Weight, std::shared_ptr<DenseWeight>>(m, "DenseWeight")
      .def(py::init([](const py::kwargs& matrix) {
        return std::make_shared<DenseWeight>(FromKeywords<DenseMatrix>("DenseWeight", matrix));
      }));
  py::class_<QuantizedWeight, Weight, std::shared_ptr<QuantizedWeight>>(m, "QuantizedWeight")
      .def(py::init([](const py::kwargs& matrix) {
        return std::make_shared<QuantizedWeight>(FromKeywords<QuantizedMatrix>("QuantizedWeight", matrix));
      }));
  py::class_<ExpertWeights, std::shared_ptr<ExpertWeights>>(m, "ExpertWeights");
  py::class_<DenseExperts, ExpertWeights, std::shared_ptr<DenseExperts>>(m, "DenseExperts")
      .def(py::init([](const py::kwargs& matrix) {
        return std::make_shared<DenseExperts>(FromKeywords<DenseExpertsMatrix>("DenseExperts", matrix));
      }));
  py::class_<QuantizedExperts, ExpertWeights, std::shared_ptr<QuantizedExperts>>(m, "QuantizedExperts")
      .def(py::init([](const py::kwargs& matrix) {
        return std::make_shared<QuantizedExperts>(FromKeywords<QuantizedExpertsMatrix>("QuantizedExperts", matrix));
      }));
  py::class_<Program> program(m, "Program");
  program.def(py::init([](int dtype) { return Program(static_cast<DType>(dtype)); }), py::kw_only(), py::arg("dtype"))
      .def("buffer", &Program::Buffer, py::kw_only(), py::arg("width"))
      .def(
          "linear",
          [](Program& p, std::shared_ptr<Weight> weight, const py::kwargs& step) {
            p.Linear(FromKeywords<LinearStep>("linear", step), std::move(weight));
          },
          py::arg("weight"))
      .def(
          "experts",
          [](Program& p, std::shared_ptr<Weight> router, std::shared_ptr<ExpertWeights> gate,
             std::shared_ptr<ExpertWeights> up, std::shared_ptr<ExpertWeights> down, const py::kwargs& step) {
            p.Experts(FromKeywords<ExpertsStep>("experts", step), std::move(router), std::move(gate), std::move(up),
                      std::move(down));
          },
          py::arg("router"), py::arg("gate").none(true), py::arg("up"), py::arg("down"));
  DefineMethod<Program, EmbedStep, &Program::Embed>(program, "embed");
  DefineMethod<Program, NormStep, &Program::Norm>(program, "norm");
  DefineMethod<Program, RotaryStep, &Program::Rotary>(program, "rotary");
  DefineMethod<Program, QKNormStep, &Program::QKNorm>(program, "qk_norm");
  DefineMethod<Program, AttentionStep, &Program::Attention>(program, "attention");
  DefineMethod<Program, CombineStep, &Program::Combine>(program, "combine");
  DefineMethod<Program, SelectStep, &Program::SelectRows>(program, "select_rows");
  DefineMethod<Program, HiddenStep, &Program::Hidden>(program, "hidden");
  DefineMethod<Program, LogitsStep, &Program::FinishLogits>(program, "finish_logits");
  DefineMethodWithThreads<Program, PassArgs, &Program::Run>(program, "run");
}

}  // namespace
}  // namespace peak

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of peakgpt.";
  m.attr("source_digest") = py::str(peak::kSourceDigest);
  peak::DefineIsa(m);
  peak::DefineKernels(m);
  peak::DefineMemory(m);
  peak::DefineProgram(m);
  peak::DefineTape(m);
}
