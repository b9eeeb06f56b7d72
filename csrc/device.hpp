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

class Stream final {
public:
    explicit Stream(std::shared_ptr<const Driver> driver);
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream();

    void record(const Event& event) const;
    void wait(const Event& event) const;  // holds later work back until the event's last record; does not block
    void synchronize() const;

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
