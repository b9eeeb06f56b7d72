#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_arrays.hpp"
#include "noise.hpp"

using namespace volcast;

namespace {

template <class T>
py::array normal(const std::vector<std::uint64_t>& seeds, const std::vector<std::uint64_t>& samples,
                 std::uint32_t step, std::vector<py::ssize_t> shape) {
    std::size_t numel = 1;
    for (const py::ssize_t size : shape) numel *= static_cast<std::size_t>(size);
    shape.insert(shape.begin(), static_cast<py::ssize_t>(seeds.size()));
    py::array_t<T> result(shape);
    T* out = result.mutable_data();
    const py::gil_scoped_release release;
    for (std::size_t n = 0; n < seeds.size(); ++n) {
        fill_normal_as<T>({seeds[n], samples[n], step}, numel, out + n * numel);
    }
    return std::move(result);
}

}  // namespace

void bind_noise(py::module_& m) {
    m.def("philox", &philox, py::arg("counter"), py::arg("key"), "Philox 4x32-10: four 32-bit numbers.");
    m.def(
        "normal",
        [](const py::array& seeds, const py::array& samples, std::uint32_t step, const std::vector<py::ssize_t>& shape,
           const py::dtype& dtype) {
            const auto seed = identities("normal", "seeds", seeds, seeds.size());
            const auto sample = identities("normal", "samples", samples, seeds.size());
            for (const py::ssize_t size : shape) check(size >= 1, "normal", "shape holds ", size, ": need 1 or more");
            if (dtype.equal(py::dtype::of<float>())) return normal<float>(seed, sample, step, shape);
            if (dtype.equal(py::dtype::of<double>())) return normal<double>(seed, sample, step, shape);
            fail("normal", "dtype ", text(dtype), ": need float32 or float64");
        },
        py::arg("seeds"), py::arg("samples"), py::arg("step"), py::arg("shape"), py::arg("dtype"),
        "Standard normals [N, *shape] by (seed, sample, step); step 0 is the initial noise, i + 1 the noise of row i.");
    m.attr("KNOWN_NOISE") = kKnownNoise;
    m.attr("AGAIN_NOISE") = kAgainNoise;
}
