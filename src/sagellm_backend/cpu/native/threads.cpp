#include "threads.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sched.h>
#include <string>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sage {
namespace {

// About 30 µs of spinning: longer than any wait between balanced threads, shorter than a scheduler's time slice.
constexpr int kSpins = 1000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)

void sleep_while(std::atomic<int>& value, int old) {
  syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
}

void wake_all(std::atomic<int>& value) {
  syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

#else

void sleep_while(std::atomic<int>& value, int old) { value.wait(old); }
void wake_all(std::atomic<int>& value) { value.notify_all(); }

#endif

int quota_v2() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  long long period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  return static_cast<int>((std::stoll(quota) + period - 1) / period);
}

int quota_v1() {
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  long long quota = 0, period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

}  // namespace

int allowed_threads() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) threads = CPU_COUNT(&mask);
  for (int quota : {quota_v2(), quota_v1()})
    if (quota > 0) threads = std::min(threads, quota);
  return std::max(1, threads);
}

void Gate::wait_while(int old) {
  for (int i = 0; i < kSpins; i++) {
    if (value() != old) return;
    relax();
  }
  // Whoever opens the gate either sees that somebody sleeps, or has changed the value before the kernel compares it.
  sleepers_.fetch_add(1);
  while (value_.load() == old) sleep_while(value_, old);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void Gate::open(int value) {
  value_.store(value);
  if (sleepers_.load() > 0) wake_all(value_);
}

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  started_.open(started_.value() + 1);
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
  body_ = &body;
  started_.open(started_.value() + 1);
  body(0);
  barrier();
}

void ThreadPool::barrier() {
  if (workers_.empty()) return;
  const int round = passed_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size() - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.open(round + 1);
  } else {
    passed_.wait_while(round);
  }
}

void ThreadPool::work(int thread) {
  for (int seen = 0;; seen++) {
    started_.wait_while(seen);
    if (stopping_) return;
    (*body_)(thread);
    barrier();
  }
}

}  // namespace sage
