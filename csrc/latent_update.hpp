#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "device.hpp"
#include "loop.hpp"

namespace volcast {

// The buffers of a captured step, page-locked: x [count, numel] and row [count, columns] are the network's next
// input, outs its outputs [count, numel]: one, or with guidance the unconditional and the conditional one.
struct StepBuffers {
    std::size_t count, numel, columns;
    float* x;
    float* row;
    std::vector<const float*> outs;
};

// A plan's update as a part of a stream's work: each call carries out the next row on the buffers. Owns what the
// trajectories remember. Between `start` and the end of the stream's work nobody else touches the buffers.
class LatentUpdate final {
public:
    explicit LatentUpdate(StepBuffers buffers);
    LatentUpdate(const LatentUpdate&) = delete;
    LatentUpdate& operator=(const LatentUpdate&) = delete;

    // Rows [steps, columns] are what the network is shown; x must hold the first latent. Throws on what does not fit.
    void start(const Plan& plan, std::vector<float> rows, const std::vector<std::uint64_t>& seeds,
               const std::vector<std::uint64_t>& samples, std::optional<double> guidance);
    void enqueue(const Stream& stream);  // captured where the stream captures

    std::size_t done() const { return done_; }
    // What went wrong, or empty; later rows are not carried out then.
    std::string failure() const { return failed_ ? failure_ : std::string(); }

private:
    void apply() noexcept;
    void advance_all();
    void show_row();

    const StepBuffers buffers_;
    Plan plan_;
    std::vector<float> rows_, guided_;
    std::vector<Trajectory<float>> states_;
    std::optional<double> guidance_;
    std::atomic<std::size_t> done_{0};
    std::string failure_;  // written once, before failed_
    std::atomic<bool> failed_{false};
};

}  // namespace volcast
