#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "bind_arrays.hpp"
#include "latent_update.hpp"

using namespace volcast;

namespace {

using GilFree = py::call_guard<py::gil_scoped_release>;
using Values = py::array_t<float, py::array::c_style>;

void check_floats(const char* name, const py::array& array, py::ssize_t count) {
    const bool good = py::isinstance<Values>(array) && array.ndim() >= 2 && array.shape(0) == count;
    check(good, "LatentUpdate", name, ": got ", kind(array), ", wanted contiguous float32 [", count, ", ...]");
}

std::unique_ptr<LatentUpdate> make_update(py::array x, py::array row, const std::vector<py::array>& outs) {
    check(x.ndim() >= 2 && x.size() >= 1, "LatentUpdate", "x: got ", kind(x), ", wanted [N, ...]");
    const py::ssize_t count = x.shape(0);
    check_floats("x", x, count);
    check_floats("row", row, count);
    StepBuffers buffers{static_cast<std::size_t>(count), static_cast<std::size_t>(x.size() / count),
                        static_cast<std::size_t>(row.size() / count), static_cast<float*>(x.mutable_data()),
                        static_cast<float*>(row.mutable_data()), {}};
    for (const py::array& out : outs) {
        check_floats("outs", out, count);
        check(out.size() == x.size(), "LatentUpdate", "outs: got ", kind(out), ", wanted ", kind(x));
        buffers.outs.push_back(static_cast<const float*>(out.data()));
    }
    return std::make_unique<LatentUpdate>(std::move(buffers));
}

void start(LatentUpdate& update, const Plan& plan, const Values& rows, const py::array& seeds,
           const py::array& samples, std::optional<double> guidance) {
    check(rows.ndim() == 2, "LatentUpdate", "rows: got ", kind(rows), ", wanted float32 [steps, R]");
    check(!guidance || std::isfinite(*guidance), "LatentUpdate", "guidance=", guidance.value_or(0),
          ": need a finite number");
    const py::ssize_t count = seeds.ndim() == 1 ? seeds.shape(0) : 0;
    update.start(plan, {rows.data(), rows.data() + rows.size()}, identities("LatentUpdate", "seeds", seeds, count),
                 identities("LatentUpdate", "samples", samples, count), guidance);
}

}  // namespace

void bind_memory(py::module_& m) {
    const auto dying = py::release_gil_before_calling_cpp_dtor();
    py::class_<DeviceMemory, std::shared_ptr<DeviceMemory>>(m, "DeviceMemory", "Memory of the device.", dying)
        .def(py::init<std::shared_ptr<const Driver>, std::size_t>(), py::arg("driver"), py::arg("bytes"), GilFree())
        .def_property_readonly("address", &DeviceMemory::address)
        .def_property_readonly("nbytes", &DeviceMemory::bytes);
    py::class_<PinnedMemory, std::shared_ptr<PinnedMemory>>(
        m, "PinnedMemory", "Page-locked memory of the host, zero at first; a buffer of bytes.", py::buffer_protocol(),
        dying)
        .def(py::init<std::shared_ptr<const Driver>, std::size_t>(), py::arg("driver"), py::arg("bytes"), GilFree())
        .def_buffer([](const PinnedMemory& memory) {
            return py::buffer_info(static_cast<std::uint8_t*>(memory.data()),
                                   static_cast<py::ssize_t>(memory.bytes()));
        })
        .def_property_readonly("nbytes", &PinnedMemory::bytes);
    py::class_<CapturedGraph, std::shared_ptr<CapturedGraph>>(m, "CapturedGraph", "What a stream captured.", dying)
        .def_property_readonly("handle",
                               [](const CapturedGraph& g) { return reinterpret_cast<std::uintptr_t>(g.handle()); });
    py::class_<LatentUpdate>(m, "LatentUpdate",
                             "A plan's update as a part of a stream's work, on page-locked arrays that a captured step\n"
                             "copies from and to: x [N, ...] and row [N, R] in, outs [N, ...] out, one or with guidance\n"
                             "(unconditional, conditional).")
        .def(py::init(&make_update), py::arg("x"), py::arg("row"), py::arg("outs"), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
        .def("start", &start, py::arg("plan"), py::arg("rows"), py::arg("seeds"), py::arg("samples"),
             py::arg("guidance") = py::none(),
             "Begins a trajectory from what x holds. rows: float32 [steps, R]. The stream must be idle.")
        .def("enqueue", &LatentUpdate::enqueue, py::arg("stream"), GilFree(),
             "Adds the update of one row to the stream's work; keep this object until that is done.")
        .def_property_readonly("done", &LatentUpdate::done)
        .def_property_readonly("failure", &LatentUpdate::failure);
}
