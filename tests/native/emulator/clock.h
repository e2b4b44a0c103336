// Vector clocks of the happens-before relation. A component for every thread, and one for each kind of asynchronous
// access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emulator {

// Of one component: up to where its accesses happen before those of the clock's owner, and up to where its writes have
// been made visible to the async proxy by a fence of their writer.
struct Stamp {
    std::uint32_t seen = 0, shown = 0;
};

// Shared by threads with equal clocks, so never modified while shared. Launches run in one host thread.
class Clock {
public:
    Clock() = default;
    explicit Clock(std::size_t components) : body_(new Body{1, std::vector<Stamp>(components)}) {}
    Clock(const Clock& other) : body_(other.body_) {
        if (body_) ++body_->owners;
    }
    Clock(Clock&& other) noexcept : body_(std::exchange(other.body_, nullptr)) {}
    Clock& operator=(Clock other) noexcept {
        std::swap(body_, other.body_);
        return *this;
    }
    ~Clock() {
        if (body_ && --body_->owners == 0) delete body_;
    }

    explicit operator bool() const { return body_ != nullptr; }
    bool same(const Clock& other) const { return body_ == other.body_; }
    const Stamp& operator[](std::size_t component) const { return body_->stamps[component]; }

    void raise(std::size_t component, Stamp to) {
        own();
        raise(body_->stamps[component], to);
    }
    void join(const Clock& other) {
        if (!other || same(other)) return;
        if (!body_) {
            *this = other;
            return;
        }
        own();
        for (std::size_t i = 0; i < body_->stamps.size(); ++i) raise(body_->stamps[i], other.body_->stamps[i]);
    }
    std::size_t key() const { return reinterpret_cast<std::size_t>(body_); }

private:
    struct Body {
        int owners;
        std::vector<Stamp> stamps;
    };
    static void raise(Stamp& stamp, Stamp to) {
        stamp.seen = stamp.seen > to.seen ? stamp.seen : to.seen;
        stamp.shown = stamp.shown > to.shown ? stamp.shown : to.shown;
    }
    void own() {
        if (body_->owners == 1) return;
        --body_->owners;
        body_ = new Body{1, body_->stamps};
    }
    Body* body_ = nullptr;
};

// Joins that are asked for again and again give one clock: all lanes of a warp that wait for the same barrier.
class Joins {
public:
    Clock of(const Clock& a, const Clock& b) {
        if (!b || a.same(b)) return a;
        Entry& entry = entries_[(a.key() * 31 + b.key()) / 16 % kEntries];
        if (!entry.a.same(a) || !entry.b.same(b)) {
            entry = {a, b, a};
            entry.joined.join(b);
        }
        return entry.joined;
    }
    void clear() {
        for (Entry& entry : entries_) entry = {};
    }

private:
    static constexpr std::size_t kEntries = 509;
    struct Entry {
        Clock a, b, joined;
    };
    Entry entries_[kEntries];
};

}  // namespace emulator
