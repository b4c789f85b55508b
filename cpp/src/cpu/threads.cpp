#include "cpu/threads.h"

#include <algorithm>
#include <system_error>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace armt::cpu {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds
constexpr int kIndexBits = 20;
constexpr uint64_t kIndexMask = (uint64_t{1} << kIndexBits) - 1;
constexpr int64_t kMaxCount = kIndexMask;
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kPiecesPerThread = 4;  // so that a thread that is held up delays the job little

// True while this thread runs indices of some pool's job.
thread_local bool inside_job = false;

uint64_t next_index(uint64_t ticket) {
  return ticket & kIndexMask;
}
uint64_t count_of(uint64_t ticket) {
  return ticket >> kIndexBits & kIndexMask;
}
uint64_t generation_of(uint64_t ticket) {
  return ticket >> (2 * kIndexBits);
}

// Index 0 is out already: it is the caller's.
uint64_t new_ticket(uint64_t old, int64_t count) {
  return (generation_of(old) + 1) << (2 * kIndexBits) | static_cast<uint64_t>(count) << kIndexBits | 1;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t usable_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

}  // namespace

ThreadPool::ThreadPool(int64_t threads)
    : threads_(std::clamp<int64_t>(threads > 0 ? threads : usable_cores(), 1, kMaxThreads)) {}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

int64_t ThreadPool::pieces_of(int64_t count, int64_t grain) const {
  if (count <= 0) return 0;
  if (threads_ == 1 || inside_job) return 1;
  const int64_t most = (count + grain - 1) / grain;
  return std::clamp<int64_t>(most, 1, threads_ * kPiecesPerThread);
}

void ThreadPool::run(int64_t count, Body body, void* context) {
  if (inside_job || busy_.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  struct Release {
    std::atomic<bool>& busy;
    ~Release() { busy.store(false, std::memory_order_release); }
  } release{busy_};
  for (int64_t begin = 0; begin < count; begin += kMaxCount) {
    struct Shifted {
      Body body;
      void* context;
      int64_t begin;
    } shifted{body, context, begin};
    const auto call = [](void* context, int64_t i) {
      const auto& job = *static_cast<Shifted*>(context);
      job.body(job.context, job.begin + i);
    };
    run_shared(std::min(kMaxCount, count - begin), call, &shifted);
  }
}

void ThreadPool::run_shared(int64_t count, Body body, void* context) {
  if (workers_.empty()) start_workers();
  body_ = body;
  context_ = context;
  failed_.store(false, std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  ticket_.store(new_ticket(ticket_.load(std::memory_order_relaxed), count), std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();

  inside_job = true;
  run_index(0, count);
  while (take_index()) {
  }
  inside_job = false;
  wait_until_finished(count);
  if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::start_workers() {
  workers_.reserve(threads_ - 1);
  try {
    while (std::ssize(workers_) < threads_ - 1) workers_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started, or the caller alone, do the work.
  }
}

void ThreadPool::work() {
  inside_job = true;
  int32_t seen = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    while (take_index()) {
    }
    for (int i = 0; i < kSpins && epoch_.load(std::memory_order_relaxed) == seen; ++i) pause();
    epoch_.wait(seen, std::memory_order_acquire);
    seen = epoch_.load(std::memory_order_acquire);
  }
}

bool ThreadPool::take_index() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (next_index(ticket) >= count_of(ticket)) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  run_index(static_cast<int64_t>(next_index(ticket)), static_cast<int64_t>(count_of(ticket)));
  return true;
}

void ThreadPool::run_index(int64_t index, int64_t count) {
  if (!failed_.load(std::memory_order_relaxed)) {
    try {
      body_(context_, index);
    } catch (...) {
      record_failure();
    }
  }
  // From here on the job may be over and its caller gone.
  if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) finished_.notify_one();
}

void ThreadPool::record_failure() {
  const std::lock_guard lock(failure_mutex_);
  if (!failed_.load(std::memory_order_relaxed)) failure_ = std::current_exception();
  failed_.store(true, std::memory_order_relaxed);
}

void ThreadPool::wait_until_finished(int64_t count) {
  for (int i = 0; i < kSpins; ++i) {
    if (finished_.load(std::memory_order_acquire) == count) return;
    pause();
  }
  for (int32_t done; (done = finished_.load(std::memory_order_acquire)) != count;) {
    finished_.wait(done, std::memory_order_acquire);
  }
}

}  // namespace armt::cpu
