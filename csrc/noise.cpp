#include "noise.hpp"

#include <algorithm>
#include <cmath>

#include "check.hpp"

namespace volcast {
namespace {

constexpr double kTwoPi = 6.28318530717958647692;

double uniform(std::uint32_t bits) { return (static_cast<double>(bits) + 0.5) * 0x1p-32; }

void box_muller(std::uint32_t r0, std::uint32_t r1, double* out) {
    const double radius = std::sqrt(-2 * std::log(uniform(r0)));
    const double angle = kTwoPi * uniform(r1);
    out[0] = radius * std::cos(angle);
    out[1] = radius * std::sin(angle);
}

}  // namespace

std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
                   static_cast<std::uint32_t>(product1),
                   static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
                   static_cast<std::uint32_t>(product0)};
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return counter;
}

void fill_normal(const Stream& stream, std::size_t first, std::size_t count, double* out) {
    check(first % 4 == 0, "normal", "first=", first, ": need a multiple of 4");
    check((first + count + 3) / 4 <= (std::uint64_t{1} << 32), "normal", "a sample of ", first + count,
          " values: need at most 2^34");
    const std::array<std::uint32_t, 2> key{static_cast<std::uint32_t>(stream.seed),
                                           static_cast<std::uint32_t>(stream.seed >> 32)};
    for (std::size_t done = 0; done < count; done += 4) {
        const auto bits = philox({static_cast<std::uint32_t>((first + done) / 4), stream.step,
                                  static_cast<std::uint32_t>(stream.sample),
                                  static_cast<std::uint32_t>(stream.sample >> 32)},
                                 key);
        double four[4];
        box_muller(bits[0], bits[1], four);
        box_muller(bits[2], bits[3], four + 2);
        std::copy_n(four, std::min<std::size_t>(4, count - done), out + done);
    }
}

template <class T>
void fill_normal_as(const Stream& stream, std::size_t count, T* out) {
    double block[256];
    for (std::size_t first = 0; first < count; first += 256) {
        const std::size_t size = std::min<std::size_t>(256, count - first);
        fill_normal(stream, first, size, block);
        for (std::size_t i = 0; i < size; ++i) out[first + i] = static_cast<T>(block[i]);
    }
}

template void fill_normal_as<float>(const Stream&, std::size_t, float*);
template void fill_normal_as<double>(const Stream&, std::size_t, double*);

}  // namespace volcast
