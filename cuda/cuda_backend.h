// The CUDA backend: weights and activations in one type (float32, bfloat16, float16), state and accumulation in
// float32.
//
// One call of an operation covers groups of many layers. The weights of all layers lie one after another, the last
// layer first, so that neighbouring groups (neighbouring waves) are one strided-batched product.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "arena.h"
#include "backend.h"
#include "fp8.h"
#include "lt.h"
#include "meta.h"
#include "resting.h"
#include "staging.h"

namespace armt::cuda {

struct AttendArgs;
struct CudaWorkspace;
struct CudaScratch;

// A stream with the scratch memory of products that run on it.
struct Lane {
  cudaStream_t stream = nullptr;
  DeviceBuffer product_memory;
  ProductSpace space() const { return {stream, product_memory.data(), product_memory.bytes()}; }
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const ModelConfig& config, const BackendOptions& options, int device);
  ~CudaBackend() override;

  std::string device() const override { return "cuda:" + std::to_string(device_); }
  std::string description() const override { return description_; }
  DType weight_dtype() const override { return dtype_; }

  void load(Matrix which, int64_t layer, const HostMatrix& matrix) override;
  void load(Vector which, int64_t layer, std::span<const float> values) override;
  void finish_loading() override;
  int64_t weight_bytes() const override;

  BlockRef allocate(int64_t bytes) override;
  void copy(Block& to, const Block& from, int64_t bytes) override;
  void upload(Block& to, int64_t offset, const void* from, int64_t bytes) override;
  void download(const Block& from, int64_t offset, void* to, int64_t bytes) override;
  int64_t count_nonfinite(std::span<const Floats> values) override;
  BlockRef allocate_lent(int64_t bytes) override;
  bool spills() const override { return true; }
  void use(std::span<const BlockRef> blocks) override;
  void let_go(std::span<const BlockRef> blocks) noexcept override;
  int64_t spilled_bytes() const override { return resting_.spilled_bytes(); }
  uintptr_t stream_handle() const override;
  int64_t kv_page_rows() const override;
  int64_t kv_page_bytes() const override;
  void export_kv(const KvCache& cache, float* k, float* v) override;
  void import_kv(KvCache& cache, const float* k, const float* v) override;

  std::unique_ptr<Workspace> make_workspace(int64_t slots, int64_t slot_rows) override;
  void run(Workspace& workspace, Groups groups, const std::function<void(Groups, const Scratch&)>& body) override;
  int64_t replayed_rows() const override { return kReplayedRows; }
  void run_wave(Workspace& workspace, Groups layers, const std::function<void(Groups, const Scratch&)>& body) override;

  void embed(const Group& group, const Rows& out) override;
  void memory_read(Groups groups, const Rows& x) override;
  void memory_write(Groups groups, const Rows& x) override;
  void norm(Vector which, Groups groups, const Rows& in, const Rows& out) override;
  void linear(Matrix which, Groups groups, const Rows& in, const Rows& out, Epilogue epilogue, int64_t c0 = 0,
              int64_t c1 = -1) override;
  void rotate_queries(Groups groups, const Rows& qkv) override;
  void store_kv(Groups groups, const Rows& qkv) override;
  void attend(Groups groups, const Rows& qkv, const Rows& context) override;
  void gather(const Rows& from, std::span<const int64_t> rows, const Rows& to) override;
  void final_norm(const Rows& in, const Rows& out, int64_t count) override;
  void logits(const Rows& hidden, int64_t first, int64_t count, float* out) override;
  void logits(const Rows& hidden, int64_t first, int64_t count, Block& out, int64_t offset) override;
  bool chooses() const override { return true; }
  void choose(const Rows& hidden, int64_t first, std::span<const Draw> draws, Choice* choices) override;
  void save_rows(const Rows& from, int64_t first, int64_t count, Block& to) override;
  void load_rows(const Block& from, int64_t count, const Rows& to, int64_t first) override;

 private:
  friend struct CudaWorkspace;

  // One thread at a time enqueues work; each entry point holds this while it does.
  struct Entry;
  // Groups as the host needs them for products: the device's table, kept.
  struct Writers {  // cells of a group that write: their places among those of the table, the last group's first
    int64_t first = 0, count = 0;
  };
  struct Table {
    Groups groups;
    std::vector<DevGroup> host;
    std::vector<Writers> writers;
    std::vector<int32_t> cell_rows, cell_keys;  // of each cell
    Batch batch;
    DeviceBuffer memory;
  };
  // A part of a table.
  struct Part {
    std::span<const DevGroup> groups;
    Batch batch;
    std::span<const Writers> writers;
  };
  // What runs now: between the first and the last line of run().
  struct Active {
    CudaWorkspace* workspace = nullptr;
    CudaScratch* scratch = nullptr;
    Lane* lane = nullptr;
    Table* whole = nullptr;
    // A few rows: dense layers read weights once, and norm their input themselves. norm() only takes note.
    bool few = false;
    Vector norm = Vector::count;
    Rows norm_in;
    const void* fp8_rows = nullptr;  // the buffer whose rows lie in scratch.fp8, not in itself
    bool stores = false;             // attend() stores keys and values itself: store_kv() only takes note
  };
  // The work of a small wave, recorded: replayed for waves of the same shape in the same buffers.
  using ReplayKey = std::vector<int64_t>;
  struct Replay {
    bool warm = false;  // ran once, so that all buffers are there
    cudaGraphExec_t graph = nullptr;
  };
  static constexpr int64_t kReplayedRows = 8;

