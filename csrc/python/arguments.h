// Python functions that fill an argument struct by name.
//
// A kernel takes (const Args&, int threads). Python calls it with one keyword for each field of Args and `threads`; a
// missing, unknown or mistyped argument is a TypeError that names it. A pointer field takes a tensor, an address or
// None. The functions use the vectorcall protocol, since pybind11's own argument handling costs a small operator more
// than its arithmetic.
#ifndef PEAK_PYTHON_ARGUMENTS_H_
#define PEAK_PYTHON_ARGUMENTS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/fields.h"
#include "base/types.h"
#include "python/tape.h"

namespace peak::python {

namespace py = pybind11;

// The conversion of a Python value to a field.
enum class FieldKind { kInt, kInt64, kBool, kFloat, kDouble, kPointer, kStrided };

template <class T>
constexpr FieldKind KindOf() {
  if constexpr (std::is_pointer_v<T>) {
    return FieldKind::kPointer;
  } else if constexpr (std::is_same_v<T, StridedInput> || std::is_same_v<T, StridedOutput>) {
    return FieldKind::kStrided;
  } else if constexpr (std::is_same_v<T, bool>) {
    return FieldKind::kBool;
  } else if constexpr (std::is_same_v<T, float>) {
    return FieldKind::kFloat;
  } else if constexpr (std::is_same_v<T, double>) {
    return FieldKind::kDouble;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return FieldKind::kInt64;
  } else {
    static_assert(std::is_same_v<T, int> || std::is_enum_v<T>, "a field has no conversion from Python");
    return FieldKind::kInt;
  }
}

// The fields of one struct: their names, offsets and kinds.
class ArgumentTable {
 public:
  // Adds the field at `offset` bytes of the struct.
  void Add(const char* name, std::ptrdiff_t offset, FieldKind kind, bool required);

  // Fills `args`, which holds the default values. `values` has `positional` positional arguments, then one value for
  // each keyword in `names`, a tuple of str or null. If it returns false, a Python error is set.
  bool Read(const char* function, void* args, PyObject* const* values, Py_ssize_t positional, PyObject* names) const;

 private:
  struct Field {
    PyObject* name;  // interned
    std::ptrdiff_t offset;
    FieldKind kind;
  };

  // Returns the index of a field, or -1 if no field has this name. The search starts at `expected`.
  int Find(PyObject* name, size_t expected) const;
  void RaiseUnknown(const char* function, PyObject* name) const;
  void RaiseMissing(const char* function, uint64_t given) const;

