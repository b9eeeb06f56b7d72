#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "schedule.hpp"

namespace py = pybind11;
using namespace volcast;

void bind_schedule(py::module_& m) {
    const auto array = [](const std::vector<double>& values) {
        return py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data());
    };
    py::class_<Schedule>(m, "Schedule", "The noise schedule of training, float64 [T].")
        .def_property_readonly("betas", [=](const Schedule& s) { return array(s.betas); })
        .def_property_readonly("alphas_cumprod", [=](const Schedule& s) { return array(s.alphas_cumprod); })
        .def("__len__", &Schedule::size);
    m.def("linear_beta", &linear_beta, py::arg("timesteps"), py::arg("beta_start") = 1e-4, py::arg("beta_end") = 2e-2,
          "MONAI's linear_beta, in float64.");
    m.def("scaled_linear_beta", &scaled_linear_beta, py::arg("timesteps"), py::arg("beta_start") = 1e-4,
          py::arg("beta_end") = 2e-2, "MONAI's scaled_linear_beta, in float64.");
    m.def("sigmoid_beta", &sigmoid_beta, py::arg("timesteps"), py::arg("beta_start") = 1e-4,
          py::arg("beta_end") = 2e-2, py::arg("sig_range") = 6.0, "MONAI's sigmoid_beta, in float64.");
    m.def("cosine", &cosine, py::arg("timesteps"), py::arg("s") = 8e-3, "MONAI's cosine, in float64.");

    py::native_enum<Spacing>(m, "Spacing", "enum.Enum", "Timestep spacing, arXiv:2305.08891 table 2.")
        .value("LEADING", Spacing::leading)
        .value("LINSPACE", Spacing::linspace)
        .value("TRAILING", Spacing::trailing)
        .finalize();
    m.def("spaced_timesteps", &spaced_timesteps, py::arg("spacing"), py::arg("train_timesteps"), py::arg("steps"),
          py::arg("steps_offset") = 0, "Descending timesteps; steps_offset moves the leading spacing only.");
    m.def("monai_linspace", &monai_linspace, py::arg("train_timesteps"), py::arg("steps"), py::arg("steps_offset") = 0,
          "MONAI 1.6.1's descending timesteps for DDIM and DDPM.");
}
