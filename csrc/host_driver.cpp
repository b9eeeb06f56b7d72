#include <algorithm>
#include <iterator>
#include <map>
#include <new>
#include <set>
#include <system_error>
#include <utility>

#include "host_stream.hpp"

namespace volcast {

struct CUctx_st {};

struct CUgraphNode_st {
    std::vector<Function> functions;  // one, or those of a child graph
};

struct CUgraph_st {
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes;  // a node depends on earlier ones only: the order is valid

    std::vector<Function> functions() const {
        std::vector<Function> all;
        for (const auto& node : nodes) std::copy(node->functions.begin(), node->functions.end(), back_inserter(all));
        return all;
    }
};

namespace {

// What lives. Never destroyed itself, for handles may outlive static destruction.
struct Registry {
    std::mutex mutex;
    std::map<CUstream, std::shared_ptr<CUstream_st>> streams;
    std::set<CUgraph> graphs;  // their handles travel as integers, so they are checked
    bool closed = false;
};

Registry& registry() {
    static auto* const instance = new Registry;
    return *instance;
}

CUctx_st the_context;
thread_local int pushed = 0;  // how many contexts this thread has pushed
thread_local std::exception_ptr last_fault;

bool is_graph(CUgraph graph) {
    const std::lock_guard lock(registry().mutex);
    return registry().graphs.count(graph) != 0;
}

// No exception crosses the C interface: memory and threads can run out, nothing else throws.
template <class Body>
CUresult guarded(const Body& body) {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    } catch (const std::system_error&) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
}

CUresult report(const std::shared_ptr<Epoch>& failed) {
    if (!failed || failed->reported.exchange(true)) return CUDA_SUCCESS;
    last_fault = failed->fault;
    return CUDA_ERROR_LAUNCH_FAILED;
}

CUresult stream_create(CUstream* stream, unsigned) {
    return guarded([&]() -> CUresult {
        if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
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
    return guarded([&] {
        const auto marker = std::make_shared<Marker>();
        const CUresult recorded = record(marker, stream);
        return recorded == CUDA_SUCCESS ? report(marker->wait()) : recorded;
    });
}

CUresult stream_wait_event(CUstream stream, CUevent event, unsigned) {
    return guarded([&]() -> CUresult {
        Task task;
        task.awaited = event->latest();
        return task.awaited ? stream->enqueue(std::move(task)) : CUDA_SUCCESS;
    });
}

CUresult event_create(CUevent* event, unsigned) {
    return guarded([&]() -> CUresult {
        if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
        *event = new CUevent_st;
        return CUDA_SUCCESS;
    });
}

CUresult event_destroy(CUevent event) {
    delete event;
    return CUDA_SUCCESS;
}

CUresult event_record(CUevent event, CUstream stream) {
    return guarded([&] {
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

CUresult graph_create(CUgraph* graph, unsigned) {
    return guarded([&]() -> CUresult {
        auto created = std::make_unique<CUgraph_st>();
        const std::lock_guard lock(registry().mutex);
        registry().graphs.insert(created.get());
        *graph = created.release();
        return CUDA_SUCCESS;
    });
}

CUresult graph_destroy(CUgraph graph) {
    {
        const std::lock_guard lock(registry().mutex);
        if (registry().graphs.erase(graph) == 0) return CUDA_ERROR_INVALID_VALUE;
    }
    delete graph;
    return CUDA_SUCCESS;
}

CUresult graph_add_child(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies, std::size_t count,
                         CUgraph child) {
    return guarded([&]() -> CUresult {
        if (!is_graph(graph) || !is_graph(child) || graph == child) return CUDA_ERROR_INVALID_VALUE;
        const auto& nodes = graph->nodes;
        const bool known = std::all_of(dependencies, dependencies + count, [&](CUgraphNode wanted) {
            return std::any_of(nodes.begin(), nodes.end(), [&](const auto& each) { return each.get() == wanted; });
        });
        if (!known) return CUDA_ERROR_INVALID_VALUE;
        graph->nodes.push_back(std::make_unique<CUgraphNode_st>(CUgraphNode_st{child->functions()}));
        *node = graph->nodes.back().get();
        return CUDA_SUCCESS;
    });
}

CUresult graph_instantiate(CUgraphExec* exec, CUgraph graph, unsigned long long) {
    return guarded([&]() -> CUresult {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        const auto made = std::make_shared<CUgraphExec_st>();
        made->functions = graph->functions();
        made->self = made;
        *exec = made.get();
        return CUDA_SUCCESS;
    });
}

CUresult graph_launch(CUgraphExec exec, CUstream stream) {
    return guarded([&] {
        Task task;
        task.exec = exec->self;
        return stream->enqueue(std::move(task));
    });
}

CUresult graph_exec_destroy(CUgraphExec exec) {
    const std::shared_ptr<CUgraphExec_st> last = std::move(exec->self);  // launches under way keep it
    return CUDA_SUCCESS;
}

struct Described {
    CUresult code;
    const char *name, *text;
};

// What the host form returns.
constexpr Described errors[] = {
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

template <const char* Described::*field>
CUresult describe(CUresult code, const char** result) {
    for (const Described& each : errors) {
        if (each.code != code) continue;
        *result = each.*field;
        return CUDA_SUCCESS;
    }
    *result = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

const DriverTable& host_table() {
    static const DriverTable table = [] {
        DriverTable made{};
        made.cuInit = [](unsigned) -> CUresult { return CUDA_SUCCESS; };
        made.cuDriverGetVersion = [](int* version) -> CUresult { return *version = 12000, CUDA_SUCCESS; };
        made.cuGetErrorName = describe<&Described::name>;
        made.cuGetErrorString = describe<&Described::text>;
        made.cuDeviceGet = [](CUdevice* device, int ordinal) -> CUresult {
            *device = ordinal;
            return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
        };
        made.cuDevicePrimaryCtxRetain = [](CUcontext* context, CUdevice) -> CUresult {
            *context = &the_context;
            return CUDA_SUCCESS;
        };
        made.cuDevicePrimaryCtxRelease_v2 = [](CUdevice) -> CUresult { return CUDA_SUCCESS; };
        made.cuCtxPushCurrent_v2 = [](CUcontext) -> CUresult { return ++pushed, CUDA_SUCCESS; };
        made.cuCtxPopCurrent_v2 = [](CUcontext* context) -> CUresult {
            if (pushed == 0) return CUDA_ERROR_INVALID_CONTEXT;
            *context = &the_context;
            return --pushed, CUDA_SUCCESS;
        };
        made.cuStreamCreate = stream_create;
        made.cuStreamDestroy_v2 = stream_destroy;
        made.cuStreamSynchronize = stream_synchronize;
        made.cuStreamWaitEvent = stream_wait_event;
        made.cuEventCreate = event_create;
        made.cuEventDestroy_v2 = event_destroy;
        made.cuEventRecord = event_record;
        made.cuEventQuery = event_query;
        made.cuEventSynchronize = event_synchronize;
        made.cuGraphCreate = graph_create;
        made.cuGraphAddChildGraphNode = graph_add_child;
        made.cuGraphInstantiateWithFlags = graph_instantiate;
        made.cuGraphLaunch = graph_launch;
        made.cuGraphExecDestroy = graph_exec_destroy;
        made.cuGraphDestroy = graph_destroy;
        return made;
    }();
    return table;
}

CUresult host_add_function(CUgraph graph, std::function<void()> function) {
    return guarded([&]() -> CUresult {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        auto shared = std::make_shared<const std::function<void()>>(std::move(function));
        graph->nodes.push_back(std::make_unique<CUgraphNode_st>(CUgraphNode_st{{std::move(shared)}}));
        return CUDA_SUCCESS;
    });
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
