#include "device.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "check.hpp"

namespace volcast {

namespace {

void check_same(const char* op, const Driver& one, const Driver& other) {
    check(one.shares_context(other), op, "objects of driver ", one.name(), " and of driver ", other.name(),
          ": need both of one device; make them with the same Driver");
}

// Destroys the graph at the end of its scope.
class OwnedGraph final {
public:
    explicit OwnedGraph(const Driver& driver) : driver_(driver) {
        driver_.call("create a graph", &DriverTable::cuGraphCreate, &graph, 0U);
    }
    OwnedGraph(const OwnedGraph&) = delete;
    OwnedGraph& operator=(const OwnedGraph&) = delete;
    ~OwnedGraph() {
        if (graph != nullptr) driver_.attempt(&DriverTable::cuGraphDestroy, graph);
    }
    CUgraph release() { return std::exchange(graph, nullptr); }

    CUgraph graph = nullptr;

private:
    const Driver& driver_;
};

}  // namespace

Event::Event(std::shared_ptr<const Driver> driver) : driver_(std::move(driver)) {
    // A waiting thread sleeps: with two launches ahead its wake-up costs no time, spinning would cost a core.
    const unsigned flags = CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC;
    driver_->call("create an event", &DriverTable::cuEventCreate, &event_, flags);
}

Event::~Event() { driver_->attempt(&DriverTable::cuEventDestroy_v2, event_); }

bool Event::done() const {
    const CUresult result = driver_->attempt(&DriverTable::cuEventQuery, event_);
    if (result == CUDA_ERROR_NOT_READY) return false;
    driver_->check_result("query an event", result);
    return true;
}

void Event::synchronize() const {
    driver_->call("wait for an event", &DriverTable::cuEventSynchronize, event_);
}

DeviceMemory::DeviceMemory(std::shared_ptr<const Driver> driver, std::size_t bytes)
    : driver_(std::move(driver)), bytes_(bytes) {
    driver_->call("allocate memory", &DriverTable::cuMemAlloc_v2, &address_, bytes);
}

DeviceMemory::~DeviceMemory() { driver_->attempt(&DriverTable::cuMemFree_v2, address_); }

PinnedMemory::PinnedMemory(std::shared_ptr<const Driver> driver, std::size_t bytes)
    : driver_(std::move(driver)), bytes_(bytes) {
    driver_->call("allocate page-locked memory", &DriverTable::cuMemHostAlloc, &data_, bytes, 0U);
    std::memset(data_, 0, bytes);
}

PinnedMemory::~PinnedMemory() { driver_->attempt(&DriverTable::cuMemFreeHost, data_); }

CapturedGraph::~CapturedGraph() { driver_->attempt(&DriverTable::cuGraphDestroy, graph_); }

Stream::Stream(std::shared_ptr<const Driver> driver) : driver_(std::move(driver)) {
    const unsigned flags = CU_STREAM_NON_BLOCKING;  // independent of torch's default stream
    driver_->call("create a stream", &DriverTable::cuStreamCreate, &stream_, flags);
}

Stream::~Stream() { driver_->attempt(&DriverTable::cuStreamDestroy_v2, stream_); }

void Stream::record(const Event& event) const {
    check_same("record", *driver_, event.driver());
    driver_->call("record an event", &DriverTable::cuEventRecord, event.handle(), stream_);
}

void Stream::wait(const Event& event) const {
    check_same("wait", *driver_, event.driver());
    driver_->call("wait for an event", &DriverTable::cuStreamWaitEvent, stream_, event.handle(), 0U);
}

void Stream::synchronize() const {
    driver_->call("wait for a stream", &DriverTable::cuStreamSynchronize, stream_);
}

void Stream::copy(const DeviceMemory& to, const PinnedMemory& from) const {
    check_same("copy", *driver_, to.driver());
    check_same("copy", *driver_, from.driver());
    driver_->call("copy to the device", &DriverTable::cuMemcpyHtoDAsync_v2, to.address(),
                  static_cast<const void*>(from.data()), std::min(to.bytes(), from.bytes()), stream_);
}

void Stream::copy(const PinnedMemory& to, const DeviceMemory& from) const {
    check_same("copy", *driver_, to.driver());
    check_same("copy", *driver_, from.driver());
    driver_->call("copy from the device", &DriverTable::cuMemcpyDtoHAsync_v2, to.data(), from.address(),
                  std::min(to.bytes(), from.bytes()), stream_);
}

void Stream::call(CUhostFn function, void* data) const {
    driver_->call("call a function", &DriverTable::cuLaunchHostFunc, stream_, function, data);
}

void Stream::begin_capture() const {
    driver_->call("begin a capture", &DriverTable::cuStreamBeginCapture_v2, stream_,
                  static_cast<int>(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
}

std::shared_ptr<CapturedGraph> Stream::end_capture() const {
    CUgraph graph = nullptr;
    driver_->call("end a capture", &DriverTable::cuStreamEndCapture, stream_, &graph);
    return std::make_shared<CapturedGraph>(driver_, graph);
}

HostGraph::HostGraph(std::shared_ptr<const Driver> driver, std::function<void()> function)
    : driver_(std::move(driver)) {
    check(driver_->is_host(), "HostGraph", "driver=", driver_->name(),
          ": need the host form; capture CUDA graphs instead");
    OwnedGraph owned(*driver_);
    driver_->check_result("add a function to a graph", host_add_function(owned.graph, std::move(function)));
    graph_ = owned.release();
}

HostGraph::~HostGraph() { driver_->attempt(&DriverTable::cuGraphDestroy, graph_); }

Executable::Executable(std::shared_ptr<const Driver> driver, const std::vector<CUgraph>& graphs, std::size_t repeats)
    : driver_(std::move(driver)) {
    check(!graphs.empty(), "Executable", "graph_handles: need at least one graph");
    check(repeats >= 1, "Executable", "repeats=0: need at least 1");
    const OwnedGraph whole(*driver_);
    CUgraphNode last = nullptr;
    for (std::size_t i = 0; i < repeats * graphs.size(); ++i) {
        const CUgraphNode previous = last;
        driver_->call("add a graph to a graph", &DriverTable::cuGraphAddChildGraphNode, &last, whole.graph, &previous,
                      std::size_t{previous != nullptr}, graphs[i % graphs.size()]);
    }
    driver_->call("instantiate a graph", &DriverTable::cuGraphInstantiateWithFlags, &exec_, whole.graph, 0ULL);
}

Executable::~Executable() { driver_->attempt(&DriverTable::cuGraphExecDestroy, exec_); }

void Executable::launch(const Stream& stream) const {
    check_same("launch", *driver_, stream.driver());
    driver_->call("launch a graph", &DriverTable::cuGraphLaunch, exec_, stream.handle());
}

}  // namespace volcast
