// Attention: its arguments and the choice of the kernel.
#include <cmath>

#include "attention.cuh"
#include "check.h"
#include "workspace.h"

namespace armt::cuda {

AttendArgs CudaBackend::attend_args(const Batch& batch, const Rows& qkv, const Rows& context) const {
  const DecoderConfig& decoder = config_.decoder;
  AttendArgs args;
  args.batch = batch;
  args.qkv = view(qkv);
  args.context = view(context);
  args.angles = active_.workspace->angles.as<float2>();
  args.q_norm = vectors_[static_cast<size_t>(Vector::q_norm)].as<float>();
  args.k_norm = vectors_[static_cast<size_t>(Vector::k_norm)].as<float>();
  args.q_heads = static_cast<int>(decoder.n_heads);
  args.kv_heads = static_cast<int>(decoder.n_kv_heads);
  args.head_dim = static_cast<int>(decoder.head_dim);
  args.kv_row = static_cast<int>(kv_row());
  args.page_rows = static_cast<int>(kv_page_rows());
  args.half = static_cast<int>(decoder.rotary_dims / 2);
  args.scale = static_cast<float>(
      decoder.attention_scale > 0.0 ? decoder.attention_scale : 1.0 / std::sqrt(static_cast<double>(decoder.head_dim)));
  args.by_layer = decoder.scale_by_inverse_layer;
  args.eps = static_cast<float>(decoder.norm_eps);
  return args;
}

void CudaBackend::attend(Groups groups, const Rows& qkv, const Rows& context) {
  const Entry entry(*this);
  const Part part = part_of(groups);
  if (part.batch.max_cell_rows == 0) return;
  AttendArgs args = attend_args(part.batch, qkv, context);

  constexpr int kFewRows = 4, kFewRowsOfShort = 16, kShort = 256;
  const int few = args.batch.max_keys <= kShort ? kFewRowsOfShort : kFewRows;
  if (dtype_ != DType::f32 && args.batch.max_cell_rows > few) {
    constexpr int kManyRows = 64;
    if (args.batch.max_cell_rows > kManyRows && launch_hopper(dtype_, args, stream())) return;
    launch_flash(dtype_, args, stream());
    return;
  }
  args.stores = active_.stores;
  active_.stores = false;
  const FewShares shares = few_shares(args, processors_);
  args.splits = shares.splits;
  if (args.splits > 1) {
    CudaScratch& scratch = *active_.scratch;
    grow(arena_, scratch.partial, shares.floats * 4);
    grow_zeroed(arena_, scratch.counters, shares.counters * 4, stream());
    args.partial = scratch.partial.as<float>();
    args.counters = scratch.counters.as<int>();
  }
  launch_few(dtype_, args, stream());
}

}  // namespace armt::cuda
