// One row through all layers at once: what the decoding kernel wants to know.
#include <algorithm>
#include <cstdlib>

#include "association.cuh"
#include "check.h"
#include "decode.h"
#include "slots.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

// ARMT_NO_FUSED_DECODE: every operation a kernel of its own (for comparisons).
bool allowed() {
  static const bool is_allowed = std::getenv("ARMT_NO_FUSED_DECODE") == nullptr;
  return is_allowed;
}

}  // namespace

bool CudaBackend::decode_wave(CudaWorkspace& ws, Groups layers) {
  const DecoderConfig& decoder = config_.decoder;
  if (layers.front().row_count != 1 || decoder.parallel_residual || !decodes_ || !allowed() || !decodes_here(dtype_)) {
    return false;
  }
  CudaScratch& scratch = ws.main;
  const auto matrix = [&](Matrix which) { return matrices_[static_cast<size_t>(which)].data(); };
  const auto vector = [&](Vector which) { return vectors_[static_cast<size_t>(which)].data(); };
  const auto norm = [&](Vector which) {
    return DecodeNorm{.weight = reinterpret_cast<const float*>(vector(which)),
                      .bias = reinterpret_cast<const float*>(vector(norm_bias(which)))};
  };
  DecodeArgs args;
  const auto product = [&](int place, Matrix which, const Rows& in, int sides, bool shared) {
    args.products[place] = {.weight = matrix(which),
                            .bias = vector(bias_of(which)),
                            .cols = static_cast<int>(matrix_rows(which)) / sides,
                            .depth = static_cast<int>(in.width),
                            .sides = sides,
                            .shared = shared};
  };
  product(DecodeArgs::kQkv, Matrix::qkv, scratch.rows.hidden, 1, false);
  product(DecodeArgs::kOut, Matrix::attn_out, scratch.rows.context, 1, true);
  product(DecodeArgs::kUp, Matrix::mlp_up, scratch.rows.hidden, decoder.gated_mlp ? 2 : 1, false);
  product(DecodeArgs::kDown, Matrix::mlp_down, scratch.rows.ff, 1, true);
  args.norms[0] = norm(Vector::norm1);
  args.norms[1] = norm(Vector::norm2);
  args.eps = static_cast<float>(decoder.norm_eps);
  args.rms = decoder.norm == NormKind::rms;
  args.kind = decoder.activation;
  args.attend = attend_args(part_of(layers).batch, scratch.rows.qkv, scratch.rows.context);
  args.attend.batch.rows += layers.front().row_begin;
  args.reads = std::ranges::any_of(layers, [](const Group& group) { return group.cells[0].state->memory.written(); });
  args.memory = shape_of(config_, padded_features(), write_width());
  args.mem_query = matrix(Matrix::mem_query);
  args.layers = static_cast<int>(layers.size());
  args.width = static_cast<int>(decoder.d_model);
  DecodeRoom room;
  if (!plan_decode(args, room, processors_)) return false;

  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  grow(arena_, scratch.decode, aligned(room.sums) + aligned(room.totals) + room.queries);
  grow_zeroed(arena_, scratch.arrivals, kDecodeCounters * static_cast<int64_t>(sizeof(unsigned)), main_.stream);
  char* memory = scratch.decode.data();
  args.sums = reinterpret_cast<float*>(memory);
  args.totals = reinterpret_cast<float2*>(memory + aligned(room.sums));
  args.queries = reinterpret_cast<float*>(memory + aligned(room.sums) + aligned(room.totals));
  args.counters = scratch.arrivals.as<unsigned>();
  args.x = static_cast<char*>(ws.residual.data) + layers.front().row_begin * decoder.d_model * element();
  args.qkv = scratch.rows.qkv.data;
  args.ff = scratch.rows.ff.data;
  decodes_ = launch_decode(dtype_, args, processors_, main_.stream);
  return decodes_;
}

}  // namespace armt::cuda