  std::vector<Field> fields_;
  uint64_t required_ = 0;  // bit i: fields_[i]
};

// Sets a Python error for the C++ exception that is being handled.
void RaiseCurrentException();

// ------------------------------------------------------------------------------------------- tables of C++ structs
template <class Args>
struct WithThreads {
  Args args{};
  int threads = 0;
};

template <class Args, class = void>
struct BaseOf { using type = void; };
template <class Args>
struct BaseOf<Args, std::void_t<typename Args::Base>> { using type = typename Args::Base; };

// Converts to a field of any type, to count the fields of an aggregate.
struct AnyValue {
  template <class T>
  operator T() const;
};
template <class Args, class, size_t... I>
struct TakesValues : std::false_type {};
template <class Args, size_t... I>
struct TakesValues<Args, decltype(void(Args{(void(I), AnyValue{})...})), I...> : std::true_type {};
template <class Args, size_t... I>
constexpr size_t CountFields(std::index_sequence<I...>) {
  if constexpr (TakesValues<Args, void, I..., sizeof...(I)>::value) {
    return CountFields<Args>(std::make_index_sequence<sizeof...(I) + 1>());
  } else {
    return sizeof...(I);
  }
}

template <class Args>
void AddFields(ArgumentTable& table) {
  using Base = typename BaseOf<Args>::type;
  constexpr size_t listed = RequiredFields<Args>::kCount + OptionalFields<Args>::kCount;
  static_assert(CountFields<Args>(std::index_sequence<>()) == listed + (std::is_void_v<Base> ? 0 : 1),
                "PEAK_FIELDS and PEAK_OPTIONAL_FIELDS do not list every field of the struct");
  if constexpr (!std::is_void_v<Base>) AddFields<Base>(table);
  static const Args sample{};
  const auto add = [&](const char* name, auto member, bool required) {
    using T = std::decay_t<decltype(sample.*member)>;
    const auto offset = reinterpret_cast<const char*>(&(sample.*member)) - reinterpret_cast<const char*>(&sample);
    table.Add(name, offset, KindOf<T>(), required);
  };
  RequiredFields<Args>::ForEach([&](const char* name, auto member) { add(name, member, true); });
  OptionalFields<Args>::ForEach([&](const char* name, auto member) { add(name, member, false); });
}

template <class Args>
const ArgumentTable& TableOf() {
  static const ArgumentTable table = [] {
    ArgumentTable fields;
    AddFields<Args>(fields);
    return fields;
  }();
  return table;
}

template <class Args>
const ArgumentTable& TableWithThreads() {
  static const ArgumentTable table = [] {
    static const WithThreads<Args> sample{};
    const auto offset = [](const auto& part) {
      return reinterpret_cast<const char*>(&part) - reinterpret_cast<const char*>(&sample);
    };
    if (offset(sample.args) != 0) throw std::logic_error("WithThreads::args is not at offset 0");
    ArgumentTable fields;
    AddFields<Args>(fields);
    fields.Add("threads", offset(sample.threads), FieldKind::kInt, true);
    return fields;
  }();
  return table;
}

// ------------------------------------------------------------------------------------------------ Python functions
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Runs a kernel, or records its call. `self` is the function's name.
template <class Args, void (*kKernel)(const Args&, int)>
PyObject* CallKernel(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  WithThreads<Args> call;
  if (!TableWithThreads<Args>().Read(PyUnicode_AsUTF8(self), &call, values, positional, names)) return nullptr;
  try {
    if (Tape* tape = Tape::Recording()) {
      const Py_ssize_t count = positional + (names == nullptr ? 0 : PyTuple_GET_SIZE(names));
      tape->Append([call] { kKernel(call.args, call.threads); }, values, count);
      Py_RETURN_NONE;
    }
    const WithoutGil released;
    kKernel(call.args, call.threads);
  } catch (...) {
    RaiseCurrentException();
    return nullptr;
  }
  Py_RETURN_NONE;
}

using KeywordFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

inline PyMethodDef* NewMethodDef(const char* name, KeywordFunction function) {
  const auto untyped = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  return new PyMethodDef{name, untyped, METH_FASTCALL | METH_KEYWORDS, nullptr};  // lives as long as the module
}

template <class Args, void (*kKernel)(const Args&, int)>
void DefineKernel(py::module_& module, const char* name) {
  const py::str self(name);
  PyObject* function = PyCFunction_New(NewMethodDef(name, CallKernel<Args, kKernel>), self.ptr());
  if (function == nullptr) throw py::error_already_set();
  module.attr(name) = py::reinterpret_steal<py::object>(function);
}

// The same for methods of a class that pybind11 knows.
template <auto kMethod>
const char* method_name = nullptr;

template <class Class, class Args, void (Class::*kMethod)(const Args&)>
PyObject* CallMethod(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  Args args{};
  if (!TableOf<Args>().Read(method_name<kMethod>, &args, values, positional, names)) return nullptr;
  try {
    (py::handle(self).cast<Class&>().*kMethod)(args);
  } catch (...) {
    RaiseCurrentException();
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <class Class, class Args, void (Class::*kMethod)(const Args&, int)>
PyObject* CallMethodWithThreads(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  WithThreads<Args> call;
  if (!TableWithThreads<Args>().Read(method_name<kMethod>, &call, values, positional, names)) return nullptr;
  try {
    Class& object = py::handle(self).cast<Class&>();
    const WithoutGil released;
    (object.*kMethod)(call.args, call.threads);
  } catch (...) {
    RaiseCurrentException();
    return nullptr;
  }
  Py_RETURN_NONE;
}

inline void AddMethod(py::object& type, const char* name, KeywordFunction function) {
  PyObject* method = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), NewMethodDef(name, function));
  if (method == nullptr) throw py::error_already_set();
  type.attr(name) = py::reinterpret_steal<py::object>(method);
}

template <class Class, class Args, void (Class::*kMethod)(const Args&)>
void DefineMethod(py::object& type, const char* name) {
  method_name<kMethod> = name;
  AddMethod(type, name, CallMethod<Class, Args, kMethod>);
}

template <class Class, class Args, void (Class::*kMethod)(const Args&, int)>
void DefineMethodWithThreads(py::object& type, const char* name) {
  method_name<kMethod> = name;
  AddMethod(type, name, CallMethodWithThreads<Class, Args, kMethod>);
}

// Returns a struct filled from the keyword arguments of a pybind11 function.
template <class Args>
Args FromKeywords(const char* function, const py::kwargs& keywords) {
  Args args{};
  std::vector<PyObject*> values;
  py::tuple names(keywords.size());
  for (const auto& [name, value] : keywords) {
    names[values.size()] = name;
    values.push_back(value.ptr());
  }
  if (!TableOf<Args>().Read(function, &args, values.data(), 0, names.ptr())) throw py::error_already_set();
  return args;
}

}  // namespace peak::python

#endif  // PEAK_PYTHON_ARGUMENTS_H_