  int64_t stack_of(int64_t layer) const { return config_.decoder.n_layers - 1 - layer; }
  int64_t element() const { return size_of(dtype_); }
  Lane& lane() { return active_.lane != nullptr ? *active_.lane : main_; }
  cudaStream_t stream() { return lane().stream; }
  bool is_scratch(const Rows& rows) const;
  View view(const Rows& rows) const { return {rows.data, rows.width, is_scratch(rows)}; }
  int64_t row_index(const DevGroup& group, const Rows& rows) const {
    return is_scratch(rows) ? group.scratch : group.row;
  }

  void build_table(Table& table, Groups groups, std::span<const int64_t> scratch_rows, const DevRow* rows,
                   cudaStream_t stream);
  Part part_of(Groups groups);
  // The side's stream once the step before the last is done, so that a step is prepared beside the one before it.
  cudaStream_t entry_stream();
  void finish_entry(CudaWorkspace& workspace);
  CudaWorkspace& workspace_of(const Rows& residual) const;

  // One product per maximal run of groups with equal row counts and constant strides.
  struct Operands {
    const char* weight = nullptr;                // of stack 0
    const char* bias = nullptr;                  // of stack 0, or null
    int64_t weight_stride = 0, bias_stride = 0;  // elements per layer
    int64_t cols = 0, depth = 0;
  };
  struct Span {  // rows of one group in both buffers
    int64_t stack = 0, in_row = 0, out_row = 0, rows = 0;
  };
  void products(std::vector<Span> spans, const Operands& operands, Product base);
  // Logits [count, vocab] float32 to device memory.
  void head(const Rows& hidden, int64_t first, int64_t count, void* out);
  int64_t logits_rows(int64_t wanted) const;
  void* pinned(int64_t bytes);
  bool make_room(int64_t bytes);
  bool few_linear(Matrix which, const DevGroup& group, const Rows& in, const Rows& out, Epilogue epilogue, int64_t c0,
                  int64_t c1);
  // Prefill in 8 bits (fp8.cpp): false where the usual product must do it.
  void choose_prefill(const BackendOptions& options, const std::string& device);
  void quantise_weights();
  Fp8Product fp8_product(Matrix which, int64_t c0, int64_t c1) const;  // as far as the weights say
  bool takes_fp8(Matrix which, const Part& part) const;
  int64_t make_fp8_rows();  // the scratch's rows
  // The norm in 8 bits for the product that reads it next.
  bool fp8_norm(Vector which, const Part& part, const Rows& in, const Rows& out);
  bool fp8_linear(Matrix which, const Part& part, const Rows& in, const Rows& out, Epilogue epilogue, int64_t c0,
                  int64_t c1);
  AttendArgs attend_args(const Batch& batch, const Rows& qkv, const Rows& context) const;
  // One row through all layers in one kernel; false where its kernel does not serve.
  bool decode_wave(CudaWorkspace& workspace, Groups layers);
  ReplayKey replay_key(const CudaWorkspace& workspace, Groups layers) const;
  cudaGraphExec_t record(const std::function<void()>& enqueue);
  void forget_replays() noexcept;

  int64_t matrix_rows(Matrix which) const;
  int64_t vector_size(Vector which) const;
  // Rows of the product that a write begins with: key, value and gate, padded.
  int64_t write_width() const;
  int64_t padded_features() const { return (config_.features() + 7) / 8 * 8; }
  int64_t kv_row() const { return (config_.decoder.head_dim + 7) / 8 * 8; }  // elements of one head's key in a page

  const ModelConfig config_;
  const DType dtype_;
  const int device_;
  std::string description_;
  int processors_ = 0;
  bool fuses_gate_ = false;
  bool prefill_fp8_ = false;
  bool decodes_ = true;  // until decode_wave() is refused
  mutable std::recursive_mutex mutex_;
  Arena arena_;
  Resting resting_;
  std::unique_ptr<Lt> lt_;
  Lane main_, side_;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr;  // the last step began; its side is done
  cudaEvent_t entered_ = nullptr;                    // what the next step needs is there
  Staging staging_;
  void* pinned_ = nullptr;  // results on their way to the host
  int64_t pinned_bytes_ = 0;
  DeviceBuffer logits_memory_, chosen_;
  DeviceBuffer draws_, choice_rows_, choice_bins_, choice_lists_;  // of choose()
  DeviceBuffer ranges_;                                            // of count_nonfinite()
  int64_t unchecked_rows_ = 0;                                     // entered since the stream was last waited for

  // [layers reversed][out][in]; mem_key, mem_value and mem_gate share one: [layers reversed][d_mem + D + gate][D].
  DeviceBuffer matrices_[static_cast<size_t>(Matrix::count)];
  DeviceBuffer vectors_[static_cast<size_t>(Vector::count)];
  DeviceBuffer write_weights_;
  struct QuantisedMatrix {
    DeviceBuffer values;  // e4m3, in the order of matrices_
    DeviceBuffer scales;  // float32, one an output channel
  };
  QuantisedMatrix quantised_[static_cast<size_t>(Matrix::count)];
  DeviceBuffer frequencies_;  // [rotary_dims / 2] float32

  Active active_;
  Table step_tables_[2], wave_table_, last_table_;  // of steps, by turns; of small waves; of compacted rows
  size_t next_table_ = 0;
  std::map<ReplayKey, Replay> replays_;
  std::map<const void*, CudaWorkspace*> workspaces_;  // by residual
};

}  // namespace armt::cuda
