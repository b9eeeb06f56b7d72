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
bool finite(T value) {
    return std::fabs(value) <= std::numeric_limits<T>::max();
}

// One pass over a block. The template arguments keep branches out of the loop, so that it vectorises.
template <class T, int Reads, bool UsesH, bool Noisy>
bool update(const Row& row, std::size_t size, T* x, const T* base, const T* out, T* const* reads, T* write, T* saved,
            const double* normal) {
    const double a = row.a, d = row.d, e = row.e, p = row.p, q = row.q, lo = row.lo, hi = row.hi, c = row.c;
    bool bad = false;
    for (std::size_t i = 0; i < size; ++i) {
        const double now = x[i], output = out[i];
        double next = a * base[i] + d * output;
        if constexpr (UsesH) {
            double h = p * now + q * output;
            h = h < lo ? lo : h;
            h = h > hi ? hi : h;
            next += e * h;
            for (int k = 0; k < Reads; ++k) next += row.b[k] * reads[k][i];
            if (write) write[i] = static_cast<T>(h);
        } else {
            for (int k = 0; k < Reads; ++k) next += row.b[k] * reads[k][i];
        }
        if constexpr (Noisy) next += c * normal[i];
        if (saved) saved[i] = x[i];
        const T rounded = static_cast<T>(next);
        bad |= !finite(out[i]) | !finite(rounded);
        x[i] = rounded;
    }
    return !bad;
}

template <class T, int Reads>
bool update_any(const Row& row, std::size_t size, T* x, const T* base, const T* out, T* const* reads, T* write,
                T* saved, const double* normal) {
    const auto pick = row.uses_h() ? (normal ? update<T, Reads, true, true> : update<T, Reads, true, false>)
                                   : (normal ? update<T, Reads, false, true> : update<T, Reads, false, false>);
    return pick(row, size, x, base, out, reads, write, saved, normal);
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

template <class T>
Trajectory<T>::Trajectory(const Plan& plan, std::uint64_t seed, std::uint64_t sample, std::size_t numel)
    : seed(seed),
      sample(sample),
      numel(numel),
      history(static_cast<std::size_t>(plan.history_slots) * numel),
      saved(plan.keeps_saved ? numel : 0) {}

template <class T>
void advance(const Plan& plan, std::size_t step, Trajectory<T>& state, T* x, const T* out) {
    const Row& row = plan.rows.at(step);
    const int reads = static_cast<int>(std::count_if(row.read, row.read + kReads, [](int slot) { return slot >= 0; }));
    constexpr decltype(&update_any<T, 0>) by_reads[] = {update_any<T, 0>, update_any<T, 1>, update_any<T, 2>,
                                                        update_any<T, 3>};
    const auto slot = [&](int k, std::size_t first) { return state.history.data() + k * state.numel + first; };
    double normal[kBlock];
    bool good = true;
    for (std::size_t first = 0; first < state.numel; first += kBlock) {
        const std::size_t size = std::min(kBlock, state.numel - first);
        T* read[kReads] = {};
        for (int k = 0; k < reads; ++k) read[k] = slot(row.read[k], first);
        if (row.c != 0) {
            fill_normal({state.seed, state.sample, static_cast<std::uint32_t>(step + 1)}, first, size, normal);
            for (std::size_t i = 0; i < size; ++i) normal[i] = static_cast<T>(normal[i]);
        }
        good &= by_reads[reads](row, size, x + first, row.from_saved ? state.saved.data() + first : x + first,
                                out + first, read, row.write >= 0 ? slot(row.write, first) : nullptr,
                                row.save ? state.saved.data() + first : nullptr, row.c != 0 ? normal : nullptr);
    }
    check(good, "loop", "step ", step, " (t=", row.t, "), sample ", state.sample,
          ": the network's output or x is not finite; check the weights, the condition and the precision");
}

template <class T>
Timing run(const Plan& plan, const Batch<T>& batch, const std::optional<double>& guidance,
           const Network<T>& network, const std::function<void(std::size_t, std::size_t)>& after) {
    const auto start = Clock::now();
    const std::size_t size = batch.count * batch.numel;
    std::vector<Trajectory<T>> states;
    for (std::size_t n = 0; n < batch.count; ++n) {
        states.emplace_back(plan, batch.seeds[n], batch.samples[n], batch.numel);
    }
    std::vector<T> guided(guidance ? size : 0);
    double network_s = 0;
    const auto call = [&](std::size_t step, const T* x, Branch branch) {
        const auto before = Clock::now();
        const T* out = network(step, x, branch);
        network_s += seconds_since(before);
        return out;
    };
    const auto mix = [&](const T* uncond, const T* cond) {
        for (std::size_t i = 0; i < size; ++i) {
            const double u = uncond[i], c = cond[i];
            guided[i] = static_cast<T>(u + *guidance * (c - u));
        }
    };
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
    template Timing run(const Plan&, const Batch<T>&, const std::optional<double>&,     \
                        const Network<T>&, const std::function<void(std::size_t, std::size_t)>&);
VOLCAST_INSTANTIATE(float)
VOLCAST_INSTANTIATE(double)

}  // namespace volcast
