#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "driver.hpp"

// Owners of the driver's objects. Each keeps its driver; none throws when destroyed; every use from any thread.
namespace volcast {

class Event final {
public:
    explicit Event(std::shared_ptr<const Driver> driver);
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event();

    // True if the work before the last record is done, or nothing was recorded.
    bool done() const;
    void synchronize() const;

    const Driver& driver() const { return *driver_; }
    CUevent handle() const { return event_; }

private:
    std::shared_ptr<const Driver> driver_;
    CUevent event_ = nullptr;
};

// Memory of the device.
class DeviceMemory final {
public:
    DeviceMemory(std::shared_ptr<const Driver> driver, std::size_t bytes);
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory();

    const Driver& driver() const { return *driver_; }
    CUdeviceptr address() const { return address_; }
    std::size_t bytes() const { return bytes_; }

private:
    std::shared_ptr<const Driver> driver_;
    std::size_t bytes_;
    CUdeviceptr address_ = 0;
};

// Page-locked memory of the host, which a device copies to and from while the host goes on. Zero at first.
class PinnedMemory final {
public:
    PinnedMemory(std::shared_ptr<const Driver> driver, std::size_t bytes);
    PinnedMemory(const PinnedMemory&) = delete;
    PinnedMemory& operator=(const PinnedMemory&) = delete;
    ~PinnedMemory();

    const Driver& driver() const { return *driver_; }
    void* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

private:
    std::shared_ptr<const Driver> driver_;
    std::size_t bytes_;
    void* data_ = nullptr;
};

// What a stream captured. Memory and code that it uses stay the caller's to keep alive.
class CapturedGraph final {
public:
    CapturedGraph(std::shared_ptr<const Driver> driver, CUgraph graph) : driver_(std::move(driver)), graph_(graph) {}
    CapturedGraph(const CapturedGraph&) = delete;
    CapturedGraph& operator=(const CapturedGraph&) = delete;
    ~CapturedGraph();

    CUgraph handle() const { return graph_; }

private:
    std::shared_ptr<const Driver> driver_;
    CUgraph graph_;
};

class Stream final {
public:
    explicit Stream(std::shared_ptr<const Driver> driver);
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream();

    void record(const Event& event) const;
    void wait(const Event& event) const;  // holds later work back until the event's last record; does not block
    void synchronize() const;

    // The whole of the smaller memory; the caller keeps both alive until it is done.
    void copy(const DeviceMemory& to, const PinnedMemory& from) const;
    void copy(const PinnedMemory& to, const DeviceMemory& from) const;
    void call(CUhostFn function, void* data) const;  // on a thread of the driver's; it must not use the driver

    // Until end_capture, this thread's work on the stream becomes a graph and does not run.
    void begin_capture() const;
    std::shared_ptr<CapturedGraph> end_capture() const;

    const Driver& driver() const { return *driver_; }
    std::shared_ptr<const Driver> share() const { return driver_; }
    CUstream handle() const { return stream_; }

private:
    std::shared_ptr<const Driver> driver_;
    CUstream stream_ = nullptr;
};

// A graph of one node, which calls the function; host form only. Executables made of it share the function.
class HostGraph final {
public:
    HostGraph(std::shared_ptr<const Driver> driver, std::function<void()> function);
    HostGraph(const HostGraph&) = delete;
    HostGraph& operator=(const HostGraph&) = delete;
    ~HostGraph();

    CUgraph handle() const { return graph_; }

private:
    std::shared_ptr<const Driver> driver_;
    CUgraph graph_ = nullptr;
};

// The graphs one after another, `repeats` times over, launched as one. The driver copies the graphs' nodes; the
// memory and the kernels' code that the nodes use stay the caller's to keep alive.
class Executable final {
public:
    Executable(std::shared_ptr<const Driver> driver, const std::vector<CUgraph>& graphs, std::size_t repeats);
    Executable(const Executable&) = delete;
    Executable& operator=(const Executable&) = delete;
    ~Executable();

    void launch(const Stream& stream) const;

private:
    std::shared_ptr<const Driver> driver_;
    CUgraphExec exec_ = nullptr;
};

}  // namespace volcast
