#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "batcher.hpp"
#include "bind_arrays.hpp"

using namespace volcast;

namespace {

using GilFree = py::call_guard<py::gil_scoped_release>;
using Floats = py::array_t<float, py::array::c_style>;

// A lane with the Python objects that it lives on: arrays that the network reads, and the function that runs it.
struct HeldLane {
    py::array x, row;
    std::vector<py::array> inputs;
    py::function call;
    py::object output;  // alive until the next call
};

std::byte* memory(const char* name, const py::array& array, py::ssize_t count) {
    check((array.flags() & py::array::c_style) != 0 && array.writeable(), "batcher", name,
          ": need a writeable C-contiguous array");
    check(array.ndim() >= 1 && array.shape(0) == count && array.size() > 0, "batcher", name, ": got ", kind(array),
          ", wanted [", count, ", ...]");
    return static_cast<std::byte*>(py::array(array).mutable_data());
}

// What the group keeps alive; any thread may be the last to let go of it.
using Kept = std::shared_ptr<std::vector<HeldLane>>;

Lane make_lane(const Kept& kept, std::size_t number) {
    const HeldLane& held = (*kept)[number];
    const py::ssize_t count = held.x.ndim() ? held.x.shape(0) : 0;
    const bool floats = held.x.dtype().equal(py::dtype::of<float>()) && held.row.dtype().equal(py::dtype::of<float>());
    check(floats, "batcher", "x and row: got ", kind(held.x), " and ", kind(held.row), ", wanted float32");
    Lane lane;
    lane.count = static_cast<std::size_t>(count);
    lane.x = reinterpret_cast<float*>(memory("x", held.x, count));
    lane.row = reinterpret_cast<float*>(memory("row", held.row, count));
    for (const py::array& input : held.inputs) lane.inputs.push_back(memory("input", input, count));
    const py::ssize_t size = held.x.size();
    lane.call = [kept, number, size]() -> const float* {
        const py::gil_scoped_acquire acquire;
        try {
            py::object& output = (*kept)[number].output;
            output = (*kept)[number].call();
            check(py::isinstance<py::array>(output), "batcher", "the network gave no numpy array");
            const auto array = py::reinterpret_borrow<py::array>(output);
            const bool good = array.dtype().equal(py::dtype::of<float>()) && array.size() == size &&
                              (array.flags() & py::array::c_style) != 0;
            check(good, "batcher", "the network gave ", kind(array), ", wanted contiguous float32 of ", size, " values");
            return static_cast<const float*>(array.data());
        } catch (const py::error_already_set& error) {
            throw std::runtime_error(text(error.value()));
        }
    };
    return lane;
}

std::size_t add_group(Batcher& batcher, const py::list& lanes) {
    check(!lanes.empty(), "batcher", "lanes: need one of count 1, first");
    const Kept kept(new std::vector<HeldLane>(), [](std::vector<HeldLane>* held) {
        const py::gil_scoped_acquire acquire;
        delete held;
    });
    for (const auto& lane : lanes) {
        const auto fields = lane.cast<py::tuple>();
        kept->push_back({fields[0].cast<py::array>(), fields[1].cast<py::array>(),
                         fields[2].cast<std::vector<py::array>>(), fields[3].cast<py::function>(), py::object()});
    }
    Group group;
    for (std::size_t i = 0; i < kept->size(); ++i) group.lanes.push_back(make_lane(kept, i));
    const HeldLane& one = kept->front();
    group.numel = static_cast<std::size_t>(one.x.size() / one.x.shape(0));
    group.row = static_cast<std::size_t>(one.row.size() / one.row.shape(0));
    for (const py::array& input : one.inputs) {
        group.input_bytes.push_back(static_cast<std::size_t>(input.nbytes() / input.shape(0)));
    }
    return batcher.add_group(std::move(group));
}

std::vector<Bytes> bytes_of(const std::vector<py::array>& arrays) {
    std::vector<Bytes> found;
    for (const py::array& array : arrays) {
        check((array.flags() & py::array::c_style) != 0, "batcher", "conditions: need C-contiguous arrays");
        const auto* data = static_cast<const std::byte*>(array.data());
        found.emplace_back(data, data + array.nbytes());
    }
    return found;
}

std::uint64_t submit(Batcher& batcher, std::size_t group, std::shared_ptr<Plan> plan, const Floats& x,
                     const Floats& rows, const std::vector<py::array>& conditional,
                     const std::vector<py::array>& unconditional, std::uint64_t seed, std::uint64_t sample,
                     std::optional<double> guidance, int priority, std::optional<double> deadline_s,
                     std::size_t preview_every, const std::optional<Floats>& known,
                     const std::optional<Floats>& keep) {
    check(!guidance || std::isfinite(*guidance), "batcher", "guidance=", guidance.value_or(0), ": need a finite number");
    Submission one;
    one.group = group;
    one.plan = std::move(plan);
    one.seed = seed;
    one.sample = sample;
    one.guidance = guidance;
    one.x.assign(x.data(), x.data() + x.size());
    if (known) one.known.assign(known->data(), known->data() + known->size());
    if (keep) one.keep.assign(keep->data(), keep->data() + keep->size());
    one.rows = std::make_shared<const std::vector<float>>(rows.data(), rows.data() + rows.size());
    one.conditional = bytes_of(conditional);
    one.unconditional = bytes_of(unconditional);
    one.priority = priority;
    one.deadline_s = deadline_s;
    one.preview_every = preview_every;
    const py::gil_scoped_release release;
    return batcher.submit(std::move(one));
}

py::object array_of(const BatchEvent& event) {
    if (event.x.empty()) return py::none();
    return py::array_t<float>(static_cast<py::ssize_t>(event.x.size()), event.x.data());
}

const py::object& overloaded_type() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
    const auto make = [] {
        const char* doc = "The queue is full: retry_s says in how many seconds a place should be free.";
        return py::reinterpret_steal<py::object>(
            PyErr_NewExceptionWithDoc("volcast._core.Overloaded", doc, PyExc_RuntimeError, nullptr));
    };
    return type.call_once_and_store_result(make).get_stored();
}

