// What is asked of a call's tensors each time: what its plan is looked up by, their addresses, and whether gradients
// are wanted.
//
// Shapes, strides, dtypes, devices and addresses come by DLPack's C exchange (version 1), whose structures are repeated
// here: to ask a tensor for its attributes one by one in Python takes several times as long. Not every torch has it;
// 2.11 and 2.13 do.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace flashkda {

namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

// Fills in the tensor, which goes on belonging to the object; not 0 and a Python error where it can't.
using FromObject = int (*)(void* object, Tensor* tensor);

struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void* of_owned_tensors[3];
  FromObject from_object;
  void* current_stream;
};

}  // namespace dlpack

class TensorReader {
 public:
  // types: of which tensors are that may be storage, sizes and strides and no more.
  TensorReader(const pybind11::capsule& exchange, pybind11::tuple types) : types_(std::move(types)) {
    const char* const name = exchange.name();
    const dlpack::Exchange* found = nullptr;
    if (name && std::strcmp(name, "dlpack_exchange_api") == 0) found = exchange.get_pointer<dlpack::Exchange>();
    while (found && found->major > 1) found = found->older;
    if (!found || found->major != 1 || !found->from_object) throw std::invalid_argument("exchange: not DLPack's");
    from_object_ = found->from_object;
  }

  // Of tensors, each of which may be None: their layouts (the dtype, the device, the shape, the strides, and where it
  // lies in 16 bytes), whether any requires a gradient, and their addresses, 0 for None. Nothing where one is of
  // another type, is to be negated when it is read, has no storage for what its shape says (freed, or zeros that are
  // stored nowhere), or is nothing that DLPack can tell of.
  pybind11::object operator()(const pybind11::tuple& tensors) const {
    std::array<int64_t, 256> words;
    std::array<uintptr_t, 32> addresses;
    size_t count = 0;
    bool requires_grad = false;
    if (tensors.size() > addresses.size()) throw std::invalid_argument("tensors: too many");
    for (size_t i = 0; i < tensors.size(); ++i) {
      PyObject* const object = PyTuple_GET_ITEM(tensors.ptr(), i);
      if (object == Py_None) {
        addresses[i] = 0;
        words[count++] = -1;
        continue;
      }
      if (!has_known_type(object) || is_true(PyObject_CallMethodNoArgs(object, is_neg_.ptr()))) {
        return pybind11::none();
      }
      dlpack::Tensor x;
      if (from_object_(object, &x) != 0) {
        PyErr_Clear();
        return pybind11::none();
      }
      const size_t dimensions = size_t(x.dimensions);
      if (!has_memory(x)) return pybind11::none();
      // Room for this one, and a word for each of the others.
      if (count + 4 + 2 * dimensions + tensors.size() > words.size()) return pybind11::none();
      addresses[i] = reinterpret_cast<uintptr_t>(x.data) + x.byte_offset;
      words[count++] = x.dimensions;
      words[count++] = int64_t(x.type_code) << 32 | int64_t(x.type_bits) << 16 | x.type_lanes;
      words[count++] = int64_t(x.device_type) << 32 | uint32_t(x.device_index);
      words[count++] = int64_t(addresses[i] & 15);
      std::memcpy(&words[count], x.shape, dimensions * sizeof(int64_t));
      std::memcpy(&words[count + dimensions], x.strides, dimensions * sizeof(int64_t));
      count += 2 * dimensions;
      requires_grad = requires_grad || is_true(PyObject_GetAttr(object, requires_grad_.ptr()));
    }
    return pybind11::make_tuple(as_bytes(words.data(), count), requires_grad,
                                as_bytes(addresses.data(), tensors.size()));
  }

 private:
  bool has_known_type(PyObject* object) const {
    for (size_t i = 0; i < types_.size(); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(types_.ptr(), i)) return true;
    }
    return false;
  }

  // Whether there is memory at the tensor's address, as far as that tells. A view into storage that was freed has its
  // offset for an address, and a GPU's memory lies above 4 GiB. Nothing is read of a tensor without elements.
  static bool has_memory(const dlpack::Tensor& x) {
    constexpr int32_t kCuda = 2;
    const uintptr_t least = x.device_type == kCuda ? uintptr_t(1) << 32 : 1;
    return reinterpret_cast<uintptr_t>(x.data) >= least ||
           std::find(x.shape, x.shape + x.dimensions, 0) != x.shape + x.dimensions;
  }

  // Of what an attribute or a method gave.
  static bool is_true(PyObject* x) {
    if (!x) throw pybind11::error_already_set();
    Py_DECREF(x);
    return x == Py_True;
  }

  template <typename T>
  static pybind11::bytes as_bytes(const T* data, size_t count) {
    return pybind11::bytes(reinterpret_cast<const char*>(data), count * sizeof(T));
  }

  dlpack::FromObject from_object_;
  pybind11::tuple types_;
  // Interned, as a name in Python code is.
  pybind11::str is_neg_ = pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString("is_neg"));
  pybind11::str requires_grad_ =
      pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString("requires_grad"));
};

}  // namespace flashkda
