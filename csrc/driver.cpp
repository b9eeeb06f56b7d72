#include "driver.hpp"

#include <dlfcn.h>

#include "check.hpp"

namespace volcast {

namespace {

constexpr int oldest = 12000;

// Errors after which, by cuda.h, "the process must be terminated and relaunched", and those of a dead context.
bool is_lost(CUresult code) {
    switch (code) {
        case 214:  // ECC_UNCORRECTABLE
        case 220:  // NVLINK_UNCORRECTABLE
        case 226:  // CONTAINED
        case 700:  // ILLEGAL_ADDRESS
        case 702:  // LAUNCH_TIMEOUT
        case 709:  // CONTEXT_IS_DESTROYED
        case 710:  // ASSERT
        case 714:  // HARDWARE_STACK_ERROR
        case 715:  // ILLEGAL_INSTRUCTION
        case 716:  // MISALIGNED_ADDRESS
        case 717:  // INVALID_ADDRESS_SPACE
        case 718:  // INVALID_PC
        case CUDA_ERROR_LAUNCH_FAILED:
        case 721:  // TENSOR_MEMORY_LEAK
        case 810:  // MPS_CLIENT_TERMINATED
        case 911:  // EXTERNAL_DEVICE
            return true;
        default:
            return false;
    }
}

const char* remedy(CUresult code) {
    if (is_lost(code)) return "this process has lost the GPU: start a new one";
    switch (code) {
        case CUDA_ERROR_OUT_OF_MEMORY:
            return "use a smaller size or batch, or set --memory-limit";
        case CUDA_ERROR_DEINITIALIZED:
            return "the process is exiting: finish sampling before it does";
        case 34:   // STUB_LIBRARY
        case 36:   // CALL_REQUIRES_NEWER_DRIVER
        case 209:  // NO_BINARY_FOR_GPU
        case 222:  // UNSUPPORTED_PTX_VERSION
        case 803:  // SYSTEM_DRIVER_MISMATCH
        case 804:  // COMPAT_NOT_SUPPORTED_ON_DEVICE
            return "update the NVIDIA driver, or use an older CUDA build of torch";
        case 46:   // DEVICE_UNAVAILABLE
        case 100:  // NO_DEVICE
        case CUDA_ERROR_INVALID_DEVICE:
        case 802:  // SYSTEM_NOT_READY
            return "see what `nvidia-smi` lists and CUDA_VISIBLE_DEVICES allows";
        default:
            return "please report this line";
    }
}

template <class Function>
void find(void* library, const char* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, symbol));
    check(function != nullptr, "cuda", "libcuda.so.1 has no ", symbol,
          ": the NVIDIA driver is too old; install driver 525 (CUDA 12.0) or newer");
}

