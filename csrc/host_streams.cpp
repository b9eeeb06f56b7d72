#include <map>
#include <mutex>
#include <utility>

#include "host_driver.hpp"
#include "host_queue.hpp"

namespace volcast {

namespace {

// The streams that live. Never destroyed itself, for handles may outlive static destruction.
struct Registry {
    std::mutex mutex;
    std::map<CUstream, std::shared_ptr<CUstream_st>> streams;
    bool closed = false;
};

Registry& registry() {
    static auto* const instance = new Registry;
    return *instance;
}

thread_local std::exception_ptr last_fault;

CUresult report(const std::shared_ptr<Epoch>& failed) {
    if (!failed || failed->reported.exchange(true)) return CUDA_SUCCESS;
    last_fault = failed->fault;
    return CUDA_ERROR_LAUNCH_FAILED;
}

CUresult stream_create(CUstream* stream, unsigned) {
    return host_guarded([&]() -> CUresult {
        if (!host_has_context()) return CUDA_ERROR_INVALID_CONTEXT;
        const auto created = std::make_shared<CUstream_st>();
        const std::lock_guard lock(registry().mutex);
        if (registry().closed) return CUDA_ERROR_DEINITIALIZED;
        const auto listed = registry().streams.emplace(created.get(), created).first;
        try {
            created->start();
        } catch (...) {
            registry().streams.erase(listed);
            throw;
        }
        *stream = created.get();
        return CUDA_SUCCESS;
    });
}

CUresult stream_destroy(CUstream stream) {
    // A stream that its own thread destroys stays listed, for host_close to join.
    if (!stream->finish()) return CUDA_SUCCESS;
    std::shared_ptr<CUstream_st> last;
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().streams.find(stream);
    if (found != registry().streams.end()) {
        last = std::move(found->second);
        registry().streams.erase(found);
    }
    return CUDA_SUCCESS;
}

CUresult record(std::shared_ptr<Marker> marker, CUstream stream) {
    Task task;
    task.marker = std::move(marker);
    return stream->enqueue(std::move(task));
}

CUresult stream_synchronize(CUstream stream) {
    return host_guarded([&] {
        const auto marker = std::make_shared<Marker>();
        const CUresult recorded = record(marker, stream);
        return recorded == CUDA_SUCCESS ? report(marker->wait()) : recorded;
    });
}

CUresult stream_wait_event(CUstream stream, CUevent event, unsigned) {
    return host_guarded([&]() -> CUresult {
        Task task;
        task.awaited = event->latest();
        return task.awaited ? stream->enqueue(std::move(task)) : CUDA_SUCCESS;
    });
}

CUresult event_create(CUevent* event, unsigned) {
    return host_guarded([&]() -> CUresult {
        if (!host_has_context()) return CUDA_ERROR_INVALID_CONTEXT;
        *event = new CUevent_st;
        return CUDA_SUCCESS;
    });
}

CUresult event_destroy(CUevent event) {
    delete event;
    return CUDA_SUCCESS;
}

CUresult event_record(CUevent event, CUstream stream) {
    return host_guarded([&] {
        const auto marker = std::make_shared<Marker>();
        const CUresult recorded = record(marker, stream);
        if (recorded == CUDA_SUCCESS) event->set(marker);
        return recorded;
    });
}

CUresult event_query(CUevent event) {
    const std::shared_ptr<Marker> marker = event->latest();
    if (!marker) return CUDA_SUCCESS;
    return marker->passed() ? report(marker->wait()) : CUDA_ERROR_NOT_READY;
}

CUresult event_synchronize(CUevent event) {
    const std::shared_ptr<Marker> marker = event->latest();
    return marker ? report(marker->wait()) : CUDA_SUCCESS;
}

}  // namespace

void fill_streams(DriverTable& table) {
    table.cuStreamCreate = stream_create;
    table.cuStreamDestroy_v2 = stream_destroy;
    table.cuStreamSynchronize = stream_synchronize;
    table.cuStreamWaitEvent = stream_wait_event;
    table.cuEventCreate = event_create;
    table.cuEventDestroy_v2 = event_destroy;
    table.cuEventRecord = event_record;
    table.cuEventQuery = event_query;
    table.cuEventSynchronize = event_synchronize;
}

std::exception_ptr host_take_fault() { return std::exchange(last_fault, nullptr); }

void host_close() {
    std::map<CUstream, std::shared_ptr<CUstream_st>> streams;
    {
        const std::lock_guard lock(registry().mutex);
        registry().closed = true;
        streams = registry().streams;  // listed until they are destroyed: their handles stay valid
    }
    CUstream_st::skip_all();
    for (const auto& each : streams) each.second->finish();
}

}  // namespace volcast
