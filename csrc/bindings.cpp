#include <pybind11/pybind11.h>

void bind_schedule(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_noise(pybind11::module_& m);
void bind_loop(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_kernel(pybind11::module_& m);
void bind_batcher(pybind11::module_& m);

PYBIND11_MODULE(_core, m) {
    m.doc() = "The sampler core in C++: noise schedules, sampling plans, counter-based noise, the loops, the batcher.";
    bind_schedule(m);
    bind_plan(m);
    bind_noise(m);
    bind_loop(m);
    bind_device(m);
    bind_memory(m);
    bind_kernel(m);
    bind_batcher(m);
}
