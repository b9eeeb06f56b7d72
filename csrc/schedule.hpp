#pragma once

#include <cstdint>
#include <vector>

namespace volcast {

// The noise schedule of training, float64: x_t = sqrt(alpha_bar[t]) x0 + sqrt(1 - alpha_bar[t]) noise.
struct Schedule {
    std::vector<double> betas;
    std::vector<double> alphas_cumprod;

    std::int64_t size() const { return static_cast<std::int64_t>(betas.size()); }
};

// MONAI's NoiseSchedules of the same names; MONAI computes them in float32.
Schedule linear_beta(std::int64_t timesteps, double beta_start, double beta_end);
Schedule scaled_linear_beta(std::int64_t timesteps, double beta_start, double beta_end);
Schedule sigmoid_beta(std::int64_t timesteps, double beta_start, double beta_end, double sig_range);
Schedule cosine(std::int64_t timesteps, double s);  // arXiv:2102.09672 Eq. 17

// arXiv:2305.08891 table 2.
enum class Spacing { leading, linspace, trailing };

// `steps` timesteps in descending order. As in diffusers, `steps_offset` moves the leading spacing only.
std::vector<std::int64_t> spaced_timesteps(Spacing spacing, std::int64_t train, std::int64_t steps,
                                           std::int64_t steps_offset);

// MONAI 1.6.1's grid for DDIM and DDPM: round(linspace(T-1-offset, 0, steps)) + offset, in float32. Equal for every
// `steps` at T = 1000; for other T torch's vector code may round a near tie the other way.
std::vector<std::int64_t> monai_linspace(std::int64_t train, std::int64_t steps, std::int64_t steps_offset);

}  // namespace volcast
