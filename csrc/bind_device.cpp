#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "check.hpp"
#include "device_loop.hpp"

namespace py = pybind11;
using namespace volcast;

namespace {

using GilFree = py::call_guard<py::gil_scoped_release>;

// A Python object that any thread may let go of.
using Shared = std::shared_ptr<py::object>;

Shared share(py::object object) {
    return Shared(new py::object(std::move(object)), [](py::object* held) {
        const py::gil_scoped_acquire acquire;
        delete held;
    });
}

// What Python raised in a graph. Unlike py::error_already_set it can be raised again, in every stream it stopped.
struct Raised {
    Shared exception;
};

std::shared_ptr<HostGraph> make_host_graph(std::shared_ptr<const Driver> driver, const py::function& function) {
    const auto call = [held = share(function)] {
        const py::gil_scoped_acquire acquire;
        try {
            (*held)();
        } catch (const py::error_already_set& error) {
            const py::object value = error.value();
            if (error.trace()) PyException_SetTraceback(value.ptr(), error.trace().ptr());
            throw Raised{share(value)};
        }
    };
    const py::gil_scoped_release release;
    return std::make_shared<HostGraph>(std::move(driver), call);
}

std::shared_ptr<Executable> make_executable(std::shared_ptr<const Driver> driver,
                                            const std::vector<std::uintptr_t>& handles, std::size_t repeats) {
    std::vector<CUgraph> graphs;
    for (const std::uintptr_t handle : handles) graphs.push_back(reinterpret_cast<CUgraph>(handle));
    return std::make_shared<Executable>(std::move(driver), graphs, repeats);
}

LoopTiming run(const Executable& step, const Stream& stream, int steps, int ahead, const py::object& on_step,
               const Executable* snapshot, const Executable* preview, const Stream* preview_stream, int every,
               const py::object& on_preview) {
    const bool wanted = every != 0;
    const bool complete = snapshot && preview && preview_stream && !on_preview.is_none();
    const bool none = !snapshot && !preview && !preview_stream && on_preview.is_none();
    check(wanted ? complete : none, "run_steps", "every=", every, ": need ",
          wanted ? "snapshot, preview, preview_stream and on_preview" : "every >= 1",
          wanted ? "; give all four, or every=0" : " with previews; give it, or no preview argument");
    std::optional<Previews> previews;
    if (wanted) {
        const auto done = [&](int at) {
            const py::gil_scoped_acquire acquire;
            on_preview(at);
        };
        previews.emplace(Previews{*snapshot, *preview, *preview_stream, every, done});
    }
    const auto after = [&](int done, int total) {
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!on_step.is_none()) on_step(done, total);
    };
    const py::gil_scoped_release release;
    return run_steps(step, stream, steps, ahead, after, previews);
}

const py::object& error_type() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
    const auto make = [] {
        const char* doc = "An error of the CUDA driver: code, its name, and whether this process has lost the GPU.";
        return py::reinterpret_steal<py::object>(
            PyErr_NewExceptionWithDoc("volcast._core.DeviceError", doc, PyExc_RuntimeError, nullptr));
    };
    return type.call_once_and_store_result(make).get_stored();
}

py::object to_python(const DeviceError& error) {
    py::object exception = error_type()(error.what());
    exception.attr("code") = error.code;
    exception.attr("name") = error.name;
    exception.attr("lost") = error.lost;
    return exception;
}

void bind_errors(py::module_& m) {
    m.attr("DeviceError") = error_type();
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const Raised& raised) {
            const py::object& exception = *raised.exception;
            PyErr_SetObject(py::type::handle_of(exception).ptr(), exception.ptr());
        } catch (const DeviceError& error) {
            PyErr_SetObject(error_type().ptr(), to_python(error).ptr());
        }
    });
}

}  // namespace

