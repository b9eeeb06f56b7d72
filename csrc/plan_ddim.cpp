#include <algorithm>
#include <cmath>

#include "check.hpp"
#include "plan_parts.hpp"

namespace volcast {
namespace {

struct Transition {
    std::int64_t shown, from, to;  // timesteps; -1 is the clean end
};

std::vector<Transition> transitions(const Schedule& schedule, const Steps& steps, bool reverse) {
    const std::int64_t train = schedule.size();
    const auto grid = steps.monai ? monai_linspace(train, steps.steps, steps.steps_offset)
                                  : spaced_timesteps(steps.spacing, train, steps.steps, steps.steps_offset);
    check_start("ddim", steps.start, steps.steps);
    const std::int64_t stride = train / steps.steps;
    std::vector<Transition> result;
    for (auto i = static_cast<std::size_t>(steps.start); i < grid.size(); ++i) {
        const std::int64_t t = grid[i];
        const std::int64_t next = i + 1 < grid.size() ? grid[i + 1] : -1;
        if (steps.monai && reverse) {
            // reversed_step adds the stride to the timestep shown: the noisiest one has nowhere to go.
            if (i == 0) continue;
            check(t + stride < train, "ddim", "steps_offset=", steps.steps_offset, ": MONAI's reversed_step from t=", t,
                  " leaves its table of ", train, "; use a smaller offset");
            result.push_back({t, t, t + stride});
        } else if (steps.monai) {
            result.push_back({t, t, t - stride});
        } else if (reverse) {
            result.push_back({t, next, t});
        } else {
            result.push_back({t, t, next});
        }
    }
    if (reverse) std::reverse(result.begin(), result.end());
    check(!result.empty(), "ddim", "steps=", steps.steps, ": MONAI's reversed_step needs at least 2");
    return result;
}

}  // namespace

Plan make_ddim(const Schedule& schedule, const Steps& steps, Prediction prediction, const Clip& clip, double eta,
               bool reverse) {
    check(eta >= 0 && eta <= 1, "ddim", "eta=", eta, ": need 0..1");
    check(!reverse || eta == 0, "ddim", "eta=", eta, " with reverse: inversion is deterministic, need eta=0");
    check_clip("ddim", clip);
    std::vector<Row> rows;
    for (const auto& [shown, from, to] : transitions(schedule, steps, reverse)) {
        const double now = alpha_bar(schedule, from, steps.set_alpha_to_one);
        const double next = alpha_bar(schedule, to, steps.set_alpha_to_one);
        check(now < 1 || prediction != Prediction::sample, "ddim",
              "reverse with prediction sample starts at alpha_bar 1, where x0 tells nothing of eps; "
              "need set_alpha_to_one=False");
        Row row = row_at(shown, now);
        if (eta > 0) row.c = eta * std::sqrt((1 - next) / (1 - now) * (1 - now / next));
        const double to_eps = std::sqrt(std::max(0.0, 1 - next - row.c * row.c));
        combine(row, fold(prediction, now), clip, std::sqrt(next), to_eps, 0);
        rows.push_back(row);
    }
    return finish("ddim", schedule.size(), std::move(rows));
}

Plan make_ddpm(const Schedule& schedule, const Steps& steps, Prediction prediction, const Clip& clip,
               Variance variance) {
    check_clip("ddpm", clip);
    check_start("ddpm", steps.start, steps.steps);
    const auto grid = steps.monai ? monai_linspace(schedule.size(), steps.steps, 0)
                                  : spaced_timesteps(steps.spacing, schedule.size(), steps.steps, steps.steps_offset);
    std::vector<Row> rows;
    for (auto i = static_cast<std::size_t>(steps.start); i < grid.size(); ++i) {
        const bool last = i + 1 == grid.size();
        const std::int64_t to = steps.monai ? grid[i] - 1 : last ? -1 : grid[i + 1];
        const double now = alpha_bar(schedule, grid[i], true);
        const double next = alpha_bar(schedule, to, true);
        const double beta = 1 - now / next;
        const double posterior = (1 - next) / (1 - now) * beta;
        Row row = row_at(grid[i], now);
        combine(row, fold(prediction, now), clip, std::sqrt(next) * beta / (1 - now), 0,
                std::sqrt(now / next) * (1 - next) / (1 - now));
        if (steps.monai ? grid[i] > 0 : !last) {
            row.c = std::sqrt(variance == Variance::fixed_large ? beta : std::max(posterior, 1e-20));
        }
        rows.push_back(row);
    }
    return finish("ddpm", schedule.size(), std::move(rows));
}

}  // namespace volcast
