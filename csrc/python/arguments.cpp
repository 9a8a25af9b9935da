#include "python/arguments.h"

#include <new>
#include <stdexcept>
#include <string>

namespace peak::python {
namespace {

PyObject* Interned(const char* name) {
  PyObject* text = PyUnicode_InternFromString(name);
  if (text == nullptr) throw py::error_already_set();
  return text;
}

const char* NameOf(FieldKind kind) {
  switch (kind) {
    case FieldKind::kInt:
    case FieldKind::kInt64: return "int";
    case FieldKind::kBool: return "bool";
    case FieldKind::kFloat:
    case FieldKind::kDouble: return "float";
    case FieldKind::kPointer: return "a tensor, an address or None";
    case FieldKind::kStrided: return "a tensor (batch, token, head, feature) with contiguous features, or None";
  }
  return "";
}

// Each of these functions returns false if the value does not fit the field. It may or may not set a Python error.
bool ToInt64(PyObject* value, int64_t* to) {
  if (!PyLong_Check(value)) return false;
  *to = PyLong_AsLongLong(value);
  return *to != -1 || !PyErr_Occurred();
}

bool ToDouble(PyObject* value, double* to) {
  *to = PyFloat_AsDouble(value);
  return *to != -1.0 || !PyErr_Occurred();
}

// Returns whether a tensor without an address is empty, which is right. Otherwise a kernel would read address 0: of
// torch's zero tensors, or after `untyped_storage().resize_(0)`.
bool IsEmpty(PyObject* tensor) {
  static PyObject* const numel = Interned("numel");
  const auto count = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, numel));
  int64_t elements = 0;
  if (!count || !ToInt64(count.ptr(), &elements)) return false;
  if (elements != 0) PyErr_SetString(PyExc_ValueError, "got a tensor without memory, expected one with data");
  return elements == 0;
}

bool ToAddress(PyObject* value, void** to) {
  static PyObject* const data_ptr = Interned("data_ptr");
  if (value == Py_None) {
    *to = nullptr;
    return true;
  }
  if (PyLong_Check(value)) {
    *to = PyLong_AsVoidPtr(value);
    return *to != nullptr || !PyErr_Occurred();
  }
  PyObject* const address = PyObject_CallMethodNoArgs(value, data_ptr);
  if (address == nullptr) return false;
  *to = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return *to != nullptr || (!PyErr_Occurred() && IsEmpty(value));
}

bool ToStrided(PyObject* value, StridedOutput* to) {
  static PyObject* const stride = Interned("stride");
  *to = {};
  if (value == Py_None) return true;
  if (PyLong_Check(value) || !ToAddress(value, &to->data)) return false;
  const auto strides = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, stride));
  if (!strides || !PyTuple_Check(strides.ptr()) || PyTuple_GET_SIZE(strides.ptr()) != 4) return false;
  int64_t last = 0;
  return ToInt64(PyTuple_GET_ITEM(strides.ptr(), 0), &to->stride_b) &&
         ToInt64(PyTuple_GET_ITEM(strides.ptr(), 1), &to->stride_t) &&
         ToInt64(PyTuple_GET_ITEM(strides.ptr(), 2), &to->stride_h) &&
         ToInt64(PyTuple_GET_ITEM(strides.ptr(), 3), &last) && last == 1;
}

bool Convert(PyObject* value, FieldKind kind, char* to) {
  switch (kind) {
    case FieldKind::kInt: {
      int64_t wide = 0;
      if (!ToInt64(value, &wide) || wide != static_cast<int>(wide)) return false;
      *reinterpret_cast<int*>(to) = static_cast<int>(wide);
      return true;
    }
    case FieldKind::kInt64: return ToInt64(value, reinterpret_cast<int64_t*>(to));
    case FieldKind::kBool:
      if (!PyBool_Check(value)) return false;
      *reinterpret_cast<bool*>(to) = value == Py_True;
      return true;
    case FieldKind::kFloat: {
      double wide = 0.0;
      if (!ToDouble(value, &wide)) return false;
      *reinterpret_cast<float*>(to) = static_cast<float>(wide);
      return true;
    }
    case FieldKind::kDouble: return ToDouble(value, reinterpret_cast<double*>(to));
    case FieldKind::kPointer: return ToAddress(value, reinterpret_cast<void**>(to));
    case FieldKind::kStrided: return ToStrided(value, reinterpret_cast<StridedOutput*>(to));
  }
  return false;
}

