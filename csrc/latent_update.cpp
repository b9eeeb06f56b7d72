#include "latent_update.hpp"

#include <algorithm>
#include <exception>
#include <utility>

#include "check.hpp"

namespace volcast {

LatentUpdate::LatentUpdate(StepBuffers buffers) : buffers_(std::move(buffers)) {
    const std::size_t outs = buffers_.outs.size();
    check(outs == 1 || outs == 2, "LatentUpdate", "outs: got ", outs, ": need one, or two with guidance");
}

void LatentUpdate::start(const Plan& plan, std::vector<float> rows, const std::vector<std::uint64_t>& seeds,
                         const std::vector<std::uint64_t>& samples, std::optional<double> guidance) {
    check(rows.size() == plan.rows.size() * buffers_.columns, "LatentUpdate", "rows: got ", rows.size(),
          " values, wanted ", plan.rows.size(), " rows of ", buffers_.columns);
    check(seeds.size() == buffers_.count && samples.size() == buffers_.count, "LatentUpdate", "seeds, samples: got ",
          seeds.size(), " and ", samples.size(), ", wanted ", buffers_.count);
    check(guidance.has_value() == (buffers_.outs.size() == 2), "LatentUpdate",
          "guidance: need it with two outputs, and not with one");
    std::vector<Trajectory<float>> states;
    for (std::size_t n = 0; n < buffers_.count; ++n) states.emplace_back(plan, seeds[n], samples[n], buffers_.numel);
    plan_ = plan;
    rows_ = std::move(rows);
    states_ = std::move(states);
    guidance_ = guidance;
    guided_.resize(guidance ? buffers_.count * buffers_.numel : 0);
    failed_ = false;
    done_ = 0;
    show_row();
}

void LatentUpdate::enqueue(const Stream& stream) {
    stream.call([](void* self) { static_cast<LatentUpdate*>(self)->apply(); }, this);
}

void LatentUpdate::apply() noexcept {
    // Past the last row (the launches of a warm-up) there is nothing to do.
    if (failed_ || done_ >= plan_.rows.size()) return;
    try {
        advance_all();
    } catch (const std::exception& error) {
        failure_ = error.what();
        failed_ = true;
    }
}

void LatentUpdate::advance_all() {
    const float* out = buffers_.outs.back();
    if (guidance_) {
        guide(*guidance_, buffers_.outs.front(), out, guided_.data(), guided_.size());
        out = guided_.data();
    }
    for (std::size_t n = 0; n < buffers_.count; ++n) {
        advance(plan_, done_, states_[n], buffers_.x + n * buffers_.numel, out + n * buffers_.numel);
    }
    ++done_;
    show_row();
}

void LatentUpdate::show_row() {
    if (done_ >= plan_.rows.size()) return;
    const auto row = rows_.begin() + static_cast<std::ptrdiff_t>(done_ * buffers_.columns);
    for (std::size_t n = 0; n < buffers_.count; ++n) {
        std::copy_n(row, buffers_.columns, buffers_.row + n * buffers_.columns);
    }
}

}  // namespace volcast
