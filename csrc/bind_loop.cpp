#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>

#include "bind_arrays.hpp"
#include "loop.hpp"

using namespace volcast;

namespace {

py::array read_only(const py::array& array) {
    py::array view = array.attr("view")();
    view.attr("flags").attr("writeable") = false;
    return view;
}

template <class T>
Timing run_as(const Plan& plan, py::array x, const py::function& callback, const std::vector<std::uint64_t>& seeds,
              const std::vector<std::uint64_t>& samples, const std::optional<double>& guidance, bool doubled,
              const py::object& on_step, const py::array* known, const py::array* keep) {
    std::vector<py::ssize_t> twice_shape(x.shape(), x.shape() + x.ndim());
    const auto count = static_cast<std::size_t>(twice_shape[0]);
    twice_shape[0] *= doubled ? 2 : 0;
    // numpy owns the doubled batch too, so that a view the network keeps never dangles.
    py::array_t<T> twice(twice_shape);
    const py::array shown = read_only(x), shown_twice = read_only(twice);
    const auto numel = static_cast<std::size_t>(x.size()) / count;
    const Batch<T> batch{count, numel, static_cast<T*>(x.mutable_data()), seeds.data(), samples.data(),
                         doubled ? twice.mutable_data() : nullptr,
                         {known ? static_cast<const T*>(known->data()) : nullptr,
                          keep ? static_cast<const T*>(keep->data()) : nullptr}};
    py::object output;  // keeps the network's array alive until the next call
    const Network<T> network = [&](std::size_t step, const T*, Branch branch) {
        const py::gil_scoped_acquire acquire;
        const py::array& wanted = branch == Branch::both ? shown_twice : shown;
        output = callback(step, wanted, branch);
        check(py::isinstance<py::array>(output), "loop", "step ", step, ": the network gave a ",
              text(py::type::handle_of(output).attr("__name__")), ", wanted a numpy array");
        const auto array = py::reinterpret_borrow<py::array>(output);
        const bool same = array.dtype().equal(wanted.dtype()) && array.ndim() == wanted.ndim() &&
                          std::equal(wanted.shape(), wanted.shape() + wanted.ndim(), array.shape());
        check(same, "loop", "step ", step, ": the network gave ", kind(array), ", wanted ", kind(wanted));
        check((array.flags() & py::array::c_style) != 0, "loop", "step ", step,
              ": the network's output is not C-contiguous; apply numpy.ascontiguousarray");
        return static_cast<const T*>(array.data());
    };
    const auto after = [&](std::size_t done, std::size_t total) {
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!on_step.is_none()) on_step(done, total);
    };
    const py::gil_scoped_release release;
    return run<T>(plan, batch, guidance, network, after);
}

Timing run_any(const Plan& plan, const py::array& x, const py::function& network, const py::array& seeds,
               const py::array& samples, std::optional<double> guidance, bool doubled, const py::object& on_step,
               const std::optional<py::array>& known, const std::optional<py::array>& keep) {
    check(x.ndim() >= 2 && x.size() >= 1, "run", "x: got ", kind(x), ", wanted [N, ...] with at least one value");
    check((x.flags() & py::array::c_style) != 0 && x.writeable(), "run", "x: need a writeable C-contiguous array");
    const auto seed = identities("run", "seeds", seeds, x.shape(0));
    const auto sample = identities("run", "samples", samples, x.shape(0));
    check(!guidance || std::isfinite(*guidance), "run", "guidance=", guidance.value_or(0), ": need a finite number");
    check(guidance || !doubled, "run", "doubled=True without guidance: give guidance or drop doubled");
    const bool single = x.dtype().equal(py::dtype::of<float>());
    check(single || x.dtype().equal(py::dtype::of<double>()), "run", "x: got ", kind(x), ", wanted float32 or float64");
    for (const auto* array : {&known, &keep}) {
        if (!*array) continue;
        const bool like = (*array)->dtype().equal(x.dtype()) && (*array)->ndim() == x.ndim() - 1 &&
                          std::equal(x.shape() + 1, x.shape() + x.ndim(), (*array)->shape()) &&
                          ((*array)->flags() & py::array::c_style) != 0;
        check(like, "run", "known, keep: got ", kind(**array), ", wanted a C-contiguous array like one sample of x, ",
              kind(x));
    }
    const auto run_typed = single ? run_as<float> : run_as<double>;
    return run_typed(plan, x, network, seed, sample, guidance, doubled, on_step, known ? &*known : nullptr,
                     keep ? &*keep : nullptr);
}

}  // namespace

void bind_loop(py::module_& m) {
    py::native_enum<Branch>(m, "Branch", "enum.Enum", "Which condition the network is asked to apply.")
        .value("CONDITIONAL", Branch::conditional)
        .value("UNCONDITIONAL", Branch::unconditional)
        .value("BOTH", Branch::both)
        .finalize();
    py::class_<Timing>(m, "Timing", "Seconds spent by run, and within the network calls.")
        .def_readonly("total_s", &Timing::total_s)
        .def_readonly("network_s", &Timing::network_s);
    m.def("run", &run_any, py::arg("plan"), py::arg("x"), py::arg("network"), py::arg("seeds"), py::arg("samples"),
          py::kw_only(), py::arg("guidance") = py::none(), py::arg("doubled") = false, py::arg("on_step") = py::none(),
          py::arg("known") = py::none(), py::arg("keep") = py::none(),
          "Runs the plan on x [N, ...] in place. network(step, x, branch) returns an array like x; x is read-only\n"
          "and changes after the call, so copy what must last. seeds, samples: uint64 [N]. guidance w: u + w*(c-u),\n"
          "by one call on [uncond; cond] if doubled, else by two. on_step(done, total) follows each row; what it or\n"
          "the network raises stops the loop. known, keep: like one sample of x, where the plan inpaints: its latent, and\n"
          "1 where it stays.");
}
