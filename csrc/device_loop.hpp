#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "device.hpp"

namespace volcast {

// Shows the state every `every` steps beside the loop: `snapshot` copies it aside on the loop's stream, `preview`
// works on the copy on a stream of its own. A preview that comes due while another runs is skipped.
struct Previews {
    const Executable& snapshot;
    const Executable& preview;
    const Stream& stream;
    int every;
    std::function<void(int step)> done;
};

struct LoopTiming {
    double total_s, launch_s;  // launch_s: within the driver's launches and records
    std::int64_t launches;     // of executables, those of previews included
};

// Launches `step` `steps` times, with at most `ahead` launches not known to be finished. `after(done, steps)` follows
// each finished step. What it, a preview's `done` or a launch throws ends the launching; it is rethrown once all that
// was launched has finished, so that both streams are idle.
LoopTiming run_steps(const Executable& step, const Stream& stream, int steps, int ahead,
                     const std::function<void(int, int)>& after, const std::optional<Previews>& previews);

}  // namespace volcast
