#include "engine/plan.h"

#include <algorithm>
#include <string>

#include "armt/error.h"

namespace armt {
namespace {

// What the rows of one piece have in common.
struct Frame {
  const ModelConfig& config;
  const Item& item;
  int64_t window = 0;  // W: tokens of the previous segment that are still cached
  int64_t first = 0;   // tokens of this segment in front of the piece
  int64_t tokens = 0;  // tokens of this segment, piece included
  int64_t base = 0;    // rotary number of the segment's first row
  bool grow = false;

  const MemoryConfig& memory() const { return config.memory; }
  int64_t front() const { return config.front_rows(); }
  bool inner() const { return memory().dialect == Dialect::inner; }
  // The mask in which memory rows see each other and padding (modern window, and always in the inner loop).
  bool open_memory_mask() const { return inner() || (memory().dialect == Dialect::modern && memory().sliding_window); }
  // First row of the previous cache that augmented row `a` sees, where token j of that segment is row front + j.
  int64_t previous_from(int64_t j) const { return front() + std::min(j, window); }
};

Row front_row(const Frame& frame, int64_t index) {
  Row row;
  row.source = frame.config.recurrent_tokens() ? static_cast<int32_t>(Row::kFirstMemory - index) : Row::kSink;
  row.position = frame.memory().wrap_positions ? index : frame.base + index;
  row.cur_end = static_cast<int32_t>(index + 1);
  // The sink sees nothing of the previous segment where rows are masked one by one.
  const int64_t from = frame.open_memory_mask() ? frame.window : 0;
  row.prev_begin = static_cast<int32_t>(frame.previous_from(from));
  return row;
}

Row token_row(const Frame& frame, int32_t id, int64_t t) {
  const int64_t a = frame.front() + t;
  Row row;
  row.source = id;
  row.position = frame.memory().wrap_positions ? a : frame.base + a;
  row.cur_end = static_cast<int32_t>(a + 1);
  int64_t from = 0;
  if (frame.inner()) {
    from = a;
  } else if (frame.open_memory_mask()) {
    from = t;
    // Generation past the window: the published cache keeps the last W + s entries (docs/mathematics.md, Generation).
    if (frame.grow && frame.window > 0) row.cur_begin = static_cast<int32_t>(std::max<int64_t>(0, t - frame.window));
  }
  row.prev_begin = static_cast<int32_t>(frame.previous_from(from));
  return row;
}

Row memory_row(const Frame& frame, int64_t u) {
  const int64_t a = frame.front() + frame.tokens + u;
  Row row;
  row.source = static_cast<int32_t>(Row::kFirstMemory - u);
  row.position = frame.memory().wrap_positions
                     ? frame.config.decoder.learned_positions - frame.memory().memory_tokens + u
                     : frame.base + a;
  row.cur_end = static_cast<int32_t>(a + 1);
  int64_t from = 0;
  if (frame.open_memory_mask()) {
    row.cur_end = static_cast<int32_t>(frame.front() + frame.tokens + frame.memory().memory_tokens);
    row.sees_padding = true;
    row.sees_prev_padding = !frame.inner();
    if (frame.inner()) from = a;
  }
  row.prev_begin = static_cast<int32_t>(frame.previous_from(from));
  return row;
}

// True when padding hides everything from this row.
bool sees_nothing(const Row& row, const Item& item) {
  for (int64_t j = row.prev_begin; j < std::ssize(item.prev_visible); ++j) {
    if (item.prev_visible[j]) return false;
  }
  for (int64_t j = row.cur_begin; j < row.cur_end; ++j) {
    if (item.visible[j]) return false;
  }
  return true;
}

void check_position(const ModelConfig& config, const Row& row) {
  if (config.decoder.learned_positions == 0 || row.position < config.decoder.learned_positions) return;
  throw InvalidArgument("segment: position " + std::to_string(row.position) +
                        " is past the model's position table of " + std::to_string(config.decoder.learned_positions) +
                        " rows; use shorter segments, or let generation roll over into a new segment");
}

}  // namespace

Planner::Planner(const ModelConfig& config, std::span<Job> jobs) : config_(config) {
  for (Job& job : jobs) {
    Cursor cursor;
    cursor.job = &job;
    cursor.closing_due = job.close_last;
    measure(cursor);
    cursors_.push_back(std::move(cursor));
  }
}

void Planner::measure(const Cursor& cursor) {
  const Job& job = *cursor.job;
  const auto tokens = static_cast<int64_t>(job.tokens.size());
  const auto open = static_cast<int64_t>(job.state->open_tokens.size());
  int64_t longest = job.grow ? tokens : std::min(tokens, config_.memory.segment_size);
  int64_t waves = 1 + (open + tokens) / config_.memory.segment_size;
  if (!job.cuts.empty()) {
    longest = *std::max_element(job.cuts.begin(), job.cuts.end());
    waves = std::ssize(job.cuts);
  }
  max_wave_rows_ += longest + config_.front_rows() + config_.memory.memory_tokens;
  waves_ = std::max(waves_, waves);
}

int64_t Planner::room(const Cursor& cursor) const {
  const Job& job = *cursor.job;
  const auto left = static_cast<int64_t>(job.tokens.size()) - cursor.next_token;
  if (job.grow) return left;
  const int64_t size = job.cuts.empty() ? config_.memory.segment_size : job.cuts[cursor.next_cut];
  return std::max<int64_t>(0, size - static_cast<int64_t>(job.state->open_tokens.size()));
}

bool Planner::finished(const Cursor& cursor) const {
  if (cursor.next_token < std::ssize(cursor.job->tokens)) return false;
  return !cursor.closing_due || cursor.job->state->open_tokens.empty();
}

bool Planner::done() const {
  return std::all_of(cursors_.begin(), cursors_.end(), [&](const Cursor& c) { return finished(c); });
}

Wave Planner::next() {
  Wave wave;
  for (Cursor& cursor : cursors_) add_item(cursor, wave);
  return wave;
}

void Planner::check_length(int64_t tokens, int64_t window) const {
  const int64_t limit = config_.segment_limit(window);
  if (tokens <= limit) return;
  throw InvalidArgument("segment: " + std::to_string(tokens) + " tokens, but the model's position table holds " +
                        std::to_string(limit) +
                        " here; let generation roll over into a new segment, or close the segment");
}

bool Planner::add_item(Cursor& cursor, Wave& wave) {
  if (finished(cursor)) return false;
  Job& job = *cursor.job;
  StreamState& state = *job.state;
  const auto total = static_cast<int64_t>(job.tokens.size());

  Item item;
  item.job = &job;
  item.token_begin = cursor.next_token;
  item.token_count = std::min(room(cursor), total - cursor.next_token);
  const auto open = static_cast<int64_t>(state.open_tokens.size());
  check_length(open + item.token_count, state.window_tokens);
  const bool tokens_left = item.token_begin + item.token_count < total;
  const bool closes = tokens_left || job.close_last;
  item.front_rows = open == 0 ? config_.front_rows() : 0;
  item.kv_begin = open == 0 ? 0 : config_.front_rows() + open;
  item.memory_rows = closes ? config_.memory.memory_tokens : 0;
  item.segment_rows = config_.front_rows() + open + item.token_count;
  item.row_begin = std::ssize(wave.rows);
  item.row_count = item.front_rows + item.token_count + item.memory_rows;
  item.carried = state.carried;
  item.last_of_job = !tokens_left;
  add_rows(cursor, item, wave);

  const auto fed = job.tokens.subspan(item.token_begin, item.token_count);
  state.open_tokens.insert(state.open_tokens.end(), fed.begin(), fed.end());
  state.tokens += item.token_count;
  cursor.next_token += item.token_count;
  if (closes) {
    if (config_.memory.dialect == Dialect::inner) state.position_base += item.segment_rows + item.memory_rows;
    state.window_tokens = config_.memory.sliding_window && job.windowed ? std::ssize(state.open_tokens) : 0;
    state.previous_tokens = std::move(state.open_tokens);
    state.open_tokens.clear();
    ++state.closed_segments;
    cursor.prev_visible = std::move(cursor.visible);
    cursor.visible.clear();
    ++cursor.next_cut;
    if (!tokens_left) cursor.closing_due = false;
  }
  wave.items.push_back(std::move(item));
  return true;
}

void Planner::add_rows(Cursor& cursor, Item& item, Wave& wave) {
  const Job& job = *cursor.job;
  const StreamState& state = *job.state;
  Frame frame{.config = config_, .item = item};
  frame.window = state.window_tokens;
  frame.first = std::ssize(state.open_tokens);
  frame.tokens = frame.first + item.token_count;
  frame.base = config_.memory.dialect == Dialect::inner ? state.position_base : state.window_tokens;
  frame.grow = job.grow;

  const bool padded = !job.attention.empty();
  if (padded) {
    cursor.visible.insert(cursor.visible.end(), item.front_rows, 1);
    const auto* mask = job.attention.data() + item.token_begin;
    cursor.visible.insert(cursor.visible.end(), mask, mask + item.token_count);
    item.visible = cursor.visible;
    item.visible.insert(item.visible.end(), item.memory_rows, 1);
    if (frame.window > 0) item.prev_visible = cursor.prev_visible;
  }

  wave.rows.reserve(wave.rows.size() + item.row_count);
  for (int64_t i = 0; i < item.front_rows; ++i) wave.rows.push_back(front_row(frame, i));
  for (int64_t i = 0; i < item.token_count; ++i) {
    const int32_t id = job.tokens[item.token_begin + i];
    wave.rows.push_back(token_row(frame, id, frame.first + i));
    Row& row = wave.rows.back();
    row.uniform = padded && frame.open_memory_mask() && sees_nothing(row, item);
  }
  for (int64_t u = 0; u < item.memory_rows; ++u) wave.rows.push_back(memory_row(frame, u));
  for (int64_t i = item.row_begin; i < std::ssize(wave.rows); ++i) check_position(config_, wave.rows[i]);
}

}  // namespace armt
