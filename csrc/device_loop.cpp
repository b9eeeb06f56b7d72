#include "device_loop.hpp"

#include <algorithm>
#include <chrono>
#include <deque>
#include <utility>

#include "check.hpp"

namespace volcast {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

class Loop final {
public:
    Loop(const Executable& step, const Stream& stream, int steps, int ahead,
         const std::function<void(int, int)>& after, const std::optional<Previews>& previews)
        : step_(step), stream_(stream), steps_(steps), after_(after), previews_(previews), copied_(stream.share()),
          shown_(stream.share()) {
        for (int i = 0; i < std::min(ahead, steps); ++i) finished_.emplace_back(stream.share());
    }

    LoopTiming run() {
        const Clock::time_point start = Clock::now();
        const int ahead = static_cast<int>(finished_.size());
        for (int launched = 0, done = 0; done < steps_;) {
            if (launched < steps_ && launched - done < ahead) {
                launch(step_, stream_, slot(launched));
                start_preview(++launched);
            } else {
                slot(done).synchronize();
                after_(++done, steps_);
                if (under_way_ && shown_.done()) finish_preview();
            }
        }
        if (under_way_) {
            shown_.synchronize();
            finish_preview();
        }
        return {seconds_since(start), launch_s_, launches_};
    }

    // Waits for all that was launched. Its errors follow from the one that ended the loop, which is the one to show.
    void settle() const noexcept {
        settle(stream_);
        if (previews_) settle(previews_->stream);
    }

private:
    static void settle(const Stream& stream) noexcept {
        try {
            stream.synchronize();
        } catch (...) {
        }
    }

    Event& slot(int step) { return finished_[static_cast<std::size_t>(step) % finished_.size()]; }

    void launch(const Executable& executable, const Stream& stream, const Event& end) {
        const Clock::time_point start = Clock::now();
        executable.launch(stream);
        stream.record(end);
        launch_s_ += seconds_since(start);
        ++launches_;
    }

    void start_preview(int step) {
        if (!previews_ || step % previews_->every != 0) return;
        if (under_way_ && shown_.done()) finish_preview();
        if (under_way_) return;  // the copy is in use
        launch(previews_->snapshot, stream_, copied_);
        previews_->stream.wait(copied_);
        launch(previews_->preview, previews_->stream, shown_);
        under_way_ = step;
    }

    void finish_preview() { previews_->done(std::exchange(under_way_, 0)); }

    const Executable& step_;
    const Stream& stream_;
    const int steps_;
    const std::function<void(int, int)>& after_;
    const std::optional<Previews>& previews_;
    std::deque<Event> finished_;  // a ring: the end of step i is in i % size
    Event copied_, shown_;
    int under_way_ = 0;  // the step of the preview under way; 0: none
    double launch_s_ = 0;
    std::int64_t launches_ = 0;
};

}  // namespace

LoopTiming run_steps(const Executable& step, const Stream& stream, int steps, int ahead,
                     const std::function<void(int, int)>& after, const std::optional<Previews>& previews) {
    check(steps >= 1, "run_steps", "steps=", steps, ": need at least 1");
    check(ahead >= 1, "run_steps", "ahead=", ahead, ": need at least 1; 2 hides the launches");
    if (previews) {
        check(previews->every >= 1, "run_steps", "every=", previews->every, ": need at least 1, or 0 for no previews");
        check(previews->stream.handle() != stream.handle(), "run_steps",
              "preview_stream is stream: previews would hold the steps up; make a second Stream");
    }
    Loop loop(step, stream, steps, ahead, after, previews);
    try {
        return loop.run();
    } catch (...) {
        loop.settle();
        throw;
    }
}

}  // namespace volcast
