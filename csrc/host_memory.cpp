#include <cstring>
#include <new>
#include <utility>

#include "host_driver.hpp"
#include "host_queue.hpp"

namespace volcast {

namespace {

constexpr std::align_val_t alignment{256};  // a device's

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

CUresult allocate(void** address, std::size_t bytes) {
    return host_guarded([&]() -> CUresult {
        if (!host_has_context()) return CUDA_ERROR_INVALID_CONTEXT;
        if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        *address = ::operator new(bytes, alignment);
        return CUDA_SUCCESS;
    });
}

CUresult release(void* address) { return ::operator delete(address, alignment), CUDA_SUCCESS; }

CUresult copy(void* to, const void* from, std::size_t bytes, CUstream stream) {
    return host_guarded([&] { return stream->run([=] { std::memcpy(to, from, bytes); }); });
}

CUresult begin_capture(CUstream stream, int) {
    if (stream->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return host_table().cuGraphCreate(&stream->capture, 0);
}

CUresult end_capture(CUstream stream, CUgraph* graph) {
    *graph = std::exchange(stream->capture, nullptr);
    return *graph == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace

void fill_memory(DriverTable& table) {
    table.cuMemAlloc_v2 = [](CUdeviceptr* address, std::size_t bytes) -> CUresult {
        void* made = nullptr;
        const CUresult result = allocate(&made, bytes);
        *address = reinterpret_cast<CUdeviceptr>(made);
        return result;
    };
    table.cuMemFree_v2 = [](CUdeviceptr address) -> CUresult { return release(pointer(address)); };
    table.cuMemHostAlloc = [](void** address, std::size_t bytes, unsigned) -> CUresult {
        return allocate(address, bytes);
    };
    table.cuMemFreeHost = release;
    table.cuMemcpyHtoDAsync_v2 = [](CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream) -> CUresult {
        return copy(pointer(to), from, bytes, stream);
    };
    table.cuMemcpyDtoHAsync_v2 = [](void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) -> CUresult {
        return copy(to, pointer(from), bytes, stream);
    };
    table.cuLaunchHostFunc = [](CUstream stream, CUhostFn function, void* data) -> CUresult {
        return host_guarded([&] { return stream->run([=] { function(data); }); });
    };
    table.cuStreamBeginCapture_v2 = begin_capture;
    table.cuStreamEndCapture = end_capture;
}

}  // namespace volcast
