// From token ids to rows: cuts a stream into pieces of segments and says how each row enters the model, at which
// position, and what it sees.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend.h"
#include "engine/stream.h"

namespace armt {

enum class LogitsWanted : uint8_t { none, last, all };

// What one call asks of one stream.
struct Job {
  StreamState* state = nullptr;
  std::span<const int32_t> tokens;
  LogitsWanted logits = LogitsWanted::none;
  bool close_last = false;         // close the last segment too (step, forward, close_segment)
  bool grow = false;               // let the open segment outgrow segment_size (generation with rollover off)
  bool windowed = true;            // false: ignore the sliding window (the published paper-dialect generation does)
  std::vector<int64_t> cuts;       // forward: lengths of the segments; empty: segment_size each
  std::vector<uint8_t> attention;  // forward: 1 = real token, 0 = padding, [tokens]; empty: no padding
};

// A piece of one segment of one job: front rows if it begins the segment, tokens, memory rows if it closes it.
struct Item {
  const Job* job = nullptr;
  int64_t token_begin = 0, token_count = 0;  // in job->tokens
  int64_t row_begin = 0, row_count = 0;      // in the wave
  int64_t front_rows = 0, memory_rows = 0;
  int64_t kv_begin = 0;      // cache row of the first row
  int64_t segment_rows = 0;  // rows of the segment up to and with this piece, memory rows not counted
  bool last_of_job = false;
  BlockRef carried;                   // RMT: memory vectors of this segment
  std::vector<uint8_t> visible;       // [segment_rows + memory_rows], padding only
  std::vector<uint8_t> prev_visible;  // [rows of the previous segment], padding only
};

// The pieces that travel through the layers together, one of each job; their rows lie one after another.
struct Wave {
  std::vector<Item> items;
  std::vector<Row> rows;
};

// Hands out the waves of a set of jobs in order and advances the streams' bookkeeping (not their device memory).
class Planner {
 public:
  Planner(const ModelConfig& config, std::span<Job> jobs);

  // Upper bound of the rows in any wave.
  int64_t max_wave_rows() const { return max_wave_rows_; }
  // Segments that the longest job will touch.
  int64_t waves() const { return waves_; }
  bool done() const;
  // The next wave. RMT: its carried memory is that of the stream now, so the wave before must have finished.
  Wave next();

 private:
  struct Cursor {
    Job* job = nullptr;
    int64_t next_token = 0;
    size_t next_cut = 0;
    bool closing_due = false;  // a close with no token left to feed
    std::vector<uint8_t> visible, prev_visible;
  };

  int64_t room(const Cursor& cursor) const;
  bool finished(const Cursor& cursor) const;
  void check_length(int64_t tokens, int64_t window) const;
  bool add_item(Cursor& cursor, Wave& wave);
  void add_rows(Cursor& cursor, Item& item, Wave& wave);
  void measure(const Cursor& cursor);

  const ModelConfig& config_;
  std::vector<Cursor> cursors_;
  int64_t max_wave_rows_ = 0;
  int64_t waves_ = 0;
};

}  // namespace armt
