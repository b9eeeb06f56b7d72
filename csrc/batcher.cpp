#include "batcher.hpp"

#include <algorithm>
#include <cstring>

#include "check.hpp"

namespace volcast {
namespace {

double seconds_between(Clock::time_point start, Clock::time_point stop) {
    return std::chrono::duration<double>(stop - start).count();
}

bool is_end(Happened happened) { return happened != Happened::progress && happened != Happened::preview; }

}  // namespace

struct Batcher::Sample {
    std::uint64_t id;
    Submission asked;
    Trajectory<float> state;
    Waiting turn;
    std::size_t step = 0;
    std::vector<float> unconditional, conditional;  // the step's outputs so far; empty: not called yet
    bool cancelled = false;
    bool alone = false;  // a call that it shared failed: let the others go on without it

    Sample(std::uint64_t id, Submission submission, std::size_t numel)
        : id(id),
          asked(std::move(submission)),
          state(*asked.plan, asked.seed, asked.sample, numel,
                asked.known.empty() ? Known<float>{} : Known<float>{asked.known.data(), asked.keep.data()}) {
        turn.remaining = steps();
        turn.priority = asked.priority;
        turn.arrival = id;
        if (asked.deadline_s) {
            const auto whole = std::chrono::duration<double>(*asked.deadline_s);
            turn.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(whole);
        }
    }

    std::size_t steps() const { return asked.plan->rows.size(); }
    std::size_t branches() const { return asked.guidance ? 2 : 1; }

