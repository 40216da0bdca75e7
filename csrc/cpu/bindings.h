// What the files of the Python module share: checks of arguments that come from Python, as ValueError.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "parallel.h"
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

// Which kernels, on how many threads: the last argument of every function that works on rows.
struct How {
  How(int num_threads, const std::string& isa) : kernels(kernels_named(isa)), threads(num_threads) {
    if (threads < 1 || threads > 4096) fail("num_threads = " + std::to_string(threads) + " must be between 1 and 4096");
  }
  const RowKernels& kernels;
  const int threads;

  // Calls body(begin, end) over ranges of at most `grain` tasks, without the GIL.
  template <class Body>
  void over(std::int64_t tasks, std::int64_t grain, const Body& body) const {
    const py::gil_scoped_release release;
    parallel_for(tasks, grain, threads, body);
  }
  // The same over rows, in ranges short enough to balance and long enough to stream.
  template <class Body>
  void over_rows(std::int64_t rows, const Body& body) const {
    const std::int64_t grain = rows / (4 * static_cast<std::int64_t>(threads));
    over(rows, grain < 1 ? 1 : grain > 16 ? 16 : grain, body);
  }
};

// The functions of bindings_decoder.cpp.
void bind_decoder(py::module_& m);

}  // namespace omni
