#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "loop.hpp"
#include "turns.hpp"

namespace volcast {

// The network at one batch size: `call` reads these inputs and returns the output [count, numel], good until its next
// call.
struct Lane {
    std::size_t count = 1;
    float* x = nullptr;              // [count, numel]
    float* row = nullptr;            // [count, row]
    std::vector<std::byte*> inputs;  // each [count, input_bytes[i]]
    std::function<const float*()> call;
};

// Samples that may share a network call: one latent shape, one set of conditions' shapes.
struct Group {
    std::size_t numel = 0, row = 0;
    std::vector<std::size_t> input_bytes;
    std::vector<Lane> lanes;  // ascending; the first has count 1. All must give a sample the same bits.
};

using Bytes = std::vector<std::byte>;

// One sample to be made.
struct Submission {
    std::size_t group = 0;
    std::shared_ptr<const Plan> plan;
    std::uint64_t seed = 0, sample = 0;
    std::optional<double> guidance;  // arXiv:2207.12598: u + w * (c - u)
    std::vector<float> x;            // [numel], where row 0 begins
    std::vector<float> known, keep;  // [numel] each where the plan inpaints (Known in loop.hpp), else empty
    std::shared_ptr<const std::vector<float>> rows;  // [steps, row]
    std::vector<Bytes> conditional, unconditional;   // the further inputs of each branch
    int priority = 0;                                // -8..8
    std::optional<double> deadline_s;                // from now
    std::size_t preview_every = 0;                   // steps; 0: none
};

enum class Happened { progress, preview, finished, cancelled, expired, failed };

// What became of a sample. The last four end it, each exactly once; until a reader takes them, later progress
// replaces earlier, and a later preview an earlier one, so that a slow reader holds little memory.
struct BatchEvent {
    std::uint64_t id = 0;
    Happened happened = Happened::progress;
    std::size_t step = 0, steps = 0;
    std::vector<float> x;  // preview, finished: [numel]
    std::string text;      // failed: why
};

struct BatcherLimits {
    std::size_t active = 64;  // samples that take turns
    std::size_t queue = 256;  // samples that wait for a place among them
};

struct BatcherStats {
    std::size_t active = 0, queued = 0;
    std::uint64_t submitted = 0, refused = 0, finished = 0, cancelled = 0, expired = 0, failed = 0;
    std::uint64_t calls = 0, entries = 0;            // network calls, and samples' branches in them
    std::map<std::size_t, std::uint64_t> calls_of;   // by batch size
    double network_s = 0, busy_s = 0;                // busy: in turns, network included
    double entry_s = 0;                              // smoothed seconds an entry
};

// Thrown by submit when the queue is full; `retry_s`: when a place should be free.
struct Overloaded : std::runtime_error {
    double retry_s;
    Overloaded(const std::string& text, double retry_s) : std::runtime_error(text), retry_s(retry_s) {}
};

// Step-level continuous batching: samples with different plans, seeds and guidance share network calls, join at the
// next step and leave when they are done. `run` belongs to one thread; everything else to any.
class Batcher {
  public:
    explicit Batcher(const BatcherLimits& limits);
    ~Batcher();
    Batcher(const Batcher&) = delete;
    Batcher& operator=(const Batcher&) = delete;

    std::size_t add_group(Group group);
    std::uint64_t submit(Submission submission);
    bool cancel(std::uint64_t id);  // false: it has ended; else it ends before its next step

    void run();                  // takes turns until close
    void close(bool drain);      // drain: first finish what was submitted; else cancel it. No more submissions.
    std::vector<BatchEvent> wait(double timeout_s);  // events in order; empty after the timeout, or when all has ended
    bool ended() const;          // closed, `run` has returned, and no event is left
    BatcherStats stats() const;

  private:
    struct Sample;
    using Samples = std::list<std::unique_ptr<Sample>>;
    struct Entry {
        Sample* sample;
        Branch branch;
    };

    void admit(std::unique_ptr<Sample> sample);
    void sweep(Clock::time_point now);
    std::vector<Entry> choose(Clock::time_point now) const;
    void take_turn(std::vector<Entry> entries, std::unique_lock<std::mutex>& lock);
    const float* call(Group& group, const std::vector<Entry>& entries);
    void finish_step(Sample& sample, std::string& error);
    void end(Samples::iterator place, Happened happened, std::string text = {});
    void tell(BatchEvent event);
    double seconds_ahead() const;

    const BatcherLimits limits_;
    mutable std::mutex mutex_;
    std::condition_variable work_, news_;
    std::deque<Group> groups_;  // references stay good while it grows
    Samples active_, queue_;
    std::deque<BatchEvent> events_;
    BatcherStats stats_;
    std::uint64_t next_ = 1;
    double pass_ = 0;
    bool closed_ = false, running_ = false;
};

}  // namespace volcast
