#include <algorithm>
#include <cmath>

#include "check.hpp"
#include "plan_parts.hpp"

namespace volcast {
namespace {

// Rounds to the nearest half-precision number, ties to even.
double to_half(double value) {
    int exponent = 0;
    std::frexp(value, &exponent);
    const double quantum = std::ldexp(1.0, std::max(exponent, -13) - 11);
    return std::nearbyint(value / quantum) * quantum;
}

void check_flow(const Flow& flow) {
    check(flow.train_timesteps >= 1, "rflow", "train_timesteps=", flow.train_timesteps, ": need at least 1");
    check(flow.steps >= 1 && flow.steps <= flow.train_timesteps, "rflow", "steps=", flow.steps, ": need 1..",
          flow.train_timesteps);
    check_start("rflow", flow.start, flow.steps);
    check(flow.steps_offset >= 0, "rflow", "steps_offset=", flow.steps_offset, ": need 0 or more");
    check(flow.input_img_size_numel >= 1, "rflow", "input_img_size_numel=", flow.input_img_size_numel,
          ": need at least 1");
    check(flow.base_img_size_numel >= 1, "rflow", "base_img_size_numel=", flow.base_img_size_numel,
          ": need at least 1");
    check(flow.spatial_dim >= 1 && flow.spatial_dim <= 3, "rflow", "spatial_dim=", flow.spatial_dim, ": need 1..3");
    check(!flow.monai || flow.train_timesteps + flow.steps_offset <= 65504, "rflow",
          "train_timesteps=", flow.train_timesteps, ": MONAI 1.6.1 keeps timesteps in float16, need at most 65504");
}

}  // namespace

Plan make_rflow(const Flow& flow) {
    check_flow(flow);
    const auto train = static_cast<double>(flow.train_timesteps);
    const double ratio = std::pow(static_cast<double>(flow.input_img_size_numel) /
                                      static_cast<double>(flow.base_img_size_numel),
                                  1.0 / static_cast<double>(flow.spatial_dim));
    const auto offset = static_cast<double>(flow.steps_offset);
    std::vector<double> times, shown;
    for (std::int64_t i = 0; i < flow.steps; ++i) {
        double t = (1.0 - static_cast<double>(i) / static_cast<double>(flow.steps)) * train;
        if (flow.use_discrete_timesteps) t = std::nearbyint(t);
        if (flow.use_timestep_transform) {
            t = t / train;
            t = ratio * t / (1 + (ratio - 1) * t) * train;
        }
        if (flow.monai) {
            t = to_half(t);
            t = flow.use_discrete_timesteps ? std::trunc(t) + offset : to_half(t + offset);
        } else if (flow.use_discrete_timesteps) {
            t = std::nearbyint(t);
        }
        times.push_back(t);
        shown.push_back(flow.monai ? t : t + offset);
    }
    std::vector<Row> rows;
    for (auto i = static_cast<std::size_t>(flow.start); i < times.size(); ++i) {
        double next = i + 1 < times.size() ? times[i + 1] : 0;
        if (flow.monai) next = std::trunc(next);  // step() takes int(next_timestep)
        Row row;
        row.t = shown[i];
        row.sigma = times[i] / train;
        row.signal = 1 - row.sigma;
        row.a = 1;
        row.d = (times[i] - next) / train;
        rows.push_back(row);
    }
    return finish("rflow", flow.train_timesteps, std::move(rows));
}

}  // namespace volcast
