#include <algorithm>
#include <cmath>

#include "check.hpp"
#include "plan_parts.hpp"

namespace volcast {
namespace {

struct Move {
    std::int64_t shown, from, to;  // timesteps; a negative `to` is the clean end
};

struct Past {
    std::int32_t slot;
    double weight;
};

class Builder {
   public:
    Builder(const Schedule& schedule, const Steps& steps, Prediction prediction)
        : schedule_(schedule), steps_(steps), prediction_(prediction) {}

    // x <- transfer of the base from `from` to `to` (arXiv:2202.09778 Eq. 9) along weight * this eps + past ones.
    Row& add(const Move& move, double weight, const std::vector<Past>& past) {
        const double shown = alpha_bar(schedule_, move.shown, steps_.set_alpha_to_one);
        const double now = alpha_bar(schedule_, move.from, steps_.set_alpha_to_one);
        const double next = alpha_bar(schedule_, move.to, steps_.set_alpha_to_one);
        Row row = row_at(move.shown, shown);
        double along = -(next - now) / (now * std::sqrt(1 - next) + std::sqrt(now * (1 - now) * next));
        row.a = std::sqrt(next / now);
        const Fold at = fold(prediction_, shown);
        row.p = at.eps_x;
        row.q = at.eps_out;
        if (steps_.monai && prediction_ == Prediction::v_prediction) {
            // MONAI keeps the history of v and turns the weighted sum into eps once.
            row.p = 0;
            row.q = 1;
            row.a += along * std::sqrt(1 - now);
            along *= std::sqrt(now);
        }
        row.e = along * weight;
        for (std::size_t k = 0; k < past.size(); ++k) {
            row.read[k] = past[k].slot;
            row.b[k] = along * past[k].weight;
        }
        rows_.push_back(row);
        return rows_.back();
    }

    // Four calls for one step; slots 3 and 4 hold the two middle slopes.
    void runge_kutta(const std::array<Move, 4>& moves) {
        const std::int32_t first = remember();
        Row& row = add(moves[0], 1, {});
        row.save = true;
        row.write = first;
        for (std::int32_t k = 1; k <= 2; ++k) {
            Row& middle = add(moves[static_cast<std::size_t>(k)], 1, {});
            middle.from_saved = true;
            middle.write = 2 + k;
        }
        add(moves[3], 1.0 / 6, {{first, 1.0 / 6}, {3, 1.0 / 3}, {4, 1.0 / 3}}).from_saved = true;
    }

    // The second call of the first step: the mean of both slopes, from the saved x; not remembered.
    void correct(const Move& move) {
        rows_.back().save = true;
        add(move, 0.5, {{past_.back(), 0.5}}).from_saved = true;
    }

    // Adams-Bashforth of the highest order that the history allows, up to 4.
    void multistep(const Move& move) {
        static const std::vector<std::vector<double>> tables{
            {1}, {3. / 2, -1. / 2}, {23. / 12, -16. / 12, 5. / 12}, {55. / 24, -59. / 24, 37. / 24, -9. / 24}};
        const std::vector<double>& weights = tables[past_.size()];
        std::vector<Past> past;
        for (std::size_t k = 1; k < weights.size(); ++k) past.push_back({past_[past_.size() - k], weights[k]});
        add(move, weights[0], past).write = remember();
    }

    std::vector<Row> rows() && { return std::move(rows_); }

   private:
    // The slot for this row's eps: a free one of three, else the oldest (which the row reads before it writes).
    std::int32_t remember() {
        auto slot = static_cast<std::int32_t>(past_.size());
        if (past_.size() == 3) {
            slot = past_.front();
            past_.erase(past_.begin());
        }
        past_.push_back(slot);
        return slot;
    }

    const Schedule& schedule_;
    const Steps& steps_;
    Prediction prediction_;
    std::vector<Row> rows_;
    std::vector<std::int32_t> past_;  // slots, oldest first
};

}  // namespace

Plan make_pndm(const Schedule& schedule, const Steps& steps, Prediction prediction, bool skip_prk_steps) {
    check(prediction != Prediction::sample, "pndm",
          "prediction sample: need epsilon or v_prediction; use ddim, ddpm or dpm-solver++");
    check_start("pndm", steps.start, steps.steps);
    const std::int64_t train = schedule.size();
    const std::int64_t count = steps.steps - steps.start;
    const bool monai = steps.monai;
    check(skip_prk_steps || count >= 4, "pndm", "steps=", steps.steps, " with start=", steps.start,
          ": the three Runge-Kutta steps need 4 or more; use skip_prk_steps");
    check(skip_prk_steps || !monai || steps.start == 0, "pndm", "start=", steps.start,
          ": MONAI 1.6.1 cannot start late with Runge-Kutta steps; use skip_prk_steps or no compat");
    auto grid = spaced_timesteps(monai ? Spacing::leading : steps.spacing, train, steps.steps, steps.steps_offset);
    grid.erase(grid.begin(), grid.begin() + steps.start);
    // MONAI overwrites num_inference_steps with the number of calls, and takes its strides from that.
    const std::int64_t stride = train / (skip_prk_steps ? steps.steps : steps.steps + 9);
    const auto next = [&](std::size_t i) { return i + 1 < grid.size() ? grid[i + 1] : -1; };

    Builder plan(schedule, steps, prediction);
    for (std::size_t i = 0; !skip_prk_steps && i < 3; ++i) {
        const std::int64_t t = grid[i], end = grid[i + 1], middle = end + (t - end) / 2;
        plan.runge_kutta({Move{t, t, monai ? t - stride / 2 : middle}, Move{middle, t, middle},
                          Move{middle, t, monai ? middle - stride / 2 : end}, Move{end, t, end}});
    }
    for (std::size_t i = skip_prk_steps ? 0 : 3; i < grid.size(); ++i) {
        const std::int64_t t = grid[i];
        const bool second = skip_prk_steps && i == 1;
        if (second) plan.correct(monai ? Move{t, t + stride, t} : Move{t, grid[0], t});
        // MONAI does not show the second timestep twice, so from here on it is one step ahead of x.
        if (second && monai) continue;
        plan.multistep({t, t, monai ? t - stride : next(i)});
    }
    return finish("pndm", train, std::move(plan).rows());
}

}  // namespace volcast
