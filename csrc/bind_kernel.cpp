#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>

#include "kernel.hpp"

namespace py = pybind11;
using namespace volcast;

namespace {

using GilFree = py::call_guard<py::gil_scoped_release>;

std::unique_ptr<Kernel> make_kernel(std::shared_ptr<const Driver> driver, const py::bytes& image,
                                    const std::string& entry, unsigned threads, unsigned shared) {
    const std::string data = image;
    const py::gil_scoped_release release;
    return std::make_unique<Kernel>(std::move(driver), data, entry, threads, shared);
}

void launch(const Kernel& kernel, const Stream& stream, const std::array<unsigned, 3>& grid,
            const py::bytes& arguments) {
    const std::string data = arguments;
    const py::gil_scoped_release release;
    kernel.launch(stream, grid, data);
}

}  // namespace

void bind_kernel(py::module_& m) {
    const auto dying = py::release_gil_before_calling_cpp_dtor();
    py::class_<Kernel>(m, "Kernel", "One entry of a cubin, loaded into the device's context.", dying)
        .def(py::init(&make_kernel), py::arg("driver"), py::arg("image"), py::arg("entry"), py::arg("threads"),
             py::arg("shared_bytes"))
        .def("launch", &launch, py::arg("stream"), py::arg("grid"), py::arg("arguments"),
             "Adds a launch to the stream's work. arguments: the parameters' bytes as the kernel's parameter space has\n"
             "them. Keep this object and what the arguments point to until it is done.");
}
