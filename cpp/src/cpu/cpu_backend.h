// The CPU backend: float32 activations and state, weights in float32 or bfloat16.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/rotary.h"
#include "cpu/threads.h"
#include "cpu/weights.h"

namespace armt::cpu {

inline float* row_of(const Rows& rows, int64_t absolute) {
  return static_cast<float*>(rows.data) + (absolute - rows.origin) * rows.width;
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const ModelConfig& config, const BackendOptions& options);

  std::string device() const override { return "cpu"; }
  std::string description() const override;
  DType weight_dtype() const override { return weight_dtype_; }

  void load(Matrix which, int64_t layer, const HostMatrix& matrix) override;
  void load(Vector which, int64_t layer, std::span<const float> values) override;
  void finish_loading() override;
  int64_t weight_bytes() const override;

  BlockRef allocate(int64_t bytes) override;
  void copy(Block& to, const Block& from, int64_t bytes) override;
  void upload(Block& to, int64_t offset, const void* from, int64_t bytes) override;
  void download(const Block& from, int64_t offset, void* to, int64_t bytes) override;
  int64_t count_nonfinite(std::span<const Floats> values) override;
  int64_t kv_page_rows() const override;
  int64_t kv_page_bytes() const override;
  void export_kv(const KvCache& cache, float* k, float* v) override;
  void import_kv(KvCache& cache, const float* k, const float* v) override;

  std::unique_ptr<Workspace> make_workspace(int64_t slots, int64_t slot_rows) override;
  void run(Workspace& workspace, Groups groups, const std::function<void(Groups, const Scratch&)>& body) override;

  int64_t workers() const override { return pool_.threads(); }
  void work(int64_t most, const std::function<void()>& body) override;

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
  void logits(const Rows& hidden, int64_t first, int64_t count, Block& out, int64_t offset) override {
    logits(hidden, first, count, reinterpret_cast<float*>(static_cast<char*>(out.data) + offset));
  }
  void save_rows(const Rows& from, int64_t first, int64_t count, Block& to) override;
  void load_rows(const Block& from, int64_t count, const Rows& to, int64_t first) override;

  // Fills allocated blocks and workspaces with NaN, so that a test sees a value that was never
  // written.
  void set_poison(bool on) { poison_ = on; }

  const ModelConfig& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }
  const PackedMatrix& matrix(Matrix which, int64_t layer) const;
  const float* vector(Vector which, int64_t layer) const;  // null: this model has none

  // Dense rows of the caller: out[r, c0:c1] = finish(in[r] W^T), r < rows; finish.gated and
  // .activation are set here. Uses the pool, or runs inline inside a job of the pool.
  void project(const PackedMatrix& weights, Finish finish, const float* in, int64_t ld_in, int64_t rows, float* out,
               int64_t ld_out, int64_t c0 = 0, int64_t c1 = -1);

 private:
  struct LayerWeights {
    PackedMatrix matrices[static_cast<size_t>(Matrix::count)];
    Buffer vectors[static_cast<size_t>(Vector::count)];
  };

  const float* linear_bias(Matrix which, int64_t layer) const;  // null: none
  void norm_rows(Vector which, int64_t layer, const float* in, float* out, int64_t rows);
  void embed_row(const Group& group, int64_t index, float* out) const;

  const ModelConfig config_;
  const DType weight_dtype_;
  const Kernels& kernels_;
  ThreadPool pool_;
  std::vector<LayerWeights> layers_;
  Buffer positions_, memory_, sink_;  // float32, row-major
  bool poison_ = false;

  float score_scale(int64_t layer) const;
  // [RMS norm with weights `norm`, unless null] and rotation of `heads` heads that lie one after
  // another, in place.
  void turn_heads(const float* norm, int64_t position, int64_t heads, float* x);
  // Keys and values of rows begin .. begin+count-1 of the cell's current cache.
  void store_rows(const Group& group, const Cell& cell, const Rows& qkv, int64_t begin, int64_t count);

  const RotaryTable rotary_{config_};
};

}  // namespace armt::cpu
