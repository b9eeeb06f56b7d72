#include "turns.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

namespace volcast {
namespace {

double seconds_left(const Waiting& waiting, Clock::time_point now) {
    return std::chrono::duration<double>(*waiting.deadline - now).count();
}

double needed(const Waiting& waiting, double step_s) { return static_cast<double>(waiting.remaining) * step_s; }

}  // namespace

double stride(const Waiting& waiting) {
    return std::ldexp(static_cast<double>(waiting.remaining), -waiting.priority);
}

bool is_urgent(const Waiting& waiting, Clock::time_point now, double step_s) {
    return waiting.deadline && seconds_left(waiting, now) < 2 * needed(waiting, step_s);
}

bool is_hopeless(const Waiting& waiting, Clock::time_point now, double step_s) {
    return waiting.deadline && seconds_left(waiting, now) < needed(waiting, step_s);
}

std::vector<std::size_t> order_turns(const std::vector<Waiting>& waiting, Clock::time_point now, double step_s) {
    std::vector<std::size_t> order(waiting.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto key = [&](std::size_t i) {
        const Waiting& one = waiting[i];
        const bool urgent = is_urgent(one, now, step_s);
        const auto deadline = urgent ? *one.deadline : Clock::time_point::max();
        return std::make_tuple(!urgent, deadline, one.pass, one.arrival);
    };
    std::sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return key(i) < key(j); });
    return order;
}

}  // namespace volcast
