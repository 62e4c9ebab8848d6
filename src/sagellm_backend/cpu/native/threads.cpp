#include "threads.hpp"

#include <algorithm>
#include <fstream>
#include <sched.h>
#include <string>

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

void wait_while(std::atomic<int>& value, int old) {
  for (int i = 0; i < kSpins; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

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

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
  body_ = &body;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  body(0);
  barrier();
}

void ThreadPool::barrier() {
  if (workers_.empty()) return;
  const int round = passed_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size() - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.store(round + 1, std::memory_order_release);
    passed_.notify_all();
  } else {
    wait_while(passed_, round);
  }
}

void ThreadPool::work(int thread) {
  for (int seen = 0;; seen++) {
    wait_while(started_, seen);
    if (stopping_) return;
    (*body_)(thread);
    barrier();
  }
}

}  // namespace sage
