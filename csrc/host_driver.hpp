#pragma once

#include <new>
#include <system_error>

#include "driver.hpp"

// The parts of the host form's table: host_driver.cpp has contexts and errors, the others their own entries.
namespace volcast {

void fill_streams(DriverTable& table);
void fill_graphs(DriverTable& table);
void fill_memory(DriverTable& table);

// Whether this thread has pushed a context: making streams and events needs one, as on a device.
bool host_has_context();

// No exception crosses the C interface: memory and threads can run out, nothing else throws.
template <class Body>
CUresult host_guarded(const Body& body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    } catch (const std::system_error&) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
}

}  // namespace volcast
