#include <algorithm>
#include <cmath>
#include <sstream>

#include "check.hpp"
#include "plan_parts.hpp"

namespace volcast {

Fold fold(Prediction prediction, double alpha_bar) {
    const double signal = std::sqrt(alpha_bar), sigma = std::sqrt(1 - alpha_bar);
    switch (prediction) {
        case Prediction::epsilon:
            return {1 / signal, -sigma / signal, 0, 1};
        case Prediction::sample:
            return {0, 1, 1 / sigma, -signal / sigma};
        case Prediction::v_prediction:
            return {signal, -sigma, sigma, signal};
    }
    fail("plan", "unknown prediction type");
}

double alpha_bar(const Schedule& schedule, std::int64_t t, bool set_alpha_to_one) {
    if (t >= 0) return schedule.alphas_cumprod.at(static_cast<std::size_t>(t));
    return set_alpha_to_one ? 1 : schedule.alphas_cumprod.front();
}

Row row_at(std::int64_t t, double alpha_bar) {
    Row row;
    row.t = static_cast<double>(t);
    row.signal = std::sqrt(alpha_bar);
    row.sigma = std::sqrt(1 - alpha_bar);
    return row;
}

void combine(Row& row, const Fold& fold, const Clip& clip, double to_x0, double to_eps, double to_x) {
    row.a = to_x + to_eps * fold.eps_x;
    row.d = to_eps * fold.eps_out;
    if (clip) {
        row.p = fold.x0_x;
        row.q = fold.x0_out;
        row.lo = clip->first;
        row.hi = clip->second;
        row.e = to_x0;
    } else {
        row.a += to_x0 * fold.x0_x;
        row.d += to_x0 * fold.x0_out;
    }
}

void check_start(const char* op, std::int64_t start, std::int64_t steps) {
    check(start >= 0 && start < steps, op, "start=", start, ": need 0..", steps - 1, " with steps=", steps);
}

void check_clip(const char* op, const Clip& clip) {
    check(!clip || clip->first < clip->second, op, "clip: need low < high");
}

Plan finish(const char* method, std::int64_t train_timesteps, std::vector<Row> rows) {
    Plan plan{method, train_timesteps, 0, false, false, std::move(rows)};
    for (const Row& row : plan.rows) {
        bool finite = true;
        for (double value : {row.t, row.a, row.d, row.p, row.q, row.e, row.b[0], row.b[1], row.b[2], row.c,
                             row.known_signal, row.known_sigma, row.again, row.again_sigma}) {
            finite = finite && std::isfinite(value);
        }
        check(finite, method, "the coefficients at timestep ", row.t,
              " are not finite: alpha_bar there is 0 or 1; change the noise schedule, prediction or spacing");
        plan.history_slots = std::max(plan.history_slots, row.write + 1);
        plan.keeps_saved = plan.keeps_saved || row.save;
        plan.stochastic = plan.stochastic || row.c != 0 || row.known_sigma != 0 || row.again_sigma != 0;
    }
    return plan;
}

std::string describe(const Row& row) {
    std::ostringstream text;
    text << "t=" << row.t << ": x <- " << row.a << (row.from_saved ? "*saved" : "*x");
    const auto term = [&](double weight, const std::string& name) {
        if (weight != 0) text << (weight < 0 ? " - " : " + ") << std::fabs(weight) << '*' << name;
    };
    term(row.d, "out");
    term(row.e, "h");
    for (int k = 0; k < kReads; ++k) term(row.b[k], "history[" + std::to_string(row.read[k]) + "]");
    term(row.c, "normal");
    if (row.uses_h()) {
        text << "; h = " << row.p << "*x + " << row.q << "*out";
        if (std::isfinite(row.lo)) text << " in [" << row.lo << ", " << row.hi << ']';
    }
    if (row.write >= 0) text << "; history[" << row.write << "] = h";
    if (row.save) text << "; saved = x";
    if (row.known_signal != 0) {
        text << "; x <- keep*(" << row.known_signal << "*known + " << row.known_sigma << "*normal') + (1 - keep)*x";
    }
    if (row.again_sigma != 0) text << "; x <- " << row.again << "*x + " << row.again_sigma << "*normal''";
    return text.str();
}

}  // namespace volcast
