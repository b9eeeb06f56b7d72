#include <algorithm>
#include <cmath>

#include "check.hpp"
#include "plan_parts.hpp"

namespace volcast {
namespace {

// The noise level at which row i begins; past the last row x is clean.
struct Level {
    double signal, sigma;
};

Level level(const Plan& plan, std::size_t i) {
    return i < plan.rows.size() ? Level{plan.rows[i].signal, plan.rows[i].sigma} : Level{1, 0};
}

}  // namespace

Plan make_repaint(const Plan& plan, std::int64_t resamples, std::int64_t jump_length) {
    const auto size = static_cast<std::int64_t>(plan.rows.size());
    check(!plan.inpaints && plan.history_slots == 0 && !plan.keeps_saved, "repaint", plan.method,
          " remembers earlier steps, which a jump makes wrong; need ddim, ddpm or rflow");
    check(resamples >= 1 && resamples <= 1000, "repaint", "resamples=", resamples, ": need 1..1000");
    check(jump_length >= 1 && (jump_length < size || resamples == 1), "repaint", "jump_length=", jump_length,
          ": need 1..", size - 1, ", less than the plan's rows, or resamples=1");
    for (std::size_t i = 0; i < plan.rows.size(); ++i) {
        check(level(plan, i + 1).sigma <= level(plan, i).sigma, "repaint", plan.method,
              " adds noise at row ", i, ": an inversion cannot inpaint");
    }
    // left[n]: how often x still goes back from where n rows are to be done after the next one (the paper's t = n).
    std::vector<std::int64_t> left(plan.rows.size(), 0);
    for (std::int64_t n = 0; n < size - jump_length; n += jump_length) left[static_cast<std::size_t>(n)] = resamples - 1;
    std::vector<Row> rows;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto next = static_cast<std::size_t>(i + 1);
        Row row = plan.rows[static_cast<std::size_t>(i)];
        const Level now = level(plan, next);
        row.known_signal = now.signal;
        row.known_sigma = now.sigma;
        const std::int64_t remaining = size - 2 - i;
        if (remaining >= 0 && left[static_cast<std::size_t>(remaining)] > 0) {
            --left[static_cast<std::size_t>(remaining)];
            const Level back = level(plan, static_cast<std::size_t>(i + 1 - jump_length));
            row.again = back.signal / now.signal;
            const double kept = row.again * now.sigma;
            row.again_sigma = std::sqrt(std::max(0.0, back.sigma * back.sigma - kept * kept));
            i -= jump_length;
        }
        rows.push_back(row);
    }
    Plan painted = finish(plan.method.c_str(), plan.train_timesteps, std::move(rows));
    painted.inpaints = true;
    return painted;
}

}  // namespace volcast
