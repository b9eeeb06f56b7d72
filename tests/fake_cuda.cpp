// A libcuda.so.1 that writes down what it is asked for. tests/test_cubin_launcher.py compiles it, and adds the other
// entry points, which do nothing.
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

char context, stream, module, function;

template <class... Values>
void note(const char* format, Values... values) {
    std::FILE* log = std::fopen(std::getenv("FAKE_CUDA_LOG"), "a");
    std::fprintf(log, format, values...);
    std::fclose(log);
}

}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) { return *version = 12040, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 8 : 7, 0; }
int cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, 0; }
int cuStreamCreate(void** made, unsigned) { return *made = &stream, 0; }
int cuModuleLoadData(void** made, const void* image) {
    note("load %d\n", std::memcmp(image, "\x7f" "ELF", 4));
    return *made = &module, 0;
}
int cuModuleUnload(void* which) { return note("unload %d\n", which == &module), 0; }
int cuModuleGetFunction(void** made, void* in, const char* name) {
    note("function %s\n", name);
    return *made = &function, in == &module ? 0 : 400;
}
int cuFuncSetAttribute(void*, int attribute, int value) { return note("attribute %d %d\n", attribute, value), 0; }
int cuLaunchKernel(void* what, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* where, void** parameters, void** extra) {
    if (what != &function || where != &stream || parameters || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4]) {
        return 1;
    }
    note("launch %u %u %u %u %u %u %u ", x, y, z, bx, by, bz, shared);
    const std::size_t size = *static_cast<std::size_t*>(extra[3]);
    for (std::size_t i = 0; i < size; ++i) note("%02x", static_cast<unsigned char*>(extra[1])[i]);
    return note("\n"), 0;
}
}