    std::vector<Branch> wanted() const {
        std::vector<Branch> found;
        if (asked.guidance && unconditional.empty()) found.push_back(Branch::unconditional);
        if (conditional.empty()) found.push_back(Branch::conditional);
        return found;
    }
};

Batcher::Batcher(const BatcherLimits& limits) : limits_(limits) {
    check(limits.active >= 1 && limits.active <= 4096, "batcher", "active=", limits.active, ": need 1..4096");
    check(limits.queue <= 1000000, "batcher", "queue=", limits.queue, ": need 0..1000000");
}

Batcher::~Batcher() = default;

std::size_t Batcher::add_group(Group group) {
    check(!group.lanes.empty() && group.lanes.front().count == 1, "batcher", "lanes: need one of count 1, first");
    for (std::size_t i = 1; i < group.lanes.size(); ++i) {
        check(group.lanes[i - 1].count < group.lanes[i].count, "batcher", "lanes: need ascending counts");
    }
    const std::lock_guard lock(mutex_);
    groups_.push_back(std::move(group));
    return groups_.size() - 1;
}

std::uint64_t Batcher::submit(Submission submission) {
    std::unique_lock lock(mutex_);
    check(submission.group < groups_.size(), "batcher", "group=", submission.group, ": no such group");
    const Group& group = groups_[submission.group];
    const std::size_t steps = submission.plan->rows.size(), inputs = group.input_bytes.size();
    check(submission.x.size() == group.numel, "batcher", "x has ", submission.x.size(), " values: need ", group.numel);
    const bool fits = submission.known.empty() || submission.known.size() == group.numel;
    check(fits && submission.keep.size() == submission.known.size(), "batcher", "known has ", submission.known.size(),
          " values and keep ", submission.keep.size(), ": need ", group.numel, " each, or none");
    check(submission.rows->size() == steps * group.row, "batcher", "rows has ", submission.rows->size(),
          " values: need ", steps, " x ", group.row);
    check(submission.priority >= -8 && submission.priority <= 8, "batcher", "priority=", submission.priority,
          ": need -8..8");
    check(!submission.deadline_s || *submission.deadline_s > 0, "batcher", "deadline_s=",
          submission.deadline_s.value_or(0), ": need more than 0");
    for (const auto* branch : {&submission.conditional, &submission.unconditional}) {
        if (branch == &submission.unconditional && !submission.guidance) continue;
        bool same = branch->size() == inputs;
        for (std::size_t i = 0; same && i < inputs; ++i) same = (*branch)[i].size() == group.input_bytes[i];
        check(same, "batcher", "the conditions do not have the group's sizes");
    }
    check(!closed_, "batcher", "closed: no more samples are taken");
    auto sample = std::make_unique<Sample>(next_, std::move(submission), group.numel);
    if (active_.size() >= limits_.active && queue_.size() >= limits_.queue) {
        ++stats_.refused;
        throw Overloaded("[batcher] " + std::to_string(queue_.size()) + " samples wait already", seconds_ahead());
    }
    ++stats_.submitted;
    const std::uint64_t id = next_++;
    if (active_.size() < limits_.active) {
        admit(std::move(sample));
    } else {
        const auto later = [&](const auto& other) { return other->turn.priority < sample->turn.priority; };
        queue_.insert(std::find_if(queue_.begin(), queue_.end(), later), std::move(sample));
    }
    work_.notify_one();
    return id;
}

void Batcher::admit(std::unique_ptr<Sample> sample) {
    sample->turn.pass = pass_ + stride(sample->turn);
    active_.push_back(std::move(sample));
}

bool Batcher::cancel(std::uint64_t id) {
    const std::lock_guard lock(mutex_);
    for (Samples* samples : {&active_, &queue_}) {
        for (auto& sample : *samples) {
            if (sample->id == id && !sample->cancelled) {
                sample->cancelled = true;
                work_.notify_one();
                return true;
            }
        }
    }
    return false;
}

void Batcher::close(bool drain) {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    if (!drain) {
        for (Samples* samples : {&active_, &queue_}) {
            for (auto& sample : *samples) sample->cancelled = true;
        }
    }
    work_.notify_all();
    news_.notify_all();
}

bool Batcher::ended() const {
    const std::lock_guard lock(mutex_);
    return closed_ && !running_ && events_.empty() && active_.empty() && queue_.empty();
}

void Batcher::run() {
    std::unique_lock lock(mutex_);
    check(!running_, "batcher", "run is already running in another thread");
    running_ = true;
    for (;;) {
        sweep(Clock::now());
        if (active_.empty()) {
            if (closed_) break;
            work_.wait(lock);
            continue;
        }
        const auto start = Clock::now();
        take_turn(choose(start), lock);
        stats_.busy_s += seconds_between(start, Clock::now());
    }
    running_ = false;
    news_.notify_all();
}

// Lets go of those that nobody waits for and fills their places.
void Batcher::sweep(Clock::time_point now) {
    for (Samples* samples : {&active_, &queue_}) {
        for (auto at = samples->begin(); at != samples->end();) {
            const auto place = at++;
            Sample& sample = **place;
            const double step_s = stats_.entry_s * static_cast<double>(sample.branches());
            if (!sample.cancelled && !is_hopeless(sample.turn, now, step_s)) continue;
            const Happened happened = sample.cancelled ? Happened::cancelled : Happened::expired;
            ++(sample.cancelled ? stats_.cancelled : stats_.expired);
            tell({sample.id, happened, sample.step, sample.steps(), {}, {}});
            samples->erase(place);
        }
    }
    while (!queue_.empty() && active_.size() < limits_.active) {
        admit(std::move(queue_.front()));
        queue_.pop_front();
    }
}

// The branches of the next network call: those of the samples whose turn it is, as many as fill a lane.
std::vector<Batcher::Entry> Batcher::choose(Clock::time_point now) const {
    std::vector<Waiting> waiting;
    std::vector<Sample*> samples;
    for (const auto& sample : active_) {
        waiting.push_back(sample->turn);
        samples.push_back(sample.get());
    }
    std::vector<Entry> entries;
    for (const std::size_t i : order_turns(waiting, now, stats_.entry_s)) {
        Sample* const sample = samples[i];
        const bool first = entries.empty();
        if (!first && (sample->asked.group != entries.front().sample->asked.group || sample->alone)) continue;
        for (const Branch branch : sample->wanted()) entries.push_back({sample, branch});
        if (sample->alone) {
            entries.resize(1);
            return entries;
        }
    }
    const auto& lanes = groups_[entries.front().sample->asked.group].lanes;
    std::size_t count = 1;
    for (const Lane& lane : lanes) count = lane.count <= entries.size() ? lane.count : count;
    entries.resize(count);
    return entries;
}

const float* Batcher::call(Group& group, const std::vector<Entry>& entries) {
    const auto lane = std::find_if(group.lanes.begin(), group.lanes.end(),
                                   [&](const Lane& one) { return one.count == entries.size(); });
    for (std::size_t n = 0; n < entries.size(); ++n) {
        const Sample& sample = *entries[n].sample;
        std::copy_n(sample.asked.x.data(), group.numel, lane->x + n * group.numel);
        std::copy_n(sample.asked.rows->data() + sample.step * group.row, group.row, lane->row + n * group.row);
        const bool plain = entries[n].branch == Branch::conditional;
        const auto& inputs = plain ? sample.asked.conditional : sample.asked.unconditional;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            std::memcpy(lane->inputs[i] + n * inputs[i].size(), inputs[i].data(), inputs[i].size());
        }
    }
    return lane->call();
}

