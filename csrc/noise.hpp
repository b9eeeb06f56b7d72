#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace volcast {

// Philox 4x32-10 (Salmon et al., SC'11; Random123's philox4x32).
std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

// Which stream of normals: the same three numbers give the same values on every device and in every batch.
struct Stream {
    std::uint64_t seed;
    std::uint64_t sample;
    std::uint32_t step;  // 0: the initial noise; i + 1: the noise of row i, or with one of these bits its other noises
};
constexpr std::uint32_t kKnownNoise = 1u << 31, kAgainNoise = 1u << 30;

// Standard normals number `first`..`first + count - 1` of the stream, in double; `first` is a multiple of 4.
// Counter = (index / 4, step, sample low, sample high), key = seed; Box-Muller on (r + 1/2) / 2^32.
void fill_normal(const Stream& stream, std::size_t first, std::size_t count, double* out);

// The same, rounded to T.
template <class T>
void fill_normal_as(const Stream& stream, std::size_t count, T* out);

}  // namespace volcast