void bind_device(py::module_& m) {
    bind_errors(m);
    // A thread that outlived Python could never take its lock again.
    py::module_::import("atexit").attr("register")(py::cpp_function(&host_close, GilFree()));

    const auto dying = py::release_gil_before_calling_cpp_dtor();
    py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver", "The CUDA driver, or the host form that stands in for it.")
        .def_static("cuda", &Driver::cuda, py::arg("device") = 0, GilFree(),
                    "Loads libcuda.so.1 and opens the device's primary context, which torch uses too. ValueError\n"
                    "where there is no driver or GPU, or the driver is older than 12.0.")
        .def_static("host", &Driver::host, "The same functions, carried out by threads of this process.")
        .def_property_readonly("name", &Driver::name)
        .def_property_readonly("device_name", &Driver::device_name)
        .def_property_readonly("capability", &Driver::capability, "86 for compute capability 8.6.")
        .def_property_readonly("version", &Driver::version)
        .def(
            "error", [](const Driver& d, const std::string& op, int code) { return to_python(d.error(op, code)); },
            py::arg("operation"), py::arg("code"));
    py::class_<Event, std::shared_ptr<Event>>(m, "Event", "A point in a stream's work.", dying)
        .def(py::init<std::shared_ptr<const Driver>>(), py::arg("driver"), GilFree())
        .def("done", &Event::done, GilFree())
        .def("synchronize", &Event::synchronize, GilFree());
    py::class_<Stream, std::shared_ptr<Stream>>(m, "Stream", "Work in order, beside that of other streams.", dying)
        .def(py::init<std::shared_ptr<const Driver>>(), py::arg("driver"), GilFree())
        .def_property_readonly("handle",
                               [](const Stream& s) { return reinterpret_cast<std::uintptr_t>(s.handle()); })
        .def("record", &Stream::record, py::arg("event"), GilFree())
        .def("wait", &Stream::wait, py::arg("event"), GilFree(),
             "Later work of this stream waits for the event's last record; the caller does not.")
        .def("synchronize", &Stream::synchronize, GilFree())
        .def("copy", py::overload_cast<const DeviceMemory&, const PinnedMemory&>(&Stream::copy, py::const_),
             py::arg("to"), py::arg("source"), GilFree(), "As many bytes as both have; keep both until it is done.")
        .def("copy", py::overload_cast<const PinnedMemory&, const DeviceMemory&>(&Stream::copy, py::const_),
             py::arg("to"), py::arg("source"), GilFree())
        .def("begin_capture", &Stream::begin_capture, GilFree(),
             "Until end_capture, this thread's work on the stream becomes a graph and does not run.")
        .def("end_capture", &Stream::end_capture, GilFree());
    py::class_<HostGraph, std::shared_ptr<HostGraph>>(m, "HostGraph", "A graph that calls a function.", dying)
        .def(py::init(&make_host_graph), py::arg("driver"), py::arg("function"))
        .def_property_readonly("handle",
                               [](const HostGraph& g) { return reinterpret_cast<std::uintptr_t>(g.handle()); });
    py::class_<Executable, std::shared_ptr<Executable>>(m, "Executable", "Graphs in a row, launched as one.", dying)
        .def(py::init(&make_executable), py::arg("driver"), py::arg("graph_handles"), py::arg("repeats") = 1,
             GilFree(),
             "The driver copies the graphs' nodes. The memory and the kernels that they use are the caller's to keep\n"
             "alive: keep the torch.cuda.CUDAGraph objects as long as this.")
        .def("launch", &Executable::launch, py::arg("stream"), GilFree());
    py::class_<LoopTiming>(m, "LoopTiming", "Seconds spent by run_steps, those of the launches, and their number.")
        .def_readonly("total_s", &LoopTiming::total_s)
        .def_readonly("launch_s", &LoopTiming::launch_s)
        .def_readonly("launches", &LoopTiming::launches);
    m.def("run_steps", &run, py::arg("step"), py::arg("stream"), py::arg("steps"), py::kw_only(),
          py::arg("ahead") = 2, py::arg("on_step") = py::none(), py::arg("snapshot") = py::none(),
          py::arg("preview") = py::none(), py::arg("preview_stream") = py::none(), py::arg("every") = 0,
          py::arg("on_preview") = py::none(),
          "Launches step steps times on stream, at most `ahead` unfinished. on_step(done, steps) follows each\n"
          "finished step; what it raises stops the launches, and is raised when all launched work has finished.");
}
