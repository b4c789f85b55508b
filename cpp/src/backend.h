// The seam between the engine and a device. Everything above it is device-free; everything below implements these
// operations for one device. Activations are opaque rows whose element type the backend chooses (the CPU: float32).
//
// Letters: R rows, D d_model, c head_dim, Hq/Hkv query and key/value heads, m memory tokens, h memory heads,
// F features per memory head, E = D / h values per memory head, S segment_size.
//
// Contract of every operation: a row's result depends on that row, its stream's state and the weights only; never on
// the rows beside it, on the number of threads or on how rows are grouped. On the CPU in float32 this holds bit for
// bit.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "armt/config.h"

namespace armt {

// ---- weights

// A matrix in host memory, [rows, cols] with strides in elements, so that a transposed view needs no copy.
struct HostMatrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 1;
};

// Matrices act as y = x W^T (+ bias), W [out, in].
enum class Matrix : uint8_t {
  qkv,        // [(Hq + 2 Hkv) c, D]: queries, keys, values
  attn_out,   // [D, Hq c]
  mlp_up,     // [d_ff, D]; gated: [2 d_ff, D], the gate's rows first
  mlp_down,   // [D, d_ff]
  mem_query,  // [d_mem, D]
  mem_key,    // [d_mem, D]
  mem_value,  // [D, D]
  mem_gate,   // [gate_rows, D]
  head,       // [vocab, D], layer 0
  embedding,  // [vocab, D], layer 0
  positions,  // [learned_positions, D], layer 0
  memory,     // [m, D], layer 0
  sink,       // [1, D], layer 0
  count
};

// Vectors are float32.
enum class Vector : uint8_t {
  qkv_bias,
  attn_out_bias,
  mlp_up_bias,
  mlp_down_bias,
  mem_gate_bias,
  norm1,
  norm1_bias,
  norm2,
  norm2_bias,
  q_norm,
  k_norm,  // [c], shared by the heads
  final_norm,
  final_norm_bias,  // layer 0
  count
};

// ---- state

// Device memory with shared ownership; copies of a state share blocks until one of them writes.
struct Block {
  void* data = nullptr;
  void* spilled = nullptr;  // host memory that holds the content while `data` is null, because nobody uses the block
  int64_t bytes = 0;
  std::function<void(Block&)> release;
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    if (release) release(*this);
  }
};
using BlockRef = std::shared_ptr<Block>;

// `count` float32 values from byte `offset` of a block on.
struct Floats {
  const Block* block = nullptr;
  int64_t offset = 0;
  int64_t count = 0;
};

// Infinities and NaNs among values in host memory.
int64_t count_nonfinite(std::span<const float> values);

// Statistics of the last write of one layer, kept behind z: mean, least and greatest gamma; mean beta.
inline constexpr int64_t kWriteStats = 4;

// One layer's associative memory: A [h, F, E], then z [h, F] if use_denom, then kWriteStats floats; all float32.
struct Association {
  BlockRef block;  // null until the first write
  bool written() const { return block != nullptr; }
};

// A page of keys and values: up to kv_page_rows() rows of one layer of one stream, in the backend's own layout.
// `used` is the high-water mark over all caches that share the page: a cache may append in place only if its own
// row count in the page equals `used` (compare-and-swap); otherwise it takes a copy of the page first.
struct KvPage {
  BlockRef block;
  std::atomic<int64_t> used{0};
};

// Keys and values after rotation, rows 0 .. rows-1 in order; row r lies in pages[r / kv_page_rows()].
struct KvCache {
  std::vector<std::shared_ptr<KvPage>> pages;
  int64_t rows = 0;
};

// All that one layer of one stream carries from call to call.
struct LayerState {
  Association memory;
  KvCache current;   // rows of the open segment: front rows, tokens (memory rows only while it is being closed)
  KvCache previous;  // sliding window: token rows of the segment before
};

// ---- work