// Loads the table once; libcuda cannot be unloaded safely, so it never is.
const DriverTable& cuda_table() {
    static const DriverTable table = [] {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (library == nullptr) {
            const char* why = dlerror();
            fail("cuda", "libcuda.so.1: no NVIDIA driver (", why ? why : "not found",
                 "); install driver 525 (CUDA 12.0) or newer, or sample on the CPU");
        }
        DriverTable found{};
        find(library, "cuDriverGetVersion", found.cuDriverGetVersion);
        int version = 0;
        found.cuDriverGetVersion(&version);
        check(version >= oldest, "cuda", "driver API ", version / 1000, '.', version % 1000 / 10,
              ": graphs of graphs need 12.0; install NVIDIA driver 525 or newer");
        find(library, "cuInit", found.cuInit);
        find(library, "cuGetErrorName", found.cuGetErrorName);
        find(library, "cuGetErrorString", found.cuGetErrorString);
        find(library, "cuDeviceGet", found.cuDeviceGet);
        find(library, "cuDeviceGetName", found.cuDeviceGetName);
        find(library, "cuDeviceGetAttribute", found.cuDeviceGetAttribute);
        find(library, "cuDevicePrimaryCtxRetain", found.cuDevicePrimaryCtxRetain);
        find(library, "cuDevicePrimaryCtxRelease_v2", found.cuDevicePrimaryCtxRelease_v2);
        find(library, "cuCtxPushCurrent_v2", found.cuCtxPushCurrent_v2);
        find(library, "cuCtxPopCurrent_v2", found.cuCtxPopCurrent_v2);
        find(library, "cuStreamCreate", found.cuStreamCreate);
        find(library, "cuStreamDestroy_v2", found.cuStreamDestroy_v2);
        find(library, "cuStreamSynchronize", found.cuStreamSynchronize);
        find(library, "cuStreamWaitEvent", found.cuStreamWaitEvent);
        find(library, "cuEventCreate", found.cuEventCreate);
        find(library, "cuEventDestroy_v2", found.cuEventDestroy_v2);
        find(library, "cuEventRecord", found.cuEventRecord);
        find(library, "cuEventQuery", found.cuEventQuery);
        find(library, "cuEventSynchronize", found.cuEventSynchronize);
        find(library, "cuGraphCreate", found.cuGraphCreate);
        find(library, "cuGraphAddChildGraphNode", found.cuGraphAddChildGraphNode);
        find(library, "cuGraphInstantiateWithFlags", found.cuGraphInstantiateWithFlags);
        find(library, "cuGraphLaunch", found.cuGraphLaunch);
        find(library, "cuGraphExecDestroy", found.cuGraphExecDestroy);
        find(library, "cuGraphDestroy", found.cuGraphDestroy);
        find(library, "cuMemAlloc_v2", found.cuMemAlloc_v2);
        find(library, "cuMemFree_v2", found.cuMemFree_v2);
        find(library, "cuMemHostAlloc", found.cuMemHostAlloc);
        find(library, "cuMemFreeHost", found.cuMemFreeHost);
        find(library, "cuMemcpyHtoDAsync_v2", found.cuMemcpyHtoDAsync_v2);
        find(library, "cuMemcpyDtoHAsync_v2", found.cuMemcpyDtoHAsync_v2);
        find(library, "cuLaunchHostFunc", found.cuLaunchHostFunc);
        find(library, "cuStreamBeginCapture_v2", found.cuStreamBeginCapture_v2);
        find(library, "cuStreamEndCapture", found.cuStreamEndCapture);
        find(library, "cuModuleLoadData", found.cuModuleLoadData);
        find(library, "cuModuleUnload", found.cuModuleUnload);
        find(library, "cuModuleGetFunction", found.cuModuleGetFunction);
        find(library, "cuFuncSetAttribute", found.cuFuncSetAttribute);
        find(library, "cuLaunchKernel", found.cuLaunchKernel);
        return found;
    }();
    return table;
}

}  // namespace

std::shared_ptr<const Driver> Driver::cuda(int device) {
    return std::shared_ptr<const Driver>(new Driver("cuda", cuda_table(), device));
}

std::shared_ptr<const Driver> Driver::host() {
    return std::shared_ptr<const Driver>(new Driver("host", host_table(), 0));
}

Driver::Driver(std::string name, const DriverTable& table, int device) : name_(std::move(name)), table_(table) {
    CUresult result = table_.cuInit(0);
    if (result != CUDA_SUCCESS) throw std::invalid_argument(error("start the driver", result).what());
    result = table_.cuDeviceGet(&device_, device);
    if (result != CUDA_SUCCESS) {
        throw std::invalid_argument(error("open device " + std::to_string(device), result).what());
    }
    check_result("read the driver's version", table_.cuDriverGetVersion(&version_));
    check_result("open the device's primary context", table_.cuDevicePrimaryCtxRetain(&context_, device_));
}

Driver::~Driver() { table_.cuDevicePrimaryCtxRelease_v2(device_); }

std::string Driver::device_name() const {
    char name[256] = {};
    check_result("read the device's name", table_.cuDeviceGetName(name, sizeof name, device_));
    return name;
}

int Driver::capability() const {
    int major = 0, minor = 0;
    const auto read = [&](int* value, int attribute) {
        check_result("read the device's capability", table_.cuDeviceGetAttribute(value, attribute, device_));
    };
    read(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    read(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    return 10 * major + minor;
}

DeviceError Driver::error(const std::string& operation, CUresult code) const {
    const char* known = nullptr;
    const char* text = nullptr;
    const bool named = table_.cuGetErrorName(code, &known) == CUDA_SUCCESS && known != nullptr;
    const std::string name = named ? known : "CUDA_ERROR_" + std::to_string(code);
    if (table_.cuGetErrorString(code, &text) != CUDA_SUCCESS || text == nullptr) text = "no description";
    std::ostringstream message;
    message << '[' << name_ << "] " << operation << ": " << name << " (" << text << "); " << remedy(code);
    return {message.str(), code, name, is_lost(code)};
}

void Driver::check_result(const char* operation, CUresult result) const {
    if (result == CUDA_SUCCESS) return;
    if (is_host()) {
        if (const std::exception_ptr fault = host_take_fault()) std::rethrow_exception(fault);
    }
    throw error(operation, result);
}

}  // namespace volcast
