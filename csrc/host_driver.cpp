#include "host_driver.hpp"

#include <cstdio>

namespace volcast {

struct CUctx_st {};

namespace {

CUctx_st the_context;
thread_local int pushed = 0;  // how many contexts this thread has pushed

struct Described {
    CUresult code;
    const char *name, *text;
};

// What the host form returns.
constexpr Described errors[] = {
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not while a stream captures"},
};

template <const char* Described::*field>
CUresult describe(CUresult code, const char** result) {
    for (const Described& each : errors) {
        if (each.code != code) continue;
        *result = each.*field;
        return CUDA_SUCCESS;
    }
    *result = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

bool host_has_context() { return pushed > 0; }

const DriverTable& host_table() {
    static const DriverTable table = [] {
        DriverTable made{};
        made.cuInit = [](unsigned) -> CUresult { return CUDA_SUCCESS; };
        made.cuDriverGetVersion = [](int* version) -> CUresult { return *version = 12000, CUDA_SUCCESS; };
        made.cuGetErrorName = describe<&Described::name>;
        made.cuGetErrorString = describe<&Described::text>;
        made.cuDeviceGet = [](CUdevice* device, int ordinal) -> CUresult {
            *device = ordinal;
            return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
        };
        made.cuDeviceGetName = [](char* name, int length, CUdevice) -> CUresult {
            return std::snprintf(name, static_cast<std::size_t>(length), "host"), CUDA_SUCCESS;
        };
        made.cuDeviceGetAttribute = [](int* value, int, CUdevice) -> CUresult { return *value = 0, CUDA_SUCCESS; };
        made.cuDevicePrimaryCtxRetain = [](CUcontext* context, CUdevice) -> CUresult {
            *context = &the_context;
            return CUDA_SUCCESS;
        };
        made.cuDevicePrimaryCtxRelease_v2 = [](CUdevice) -> CUresult { return CUDA_SUCCESS; };
        made.cuCtxPushCurrent_v2 = [](CUcontext) -> CUresult { return ++pushed, CUDA_SUCCESS; };
        made.cuCtxPopCurrent_v2 = [](CUcontext* context) -> CUresult {
            if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
            *context = &the_context;
            return --pushed, CUDA_SUCCESS;
        };
        fill_streams(made);
        fill_graphs(made);
        fill_memory(made);
        return made;
    }();
    return table;
}

}  // namespace volcast
