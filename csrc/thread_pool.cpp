#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace epo {
namespace {

constexpr int kMostWorkers = 255;

struct Job {
    const std::function<void(std::int64_t)>* task;
    std::int64_t count;
    std::atomic<std::int64_t> next{0};

    void work() {
        for (std::int64_t i = next++; i < count; i = next++) (*task)(i);
    }
};

class ThreadPool {
public:
    // False if the threads are busy.
    bool run(Job& job, int threads) {
        std::unique_lock<std::mutex> turn(one_caller_, std::try_to_lock);
        if (!turn) return false;
        const int helpers = enlist(std::min(threads - 1, kMostWorkers));
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            wanted_ = helpers;
            running_ = 0;
        }
        wake_.notify_all();
        job.work();
        // All tasks have been started, so helpers that have not begun are not awaited.
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;
        idle_.wait(lock, [this] { return running_ == 0; });
        job_ = nullptr;
        return true;
    }

private:
    int enlist(int helpers) {
        while (workers_ < helpers) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                break;  // the system allows no more threads: continue with the existing ones
            }
            ++workers_;
        }
        return std::min(workers_, helpers);
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++running_;
            Job* const job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--running_ == 0) idle_.notify_one();
        }
    }

    std::mutex one_caller_, mutex_;
    std::condition_variable wake_, idle_;
    Job* job_ = nullptr;
    int wanted_ = 0, running_ = 0;  // guarded by mutex_: helpers still to begin, helpers at work
    int workers_ = 0;               // guarded by one_caller_
};

// Never deleted: its threads wait on it until the process ends. A forked child has none of them, and its locks are in
// an unknown state, so it abandons the pool.
std::atomic<ThreadPool*> current_pool{nullptr};

ThreadPool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
    (void)registered;
    ThreadPool* existing = current_pool.load();
    if (existing) return *existing;
    ThreadPool* const fresh = new ThreadPool;
    if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;
    return *existing;
}

}  // namespace

void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task) {
    Job job;
    job.task = &task;
    job.count = count;
    const int useful = static_cast<int>(std::min<std::int64_t>(threads, count));
    if (useful > 1 && pool().run(job, useful)) return;
    job.work();
}

}  // namespace epo
