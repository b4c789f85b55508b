// Prefill in 8 bits: the dense layers of waves of many rows. Decoding keeps the weights' own type.
#include "fp8.h"

#include <algorithm>
#include <string>
#include <utility>

#include "armt/error.h"
#include "check.h"
#include "slots.h"
#include "workspace.h"

namespace armt::cuda {
namespace {

constexpr int32_t kLeastRows = 256;  // of a group: smaller waves go the usual way
constexpr Matrix kMatrices[] = {Matrix::qkv, Matrix::attn_out, Matrix::mlp_up, Matrix::mlp_down};

}  // namespace

void CudaBackend::choose_prefill(const BackendOptions& options, const std::string& device) {
  if (!options.prefill_fp8) return;
  if (dtype_ != DType::bf16) {
    throw InvalidArgument("prefill_dtype: 'fp8' goes with weights in bfloat16; pass dtype='bfloat16'");
  }
  if (!can_multiply_fp8()) {
    throw DeviceError("prefill_dtype: 'fp8' was asked for on " + device +
                      ", expected a GPU of compute capability 9.0 (Hopper) and a build with its code (90a); use "
                      "prefill_dtype='same'");
  }
  prefill_fp8_ = true;
}

Fp8Product CudaBackend::fp8_product(Matrix which, int64_t c0, int64_t c1) const {
  const DecoderConfig& decoder = config_.decoder;
  const Shape shape = expected_shape(which, config_);
  const QuantisedMatrix& matrix = quantised_[static_cast<size_t>(which)];
  Fp8Product product;
  product.gated = which == Matrix::mlp_up && decoder.gated_mlp;
  product.weight = matrix.values.data();
  product.weight_scale = matrix.scales.as<float>();
  product.weight_rows = decoder.n_layers * shape.rows;
  product.layer_rows = shape.rows;
  product.bias = vectors_[static_cast<size_t>(bias_of(which))].data();
  product.depth = shape.cols;
  product.first = c0;
  product.cols = product.gated ? decoder.d_ff : (c1 < 0 ? shape.rows : c1) - c0;
  product.kind = decoder.activation;
  return product;
}

// Weights whose sizes the product takes, in all the ways that it is called.
void CudaBackend::quantise_weights() {
  if (!prefill_fp8_) return;
  for (const Matrix which : kMatrices) {
    const Fp8Product all = fp8_product(which, 0, -1);
    const bool parts = which == Matrix::qkv;  // keys and values alone, queries alone
    const int64_t queries = config_.query_width();
    const bool fits = fp8_fits(all) && (!parts || fp8_fits(fp8_product(which, queries, -1)));
    const DeviceBuffer& from = matrices_[static_cast<size_t>(which)];
    if (!fits || from.data() == nullptr) continue;
    QuantisedMatrix& to = quantised_[static_cast<size_t>(which)];
    to.values = DeviceBuffer(arena_, all.weight_rows * all.depth);
    to.scales = DeviceBuffer(arena_, all.weight_rows * 4);
    launch_quantise(from.data(), to.values.data(), to.scales.as<float>(), all.weight_rows, all.depth, main_.stream);
  }
}

bool CudaBackend::takes_fp8(Matrix which, const Part& part) const {
  return quantised_[static_cast<size_t>(which)].values.data() != nullptr && part.batch.max_group_rows >= kLeastRows;
}

int64_t CudaBackend::make_fp8_rows() {
  CudaScratch& scratch = *active_.scratch;
  const DecoderConfig& decoder = config_.decoder;
  const int64_t rows = scratch.hidden.bytes() / (decoder.d_model * element());
  grow(arena_, scratch.fp8, rows * std::max({decoder.d_model, config_.query_width(), decoder.d_ff}));
  grow(arena_, scratch.fp8_scale, rows * 4);
  return rows;
}

bool CudaBackend::fp8_norm(Vector which, const Part& part, const Rows& in, const Rows& out) {
  if (!takes_fp8(which == Vector::norm1 ? Matrix::qkv : Matrix::mlp_up, part)) return false;
  make_fp8_rows();
  const auto vector = [&](Vector one) { return vectors_[static_cast<size_t>(one)].as<float>(); };
  const Fp8Norm norm = {.weight = vector(which),
                        .bias = vector(norm_bias(which)),
                        .eps = static_cast<float>(config_.decoder.norm_eps),
                        .rms = config_.decoder.norm == NormKind::rms};
  const CudaScratch& scratch = *active_.scratch;
  launch_quantise(view(in), scratch.fp8.data(), scratch.fp8_scale.as<float>(), part.batch, norm, stream());
  active_.fp8_rows = out.data;
  return true;
}

bool CudaBackend::fp8_linear(Matrix which, const Part& part, const Rows& in, const Rows& out, Epilogue epilogue,
                             int64_t c0, int64_t c1) {
  if (!takes_fp8(which, part)) return false;
  Fp8Product product = fp8_product(which, c0, c1);
  product.in_rows = make_fp8_rows();
  const CudaScratch& scratch = *active_.scratch;
  if (std::exchange(active_.fp8_rows, nullptr) != in.data) {
    launch_quantise(view(in), scratch.fp8.data(), scratch.fp8_scale.as<float>(), part.batch, {}, stream());
  }
  product.in = scratch.fp8.data();
  product.in_scale = scratch.fp8_scale.as<float>();
  product.out = view(out);
  product.epilogue = epilogue;
  launch_fp8_product(product, part.batch, processors_, stream());
  return true;
}

}  // namespace armt::cuda
