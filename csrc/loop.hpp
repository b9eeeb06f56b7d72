#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "plan.hpp"

namespace volcast {

// Of an image that is inpainted, [numel] each: its latent, and 1 where it stays, 0 where it is painted anew.
template <class T>
struct Known {
    const T* x0 = nullptr;
    const T* keep = nullptr;
};

// What one sample remembers between rows. Belongs to the request, never to the plan.
template <class T>
struct Trajectory {
    std::uint64_t seed, sample;
    std::size_t numel;
    std::vector<T> history;  // [slots, numel]
    std::vector<T> saved;    // [numel], or empty
    Known<T> known;          // not owned

    // Throws where the plan inpaints and nothing is known, or the other way round.
    Trajectory(const Plan& plan, std::uint64_t seed, std::uint64_t sample, std::size_t numel, Known<T> known = {});
};

// Applies row `step` of the plan to one sample x [numel], given the network's output [numel]. Reads and writes
// nothing else, so the bits do not depend on what else is in the batch. Throws on a non-finite value.
template <class T>
void advance(const Plan& plan, std::size_t step, Trajectory<T>& state, T* x, const T* out);

// Classifier-free guidance, arXiv:2207.12598: u + w * (c - u), value by value.
template <class T>
void guide(double w, const T* uncond, const T* cond, T* guided, std::size_t size);

enum class Branch { conditional, unconditional, both };

template <class T>
struct Batch {
    std::size_t count, numel;
    T* x;  // [count, numel], updated in place
    const std::uint64_t* seeds;
    const std::uint64_t* samples;
    T* twice;  // [2 * count, numel] scratch: guidance by one call on [uncond; cond]; null: by two calls
    Known<T> known = {};  // of every sample, where the plan inpaints
};

struct Timing {
    double total_s, network_s;
};

// Returns the output for x [count, numel] (for Branch::both: x and output are [2 * count, numel]).
// The memory need only live until the next call.
template <class T>
using Network = std::function<const T*(std::size_t step, const T* x, Branch branch)>;

// The one loop. `guidance` is `guide`'s w. `after(done, total)` is called
// after each row. What it or the network throws stops the loop and leaves x after the last whole row; a non-finite
// value stops it too, with x unspecified.
template <class T>
Timing run(const Plan& plan, const Batch<T>& batch, const std::optional<double>& guidance,
           const Network<T>& network, const std::function<void(std::size_t, std::size_t)>& after);

}  // namespace volcast