// How one row enters the model and what it sees. It sees rows [prev_begin, end) of the previous segment's cache and
// rows [cur_begin, cur_end) of the current one, less padded rows unless sees_padding
// (current) and sees_prev_padding (previous).
struct Row {
  static constexpr int32_t kSink = -1;
  static constexpr int32_t kFirstMemory = -2;  // memory token t has source kFirstMemory - t
  int32_t source = 0;                          // token id, or one of the above
  int32_t prev_begin = 0;
  int32_t cur_begin = 0;  // above 0 only where generation lets a windowed segment outgrow its window
  int32_t cur_end = 0;
  bool sees_padding = false;
  bool sees_prev_padding = false;
  bool uniform = false;  // attends equally to every column, cached and current (a padded row that may see nothing)
  int64_t position = 0;  // row of the position table, or rotary position
};

// The rows of one stream at one layer. state->current.rows already counts the rows that this piece of the stream adds.
struct Cell {
  int64_t row_begin = 0;  // first row, absolute index into the activation buffers
  int64_t row_count = 0;
  int64_t write_rows = 0;  // trailing rows that write the memory; 0: no write
  int64_t kv_begin = 0;    // index in state->current of this cell's first row
  LayerState* state = nullptr;
  Block* next_memory = nullptr;           // where the write puts A, z, statistics; may be state->memory's own block
  const Block* carried = nullptr;         // RMT: memory vectors [m, D] float32 in place of the learned ones, or null
  const uint8_t* visible = nullptr;       // [state->current.rows], 0 = padded; null: all visible
  const uint8_t* prev_visible = nullptr;  // [state->previous.rows], likewise
};

// Cells of one layer whose rows lie one after another.
struct Group {
  int64_t layer = 0;
  int64_t row_begin = 0, row_count = 0;  // absolute rows, the union of the cells' rows
  const Row* rows = nullptr;             // [row_count]
  std::span<const Cell> cells;
};
using Groups = std::span<const Group>;

// Activation rows, [.., width] row-major, element type and memory of the backend; absolute row r lies at index
// r - origin.
struct Rows {
  void* data = nullptr;
  int64_t width = 0;
  int64_t origin = 0;
};

struct Scratch {
  Rows hidden;   // D
  Rows qkv;      // (Hq + 2 Hkv) c
  Rows context;  // Hq c
  Rows ff;       // d_ff after the activation
};

// Buffers of one running call, sized once; its scratch belongs to the backend.
struct Workspace {
  int64_t slots = 0, slot_rows = 0;
  Rows residual;  // D, slots * slot_rows rows: wave w in slot w % slots
  Rows last;      // D, slot_rows rows: compacted rows of the last layer
  Rows normed;    // D, slot_rows rows: after the final norm
  virtual ~Workspace() = default;
};

// How a row's next token is chosen; engine/sampler.h says what the settings mean.
struct Draw {
  double temperature = 0.0;
  double top_p = 1.0, min_p = 0.0;
  double u = 0.0;  // uniform number in [0, 1); temperature 0 needs none
  int64_t top_k = 0;
};
struct Choice {
  int32_t token = 0;
  double logprob = 0;  // log softmax of the model's own logits, before any setting
};

enum class Epilogue : uint8_t {
  none,      // out = in W^T + bias
  add,       // out += in W^T + bias
  activate,  // out = act(in W^T + bias), or act(gate) * up when the MLP is gated
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string device() const = 0;       // "cpu", "cuda:0"
  virtual std::string description() const = 0;  // for people: instruction set and threads, or the GPU's name
  virtual DType weight_dtype() const = 0;

  // ---- weights: called once each before anything else, not thread-safe. Absent biases are never loaded; an absent
  // head means that the embedding serves as one.
  virtual void load(Matrix which, int64_t layer, const HostMatrix& matrix) = 0;
  virtual void load(Vector which, int64_t layer, std::span<const float> values) = 0;
  virtual void finish_loading() = 0;
  virtual int64_t weight_bytes() const = 0;