// Everything but the bookkeeping happens without the lock: only this thread touches a sample's numbers.
void Batcher::take_turn(std::vector<Entry> entries, std::unique_lock<std::mutex>& lock) {
    Group& group = groups_[entries.front().sample->asked.group];
    lock.unlock();
    std::string error;
    const auto start = Clock::now();
    double seconds = 0;
    std::vector<std::pair<Sample*, std::string>> stepped;
    try {
        const float* out = call(group, entries);
        seconds = seconds_between(start, Clock::now());
        for (std::size_t n = 0; n < entries.size(); ++n) {
            Sample& sample = *entries[n].sample;
            auto& kept = entries[n].branch == Branch::conditional ? sample.conditional : sample.unconditional;
            kept.assign(out + n * group.numel, out + (n + 1) * group.numel);
        }
        for (const Entry& entry : entries) {
            const bool done = entry.sample->wanted().empty();
            if (!done || (!stepped.empty() && stepped.back().first == entry.sample)) continue;
            stepped.emplace_back(entry.sample, std::string{});
            finish_step(*entry.sample, stepped.back().second);
        }
    } catch (const std::exception& thrown) {
        error = thrown.what();
    }
    lock.lock();
    if (error.empty()) {
        const double each = seconds / static_cast<double>(entries.size());
        stats_.entry_s = stats_.entry_s == 0 ? each : 0.9 * stats_.entry_s + 0.1 * each;
        stats_.network_s += seconds;
        ++stats_.calls;
        ++stats_.calls_of[entries.size()];
        stats_.entries += entries.size();
    }
    for (auto at = active_.begin(); at != active_.end();) {
        const auto place = at++;
        Sample& sample = **place;
        const auto mine = [&](const Entry& entry) { return entry.sample == &sample; };
        if (!error.empty() && std::any_of(entries.begin(), entries.end(), mine)) {
            if (entries.size() == 1) end(place, Happened::failed, error);
            else sample.alone = true;  // the culprit will fail by itself
            continue;
        }
        const auto found = std::find_if(stepped.begin(), stepped.end(),
                                        [&](const auto& one) { return one.first == &sample; });
        if (found == stepped.end()) continue;
        pass_ = std::max(pass_, sample.turn.pass);
        if (!found->second.empty()) {
            end(place, Happened::failed, found->second);
        } else if (sample.step == sample.steps()) {
            end(place, Happened::finished);
        } else {
            sample.turn.remaining = sample.steps() - sample.step;
            sample.turn.pass += stride(sample.turn);
            tell({sample.id, Happened::progress, sample.step, sample.steps(), {}, {}});
            const std::size_t every = sample.asked.preview_every;
            if (every && sample.step % every == 0) {
                tell({sample.id, Happened::preview, sample.step, sample.steps(), sample.asked.x, {}});
            }
        }
    }
}

void Batcher::finish_step(Sample& sample, std::string& error) {
    std::vector<float>& out = sample.conditional;
    if (sample.asked.guidance) {
        for (std::size_t i = 0; i < out.size(); ++i) {
            const double u = sample.unconditional[i], c = out[i];
            out[i] = static_cast<float>(u + *sample.asked.guidance * (c - u));
        }
    }
    try {
        advance(*sample.asked.plan, sample.step, sample.state, sample.asked.x.data(), out.data());
    } catch (const std::exception& thrown) {
        error = thrown.what();
    }
    ++sample.step;
    sample.conditional.clear();
    sample.unconditional.clear();
}

void Batcher::end(Samples::iterator place, Happened happened, std::string text) {
    Sample& sample = **place;
    ++(happened == Happened::finished ? stats_.finished : stats_.failed);
    std::vector<float> x;
    if (happened == Happened::finished) x = std::move(sample.asked.x);
    tell({sample.id, happened, sample.step, sample.steps(), std::move(x), std::move(text)});
    active_.erase(place);
}

void Batcher::tell(BatchEvent event) {
    if (!is_end(event.happened)) {
        for (BatchEvent& other : events_) {
            if (other.id != event.id || other.happened != event.happened) continue;
            other = std::move(event);
            return;
        }
    }
    events_.push_back(std::move(event));
    news_.notify_one();
}

std::vector<BatchEvent> Batcher::wait(double timeout_s) {
    std::unique_lock lock(mutex_);
    const auto ready = [&] {
        return !events_.empty() || (closed_ && !running_ && active_.empty() && queue_.empty());
    };
    news_.wait_for(lock, std::chrono::duration<double>(timeout_s), ready);
    std::vector<BatchEvent> found(std::make_move_iterator(events_.begin()), std::make_move_iterator(events_.end()));
    events_.clear();
    return found;
}

BatcherStats Batcher::stats() const {
    const std::lock_guard lock(mutex_);
    BatcherStats found = stats_;
    found.active = active_.size();
    found.queued = queue_.size();
    return found;
}

// When a place in the queue should be free: the shortest of the active samples has to end.
double Batcher::seconds_ahead() const {
    std::size_t entries = 0;
    for (const auto& sample : active_) entries += sample->turn.remaining * sample->branches();
    const double all = static_cast<double>(entries) * stats_.entry_s;
    return all / static_cast<double>(std::max<std::size_t>(1, active_.size()));
}

}  // namespace volcast
