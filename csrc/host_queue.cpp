#include "host_queue.hpp"

#include <stdexcept>
#include <utility>

namespace volcast {

namespace {

std::atomic<bool> skipping{false};

void perform(const Task& task) {
    std::exception_ptr& fault = task.epoch->fault;
    if (task.awaited) {
        const std::shared_ptr<Epoch> failed = task.awaited->wait();
        if (failed && !fault) fault = failed->fault;
    }
    if (task.exec && !fault) {
        const std::lock_guard lock(task.exec->running);
        try {
            for (const Function& function : task.exec->functions) {
                if (skipping) throw std::runtime_error("[host] launch a graph: skipped, the process is exiting");
                (*function)();
            }
        } catch (...) {
            fault = std::current_exception();
        }
    }
    if (task.marker) task.marker->pass(fault ? task.epoch : nullptr);
}

}  // namespace

void Marker::pass(std::shared_ptr<Epoch> failed) {
    {
        const std::lock_guard lock(mutex_);
        passed_ = true;
        failed_ = std::move(failed);
    }
    changed_.notify_all();
}

bool Marker::passed() {
    const std::lock_guard lock(mutex_);
    return passed_;
}

std::shared_ptr<Epoch> Marker::wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return passed_; });
    return failed_;
}

std::shared_ptr<Marker> CUevent_st::latest() {
    const std::lock_guard lock(mutex_);
    return latest_;
}

void CUevent_st::set(std::shared_ptr<Marker> marker) {
    const std::lock_guard lock(mutex_);
    std::swap(latest_, marker);
}

void CUstream_st::start() {
    // The thread shares the stream, so that the stream's own functions may destroy it.
    thread_ = std::thread([self = shared_from_this()] { self->serve(); });
    id_ = thread_.get_id();
}

CUresult CUstream_st::enqueue(Task task) {
    if (capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    std::shared_ptr<Epoch> old;
    const std::lock_guard lock(mutex_);
    if (closed_) return CUDA_ERROR_DEINITIALIZED;
    if (epoch_->reported) old = std::exchange(epoch_, std::make_shared<Epoch>());
    task.epoch = epoch_;
    tasks_.push_back(std::move(task));
    changed_.notify_all();
    return CUDA_SUCCESS;
}

bool CUstream_st::finish() {
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
    }
    changed_.notify_all();
    if (id_ == std::this_thread::get_id()) return false;
    std::call_once(joined_, [&] { thread_.join(); });
    return true;
}

void CUstream_st::skip_all() { skipping = true; }

void CUstream_st::serve() {
    for (;;) {
        Task task;
        {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [&] { return closed_ || !tasks_.empty(); });
            if (tasks_.empty()) return;
            task = std::move(tasks_.front());
            tasks_.pop_front();
        }
        perform(task);
    }
}

}  // namespace volcast
