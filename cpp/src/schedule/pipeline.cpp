#include <atomic>
#include <deque>
#include <mutex>
#include <thread>

#include "schedule/flight.h"

namespace armt {
namespace {

constexpr int kSpins = 20000;  // looks for work before a thread sleeps: some tens of microseconds

class Pipeline {
 public:
  Pipeline(Backend& backend, const ModelConfig& config, Workspace& workspace, Planner& planner, int64_t in_flight,
           const ScheduleHooks& hooks)
      : backend_(backend),
        config_(config),
        workspace_(workspace),
        planner_(planner),
        in_flight_(in_flight),
        hooks_(hooks),
        last_layer_(config.decoder.n_layers - 1) {}

  // One thread's share: any number of them may be at work, and one alone gets everything done if it is the caller.
  void work() {
    try {
      for (int64_t seen = events_.load(); !finished(); seen = events_.load()) {
        if (!work_once() && !finished()) wait(seen);
      }
    } catch (...) {
      failed_.store(true);
      announce();
      throw;
    }
  }

 private:
  struct Entry {
    Flight flight;
    bool busy = true;  // a thread has it
  };

  bool finished() const { return failed_.load() || finished_.load(); }

  bool work_once() {
    std::unique_lock lock(mutex_);
    if (entries_.empty() && planner_.done()) {
      finished_.store(true);
      lock.unlock();
      announce();
      return true;
    }
    if (Entry* entry = landing()) {
      lock.unlock();
      land(backend_, config_, workspace_, entry->flight, hooks_);
      lock.lock();
      entries_.pop_front();
    } else if (Entry* next = ready()) {
      next->busy = true;
      lock.unlock();
      run_cell(next->flight);
      lock.lock();
      ++next->flight.layer;
      next->busy = false;
    } else if (!planner_.done() && std::ssize(entries_) < in_flight_) {
      Entry& fresh = entries_.emplace_back(Entry{make_flight(workspace_, planner_.next(), started_++)});
      lock.unlock();
      backend_.embed(fresh.flight.group, workspace_.residual);
      lock.lock();
      fresh.busy = false;
    } else {
      return false;
    }
    lock.unlock();
    announce();
    return true;
  }

  // The oldest flight if it is through; only the caller's thread may run hooks.
  Entry* landing() {
    if (entries_.empty() || std::this_thread::get_id() != caller_) return nullptr;
    Entry& oldest = entries_.front();
    return !oldest.busy && oldest.flight.layer > last_layer_ ? &oldest : nullptr;
  }

  // The oldest flight whose next cell may run: the flight before it has done that layer. The last layer's rows have a
  // single place, so the flight before must have landed.
  Entry* ready() {
    int64_t done_before = last_layer_ + 1;  // layers that the flight before has done
    for (Entry& entry : entries_) {
      const int64_t layer = entry.flight.layer;
      const bool oldest = &entry == &entries_.front();
      if (!entry.busy && layer < done_before && (layer < last_layer_ || (oldest && layer == last_layer_)))
        return &entry;
      done_before = layer;
    }
    return nullptr;
  }

  void run_cell(Flight& flight) {
    prepare(backend_, config_, flight);
    OutputRows outputs;
    const bool last = flight.layer == last_layer_;
    if (last) outputs = prepare_outputs(flight);
    backend_.run(workspace_, {&flight.group, 1}, [&](Groups groups, const Scratch& scratch) {
      if (last) {
        run_last_block(backend_, config_, workspace_, scratch, flight.group, outputs);
      } else {
        run_blocks(backend_, config_, workspace_, scratch, groups);
      }
    });
    settle(config_, flight);
  }

  void announce() {
    events_.fetch_add(1);
    events_.notify_all();
  }

  void wait(int64_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      if (events_.load(std::memory_order_relaxed) != seen) return;
    }
    events_.wait(seen);
  }

  Backend& backend_;
  const ModelConfig& config_;
  Workspace& workspace_;
  Planner& planner_;
  const int64_t in_flight_;
  const ScheduleHooks& hooks_;
  const int64_t last_layer_;
  const std::thread::id caller_ = std::this_thread::get_id();

  std::mutex mutex_;
  std::deque<Entry> entries_;  // oldest first
  int64_t started_ = 0;
  std::atomic<int64_t> events_{0};  // grows whenever there may be something new to do
  std::atomic<bool> finished_{false}, failed_{false};
};

}  // namespace

void run_pipeline(Backend& backend, const ModelConfig& config, Workspace& workspace, Planner& planner,
                  int64_t in_flight, const ScheduleHooks& hooks) {
  Pipeline pipeline(backend, config, workspace, planner, in_flight, hooks);
  backend.work(config.decoder.n_layers, [&] { pipeline.work(); });
}

}  // namespace armt
