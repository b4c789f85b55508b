// A small thread pool in which the caller takes part.
//
// * Results never depend on it: a job is a set of independent indices.
// * A call from inside a job, or while another caller's job runs, does its indices in the calling
// thread.
// * Workers start with the first job that can use them; between jobs they spin for some
// microseconds, then sleep.
// * After fork() the child has no workers: its jobs run in the calling thread, and it must leave
// with _exit or exec.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace armt::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads);  // 0: as many as the process may use; the caller counts as one
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int64_t threads() const { return threads_; }

  // fn(i) for i = 0 .. count-1, in any order and by several threads; fn(0) by the caller. The first exception thrown is
  // thrown here; indices not begun by then may be left out.
  template <class Fn>
  void parallel_for(int64_t count, Fn&& fn) {
    if (count <= 1 || threads_ == 1) {
      for (int64_t i = 0; i < count; ++i) fn(i);
      return;
    }
    using Body = std::remove_reference_t<Fn>;
    run(
        count, [](void* body, int64_t i) { (*static_cast<Body*>(body))(i); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // fn(begin, end) over pieces of [0, count) of at least `grain` indices, a few pieces for each
  // thread.
  template <class Fn>
  void parallel_ranges(int64_t count, int64_t grain, Fn&& fn) {
    const int64_t pieces = pieces_of(count, grain);
    parallel_for(pieces, [&](int64_t i) { fn(count * i / pieces, count * (i + 1) / pieces); });
  }

 private:
  using Body = void (*)(void* context, int64_t index);

  int64_t pieces_of(int64_t count, int64_t grain) const;
  void run(int64_t count, Body body, void* context);
  void run_shared(int64_t count, Body body, void* context);
  void start_workers();
  void work();
  bool take_index();  // claims and runs one index; false when none is left
  void run_index(int64_t index, int64_t count);
  void record_failure();
  void wait_until_finished(int64_t count);

  const int64_t threads_;
  std::vector<std::thread> workers_;
  std::atomic<bool> busy_{false};

  // The job. Written by its caller while no index is out; read only by a thread that holds an
  // index.
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::exception_ptr failure_;
  std::mutex failure_mutex_;
  std::atomic<bool> failed_{false};

  // generation | count | next index in one word: a late worker can't take an index of one job for
  // another.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int32_t> finished_{0};  // indices done
  alignas(64) std::atomic<int32_t> epoch_{0};     // grows with every job; sleeping workers wait on it
  std::atomic<bool> stop_{false};
};

}  // namespace armt::cpu
