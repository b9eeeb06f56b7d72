#include <cmath>

#include "check.hpp"
#include "plan_parts.hpp"

namespace volcast {

Plan make_dpm_solver(const Schedule& schedule, const Steps& steps, Prediction prediction, const Clip& clip) {
    check(!steps.monai, "dpm-solver++", "compat monai-1.6: MONAI has no such scheduler; need compat=None");
    check_clip("dpm-solver++", clip);
    check_start("dpm-solver++", steps.start, steps.steps);
    const auto grid = spaced_timesteps(steps.spacing, schedule.size(), steps.steps, steps.steps_offset);
    std::vector<Row> rows;
    double previous_gap = 0;  // of log(signal / sigma), over the step before
    for (auto i = static_cast<std::size_t>(steps.start); i < grid.size(); ++i) {
        const bool last = i + 1 == grid.size();
        const double now = alpha_bar(schedule, grid[i], true);
        const double next = alpha_bar(schedule, last ? -1 : grid[i + 1], true);
        const double gap = last ? 0 : 0.5 * std::log(next / (1 - next) * ((1 - now) / now));
        const double shrink = std::sqrt((1 - next) / (1 - now));
        const double to_x0 = std::sqrt(next) - shrink * std::sqrt(now);  // alpha (1 - exp(-gap))
        Row row = row_at(grid[i], now);
        const Fold at = fold(prediction, now);
        row.a = shrink;
        row.p = at.x0_x;
        row.q = at.x0_out;
        if (clip) {
            row.lo = clip->first;
            row.hi = clip->second;
        }
        row.e = to_x0;
        if (!rows.empty() && !last) {
            const double slope = gap / (2 * previous_gap);
            row.e = to_x0 * (1 + slope);
            row.b[0] = -to_x0 * slope;
            row.read[0] = 0;
        }
        if (!last) row.write = 0;
        previous_gap = gap;
        rows.push_back(row);
    }
    return finish("dpm-solver++", schedule.size(), std::move(rows));
}

}  // namespace volcast
