#include "schedule.hpp"

#include <algorithm>
#include <cmath>

#include "check.hpp"

namespace volcast {
namespace {

constexpr double kPi = 3.14159265358979323846;

double lerp(double first, double last, std::int64_t i, std::int64_t count) {
    if (count == 1) return first;
    return first + (last - first) * static_cast<double>(i) / static_cast<double>(count - 1);
}

void check_range(std::int64_t timesteps, double beta_start, double beta_end) {
    check(timesteps >= 1, "schedule", "timesteps=", timesteps, ": need at least 1");
    check(beta_start > 0 && beta_start < 1, "schedule", "beta_start=", beta_start, ": need a number inside (0, 1)");
    check(beta_end > 0 && beta_end < 1, "schedule", "beta_end=", beta_end, ": need a number inside (0, 1)");
}

template <class Beta>
Schedule from_betas(std::int64_t timesteps, Beta beta) {
    Schedule schedule;
    double product = 1;
    for (std::int64_t i = 0; i < timesteps; ++i) {
        schedule.betas.push_back(beta(i));
        product *= 1 - schedule.betas.back();
        schedule.alphas_cumprod.push_back(product);
    }
    return schedule;
}

void check_steps(std::int64_t train, std::int64_t steps) {
    check(steps >= 1 && steps <= train, "timesteps", "steps=", steps, ": need 1..", train);
}

}  // namespace

Schedule linear_beta(std::int64_t timesteps, double beta_start, double beta_end) {
    check_range(timesteps, beta_start, beta_end);
    return from_betas(timesteps, [=](std::int64_t i) { return lerp(beta_start, beta_end, i, timesteps); });
}

Schedule scaled_linear_beta(std::int64_t timesteps, double beta_start, double beta_end) {
    check_range(timesteps, beta_start, beta_end);
    return from_betas(timesteps, [=](std::int64_t i) {
        const double root = lerp(std::sqrt(beta_start), std::sqrt(beta_end), i, timesteps);
        return root * root;
    });
}

Schedule sigmoid_beta(std::int64_t timesteps, double beta_start, double beta_end, double sig_range) {
    check_range(timesteps, beta_start, beta_end);
    check(sig_range > 0 && std::isfinite(sig_range), "schedule", "sig_range=", sig_range, ": need a positive number");
    return from_betas(timesteps, [=](std::int64_t i) {
        return (beta_end - beta_start) / (1 + std::exp(-lerp(-sig_range, sig_range, i, timesteps))) + beta_start;
    });
}

Schedule cosine(std::int64_t timesteps, double s) {
    check(timesteps >= 1, "schedule", "timesteps=", timesteps, ": need at least 1");
    check(s >= 0 && s <= 1, "schedule", "s=", s, ": need 0..1");
    const auto level = [=](std::int64_t i) {
        const double wave = std::cos((static_cast<double>(i) / static_cast<double>(timesteps) + s) / (1 + s) * kPi / 2);
        return wave * wave;
    };
    return from_betas(timesteps, [=](std::int64_t i) { return std::clamp(1 - level(i + 1) / level(i), 0.0, 0.999); });
}

std::vector<std::int64_t> spaced_timesteps(Spacing spacing, std::int64_t train, std::int64_t steps,
                                           std::int64_t steps_offset) {
    check_steps(train, steps);
    std::vector<std::int64_t> timesteps;
    // The order of operations below is numpy's linspace and arange: ties must round as they do there.
    for (std::int64_t i = 0; i < steps; ++i) {
        const auto from_end = static_cast<double>(steps - 1 - i);
        double t = 0;
        if (spacing == Spacing::leading) {
            t = static_cast<double>((steps - 1 - i) * (train / steps) + steps_offset);
        } else if (spacing == Spacing::linspace) {
            const double gap = steps == 1 ? 0 : static_cast<double>(train - 1) / static_cast<double>(steps - 1);
            t = i == 0 ? static_cast<double>(train - 1) : from_end * gap;
        } else {
            const auto top = static_cast<double>(train);
            const double gap = (top - top / static_cast<double>(steps)) - top;
            t = std::nearbyint(top + static_cast<double>(i) * gap) - 1;
        }
        timesteps.push_back(static_cast<std::int64_t>(std::nearbyint(t)));
    }
    check(steps_offset >= 0 && timesteps.front() < train, "timesteps", "steps_offset=", steps_offset, " with steps=",
          steps, ": the first timestep is ", timesteps.front(), ", need 0..", train - 1);
    return timesteps;
}

std::vector<std::int64_t> monai_linspace(std::int64_t train, std::int64_t steps, std::int64_t steps_offset) {
    check_steps(train, steps);
    check(steps_offset >= 0 && steps_offset < train, "timesteps", "steps_offset=", steps_offset, ": need 0..",
          train - 1);
    std::vector<std::int64_t> timesteps;
    const auto first = static_cast<float>(train - 1 - steps_offset);
    const float gap = steps == 1 ? 0.0F : (0.0F - first) / static_cast<float>(steps - 1);
    for (std::int64_t i = 0; i < steps; ++i) {
        // torch.linspace counts from the nearer end.
        const float t = i < steps / 2 || steps == 1 ? first + gap * static_cast<float>(i)
                                                    : -gap * static_cast<float>(steps - 1 - i);
        timesteps.push_back(static_cast<std::int64_t>(std::nearbyint(t)) + steps_offset);
    }
    return timesteps;
}

}  // namespace volcast