// Keeps an error that a tensor raised itself (a fake tensor has no data).
void RaiseMistyped(const char* function, PyObject* name, FieldKind kind, PyObject* value) {
  const bool own = PyErr_Occurred() == nullptr || PyErr_ExceptionMatches(PyExc_TypeError) ||
                   PyErr_ExceptionMatches(PyExc_AttributeError) || PyErr_ExceptionMatches(PyExc_OverflowError);
  if (!own) return;
  PyErr_Clear();
  if (kind == FieldKind::kPointer || kind == FieldKind::kStrided) {  // the text of a tensor can be long
    PyErr_Format(PyExc_TypeError, "%s: argument '%U' is a %s, expected %s", function, name, Py_TYPE(value)->tp_name,
                 NameOf(kind));
  } else {
    PyErr_Format(PyExc_TypeError, "%s: argument '%U' is %R, expected %s", function, name, value, NameOf(kind));
  }
}

}  // namespace

void ArgumentTable::Add(const char* name, std::ptrdiff_t offset, FieldKind kind, bool required) {
  if (fields_.size() == 64) throw std::length_error("an argument struct has more than 64 fields");
  if (required) required_ |= uint64_t{1} << fields_.size();
  fields_.push_back({Interned(name), offset, kind});
}

bool ArgumentTable::Read(const char* function, void* args, PyObject* const* values, Py_ssize_t positional,
                         PyObject* names) const {
  if (positional > 0) {
    PyErr_Format(PyExc_TypeError, "%s: got %zd positional arguments, expected keyword arguments only", function,
                 positional);
    return false;
  }
  uint64_t given = 0;
  const Py_ssize_t count = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  int at = -1;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(names, i);
    at = Find(name, static_cast<size_t>(at + 1));  // callers mostly follow the order of the struct
    if (at < 0) {
      RaiseUnknown(function, name);
      return false;
    }
    const Field& field = fields_[at];
    if (!Convert(values[i], field.kind, static_cast<char*>(args) + field.offset)) {
      RaiseMistyped(function, name, field.kind, values[i]);
      return false;
    }
    given |= uint64_t{1} << at;
  }
  if ((given & required_) == required_) return true;
  RaiseMissing(function, given);
  return false;
}

int ArgumentTable::Find(PyObject* name, size_t expected) const {
  const size_t count = fields_.size();
  for (size_t i = expected; i < count; ++i) {
    if (fields_[i].name == name) return static_cast<int>(i);
  }
  for (size_t i = 0; i < expected && i < count; ++i) {
    if (fields_[i].name == name) return static_cast<int>(i);
  }
  for (size_t i = 0; i < count; ++i) {  // a name that is not interned
    if (PyUnicode_Compare(fields_[i].name, name) == 0) return static_cast<int>(i);
  }
  return -1;
}

void ArgumentTable::RaiseUnknown(const char* function, PyObject* name) const {
  std::string known;
  for (const Field& field : fields_) known += (known.empty() ? "" : ", ") + std::string(PyUnicode_AsUTF8(field.name));
  PyErr_Format(PyExc_TypeError, "%s: got an unknown argument '%U', expected %s", function, name, known.c_str());
}

void ArgumentTable::RaiseMissing(const char* function, uint64_t given) const {
  std::string missing;
  for (size_t i = 0; i < fields_.size(); ++i) {
    if (!(required_ & ~given & uint64_t{1} << i)) continue;
    missing += (missing.empty() ? "" : ", ") + std::string(PyUnicode_AsUTF8(fields_[i].name));
  }
  PyErr_Format(PyExc_TypeError, "%s: missing arguments: %s", function, missing.c_str());
}

void RaiseCurrentException() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown C++ exception");
  }
}

}  // namespace peak::python
