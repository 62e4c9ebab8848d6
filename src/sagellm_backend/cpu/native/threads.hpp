// A pool that runs one function on all of its threads. Waiting spins for a moment, then sleeps in the kernel: several
// engines on the same cores share them instead of burning them.
//
// It never yields in between, as `std::atomic::wait` does: two threads that find themselves on one core would hand it to each
// other for seconds, beside an idle one, because only a thread that wakes up is given a new core at once.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace sage {

// A number that threads wait on.
class alignas(64) Gate {
 public:
  int value() const { return value_.load(std::memory_order_acquire); }

  // Return when the value is no longer `old`.
  void wait_while(int old);

  // Change the value and wake who sleeps. Called by one thread at a time.
  void open(int value);

 private:
  std::atomic<int> value_{0};
  std::atomic<int> sleepers_{0};
};

class ThreadPool {
 public:
  // `threads` counts the caller, which is thread 0 of every `run`.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Run `body(thread)` on every thread and return when all are done. `body` must not throw.
  void run(const std::function<void(int)>& body);

  // Wait until every thread of the current `run` is here.
  void barrier();

 private:
  void work(int thread);

  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  bool stopping_ = false;
  Gate started_;                             // runs begun; workers wait on it
  alignas(64) std::atomic<int> arrived_{0};  // threads in the barrier
  Gate passed_;                              // barriers completed
};

// Threads that this process may use: the affinity mask, cut by the cgroup's CPU quota (rounded up).
int allowed_threads();

// Deals the items of successive loops to threads. Every thread of a `run` makes the same calls in the same order.
class Loops {
 public:
  explicit Loops(size_t loops) : next_(loops) {}
  void reset() {
    for (auto& n : next_) n.value.store(0, std::memory_order_relaxed);
  }
  size_t size() const { return next_.size(); }
  // First item of the next chunk of loop `loop`.
  int take(size_t loop, int chunk) { return next_[loop].value.fetch_add(chunk, std::memory_order_relaxed); }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  std::vector<Counter> next_;
};

}  // namespace sage