  // ---- memory, thread-safe. Throws OutOfMemory.
  virtual BlockRef allocate(int64_t bytes) = 0;
  int64_t block_bytes() const { return block_bytes_.load(std::memory_order_relaxed); }  // of all blocks that live
  // Memory that other libraries may read on streams of their own: freed when nothing on the device can be at it.
  virtual BlockRef allocate_lent(int64_t bytes) { return allocate(bytes); }
  // A device may move blocks that nobody uses to host memory when it is full. A new block is in use until it is let go;
  // use() brings blocks back (OutOfMemory: none is in use then), and each call of it is ended by one of let_go().
  // download() and upload() reach a block wherever it is; all other operations want blocks in use.
  virtual bool spills() const { return false; }
  virtual void use([[maybe_unused]] std::span<const BlockRef> blocks) {}
  virtual void let_go([[maybe_unused]] std::span<const BlockRef> blocks) noexcept {}
  virtual int64_t spilled_bytes() const { return 0; }
  // The stream that orders all work, as DLPack names it; 0: none.
  virtual uintptr_t stream_handle() const { return 0; }
  virtual void copy(Block& to, const Block& from, int64_t bytes) = 0;
  virtual void upload(Block& to, int64_t offset, const void* from, int64_t bytes) = 0;
  virtual void download(const Block& from, int64_t offset, void* to, int64_t bytes) = 0;
  // Infinities and NaNs in all of them together.
  virtual int64_t count_nonfinite(std::span<const Floats> values) = 0;
  virtual int64_t kv_page_rows() const = 0;
  virtual int64_t kv_page_bytes() const = 0;
  // Rows [0, cache.rows) as k, v [rows, Hkv, c] float32.
  virtual void export_kv(const KvCache& cache, float* k, float* v) = 0;
  virtual void import_kv(KvCache& cache, const float* k, const float* v) = 0;

  // ---- one running call
  virtual std::unique_ptr<Workspace> make_workspace(int64_t slots, int64_t slot_rows) = 0;
  // Runs `body` over all groups, either at once or split (one group a call, several calls at the same time), each with
  // scratch of its own. The groups are independent of one another.
  virtual void run(Workspace& workspace, Groups groups, const std::function<void(Groups, const Scratch&)>& body) = 0;

  // Waves of at most this many rows that write no memory may go through run_wave().
  virtual int64_t replayed_rows() const { return 0; }
  // Runs one wave through all layers: `body` is called for the group of each layer in turn, or what it enqueued for a
  // wave of the same shape is replayed. Callers prepare all layers first.
  virtual void run_wave(Workspace& workspace, Groups layers, const std::function<void(Groups, const Scratch&)>& body) {
    for (size_t l = 0; l < layers.size(); ++l) run(workspace, layers.subspan(l, 1), body);
  }

  // Threads of the device that may run cells side by side; 0: it wants all groups in one call.
  virtual int64_t workers() const { return 0; }
  // Calls `body` on up to `most` workers at once, always on the calling thread too. Inside, run() takes one group.
  virtual void work([[maybe_unused]] int64_t most, const std::function<void()>& body) { body(); }

