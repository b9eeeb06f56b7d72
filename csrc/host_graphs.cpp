#include <algorithm>
#include <iterator>
#include <mutex>
#include <set>
#include <utility>

#include "host_driver.hpp"
#include "host_queue.hpp"

namespace volcast {

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

// The graphs that live: their handles travel as integers, so they are checked. Never destroyed itself.
struct Registry {
    std::mutex mutex;
    std::set<CUgraph> graphs;
};

Registry& registry() {
    static auto* const instance = new Registry;
    return *instance;
}

bool is_graph(CUgraph graph) {
    const std::lock_guard lock(registry().mutex);
    return registry().graphs.count(graph) != 0;
}

CUresult graph_create(CUgraph* graph, unsigned) {
    return host_guarded([&]() -> CUresult {
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
    return host_guarded([&]() -> CUresult {
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
    return host_guarded([&]() -> CUresult {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        const auto made = std::make_shared<CUgraphExec_st>();
        made->functions = graph->functions();
        made->self = made;
        *exec = made.get();
        return CUDA_SUCCESS;
    });
}

CUresult graph_launch(CUgraphExec exec, CUstream stream) {
    return host_guarded([&]() -> CUresult {
        if (stream->capture != nullptr) {
            stream->capture->nodes.push_back(std::make_unique<CUgraphNode_st>(CUgraphNode_st{exec->functions}));
            return CUDA_SUCCESS;
        }
        Task task;
        task.exec = exec->self;
        return stream->enqueue(std::move(task));
    });
}

CUresult graph_exec_destroy(CUgraphExec exec) {
    const std::shared_ptr<CUgraphExec_st> last = std::move(exec->self);  // launches under way keep it
    return CUDA_SUCCESS;
}

}  // namespace

CUresult host_add_function(CUgraph graph, std::function<void()> function) {
    return host_guarded([&]() -> CUresult {
        if (!is_graph(graph)) return CUDA_ERROR_INVALID_VALUE;
        auto shared = std::make_shared<const std::function<void()>>(std::move(function));
        graph->nodes.push_back(std::make_unique<CUgraphNode_st>(CUgraphNode_st{{std::move(shared)}}));
        return CUDA_SUCCESS;
    });
}

CUresult CUstream_st::run(std::function<void()> function) {
    if (capture != nullptr) return host_add_function(capture, std::move(function));
    auto once = std::make_shared<CUgraphExec_st>();
    once->functions.push_back(std::make_shared<const std::function<void()>>(std::move(function)));
    Task task;
    task.exec = std::move(once);
    return enqueue(std::move(task));
}

void fill_graphs(DriverTable& table) {
    table.cuGraphCreate = graph_create;
    table.cuGraphAddChildGraphNode = graph_add_child;
    table.cuGraphInstantiateWithFlags = graph_instantiate;
    table.cuGraphLaunch = graph_launch;
    table.cuGraphExecDestroy = graph_exec_destroy;
    table.cuGraphDestroy = graph_destroy;
}

}  // namespace volcast
