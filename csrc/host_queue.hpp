#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "driver.hpp"

// The host form's streams: threads with first-in first-out queues, the driver's API aside.
// Tasks, functions and faults are let go of outside all locks: their destruction may wait for locks of its own.
namespace volcast {

using Function = std::shared_ptr<const std::function<void()>>;

// A stream's work from one reported failure to the next. All of an epoch that follows its failure is skipped.
struct Epoch {
    std::exception_ptr fault;  // set by the stream's thread; others read it once a marker behind it has passed
    std::atomic<bool> reported{false};
};

// One record of an event: passes when the stream reaches it.
class Marker final {
public:
    void pass(std::shared_ptr<Epoch> failed);
    bool passed();
    // Returns the epoch whose failure skipped the work before the marker, else null.
    std::shared_ptr<Epoch> wait();

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool passed_ = false;
    std::shared_ptr<Epoch> failed_;
};

struct CUgraphExec_st {
    std::vector<Function> functions;
    std::mutex running;  // as on a device, an executable never overlaps itself
    std::shared_ptr<CUgraphExec_st> self;  // the handle's hold; queued launches have their own
};

struct CUevent_st {
    std::shared_ptr<Marker> latest();  // null: never recorded, which counts as passed
    void set(std::shared_ptr<Marker> marker);

private:
    std::mutex mutex_;
    std::shared_ptr<Marker> latest_;
};

struct Task {  // what is set is done in this order
    std::shared_ptr<Marker> awaited;
    std::shared_ptr<CUgraphExec_st> exec;
    std::shared_ptr<Marker> marker;
    std::shared_ptr<Epoch> epoch;
};

struct CUstream_st : std::enable_shared_from_this<CUstream_st> {
    void start();
    CUresult enqueue(Task task);
    // While `capture` is set, functions go into that graph instead of the queue. For the thread that captures.
    CUgraph capture = nullptr;
    CUresult run(std::function<void()> function);
    // Works the queue off and joins the thread; false on that thread itself, which cannot wait for its own end.
    bool finish();
    // From now on all streams skip the functions that they have not begun.
    static void skip_all();

private:
    void serve();

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Task> tasks_;
    std::shared_ptr<Epoch> epoch_ = std::make_shared<Epoch>();
    bool closed_ = false;
    std::once_flag joined_;
    std::thread thread_;
    std::thread::id id_;
};

}  // namespace volcast
