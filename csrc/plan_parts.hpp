#pragma once

#include "plan.hpp"

namespace volcast {

// x0 = x0_x * x + x0_out * out and eps = eps_x * x + eps_out * out at a given alpha_bar.
struct Fold {
    double x0_x, x0_out, eps_x, eps_out;
};
Fold fold(Prediction prediction, double alpha_bar);

// alpha_bar at t; a negative t is the clean end of the schedule.
double alpha_bar(const Schedule& schedule, std::int64_t t, bool set_alpha_to_one);

// A row at timestep t whose input has that alpha_bar; no update yet.
Row row_at(std::int64_t t, double alpha_bar);

// Makes the row x <- to_x0 * x0 + to_eps * eps + to_x * x, clipping x0 if asked.
void combine(Row& row, const Fold& fold, const Clip& clip, double to_x0, double to_eps, double to_x);

// Drops the steps before `start`; checks it.
void check_start(const char* op, std::int64_t start, std::int64_t steps);
void check_clip(const char* op, const Clip& clip);

// Counts slots and refuses coefficients that are not finite.
Plan finish(const char* method, std::int64_t train_timesteps, std::vector<Row> rows);

}  // namespace volcast