  // ---- operations; rows of `groups`, in place or from one buffer to another
  // out = embedding (+ position row) of each row; sink and memory vectors likewise.
  virtual void embed(const Group& group, const Rows& out) = 0;
  // x += Read(x) for cells whose memory was written:  q = phi(W_q x) per head, [normalised];
  // Read = (A^T q) / (z . q + 1e-5)  (no division without use_denom).          arXiv 2407.04841, 2102.11174
  virtual void memory_read(Groups groups, const Rows& x) = 0;
  // y_t = last write_rows rows of each cell; k = phi(W_k y), v = W_v y, beta = sigmoid(W_b y + b);
  // A' = A + sum_t k_t (x) beta_t (v_t - old_t),  z' = z + sum_t gamma_t k_t   (first write: gamma = 1)
  virtual void memory_write(Groups groups, const Rows& x) = 0;
  // out = norm(in), weights norm1 or norm2 of each group's layer.
  virtual void norm(Vector which, Groups groups, const Rows& in, const Rows& out) = 0;
  // out[:, c0:c1] = epilogue(in W[c0:c1]^T + b[c0:c1]); c1 < 0: all columns. A backend may compute more columns.
  virtual void linear(Matrix which, Groups groups, const Rows& in, const Rows& out, Epilogue epilogue, int64_t c0 = 0,
                      int64_t c1 = -1) = 0;
  // Query heads of `qkv` in place: [RMS norm], rotation by each row's position.
  virtual void rotate_queries(Groups groups, const Rows& qkv) = 0;
  // Key heads of `qkv` [normed] and rotated, value heads as they are, into each cell's cache at kv_begin; the pages are
  // there already.
  virtual void store_kv(Groups groups, const Rows& qkv) = 0;
  // context = softmax(scale q k^T) v over what each row sees; a row that sees nothing gets 0. Scores are never stored.
  virtual void attend(Groups groups, const Rows& qkv, const Rows& context) = 0;
  // to[i] = from[rows[i]], i = 0 .. count-1 (absolute rows of `from`; `to` from its origin on).
  virtual void gather(const Rows& from, std::span<const int64_t> rows, const Rows& to) = 0;
  virtual void final_norm(const Rows& in, const Rows& out, int64_t count) = 0;  // from their origins on
  // `out` [count, vocab] float32 in host memory; `hidden` rows first .. first+count-1 counted from its origin.
  virtual void logits(const Rows& hidden, int64_t first, int64_t count, float* out) = 0;
  // The same to byte `offset` of a block.
  virtual void logits(const Rows& hidden, int64_t first, int64_t count, Block& out, int64_t offset) = 0;
  // Whether choose() is there; otherwise the host chooses from logits().
  virtual bool chooses() const { return false; }
  // Of each row from `first` on (as many as `draws`) what choose_token() chooses without a repetition penalty; sums may
  // differ from its own by 1e-9 of their size.
  virtual void choose([[maybe_unused]] const Rows& hidden, [[maybe_unused]] int64_t first,
                      [[maybe_unused]] std::span<const Draw> draws, [[maybe_unused]] Choice* choices) {}
  // Rows first .. first+count-1 (from the origin) to and from a block of float32 [count, D].
  virtual void save_rows(const Rows& from, int64_t first, int64_t count, Block& to) = 0;
  virtual void load_rows(const Block& from, int64_t count, const Rows& to, int64_t first) = 0;

 protected:
  // Kept by allocate() and by the blocks' release.
  void count_block(int64_t bytes) { block_bytes_.fetch_add(bytes, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> block_bytes_{0};
};

struct BackendOptions {
  std::string device = "cpu";  // "cpu", "cuda", "cuda:1", "auto"
  DType weight_dtype = DType::f32;
  int64_t memory_limit = 0;  // bytes of device memory; 0: what there is. GPUs only
  bool prefill_fp8 = false;  // dense layers of long inputs in 8 bits, on GPUs that can
  int64_t threads = 0;       // CPU: 0 = all cores
  std::string isa = "";      // CPU: "" = best available; "baseline", "avx2", "avx512"
};

std::unique_ptr<Backend> make_backend(const ModelConfig& config, const BackendOptions& options);
std::unique_ptr<Backend> make_cpu_backend(const ModelConfig& config, const BackendOptions& options);
std::unique_ptr<Backend> make_cuda_backend(const ModelConfig& config, const BackendOptions& options);
int cuda_device_count();  // 0 in a build without CUDA, without a driver or without a GPU

}  // namespace armt
