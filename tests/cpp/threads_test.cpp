// The thread pool under stress: many tiny jobs, exceptions, concurrent and nested callers.
#include "cpu/threads.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"

namespace {

using armt::cpu::ThreadPool;

void every_index_once(ThreadPool& pool, int64_t count) {
  std::vector<int> seen(count);
  pool.parallel_for(count, [&](int64_t i) { ++seen[i]; });
  for (int64_t i = 0; i < count; ++i)
    check(seen[i] == 1, "index " + std::to_string(i) + " of " + std::to_string(count));
}

void tiny_jobs(int threads) {
  ThreadPool pool(threads);
  int64_t total = 0;
  for (int job = 0; job < 100000; ++job) {
    int64_t parts[4] = {};
    const int64_t count = 2 + job % 3;
    pool.parallel_for(count, [&](int64_t i) { parts[i] = job + i; });
    for (int64_t i = 0; i < count; ++i) total += parts[i] - job - i;
    check(parts[count - 1] == job + count - 1, "tiny job");
  }
  check(total == 0, "tiny jobs' sum");
}

// Index 0 waits for index 1: that ends only if two threads take part, also after they have gone to
// sleep.
void two_at_once() {
  ThreadPool pool(2);
  for (int pause : {0, 0, 20, 0, 20}) {
    std::this_thread::sleep_for(std::chrono::milliseconds(pause));
    std::atomic<int> begun{0};
    std::atomic<bool> met{true};
    pool.parallel_for(2, [&](int64_t) {
      ++begun;
      const auto start = std::chrono::steady_clock::now();
      while (begun < 2 && met) {
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(20)) met = false;
      }
    });
    check(met, "two threads at once");
  }
}

void exceptions(int threads) {
  ThreadPool pool(threads);
  for (int job = 0; job < 2000; ++job) {
    bool caught = false;
    try {
      pool.parallel_for(8, [&](int64_t i) {
        if (i == job % 8) throw std::runtime_error("index " + std::to_string(i));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what() == "index " + std::to_string(job % 8);
    }
    check(caught, "exception of job " + std::to_string(job));
    every_index_once(pool, 5);
  }
}

void concurrent_callers() {
  ThreadPool pool(4);
  std::atomic<int64_t> done{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int job = 0; job < 3000; ++job) {
        int64_t parts[7] = {};
        pool.parallel_for(7, [&](int64_t i) { parts[i] = i + 1; });
        int64_t sum = 0;
        for (int64_t part : parts) sum += part;
        done += sum == 28;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  check(done == 4 * 3000, "concurrent callers");
}

void nested() {
  ThreadPool pool(3);
  for (int job = 0; job < 500; ++job) {
    std::vector<std::vector<int>> seen(9, std::vector<int>(11));
    pool.parallel_for(9,
                      [&](int64_t i) { pool.parallel_for(11, [&](int64_t j) { ++seen[i][j]; }); });
    for (const auto& row : seen) {
      for (int count : row) check(count == 1, "nested index");
    }
  }
}

// A job of another pool, from inside a job, runs in the calling thread too.
void nested_in_another() {
  ThreadPool outer(3), inner(3);
  std::atomic<int> count{0};
  outer.parallel_for(20, [&](int64_t) { inner.parallel_for(20, [&](int64_t) { ++count; }); });
  check(count == 400, "nested in another pool");
}

void ranges(int threads) {
  ThreadPool pool(threads);
  for (int64_t count = 0; count < 300; ++count) {
    std::vector<int> seen(count);
    pool.parallel_ranges(count, 7, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++seen[i];
    });
    for (int value : seen) check(value == 1, "range of " + std::to_string(count));
  }
}

void short_lives() {
  for (int i = 0; i < 300; ++i) {
    ThreadPool pool(1 + i % 4);
    if (i % 3 != 0) every_index_once(pool, i % 17);
  }
}

// One thread takes no part of the pool: every index runs here.
void single_thread() {
  ThreadPool pool(1);
  const auto here = std::this_thread::get_id();
  pool.parallel_for(100, [&](int64_t) { check(std::this_thread::get_id() == here, "one thread"); });
}

// More indices than one ticket can count.
void many_indices() {
  ThreadPool pool(2);
  const int64_t count = (int64_t{1} << 20) + 77;
  std::vector<unsigned char> seen(count);
  pool.parallel_for(count, [&](int64_t i) { ++seen[i]; });
  int64_t once = 0;
  for (unsigned char value : seen) once += value == 1;
  check(once == count, "many indices");
}

}  // namespace

int main() {
  for (int threads : {2, 4}) {
    tiny_jobs(threads);
    exceptions(threads);
    ranges(threads);
  }
  ranges(1);
  concurrent_callers();
  two_at_once();
  nested();
  nested_in_another();
  short_lives();
  single_thread();
  many_indices();
  return report("threads_test");
}