void bind_results(py::module_& m) {
    m.attr("Overloaded") = overloaded_type();
    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const Overloaded& error) {
            py::object exception = overloaded_type()(error.what());
            exception.attr("retry_s") = error.retry_s;
            PyErr_SetObject(overloaded_type().ptr(), exception.ptr());
        }
    });
    py::native_enum<Happened>(m, "Happened", "enum.Enum", "What became of a sample; the last four end it.")
        .value("PROGRESS", Happened::progress)
        .value("PREVIEW", Happened::preview)
        .value("FINISHED", Happened::finished)
        .value("CANCELLED", Happened::cancelled)
        .value("EXPIRED", Happened::expired)
        .value("FAILED", Happened::failed)
        .finalize();
    py::class_<BatchEvent>(m, "BatchEvent", "x: float32 [numel] of a preview or a finished sample, else None.")
        .def_readonly("id", &BatchEvent::id)
        .def_readonly("happened", &BatchEvent::happened)
        .def_readonly("step", &BatchEvent::step)
        .def_readonly("steps", &BatchEvent::steps)
        .def_readonly("text", &BatchEvent::text)
        .def_property_readonly("x", &array_of);
    py::class_<BatcherStats>(m, "BatcherStats", "Counts since the start; entries: branches of samples in network calls.")
        .def_readonly("active", &BatcherStats::active)
        .def_readonly("queued", &BatcherStats::queued)
        .def_readonly("submitted", &BatcherStats::submitted)
        .def_readonly("refused", &BatcherStats::refused)
        .def_readonly("finished", &BatcherStats::finished)
        .def_readonly("cancelled", &BatcherStats::cancelled)
        .def_readonly("expired", &BatcherStats::expired)
        .def_readonly("failed", &BatcherStats::failed)
        .def_readonly("calls", &BatcherStats::calls)
        .def_readonly("entries", &BatcherStats::entries)
        .def_readonly("calls_of", &BatcherStats::calls_of)
        .def_readonly("network_s", &BatcherStats::network_s)
        .def_readonly("busy_s", &BatcherStats::busy_s)
        .def_readonly("entry_s", &BatcherStats::entry_s);
}

}  // namespace

void bind_batcher(py::module_& m) {
    bind_results(m);
    const auto dying = py::release_gil_before_calling_cpp_dtor();
    py::class_<Batcher>(m, "Batcher", "Step-level continuous batching; run() belongs to one thread.", dying)
        .def(py::init([](std::size_t active, std::size_t queue) {
                 return std::make_unique<Batcher>(BatcherLimits{active, queue});
             }),
             py::kw_only(), py::arg("active") = 64, py::arg("queue") = 256)
        .def("add_group", &add_group, py::arg("lanes"),
             "Lanes (x [B, ...], row [B, R], inputs [[B, ...], ...], call) with ascending B, the first with B=1:\n"
             "call() reads the arrays, which are filled before, and returns the output, float32 like x.")
        .def("submit", &submit, py::arg("group"), py::arg("plan"), py::arg("x"), py::arg("rows"),
             py::arg("conditional"), py::arg("unconditional"), py::kw_only(), py::arg("seed"), py::arg("sample"),
             py::arg("guidance") = py::none(), py::arg("priority") = 0, py::arg("deadline_s") = py::none(),
             py::arg("preview_every") = 0, py::arg("known") = py::none(), py::arg("keep") = py::none(),
             "One sample x (of the group's latent size), rows [steps, R]; its number. Overloaded: the queue is full.\n"
             "known, keep: like x, where the plan inpaints.")
        .def("cancel", &Batcher::cancel, py::arg("id"), GilFree(),
             "Whether it had not ended yet; then it ends before its next step.")
        .def("run", &Batcher::run, GilFree(), "Takes turns until close().")
        .def("close", &Batcher::close, py::kw_only(), py::arg("drain"), GilFree(),
             "No more samples; those submitted are finished first (drain) or cancelled.")
        .def("wait", &Batcher::wait, py::arg("timeout_s"), GilFree(), "Events in order; none after the timeout.")
        .def_property_readonly("ended", &Batcher::ended)
        .def("stats", &Batcher::stats);
}
