// What the files of the Python module share: checks of arguments that come from Python, as ValueError.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "rows.h"

namespace omni {

namespace py = pybind11;

[[noreturn]] inline void fail(const std::string& message) { throw py::value_error(message); }

template <class T>
T* at(std::uintptr_t address, const char* name, bool required) {
  if (required && address == 0) fail(std::string(name) + " is a null address; pass the data_ptr() of a tensor");
  if (address % alignof(T))
    fail(std::string(name) + " is not aligned to its elements; pass the data_ptr() of a tensor");
  return reinterpret_cast<T*>(address);
}

inline const RowKernels& kernels_named(const std::string& name) {
  const RowKernels* kernels = select_kernels(name.c_str());
  if (!kernels) fail("instruction set '" + name + "' is unknown or not run by this processor; use 'auto'");
  return *kernels;
}

inline int checked_threads(int threads) {
  if (threads < 1 || threads > 4096) fail("num_threads = " + std::to_string(threads) + " must be between 1 and 4096");
  return threads;
}

// Ranges short enough to balance, long enough to stream.
inline std::int64_t grain_of(std::int64_t rows, int threads) {
  const std::int64_t grain = rows / (4 * static_cast<std::int64_t>(threads));
  return grain < 1 ? 1 : grain > 16 ? 16 : grain;
}

// The functions of bindings_decoder.cpp.
void bind_decoder(py::module_& m);

}  // namespace omni
