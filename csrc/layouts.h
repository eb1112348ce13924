// What a call's tensors are but for their addresses, as bytes to look its plan up by.
//
// Shapes, strides, dtypes and devices come by DLPack's C exchange (version 1), whose structures are repeated here: to
// ask a tensor for its attributes one by one in Python takes several times as long. Not every torch has it; 2.13 does.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

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

class Layouts {
 public:
  explicit Layouts(const pybind11::capsule& exchange) {
    const char* const name = exchange.name();
    const dlpack::Exchange* found = nullptr;
    if (name && std::strcmp(name, "dlpack_exchange_api") == 0) found = exchange.get_pointer<dlpack::Exchange>();
    while (found && found->major > 1) found = found->older;
    if (!found || found->major != 1 || !found->from_object) throw std::invalid_argument("exchange: not DLPack's");
    from_object_ = found->from_object;
  }

  // Of each, which may be None: the dtype, the device, the shape, the strides, and where it lies in 16 bytes. Nothing
  // where DLPack can't say.
  pybind11::object operator()(const pybind11::tuple& tensors) const {
    std::array<int64_t, 256> words;
    size_t count = 0;
    if (tensors.size() > words.size()) throw std::invalid_argument("tensors: too many");
    for (const pybind11::handle object : tensors) {
      if (object.is_none()) {
        words[count++] = -1;
        continue;
      }
      dlpack::Tensor x;
      if (from_object_(object.ptr(), &x) != 0) {
        PyErr_Clear();
        return pybind11::none();
      }
      const size_t dimensions = size_t(x.dimensions);
      // Room for this one, and a word for each of the others.
      if (count + 4 + 2 * dimensions + tensors.size() > words.size()) return pybind11::none();
      words[count++] = x.dimensions;
      words[count++] = int64_t(x.type_code) << 32 | int64_t(x.type_bits) << 16 | x.type_lanes;
      words[count++] = int64_t(x.device_type) << 32 | uint32_t(x.device_index);
      words[count++] = int64_t((reinterpret_cast<uintptr_t>(x.data) + x.byte_offset) & 15);
      std::memcpy(&words[count], x.shape, dimensions * sizeof(int64_t));
      std::memcpy(&words[count + dimensions], x.strides, dimensions * sizeof(int64_t));
      count += 2 * dimensions;
    }
    return pybind11::bytes(reinterpret_cast<const char*>(words.data()), count * sizeof(int64_t));
  }

 private:
  dlpack::FromObject from_object_;
};

}  // namespace flashkda
