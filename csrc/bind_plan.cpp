#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "plan.hpp"

namespace py = pybind11;
using namespace volcast;

namespace {

std::string describe_plan(const Plan& plan) {
    std::string text = "Plan(" + plan.method + ", " + std::to_string(plan.rows.size()) + " rows)";
    for (std::size_t i = 0; i < plan.rows.size(); ++i) {
        text += "\n  " + std::to_string(i) + ": " + describe(plan.rows[i]);
    }
    return text;
}

// A read-only view: the plan is immutable and stays alive as long as the array.
py::array rows_of(const py::object& self) {
    const auto& plan = self.cast<const Plan&>();
    py::array_t<Row> rows(static_cast<py::ssize_t>(plan.rows.size()), plan.rows.data(), self);
    rows.attr("flags").attr("writeable") = false;
    return std::move(rows);
}

}  // namespace

void bind_plan(py::module_& m) {
    PYBIND11_NUMPY_DTYPE(Row, t, signal, sigma, a, d, p, q, lo, hi, e, b, c, read, write, from_saved, save,
                         known_signal, known_sigma, again, again_sigma);
    py::native_enum<Prediction>(m, "Prediction", "enum.Enum", "What the network's output means.")
        .value("EPSILON", Prediction::epsilon)
        .value("SAMPLE", Prediction::sample)
        .value("V_PREDICTION", Prediction::v_prediction)
        .finalize();
    py::native_enum<Variance>(m, "Variance", "enum.Enum", "DDPM's noise, arXiv:2006.11239 section 3.2.")
        .value("FIXED_SMALL", Variance::fixed_small)
        .value("FIXED_LARGE", Variance::fixed_large)
        .finalize();

    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", "Immutable rows of coefficients; share it freely.")
        .def_readonly("method", &Plan::method)
        .def_readonly("train_timesteps", &Plan::train_timesteps)
        .def_readonly("history_slots", &Plan::history_slots)
        .def_readonly("keeps_saved", &Plan::keeps_saved)
        .def_readonly("stochastic", &Plan::stochastic)
        .def_readonly("inpaints", &Plan::inpaints)
        .def_property_readonly("timesteps", [](const Plan& plan) {
            std::vector<double> t;
            for (const Row& row : plan.rows) t.push_back(row.t);
            return py::array_t<double>(static_cast<py::ssize_t>(t.size()), t.data());
        })
        .def_property_readonly("rows", &rows_of)
        .def("__len__", [](const Plan& plan) { return plan.rows.size(); })
        .def("__repr__", &describe_plan);

    py::class_<Steps>(m, "Steps", "Timesteps and transitions of a diffusion plan.")
        .def(py::init([](std::int64_t steps, Spacing spacing, std::int64_t steps_offset, std::int64_t start,
                         bool set_alpha_to_one, bool monai) {
                 return Steps{steps, spacing, steps_offset, start, set_alpha_to_one, monai};
             }),
             py::arg("steps"), py::kw_only(), py::arg("spacing") = Spacing::linspace, py::arg("steps_offset") = 0,
             py::arg("start") = 0, py::arg("set_alpha_to_one") = true, py::arg("monai") = false);

    const Clip unclipped;
    m.def("make_ddim", &make_ddim, py::arg("schedule"), py::arg("steps"), py::arg("prediction"), py::kw_only(),
          py::arg("clip") = unclipped, py::arg("eta") = 0.0, py::arg("reverse") = false,
          "DDIM, arXiv:2010.02502; reverse: inversion.");
    m.def("make_ddpm", &make_ddpm, py::arg("schedule"), py::arg("steps"), py::arg("prediction"), py::kw_only(),
          py::arg("clip") = unclipped, py::arg("variance") = Variance::fixed_small,
          "DDPM, arXiv:2006.11239, respaced when steps < T.");
    m.def("make_pndm", &make_pndm, py::arg("schedule"), py::arg("steps"), py::arg("prediction"), py::kw_only(),
          py::arg("skip_prk_steps") = true, "PNDM, arXiv:2202.09778.");
    m.def("make_dpm_solver", &make_dpm_solver, py::arg("schedule"), py::arg("steps"), py::arg("prediction"),
          py::kw_only(), py::arg("clip") = unclipped, "DPM-Solver++(2M), arXiv:2211.01095.");
    m.def("make_repaint", &make_repaint, py::arg("plan"), py::kw_only(), py::arg("resamples"), py::arg("jump_length"),
          "RePaint, arXiv:2201.09865: the plan with a known part merged in, and its jumps.");
    m.def(
        "make_rflow",
        [](std::int64_t steps, std::int64_t train_timesteps, std::int64_t steps_offset, std::int64_t start,
           bool use_discrete_timesteps, bool use_timestep_transform, std::int64_t input_img_size_numel,
           std::int64_t base_img_size_numel, std::int64_t spatial_dim, bool monai) {
            return make_rflow({train_timesteps, steps, steps_offset, start, use_discrete_timesteps,
                               use_timestep_transform, input_img_size_numel, base_img_size_numel, spatial_dim, monai});
        },
        py::arg("steps"), py::kw_only(), py::arg("train_timesteps") = 1000, py::arg("steps_offset") = 0,
        py::arg("start") = 0, py::arg("use_discrete_timesteps") = true, py::arg("use_timestep_transform") = false,
        py::arg("input_img_size_numel") = 32 * 32 * 32, py::arg("base_img_size_numel") = 32 * 32 * 32,
        py::arg("spatial_dim") = 3, py::arg("monai") = false, "Rectified flow by Euler steps, as MONAI's RFlow.");
}
