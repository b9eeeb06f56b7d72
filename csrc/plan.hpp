#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "schedule.hpp"

namespace volcast {

constexpr int kReads = 3;

// One network call and the update after it, in this order, for every element:
//   h    = clip(p * x + q * out, lo, hi)
//   next = a * (from_saved ? saved : x) + d * out + e * h + sum_k b[k] * history[read[k]] + c * normal
//   next = keep * (known_signal * known + known_sigma * normal') + (1 - keep) * next        (only if plan.inpaints)
//   if (save) saved = x;  if (write >= 0) history[write] = h;  x = again * next + again_sigma * normal''
// A slot may be read and written by the same row; unused slots are -1 with b = 0. The normals are those of noise.hpp's
// streams of the row.
struct Row {
    double t = 0;                  // the timestep that the network is shown
    double signal = 1, sigma = 0;  // the row's input is signal * x0 + sigma * noise
    double a = 0, d = 0;
    double p = 0, q = 0;
    double lo = -std::numeric_limits<double>::infinity(), hi = std::numeric_limits<double>::infinity();
    double e = 0;
    double b[kReads] = {0, 0, 0};
    double c = 0;
    std::int32_t read[kReads] = {-1, -1, -1};
    std::int32_t write = -1;
    bool from_saved = false, save = false;
    double known_signal = 0, known_sigma = 0;  // the noise level of `next`
    double again = 1, again_sigma = 0;         // noised once more, to the level at which the next row begins

    bool uses_h() const { return e != 0 || write >= 0; }
};

std::string describe(const Row& row);

// What to do at each step; immutable once made, so requests and threads may share it.
struct Plan {
    std::string method;
    std::int64_t train_timesteps = 0;
    std::int32_t history_slots = 0;
    bool keeps_saved = false, stochastic = false;
    std::vector<Row> rows;
    bool inpaints = false;  // needs `known` and `keep`
};

enum class Prediction { epsilon, sample, v_prediction };
enum class Variance { fixed_small, fixed_large };
using Clip = std::optional<std::pair<double, double>>;  // range of the predicted x0

// What every method over a Schedule is asked. `start` skips that many steps at the noisy end (image to image).
// With `monai`, the timesteps and transitions are MONAI 1.6.1's, faults included, and `spacing` is not read.
struct Steps {
    std::int64_t steps = 50;
    Spacing spacing = Spacing::linspace;
    std::int64_t steps_offset = 0;
    std::int64_t start = 0;
    bool set_alpha_to_one = true;
    bool monai = false;
};

// arXiv:2010.02502 Eq. 12 and 16; eps is not recomputed from the clipped x0. `reverse`: the same transitions
// backwards (inversion), the network shown the noisier timestep.
Plan make_ddim(const Schedule& schedule, const Steps& steps, Prediction prediction, const Clip& clip, double eta,
               bool reverse);

// arXiv:2006.11239 Eq. 6 and 7 with beta of the transition, so fewer steps than trained are right.
Plan make_ddpm(const Schedule& schedule, const Steps& steps, Prediction prediction, const Clip& clip,
               Variance variance);

// arXiv:2202.09778 (F-PNDM): three Runge-Kutta steps of four calls, or with `skip_prk_steps` one Heun-like step of
// two calls, then linear multistep.
Plan make_pndm(const Schedule& schedule, const Steps& steps, Prediction prediction, bool skip_prk_steps);

// arXiv:2211.01095 algorithm 2 (2M, midpoint); the first and last steps are first order; ends at sigma 0.
Plan make_dpm_solver(const Schedule& schedule, const Steps& steps, Prediction prediction, const Clip& clip);

// RePaint, arXiv:2201.09865: a DDIM, DDPM or rectified-flow plan with the known part merged in after every row, and
// with its jumps (the paper's schedule, appendix B.2): each stretch of `jump_length` rows is run `resamples` times, x
// being noised back to the stretch's beginning in between, by the transition's own variance. Not after the last row.
Plan make_repaint(const Plan& plan, std::int64_t resamples, std::int64_t jump_length);

// MONAI's RFlow: x_t = (1 - t/T) x0 + (t/T) noise, the network predicts x0 - noise; Euler steps.
struct Flow {
    std::int64_t train_timesteps = 1000;
    std::int64_t steps = 30;
    std::int64_t steps_offset = 0;
    std::int64_t start = 0;
    bool use_discrete_timesteps = true;
    bool use_timestep_transform = false;
    std::int64_t input_img_size_numel = 32 * 32 * 32;
    std::int64_t base_img_size_numel = 32 * 32 * 32;
    std::int64_t spatial_dim = 3;
    bool monai = false;
};
Plan make_rflow(const Flow& flow);

}  // namespace volcast
