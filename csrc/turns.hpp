#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace volcast {

using Clock = std::chrono::steady_clock;

// What the order of turns depends on: one sample that waits for its next step.
struct Waiting {
    double pass = 0;             // virtual time: grows with every step taken, slower for those who should go first
    std::size_t remaining = 0;   // steps
    int priority = 0;            // each level doubles the share
    std::optional<Clock::time_point> deadline;
    std::uint64_t arrival = 0;
};

// Stride scheduling (Waldspurger and Weihl, 1995) with strides of remaining steps over 2^priority: a sample's share of
// the network is inverse to what it still needs, so short requests pass long ones and none starves.
double stride(const Waiting& waiting);

// Whether a deadline is so near that the sample has to go before all others: less than twice the time it needs alone.
bool is_urgent(const Waiting& waiting, Clock::time_point now, double step_s);

// Whether even all turns from now on could not meet the deadline.
bool is_hopeless(const Waiting& waiting, Clock::time_point now, double step_s);

// Indices in the order of turns: the urgent by deadline, then by pass, then by arrival.
std::vector<std::size_t> order_turns(const std::vector<Waiting>& waiting, Clock::time_point now, double step_s);

}  // namespace volcast
