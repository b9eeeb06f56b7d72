#include "kernel.hpp"

#include <cstdint>
#include <utility>

#include "check.hpp"

namespace volcast {

namespace {

constexpr unsigned always_there = 48 * 1024;  // shared memory that a kernel has without asking for it

}  // namespace

Kernel::Kernel(std::shared_ptr<const Driver> driver, const std::string& image, const std::string& entry,
               unsigned threads, unsigned shared)
    : driver_(std::move(driver)), threads_(threads), shared_(shared) {
    check(!driver_->is_host(), "Kernel", "driver=host: cubins need a GPU; open Driver.cuda()");
    // The driver reads the image's length from its header; an ELF header has 64 bytes.
    check(image.size() > 64 && image.compare(0, 4, "\x7f" "ELF") == 0, "Kernel", entry,
          ": the image is no cubin; build it again");
    driver_->call("load a cubin", &DriverTable::cuModuleLoadData, &module_, static_cast<const void*>(image.data()));
    try {
        driver_->call("find a kernel", &DriverTable::cuModuleGetFunction, &function_, module_, entry.c_str());
        if (shared_ > always_there) {
            driver_->call("give a kernel its shared memory", &DriverTable::cuFuncSetAttribute, function_,
                          CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(shared_));
        }
    } catch (...) {
        driver_->attempt(&DriverTable::cuModuleUnload, module_);
        throw;
    }
}

Kernel::~Kernel() { driver_->attempt(&DriverTable::cuModuleUnload, module_); }

void Kernel::launch(const Stream& stream, const std::array<unsigned, 3>& grid, const std::string& arguments) const {
    check(driver_->shares_context(stream.driver()), "launch", "a kernel and a stream of two devices: need both of one");
    std::size_t size = arguments.size();
    void* extra[] = {reinterpret_cast<void*>(std::uintptr_t{1}), const_cast<char*>(arguments.data()),  // the buffer
                     reinterpret_cast<void*>(std::uintptr_t{2}), &size,                                // its size
                     nullptr};
    driver_->call("launch a kernel", &DriverTable::cuLaunchKernel, function_, grid[0], grid[1], grid[2], threads_, 1U,
                  1U, shared_, stream.handle(), static_cast<void**>(nullptr), static_cast<void**>(extra));
}

}  // namespace volcast
