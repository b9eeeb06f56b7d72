#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

namespace volcast {

// The CUDA driver API's types with its ABI, declared here: building needs no toolkit. Handles are opaque; the host
// form defines the structs they point to.
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUhostFn = void (*)(void* data);
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphNode = struct CUgraphNode_st*;
using CUgraphExec = struct CUgraphExec_st*;

enum : CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_DEINITIALIZED = 4,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
};
enum : int { CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76 };
enum : int { CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1 };
enum : int { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
enum : unsigned { CU_STREAM_NON_BLOCKING = 1, CU_EVENT_BLOCKING_SYNC = 1, CU_EVENT_DISABLE_TIMING = 2 };

// The driver's entry points, as libcuda.so.1 exports them.
struct DriverTable {
    CUresult (*cuInit)(unsigned flags);
    CUresult (*cuDriverGetVersion)(int* version);
    CUresult (*cuGetErrorName)(CUresult error, const char** name);
    CUresult (*cuGetErrorString)(CUresult error, const char** text);
    CUresult (*cuDeviceGet)(CUdevice* device, int ordinal);
    CUresult (*cuDeviceGetName)(char* name, int length, CUdevice device);
    CUresult (*cuDeviceGetAttribute)(int* value, int attribute, CUdevice device);
    CUresult (*cuDevicePrimaryCtxRetain)(CUcontext* context, CUdevice device);
    CUresult (*cuDevicePrimaryCtxRelease_v2)(CUdevice device);
    CUresult (*cuCtxPushCurrent_v2)(CUcontext context);
    CUresult (*cuCtxPopCurrent_v2)(CUcontext* context);
    CUresult (*cuStreamCreate)(CUstream* stream, unsigned flags);
    CUresult (*cuStreamDestroy_v2)(CUstream stream);
    CUresult (*cuStreamSynchronize)(CUstream stream);
    CUresult (*cuStreamWaitEvent)(CUstream stream, CUevent event, unsigned flags);
    CUresult (*cuEventCreate)(CUevent* event, unsigned flags);
    CUresult (*cuEventDestroy_v2)(CUevent event);
    CUresult (*cuEventRecord)(CUevent event, CUstream stream);
    CUresult (*cuEventQuery)(CUevent event);
    CUresult (*cuEventSynchronize)(CUevent event);
    CUresult (*cuGraphCreate)(CUgraph* graph, unsigned flags);
    CUresult (*cuGraphAddChildGraphNode)(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies,
                                         std::size_t count, CUgraph child);
    CUresult (*cuGraphInstantiateWithFlags)(CUgraphExec* exec, CUgraph graph, unsigned long long flags);
    CUresult (*cuGraphLaunch)(CUgraphExec exec, CUstream stream);
    CUresult (*cuGraphExecDestroy)(CUgraphExec exec);
    CUresult (*cuGraphDestroy)(CUgraph graph);
    CUresult (*cuMemAlloc_v2)(CUdeviceptr* address, std::size_t bytes);
    CUresult (*cuMemFree_v2)(CUdeviceptr address);
    CUresult (*cuMemHostAlloc)(void** address, std::size_t bytes, unsigned flags);
    CUresult (*cuMemFreeHost)(void* address);
    CUresult (*cuMemcpyHtoDAsync_v2)(CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream);
    CUresult (*cuMemcpyDtoHAsync_v2)(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream);
    CUresult (*cuLaunchHostFunc)(CUstream stream, CUhostFn function, void* data);
    CUresult (*cuStreamBeginCapture_v2)(CUstream stream, int mode);
    CUresult (*cuStreamEndCapture)(CUstream stream, CUgraph* graph);
    // Not in the host form, which has no machine code to run.
    CUresult (*cuModuleLoadData)(CUmodule* module, const void* image);
    CUresult (*cuModuleUnload)(CUmodule module);
    CUresult (*cuModuleGetFunction)(CUfunction* function, CUmodule module, const char* name);
    CUresult (*cuFuncSetAttribute)(CUfunction function, int attribute, int value);
    CUresult (*cuLaunchKernel)(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                               unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                               CUstream stream, void** parameters, void** extra);
};

// The host form: every other entry point, carried out by threads of this process. Driver API 12.0 in what it covers.
const DriverTable& host_table();
// Adds a node that calls the function on the thread of the stream that runs the graph. What it throws fails the
// launch: the stream skips what was enqueued after it until cuStreamSynchronize, cuEventSynchronize or cuEventQuery
// has reported CUDA_ERROR_LAUNCH_FAILED, once. Streams that waited for skipped work fail in the same way.
CUresult host_add_function(CUgraph graph, std::function<void()> function);
// What a function threw, if the calling thread's last call reported it; empties it.
std::exception_ptr host_take_fault();
// Ends the threads of all host streams: a function that has begun ends, the rest is skipped. Later use of the host
// form is CUDA_ERROR_DEINITIALIZED.
void host_close();

struct DeviceError : std::runtime_error {
    CUresult code;
    std::string name;  // "CUDA_ERROR_ILLEGAL_ADDRESS"
    bool lost;         // the context is dead: this process cannot use the GPU again

    DeviceError(const std::string& message, CUresult code, std::string name, bool lost)
        : std::runtime_error(message), code(code), name(std::move(name)), lost(lost) {}
};

// A table and the context to use it in, for CUDA the device's primary context, which torch uses too.
class Driver final {
public:
    // Throws std::invalid_argument where there is no driver or GPU, or the driver is older than 12.0.
    static std::shared_ptr<const Driver> cuda(int device);
    static std::shared_ptr<const Driver> host();
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;
    ~Driver();

    const std::string& name() const { return name_; }  // "cuda" or "host"
    std::string device_name() const;
    int capability() const;                            // 86 for 8.6
    int version() const { return version_; }           // 1000 * major + 10 * minor, as the driver reports it
    bool is_host() const { return &table_ == &host_table(); }
    bool shares_context(const Driver& other) const { return context_ == other.context_; }

    DeviceError error(const std::string& operation, CUresult code) const;

    // Calls an entry point with the context current on this thread, whatever thread it is.
    template <class... Parameters, class... Arguments>
    CUresult attempt(CUresult (*DriverTable::*entry)(Parameters...), Arguments... arguments) const noexcept {
        const CUresult pushed = table_.cuCtxPushCurrent_v2(context_);
        if (pushed != CUDA_SUCCESS) return pushed;
        const CUresult result = (table_.*entry)(arguments...);
        CUcontext popped = nullptr;
        table_.cuCtxPopCurrent_v2(&popped);
        return result;
    }
    // Throws DeviceError unless it succeeds; on the host form, what a function of a graph threw.
    template <class... Parameters, class... Arguments>
    void call(const char* operation, CUresult (*DriverTable::*entry)(Parameters...), Arguments... arguments) const {
        check_result(operation, attempt(entry, arguments...));
    }
    void check_result(const char* operation, CUresult result) const;

private:
    Driver(std::string name, const DriverTable& table, int device);

    std::string name_;
    const DriverTable& table_;
    int version_ = 0;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
};

}  // namespace volcast
