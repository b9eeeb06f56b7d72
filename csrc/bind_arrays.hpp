#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "check.hpp"

namespace py = pybind11;

inline std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

// "float32 [2, 4, 8]"
inline std::string kind(const py::array& array) {
    std::string shape = "[";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) shape += (i ? ", " : "") + std::to_string(array.shape(i));
    return text(array.dtype()) + " " + shape + "]";
}

// Seeds or sample numbers: uint64 [N].
inline std::vector<std::uint64_t> identities(const char* op, const char* name, const py::array& array,
                                             py::ssize_t count) {
    const bool good = array.dtype().equal(py::dtype::of<std::uint64_t>()) && array.ndim() == 1;
    volcast::check(good && array.size() == count, op, name, ": got ", kind(array), ", wanted uint64 [", count, "]");
    const auto values = array.cast<py::array_t<std::uint64_t>>();
    std::vector<std::uint64_t> result(static_cast<std::size_t>(count));
    for (py::ssize_t i = 0; i < count; ++i) result[static_cast<std::size_t>(i)] = values.at(i);
    return result;
}
