#include "loop.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "check.hpp"
#include "noise.hpp"

namespace volcast {
namespace {

constexpr std::size_t kBlock = 256;

template <class T>
bool all_finite(const T* values, std::size_t size) {
    int bad = 0;
    for (std::size_t i = 0; i < size; ++i) bad |= !(std::fabs(values[i]) <= std::numeric_limits<T>::max());
    return bad == 0;
}

template <class T>
void add(double* sum, double weight, const T* values, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) sum[i] += weight * values[i];
}

// Values `first`..`first + size - 1` of the row's update, size <= kBlock: the pieces stay in the first cache, and
// each loop vectorises because the sums are local.
template <class T>
bool update(const Row& row, std::size_t step, Trajectory<T>& state, std::size_t first, std::size_t size, T* x,
            const T* out) {
    const auto slot = [&](int k) { return state.history.data() + static_cast<std::size_t>(k) * state.numel + first; };
    T* const saved = state.saved.data() + first;
    double next[kBlock], h[kBlock];
    const T* base = row.from_saved ? saved : x;
    for (std::size_t i = 0; i < size; ++i) next[i] = row.a * base[i];
    add(next, row.d, out, size);
    if (row.uses_h()) {
        for (std::size_t i = 0; i < size; ++i) {
            const double value = row.p * x[i] + row.q * out[i];
            const double raised = value < row.lo ? row.lo : value;  // keeps NaN, so that it is reported
            h[i] = raised > row.hi ? row.hi : raised;
        }
        add(next, row.e, h, size);
    }
    for (int k = 0; k < kReads; ++k) {
        if (row.read[k] >= 0) add(next, row.b[k], slot(row.read[k]), size);
    }
    const auto add_normal = [&](double* sum, double weight, std::uint32_t which) {
        if (weight == 0) return;
        double normal[kBlock];
        fill_normal({state.seed, state.sample, static_cast<std::uint32_t>(step + 1) | which}, first, size, normal);
        for (std::size_t i = 0; i < size; ++i) normal[i] = static_cast<T>(normal[i]);
        add(sum, weight, normal, size);
    };
    add_normal(next, row.c, 0);
    if (state.known.x0) {
        const T* const x0 = state.known.x0 + first;
        const T* const keep = state.known.keep + first;
        double known[kBlock];
        for (std::size_t i = 0; i < size; ++i) known[i] = row.known_signal * x0[i];
        add_normal(known, row.known_sigma, kKnownNoise);
        for (std::size_t i = 0; i < size; ++i) next[i] = keep[i] * known[i] + (1.0 - keep[i]) * next[i];
    }
    if (row.save) std::copy_n(x, size, saved);
    if (row.write >= 0) std::transform(h, h + size, slot(row.write), [](double value) { return static_cast<T>(value); });
    if (row.again_sigma != 0) {
        for (std::size_t i = 0; i < size; ++i) next[i] *= row.again;
        add_normal(next, row.again_sigma, kAgainNoise);
    }
    for (std::size_t i = 0; i < size; ++i) x[i] = static_cast<T>(next[i]);
    return all_finite(out, size) && all_finite(x, size);
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

template <class T>
Trajectory<T>::Trajectory(const Plan& plan, std::uint64_t seed, std::uint64_t sample, std::size_t numel,
                          Known<T> known)
    : seed(seed),
      sample(sample),
      numel(numel),
      history(static_cast<std::size_t>(plan.history_slots) * numel),
      saved(plan.keeps_saved ? numel : 0),
      known(known) {
    const bool given = known.x0 && known.keep;
    check(given == plan.inpaints, "loop", plan.method,
          given ? ": known and keep are for a plan of make_repaint" : ": the plan inpaints; give known and keep");
}

template <class T>
void advance(const Plan& plan, std::size_t step, Trajectory<T>& state, T* x, const T* out) {
    const Row& row = plan.rows.at(step);
    bool good = true;
    for (std::size_t first = 0; first < state.numel; first += kBlock) {
        const std::size_t size = std::min(kBlock, state.numel - first);
        good &= update(row, step, state, first, size, x + first, out + first);
    }
    check(good, "loop", "step ", step, " (t=", row.t, "), sample ", state.sample,
          ": the network's output or x is not finite; check the weights, the condition and the precision");
}

template <class T>
void guide(double w, const T* uncond, const T* cond, T* guided, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) {
        const double u = uncond[i], c = cond[i];
        guided[i] = static_cast<T>(u + w * (c - u));
    }
}

template <class T>
Timing run(const Plan& plan, const Batch<T>& batch, const std::optional<double>& guidance,
           const Network<T>& network, const std::function<void(std::size_t, std::size_t)>& after) {
    const auto start = Clock::now();
    const std::size_t size = batch.count * batch.numel;
    std::vector<Trajectory<T>> states;
    for (std::size_t n = 0; n < batch.count; ++n) {
        states.emplace_back(plan, batch.seeds[n], batch.samples[n], batch.numel, batch.known);
    }
    std::vector<T> guided(guidance ? size : 0);
    double network_s = 0;
    const auto call = [&](std::size_t step, const T* x, Branch branch) {
        const auto before = Clock::now();
        const T* out = network(step, x, branch);
        network_s += seconds_since(before);
        return out;
    };
    const auto mix = [&](const T* uncond, const T* cond) { guide(*guidance, uncond, cond, guided.data(), size); };
    for (std::size_t step = 0; step < plan.rows.size(); ++step) {
        const T* out = nullptr;
        if (!guidance) {
            out = call(step, batch.x, Branch::conditional);
        } else if (batch.twice) {
            std::copy_n(batch.x, size, batch.twice);
            std::copy_n(batch.x, size, batch.twice + size);
            const T* both = call(step, batch.twice, Branch::both);
            mix(both, both + size);
            out = guided.data();
        } else {
            // The second call may reuse the memory of the first one's result.
            std::copy_n(call(step, batch.x, Branch::unconditional), size, guided.data());
            mix(guided.data(), call(step, batch.x, Branch::conditional));
            out = guided.data();
        }
        for (std::size_t n = 0; n < batch.count; ++n) {
            advance(plan, step, states[n], batch.x + n * batch.numel, out + n * batch.numel);
        }
        after(step + 1, plan.rows.size());
    }
    return {seconds_since(start), network_s};
}

#define VOLCAST_INSTANTIATE(T)                                                            \
    template struct Trajectory<T>;                                                        \
    template void advance(const Plan&, std::size_t, Trajectory<T>&, T*, const T*);        \
    template void guide(double, const T*, const T*, T*, std::size_t);                     \
    template Timing run(const Plan&, const Batch<T>&, const std::optional<double>&,     \
                        const Network<T>&, const std::function<void(std::size_t, std::size_t)>&);
VOLCAST_INSTANTIATE(float)
VOLCAST_INSTANTIATE(double)

}  // namespace volcast
