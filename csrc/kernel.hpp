#pragma once

#include <array>
#include <memory>
#include <string>

#include "device.hpp"

namespace volcast {

// One entry of a cubin, loaded into the device's context.
class Kernel final {
public:
    // Loads `image`. `shared` is the dynamic shared memory of a block, `threads` are those of a block.
    Kernel(std::shared_ptr<const Driver> driver, const std::string& image, const std::string& entry, unsigned threads,
           unsigned shared);
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;
    ~Kernel();

    // Adds a launch to the stream's work. `arguments` are the parameters as they lie in the kernel's parameter space.
    void launch(const Stream& stream, const std::array<unsigned, 3>& grid, const std::string& arguments) const;

private:
    std::shared_ptr<const Driver> driver_;
    CUmodule module_ = nullptr;
    CUfunction function_ = nullptr;
    unsigned threads_;
    unsigned shared_;
};

}  // namespace volcast
